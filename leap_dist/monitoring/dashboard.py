"""What TensorBoard shows besides the points: which charts belong together, and in words what they mean."""

from __future__ import annotations

from typing import Any

from leap_dist.config import Config
from leap_dist.runtime.distributed import uses_gpus
from leap_dist.runtime.timing import PHASES

Charts = dict[str, list[Any]]


def layout(config: Config) -> dict[str, Charts]:
    """Of the tab "Custom Scalars": category -> chart -> tags, which are regular expressions.

    What the run's options keep from being written has no chart.
    """
    categories = {
        "curriculum": _curriculum(config),
        "savings": _lines(
            {
                "saved of the teacher's FLOPs": ["flops/teacher_saved_fraction"],
                "saved of all FLOPs": ["savings/flops"],
                "saved of the time, estimated": ["savings/time_estimate"],
                "skip efficiency, estimated": ["savings/efficiency_estimate"],
                "seconds so far by phase": ["total_seconds/.*"],
                "PFLOPs so far": ["total_pflops/.*"],
            }
        ),
        "progress": _progress(config),
        "speed": _speed(config),
    }
    return categories | {"spectra": _SPECTRA} if config.telemetry.spectra_every else categories


def _lines(charts: dict[str, list[str]]) -> Charts:
    return {name: ["Multiline", tags] for name, tags in charts.items()}


_SPECTRA = _lines(
    {
        "dimensions of an image's tokens at 90 % energy": ["spectra/.*/dims_90$"],
        "dimensions of an image's tokens at 99 % energy": ["spectra/.*/dims_99$"],
        "effective rank of an image's tokens": ["spectra/.*/effective_rank$"],
        "share of channel frequencies with 90 % energy": ["spectra/.*/sep_90$"],
    }
)


def _curriculum(config: Config) -> Charts:
    score = f"curriculum/{config.curriculum.metric}$"
    return _lines(
        {
            "target block": ["curriculum/block$"],
            "score, its average and the threshold": [score, "curriculum/ema", "curriculum/threshold"],
        }
    )


def _progress(config: Config) -> Charts:
    losses = ["total", "patch", "cls"] + ["ce", "kd"] * (config.student.num_classes > 0)
    charts = {"loss": [f"loss/{name}" for name in losses], "learning rate": ["^lr$"]}
    if config.evaluation.every_epochs:
        charts["accuracy of the student"] = ["evaluation/.*_knn"]
    if config.engine.clip or config.engine.zero_stage:  # else nobody takes the norm
        charts["norm of the gradients"] = ["update/grad_norm"]
    return _lines(charts)


def _speed(config: Config) -> Charts:
    charts = {
        "images per second": ["images_per_s"],
        "seconds per step by phase": [f"time/{phase}$".replace(".", r"\.") for phase in PHASES],
        "seconds per step": ["time/step$", "time/next_block_adds"],
        "TFLOPs per step": ["flops/teacher$", "flops/student$", "flops/match$"],
        "peak memory, GiB": ["memory/peak_gib"],
    }
    if config.telemetry.peak_tflops is not None or uses_gpus():
        charts["utilisation, where the peak is known"] = ["speed/mfu"]
    return _lines(charts)


# Of the tab "Text".
CARDS = {
    "curriculum": """
**curriculum/block** is the teacher block that is imitated, 1 the shallowest. **curriculum/cka** (or **cosine**) is how
alike student and target are on the step's own batch, 0 to 1; **curriculum/ema** is its running average after the
decision, so it falls to 0 at an advance. The block moves on when the average reaches **curriculum/threshold**, or after
`curriculum.max_epochs_per_block` epochs; at the last block the threshold decides nothing and its line ends. Blocks are
whole numbers: set Smoothing to 0 to see the steps. The charts have a score every `telemetry.every` steps;
`curriculum.jsonl` in the run folder has every one, and every decision with its reason.
""",
    "savings": """
Against a run that runs the whole teacher at every step, from the first step on, calibration included:
**flops/teacher_saved_fraction** of the teacher's FLOPs, **savings/flops** of all FLOPs, **savings/time_estimate** of
wall time. The last is an *estimate*: FLOPs not run, at the teacher's measured seconds per FLOP so far, as if no other
phase hid them. `summary.json` has it measured, every depth timed at the end of the run, and the least it can be.
**savings/efficiency_estimate** is time saved / FLOPs saved (the LEAP paper: 21 % / 25.1 % = 0.84); 1 means that every
FLOP not run has saved its share of the time.
""",
    "progress": """
**loss/total** is what is minimised: **loss/patch** (error of the projected patch tokens against those of the target
block) plus `objective.cls_weight` times **loss/cls**; with a classifier, `objective.feature_weight` times that, plus
**loss/ce** (cross-entropy with the labels) and, from the last block on, **loss/kd** (soft distillation). It *jumps at
every advance*: the target has changed. Losses on different blocks are not comparable; compare runs by accuracy: with
`evaluation.every_epochs` **evaluation/cls_knn**, **patch_knn** and **cls_patch_knn** are the student's by nearest
neighbours, by class token, mean patch and both, on `evaluation.quick_images` images of each set. With
`telemetry.pictures_every` the tab *Images* has **tokens/teacher_and_student**, which `docs/analysis.md` explains.
**update/grad_norm** is the norm of the gradients that led to the step's weights, before clipping; there is none at ZeRO
stage 0 without `engine.clip`, nor with AdamW in fp16. **update/loss_scale** is the factor that fp16 puts on the loss:
it halves with every update that is skipped because its gradients are not finite.
""",
    "speed": """
**images_per_s** counts wall time between two points, all ranks together. **time/...** are seconds per step on rank 0,
each second counted in one phase only, but for a teacher that works ahead, beside the student. On a GPU these are the
device's seconds, but for `data`, `decide` and `broadcast`, which are the host's and may pass while the device works.
`student.backward` holds the reduction of gradients over ranks; `match` holds loss, the head's gradients and the score.
**time/next_block_adds** is an *estimate* of what a step will take more after the next advance. **flops/...** are
TFLOPs per step over all ranks. **speed/mfu** is the share of the device's dense peak that these FLOPs come to; absent
where the peak is not known (`telemetry.peak_tflops` sets it).
""",
    "spectra": """
With `telemetry.spectra_every`, of four images: **spectra/student/...** are the student's tokens as they meet the head,
**spectra/target/...** those of the target block, so these *jump at an advance*. **dims_80** to **dims_99**: the fewest
directions that hold that share of the energy of one image's tokens about their mean. **effective_rank** counts
directions without a threshold. **sep_50**, **sep_90**: the share of a token's channel frequencies below which half, or
90 %, of its energy lies; 0.5 and 0.9 mean evenly spread. A student whose numbers stay below its target's cannot say all
that the target says. `docs/analysis.md` explains them; `tools/analyze.py` measures them over a whole set.
""",
}
