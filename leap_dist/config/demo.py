"""What a run without a YAML may change: the embedded demo's settings belong to its images and its teacher."""

from __future__ import annotations

from pathlib import Path

from leap_dist.config.loading import flat, load
from leap_dist.config.options import Config
from leap_dist.errors import UserError

ITS_OWN = ("data.train", "data.val", "teacher.model")


def load_demo(path: Path, overrides: list[str]) -> Config:
    """The demo's YAML at `path` with `overrides`.

    Raises:
        UserError: as `load`, or another set of images or another teacher would meet the rest of the demo.
    """
    demo, asked = flat(load(path, [], check=False)), flat(load(path, overrides, check=False))
    for key in ITS_OWN:
        if asked[key] not in (None, demo[key]):
            raise UserError(
                f"{key}={asked[key]} without --config: all else would be the demo's, made for digits of "
                f"{demo['data.image_size']} pixels; write a YAML, at least {{teacher: {{model: NAME}}, "
                "student: {model: NAME}, data: {train: SHARDS}}, and give it as --config YAML"
            )
    return load(path, overrides)
