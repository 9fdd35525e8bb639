"""Every op of the kernel family has the same parts under the same stem."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_op_has_all_its_parts() -> None:
    ops = [folder.name for folder in (ROOT / "kernels").iterdir() if (folder / "op.py").exists()]
    assert ops
    for op in ops:
        parts = [f"kernels/{op}/{part}.py" for part in ("reference", "triton_kernel")]
        parts += [f"tests/kernels/test_{op}.py", f"tests/kernels/test_{op}_triton.py", f"tools/bench/{op}.py"]
        assert not [part for part in parts if not (ROOT / part).exists()]
