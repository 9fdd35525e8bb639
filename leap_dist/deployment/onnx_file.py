"""A student as an ONNX file: static sides, any number of images, outputs by name, checked in ONNX Runtime.

Position embeddings and rotary tables are constants of the graph, and so are remedies: whatever the student is, it is
one file. `torch.onnx.export` makes it from `torch.export`'s program.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from leap_dist.deployment.comparing import Runner, named_outputs
from leap_dist.deployment.extras import needed
from leap_dist.deployment.loaded import Distilled
from leap_dist.errors import UserError

INPUT = "images"
OPSET = 20
LARGEST = 3 * 2**29  # bytes of weights, beyond which torch writes them to a second file
# Largest difference to torch's outputs that is let pass, over their largest value.
BOUNDS = {"fp32": 1e-4, "fp16": 2e-2, "int8": 0.25}


def write_onnx(model: Distilled, path: Path) -> None:
    """Write `model` in float32 to `path`. UserError for one of more than LARGEST bytes."""
    needed("onnx", "onnxscript")
    size = 4 * sum(tensor.numel() for tensor in model.state_dict().values())
    if size > LARGEST:
        raise UserError(
            f"--to onnx: {size / 2**30:.1f} GiB of weights, and an ONNX file in one piece has at most "
            f"{LARGEST / 2**30:g} GiB; --to pt2 takes any"
        )
    with _quiet():
        program = torch.onnx.export(
            Plain(model), (example(model),), dynamo=True, opset_version=OPSET, verbose=False, input_names=[INPUT],
            output_names=list(named_outputs(model, example(model))), dynamic_shapes=({0: torch.export.Dim("batch")},),
        )  # fmt: skip
    program.save(path, external_data=False)


class Plain(nn.Module):
    """A student that returns a tuple of the outputs it has, with attention as products and a softmax.

    torch's decomposition of the fused one fails on BEiT's relative positions (2.14), and runtimes fuse on their own.
    """

    def __init__(self, model: Distilled) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).cpu().eval()
        for module in self.model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(output for output in self.model(images) if output is not None)


def example(model: Distilled, batch: int = 2) -> Tensor:
    """Images of zeros of the student's size; two, since one would be taken for a constant."""
    size = model.spec.image_size
    return torch.zeros(batch, 3, size, size)


def onnx_runner(path: Path) -> Runner:
    """Runs an ONNX file on the CPU."""
    runtime = needed("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(images: Tensor) -> Mapping[str, np.ndarray]:
        return dict(zip(names, session.run(names, {INPUT: images.numpy()}), strict=True))

    return run


def write_half(source: Path, path: Path) -> None:
    """`source` with weights and products in float16, inputs and outputs in float32."""
    onnx = needed("onnx")
    needed("onnxruntime")
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with _quiet():
        onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=True), path)


def write_int8(source: Path, path: Path, batches: Iterable[Tensor]) -> None:
    """`source` with 8-bit weights and activations, whose ranges `batches` of images show (static quantisation).

    Only products with weights: on the demo's student the rest, norms and sums of tokens, doubled the mean difference
    and made the file larger. Weights have 7 bits, as CPUs without VNNI add pairs of 8-bit products in 16 bits.
    """
    needed("onnx", "onnxruntime")
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self.rest = iter(batches)

        def get_next(self) -> Any:
            images = next(self.rest, None)
            return None if images is None else {INPUT: images.numpy()}

    prepared = path.with_suffix(".prepared")
    try:
        with _quiet():
            quant_pre_process(source, prepared)
            quantize_static(
                prepared, path, Images(), quant_format=QuantFormat.QDQ, per_channel=True, reduce_range=True,
                op_types_to_quantize=["Conv", "MatMul", "Gemm"], extra_options={"MatMulConstBOnly": True},
            )  # fmt: skip
    finally:
        prepared.unlink(missing_ok=True)


def versions(path: Path) -> str:
    """Opset and IR of a file, in words."""
    model = needed("onnx").load(path, load_external_data=False)
    return f"opset {next(item.version for item in model.opset_import if not item.domain)}, IR {model.ir_version}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporters tell of each step and each constant."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
