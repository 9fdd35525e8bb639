"""LEAP's colour jitter and grayscale, and normalisation, on a batch whose samples each have their own parameters.

One function for both places: per sample in a loader worker, or per batch on a GPU. Which operations a sample gets is
known on the host, so nothing here waits for the device. Every operation gives what torchvision's does on uint8,
rounded down to whole values in between.

Four rounds. Each may shift hues, then blends x with something darker, greyer or flatter: f x + (1 - f) r.

    kind            r
    BRIGHTNESS      0
    CONTRAST        mean over the image of its luma
    SATURATION      luma of each pixel

The first three rounds have the jitter's three blends in the order drawn, the last one turns grey (saturation, f = 0).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # torchvision's numbers
ROUNDS = 4
JITTER = 0.8  # probabilities
GREY = 0.2
RANGES = ((0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1))
LUMA = (0.2989, 0.587, 0.114)
FULL = 255.999 / 255  # torchvision scales [0, 1] by 256 - 0.001 before it rounds down


class Crops(NamedTuple):
    """Pixels whose colours are still to be changed.

    pixels: (B, 3, S, S) uint8; colours: (B, 10) float32 on the host, rows as `jitter` makes them.
    """

    pixels: Tensor
    colours: Tensor


def jitter(factors: Sequence[float], order: Sequence[int], grey: bool = False) -> np.ndarray:
    """Parameters of one sample: (10,) float32.

    factors: brightness, contrast, saturation, hue in turns of the circle (at most 1/6 either way); order: which of
    these four comes first, second, ...; grey: whether all ends in grayscale.

    The row holds the factors of four rounds, their kinds, the hue in sixths, and the round that shifts it.
    """
    blends = [kind for kind in order if kind != HUE]
    last = 0.0 if grey else 1.0
    row = [*(factors[kind] for kind in blends), last, *blends, SATURATION, 6 * factors[HUE], list(order).index(HUE)]
    return np.array(row, dtype=np.float32)


def untouched(grey: bool = False) -> np.ndarray:
    """Parameters of a sample without jitter."""
    row = jitter((1, 1, 1, 0), range(4), grey)
    row[-1] = ROUNDS  # never: a shift by 0 would still round
    return row


def draw_colours(random: np.random.Generator) -> np.ndarray:
    """Draw one sample's parameters by LEAP's recipe."""
    if random.random() >= JITTER:
        return untouched(random.random() < GREY)
    order = random.permutation(4).tolist()
    factors = [random.uniform(*limits) for limits in RANGES]
    return jitter(factors, order, random.random() < GREY)


def recolour(crops: Crops) -> Tensor:
    """Change colours: (B, 3, S, S) float32, whole numbers from 0 to 255, on the device of the pixels."""
    x = crops.pixels.to(torch.float32, memory_format=torch.contiguous_format)
    parameters, table = on_device(x.device, crops.colours)[:, :, None, None, None], crops.colours.tolist()
    for i in range(ROUNDS):
        rows = [number for number, row in enumerate(table) if row[-1] == i]
        if rows:
            _shift_rows(x, parameters[:, 2 * ROUNDS], rows)
        kinds = {row[ROUNDS + i] for row in table if row[i] != 1}
        if kinds:
            _blend(x, parameters[:, i], parameters[:, ROUNDS + i], kinds)
    return x


def normalise_(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """x (B, 3, S, S) float32, 0 to 255, to (x / 255 - mean) / std by channel, in place."""
    for channel, (m, s) in enumerate(zip(mean, std, strict=True)):
        x[:, channel].mul_(1 / (255 * s)).sub_(m / s)
    return x


def finish(pixels: Tensor, colours: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """`recolour` and `normalise_` of (B, 3, S, S) uint8, its colours (B, 10) on the same device.

    Every sample goes through every operation, and keeps what is meant for it. So nothing is chosen on the host, and
    torch can compile the whole into a few kernels, where a GPU would be sent two hundred.
    """
    x, columns = pixels.float(), colours[:, :, None, None, None]
    for i in range(ROUNDS):
        x = torch.where(columns[:, -1] == i, _hue_shifted(x, columns[:, 2 * ROUNDS]), x)
        x = _blended(x, columns[:, i], columns[:, ROUNDS + i])
    scales = zip(x.unbind(1), mean, std, strict=True)
    return torch.stack([channel * (1 / (255 * s)) - m / s for channel, m, s in scales], 1)


def on_device(device: torch.device, host: Tensor) -> Tensor:
    """A small tensor on its way to the device; from pageable memory the host might wait for the stream."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def _blend(x: Tensor, factor: Tensor, kind: Tensor, kinds: set[float]) -> None:
    """One round on x (B, 3, S, S), in place; factor, kind: (B, 1, 1, 1); kinds: which occur, on the host."""
    rest = 1 - factor
    other: list[Tensor] = []
    if kinds != {BRIGHTNESS}:
        luma = _luma(x)
        if CONTRAST in kinds:
            other.append(_flat(luma).mul_(rest * (kind == CONTRAST)))
        if SATURATION in kinds:
            other.append(luma.mul_(rest * (kind == SATURATION)))
    x.mul_(factor)
    for part in other:
        x.add_(part)
    x.clamp_(0, 255).floor_()


def _blended(x: Tensor, factor: Tensor, kind: Tensor) -> Tensor:
    """`_blend` of every kind."""
    rest, luma = 1 - factor, _luma(x)
    x = x * factor + _flat(luma) * (rest * (kind == CONTRAST)) + luma * (rest * (kind == SATURATION))
    return x.clamp(0, 255).floor()


def _luma(x: Tensor) -> Tensor:
    return (x[:, :1] * LUMA[0]).add_(x[:, 1:2], alpha=LUMA[1]).add_(x[:, 2:], alpha=LUMA[2]).floor_()


def _flat(luma: Tensor) -> Tensor:
    """Its mean over each image. In float64 a sum of whole numbers is exact, and so the same in a batch of any size."""
    return luma.mean((2, 3), keepdim=True, dtype=torch.float64).float()


def _shift_rows(x: Tensor, shift: Tensor, rows: list[int]) -> None:
    """Shift the hues of some rows of the batch, in place."""
    if len(rows) == len(x):
        return _shift_hue(x, shift)
    chosen = on_device(x.device, torch.tensor(rows))
    part = x.index_select(0, chosen)
    _shift_hue(part, shift.index_select(0, chosen))
    x.index_copy_(0, chosen, part)


def _shift_hue(x: Tensor, shift: Tensor) -> None:
    """Turn the hues of x (B, 3, S, S) by `shift` (B, 1, 1, 1), in sixths of the circle and at most 1; in place.

    Let u, from -1 to 1, be a channel between the least and the greatest one of its pixel, and v the next channel's u
    minus the next but one's. The pixel's hue lies D sixths from the channel's own primary colour, 2 |D| =
    3 - u (3 - |v|), with the sign of v; a hue at distance D gives the channel the share clamp(2 - |D|, 0, 1) between
    least and greatest. So there are no angles and no comparisons, which cost most on a CPU.
    """
    r, g, b = x.unbind(1)
    least = torch.minimum(torch.minimum(r, g), b)[:, None]
    half = torch.maximum(torch.maximum(r, g), b)[:, None].sub_(least).mul_(0.5)
    x.sub_(least + half).div_(half.clamp(min=0.5))
    v = torch.empty_like(x)
    for i in range(3):
        torch.sub(x[:, (i + 1) % 3], x[:, (i + 2) % 3], out=v[:, i])
    x.mul_(v.abs().sub_(3)).add_(3).copysign_(v).add_(2 * shift).abs_().clamp_(2, 4)
    half.mul_(FULL)
    torch.sub(least.mul_(FULL).add_(half, alpha=4), x.mul_(half), out=x).floor_()


def _hue_shifted(x: Tensor, shift: Tensor) -> Tensor:
    """`_shift_hue` of a copy, in the same steps."""
    least, half = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    half = (half - least) * 0.5
    u = (x - (least + half)) / half.clamp(min=0.5)
    v = u.roll(-1, 1) - u.roll(-2, 1)
    u = ((u * (v.abs() - 3) + 3).copysign(v) + 2 * shift).abs().clamp(2, 4)
    half = half * FULL
    return ((least * FULL).add(half, alpha=4) - u * half).floor()
