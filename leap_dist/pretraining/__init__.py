"""Supervised training of teachers: the demo's, on the embedded digits, and one's own, on labelled shards."""
