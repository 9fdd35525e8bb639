"""A few images of a set that stand for it, the same whenever and wherever they are asked for."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from leap_dist.config import DataConfig, Source
from leap_dist.data.classes import UNLABELLED, class_number
from leap_dist.data.crops import decode
from leap_dist.data.transforms import eval_transform
from leap_dist.errors import UserError
from leap_dist.runtime.distributed import World, on_main

LOOKED_AT = 256  # samples from the first on: of a set far away, this is one shard


class Specimen(NamedTuple):
    """id: of the sample; label: of its class or UNLABELLED; pixels: (3, H, W) uint8, the whole image."""

    id: int
    label: int
    pixels: Tensor


def specimens(store: Any, count: int) -> list[Specimen]:
    """At most `count` samples of a store, by id: of the first LOOKED_AT the first of every class.

    Where there are fewer classes, or no labels, the first others fill up. What cannot be read is passed over.
    """
    unlike: list[Specimen] = []
    others: list[Specimen] = []
    known = {UNLABELLED}
    for sample_id in range(min(LOOKED_AT, store.size)):
        if len(unlike) == count:
            break
        try:
            sample = store.read(sample_id)
            label = class_number(int(sample.get("label", UNLABELLED)))
            if label in known and len(others) == count:
                continue
            found = Specimen(sample_id, label, decode(sample["image"]))
        except UserError:
            raise
        except Exception:  # readers and PIL raise anything
            continue
        (others if label in known else unlike).append(found)
        known.add(label)
    return sorted([*unlike, *others][:count], key=lambda found: found.id)


def fixed_images(source: Source, config: DataConfig, count: int, world: World) -> Tensor:
    """`specimens` of one source or of several as a model sees them: (n, 3, S, S) float32 on the host. Collective.

    Raises:
        UserError: on every rank, none can be read.
    """
    from leap_dist.data.mixture import open_set  # 3 s to import

    store = open_set(source, config, world)
    see = eval_transform(config)
    seen = on_main(lambda: [see(found.pixels) for found in specimens(store, count)], world)
    if not seen:
        raise UserError(f"{source}: none of the first {min(LOOKED_AT, store.size)} images can be read")
    return torch.stack(seen)
