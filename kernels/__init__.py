"""Kernels of leap_dist: one folder per op, with the same stems (op, reference, gram, triton_kernel)."""

from leap_kernels.feature_match import Moments, feature_match

__all__ = ["Moments", "feature_match"]
