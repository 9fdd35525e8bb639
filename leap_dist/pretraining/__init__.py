"""Supervised training of teachers: the demo's, on the embedded digits, and one's own, on labelled shards.

No distillation: a teacher is made here before any run has one.
"""
