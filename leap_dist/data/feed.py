"""Batches on their way to the device: pinned memory, a stream of their own, one batch ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Optional

import torch
from torch import Tensor

from leap_dist.config import DataConfig
from leap_dist.data.batch import Batch
from leap_dist.data.colours import Crops, finish, normalise_, on_device, recolour
from leap_kernels.feature_match import obstacle


class Feed:
    """Puts micro-batches on the device, where their images are finished. For a CPU only normalising is left."""

    def __init__(self, config: DataConfig, device: torch.device) -> None:
        self._mean, self._std = config.mean, config.std
        self._device = device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._finish: Optional[Callable[..., Tensor]] = None
        # What Triton cannot be built for, torch cannot compile for.
        if device.type == "cuda" and obstacle(device, None, torch.float32, torch.float32) is None:
            self.compile()

    def compile(self) -> None:
        """Have torch compile what is left of augmentation, into a few kernels, each over the whole batch."""
        self._finish = torch.compile(finish, dynamic=False)

    def ahead(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, their images on the device. The next one is copied while the last one given is worked on."""
        if self._copies is None:
            yield from batches
            return
        waiting: Optional[Batch] = None
        for batch in batches:
            sent, waiting = waiting, self._send(batch)
            if sent is not None:
                yield sent
        if waiting is not None:
            yield waiting

    def images(self, batch: Batch) -> Tensor:
        """(B, 3, S, S) float32, normalised; until now they were bytes, a quarter of that size."""
        self._receive(batch)
        if isinstance(batch.images, Crops):
            if self._finish is not None:
                pixels, colours = batch.images.pixels, on_device(self._device, batch.images.colours)
                return self._finish(pixels, colours, self._mean, self._std)
            return normalise_(recolour(batch.images), self._mean, self._std)
        if batch.images.dtype == torch.uint8:
            return normalise_(batch.images.float(), self._mean, self._std)
        return batch.images

    def _send(self, batch: Batch) -> Batch:
        with torch.cuda.stream(self._copies):
            images = batch.images
            if isinstance(images, Crops):  # colours stay on the host, which must know them to choose kernels
                images = Crops(images.pixels.to(self._device, non_blocking=True), images.colours)
            else:
                images = images.to(self._device, non_blocking=True)
            return batch._replace(images=images, ready=torch.cuda.current_stream().record_event())

    def _receive(self, batch: Batch) -> None:
        """Let the stream that uses the images, the teacher's own perhaps, wait for them, and their memory for it."""
        if batch.ready is None:
            return
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(batch.ready)
        pixels = batch.images.pixels if isinstance(batch.images, Crops) else batch.images
        pixels.record_stream(stream)
