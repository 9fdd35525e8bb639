"""Linear projection and feature-matching loss in one op, with the alignment moments as a by-product."""

from leap_kernels.feature_match.op import alignment_moments, choose, feature_match, obstacle
from leap_kernels.feature_match.reference import Moments

__all__ = ["Moments", "alignment_moments", "choose", "feature_match", "obstacle"]
