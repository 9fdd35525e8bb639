"""What tools/evaluate.py and tools/analyze.py look at, and the tasks by which models are judged."""
