"""The facts of a run in sentences, tiles and rows; what is absent is None or left out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Optional

from leap_dist.config import Config, option_fields
from leap_dist.config.options import MISSING
from leap_dist.monitoring.comparison import KINDS
from leap_dist.report.facts import Facts, Session
from leap_dist.runtime.run_lock import is_claimed
from leap_dist.runtime.timing import CALIBRATION, PHASES

NOTHING = "\N{EN DASH}"  # where a table has no figure
WHOSE = {"student": "student", "student_ema": "averaged student", "teacher": "teacher"}
MEASURES = {"probe": "linear probe", "probe_top5": "probe, top-5", "knn": "kNN", "knn_top5": "kNN, top-5"}
OTHERS = {"probe_lr": "probe's rate", "probe_best_epoch": "best epoch of the probe, optimistic"}
REASONS = {
    "start": "as configured",
    "calibrated": "highest score before training",
    "threshold": "threshold reached",
    "max_epochs": "its epochs were over",
    "snap": "jump to the last block",
    "replay": "as the followed run did",
}
PHASE_WORDS = {
    CALIBRATION: "before the first step: the teacher is read, the first target is found",
    "data": "waiting for the loader",
    "teacher": "the frozen teacher, up to the target block",
    "student.forward": "the student, forward",
    "match": "heads, loss, their gradients and the score",
    "communication": "sums of losses and score over ranks",
    "student.backward": "the student, backward, with the sum of gradients over ranks",
    "optimizer": "clipping and update",
    "decide": "the curriculum's decision",
    "broadcast": "exchange between ranks",
}
TOKENS = {"patch": "patch tokens", "cls": "the class token", "cls_patch": "both"}
PART_WORDS = {
    "teacher": "up to the target block", "student": "forward and backward", "match": "heads, loss and score",
}  # fmt: skip


class Tile(NamedTuple):
    """A figure that is read first. key: of summary.json, value: as it stands there, for who checks the page."""

    label: str
    text: str
    under: str = ""
    key: str = ""
    value: Optional[float] = None


class Status(NamedTuple):
    """How a run stands. mood: good, going or bad."""

    word: str
    mood: str
    sentence: str


class Advance(NamedTuple):
    """A line of the ledger that set the target. left: the block before; entered: None where the run ended first."""

    step: int
    epoch: Optional[int]
    left: Optional[int]
    entered: Optional[int]
    reason: str
    score: Optional[float]
    seconds: Optional[float]


class Share(NamedTuple):
    """A row with a bar. share: of the whole, 0 to 1."""

    label: str
    words: str
    text: str
    share: float
    quiet: bool = False


def percent(value: Optional[float]) -> str:
    """A share as it is read; a dash where there is none."""
    return NOTHING if value is None else f"{value:.1%}"


def moment(at: str) -> str:
    """A time of the history as it is read."""
    return at.replace("T", " ").replace("+00:00", " UTC")


def duration(seconds: float) -> str:
    """Seconds in the two units that matter."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def flops(value: float) -> str:
    """A count of FLOPs, with the prefix that leaves one to three digits."""
    for prefix, unit in ((1e21, "ZFLOP"), (1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP")):
        if value >= prefix:
            return f"{value / prefix:.3g} {unit}"
    return f"{value:.3g} FLOP"


def status(facts: Facts) -> Status:
    """How the run stands, by its summary, its history, and whether it is at work now."""
    retired, last = facts.summary.get("retired"), (facts.sessions[-1].last if facts.sessions else None) or {}
    how, step = last.get("event"), facts.steps
    of = f" of {facts.total_steps:,}" if facts.total_steps else ""
    if retired:
        kept = retired.get("weights_of")
        weights = "It left no good weights." if kept is None else f"Its weights of step {kept:,} were kept."
        return Status("failed", "bad", f"This student failed: {retired.get('why')}. {weights}")
    if facts.summary:
        return Status("finished", "good", "")
    if is_claimed(facts.home):
        return Status("running", "going", f"It is running, and was at step {step:,}{of} when this page was made.")
    if how == "stop":
        again = "The same command with resume=auto goes on from there."
        return Status("stopped", "going", f"A signal stopped it after {step:,}{of} steps. {again}")
    if how == "failure":
        return Status("failed", "bad", f"It failed after {step:,}{of} steps: {last.get('text')}")
    if how == "end":
        again = "The same command with resume=auto evaluates it."
        return Status("trained", "going", f"It trained to the end, but has no summary. {again}")
    return Status("not finished", "bad", f"It did not end by itself; its last known step is {step:,}{of}.")


def models(facts: Facts) -> str:
    """Who learns from whom, on what."""
    student, teacher, data = (facts.config.get(key) for key in ("student.model", "teacher.model", "data.train"))
    on = f" on {data}" if data else ""
    return f"{student} learns from {teacher}{on}" if student and teacher else ""


ENDS = {"end": "trained to the end", "stop": "stopped by a signal", "failure": "failed"}


def sessions(facts: Facts) -> list[tuple[Session, str]]:
    """Each with how it ended."""
    going = status(facts).word == "running"
    found = []
    for session in facts.sessions:
        if session.last is None:
            how = "still at it" if going and session is facts.sessions[-1] else "without a word: killed, perhaps"
        else:
            how = f"{ENDS.get(session.last['event'], session.last['event'])}, step {session.last.get('step') or 0:,}"
            how += f": {session.last['text']}" if session.last.get("text") else ""
        found.append((session, how))
    return found


def lead(facts: Facts) -> list[str]:
    """The result in a few sentences, accuracy first."""
    found = [*_accuracy_sentences(facts.summary), *_saving_sentences(facts)]
    state = status(facts)
    return [state.sentence, *found] if state.sentence else found


def _accuracy_sentences(summary: Mapping[str, Any]) -> Iterator[str]:
    """By the linear probe, or by kNN where there is none; the table has both."""
    measure = "probe" if any(f"student_{kind}_probe" in summary for kind in KINDS) else "knn"
    parts = []
    for kind in KINDS:
        ours, theirs = (summary.get(f"{who}_{kind}_{measure}") for who in ("student", "teacher"))
        if ours is not None:
            beside = "" if theirs is None else f" where its teacher has {percent(theirs)}"
            parts.append(f"{percent(ours)} on {TOKENS[kind]}{beside}")
    if parts:
        yield f"By {MEASURES[measure]} the student reaches {', '.join(parts)}."
    if "student_top1" in summary:
        yield f"Its own classifier gets {percent(summary['student_top1'])} of the held-out images right."


def _saving_sentences(facts: Facts) -> Iterator[str]:
    summary, climb = facts.summary, facts.climb
    saved, time = summary.get("teacher_flops_saved"), summary.get("time_saved")
    if saved is None and len(found := facts.points.get("flops/teacher_saved_fraction", ((), ()))[1]):
        saved = float(found[-1])
    if saved is not None and saved > 0:
        also = f" and {percent(time)} of the time" if time and time > 0 else ""
        whole = "against running the whole teacher at every step"
        yield f"It saved {percent(saved)} of the teacher's FLOPs{also}, {whole}."
    elif saved is not None:
        yield "It saved no FLOPs of the teacher."
    if climb is not None:
        first, last = int(climb.blocks.values[0]), int(climb.blocks.values[-1])
        where = f"stayed at block {last}" if first == last else f"climbed from block {first} to block {last}"
        seconds = summary.get("train_seconds")
        took = f", and the training took {duration(seconds)}" if seconds is not None else ""
        yield f"Its target {where} of the teacher's {climb.depth}{took}."


def tiles(facts: Facts) -> list[Tile]:
    """The figures that are read first."""
    summary, found = facts.summary, []
    for measure, name in (("probe", "linear probe"), ("knn", "kNN")):
        judged = {kind: summary[key] for kind in KINDS if (key := f"student_{kind}_{measure}") in summary}
        if judged:
            kind = max(judged, key=lambda each: judged[each])
            theirs = summary.get(f"teacher_{kind}_{measure}")
            under = KINDS[kind] if theirs is None else f"{KINDS[kind]}; teacher {percent(theirs)}"
            key = f"student_{kind}_{measure}"
            found.append(Tile(f"student, {name}", percent(judged[kind]), under, key, judged[kind]))
    for key, label in (("student_top1", "student, own classifier"), ("teacher_flops_saved", "teacher FLOPs saved")):
        if key in summary:
            found.append(Tile(label, percent(max(0.0, summary[key])), "", key, summary[key]))
    found += _time_tiles(summary)
    if facts.climb is not None:
        block, depth = int(facts.climb.blocks.values[-1]), facts.climb.depth
        found.append(Tile("target block", f"{block} of {depth}", "at the end", "final_block", block))
    seconds = summary.get("train_seconds")
    if seconds is not None:
        under = f"{summary.get('epochs', 0):.4g} epochs, {facts.steps:,} steps"
        found.append(Tile("training time", duration(seconds), under, "train_seconds", seconds))
    if "images_per_s" in summary:
        found.append(
            Tile("images per second", f"{summary['images_per_s']:,.0f}", "", "images_per_s", summary["images_per_s"])
        )
    return found


def _time_tiles(summary: Mapping[str, Any]) -> Iterator[Tile]:
    time, least = summary.get("time_saved"), summary.get("time_saved_at_least")
    if time is not None:
        under = "" if least is None else f"at least {percent(max(0.0, least))}"
        yield Tile("time saved", percent(max(0.0, time)), under, "time_saved", time)
    if summary.get("skip_efficiency") and (time or 0) > 0:
        value = summary["skip_efficiency"]
        yield Tile("skip efficiency", f"{value:.2f}", "time saved / FLOPs saved", "skip_efficiency", value)


def accuracies(facts: Facts) -> tuple[list[str], list[tuple[str, str, list[tuple[str, str, Optional[float]]]]]]:
    """Headings of the columns; rows (kind of features, whose, cells (key of the summary, text, value))."""
    summary = facts.summary
    measures = {
        measure: label
        for measure, label in (MEASURES | OTHERS).items()
        if any(f"{who}_{kind}_{measure}" in summary for who in WHOSE for kind in KINDS)
    }
    rows = []
    for kind, words in KINDS.items():
        for who, whose in WHOSE.items():
            keys = [f"{who}_{kind}_{measure}" for measure in measures]
            if any(key in summary for key in keys):
                cells = [(key, _cell(key, summary.get(key)), summary.get(key)) for key in keys]
                rows.append((words, whose, cells))
    return list(measures.values()), rows


def _cell(key: str, value: Optional[float]) -> str:
    return NOTHING if value is None else f"{value:g}" if key.endswith("_lr") else percent(value)


def advances(facts: Facts) -> list[Advance]:
    """The start and every advance, with its cause."""
    found = []
    for index, line in enumerate(facts.ledger):
        if line.get("decision") not in ("start", "advance"):
            continue
        start = line["decision"] == "start"
        left = None if start else line["block"]
        later = (facts.ledger[at] for at in range(index, len(facts.ledger)))
        after = (each.get("next_block") or each["block"] for each in later)
        entered = line["block"] if start else next((block for block in after if block != left), None)
        reason = str(line.get("reason"))
        found.append(
            Advance(
                line["step"], _number(line, "epoch"), left, entered, REASONS.get(reason, reason), _number(line, "ema"),
                line.get("seconds"),
            )
        )  # fmt: skip
    return found


def _number(line: Mapping[str, Any], key: str) -> Any:
    """What a line of the ledger says, if that is a number."""
    return line.get(key) if isinstance(line.get(key), (int, float)) else None


def seconds_by_phase(facts: Facts) -> list[Share]:
    """Seconds of each phase, of all sessions; then those of no phase."""
    found = facts.summary.get("seconds_by_phase") or _latest(facts, "total_seconds/")
    known = {phase: found[phase] for phase in (CALIBRATION, *PHASES) if found.get(phase)}
    total = facts.summary.get("train_seconds") or found.get("all") or sum(known.values())
    if not known or not total:
        return []
    whole = max(total, sum(known.values()))
    rows = [Share(phase, PHASE_WORDS[phase], duration(value), value / whole) for phase, value in known.items()]
    rest = total - sum(known.values())
    if rest > 0.005 * total:
        rows.append(Share("other", "mixup, telemetry and Python", duration(rest), rest / whole, quiet=True))
    return rows


def flops_by_part(facts: Facts) -> list[Share]:
    """FLOPs of each part, and those of the teacher that were not run."""
    found = facts.summary.get("flops") or {
        part: 1e15 * value for part, value in _latest(facts, "total_pflops/").items()
    }
    known = {part: found[part] for part in PART_WORDS if found.get(part)}
    if not known:
        return []
    saved = facts.summary.get("teacher_flops_saved")
    if saved is None:
        saved = _latest(facts, "flops/").get("teacher_saved_fraction", 0.0)
    skipped = known.get("teacher", 0.0) * saved / (1 - saved) if 0 < saved < 1 else 0.0
    whole = sum(known.values()) + skipped
    rows = [Share(part, PART_WORDS[part], flops(value), value / whole) for part, value in known.items()]
    if skipped:
        rows.append(Share("not run", "blocks of the teacher that were skipped", flops(skipped), skipped / whole, True))
    return rows


def _latest(facts: Facts, prefix: str) -> dict[str, float]:
    return {
        tag.removeprefix(prefix): float(series.values[-1])
        for tag, series in facts.points.items()
        if tag.startswith(prefix) and len(series.values)
    }


def options(facts: Facts) -> list[tuple[str, str, str, str, bool]]:
    """Rows of the config: key, value, default, what it means, and whether it differs from the default."""
    known, rows = option_fields(Config), []
    for key, value in facts.config.items():
        option = known.get(key)
        default = "" if option is None else _shown(_default(option))
        differs = option is None or _shown(value) != default
        doc = "" if option is None else str(option.metadata.get("doc", ""))
        rows.append((key, _shown(value), default, doc, differs))
    return rows


def _default(option: dataclasses.Field) -> Any:
    if option.default_factory is not dataclasses.MISSING:
        return option.default_factory()
    return "required" if option.default == MISSING else option.default


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_shown, value))}]"
    if isinstance(value, bool) or value is None:
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def differences(runs: list[Facts]) -> list[tuple[str, list[tuple[str, bool]]]]:
    """Options in which runs differ: key, and for each run its value and whether it is another than the first's."""
    rows = []
    for key in dict.fromkeys(key for facts in runs for key in facts.config):
        values = [_shown(facts.config[key]) if key in facts.config else NOTHING for facts in runs]
        if key not in ("output", "resume") and len(set(values)) > 1:
            rows.append((key, [(value, value != values[0]) for value in values]))
    return rows
