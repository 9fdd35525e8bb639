"""What a run writes and shows: the journal, TensorBoard, FLOPs and seconds, traces, and runs drawn side by side.

Nothing here changes what a run computes.
"""
