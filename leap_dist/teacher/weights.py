"""A teacher's weights: from timm's hub, from a local file, or random when asked for by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from leap_dist.backbone import Backbone, build_model, family, split
from leap_dist.config import DEMO_TEACHER, HUB, RANDOM, TeacherConfig
from leap_dist.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SUFFIXES = (".safetensors", ".pth", ".pt")
_RANDOM_SEED = 0  # one teacher per model name, whatever the run's seed: all ranks and all runs agree on it


def load_backbone(config: TeacherConfig, image_size: int) -> Backbone:
    """Build the configured teacher on the host, with its weights, in its dtype.

    Only parameters are cast: rotary tables stay float32, as in DINOv3. A .safetensors file already in that dtype stays
    mapped, and a block is read from disk when first touched (measured: 9 MB of a 419 MB file after loading); do not
    overwrite it during a run. Raises `UserError` as `build_model` does, and for weights that cannot be reached, read
    or fitted.
    """
    if config.weights == DEMO_TEACHER:
        raise UserError(f"teacher.weights={DEMO_TEACHER} is only known to the training script; give a file's path")
    if config.weights == RANDOM:
        with _own_random_state():
            model = build_model(config.model, config.kwargs, image_size)
    elif config.weights == HUB:
        model = _from_hub(config, image_size)
    else:
        model = build_model(config.model, config.kwargs, image_size, device="meta")
        _load_file(model, config.model, Path(config.weights))
    dtype = DTYPES[config.dtype]
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return split(model)


@contextmanager
def _own_random_state() -> Iterator[None]:
    """Seed the host generator inside and give it back unchanged; the accelerators' are not touched."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_RANDOM_SEED)
        yield


def _from_hub(config: TeacherConfig, image_size: int) -> nn.Module:
    try:
        with _own_random_state():
            return build_model(config.model, config.kwargs, image_size, pretrained=True)
    except UserError:
        raise
    except Exception as error:  # the hub's client lets through the errors of half a dozen packages
        raise UserError(
            f"teacher.weights=hub: cannot get weights of {config.model} ({error!r:.120}); "
            "download them elsewhere and set teacher.weights=/path/to/model.safetensors"
        ) from error


def _load_file(model: nn.Module, name: str, path: Path) -> None:
    """Give a meta-device `model` the tensors of a checkpoint file, without a second copy of them."""
    state = _fit(_read(path), model, name, path)
    model.to_empty(device="cpu")  # reserves addresses only; the pages are never touched
    for module in model.modules():
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()  # rotary tables and the like, which no checkpoint holds
    model.load_state_dict(state, assign=True)


def _read(path: Path) -> dict[str, Any]:
    if path.suffix not in _SUFFIXES:
        raise UserError(f"teacher.weights={path}: expected hub, random, or a file ending in {' '.join(_SUFFIXES)}")
    if not path.is_file():
        raise UserError(f"teacher.weights={path}: no such file")
    try:
        state = timm.models.load_state_dict(str(path), weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, OSError, KeyError, AttributeError, ValueError) as error:
        raise UserError(
            f"teacher.weights={path} is truncated, damaged or no plain state dict ({error!r:.160})"
        ) from error
    return _unwrap(state)


def _unwrap(state: Mapping[str, Any]) -> dict[str, Any]:
    """Strip what training code puts around a backbone: {'teacher': ...} and the prefixes module. and backbone."""
    for wrapper in ("teacher", "state_dict", "model"):
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
    try:
        state = adapter.checkpoint_filter(state, model)
    except (RuntimeError, ValueError, AssertionError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise UserError(f"teacher.weights={path} does not fit {name} ({error!r:.160})") from error
    state = {key: value for key, value in state.items() if key.split(".")[0] not in adapter.unused_keys}
    _check_keys(state, wanted, name, path)
    _check_shapes(state, wanted, name, path)
    return state


def _check_patch(state: Mapping[str, Any], wanted: Mapping[str, Tensor], name: str, path: Path) -> None:
    """Refuse patches of another size: timm would resample the kernel, to a teacher that nobody trained."""
    key = "patch_embed.proj.weight"
    if key in wanted and getattr(state.get(key), "ndim", 0) == 4:
        _check_shapes({key: state[key]}, wanted, name, path)


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
