"""A backbone that is built without memory and filled block by block, so that a giant never exists whole on a rank."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Optional

import torch
import xxhash
from torch import Tensor, nn

from leap_dist.config import RANDOM, TeacherConfig
from leap_dist.models import DTYPES, Backbone, split
from leap_dist.runtime import allocator
from leap_dist.runtime.distributed import World, device_name
from leap_dist.runtime.marks import Marks
from leap_dist.teacher.weights import Weights, build_skeleton, cast, fingerprint, open_weights

if TYPE_CHECKING:
    from leap_dist.teacher.float8 import Float8Blocks


class LazyBackbone:
    """A `Backbone`, its stem on `device` and its blocks on the meta device until they are loaded.

    classes: keep the classifier, which must have so many; 0 = do without. world: whose ranks all have one; None: alone.
    backbone: the modules; blocks keep their identity (hooks, compiled code) over loading and dropping.
    token_shape, dtype: (T, D) of the tokens of one image between two blocks, and their type.
    fingerprint: of the stem's weights, which every rank holds, in few letters; marks: of the rest, as it is loaded.
    """

    def __init__(
        self,
        config: TeacherConfig,
        image_size: int,
        device: torch.device,
        classes: int = 0,
        world: Optional[World] = None,
    ) -> None:
        model = build_skeleton(config, image_size, classes)
        self.device, self.dtype = device, DTYPES[config.dtype]
        self._weights: Weights = open_weights(config, model)
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        self.backbone: Backbone = split(model)
        self.spec = self.backbone.spec
        images = torch.empty(1, 3, image_size, image_size, device="meta")
        self.token_shape = tuple(self.backbone.embed(images).shape[1:])
        self.marks = Marks(f"teacher.weights={config.weights}")
        self._coming: dict[int, Future[tuple[dict[str, Tensor], Optional[str]]]] = {}
        self._reader = ThreadPoolExecutor(1, "teacher-weights")
        self._float8 = self._float8_blocks(config, image_size, world) if config.dtype == "fp8" else None
        if config.compile:
            for block in self.backbone.blocks:
                block.compile()
        stem = self._read(self._stem_names())
        self.fingerprint = fingerprint({name: stem[name] for name in stem if name not in self._weights.computed})
        self.marks.note("stem", self._weights.mark(stem))
        _fill(self.backbone.stem, stem, device)

    def mark_samples(self) -> None:
        """Mark a few numbers of every tensor, whether it will ever be loaded or not: milliseconds, for a giant too."""
        for part, mark in self._weights.samples(self._parts(), self.dtype).items():
            self.marks.note(f"sample of {part}", mark)

    def judge(self, until: int) -> None:
        """Before any of the first `until` blocks is loaded: find out which may run in FP8, if that is asked for.

        Collective.
        """
        if self._float8 is not None:
            self._float8.judge(until)

    def hold(self, wanted: Iterable[int]) -> None:
        """Make the 0-indexed blocks `wanted` those that are loaded: drop the others, then load what is missing."""
        wanted = set(wanted)
        unwanted = [index for index in range(self.spec.depth) if index not in wanted and self.is_loaded(index)]
        for index in unwanted:
            self._drop(index)
        if unwanted:
            gc.collect()  # a parameter that ZeRO has split refers to itself
            allocator.trim()
        for index in sorted(wanted):
            self.load(index)

    def load(self, index: int) -> None:
        """Fill a block, from the host where it was expected, else from its source; nothing if it is loaded."""
        if self.is_loaded(index):
            return
        coming = self._coming.pop(index, None)
        tensors, mark = self._read_block(index) if coming is None else coming.result()
        if mark is not None:
            self.marks.note(_part(index), mark)
        _fill(self.backbone.blocks[index], tensors, self.device)
        # Buffers that no checkpoint holds, EVA's and BEiT's bias of the keys. Rotary tables are the stem's, in float32.
        self.backbone.blocks[index].to(self.dtype)
        if self._float8 is not None:
            self._float8.settle(index)

    def expect(self, wanted: Iterable[int]) -> None:
        """Read blocks into the host's memory, in the background, for a `load` to come; forget others read so."""
        self._coming = {
            index: self._coming.get(index) or self._reader.submit(self._read_ahead, index)
            for index in wanted
            if not self.is_loaded(index)
        }

    def is_loaded(self, index: int) -> bool:
        """Whether a block, or this rank's share of it, is in memory."""
        return not next(self.backbone.blocks[index].parameters()).is_meta

    @contextmanager
    def visiting(self, index: int) -> Iterator[None]:
        """A block is loaded inside, and as before afterwards."""
        was_loaded, coming = self.is_loaded(index), self._coming.get(index)
        self.load(index)
        yield
        if not was_loaded:
            self._drop(index)
            if coming is not None:
                self._coming[index] = coming

    def to_teacher(self, images: Tensor) -> Tensor:
        """Images as the stem takes them."""
        return images.to(self.device, self.dtype)

    def resident_bytes(self) -> int:
        """Bytes of loaded parameters; of one that ZeRO has split, this rank's share."""
        here = (p for p in self.backbone.parameters() if not p.is_meta)
        return sum(getattr(p, "ds_tensor", p).numel() * p.element_size() for p in here)

    def _float8_blocks(self, config: TeacherConfig, image_size: int, world: Optional[World]) -> Float8Blocks:
        from leap_dist.teacher.float8 import Float8Blocks, photographs

        def images() -> Tensor:
            return self.to_teacher(photographs(image_size, self.spec.mean, self.spec.std))

        cache = self._float8_cache(config, image_size)
        return Float8Blocks(self.backbone, images, config.fp8_bound, self.visiting, cache, world)

    def _float8_cache(self, config: TeacherConfig, image_size: int) -> Optional[Path]:
        """Where verdicts on these weights are kept, by all that they follow from; random ones have none."""
        if config.weights == RANDOM:
            return None
        from leap_dist.teacher.float8 import cache_file

        samples = self._weights.samples(self._parts(), self.dtype)
        about = [config.model, config.kwargs, config.fp8_bound, image_size, device_name(self.device), torch.__version__]
        return cache_file(xxhash.xxh3_64_hexdigest(repr([about, sorted(samples.items())])))

    def _parts(self) -> dict[str, list[str]]:
        """Names of the tensors of each part, blocks and stem."""
        return {_part(i): self._block_names(i) for i in range(self.spec.depth)} | {"stem": self._stem_names()}

    def _drop(self, index: int) -> None:
        if self._float8 is not None:
            self._float8.undo(index)
        shapes = {_inside(name): self._shapes[name] for name in self._block_names(index)}
        _empty(self.backbone.blocks[index], shapes)

    def _block_names(self, index: int) -> list[str]:
        return [name for name in self._shapes if name.startswith(f"blocks.{index}.")]

    def _stem_names(self) -> list[str]:
        return [name for name in self._shapes if not name.startswith("blocks.")]

    def _read(self, names: list[str]) -> dict[str, Tensor]:
        """Tensors by timm's names, in the teacher's dtype."""
        return {name: cast(tensor, self.dtype) for name, tensor in self._weights.read(names).items()}

    def _read_block(self, index: int) -> tuple[dict[str, Tensor], Optional[str]]:
        """A block's tensors by their names inside it, and their mark, if this is the first time."""
        tensors = self._read(self._block_names(index))
        mark = None if _part(index) in self.marks.found else self._weights.mark(tensors)
        return {_inside(name): tensor for name, tensor in tensors.items()}, mark

    def _read_ahead(self, index: int) -> tuple[dict[str, Tensor], Optional[str]]:
        """A copy in memory rather than pages of a file; pinned where a device will fetch it."""
        read, mark = self._read_block(index)
        tensors = {name: tensor.clone() for name, tensor in read.items()}
        if self.device.type == "cuda":
            tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        return tensors, mark


def _part(index: int) -> str:
    return f"block {index + 1}"


def _inside(name: str) -> str:
    return name.split(".", 2)[2] if name.startswith("blocks.") else name


def _fill(module: nn.Module, tensors: dict[str, Tensor], device: torch.device) -> None:
    module.to_empty(device="cpu")  # reserves addresses only; the pages are never touched
    for part in module.modules():
        if hasattr(part, "init_non_persistent_buffers"):
            part.init_non_persistent_buffers()  # rotary tables and the like, which no checkpoint holds
    module.load_state_dict(tensors, assign=True)
    module.to(device, non_blocking=True)


def _empty(module: nn.Module, shapes: dict[str, torch.Size]) -> None:
    """Put new parameters without memory in the place of the old, which ZeRO may have changed for good."""
    for path, _ in list(module.named_parameters()):
        owner, _, name = path.rpartition(".")
        empty = nn.Parameter(torch.empty(shapes[path], device="meta"), requires_grad=False)
        setattr(module.get_submodule(owner), name, empty)
