"""Hostile images, as samples of a set."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

from PIL import Image
from streaming import MDSWriter

from hostile import BOMB, CASES, Case, Work, case, reads


def _image(data: bytes, folder: Path) -> Work:
    with MDSWriter(out=str(folder / "set"), columns={"image": "bytes", "label": "int"}) as writer:
        for i in range(4):
            writer.write({"image": data, "label": i})
    return reads(folder / "set", canonical_nodes=1)


def _encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, *chunks: bytes, bits: int = 8, colour: int = 2) -> bytes:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + b"".join(chunks)
        + _chunk(b"IDAT", zlib.compress(bytes(9999)))
        + _chunk(b"IEND", b"")
    )


@case("does not decode.*13000 x 13000 pixels", quick=True)
def png_of_169_megapixels(folder: Path) -> Work:
    return _image(_encoded(Image.new("L", (13000, 13000)), "PNG"), folder)


@case("does not decode.*pixels")
def png_of_4_gigapixels(folder: Path) -> Work:
    return _image(_png(65535, 65535), folder)


@case("does not decode")
def png_of_a_billion_by_one(folder: Path) -> Work:
    return _image(_png(2**31 - 1, 1), folder)


@case("does not decode")
def png_with_a_text_of_a_gigabyte(folder: Path) -> Work:
    return _image(_png(8, 8, _chunk(b"zTXt", b"a\0\0" + zlib.compress(BOMB))), folder)


@case("does not decode")
def png_with_a_profile_of_a_gigabyte(folder: Path) -> Work:
    plain = _encoded(Image.new("RGB", (8, 8)), "PNG")
    return _image(plain[:33] + _chunk(b"iCCP", b"a\0\0" + zlib.compress(BOMB)) + plain[33:], folder)


@case("does not decode.*pixels")
def gif_with_a_canvas_of_4_gigapixels(folder: Path) -> Work:
    data = bytearray(_encoded(Image.new("P", (8, 8)), "GIF"))
    data[6:10] = b"\xff\xff\xff\xff"
    return _image(bytes(data), folder)


@case(None)
def gif_of_two_thousand_frames(folder: Path) -> Work:
    frames = [Image.new("P", (200, 200), i % 255) for i in range(2000)]
    return _image(_encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), folder)


@case("does not decode.*pixels")
def tiff_of_4_gigapixels(folder: Path) -> Work:
    data = _encoded(Image.new("L", (300, 300)), "TIFF").replace(
        struct.pack("<HHII", 256, 4, 1, 300), struct.pack("<HHII", 256, 4, 1, 65535)
    )
    return _image(data.replace(struct.pack("<HHII", 257, 4, 1, 300), struct.pack("<HHII", 257, 4, 1, 65535)), folder)


@case("does not decode.*pixels")
def jpeg_2000_of_64_megapixels(folder: Path) -> Work:
    return _image(_encoded(Image.new("L", (8000, 8000)), "JPEG2000"), folder)


@case("does not decode.*cannot identify", quick=True)
def eps(folder: Path) -> Work:
    return _image(_encoded(Image.new("RGB", (64, 64)), "EPS"), folder)


def _format_case(form: str) -> None:
    def make(folder: Path) -> Work:
        return _image(_encoded(Image.new("RGB", (64, 64)), form), folder)

    CASES.append(Case(f"image_{form.lower()}", make, "does not decode.*cannot identify", False))


for _form in ("PDF", "ICO", "TGA", "PCX", "SGI", "IM", "DDS", "ICNS", "SPIDER"):
    _format_case(_form)


@case("does not decode.*cannot identify")
def image_psd(folder: Path) -> Work:
    return _image(b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 30000, 30000, 8, 3) + bytes(500), folder)


@case(None)
def images_of_every_format_that_is_meant(folder: Path) -> Work:
    image = Image.new("RGB", (64, 48), (200, 30, 40))
    forms = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "DIB", "TIFF", "JPEG2000", "PPM", "MPO")
    with MDSWriter(out=str(folder / "set"), columns={"image": "bytes", "label": "int"}) as writer:
        for form in forms:
            writer.write({"image": _encoded(image, form), "label": 0})
    return reads(folder / "set", canonical_nodes=1)
