"""What is read of an MDS shard: the columns `image` and `label`, as bytes and as a number. Nothing else is decoded.

streaming's own reader decodes every column by what the index names, and one of its encodings, `pkl`, runs code. This
one takes the bytes of the columns that are wanted and steps over the others.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

import numpy as np
from streaming.base.format import FileInfo
from streaming.base.format.mds import MDSReader

from leap_dist.data.shards import INTEGERS


def open_shard(folder: Path, info: Mapping[str, Any]) -> WantedColumns:
    """The reader of a shard in `folder`. info: its entry of an index, as `shards.read_index` gives it."""
    columns = {key: info[key] for key in ("column_names", "column_encodings", "column_sizes")}
    return WantedColumns(
        dirname=str(folder), split=None, compression=info["compression"], hashes=[], samples=info["samples"],
        size_limit=None, raw_data=_file(info["raw_data"]), zip_data=_file(info["zip_data"]), **columns,
    )  # fmt: skip


def _file(info: Optional[Mapping[str, Any]]) -> Optional[FileInfo]:
    return None if info is None else FileInfo(info["basename"], info["bytes"], info["hashes"])


class WantedColumns(MDSReader):
    """A shard's reader, built by `open_shard`."""

    def get_sample_data(self, idx: int) -> bytes:
        """All columns of a sample. ValueError where the shard's own table leads out of it."""
        with open(os.path.join(self.dirname, self.raw_data.basename), "rb", 0) as file:
            file.seek((1 + idx) * 4)
            begin, end = np.frombuffer(file.read(8), "<u4").tolist()
            if not 0 < begin < end <= self.raw_data.bytes:
                raise ValueError(f"sample {idx} is said to lie at bytes {begin} to {end} of {self.raw_data.bytes}")
            file.seek(begin)
            return file.read(end - begin)

    def decode_sample(self, data: bytes) -> Mapping[str, Any]:
        """`image`: bytes; `label`: int, if there is one. ValueError where the sample's table does not fit it."""
        sizes, at = [], 0
        for fixed in self.column_sizes:
            if fixed:
                sizes.append(fixed)
            else:
                sizes += np.frombuffer(data[at : at + 4], "<u4", 1).tolist()
                at += 4
        if at + sum(sizes) != len(data):
            raise ValueError(f"a sample of {len(data)} bytes is said to have columns of {at + sum(sizes)}")
        sample: dict[str, Any] = {}
        for name, encoding, size in zip(self.column_names, self.column_encodings, sizes, strict=True):
            if name == "image":
                sample[name] = data[at : at + size]
            elif name == "label":
                sample[name] = int(np.frombuffer(data[at : at + size], INTEGERS[encoding])[0])
            at += size
        return sample
