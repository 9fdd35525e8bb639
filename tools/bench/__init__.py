"""Benchmarks: speed and memory, printed as ratios measured in one run. Each file is a command."""
