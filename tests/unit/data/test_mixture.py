"""Several sources with proportions."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
import torch

from leap_dist.config import DataConfig, load
from leap_dist.data import build_eval_loader, build_train_loader, check_sources, write_shards
from leap_dist.data.digits import digit_samples
from leap_dist.data.mixture import ONE, MixedOrder, dealt, open_set, turns
from leap_dist.data.specimens import fixed_images
from leap_dist.data.store import class_names
from leap_dist.errors import UserError
from leap_dist.runtime.distributed import World

SIZES = [np.array(sizes) for sizes in ([5, 7, 11], [3], [2, 4, 6, 8])]


@pytest.mark.parametrize("proportions", [(3, 1), (1, 1), (0.7, 0.3), (1, 2, 3), (5, 1, 1, 3), (1000, 1)])
def test_every_batch_has_its_share_of_each_source(proportions: tuple[float, ...]) -> None:
    source, place = dealt(np.arange(4096), proportions)
    bound = 1 if len(proportions) == 2 else 2
    for number, part in enumerate(proportions):
        share = part / sum(proportions)
        assert place[source == number].tolist() == list(range(np.count_nonzero(source == number)))
        for batch in (1, 7, 16, 64):
            counts = [
                np.count_nonzero(cut == number) for cut in np.split(source[: 4096 // batch * batch], 4096 // batch)
            ]
            assert max(abs(count - batch * share) for count in counts) <= bound + 1e-5


def test_far_positions_are_those_that_counting_leads_to() -> None:
    far = (1 << 45) + np.arange(1000)
    source, place = dealt(far, (3, 1))
    assert (source == 1).sum() == 250
    assert place[source == 1].tolist() == list(range(1 << 43, (1 << 43) + 250))


@pytest.mark.parametrize("begin", [0, (1 << 32) - 500, (1 << 45) + (1 << 32) - 500])
@pytest.mark.parametrize("share", [1, ONE // 3, ONE - 1])
def test_turns_are_those_of_whole_numbers_of_any_size(begin: int, share: int) -> None:
    """Python's, which do not overflow. Also where a stretch crosses 32 bits."""
    places = begin + np.arange(1000)
    assert turns(places, share).tolist() == [place * share >> 32 for place in places.tolist()]


def test_each_source_is_passed_over_whole_before_it_is_repeated() -> None:
    offsets = np.cumsum([0] + [sizes.sum() for sizes in SIZES])
    orders = [MixedOrder(SIZES, (4, 2, 1), canonical_nodes=4, seed=5, epoch=epoch) for epoch in range(8)]
    drawn = [order(np.arange(order.size)) for order in orders]
    ids, passes = (np.concatenate(column) for column in zip(*drawn, strict=True))
    for begin, end in pairwise(offsets):
        ours = (ids >= begin) & (ids < end)
        for turn in range(passes[ours].max()):  # the last one is not whole
            assert sorted(ids[ours & (passes == turn)]) == list(range(begin, end))


def test_any_position_can_be_asked_alone() -> None:
    order = MixedOrder(SIZES, (4, 2, 1), canonical_nodes=4, seed=5, epoch=3)
    ids, passes = order(np.arange(order.size))
    for place in reversed(range(order.size)):
        alone = MixedOrder(SIZES, (4, 2, 1), canonical_nodes=4, seed=5, epoch=3)(np.array([place]))
        assert (alone[0][0], alone[1][0]) == (ids[place], passes[place])


FIRST, SECOND = 230, 40  # samples of the two sources
BATCH = 84  # for 1, 2, 3, 4 and 7 ranks with 1, 2 and mostly 3 steps of accumulation


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder, samples = tmp_path_factory.mktemp("sources"), list(digit_samples("val"))
    write_shards(samples[:FIRST], folder / "a")
    write_shards(samples[FIRST : FIRST + SECOND], folder / "b")
    return str(folder / "a"), str(folder / "b")


def _batches(sources: tuple[str, str], ranks: int, accumulation: int, start: int = 0) -> list[dict[int, bytes]]:
    """Global batches of an epoch, from step `start` on: number of each place -> sample and pixels."""
    config = DataConfig(
        train=dict(zip(sources, (3, 1), strict=True)), image_size=8, workers=0, global_batch=BATCH, canonical_nodes=4
    )
    found: list[dict[int, bytes]] = []
    for rank in range(ranks):
        world = World(rank, ranks, rank, ranks, torch.device("cpu"))
        loader = build_train_loader(
            config, seed=1, micro_batch=BATCH // ranks // accumulation, accumulation=accumulation, world=world
        )
        for index, batch in enumerate(loader.epoch(1, start * accumulation)):
            if len(found) <= index // accumulation:
                found.append({})
            pixels = batch.images.pixels if hasattr(batch.images, "pixels") else batch.images
            rows = zip(batch.positions.tolist(), batch.ids.tolist(), pixels, strict=True)
            found[index // accumulation] |= {place: (number, row.numpy().tobytes()) for place, number, row in rows}
        loader.close()
    return found


def test_ranks_accumulation_and_restarts_change_no_batch(
    sources: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leap_dist.data.store.on_first", lambda work, world: work())  # one process plays all ranks
    whole = _batches(sources, 1, 1)
    assert len(whole) == 3
    for batch in whole:
        assert len(batch) == BATCH
        assert Counter(number >= FIRST for number, _ in batch.values()) == {False: 63, True: 21}
    for ranks, accumulation in product((1, 2, 3, 4, 7), (1, 2, 3)):
        if BATCH % (ranks * accumulation) == 0:
            assert _batches(sources, ranks, accumulation) == whole
    assert _batches(sources, 2, 3, start=2) == _batches(sources, 7, 2, start=2) == whole[2:]


def test_a_sample_that_comes_again_is_augmented_anew(sources: tuple[str, str]) -> None:
    rows = [row for batch in _batches(sources, 1, 1) for row in batch.values() if row[0] >= FIRST]
    assert len({number for number, _ in rows}) == SECOND < len(rows) == 63
    assert len(set(rows)) == 63


ALONE = World(0, 1, 0, 1, torch.device("cpu"))


def test_whoever_looks_at_images_and_labels_of_several_sources(sources: tuple[str, str]) -> None:
    config = DataConfig(train=dict.fromkeys(sources, 1.0), image_size=8, workers=0)
    assert fixed_images(config.train, config, 4, ALONE).shape == (4, 3, 8, 8)
    loader = build_eval_loader(config.train, config, batch=16, world=ALONE)
    assert [number for batch in loader for number in batch.ids.tolist()] == list(range(FIRST + SECOND))
    check_sources(config, ALONE)
    with pytest.raises(UserError, match="has several sources, and labels"):
        check_sources(config, ALONE, 10)
    with pytest.raises(UserError, match="labels are needed here"):
        class_names(config.train, config)


def test_other_proportions_are_another_layout(sources: tuple[str, str]) -> None:
    def layout(*proportions: float) -> str:
        config = DataConfig(train=dict(zip(sources, proportions, strict=True)))
        return open_set(config.train, config, ALONE).layout()

    assert layout(3, 1) == layout(0.75, 0.25) != layout(2, 1)


DEMO = ["teacher.model=vit_small_patch14_dinov2", "teacher.weights=random", "student.model=vit_tiny_patch16_224"]


def _refusal(tmp_path: Path, *options: str) -> str:
    with pytest.raises(UserError) as refused:
        load(None, [*DEMO, f"output={tmp_path}", *options])
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("{}", "one text or more"),
        ("{A: 0, B: 1}", "is no proportion"),
        ("{A: -1, B: 1}", "is no proportion"),
        ("{A: .nan, B: 1}", "is no proportion"),
        ("{A: much, B: 1}", "expected text, or a mapping"),
        ("{A: 1, A/: 2}", "is there twice"),
        ("{A: 1, A: 2}", "duplicate"),
        ("{A: 1, digits: 2}", "goes alone"),
        ("{A: 1, B/none: 2}", "no such folder"),
        ("{A: 1, s3://bucket/set: 2}", "needs data.cache"),
    ],
)
def test_a_wrong_mapping_is_one_line(given: str, says: str, sources: tuple[str, str], tmp_path: Path) -> None:
    mapping = given.replace("A", sources[0]).replace("B", sources[1])
    assert says in _refusal(tmp_path, f"data.train={mapping}")


def test_evaluation_needs_one_set(sources: tuple[str, str], tmp_path: Path) -> None:
    said = _refusal(tmp_path, f"data.train={{{sources[0]}: 3, {sources[1]}: 1}}", f"data.val={sources[0]}")
    assert "data.val=null" in said


def test_a_later_mapping_replaces_an_earlier_one(sources: tuple[str, str], tmp_path: Path) -> None:
    a, b = sources
    path = tmp_path / "run.yaml"
    path.write_text(f"data:\n  train: {{{a}: 3, {b}: 1}}\n")
    assert load(path, [*DEMO, f"output={tmp_path}"]).data.train == {a: 3, b: 1}
    assert load(path, [*DEMO, f"output={tmp_path}", f"data.train={{{b}: 2}}"]).data.train == {b: 2}
    assert load(path, [*DEMO, f"output={tmp_path}", f"data.train={a}"]).data.train == a
