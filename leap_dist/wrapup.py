"""The end of a run: export the student, evaluate it, and say what the curriculum saved."""

from __future__ import annotations

import logging
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor

from leap_dist.config import Config
from leap_dist.errors import UserError
from leap_dist.evaluation import KINDS, FeatureSet, HeldOut, Pooling, evaluate, protocol_of
from leap_dist.learner import Learner
from leap_dist.matching import linear_cka_of_features
from leap_dist.models import Student, export_average, export_student, load_student
from leap_dist.monitoring import table
from leap_dist.monitoring.company import Member, company, company_table
from leap_dist.monitoring.comparison import LEDGER, SUMMARY, VALIDATION
from leap_dist.report import REPORT, write_report
from leap_dist.runtime.distributed import World, gather_objects, on_main
from leap_dist.runtime.engine import micro_batch
from leap_dist.runtime.files import write_text
from leap_dist.runtime.integrity import named_files, read_sealed, write_sealed
from leap_dist.runtime.timing import CALIBRATION, PHASES
from leap_dist.teacher import Teacher
from leap_dist.trainer import Trainer

log = logging.getLogger(__name__)

TIMED_PASSES = 5
WHOSE = {"student": "student", "student_ema": "averaged student", "teacher": "teacher"}  # accuracies, in the table
TIMES = (
    "full_teacher_seconds_per_pass", "time_saved_seconds", "time_saved", "time_saved_at_least", "skip_efficiency",
    "teacher_skip_efficiency",
)  # fmt: skip


def wrap_up(config: Config, world: World, trainer: Trainer) -> dict[str, dict[str, Any]]:
    """Export, evaluate, write `summary.json` and the figure of each student, print the table. Collective; returns the
    summaries by student.

    What needs the whole teacher comes last: a run that ended early never had all of it in memory, and if it does not
    fit, students and figures are there. A run that is only judged anew keeps its summary until the new one is whole.
    """
    cohort = trainer.cohort
    cohort.end_bar()
    fit = {name: learner for name, learner in cohort.learners.items() if _has_weights(learner)}
    exported = {name: export_student(learner.engine, learner.config, world) for name, learner in fit.items()}
    averaged = {name: export_average(learner.engine, learner.config, world) for name, learner in fit.items()}
    summaries = {name: _progress_summary(trainer, learner) for name, learner in cohort.learners.items()}
    times = _earlier_times(config, world, trainer)
    if times is None:
        _write_all(summaries, config, world)
    trainer.loader.close()  # its workers' memory is free for those of the evaluation
    judge = None if config.data.val is None or not fit else Judge(config, world)
    if judge is not None:
        for name, learner in fit.items():
            own, named = learner.config, learner.config.student.model
            summaries[name] |= judge.student(load_student(exported[name], world.device, named), own, name)
            if averaged[name] is not None:
                summaries[name] |= judge.average(load_student(averaged[name], world.device, named), own)
        if times is None:
            _write_all(summaries, config, world)
    if times is None:
        times = _shared_times(trainer) if config.students else {"": _time_saved(config, world, trainer)}
    for name, found in (*times.items(), *(judge.teacher(trainer.teacher).items() if judge is not None else ())):
        summaries[name] |= found
    _write_all(summaries, config, world)
    _report(summaries, config, world, trainer)
    return summaries


def _has_weights(learner: Learner) -> bool:
    """Whether there are weights to export: it trained to the end, or was retired with good ones."""
    return learner.retired is None or learner.retired.weights_of is not None


def _write_all(summaries: dict[str, dict[str, Any]], config: Config, world: World) -> None:
    def write() -> None:
        for name, summary in summaries.items():
            folder = Path(config.output) / name
            write_sealed(folder / SUMMARY, summary | named_files(folder, LEDGER, VALIDATION))

    on_main(write, world)


def _report(summaries: dict[str, dict[str, Any]], config: Config, world: World, trainer: Trainer) -> None:
    """Figures, and on the terminal the table of the run's student, or one of all students and of their company."""
    for name, learner in trainer.cohort.learners.items():
        words = [_final_table(summaries[name], learner.config), *_remarks(summaries[name], learner.config)]
        learner.journal.finish(summaries[name], "\n".join(words))
        if not name:
            trainer.cohort.say("\n".join(words))
    if config.students:
        found = company({name: _member(learner) for name, learner in trainer.cohort.learners.items()}, summaries)
        text, folder = company_table(found), Path(config.output)
        on_main(lambda: (write_sealed(folder / "cohort.json", found), write_text(folder / "cohort.md", text)), world)
        trainer.cohort.say(f"{text}\nrun folder: {config.output}")
    if config.telemetry.report:
        on_main(lambda: _draw_pages(Path(config.output)), world)


def _draw_pages(output: Path) -> None:
    """`report.html` of the run and of each of its students. Results are written and said by now, and a page is none:
    whatever goes wrong with it is a line.
    """
    try:
        write_report(output)
    except Exception as error:
        reason = error if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        log.warning("no %s: %s; python tools/report.py %s makes it from the files there", REPORT, reason, output)


def _member(learner: Learner) -> Member:
    trajectory, flops = learner.progress.trajectory, learner.flops.teacher
    return Member(trajectory, learner.progress.step, learner.costs, flops, learner.config.data.global_batch)


def _earlier_times(config: Config, world: World, trainer: Trainer) -> Optional[dict[str, dict[str, Any]]]:
    """What the end of this very run said of its time, if this session made no step. Rank 0's for all; collective."""
    found: Optional[dict[str, dict[str, Any]]] = {}
    for name, learner in trainer.cohort.learners.items():
        earlier = _earlier_summary(Path(config.output) / name / SUMMARY) if world.is_main else {}
        same = trainer.first_step == trainer.progress.step and earlier.get("steps") == learner.progress.step
        if not same or "time_saved" not in earlier:
            found = None
            break
        found[name] = {key: earlier[key] for key in TIMES if key in earlier}
    return gather_objects(found, world)[0]


def _earlier_summary(path: Path) -> dict[str, Any]:
    """What is there of an earlier end; nothing of it is believed where it is damaged."""
    if not path.is_file():
        return {}
    earlier, fault = read_sealed(path)
    if fault:
        log.warning("%s %s: what it said is worked out anew", path, fault)
    return earlier


def _shared_times(trainer: Trainer) -> dict[str, dict[str, Any]]:
    """Seconds of a pass that several students shared say nothing about one of them."""
    nothing = dict.fromkeys(("time_saved_seconds", "time_saved", "time_saved_at_least"))
    return {name: dict(nothing) for name in trainer.cohort.learners}


def _progress_summary(trainer: Trainer, learner: Learner) -> dict[str, Any]:
    config, progress, costs = learner.config, learner.progress, learner.costs
    company = [name for name in trainer.cohort.learners if name]
    together: dict[str, Any] = {"shared_with": company} if company else {}
    if learner.retired is not None:
        together["retired"] = asdict(learner.retired)
    return together | {
        "steps": progress.step,
        "epochs": progress.step / trainer.steps_per_epoch,
        "final_block": progress.trajectory[-1][1],  # trained on; the end of the last epoch may have advanced once more
        "teacher_depth": trainer.teacher.spec.depth,
        "trajectory": progress.trajectory,
        "train_seconds": costs.seconds,
        "images_per_s": progress.step * config.data.global_batch / costs.seconds,
        "teacher_seconds": costs.phases.get("teacher", 0.0),
        "seconds_by_phase": costs.phases,
        "flops": costs.flops,
        "teacher_flops_saved": costs.teacher_saved,
        "flops_saved": costs.flops_saved,
        "time_saved_estimate": costs.time_saved_estimate,
    }


def _time_saved(config: Config, world: World, trainer: Trainer) -> dict[str, Any]:
    """Seconds the early exits saved on this rank, and how well they follow the FLOPs.

    skip_efficiency: share of wall time saved over share of all FLOPs saved, as LEAP reports it (21 % / 25.1 %).
    teacher_skip_efficiency: the same of the teacher alone. Absent where nothing was saved.
    time_saved_at_least: had the deeper passes hidden behind what the run did beside or before them (`_hiding_places`).
    None where the run was continued in another setting: passes of now are not comparable with its steps.
    Every block that was a target is timed now, in one sitting, where the placement puts it, and weighted with the steps
    the run spent on it: what the run itself took on a busy machine could not be compared with a full pass timed at
    another moment.
    """
    progress, costs, depth = trainer.progress, trainer.learner.costs, trainer.teacher.spec.depth
    if config.curriculum.mode == "all_layers":
        return {"time_saved_seconds": 0.0, "time_saved": 0.0, "time_saved_at_least": 0.0}
    if not gather_objects(costs.settings == [trainer.learner.accountant.setting], world)[0]:
        return {"time_saved_seconds": None, "time_saved": None, "time_saved_at_least": None}
    size = config.data.image_size
    images = torch.randn(micro_batch(config, world), 3, size, size, device=world.device)
    upto = _seconds_by_depth(trainer.teacher, images, {depth, *(block for _, block in progress.trajectory)})
    ends = [step for step, _ in progress.trajectory[1:]] + [progress.step]
    steps = [(end - first, block) for (first, block), end in zip(progress.trajectory, ends, strict=True)]
    passes_saved = sum(count * (1 - upto[block] / upto[depth]) for count, block in steps)  # in whole teachers
    whole = upto[depth] * config.engine.accumulation
    calibration = costs.phases.get(CALIBRATION, 0.0)
    saved = passes_saved * whole - calibration
    least = max(0.0, passes_saved * whole - _hiding_places(config, trainer)) - calibration
    time_saved = saved / (saved + costs.seconds)
    summary = {
        "full_teacher_seconds_per_pass": upto[depth],
        "time_saved_seconds": saved,
        "time_saved": time_saved,
        "time_saved_at_least": least / (least + costs.seconds),
    }
    if costs.flops_saved > 0:
        summary["skip_efficiency"] = time_saved / costs.flops_saved
        summary["teacher_skip_efficiency"] = saved / whole / (progress.step * costs.teacher_saved)
    return summary


def _hiding_places(config: Config, trainer: Trainer) -> float:
    """Seconds of the run in which a longer pass of the teacher might have gone unnoticed: waiting for data and, where
    the teacher works ahead on a stream of its own, every other phase.
    """
    alone = not (config.teacher.prefetch and trainer.timer.on_cuda)
    phases = ["data"] if alone else [phase for phase in PHASES if phase != "teacher"]
    return sum(trainer.learner.costs.phases.get(phase, 0.0) for phase in phases)


def _seconds_by_depth(teacher: Teacher, images: Tensor, blocks: set[int]) -> dict[int, float]:
    """Median seconds of a pass with each of `blocks` as the target. Collective, as the teacher is."""
    medians = {}
    for block in sorted(blocks, reverse=True):  # from the deepest, so that weights are let go rather than loaded
        teacher.retarget(block)
        times = []
        for _ in range(1 + TIMED_PASSES):
            begin = time.perf_counter()
            teacher.features(images)
            if images.is_cuda:
                torch.cuda.synchronize(images.device)
            times.append(time.perf_counter() - begin)
        medians[block] = statistics.median(times[1:])  # the first pass warms up
    return medians


class Judge:
    """Accuracies of student and teacher on the held-out images, and how alike their features are.

    Methods are collective; results are empty on all ranks but 0.
    """

    def __init__(self, config: Config, world: World) -> None:
        self._config, self._world = config, world
        self._protocol = protocol_of(config.evaluation)
        self._held_out = HeldOut(config, world, self._protocol.train_images, None, bicubic=self._protocol.bicubic)
        self._ours: dict[str, Optional[FeatureSet]] = {}

    def student(self, student: Student, config: Config, name: str = "") -> dict[str, float]:
        """Its kNN and linear probe on each kind of features, and top-1 of its own classifier, if it has one.

        config, name: the student's own.
        known_images, judged_images: of `data.train` and `data.val`; fewer than asked for where some cannot be read.
        judged_classes: that the latter are of.
        """
        pooling = Pooling(student)
        found = self._held_out.features(pooling)
        self._ours[name] = found and pooling.of("patch", found[1])
        results = self._accuracies("student", found, pooling)
        if found:
            results |= {"known_images": len(found[0].ids), "judged_images": len(found[1].ids)}
            results["judged_classes"] = len(found[1].labels.unique())
        if config.student.num_classes:
            results |= _top1(self._held_out.validation(lambda images: student.classify(student(images))))
        return results

    def average(self, student: Student, config: Config) -> dict[str, float]:
        """kNN, linear probe and top-1, as `student`, of the one with averaged weights."""
        pooling = Pooling(student)
        results = self._accuracies("student_ema", self._held_out.features(pooling), pooling)
        if config.student.num_classes:
            logits = self._held_out.validation(lambda images: student.classify(student(images)))
            results |= {f"student_ema_{key.removeprefix('student_')}": value for key, value in _top1(logits).items()}
        return results

    def teacher(self, teacher: Teacher) -> dict[str, dict[str, float]]:
        """By student, of the teacher at its last block: its kNN and linear probe, if `evaluation.teacher`; and
        `student_teacher_cka`, linear CKA of their mean patches on the held-out images, biased upward by about width /
        images.
        """
        teacher.retarget(teacher.spec.depth)

        pooling = Pooling(teacher.features)
        results: dict[str, float] = {}
        whose = f"block {teacher.spec.depth} of teacher.weights={self._config.teacher.weights}"
        if self._config.evaluation.teacher:
            found = self._held_out.features(pooling, whose)
            results, theirs = self._accuracies("teacher", found, pooling), found and found[1]
        else:
            theirs = self._held_out.validation(pooling, whose)
        theirs = theirs and pooling.of("patch", theirs)
        return {name: results | _likeness(ours, theirs) for name, ours in self._ours.items()}

    def _accuracies(
        self, who: str, found: Optional[tuple[FeatureSet, FeatureSet]], pooling: Pooling
    ) -> dict[str, float]:
        """By WHO_KIND_MEASURE, such as student_cls_knn_top5; the measures are those of `evaluate`."""
        results = {}
        for kind in pooling.chosen(self._protocol.features, who) if found else ():
            train, val = (pooling.of(kind, each) for each in found)
            options = {"device": self._world.device, "seed": self._config.seed}
            judged = evaluate(train, val, self._config.evaluation, **options)
            results |= {f"{who}_{kind}_{name}": value for name, value in judged.items()}
        return results


def _likeness(ours: Optional[FeatureSet], theirs: Optional[FeatureSet]) -> dict[str, float]:
    """Empty on all ranks but 0."""
    if not ours or not theirs:
        return {}
    return {"student_teacher_cka": linear_cka_of_features(ours.features, theirs.features).item()}


def _top1(logits: Optional[FeatureSet]) -> dict[str, float]:
    """Share of the held-out images that the student's own classifier gets right; empty on all ranks but 0."""
    if logits is None:
        return {}
    return {"student_top1": (logits.features.argmax(1) == logits.labels).double().mean().item()}


def _percent(value: Optional[float]) -> Optional[str]:
    return None if value is None else f"{value:.1%}"


def _judged(summary: dict[str, Any], of: str) -> Optional[str]:
    """kNN and probe of one kind of features in words; None where it was not judged."""
    if f"{of}_knn" not in summary:
        return None
    best = summary.get(f"{of}_probe_best_epoch")
    optimistic = "" if best is None else f" (best epoch {best:.1%}, chosen on the same images: optimistic)"
    return f"kNN {summary[f'{of}_knn']:.1%}, linear probe {summary[f'{of}_probe']:.1%}{optimistic}"


def _decimals(value: Optional[float]) -> Optional[str]:
    return None if value is None else f"{value:.2f}"


def _saved(share: float) -> str:
    return f"{share:.1%} of a run with the whole teacher at every step" if share > 0 else "nothing"


def _time_in_words(summary: dict[str, Any]) -> str:
    if "shared_with" in summary:
        return "not measured: students share their teacher's pass"
    if summary["time_saved"] is None:
        return "not measured: ranks, devices or the teacher's options changed during the run"
    if summary["time_saved"] <= 0:
        return "nothing"
    at_least = _percent(max(0.0, summary["time_saved_at_least"]))
    return f"{_percent(summary['time_saved'])} ({summary['time_saved_seconds']:.1f} s), at least {at_least}"


def _final_table(summary: dict[str, Any], config: Config) -> str:
    gained = summary["flops_saved"] > 0 and (summary["time_saved"] or 0) > 0
    return table(
        [
            ("student top-1", _percent(summary.get("student_top1"))),
            *(
                (f"{title}, {words}", _judged(summary, f"{who}_{kind}"))
                for who, title in WHOSE.items()
                for kind, words in KINDS.items()
            ),
            ("averaged student top-1", _percent(summary.get("student_ema_top1"))),
            ("CKA of student and teacher", _decimals(summary.get("student_teacher_cka"))),
            ("target block at the end", f"{summary['final_block']} of {summary['teacher_depth']}"),
            ("optimizer steps", f"{summary['steps']} in {summary['train_seconds']:.1f} s"),
            ("images/s", f"{summary['images_per_s']:.0f}"),
            ("teacher FLOPs saved", _saved(summary["teacher_flops_saved"])),
            ("all FLOPs saved", _saved(summary["flops_saved"])),
            ("time saved", _time_in_words(summary)),
            ("skip efficiency", _decimals(summary.get("skip_efficiency")) if gained else None),
            ("run folder", config.output),
        ]
    )


def _remarks(summary: dict[str, Any], config: Config) -> list[str]:
    """What the table does not say by itself, a line each."""
    curriculum, remarks = config.curriculum, []
    final, first = summary["final_block"], summary["trajectory"][0][1]
    end = summary["teacher_depth"] if curriculum.last_block_after else curriculum.block or summary["teacher_depth"]
    if curriculum.mode == "leap" and curriculum.replay is None:
        if final < end:
            remarks.append(
                f"The run ended in mid-climb, at block {final} of {end}: it needs more than epochs={config.epochs:g}, "
                "or set curriculum.last_block_after to the epoch from which it shall train on the last block."
            )
        elif first == end:
            remarks.append(
                f"The run started at block {first} of {end}, so there was nothing to climb; curriculum.start=1 starts "
                "at the shallowest."
            )
    if summary.get("judged_classes") == 1:
        remarks.append("All images of data.val are of one class, so the accuracies say nothing.")
    return remarks
