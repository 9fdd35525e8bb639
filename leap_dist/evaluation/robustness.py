"""ImageNet's robustness sets, by a probe that was trained on ImageNet: which classes count, and the corruption error.

A set of fewer classes is judged among those alone: for ImageNet-A and -R the published way, where 200 of the 1,000
outputs count. Folders are named by WordNet ids; ImageNet-V2's by the class's number in their order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Optional

from leap_dist.errors import UserError

WNID = re.compile(r"n\d{8}")
NUMBER = re.compile(r"\d{1,4}")
SEVERITIES = ("1", "2", "3", "4", "5")
# Top-1 errors of AlexNet, by which each corruption's are divided (Hendrycks & Dietterich 2019).
ALEXNET = {
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640, "defocus_blur": 0.819880,
    "glass_blur": 0.826268, "motion_blur": 0.785948, "zoom_blur": 0.798360, "snow": 0.866816, "frost": 0.826572,
    "fog": 0.819324, "brightness": 0.564592, "contrast": 0.853204, "elastic_transform": 0.646056,
    "pixelate": 0.717840, "jpeg_compression": 0.606500,
}  # fmt: skip


def class_table(train: Mapping[str, int], other: Mapping[str, int], source: str) -> dict[int, int]:
    """Labels of a set -> those of the same classes in the training set. Names are WordNet ids, or V2's numbers.

    Raises:
        UserError: a class that the training set has not, or training classes that are not named by WordNet ids.
    """
    if not all(WNID.fullmatch(name) for name in train):
        raise UserError(
            "--train: its classes are not named by WordNet ids such as n01440764, which the sets are told by"
        )
    if all(NUMBER.fullmatch(name) for name in other):
        order = sorted(train)
        beyond = [name for name in other if int(name) >= len(order)]
        if beyond:
            raise UserError(f"{source}: class {beyond[0]} is beyond the {len(order)} of the training set")
        return {label: train[order[int(name)]] for name, label in other.items()}
    foreign = [name for name in other if name not in train]
    if foreign:
        raise UserError(f"{source}: class {foreign[0]} is none of the training set's {len(train)}")
    return {label: train[name] for name, label in other.items()}


def corruption_errors(accuracies: Mapping[str, Sequence[float]]) -> tuple[Optional[float], dict[str, float]]:
    """Mean corruption error over all 15 corruptions, None if some are missing, and each one's own.

    accuracies: top-1 by corruption, 0 to 1, one for each severity. A corruption's error is the sum of its errors over
    AlexNet's. 1 is as bad as AlexNet.
    """
    own = {
        name: sum(1 - top1 for top1 in found) / len(found) / ALEXNET[name]
        for name, found in accuracies.items()
        if name in ALEXNET
    }
    whole = own.keys() == ALEXNET.keys()
    return (sum(own.values()) / len(own) if whole else None), own
