"""The official tars of ILSVRC2012, read where they lie: nothing is unpacked."""

from __future__ import annotations

import io
import os
import tarfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Optional

import numpy as np

from leap_dist.data.parallel import parallel
from leap_dist.data.sources.images import Images
from leap_dist.errors import UserError
from leap_dist.runtime.files import read_regular

TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12"
META, TRUTH = "meta.mat", "ILSVRC2012_validation_ground_truth.txt"
MOST_DEVKIT_BYTES = 16 << 20  # of one of its two files; they have 90 and 190 kB
SYNSETS = "imagenet_2012_validation_synset_labels.txt"


@dataclass(frozen=True, kw_only=True)
class TarMembers(Images):
    """Members of an uncompressed tar; image i is at byte offsets[i]."""

    tar: Path
    offsets: np.ndarray

    def reader(self, numbers: Sequence[int]) -> Callable[[int], bytes]:
        """See Images."""
        return self._read

    def _read(self, number: int) -> bytes:
        with self.tar.open("rb", buffering=0) as file:
            offset, size = int(self.offsets[number]), int(self.sizes[number])
            if offset + size > os.fstat(file.fileno()).st_size:
                raise OSError(f"{size} bytes at {offset} lie behind the tar's end")
            file.seek(offset)
            return file.read(size)


def has_tars(folder: Path) -> bool:
    """Whether one of the two tars of images is there."""
    return (folder / TRAIN_TAR).is_file() or (folder / VAL_TAR).is_file()


def open_ilsvrc(folder: Path, workers: int) -> dict[str, Images]:
    """Whichever of the tars of training and validation images are there, listed by `workers` processes.

    Labels are positions among the sorted wnids, as everybody has them, and not ILSVRC2012_IDs, which the ground truth
    is written in.
    """
    splits = {}
    if (folder / TRAIN_TAR).is_file():
        splits["train"] = _open_train_tar(folder / TRAIN_TAR, workers)
    if (folder / VAL_TAR).is_file():
        splits["val"] = _open_val_tar(folder / VAL_TAR)
    return splits


def _open_train_tar(path: Path, workers: int) -> TarMembers:
    """A tar of one tar per class, <wnid>.tar."""
    tars = sorted(_members(path), key=lambda member: member.name)
    strange = [member.name for member in tars if not member.name.endswith(".tar")]
    if strange or not tars:
        raise UserError(f"{path}: a tar of <wnid>.tar files is expected; it holds {strange[0] if strange else 'none'}")
    members, wnids = [], []
    for outer, inner in zip(tars, parallel(partial(_inner_members, path), tars, workers), strict=True):
        members += inner
        wnids += [outer.name.removesuffix(".tar")] * len(inner)
    return _tar_images(path, members, wnids)


def _open_val_tar(path: Path) -> TarMembers:
    """A flat tar, whose labels lie beside it in the order of its members' names."""
    members = sorted(_members(path), key=lambda member: member.name)
    wnids = _val_wnids(path.parent)
    if len(wnids) != len(members):
        raise UserError(f"{path} holds {len(members)} images, but the ground truth beside it has {len(wnids)} labels")
    return _tar_images(path, members, wnids)


def _members(path: Path) -> list[tarfile.TarInfo]:
    try:
        with tarfile.open(path, "r:") as tar:
            return [member for member in tar if member.isfile()]
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(f"{path}: {error}; the tar is damaged or cut, fetch it anew") from None


def _inner_members(path: Path, outer: tarfile.TarInfo) -> list[tarfile.TarInfo]:
    """The files in the tar that is the member `outer` of `path`, their offsets counted in `path`."""
    try:
        with tarfile.open(path, "r:") as tar, tarfile.open(fileobj=tar.extractfile(outer), mode="r:") as inner:
            members = [member for member in inner if member.isfile()]
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(f"{path}, {outer.name}: {error}; the tar is damaged or cut, fetch it anew") from None
    for member in members:
        member.offset_data += outer.offset_data
    return members


def _tar_images(path: Path, members: list[tarfile.TarInfo], wnids: list[str]) -> TarMembers:
    classes = sorted(set(wnids))
    index = {wnid: label for label, wnid in enumerate(classes)}
    return TarMembers(
        tar=path,
        classes=classes,
        names=[f"{path.name}/{wnid}/{member.name}" for wnid, member in zip(wnids, members, strict=True)],
        labels=np.array([index[wnid] for wnid in wnids]),
        sizes=np.array([member.size for member in members]),
        offsets=np.array([member.offset_data for member in members]),
    )


def _val_wnids(folder: Path) -> list[str]:
    """The wnid of every validation image: from a list of wnids, or from the devkit, packed or unpacked."""
    if (folder / SYNSETS).is_file():
        return read_regular(folder / SYNSETS, MOST_DEVKIT_BYTES).decode(errors="replace").split()
    meta, truth = _devkit_file(folder, META), _devkit_file(folder, TRUTH)
    if meta is None or truth is None:
        raise UserError(
            f"{folder}: nothing says what the images of {VAL_TAR} show; put {DEVKIT}.tar.gz beside it, "
            f"or {SYNSETS} with one wnid per image"
        )
    return _devkit_wnids(meta, truth)


def _devkit_file(folder: Path, name: str) -> Optional[bytes]:
    """The content of a file of the devkit, None if there is no devkit."""
    unpacked, packed = folder / DEVKIT / "data" / name, folder / f"{DEVKIT}.tar.gz"
    if unpacked.is_file():
        return read_regular(unpacked, MOST_DEVKIT_BYTES)
    if not packed.is_file():
        return None
    try:
        with tarfile.open(packed) as tar:
            member = tar.getmember(f"{DEVKIT}/data/{name}")
            if not member.isfile() or member.size > MOST_DEVKIT_BYTES:
                raise OSError(f"{member.name} is none of ILSVRC2012's")
            return tar.extractfile(member).read()
    except (tarfile.TarError, OSError, EOFError, KeyError, zlib.error) as error:
        raise UserError(f"{packed}: {' '.join(str(error).split())}; fetch it anew") from None


def _devkit_wnids(meta: bytes, truth: bytes) -> list[str]:
    """The wnids of the ground truth's lines, which are ILSVRC2012_IDs; `meta`, a MATLAB file, has the wnid of each."""
    from scipy.io import loadmat  # scikit-learn stands on scipy

    try:
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        wnids = dict(zip(synsets["ILSVRC2012_ID"].tolist(), synsets["WNID"].tolist(), strict=True))
        return [str(wnids[int(number)]) for number in truth.split()]
    except Exception as error:  # scipy has no common base for what a strange file raises
        raise UserError(f"{META} and {TRUTH} are not those of {DEVKIT}: {error!r:.200}") from None
