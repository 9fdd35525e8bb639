"""A teacher's weights: from timm's hub, from a local file, or random when asked for by name; read block by block."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import huggingface_hub
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from leap_dist.config import DEMO_TEACHER, HUB, RANDOM, TeacherConfig
from leap_dist.errors import UserError
from leap_dist.models.backbone import build_model, family

_SUFFIXES = (".safetensors", ".pth", ".pt")
# Where a checkpoint keeps its backbone, in the order in which they are looked for.
_WRAPPERS = ("teacher", "state_dict_ema", "model_ema", "state_dict", "model")
# What the two file formats raise when a file is not what its name says.
_UNREADABLE = (
    SafetensorError, RuntimeError, EOFError, OSError, KeyError, AttributeError, ValueError, pickle.UnpicklingError,
)  # fmt: skip


class Weights(Protocol):
    """Tensors by timm's names, read when they are asked for. May be called from any thread.

    computed: names of those that are not stored but computed from what is, which processors may round differently.
    """

    computed: frozenset[str]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors on the host, as they are stored; the caller casts them."""


def open_weights(config: TeacherConfig, model: nn.Module) -> Weights:
    """The configured weights for `model`, a meta-device model of `build_model`.

    Raises `UserError` for weights that cannot be reached, read or fitted.
    """
    if config.weights == DEMO_TEACHER:
        raise UserError(f"teacher.weights={DEMO_TEACHER} is only known to the training script; give a file's path")
    if config.weights == RANDOM:
        return RandomWeights(model)
    path = _hub_file(config, model) if config.weights == HUB else Path(config.weights)
    return FileWeights(path, model, config.model)


def build_skeleton(config: TeacherConfig, image_size: int, classes: int = 0) -> nn.Module:
    """The configured teacher without memory or weights. Raises `UserError` as `build_model` does."""
    return build_model(config.model, config.kwargs, image_size, classes=classes, device="meta")


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A few letters that differ where weights do."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:12]


class RandomWeights:
    """Untrained weights, one teacher per model name: each tensor is drawn by itself, whoever asks for it and when.

    Matrices keep the variance of what passes through them (1 / fan-in), norms and layer scales are 1, biases 0,
    tokens and position embeddings have a standard deviation of 0.02.
    """

    def __init__(self, model: nn.Module) -> None:
        self.computed = frozenset()
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        self._seeds = {name: seed for seed, name in enumerate(self._shapes)}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self._draw(name) for name in names}

    def _draw(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if len(shape) < 2:
            return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        std = shape[1:].numel() ** -0.5 if name.endswith("weight") else 0.02
        return torch.empty(shape).normal_(std=std, generator=torch.Generator().manual_seed(self._seeds[name]))


class FileWeights:
    """A checkpoint file, mapped rather than read: a tensor's pages come from disk when it is first touched.

    The file is opened anew by every `read`, so that what is no longer used can leave memory; do not overwrite it during
    a run. What timm's converter only renamed is found again by name; what it computed (a resampled position embedding,
    fused matrices of other codebases) is kept.
    """

    def __init__(self, path: Path, model: nn.Module, name: str) -> None:
        self._path = path
        stored = _read(path)
        fitted = _fit(stored, model, name, path)
        by_place = {_place(tensor): key for key, tensor in stored.items() if isinstance(tensor, Tensor)}
        self._stored_as = {key: by_place[_place(value)] for key, value in fitted.items() if _place(value) in by_place}
        self._computed = {key: value.clone() for key, value in fitted.items() if key not in self._stored_as}
        self.computed = frozenset(self._computed)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        stored = _read(self._path)
        return {
            name: stored[self._stored_as[name]] if name in self._stored_as else self._computed[name] for name in names
        }


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Tells two tensors of one file apart, and a tensor from what was computed of it."""
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _hub_file(config: TeacherConfig, model: nn.Module) -> Path:
    source = model.pretrained_cfg
    _check_classifier(source["num_classes"], model.num_classes, f"hub: {config.model}")
    if not source.get("hf_hub_id"):
        raise UserError(f"teacher.weights=hub: timm knows no hub file of {config.model}; give a file's path")
    file = source["hf_hub_id"], source.get("hf_hub_filename") or "model.safetensors"
    try:
        # What the cache has is taken as it is: nothing is asked of a network that may not be there, at every start.
        with contextlib.suppress(LocalEntryNotFoundError):
            return Path(huggingface_hub.hf_hub_download(*file, local_files_only=True))
        return Path(huggingface_hub.hf_hub_download(*file))
    except Exception as error:  # the hub's client lets through the errors of half a dozen packages
        raise UserError(
            f"teacher.weights=hub: cannot get weights of {config.model} ({error!r:.120}); "
            "download them elsewhere and set teacher.weights=/path/to/model.safetensors"
        ) from error


def _read(path: Path) -> dict[str, Any]:
    if path.suffix not in _SUFFIXES:
        raise UserError(f"teacher.weights={path}: expected hub, random, or a file ending in {' '.join(_SUFFIXES)}")
    if not path.is_file():
        raise UserError(f"teacher.weights={path}: no such file")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else _load_pickle(path)
        return _unwrap(state)
    except _UNREADABLE as error:
        raise UserError(
            f"teacher.weights={path} is truncated, damaged or no plain state dict ({error!r:.160})"
        ) from error


def _load_pickle(path: Path) -> Any:
    """A torch checkpoint; one of before 2020, not a zip file, cannot be mapped and is read whole."""
    with torch.serialization.safe_globals([argparse.Namespace]):  # a training script's options, saved too
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def _unwrap(state: Mapping[str, Any]) -> dict[str, Any]:
    """Strip what training code puts around a backbone: {'teacher': ...} and the prefixes module. and backbone."""
    for wrapper in _WRAPPERS:
        if isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    state = timm.models.clean_state_dict(state)
    prefix = "backbone."
    inside = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return inside or state


def _fit(state: dict[str, Any], model: nn.Module, name: str, path: Path) -> dict[str, Tensor]:
    """Convert to timm's names and this image size, then insist on exactly the tensors that `model` has."""
    adapter = family(model)
    wanted = model.state_dict()
    _check_patch(state, wanted, name, path)
    _check_classifier(len(state.get("head.weight", ())), model.num_classes, f"{path}: it")
    try:
        state = adapter.checkpoint_filter(state, model)
    except (RuntimeError, ValueError, AssertionError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise UserError(f"teacher.weights={path} does not fit {name} ({error!r:.160})") from error
    state = {key: state[key] for key in state if key in wanted or key.split(".")[0] not in adapter.unused_keys}
    _check_keys(state, wanted, name, path)
    _check_shapes(state, wanted, name, path)
    return state


def _check_patch(state: Mapping[str, Any], wanted: Mapping[str, Tensor], name: str, path: Path) -> None:
    """Refuse patches of another size: timm would resample the kernel, to a teacher that nobody trained."""
    key = "patch_embed.proj.weight"
    if key in wanted and getattr(state.get(key), "ndim", 0) == 4:
        _check_shapes({key: state[key]}, wanted, name, path)


def _check_classifier(found: int, wanted: int, where: str) -> None:
    """Refuse weights without the classifier that soft distillation needs, or with another one."""
    if wanted and found != wanted:
        has = f"a classifier of {found} classes" if found else "no classifier"
        raise UserError(
            f"teacher.weights={where} has {has}; objective.kd_alpha needs one of student.num_classes={wanted}"
        )


def _check_keys(state: Mapping[str, Any], wanted: Mapping[str, Tensor], name: str, path: Path) -> None:
    for kind, keys in (("lacks", wanted.keys() - state.keys()), ("has unknown", state.keys() - wanted.keys())):
        if keys:
            shown = ", ".join(sorted(keys)[:3]) + (", ..." if len(keys) > 3 else "")
            raise UserError(f"teacher.weights={path} is not for {name}: it {kind} {len(keys)} tensors: {shown}")


def _check_shapes(state: Mapping[str, Any], wanted: Mapping[str, Tensor], name: str, path: Path) -> None:
    for key, value in state.items():
        found, expected = tuple(getattr(value, "shape", ())), tuple(wanted[key].shape)
        if found != expected:
            raise UserError(f"teacher.weights={path}: {key} has shape {found}, but {name} needs {expected}")
