"""Compressed shards, unpacked to the size that the index says and not a byte more: a bomb stops there."""

from __future__ import annotations

import bz2
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

PIECE = 1 << 20  # bytes unpacked at a time


class TooLarge(ValueError):
    """What is packed unpacks to more than the index says."""


def unpack(packed: Path, raw: Path, compression: str, size: int) -> None:
    """Write `raw`, `size` bytes, from `packed`. compression: streaming's word, with or without a level.

    Raises:
        TooLarge: there is more; nothing beyond is unpacked.
        ValueError: it is damaged.
    """
    data, left = packed.read_bytes(), size
    with raw.open("wb") as file:
        for piece in FAMILIES[compression.partition(":")[0]](data, size):
            left -= len(piece)
            if left < 0:
                raise TooLarge(f"{packed.name} unpacks to more than the {size} bytes of the index")
            file.write(piece)
    if left:
        raise ValueError(f"{packed.name} unpacks to {size - left} bytes where the index says {size}")


def _zstd(data: bytes, size: int) -> Iterator[bytes]:
    import zstandard

    try:
        with zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True) as reader:
            while piece := reader.read(PIECE):
                yield piece
    except zstandard.ZstdError as error:
        raise ValueError(f"damaged zstd: {error}") from None


def _brotli(data: bytes, size: int) -> Iterator[bytes]:
    import brotli

    decoder = brotli.Decompressor()
    try:
        piece = decoder.process(data, output_buffer_limit=PIECE)
        while piece:
            yield piece
            piece = b"" if decoder.is_finished() else decoder.process(b"", output_buffer_limit=PIECE)
    except brotli.error as error:
        raise ValueError(f"damaged brotli: {error}") from None
    if not decoder.is_finished():
        raise ValueError("cut off brotli")


def _snappy(data: bytes, size: int) -> Iterator[bytes]:
    import snappy

    told = shift = 0
    for byte in data[:5]:  # the size, seven bits a byte, is what its format begins with
        told |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            break
    if told > size:
        raise TooLarge(f"it says itself that it has {told} bytes, the index says {size}")
    try:
        yield snappy.decompress(data)
    except snappy.UncompressError as error:
        raise ValueError(f"damaged snappy: {error}") from None


def _gzip(data: bytes, size: int) -> Iterator[bytes]:
    while data:  # one member after another
        decoder = zlib.decompressobj(wbits=31)
        while not decoder.eof:
            try:
                piece = decoder.decompress(data, PIECE)
            except zlib.error as error:
                raise ValueError(f"damaged gzip: {error}") from None
            data = decoder.unconsumed_tail
            if not piece and not decoder.eof:
                raise ValueError("cut off gzip")
            yield piece
        data = decoder.unused_data


def _bzip2(data: bytes, size: int) -> Iterator[bytes]:
    while data:
        decoder = bz2.BZ2Decompressor()
        while not decoder.eof:
            try:
                piece = decoder.decompress(data, PIECE)
            except OSError as error:
                raise ValueError(f"damaged bzip2: {error}") from None
            data = b""
            if not piece and not decoder.eof and decoder.needs_input:
                raise ValueError("cut off bzip2")
            yield piece
        data = decoder.unused_data


FAMILIES: dict[str, Callable[[bytes, int], Iterator[bytes]]] = {
    "br": _brotli, "bz2": _bzip2, "gz": _gzip, "snappy": _snappy, "zstd": _zstd,
}  # fmt: skip
