"""How student and teacher tokens meet: heads, losses, and the score that the curriculum judges by.

Nothing here knows where tokens come from or which block is the target.
"""

from __future__ import annotations

from leap_dist.matching.calibration import Calibration
from leap_dist.matching.cka import constant, constant_rows, linear_cka, linear_cka_of_features
from leap_dist.matching.heads import check_impl, check_widths
from leap_dist.matching.objective import Match, Objective, mean_of
from leap_dist.matching.reset import reset_heads
from leap_dist.matching.score import Evidence

__all__ = [
    "Calibration",
    "Evidence",
    "Match",
    "Objective",
    "check_impl",
    "check_widths",
    "constant",
    "constant_rows",
    "linear_cka",
    "linear_cka_of_features",
    "mean_of",
    "reset_heads",
]
