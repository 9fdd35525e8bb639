"""What labels mean: the names of a set's classes, and whether two sets number them alike."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Optional

from leap_dist.data.names import printable
from leap_dist.errors import UserError
from leap_dist.runtime.files import read_json

CLASSES = "class_to_idx.json"  # name -> label, beside the shards or beside the folders of their splits
INDEX = "index.json"
UNLABELLED = -1  # of a sample whose class nobody knows
MOST_CLASSES = 1_000_000  # a label beyond is a mistake, and would ask for memory by the size of it


def class_number(label: int) -> int:
    """A label as it is stored, or UNLABELLED if it cannot be the number of a class."""
    return label if 0 <= label < MOST_CLASSES else UNLABELLED


def read_classes(folder: Path) -> Optional[dict[str, int]]:
    """Class name -> label, as tools/make_shards.py writes it beside the shards in `folder`; None if there is none.

    It lies in `folder`, or above it beside the folders of other splits. UserError if it is no such list.
    """
    above = folder.absolute().parent
    for place in (folder, *([] if (above / INDEX).exists() else [above])):
        try:
            classes = read_json(place / CLASSES)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise UserError(f"{place / CLASSES} cannot be read: {error}") from None
        return numbered(classes, str(place / CLASSES))
    return None


def numbered(classes: object, where: str) -> dict[str, int]:
    """`classes`, found in `where`, as class name -> label. UserError if it is no such list.

    Names are composed (Unicode's NFC): file systems of one brand take the same letters apart.
    """
    numbers = list(classes.values()) if isinstance(classes, dict) else [None]
    if not all(type(number) is int and 0 <= number < MOST_CLASSES for number in numbers):
        raise UserError(f"{where}: a label, 0 or more, is expected for every name of a class")
    composed = {unicodedata.normalize("NFC", name): number for name, number in classes.items()}
    if len(set(numbers)) < len(numbers) or len(composed) < len(numbers):
        raise UserError(f"{where}: two classes have one {'label' if len(set(numbers)) < len(numbers) else 'name'}")
    return composed


def translation(
    train: Optional[Mapping[str, int]], other: Optional[Mapping[str, int]], names: tuple[str, str]
) -> Optional[dict[int, int]]:
    """Labels of `other` -> those of the same classes in `train`; None, as they are, where neither names its classes.

    Where one set alone names its classes, its labels are those that there are: any other is of no class. names: of the
    two sets, for messages. UserError where all classes are the same under other labels, or `other` has classes that
    `train` has not: the sets were not made to go together.
    """
    if train is None or other is None:
        known = other if train is None else train
        return None if known is None else {label: label for label in known.values()}
    foreign = [name for name in other if name not in train]
    if foreign:
        raise UserError(
            f"{names[1]}: has classes that {names[0]} has not ({_listed(foreign)}); make both sets from one source, or "
            "with the same --classes"
        )
    moved = [name for name in other if other[name] != train[name]]
    if moved and len(other) == len(train):
        name = moved[0]
        raise UserError(
            f"{names[1]}: class {printable(name)!r} has label {other[name]}, but {train[name]} in {names[0]} "
            f"({len(moved)} classes differ); make both sets with one {CLASSES}"
        )
    return {label: train[name] for name, label in other.items()}


def explain(
    train: Optional[Mapping[str, int]], other: Optional[Mapping[str, int]], names: tuple[str, str]
) -> Optional[str]:
    """What is worth a line about two sets that `translation` lets pass; None if nothing is."""
    if train is None or other is None:
        nameless = " and ".join(name for name, classes in zip(names, (train, other), strict=True) if classes is None)
        return f"{nameless}: no {CLASSES} beside the shards, so nobody can tell whether both sets number classes alike"
    if len(other) == len(train):
        return None
    moved = sum(other[name] != train[name] for name in other)
    how = f"; {moved} have another label there and are matched by name" if moved else ""
    return f"{names[1]}: has {len(other)} of the {len(train)} classes of {names[0]}{how}"


def check_outputs(
    train: Optional[Mapping[str, int]], outputs: Optional[Mapping[str, int]], names: tuple[str, str]
) -> Optional[str]:
    """Compare the labels of a set with the `outputs` of a classifier, by the names of the classes.

    names: of the set and of the classifier, for messages. Returns what is worth a line. UserError where a class of the
    set is another output, or none.
    """
    if train is None or outputs is None:
        nameless = " and ".join(name for name, known in zip(names, (train, outputs), strict=True) if known is None)
        return f"{nameless}: nothing names the classes, so nobody can tell whether labels and logits are in one order"
    moved = [name for name in train if outputs.get(name) != train[name]]
    if moved:
        name = moved[0]
        place = f"output {outputs[name]}" if name in outputs else "no output"
        raise UserError(
            f"{names[1]}: class {printable(name)!r} is {place}, but label {train[name]} in {names[0]} "
            f"({len(moved)} classes differ); make the shards with the teacher's {CLASSES}"
        )
    return None


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(printable(name) for name in names[:3]) + more
