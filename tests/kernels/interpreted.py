"""Runs cases of `feature_match(impl="triton")` in a process of its own: `python interpreted.py cases.pt results.pt`.

Triton reads TRITON_INTERPRET when it is first imported, which in a test session other tests may long have done. A case
is a dict of inputs (student, weight, bias, teacher), options and, if wanted, tiles and autocast; its result is a list
of tensors (loss, gradients of student, weight, bias, moments), or the message of the error. One that is "alone" has the
moments only, of products in that dtype. On a GPU the tuners choose only in cases that say "tuned": all of them would
take minutes to compile.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton

from leap_kernels import feature_match
from leap_kernels.feature_match import triton_kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TUNERS = (triton_kernel.match_tuner, triton_kernel.gram_tuner)
DEFAULTS = tuple(tuner.configs for tuner in TUNERS)
GRADS = ("student", "weight", "bias")


def run(case: dict[str, Any]) -> list[torch.Tensor | None] | str:
    tensors = {name: None if x is None else x.detach().to(DEVICE) for name, x in case["inputs"].items()}
    for name in GRADS:
        if tensors[name] is not None:
            tensors[name].requires_grad_()
    for tuner, default, tiles in zip(TUNERS, DEFAULTS, case.get("tiles") or (None, None), strict=True):
        tuner.configs = [triton.Config(tiles)] if tiles else default if case.get("tuned") else default[-1:]
    if "alone" in case:
        found = triton_kernel.moments(tensors["student"], tensors["teacher"], case["alone"])
        return [x.cpu() for x in found]
    try:
        with torch.autocast(DEVICE, case.get("autocast") or torch.bfloat16, enabled="autocast" in case):
            loss, moments = feature_match(**tensors, impl="triton", moments=True, **case["options"])
    except ValueError as error:
        return str(error)
    loss.backward()
    grads = [None if tensors[name] is None else tensors[name].grad for name in GRADS]
    return [None if x is None else x.detach().cpu() for x in (loss, *grads, *moments)]


if __name__ == "__main__":
    torch.save([run(case) for case in torch.load(sys.argv[1])], sys.argv[2])
