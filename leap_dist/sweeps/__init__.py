"""Grids of runs: a plan from a YAML, the processes that make it, its tables.

Nothing here trains; each run is `leap_dist/train.py` in a process of its own.
"""
