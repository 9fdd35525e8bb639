"""Plain pickles come back as they were, from every protocol and from Python 2; tests/faults has those that are not."""

from __future__ import annotations

import collections
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from leap_dist.errors import UserError
from leap_dist.runtime.plain_pickle import read_plain_pickle

ARRAYS = [
    np.arange(6, dtype=np.uint8).reshape(2, 3), np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.zeros((0, 4)),
    np.array(7), np.arange(3, dtype=">i4"), np.array([True, False]), np.array(["ab", "c"]), np.array([b"ab", b"c"]),
]  # fmt: skip
PLAIN = {
    "names": ["a", "é", b"\xff"], 3: (1.5, None, True, 10**30), "set": {1, 2}, "frozen": frozenset("ab"),
    "complex": 1j, "ordered": collections.OrderedDict(a=1), "bytearray": bytearray(b"x"),
}  # fmt: skip
# {'data': array([7, 255], uint8)} as Python 2 with NumPy 1 writes it, and as CIFAR's files have it.
PYTHON_2 = (
    b"\x80\x02}U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x02\x85"
    b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x02\x07\xfftbs."
)


def read(path: Path, content: bytes, **options: Any) -> Any:
    path.write_bytes(content)
    return read_plain_pickle(path, "a pickle", **options)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_comes_back(protocol: int, tmp_path: Path) -> None:
    content = {**PLAIN, "arrays": ARRAYS, "scalar": np.float32(1.25), "again": ARRAYS}
    found = read(tmp_path / "p", pickle.dumps(content, protocol))
    assert {key: found[key] for key in PLAIN} == PLAIN and type(found["ordered"]) is collections.OrderedDict
    assert found["scalar"] == np.float32(1.25) and found["again"] is found["arrays"]
    for array, expected in zip(found["arrays"], ARRAYS, strict=True):
        np.testing.assert_array_equal(array, expected)
        assert array.dtype.newbyteorder("=") == expected.dtype.newbyteorder("=") and array.shape == expected.shape


def test_what_python_2_wrote_is_read(tmp_path: Path) -> None:
    assert read(tmp_path / "p", PYTHON_2, encoding="latin1")["data"].tolist() == [7, 255]


def test_what_is_no_plain_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"p: a pickle is expected \(it asks for pathlib.*Path, which is no plain data"):
        read(tmp_path / "p", pickle.dumps(Path("x")))
