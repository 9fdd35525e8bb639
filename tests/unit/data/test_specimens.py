"""Which few images stand for a set."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from leap_dist.data.classes import UNLABELLED
from leap_dist.data.specimens import LOOKED_AT, fixed_images, specimens
from leap_dist.errors import UserError
from small_sets import ALONE, config, png, write


def store(labels: list[Any], bad: tuple[int, ...] = ()) -> Any:
    def read(sample_id: int) -> dict[str, Any]:
        if sample_id in bad:
            raise OSError
        image = {"image": png(sample_id)}
        return image if labels[sample_id] is None else image | {"label": labels[sample_id]}

    return SimpleNamespace(size=len(labels), read=read)


@pytest.mark.parametrize(
    ("labels", "bad", "expected"),
    [
        ([5, 5, 5, 2, 5, 2, 7, 9, 1], (), [0, 3, 6, 7]),  # the first of every class
        ([5, 5, 2, 5, 2, 2], (), [0, 1, 2, 3]),  # two classes, filled up
        ([None] * 6, (), [0, 1, 2, 3]),
        ([5, 2, 7, 9, 1], (1, 3), [0, 2, 4]),  # fewer than asked for
        ([3] * LOOKED_AT + [4], (0,), [1, 2, 3, 4]),  # no further than that
        ([1], (0,), []),
    ],
)
def test_the_first_of_different_classes(labels: list[Any], bad: tuple[int, ...], expected: list[int]) -> None:
    found = specimens(store(labels, bad), 4)
    assert [one.id for one in found] == expected
    assert [one.label for one in found] == [UNLABELLED if labels[i] is None else labels[i] for i in expected]


def test_images_of_shards_as_a_model_sees_them(tmp_path: Path) -> None:
    source = str(write(tmp_path / "set", bad=1))
    options = config(source, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    images = fixed_images(source, options, 3, ALONE)
    assert images.shape == (3, 3, 8, 8)
    for image, sample in zip(images, (0, 2, 3), strict=True):
        colour = [sample, 255 - sample, 7 * sample]
        assert (image[:, 0, 0] * 255).tolist() == pytest.approx(colour, abs=1)


def test_a_set_of_which_nothing_can_be_read_is_refused(tmp_path: Path) -> None:
    source = str(write(tmp_path / "set", size=1, bad=0))
    with pytest.raises(UserError, match="none of the first 1 images can be read"):
        fixed_images(source, config(source), 3, ALONE)
