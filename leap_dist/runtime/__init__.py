"""What a run stands on: ranks, the DeepSpeed engine, checkpoints, locks, signals, files and clocks.

Nothing here knows a curriculum, a teacher or a loss. Import the modules themselves: config errors are shown before
torch is imported, so this file imports nothing.
"""
