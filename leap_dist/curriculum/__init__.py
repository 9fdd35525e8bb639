"""Which teacher block is the target now, when the next one is, and how all ranks come to one decision.

Numbers in, numbers out: no tensor of a model is seen here, and nothing is trained.
"""

from __future__ import annotations

from leap_dist.curriculum.policy import Curriculum, build_curriculum

__all__ = ["Curriculum", "build_curriculum"]
