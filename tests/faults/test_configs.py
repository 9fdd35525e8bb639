"""Configs that nobody would write: each is one line, or a run that can start."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from leap_dist.config import Config, load, option_fields
from leap_dist.errors import UserError
from leap_dist.runtime.reporting import failed
from trials import Tally

NEEDED = {"teacher": {"model": "t"}, "student": {"model": "s"}, "data": {"train": "digits"}}
KEYS = sorted(option_fields())
NUMBERS = st.one_of(
    st.integers(-(10**30), 10**30), st.floats(allow_nan=True, allow_infinity=True), st.sampled_from([0, -1, 1, 2**31])
)
TEXTS = st.one_of(
    st.text(max_size=40),
    st.sampled_from(["", "/dev/null", "/", "..", "a\0b", "~", "x" * 5000, "${seed}", "${", "s3://", "null", "hub"]),
)
VALUES = st.recursive(
    st.one_of(NUMBERS, TEXTS, st.booleans(), st.none()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=4,
)
OVERRIDES = st.lists(st.tuples(st.one_of(st.sampled_from(KEYS), st.text(max_size=12)), VALUES), min_size=1, max_size=3)


def outcome(path: Path, overrides: list[str]) -> str:
    """'starts', 'refused', or what went wrong."""
    try:
        config = load(path, overrides)
    except UserError as error:
        with contextlib.redirect_stderr(io.StringIO()) as printed:
            status = failed(error)
        (*_, text), count = printed.getvalue().splitlines(), len(printed.getvalue().splitlines())
        return "refused" if (status, count) == (2, 1) and 40 < len(text) < 2000 else f"no line: {text!r:.200}"
    except Exception as error:
        return f"{type(error).__name__}: {error!s:.200}"
    return "starts" if isinstance(config, Config) else f"no config: {config!r:.100}"


def tries(tmp_path: Path, count: int) -> None:
    """As many configs, half as command lines, half as YAML; the same ones on every machine."""
    base, found, seen = tmp_path / "base.yaml", Tally("configs"), set()
    base.write_text(yaml.safe_dump(NEEDED))

    @settings(max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=HealthCheck)
    @given(OVERRIDES, st.booleans())
    def one(asked: list[tuple[str, Any]], typed: bool) -> None:
        if typed:
            result = outcome(base, [f"{key}={value}" for key, value in asked])
        else:
            mine = tmp_path / "mine.yaml"
            mine.write_text(yaml.safe_dump({"base": "base.yaml"} | nested(asked)), encoding="utf-8")
            result = outcome(mine, [])
        seen.add(result)
        found.note(result in ("starts", "refused"), f"{asked!r:.300} -> {result}")

    one()
    assert {"starts", "refused"} <= seen
    found.close()


def nested(asked: list[tuple[str, Any]]) -> dict[str, Any]:
    """Dotted keys as a YAML has them."""
    tree: dict[str, Any] = {}
    for key, value in asked:
        section, dot, name = key.partition(".")
        if dot and isinstance(tree.setdefault(section, {}), dict):
            tree[section][name] = value
        else:
            tree[section] = value
    return tree


@pytest.mark.seconds
def test_forty_odd_configs(tmp_path: Path) -> None:
    tries(tmp_path, 40)


@pytest.mark.slow
def test_a_thousand_odd_configs(tmp_path: Path) -> None:
    tries(tmp_path, 1000)


@pytest.mark.seconds
@settings(max_examples=40, derandomize=True, database=None, deadline=None, suppress_health_check=HealthCheck)
@given(st.binary(max_size=200))
def test_files_that_are_no_yaml(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "garbled.yaml"
    path.write_bytes(content)
    assert outcome(path, ["teacher.model=t", "student.model=s", "data.train=digits"]) in ("starts", "refused")
