"""Whatever PIL opens is 8-bit RGB as the image shows it, or refused: against the pixels it was made of."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from leap_dist.data.crops import Box, decode, read_box
from leap_dist.data.deit import Deit
from leap_dist.data.pixels import UnknownRange, rgb
from leap_dist.data.plans import Recipe
from small_sets import config

GREY = np.linspace(0, 255, 24 * 20).reshape(24, 20)  # what every deep image below shows
TIFF_NUMBERS = {
    np.uint16: (1, 16),
    np.int16: (2, 16),
    np.uint32: (1, 32),
    np.int32: (2, 32),
    np.float32: (3, 32),
    np.int8: (2, 8),
}


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def tiff(values: np.ndarray, order: str = "<", tags: dict[int, float] | None = None) -> bytes:
    """A TIFF of grey numbers of any type, written by hand: PIL's writer changes some types."""
    kind, bits = TIFF_NUMBERS[values.dtype.type]
    body = values.astype(values.dtype.newbyteorder(order)).tobytes()
    height, width = values.shape
    given = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 0, 277: 1, 278: height, 279: len(body), 339: kind}
    given |= tags or {}
    given[273] = 8 + 2 + 12 * len(given) + 4
    entries = [
        struct.pack(
            order + ("HHIf" if isinstance(value, float) else "HHII"),
            tag,
            11 if isinstance(value, float) else 4,
            1,
            value,
        )
        for tag, value in sorted(given.items())
    ]
    header = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8)
    return header + struct.pack(order + "H", len(given)) + b"".join(entries) + bytes(4) + body


def of_depth(top: float, kind: type = np.uint16) -> np.ndarray:
    return (GREY / 255 * top).round().astype(kind)


def packed_12_bit_tiff() -> bytes:
    values = of_depth(4095).astype(np.uint16)
    left, right = values[:, 0::2], values[:, 1::2]
    rows = np.stack([left >> 4, (left & 15) << 4 | right >> 8, right & 255], -1).astype(np.uint8)
    whole = tiff(of_depth(4095), tags={258: 12})
    body = rows.tobytes()
    return whole[: len(whole) - 2 * GREY.size] + body


def pgm(top: int, plain: bool = False) -> bytes:
    values = of_depth(top)
    head = f"P{2 if plain else 5} 20 24 {top}\n".encode()
    return head + (" ".join(map(str, values.ravel())).encode() if plain else values.astype(">u2").tobytes())


DEEP = {
    "png of 16 bits": lambda: encoded(Image.fromarray(of_depth(65535)), "PNG"),
    "tiff of 16 bits": lambda: tiff(of_depth(65535)),
    "tiff of 16 bits, big-endian": lambda: tiff(of_depth(65535), ">"),
    "tiff of 16 bits, white is zero": lambda: tiff(65535 - of_depth(65535), tags={262: 0}),
    "tiff of 16 bits, signed": lambda: tiff(of_depth(32767, np.int16)),
    "tiff of 12 bits": packed_12_bit_tiff,
    "tiff of 16 bits, compressed": lambda: encoded(Image.fromarray(of_depth(65535)), "TIFF", compression="tiff_lzw"),
    "tiff of 32 bits, signed": lambda: tiff(of_depth(2**31 - 1, np.int32)),
    "tiff of 32 bits, unsigned": lambda: tiff(of_depth(2**32 - 1, np.uint32)),
    "tiff of floats whose range is given": lambda: tiff((GREY / 51 - 2).astype(np.float32), tags={340: -2.0, 341: 3.0}),
    "pgm of 16 bits": lambda: pgm(65535),
    "pgm of 12 bits": lambda: pgm(4095),
    "pgm of 10 bits": lambda: pgm(1000),
    "pgm of 12 bits, plain": lambda: pgm(4095, plain=True),
    "jpeg 2000 of 16 bits": lambda: encoded(Image.fromarray(of_depth(65535)), "JPEG2000"),
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_grey_is_scaled_by_its_full_range(name: str) -> None:
    data = DEEP[name]()
    found = decode(data).numpy()
    assert (found[0] == found[1]).all() and (found[0] == found[2]).all()
    assert np.abs(found[0] - GREY).max() <= 0.6


@pytest.mark.parametrize("name", DEEP)
def test_every_way_to_read_an_image_sees_the_same_pixels(name: str) -> None:
    data = DEEP[name]()
    whole = decode(data).numpy().transpose(1, 2, 0)
    assert (np.asarray(Deit(config("set")).decode(data, np.random.default_rng(0))) == whole).all()
    box = read_box(Image.open(io.BytesIO(data)), Box(4, 2, 8, 8), 8)
    assert (box.numpy().transpose(1, 2, 0) == whole[4:12, 2:10]).all()
    assert Recipe().encode(data) == data
    small = np.asarray(Image.open(io.BytesIO(Recipe(resize=10, quality=95).encode(data))).convert("L"), float)
    expected = np.asarray(Image.fromarray(whole).convert("L").resize((10, 12), Image.Resampling.BICUBIC), float)
    assert np.abs(small - expected).max() < 12


def planar_16_bit_tiff() -> bytes:
    """Red, green and blue of 16 bits, a plane each; by hand, as `tiff`."""
    plane = of_depth(65535).astype("<u2").tobytes()
    # Each plane has a strip; places and sizes of the three, and their bits, lie behind the entries.
    entries, extra = [], b""
    start = 8 + 2 + 12 * 11 + 4
    for tag, kind, values in (
        (256, 4, [20]), (257, 4, [24]), (258, 3, [16] * 3), (259, 3, [1]), (262, 3, [2]),
        (273, 4, [start + 30 + i * len(plane) for i in range(3)]), (277, 3, [3]), (278, 4, [24]),
        (279, 4, [len(plane)] * 3), (284, 3, [2]), (339, 3, [1]),
    ):  # fmt: skip
        packed = struct.pack(f"<{len(values)}{'H' if kind == 3 else 'I'}", *values)
        place = packed.ljust(4, b"\0") if len(packed) <= 4 else struct.pack("<I", start + len(extra))
        extra += packed if len(packed) > 4 else b""
        entries.append(struct.pack("<HHI", tag, kind, len(values)) + place)
    assert len(extra) == 30
    return b"II*\0" + struct.pack("<IH", 8, 11) + b"".join(entries) + bytes(4) + extra + 3 * plane


UNKNOWN = {
    "8 bits with a sign": lambda: tiff(of_depth(127, np.int8)),
    "16 bits a colour, in planes": planar_16_bit_tiff,
    "floats from 0 to 1": lambda: tiff((GREY / 255).astype(np.float32)),
    "floats from 0 to 255": lambda: tiff(GREY.astype(np.float32)),
    "floats, one of them no number, of a given range": lambda: tiff(
        np.where(GREY < 1, np.nan, GREY).astype(np.float32), tags={340: 0.0, 341: 255.0}
    ),
    "16 bits in 32": lambda: tiff(of_depth(65535, np.int32)),
    "8 bits in 32, unsigned": lambda: tiff(of_depth(255, np.uint32)),
    "negative 16 bits": lambda: tiff(of_depth(20000, np.int16) - np.int16(10000)),
    "negative 32 bits": lambda: tiff(of_depth(2**31 - 1, np.int32) - np.int32(2**30)),
    "a pfm": lambda: b"Pf\n20 24\n-1.0\n" + GREY.astype("<f4").tobytes(),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_nobody_knows_the_range_of_is_refused_everywhere(name: str) -> None:
    data = UNKNOWN[name]()
    random = np.random.default_rng(0)
    ways = (decode, Recipe().encode, Recipe(resize=8).encode, lambda data: Deit(config("set")).decode(data, random))
    for way in (*ways, lambda data: read_box(Image.open(io.BytesIO(data)), Box(0, 0, 8, 8), 8)):
        with pytest.raises(UnknownRange):
            way(data)


COLOURS = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "mode",
    [
        "1",
        "L",
        "LA",
        "La",
        "P",
        "PA",
        "RGB",
        "RGBA",
        "RGBa",
        "RGBX",
        "CMYK",
        "YCbCr",
        "LAB",
        "HSV",
        "I;16",
        "I;16B",
        "I;16L",
        "I;16N",
    ],
)
def test_every_mode_of_pil_becomes_rgb_without_a_warning(mode: str) -> None:
    """Flat white and black, which every mode can show."""
    for value in (0, 255):
        image = Image.new("RGB", (4, 3), (value,) * 3)
        if mode.startswith("I"):
            image = Image.new(mode, (4, 3), value * 257)
        elif mode == "La":
            image = image.convert("LA").convert("La")
        elif mode in ("RGBa", "PA"):
            image = image.convert({"RGBa": "RGBA", "PA": "P"}[mode]).convert(mode)
        elif mode == "LAB":
            image = Image.new("LAB", (4, 3), (value, 128, 128))
        else:
            image = image.convert(mode)
        assert image.mode == mode
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = np.asarray(rgb(image)).astype(int)
        assert found.shape == (3, 4, 3) and np.abs(found - value).max() <= 1


def test_a_palette_with_transparency_keeps_its_colours() -> None:
    image = Image.fromarray(COLOURS).quantize(16)
    data = encoded(image, "PNG", transparency=bytes(range(0, 256, 16)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = decode(data)
    assert (found.numpy().transpose(1, 2, 0) == np.asarray(image.convert("RGB"))).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_8_bit_rgb_is_what_pil_gives_to_the_bit(kind: str) -> None:
    data = encoded(Image.fromarray(COLOURS), kind)
    expected = np.asarray(Image.open(io.BytesIO(data)))
    found: Tensor = decode(data)
    assert (found.numpy().transpose(1, 2, 0) == expected).all()


def test_a_png_of_16_bits_a_channel_keeps_the_upper_eight() -> None:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    rows = (COLOURS.astype(np.uint16) * 257).astype(">u2").reshape(24, -1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", 20, 24, 16, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    assert (decode(png).numpy().transpose(1, 2, 0) == COLOURS).all()
