"""Benchmark of `leap_kernels.feature_match` against eager Linear + MSE (+ three-product CKA), in one run.

    python tools/bench/feature_match.py                     # CPU: M=8192 fp32; CUDA: M=65536 bf16 autocast
    python tools/bench/feature_match.py --rows 65536 --precision bf16 --csv feature_match.csv

Needs torch, triton (on CUDA) and this package. Forward, backward and full step (both), each with and without CKA. The
op computes its gradients in the forward pass, so only the full steps compare. TFLOP/s counts the products each form
really takes; the roofline is the least time those products, or one reading of the inputs, need at the peaks this
machine reaches in the same run. The last lines are the ratios to eager.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from leap_dist.benchmarking.harness import Row, report
from leap_dist.benchmarking.matching import COMPILED, EAGER, PRECISIONS, Problem, measure


def ratios(rows: list[Row], names: list[str]) -> None:
    """Full steps against eager."""
    full = {row.name: row for row in rows if row.part == "full"}
    for suffix in ("", " + CKA"):
        eager = full[EAGER + suffix]
        for name in names[1:]:
            row = full[name + suffix]
            speed, memory = eager.median / row.median, row.memory / eager.memory
            print(f"{row.name}: {speed:.2f}x the speed of eager, {memory:.0%} of its extra memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--rows", type=int, default=65536 if cuda else 8192, help="M, tokens")
    parser.add_argument("--student", type=int, default=384, help="Ds")
    parser.add_argument("--teacher", type=int, default=1536, help="Dt")
    parser.add_argument("--precision", choices=PRECISIONS, default="autocast" if cuda else "fp32")
    parser.add_argument(
        "--impls", nargs="+", default=["auto"], choices=("auto", "reference", "gram", "triton", COMPILED)
    )
    parser.add_argument("--repeats", type=int, default=20 if cuda else 9)
    parser.add_argument("--csv", type=Path, help="append the rows here")
    args = parser.parse_args()
    device = torch.device("cuda" if cuda else "cpu")
    problem = Problem(args.rows, args.student, args.teacher, args.precision, device)
    names = [EAGER, *args.impls]
    rows = measure(problem, names, args.repeats)
    report(rows, args.csv)
    ratios(rows, names)


if __name__ == "__main__":
    main()
