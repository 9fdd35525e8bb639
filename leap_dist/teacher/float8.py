"""FP8 for the teacher's blocks: their linear layers' products, where a block's tokens stay what they are in bf16.

A weight is kept as FP8 numbers (e4m3) with a scale for each output channel; the tokens that meet it get a scale each,
as they come. Sums and results are bf16. Everything else of a block stays as it is: norms, attention, activations.

Whether a block runs so is found out before it is first a target, or on the way to one. The teacher's first images, two
photographs that scikit-learn comes with, have then gone through the blocks before it twice: in bf16, and as the run has
them. If the final-normed tokens that leave it are as alike as `teacher.fp8_bound` wants, it runs in FP8, else in bf16.
So the bound holds for what the student sees, with the errors of all blocks before.

Rank 0 finds it out and tells the others. Two GPUs may round differently, and a block that one rank has in FP8 and
another in bf16 could not even be sent from one to the other.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, Optional

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import ScalingType

from leap_dist.errors import UserError
from leap_dist.models import Backbone
from leap_dist.runtime.distributed import World, on_main

log = logging.getLogger(__name__)

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
LEAST_CAPABILITY = (8, 9)  # Ada, Hopper
CROPS = 4  # of each photograph
_TINY = 1e-12  # a row of zeros has a scale too
_STEP = 16  # the tensor cores take widths that are its multiples


def check_device(device: torch.device) -> None:
    """Raise UserError where a device has no FP8."""
    if device.type != "cuda":
        raise UserError(f"teacher.dtype=fp8: needs a GPU with FP8, and this run is on {device.type}; use bf16")
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        raise UserError(
            f"teacher.dtype=fp8: {torch.cuda.get_device_name(device)} has compute capability "
            f"{'.'.join(map(str, capability))}, and FP8 begins at 8.9; use bf16"
        )


def quantised(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(M, K) to FP8, and the scale of each row, (M, 1) float32."""
    scale = rows.abs().amax(1, keepdim=True).float().clamp_min(_TINY) / LARGEST
    return (rows / scale).clamp(-LARGEST, LARGEST).to(FLOAT8), scale


class Float8Linear(nn.Module):
    """A linear layer (Din -> Dout) that multiplies in FP8; made of one, whose bias it takes over.

    weight: (Dout, Din), the bits of FP8 numbers as bytes, which any collective can send; scale: (1, Dout).
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        numbers, scale = quantised(linear.weight.detach())
        self.weight = nn.Parameter(numbers.view(torch.uint8), requires_grad=False)
        self.scale = nn.Parameter(scale.t().contiguous(), requires_grad=False)
        self.bias = linear.bias

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (..., Din) to (..., Dout), both bf16."""
        rows, scale = quantised(tokens.reshape(-1, tokens.shape[-1]))
        product = F.scaled_mm(
            rows,
            self.weight.view(FLOAT8).t(),
            scale,
            ScalingType.RowWise,
            self.scale,
            ScalingType.RowWise,
            output_dtype=tokens.dtype,
        )
        product = product if self.bias is None else product + self.bias
        return product.unflatten(0, tokens.shape[:-1])

    def emptied(self) -> nn.Linear:
        """The layer that this was made of, without memory."""
        bias = self.bias is not None
        return nn.Linear(self.in_features, self.out_features, bias, device="meta").requires_grad_(False)


class Float8Blocks:
    """Turns blocks of a backbone to FP8, each as soon as it is known whether it may.

    bound: least mean cosine of final-normed tokens. images: (B, 3, S, S), what blocks are judged on, as the stem takes
    them. visiting: a block is loaded inside. cache: file of what was found before, for these weights. world: whose
    ranks all have them; None: alone.
    """

    def __init__(
        self,
        backbone: Backbone,
        images: Callable[[], Tensor],
        bound: float,
        visiting: Callable[[int], AbstractContextManager[None]],
        cache: Optional[Path],
        world: Optional[World],
    ) -> None:
        self.found: list[float] = []  # cosine of each block so far, from the first on; on rank 0 perhaps of more
        self._backbone = backbone
        self._images = images
        self._bound = bound
        self._visiting = visiting
        self._cache = cache
        self._world = world
        self._told = 0  # blocks of which all ranks have heard
        self._judging: Optional[int] = None
        self._layers = _layers_called(backbone)
        self._exact = self._mixed = torch.empty(0)  # tokens that leave the last block that was judged
        if cache is not None and (world is None or world.is_main):
            self._recall(cache)

    def judge(self, until: int) -> None:
        """Find out about the first `until` blocks, which are not loaded unless that is done. Collective."""
        if self._told >= until:
            return
        self.found = self._judged(until) if self._world is None else on_main(lambda: self._judged(until), self._world)
        self._told = len(self.found)

    def settle(self, index: int) -> None:
        """The 0-indexed block has been loaded, in bf16: turn it to FP8 where that has been found good enough."""
        if index == self._judging:
            return
        assert index < len(self.found), f"block {index + 1} is loaded, and `judge` has not come to it"
        if self.found[index] >= self._bound:
            self._turn(index)

    def undo(self, index: int) -> None:
        """The block is going to be emptied: its layers are as they were built."""
        block = self._backbone.blocks[index]
        for name in self._layers[index]:
            layer = block.get_submodule(name)
            if isinstance(layer, Float8Linear):
                block.set_submodule(name, layer.emptied())

    def _judged(self, until: int) -> list[float]:
        for index in range(len(self.found), until):
            self._judging = index
            with self._visiting(index):
                self._judge(index)
        self._judging = None
        return self.found

    @torch.no_grad()
    def _judge(self, index: int) -> None:
        device = next(self._backbone.stem.parameters()).device
        if not index:
            self._exact = self._mixed = self._backbone.embed(self._images())
        exact = self._run(index, self._exact.to(device))
        originals = self._turn(index)
        mixed = self._run(index, self._mixed.to(device))
        like = self._likeness(mixed, exact, index)
        for name, layer in originals.items():
            self._backbone.blocks[index].set_submodule(name, layer)
        fits = like >= self._bound
        self._exact, self._mixed = exact, mixed if fits else self._run(index, self._mixed.to(device))
        self.found.append(like)
        verdict = "runs in FP8" if fits else f"stays in bf16, below teacher.fp8_bound={self._bound}"
        log.info("teacher block %d: %s (cosine %.5f)", index + 1, verdict, like)
        if self._cache is not None:
            self._remember(self._cache)

    def _run(self, index: int, tokens: Tensor) -> Tensor:
        with torch.compiler.set_stance("force_eager"):  # compiled code is for a run's own batch
            return self._backbone.run_block(index, tokens, self._backbone.context())

    def _likeness(self, mixed: Tensor, exact: Tensor, index: int) -> float:
        found, right = (self._backbone.finish(tokens, index + 1).patch.float() for tokens in (mixed, exact))
        return float(F.cosine_similarity(found, right, dim=-1).nan_to_num(0.0).mean())

    def _turn(self, index: int) -> dict[str, nn.Module]:
        """Exchange the layers of a block for FP8 ones; the layers as they were, by name."""
        block, originals = self._backbone.blocks[index], {}
        for name in self._layers[index]:
            originals[name] = block.get_submodule(name)
            block.set_submodule(name, Float8Linear(originals[name]))
        return originals

    def _recall(self, cache: Path) -> None:
        # Somebody else's, cut off or of another version: it is found out anew.
        with suppress(OSError, SafetensorError, KeyError, ValueError), safe_open(cache, "pt") as stored:
            found = [float.fromhex(one) for one in stored.metadata()["found"].split()]
            self._exact, self._mixed, self.found = stored.get_tensor("exact"), stored.get_tensor("mixed"), found
            turned = [str(number) for number, like in enumerate(found, 1) if like < self._bound]
            log.info("teacher blocks 1 to %d: judged before; in bf16: %s", len(found), ", ".join(turned) or "none")

    def _remember(self, cache: Path) -> None:
        tensors = {name: tokens.cpu().contiguous() for name, tokens in (("exact", self._exact), ("mixed", self._mixed))}
        tensors["mixed"] = tensors["mixed"].clone()
        passing = cache.with_suffix(f".{os.getpid()}")
        with suppress(OSError):  # what cannot be kept is found out again
            cache.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, passing, {"found": " ".join(like.hex() for like in self.found)})
            passing.replace(cache)


def cache_file(key: str) -> Path:
    """Where it is kept what has been found of a file of weights. key: letters that tell them apart."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "leap_dist" / "float8" / f"{key}.safetensors"


def photographs(size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(2 x CROPS, 3, S, S) float32, normalised: crops of a temple and of a flower, the same everywhere."""
    from sklearn.datasets import load_sample_images  # a second to import

    crops = []
    for image in load_sample_images().images:
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1).float()[None] / 255
        side = min(pixels.shape[-2:])
        places = torch.linspace(0, pixels.shape[-1] - side, CROPS).long().tolist()
        crops += [pixels[..., :side, place : place + side] for place in places]
    resized = F.interpolate(torch.cat(crops), size=(size, size), mode="bilinear", antialias=True)
    return (resized - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


@torch.no_grad()
def _layers_called(backbone: Backbone) -> list[list[str]]:
    """By block, the names of its linear layers that FP8 can take: wide enough, and called rather than looked into.

    Of a backbone without memory, as it is built.
    """
    size = backbone.stem.patch_embed.img_size
    images = torch.empty(1, 3, *size, device="meta")
    tokens, context = backbone.embed(images), backbone.context()
    called: list[list[str]] = []
    for index, block in enumerate(backbone.blocks):
        names: list[str] = []
        hooks = [
            layer.register_forward_pre_hook(lambda *_, name=name, names=names: names.append(name))
            for name, layer in block.named_modules()
            if _fits(layer)
        ]
        with torch.compiler.set_stance("force_eager"):
            tokens = backbone.run_block(index, tokens, context)
        for hook in hooks:
            hook.remove()
        called.append(list(dict.fromkeys(names)))
    return called


def _fits(layer: Any) -> bool:
    return type(layer) is nn.Linear and not (layer.in_features % _STEP or layer.out_features % _STEP)
