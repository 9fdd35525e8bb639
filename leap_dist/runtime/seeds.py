"""Seeds of a run's random numbers: every draw is a function of (seed, step, stream), so a resumed run repeats it."""

from __future__ import annotations

import numpy as np

MIXUP, DROPOUT, HEAD = range(3)  # streams


def step_seed(seed: int, step: int, *stream: int) -> int:
    """The seed of a stream of random numbers at a step of the run with `seed`; a whole number below 2**63."""
    mixed = np.random.SeedSequence([seed, step, *stream])
    return int(mixed.generate_state(1, np.uint64)[0] >> 1)
