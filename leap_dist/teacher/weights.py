"""A teacher's weights: from timm's hub, from a local file, or random when asked for by name; read block by block."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import huggingface_hub
import torch
import xxhash
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import Tensor, nn

from leap_dist.config import DEMO_TEACHER, HUB, RANDOM, TeacherConfig
from leap_dist.errors import UserError
from leap_dist.models import build_model
from leap_dist.models.weight_files import read_weights
from leap_dist.runtime.files import refusal
from leap_dist.runtime.integrity import FILE, Damaged, check_recorded, read_sealed, record_of
from leap_dist.teacher.layouts import check_classifier, convert
from leap_dist.teacher.record import check_record

SAMPLE = 1024  # numbers of each tensor that a sample looks at: a page or two of a mapped file


class Weights(Protocol):
    """Tensors by timm's names, read when they are asked for. May be called from any thread.

    computed: names of those that are not stored but computed from what is, which processors may round differently.
    """

    computed: frozenset[str]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors on the host, as they are stored; the caller casts them."""

    def mark(self, tensors: Mapping[str, Tensor]) -> str:
        """Letters that differ where the weights do. tensors: by timm's names, all of each, as the caller cast them."""

    def samples(self, parts: Mapping[str, list[str]], dtype: torch.dtype) -> dict[str, str]:
        """For every part, named tensors, letters that differ where their shapes or a few numbers of any do, in `dtype`.

        Reads little, whatever the size of the teacher.
        """


def open_weights(config: TeacherConfig, model: nn.Module) -> Weights:
    """The configured weights for `model`, a meta-device model of `build_model`.

    Raises `UserError` for weights that cannot be reached, read or fitted.
    """
    if config.weights == DEMO_TEACHER:
        raise UserError(f"teacher.weights={DEMO_TEACHER} is only known to the training script; give a file's path")
    if config.weights == RANDOM:
        return RandomWeights(model)
    if config.weights == HUB:
        return FileWeights(_hub_file(config, model), model, config.model)
    path = Path(config.weights)
    check_own(path)
    weights = FileWeights(path, model, config.model)
    check_record(path, model, config.model)
    return weights


def check_own(path: Path) -> None:
    """Raise UserError where this project wrote the file, as the record beside it says, and it is not that any more."""
    if path.is_file() and record_of(path).is_file():
        try:
            record, _ = read_sealed(record_of(path))
            if FILE in record:
                check_recorded(path)
        except Damaged as error:
            raise UserError(f"teacher.weights={error}") from None


def build_skeleton(config: TeacherConfig, image_size: int, classes: int = 0) -> nn.Module:
    """The configured teacher without memory or weights. Raises `UserError` as `build_model` does."""
    return build_model(config.model, config.kwargs, image_size, classes=classes, device="meta")


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A few letters that differ where weights do."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()[:12]


def _bytes(tensor: Tensor) -> Any:
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _quick_mark(tensors: Mapping[str, Tensor]) -> str:
    """As `fingerprint`, of names too, at the speed of memory: xxHash lets threads run side by side."""
    names = sorted(tensors)
    with ThreadPoolExecutor(4) as pool:
        digests = pool.map(lambda name: xxhash.xxh3_128_hexdigest(_bytes(tensors[name])), names)
        return _short(list(zip(names, digests, strict=True)))


def _short(told: Any) -> str:
    return xxhash.xxh3_128_hexdigest(repr(told))[:16]


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of floating-point numbers in `dtype`; others, such as counters, as they are."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


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

    def mark(self, tensors: Mapping[str, Tensor]) -> str:
        """Of what is drawn, not of what came of it: processors round the normal distribution differently."""
        return _short([(name, tuple(self._shapes[name]), self._seeds[name]) for name in sorted(tensors)])

    def samples(self, parts: Mapping[str, list[str]], dtype: torch.dtype) -> dict[str, str]:
        return {part: self.mark(dict.fromkeys(names, torch.empty(0))) for part, names in parts.items()}

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
        stored = read_weights(path)
        fitted, sources = convert(stored, model, name, path)
        by_place = {_place(tensor): key for key, tensor in stored.items() if isinstance(tensor, Tensor)}
        self._stored_as = {key: by_place[_place(value)] for key, value in fitted.items() if _place(value) in by_place}
        self._computed = {key: value.clone() for key, value in fitted.items() if key not in self._stored_as}
        self._made_of = {
            key: {bare: by_place[_place(tensor)] for bare, tensor in sources[key].items()} for key in self._computed
        }
        self.computed = frozenset(self._computed)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        stored = read_weights(self._path, silent=True)
        return {
            name: stored[self._stored_as[name]] if name in self._stored_as else self._computed[name] for name in names
        }

    def mark(self, tensors: Mapping[str, Tensor]) -> str:
        """Of the tensors, and of the stored ones that the computed among them were made of."""
        plain = {name: tensor for name, tensor in tensors.items() if name not in self.computed}
        computed = self.computed & tensors.keys()
        return _quick_mark(plain | (self._origins(computed, read_weights(self._path, silent=True)) if computed else {}))

    def samples(self, parts: Mapping[str, list[str]], dtype: torch.dtype) -> dict[str, str]:
        stored, samples = read_weights(self._path, silent=True), {}
        for part, names in parts.items():
            plain = {name: stored[self._stored_as[name]] for name in names if name not in self.computed}
            found = {f"{name} {tuple(t.shape)}": cast(_middle(t), dtype) for name, t in plain.items()}
            origins = self._origins(self.computed.intersection(names), stored)
            samples[part] = _quick_mark(found | {f"{name} {tuple(t.shape)}": _middle(t) for name, t in origins.items()})
        return samples

    def _origins(self, computed: Iterable[str], stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {f"{name} < {bare}": stored[key] for name in computed for bare, key in self._made_of[name].items()}


def _middle(tensor: Tensor) -> Tensor:
    """A run of numbers from the middle."""
    flat = tensor.reshape(-1)
    start = max(0, (len(flat) - SAMPLE) // 2)
    return flat[start : start + SAMPLE]


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Tells two tensors of one file apart, and a tensor from what was computed of it."""
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _hub_file(config: TeacherConfig, model: nn.Module) -> Path:
    source = model.pretrained_cfg
    check_classifier(source["num_classes"], model.num_classes, f"hub: {config.model}")
    if not source.get("hf_hub_id"):
        raise UserError(f"teacher.weights=hub: timm knows no hub file of {config.model}; give a file's path")
    file = source["hf_hub_id"], source.get("hf_hub_filename") or "model.safetensors"
    try:
        # What the cache has is taken as it is: nothing is asked of a network that may not be there, at every start.
        with contextlib.suppress(LocalEntryNotFoundError):
            return Path(huggingface_hub.hf_hub_download(*file, local_files_only=True))
        return Path(huggingface_hub.hf_hub_download(*file))
    except Exception as error:  # the hub's client lets through the errors of half a dozen packages
        reason = refusal(error, Path(huggingface_hub.constants.HF_HUB_CACHE), probe=False) or f"{error!r:.120}"
        raise UserError(
            f"teacher.weights=hub: cannot get weights of {config.model} ({reason}); "
            "download them elsewhere and set teacher.weights=/path/to/model.safetensors"
        ) from error
