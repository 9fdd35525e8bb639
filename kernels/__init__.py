"""Kernels of leap_dist: one folder per op, with the same stems (op, reference, gram, triton_kernel)."""

from leap_kernels.feature_match import Moments, alignment_moments, feature_match

__all__ = ["Moments", "alignment_moments", "feature_match"]
