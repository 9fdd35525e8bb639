"""Every compression of streaming is unpacked as its own code packs it, and never beyond the size asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
from streaming.base.compression import compress

from leap_dist.data.unpacking import FAMILIES, TooLarge, unpack

RAW = bytes(range(256)) * 20_000  # several pieces


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_packed_comes_back_and_nothing_more(family: str, tmp_path: Path) -> None:
    packed, raw = tmp_path / "packed", tmp_path / "raw"
    packed.write_bytes(compress(family, RAW))
    unpack(packed, raw, family, len(RAW))
    assert raw.read_bytes() == RAW
    with pytest.raises(TooLarge):
        unpack(packed, raw, family, len(RAW) - 1)
    assert raw.stat().st_size < len(RAW)
    for damaged in (b"", b"no archive", packed.read_bytes()[:-9]):
        packed.write_bytes(damaged)
        with pytest.raises(ValueError):
            unpack(packed, raw, family, len(RAW))


@pytest.mark.parametrize("family", ["gz", "bz2", "zstd"])
def test_parts_one_after_another_are_one_shard(family: str, tmp_path: Path) -> None:
    (tmp_path / "packed").write_bytes(compress(family, RAW) * 2)
    unpack(tmp_path / "packed", tmp_path / "raw", family, 2 * len(RAW))
    assert (tmp_path / "raw").read_bytes() == RAW * 2
