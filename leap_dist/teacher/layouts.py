"""From a checkpoint's names to timm's: prefixes off, foreign layouts converted, every tensor accounted for.

A tensor of the file is used as it is, or converted, or left out by one of the rules of `_LEFT_OUT`, or the file is
refused. timm's converters drop tensors without a word; here they run on tensors that remember which ones they were made
of, so what they drop is known.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from leap_dist.errors import UserError
from leap_dist.models.backbone import family

log = logging.getLogger(__name__)

State = dict[str, Any]
# Parts of a key that wrappers put in: DDP, torch.compile, FSDP, activation checkpointing.
_WRAPPED = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
# Kernels of the patch embedding, by which a backbone is found in other layouts than timm's.
_KERNELS = (
    "patch_embed.proj.weight", "patch_embed.projection.weight", "embeddings.patch_embeddings.projection.weight",
    "preprocessor.patchifier.proj.weight", "radio_model.model.patch_generator.embedder.weight",
    "beit3.vision_embed.proj.weight", "conv1.weight",
)  # fmt: skip
_ELSEWHERE = (  # layouts that are not converted
    ("embeddings.patch_embeddings.weight", "DINOv3 of HF transformers"),
    ("vision_model.embeddings.patch_embedding.weight", "CLIP or SigLIP of HF transformers"),
)
# timm's converters look for these themselves.
_KEPT_PREFIXES = {"conv1.weight": "visual."}
# Of several copies of a backbone the one that is named so is taken: an average before what it averages.
_PREFERRED = ("teacher", "ema", "target", "momentum")
TOLERANCE = 2.0**-8  # relative: half of bfloat16's digits, in which DINOv3's periods are published; tables: absolute


class Conversion(NamedTuple):
    """tensors: by timm's names, what the model needs. sources: for each, the stored tensors that it was made of."""

    tensors: dict[str, Tensor]
    sources: dict[str, dict[str, Tensor]]


def convert(stored: State, model: nn.Module, name: str, path: Path) -> Conversion:
    """The tensors of `model`, timm's `name` on the meta device, from what `path` stores.

    Raises:
        UserError: it is of another model, or holds what `model` has no place for.
    """
    state, kernel = _bare(stored, model, name, path)
    _check_dense(state, path)
    _check_patch(state.get(kernel), model, name, path)
    _check_classifier(state, model, path)
    biased = any(key.endswith("attn.q_bias") for key in model.state_dict())
    # timm drops the biases of a model that has none too, and prints a line for each.
    taken = {key: value for key, value in state.items() if biased or not _is_dinov3_bias(key, state)}
    traced = {key: _traced(key, value) for key, value in taken.items()}
    try:
        fitted = family(model).checkpoint_filter(_of_transformers(traced), model)
    except (RuntimeError, ValueError, AssertionError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise UserError(f"teacher.weights={path} does not fit {name} ({error!r:.160})") from error
    wanted, unused = model.state_dict(), family(model).unused_keys
    needed = {key: value for key, value in fitted.items() if key in wanted}
    placed = {key for key in fitted if key in wanted or key.split(".")[0] in unused}
    arrived = {source for key in placed for source in _sources(fitted[key])} | placed
    left_out = {key: value for key, value in state.items() if key not in arrived}
    _check_complete(needed, wanted, left_out, name, path)
    _check_shapes(needed, wanted, name, path)
    _account(left_out, state, model, name, path)
    return Conversion(
        {key: value.as_subclass(Tensor) for key, value in needed.items()},
        {key: {source: state[source] for source in sorted(_sources(value))} for key, value in needed.items()},
    )


def check_classifier(found: int, wanted: int, where: str) -> None:
    """Refuse weights without the classifier that soft distillation needs, or with another one."""
    if wanted and found != wanted:
        has = f"a classifier of {found} classes" if found else "no classifier"
        raise UserError(
            f"teacher.weights={where} has {has}; objective.kd_alpha needs one of student.num_classes={wanted}"
        )


# -- from the file's names to those that timm's converters know -------------------------------------------------------


def _bare(stored: State, model: nn.Module, name: str, path: Path) -> tuple[State, str]:
    """The backbone's own tensors without prefixes, and the key of its patch kernel."""
    state = _without_wrappers(stored, path)
    anchors = [key for key in model.state_dict() if key.startswith("patch_embed.")]
    anchor, prefixes = next(
        ((anchor, found) for anchor in (*anchors, *_KERNELS) if (found := _prefixes(state, anchor))), ("", [""])
    )
    for ending, what in _ELSEWHERE if not anchor else ():
        if _prefixes(state, ending):
            raise UserError(f"teacher.weights={path} is in the layout of {what}; take timm's file of the model instead")
    prefix = _chosen(prefixes, path)
    inside = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if outside := [key for key in state if not key.startswith(prefix)]:
        log.info("teacher.weights=%s: takes '%s*', %d tensors; leaves out %d others, as %s",
                 path, prefix, len(inside), len(outside), _listed(outside))  # fmt: skip
    inside = _joined(inside)
    kept = _KEPT_PREFIXES.get(anchor, "")
    return {kept + key: value for key, value in inside.items()}, kept + anchor


def _without_wrappers(stored: State, path: Path) -> State:
    state: State = {}
    for key, value in stored.items():
        bare = ".".join(part for part in str(key).split(".") if part not in _WRAPPED)
        if bare in state:
            raise UserError(f"teacher.weights={path} holds {bare} twice, as {key} too; save one model by itself")
        state[bare] = value
    return state


def _prefixes(state: Iterable[str], anchor: str) -> list[str]:
    return sorted(key.removesuffix(anchor) for key in state if key == anchor or key.endswith("." + anchor))


def _chosen(prefixes: list[str], path: Path) -> str:
    if len(prefixes) == 1:
        return prefixes[0]
    for word in _PREFERRED:
        averages = [prefix for prefix in prefixes if word in prefix]
        if len(averages) == 1:
            log.info("teacher.weights=%s: takes '%s*' of %s", path, averages[0], ", ".join(f"'{p}*'" for p in prefixes))
            return averages[0]
    raise UserError(
        f"teacher.weights={path} holds several backbones ({', '.join(f'{p}*' for p in prefixes)}); "
        "save the one you mean by itself"
    )


def _joined(state: State) -> State:
    """Blocks in chunks, as FSDP training of DINOv2 saves them: blocks.CHUNK.BLOCK.norm1.weight."""
    pattern = re.compile(r"blocks\.(\d+)\.(\d+)\.(.+)")
    places = sorted({(int(m[1]), int(m[2])) for key in state if (m := pattern.fullmatch(key))})
    if not places:
        return state
    # DINOv2 counts through all chunks; where each begins at 0, the order is that of the chunks.
    counted = len({block for _, block in places}) == len(places)
    number = {place: place[1] if counted else index for index, place in enumerate(places)}
    return {
        f"blocks.{number[int(m[1]), int(m[2])]}.{m[3]}" if (m := pattern.fullmatch(key)) else key: value
        for key, value in state.items()
    }


_TRANSFORMERS = (
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."), ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.cls_token", "cls_token"), ("embeddings.mask_token", "mask_token"),
    ("embeddings.register_tokens", "register_tokens"), ("embeddings.distillation_token", "dist_token"),
    ("encoder.layer.", "blocks."), ("attention.output.dense.", "attn.proj."), ("layernorm_before.", "norm1."),
    ("layernorm_after.", "norm2."), ("intermediate.dense.", "mlp.fc1."), ("output.dense.", "mlp.fc2."),
    ("layer_scale1.lambda1", "ls1.gamma"), ("layer_scale2.lambda1", "ls2.gamma"),
    ("mlp.weights_in.", "mlp.w12."), ("mlp.weights_out.", "mlp.w3."), ("layernorm.", "norm."),
    ("distillation_classifier.", "head_dist."), ("cls_classifier.", "head."), ("classifier.", "head."),
)  # fmt: skip


def _of_transformers(state: State) -> State:
    """ViT, DeiT and DINOv2 of HF transformers under timm's names; anything else as it is."""
    if "embeddings.patch_embeddings.projection.weight" not in state:
        return state
    renamed: State = {}
    for key, value in state.items():
        for theirs, ours in _TRANSFORMERS:
            key = key.replace(theirs, ours)
        renamed[key] = value
    for key in [key for key in renamed if ".attention.attention.query." in key]:
        parts = [renamed.pop(key.replace("query", part)) for part in ("query", "key", "value")]
        renamed[key.replace("attention.attention.query", "attn.qkv")] = torch.cat(parts)
    return renamed


# -- what is checked --------------------------------------------------------------------------------------------------


def _check_patch(kernel: Any, model: nn.Module, name: str, path: Path) -> None:
    """Refuse patches of another size: timm would resample the kernel, to a teacher that nobody trained."""
    wanted = model.state_dict().get("patch_embed.proj.weight")
    if wanted is None or not isinstance(kernel, Tensor):
        return
    same = kernel.shape[-2:] == wanted.shape[-2:] if kernel.ndim == 4 else kernel.numel() == wanted.numel()
    if not same:
        _refuse_shape("patch_embed.proj.weight", kernel, wanted, name, path)


def _check_classifier(state: State, model: nn.Module, path: Path) -> None:
    check_classifier(
        len(state.get("head.weight", state.get("classifier.weight", ()))), model.num_classes, f"{path}: it"
    )


def _check_complete(state: State, wanted: Mapping[str, Tensor], left_out: Iterable[str], name: str, path: Path) -> None:
    if keys := wanted.keys() - state.keys():
        hint = f"; of its own it has {_listed(left_out)}" if left_out else ""
        raise UserError(
            f"teacher.weights={path} is not for {name}: it lacks {len(keys)} tensors: {_listed(keys)}{hint}"
        )


def _check_shapes(state: Mapping[str, Any], wanted: Mapping[str, Tensor], name: str, path: Path) -> None:
    for key, value in state.items():
        if tuple(getattr(value, "shape", ())) != tuple(wanted[key].shape):
            _refuse_shape(key, value, wanted[key], name, path)
        if wanted[key].is_floating_point() and not value.is_floating_point():  # quantized, often
            raise UserError(f"teacher.weights={path}: {key} is of {value.dtype}; floating-point weights are needed")


def _check_dense(state: State, path: Path) -> None:
    for key, value in state.items():
        if isinstance(value, Tensor) and (value.is_meta or value.layout != torch.strided):
            what = "was saved from the meta device, without numbers" if value.is_meta else "is sparse"
            raise UserError(f"teacher.weights={path}: {key} {what}; dense weights are needed")


def _refuse_shape(key: str, value: Any, wanted: Tensor, name: str, path: Path) -> None:
    found = tuple(getattr(value, "shape", ()))
    raise UserError(f"teacher.weights={path}: {key} has shape {found}, but {name} needs {tuple(wanted.shape)}")


def _listed(keys: Iterable[str]) -> str:
    keys = sorted(keys)
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")


# -- what timm's converters leave out ---------------------------------------------------------------------------------


def _account(left_out: State, state: State, model: nn.Module, name: str, path: Path) -> None:
    """Refuse the file if a tensor that no part of the model was made of is not one that may be left out."""
    strays, faults = [], []
    for key, value in left_out.items():
        rule = next((check for pattern, check in _LEFT_OUT if re.search(pattern, key)), None)
        if rule is None:
            strays.append(key)
        elif fault := rule(key, value, state, model):
            faults.append(fault)
    if strays:  # first: a block too many has a bias too
        raise UserError(
            f"teacher.weights={path} is not for {name}: it has {len(strays)} unknown tensors: {_listed(strays)}"
        )
    if faults:
        raise UserError(f"teacher.weights={path} is not for {name}: {faults[0]}")
    for key in state.keys() - left_out.keys():  # of these timm takes two thirds
        if _is_dinov3_bias(key, state) and (fault := _key_bias(key, state)):
            raise UserError(f"teacher.weights={path} is not for {name}: {fault}")


def _is_dinov3_bias(key: str, state: State) -> bool:
    return "storage_tokens" in state and key.endswith("attn.qkv.bias")


def _fine(*_: Any) -> Optional[str]:
    """Belongs to a head or to pre-training; no block's features are made of it."""
    return None


def _no_classifier(key: str, value: Tensor, state: State, model: nn.Module) -> Optional[str]:
    return f"{key} stands before its classifier, and timm has no such layer" if model.num_classes else None


def _masked_bias(key: str, state: State) -> Tensor:
    """The bias that counts: Meta multiplies it by a mask, which is 0 for the keys."""
    bias = state[key].double()
    mask = state.get(key + "_mask")
    return bias if mask is None else torch.where(mask.double() == 0, torch.zeros_like(bias), bias * mask.double())


def _bias(key: str, value: Tensor, state: State, model: nn.Module) -> Optional[str]:
    largest = _masked_bias(key, state).abs().max().item()
    if largest == 0:
        return None
    return (
        f"the file holds {key}, up to {largest:.3g}, and the model has no such bias; "
        "timm's names that end in _qkvb have one"
    )


def _key_bias(key: str, state: State) -> Optional[str]:
    """timm keeps the biases of queries and values, unmasked, and takes those of the keys for 0."""
    queries, keys, values = _masked_bias(key, state).chunk(3)
    plain_q, _, plain_v = state[key].double().chunk(3)
    if keys.any():
        return f"{key} is not 0 for the keys, up to {keys.abs().max():.3g}; the model has no such bias"
    if not (torch.equal(queries, plain_q) and torch.equal(values, plain_v)):
        return f"{key}_mask is not 1 for queries and values"
    return None


def _rope(key: str, value: Tensor, state: State, model: nn.Module) -> Optional[str]:
    """The model computes its rotary table from its own constants: the file's must be the same."""
    mine = _own_rope(key.rpartition(".")[2], value, model)
    if mine is None:
        return f"{key} says where tokens are, and the model has nothing to compare it with"
    if mine.shape != value.shape:
        return f"{key} has shape {tuple(value.shape)}, the model's {tuple(mine.shape)}"
    if torch.allclose(value.double(), mine.double(), rtol=TOLERANCE, atol=TOLERANCE):
        return None
    off = (value.double() - mine.double()).abs().max().item()
    return f"{key} differs from the model's by up to {off:.3g}: it was trained with another rotary base or scale"


def _own_rope(kind: str, value: Tensor, model: nn.Module) -> Optional[Tensor]:
    """What the model has for a rotary buffer of this kind, computed on the host; for tables at the file's grid."""
    rope = getattr(model, "rope", None)
    if rope is None:
        return None
    rope = copy.deepcopy(rope).to_empty(device="cpu")
    rope.init_non_persistent_buffers()
    if kind not in ("freqs_cos", "freqs_sin"):
        return dict(rope.named_buffers()).get(kind)
    side = round(len(value) ** 0.5)
    if side * side != len(value) or not hasattr(rope, "feat_shape"):
        return None
    if rope.feat_shape is not None:
        rope.update_feat_shape([side, side])
    sin, cos = rope.get_embed(shape=[side, side]).chunk(2, -1)
    return cos if kind == "freqs_cos" else sin


def _normalisation(key: str, value: Tensor, state: State, model: nn.Module) -> Optional[str]:
    """RADIO normalises images itself; here `data.mean` and `data.std` do."""
    mine = model.pretrained_cfg["mean" if "mean" in key else "std"]
    if torch.allclose(value.double().flatten(), torch.tensor(mine).double(), rtol=TOLERANCE, atol=0):
        return None
    return f"{key} is {value.flatten().tolist()}, and the model expects {tuple(mine)}"


_Check = Callable[[str, Any, State, nn.Module], Optional[str]]
# What may be left out: a pattern of the key, and what must hold then.
_LEFT_OUT: tuple[tuple[str, _Check], ...] = (
    (r"(^|\.)mask_token$", _fine),
    (r"^(lm_head|projectors|local_cls_norm|dino_head|ibot_head|pooler|classifier)\.", _fine),
    (r"(^|\.)(pre_logits|distillation_classifier)\.", _no_classifier),
    (r"qkv\.bias_mask$", _fine),  # with its bias
    (r"attn\.qkv\.bias$", _bias),
    (r"rope", _rope),
    (r"relative_position_index$", _fine),  # which pairs of patches share a bias: it follows from the grid
    (r"input_conditioner\.norm_(mean|std)$", _normalisation),
    (r"^radio_model\.(summary_idxs|.*heads?\.)|adaptor", _fine),
    (r"^beit3\.text_embed\.|\.B\.", _fine),  # the other modality's tower
)  # fmt: skip


# -- tensors that remember --------------------------------------------------------------------------------------------


class _Traced(Tensor):
    """A tensor that knows which stored ones it was made of. sources: their keys."""

    sources: frozenset[str] = frozenset()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        sources = frozenset().union(*map(_sources, tree_leaves((args, kwargs))))
        return tree_map_only(_Traced, lambda made: _marked(made, sources), result)


def _traced(key: str, value: Any) -> Any:
    return _marked(value.detach().as_subclass(_Traced), frozenset([key])) if isinstance(value, Tensor) else value


def _marked(value: _Traced, sources: frozenset[str]) -> _Traced:
    value.sources = sources
    return value


def _sources(value: Any) -> frozenset[str]:
    return value.sources if isinstance(value, _Traced) else frozenset()
