"""A file of weights, known by what it holds and not by its name; and the state dict inside what training code saves."""

from __future__ import annotations

import argparse
import collections
import logging
import pathlib
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core import multiarray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from leap_dist.errors import UserError

log = logging.getLogger(__name__)

# What the two file formats raise when a file is not what its first bytes say.
_UNREADABLE = (
    SafetensorError, RuntimeError, EOFError, OSError, KeyError, AttributeError, ValueError, pickle.UnpicklingError,
    zipfile.BadZipFile,
)  # fmt: skip
# Where a checkpoint keeps its weights, in the order in which they are looked for: an average before what it averages.
_WRAPPERS = (
    "teacher", "state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema", "target_encoder", "state_dict",
    "model_state_dict", "model", "module", "net", "network", "backbone", "encoder", "student",
)  # fmt: skip
_AVERAGES = ("teacher", "ema", "target")
# Other files that end up under a checkpoint's name: how they begin, and what to do about it.
_STRANGERS = (
    (b"version https://git-lfs", "a git-lfs pointer, not the weights: run git lfs pull"),
    (b"<", "a web page: the download was refused or redirected; fetch the file again"),
    (b"{", "JSON text: an index or a config, not the weights it is about"),
    (b"\x1f\x8b", "a gzip archive: unpack it first"),
    (b"BZh", "a bzip2 archive: unpack it first"),
    (b"\xfd7zXZ", "an xz archive: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive: unpack it first"),
    (b"\x89HDF", "an HDF5 file, of Keras perhaps: convert it to a torch state dict"),
    (b"\x93NUMPY", "a NumPy array: convert it to a torch state dict"),
)
_TAR_AT, _TAR = 257, b"ustar"
# Harmless classes that training scripts save beside the weights: options, metrics, paths.
_HARMLESS: list[Any] = [
    argparse.Namespace, collections.defaultdict, pathlib.PosixPath, pathlib.PurePosixPath, np.dtype, np.ndarray,
    *(type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")),
    *((function, f"{package}.multiarray.{function.__name__}")
      for function in (multiarray.scalar, multiarray._reconstruct) for package in ("numpy.core", "numpy._core")),
]  # fmt: skip


def read_weights(path: Path, option: str = "teacher.weights", *, silent: bool = False) -> dict[str, Any]:
    """The state dict in `path`: a torch checkpoint or safetensors, under any name. Tensors are mapped, not read.

    option: what names the file, for the messages. silent: it has been said which of several sets of weights is taken.

    Raises:
        UserError: no such file, it is something else or damaged, or it does not say which weights it means.
    """
    try:
        return _read(path, silent)
    except UserError as error:
        raise UserError(f"{option}={error}") from error


def _read(path: Path, silent: bool) -> dict[str, Any]:
    if path.is_dir():
        raise UserError(f"{path}: a folder; give the one file in it that holds all weights")
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected hub, random, or the path of a file")
    load = _reader(path)
    try:
        content = load(path)
    except _UNREADABLE as error:
        reason = _why(error)
        raise UserError(f"{path} is truncated, damaged or no plain state dict ({reason})") from error
    return _state_in(content, path, silent)


def _reader(path: Path) -> Callable[[Path], Any]:
    with path.open("rb") as file:
        head = file.read(512)
    if head.startswith(b"PK\x03\x04"):
        return _load_zip
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and length < 10**9:
        return load_file
    if head.startswith(b"\x80"):
        return _load_pickle
    for start, what in _STRANGERS:
        if head.lstrip().startswith(start):
            raise UserError(f"{path} is {what}")
    if head[_TAR_AT:].startswith(_TAR):
        raise UserError(f"{path} is a tar archive: unpack it first")
    what = f"it begins with {head[:12]!r}" if head else "it is empty"
    raise UserError(f"{path} is truncated, damaged or no file of weights ({what})")


def _load_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:  # BadZipFile where the end is missing
        names = archive.namelist()
    if any(name.endswith(".npy") for name in names):
        raise UserError(f"{path} is a NumPy archive, of JAX perhaps: convert it to a torch state dict")
    if not any(name.endswith("data.pkl") for name in names):
        raise UserError(f"{path} is a zip archive without a torch checkpoint: unpack it first")
    if any(name.split("/")[-1] == "constants.pkl" for name in names):
        raise UserError(f"{path} is a TorchScript program: save its state_dict() instead")
    return _load_pickle(path, mmap=True)


def _load_pickle(path: Path, mmap: bool = False) -> Any:
    """A torch checkpoint; one of before 2020, not a zip file, cannot be mapped and is read whole."""
    with torch.serialization.safe_globals(_HARMLESS):
        if path.suffix == ".safetensors":  # torch would go by the name
            with path.open("rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def _why(error: BaseException) -> str:
    """The error in a line; of an object that may not be loaded its name, which torch hides in a page of advice."""
    text = str(error)
    if "GLOBAL " in text:
        name = text.partition("GLOBAL ")[2].split()[0]
        return f"it holds a {name}; load it where you trust it and save the state dict alone"
    return repr(error)[:160]


def _state_in(content: Any, path: Path, silent: bool) -> dict[str, Any]:
    """Descend to the mapping that holds the weights, and say which was taken where there were several."""
    while isinstance(content, Mapping):
        inside = {key: value for key, value in content.items() if isinstance(key, str) and _holds_tensors(value)}
        if not inside:
            return dict(content)
        key = next((name for name in _WRAPPERS if name in inside), None)
        if key is None and len(inside) > 1:
            raise UserError(
                f"{path} holds several sets of weights ({', '.join(sorted(inside)[:5])}); "
                "save the one you mean by itself"
            )
        key = key or next(iter(inside))
        if len(inside) > 1 and not silent:
            said = ", a moving average," if any(word in key for word in _AVERAGES) else ""
            log.info("%s: takes '%s'%s of %s", path, key, said, ", ".join(sorted(inside)))
        content = inside[key]
    raise UserError(f"{path} is no plain state dict: it holds a {type(content).__name__}")


def _holds_tensors(value: Any, depth: int = 3) -> bool:
    """Whether a mapping by names holds tensors, itself or further down. An optimizer's state goes by numbers."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value) or not depth:
        return False
    return any(isinstance(item, Tensor) or _holds_tensors(item, depth - 1) for item in value.values())
