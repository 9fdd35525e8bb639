"""What the tools that measure have in common: interleaved timing, and a run's own steps on images at hand.

No measurement that a run makes of itself: that is monitoring/. The commands are in tools/bench/.
"""
