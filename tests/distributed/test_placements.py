"""Every placement gives the features of the replicated teacher, whatever the number of ranks."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runs import on_ranks, run_ok, scalars, write_config

SHORT = {"teacher": True, "probe_epochs": 2}


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("ranks", "families"), [(2, "one"), *(pytest.param(ranks, "all", marks=SLOW) for ranks in (2, 3, 4))]
)
def test_features_are_the_replicated_ones_at_every_block(ranks: int, families: str) -> None:
    assert on_ranks(ranks, "placement_worker.py", families).count("placements equal") == ranks


@SLOW
def test_a_teacher_in_fp8_is_the_replicated_one_in_every_placement() -> None:
    assert on_ranks(2, "float8_worker.py").count("placements equal") == 2


BATCH = {2: 64, 3: 48, 4: 64}  # by number of ranks


@pytest.fixture(scope="module")
def replicated(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], Path]:
    """By number of ranks (sums over ranks round differently) and prefetch, the run that every placement repeats."""

    @functools.cache
    def run(ranks: int, prefetch: int) -> Path:
        folder = tmp_path_factory.mktemp(f"replicated-{ranks}-{prefetch}")
        config = write_config(folder, teacher={"prefetch": prefetch}, data={"global_batch": BATCH[ranks]})
        run_ok(config, processes=ranks)
        return folder / "run"

    return run


PIPELINED_AT_4 = "block 4 of 6: pipelined (replicated would take"


@pytest.mark.parametrize(
    ("ranks", "teacher", "said"),
    [
        (2, {"placement": "sharded", "prefetch": 1}, ""),
        (2, {"placement": "auto", "memory_budget": 0.0004, "prefetch": 1}, PIPELINED_AT_4),
        (2, {"placement": "pipelined", "prefetch": 1}, ""),
        pytest.param(2, {"placement": "sharded"}, "", marks=SLOW),
        pytest.param(2, {"placement": "pipelined", "microbatches": 2}, "", marks=SLOW),
        pytest.param(2, {"placement": "auto", "memory_budget": 0.0004}, PIPELINED_AT_4, marks=SLOW),
        pytest.param(3, {"placement": "sharded"}, "", marks=SLOW),
        pytest.param(3, {"placement": "pipelined", "microbatches": 4}, "", marks=SLOW),
        pytest.param(4, {"placement": "pipelined", "stages": 2, "rebalance": False}, "", marks=SLOW),
        pytest.param(4, {"placement": "pipelined", "microbatches": 4}, "", marks=SLOW),
        pytest.param(2, {"placement": "sharded", "compile": True}, "", marks=SLOW),
        pytest.param(2, {"placement": "pipelined", "compile": True}, "", marks=SLOW),
    ],
)
def test_runs_are_the_replicated_one(
    ranks: int, teacher: dict[str, Any], said: str, replicated: Callable[[int, int], Path], tmp_path: Path
) -> None:
    config = write_config(tmp_path, teacher=teacher, engine={"zero_stage": 2}, data={"global_batch": BATCH[ranks]})
    reference = replicated(ranks, teacher.get("prefetch", 0))
    assert said in run_ok(config, processes=ranks)
    losses, expected = scalars(tmp_path / "run", "loss/total"), scalars(reference, "loss/total")
    assert losses.keys() == expected.keys()
    assert max(abs(losses[step] - expected[step]) for step in expected) < 1e-5
    blocks = scalars(tmp_path / "run", "curriculum/block")
    assert blocks == scalars(reference, "curriculum/block")
    assert len(set(blocks.values())) >= 4, "fewer than three advances show little"


@SLOW
@pytest.mark.parametrize("placement", ["sharded", "pipelined"])
def test_the_teacher_is_evaluated_on_unequal_shares(placement: str, tmp_path: Path) -> None:
    """297 images on two ranks, in batches of 64: one rank has a row more, and both a short batch."""
    accuracies = []
    for name in ("replicated", placement):
        (folder := tmp_path / name).mkdir()
        config = write_config(folder, teacher={"placement": name}, data={"val": "digits"}, evaluation=SHORT)
        run_ok(config)
        summary = json.loads((folder / "run" / "summary.json").read_text())
        accuracies.append((summary["teacher_patch_knn"], summary["teacher_cls_probe"]))
    # The blocks see other batches, which may round otherwise: one image that lies between two classes may change sides.
    assert accuracies[0] == pytest.approx(accuracies[1], abs=1.01 / 297)


@SLOW
@pytest.mark.parametrize("placement", ["sharded", "pipelined"])
@pytest.mark.parametrize("what", ["flat", "share"])
def test_memory(what: str, placement: str) -> None:
    assert on_ranks(2, "memory_worker.py", what, placement).count("MiB") == 2


@SLOW
@pytest.mark.parametrize("placement", ["sharded", "pipelined"])
def test_the_cost_model_knows_what_is_sent(placement: str) -> None:
    printed = on_ranks(2, "cost_worker.py", placement)
    assert printed.count("bytes as predicted") == 2
    print(printed)
