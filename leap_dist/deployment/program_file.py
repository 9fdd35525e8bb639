"""A student as a `torch.export` program: `torch.export.load(FILE).module()(images)`, on any number of images."""

from __future__ import annotations

from pathlib import Path

import torch

from leap_dist.deployment.comparing import Runner, named_outputs
from leap_dist.deployment.loaded import Distilled
from leap_dist.deployment.onnx_file import Plain, example


def write_program(model: Distilled, path: Path) -> None:
    """Write the program to `path`, whose name must end in .pt2. Its outputs are a tuple, in the order of `Outputs`."""
    batch = torch.export.Dim("batch")
    with torch.no_grad():
        program = torch.export.export(Plain(model), (example(model),), dynamic_shapes=({0: batch},))
    torch.export.save(program, path)


def program_runner(path: Path, model: Distilled) -> Runner:
    """Runs a program; its outputs under the names of `model`'s."""
    program, names = torch.export.load(path).module(), list(named_outputs(model, example(model)))

    def run(images: torch.Tensor) -> dict:
        with torch.no_grad():
            return {name: value.numpy() for name, value in zip(names, program(images), strict=True)}

    return run
