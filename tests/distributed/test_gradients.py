"""Gradients over ranks at ZeRO stage 0: the mean, with DeepSpeed's own bits, as views of one buffer."""

from __future__ import annotations

from runs import on_ranks


def test_gradients_are_means_in_one_buffer() -> None:
    """Three ranks, two micro-batches, two dtypes; a parameter that no loss reaches, and one that is not trained."""
    assert on_ranks(3, "gradients_worker.py").count("gradients are means") == 3
