"""From a YAML and the command line to a checked config, and back to text."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional, TypeVar

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from leap_dist.config.checks import problems
from leap_dist.config.cohort import check_names, checked_students
from leap_dist.config.options import Config
from leap_dist.config.paths import no_file_to_read, short
from leap_dist.config.ranges import RANGES
from leap_dist.config.yaml_files import read_yaml
from leap_dist.errors import UserError

_T = TypeVar("_T")

# What may change between the two halves of one run: where things are and how they are watched, not what is computed.
OPERATIONAL = (
    "output", "resume", "checkpoint.", "telemetry.", "evaluation.", "data.train", "data.val", "data.cache",
    "data.cache_limit", "data.predownload", "data.workers", "data.timeout_s", "data.validate_hash",
    "data.max_bad_fraction", "teacher.weights", "student.weights",
    "teacher.placement", "teacher.stages", "teacher.microbatches", "teacher.rebalance", "teacher.memory_budget",
    "engine.silence_s",
    "engine.accumulation", "objective.impl", "student.compile", "teacher.compile",
)  # fmt: skip

SOURCES = "data.train"  # text, or a mapping
ARGUMENTS = ("teacher.kwargs", "student.kwargs")  # mappings in which null takes an argument away

MISFITS = (OmegaConfBaseException, TypeError)  # the latter for a list in a mapping's place

# Stand-ins for the files that a YAML names.
WITHOUT_FILES = (
    "data.train=digits", "data.val=null", "evaluation.every_epochs=0", "teacher.weights=random",
    "student.weights=none", "resume=none", "curriculum.replay=null",
)  # fmt: skip


def load(path: Optional[Path], overrides: list[str], check: bool = True) -> Config:
    """Merge defaults, the YAML at `path` and ``section.key=value`` overrides, in that order, and check the result.

    A YAML may build on another: ``base: other.yaml``, relative to itself.
    check=False skips what depends on this moment's files, to read the config of an earlier run.

    Raises:
        UserError: unknown key, wrong type, missing value or impossible combination; one line that names it.
    """
    resolved = merge(Config, path, overrides)
    students = members(resolved)  # also unchecked: their keys and types do not depend on files
    for problem in _every_problem(resolved, students) if check else []:
        raise UserError(problem)
    return resolved


def members(config: Config) -> dict[str, Config]:
    """The config of every student by its name, each whole as if it were a run's alone; `output` is its own folder.

    Without `students` that is the run's own config, with the name "".

    Raises:
        UserError: an unknown key or a wrong type in `students`; one line that names student and key.
    """
    if not config.students:
        return {"": config}
    check_names(config.students, "all layers together")
    alone = replace(config, students={})
    return {
        name: replace(_overlaid(alone, own, f"students.{name}"), output=str(Path(config.output) / name))
        for name, own in config.students.items()
    }


def _every_problem(config: Config, students: dict[str, Config]) -> list[str]:
    """What is wrong with any of the students, and with them in company; what all have from the run bears no name."""
    found = {name: problems(own) for name, own in students.items()}
    shared = set(problems(replace(config, students={}))).intersection(*found.values())
    own = [
        f"students.{name}: {line}" if line not in shared else line for name, lines in found.items() for line in lines
    ]
    classes = {config.teacher_classes for config in students.values()} - {0}
    if len(classes) > 1:
        own.append(f"students: soft distillation needs the teacher's logits of one number of classes, not {classes}")
    return own


def _overlaid(config: Config, own: dict[str, Any], source: str) -> Config:
    """The config with other values of some options, given by dotted keys."""
    known = option_fields(Config)
    leaves = list(own.items())
    return _resolved(_merged(OmegaConf.structured(config), leaves, source, known, own=True), known)


def load_without_files(path: Optional[Path], *overrides: str) -> Config:
    """`load` for what needs a run's shapes and not its files: the YAML may come from another machine.

    `overrides` win over the stand-ins. UserError as `load`.
    """
    return load(path, [*WITHOUT_FILES, *overrides])


def merge(schema: type[_T], path: Optional[Path], overrides: list[str]) -> _T:
    """What `load` does for any dataclass of options, but for the checks. UserError likewise."""
    config, known = OmegaConf.structured(schema), option_fields(schema)
    for source, layer in (*_yaml_layers(path), *_override_layers(overrides, known)):
        own = source in ("command line", str(path))
        leaves = [
            (key, checked_students(value, source, known) if key == "students" else value)
            for key, value in _leaves(layer, known)
        ]
        config = _merged(config, leaves, source, known, own)
    return _resolved(config, known)


def _merged(
    config: Any, leaves: list[tuple[str, Any]], source: str, known: dict[str, dataclasses.Field], own: bool
) -> Any:
    """A copy with other values, all of them options that there are. own: see `_require_known`."""
    for key, value in leaves:
        _require_known(key, source, list(known), own)
        if known[key].type == "Any" and not _is_source(value):
            what = f"{key}={value!r:.200}" if own else key
            raise UserError(f"{what} ({source}): expected {_expected(known[key])}; put names in quotes")
        if _is_text(known[key]) and isinstance(value, (bool, int, float)):
            # What YAML takes for a number is not what was typed: 2026_07_01 would be 20260701.
            what = f"{key}={value!r:.200}" if own else key
            raise UserError(f"{what} ({source}): expected {_expected(known[key])}; put it in quotes")
    try:
        return _with(config, leaves)
    except MISFITS:
        for key, value in leaves:  # one by one, to name the first that does not fit
            try:
                config = _with(config, [(key, value)])
            except MISFITS:
                what = f"{key}={value!r:.200}" if own else key
                raise UserError(f"{what} ({source}): expected {_expected(known[key])}") from None
    return config


def _resolved(config: Any, known: dict[str, dataclasses.Field]) -> Any:
    """The dataclass that a merged config stands for; UserError where a required option is missing.

    An argument of a model that is null is none: so a layer takes away what one before it has given.
    """
    try:
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise UserError(f"{missing[0]} is required: {known[missing[0]].metadata['doc']}")
        resolved = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere
        raise UserError(str(error).splitlines()[0]) from None
    for section, name in (key.split(".") for key in ARGUMENTS if key in known):
        side = getattr(resolved, section)
        given = {argument: value for argument, value in getattr(side, name).items() if value is not None}
        resolved = replace(resolved, **{section: replace(side, **{name: given})})
    return resolved


def _with(config: Any, leaves: list[tuple[str, Any]]) -> Any:
    """A copy with other values. Half a millisecond for each option there is, so better once for all leaves."""
    # A mapping of sources is to replace an earlier one, which a text does, rather than to be added to it.
    emptied = [_nested(key, "") for key, value in leaves if key == SOURCES and isinstance(value, dict)]
    return OmegaConf.merge(config, *emptied, *(_nested(key, value) for key, value in leaves))


def _is_source(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(value) and all(type(name) is str and type(part) in (int, float) for name, part in value.items())
    return isinstance(value, str)


def _is_text(option: dataclasses.Field) -> bool:
    return option.type in ("str", "Optional[str]")


def _yaml_layers(path: Optional[Path], seen: tuple[Path, ...] = ()) -> list[tuple[str, Any]]:
    """The YAML at `path`, after the one its `base` names (relative to it), if any."""
    if path is None:
        return []
    if fault := no_file_to_read(str(path)):
        raise UserError(f"--config {short(str(path))}: {fault}")
    layer = read_yaml(path, f"--config {path}")
    if path.resolve() in seen:
        raise UserError(f"--config {path}: is its own base")
    if not isinstance(layer, dict):
        raise UserError(f"--config {path}: expected a mapping of sections")
    base = layer.pop("base", None)
    if base is None:
        return [(str(path), layer)]
    if Path(str(base)).suffix not in (".yaml", ".yml"):
        raise UserError(f"--config {path}: base: the name of a .yaml file is expected")
    return [*_yaml_layers(path.parent / str(base), (*seen, path.resolve())), (str(path), layer)]


def _override_layers(overrides: list[str], known: dict[str, dataclasses.Field]) -> list[tuple[str, Any]]:
    """Values as YAML reads them, but texts as they were typed."""
    layers: list[tuple[str, Any]] = []
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"{text!r}: expected section.key=value")
        if any("\ud800" <= character <= "\udfff" for character in text):  # bytes that Python could not decode
            raise UserError(f"{text!a}: not UTF-8, which a config is written in; name a link to it that is")
        if (key in known and _is_text(known[key]) and value != "null") or (key == SOURCES and value[:1] != "{"):
            layers.append(("command line", _nested(key, value)))
            continue
        try:
            layers.append(("command line", OmegaConf.to_container(OmegaConf.from_dotlist([text]))))
        except Exception as error:
            fault = getattr(error, "problem", None) or str(error).splitlines()[0]
            raise UserError(f"{text!r}: {fault}") from None
    return layers


def option_fields(owner: type = Config, prefix: str = "") -> dict[str, dataclasses.Field]:
    """Every leaf option by its dotted key."""
    found: dict[str, dataclasses.Field] = {}
    for option in dataclasses.fields(owner):
        section = option.default_factory if "doc" not in option.metadata else None
        if section is not None:
            found |= option_fields(section, f"{prefix}{option.name}.")
        else:
            found[prefix + option.name] = option
    return found


def _leaves(layer: Any, known: Collection[str], prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted key, value) of a nested mapping, stopping at options that are mappings themselves."""
    leaves = []
    for name, value in layer.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key not in known:
            leaves += _leaves(value, known, f"{key}.") if value else [(key, value)]
        else:
            leaves.append((key, value))
    return leaves


def _nested(key: str, value: Any) -> dict[str, Any]:
    """``a.b``, v -> ``{a: {b: v}}``."""
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def _require_known(key: str, source: str, known: list[str], own: bool) -> None:
    """UserError unless there is such an option. own: the source is the user's own; a base may be any file, unquoted."""
    if key in known:
        return
    if not own and not difflib.get_close_matches(key[:100], known, 1, 0.8):
        raise UserError(f"{source}: the base of a config; it has a key that is no option")
    sections = {name.split(".")[0] for name in known if "." in name}
    if key in sections:
        raise UserError(f"{key} ({source}): is a section; set one of its keys, e.g. {_first_of(key, known)}")
    raise UserError(f"{key} ({source}): unknown key; did you mean {_nearest(key, known)}?")


def _first_of(section: str, known: list[str]) -> str:
    return next(name for name in known if name.startswith(f"{section}."))


def _nearest(key: str, known: list[str]) -> str:
    by_name = {name.split(".")[-1]: name for name in known}
    close = difflib.get_close_matches(key, known, 1, 0.6) or [
        by_name[name] for name in difflib.get_close_matches(key.split(".")[-1], by_name, 1, 0.6)
    ]
    return close[0] if close else difflib.get_close_matches(key, known, 1, 0.0)[0]


def _expected(option: dataclasses.Field) -> str:
    """What a value of this option must be, in words, from its annotation."""
    return " ".join(filter(None, _kind(option)))


def _kind(option: dataclasses.Field) -> tuple[str, str]:
    """The words of `_expected`, its "or null" apart; "" where null is not allowed."""
    words = {"str": "text", "int": "a whole number", "float": "a number", "bool": "true or false"}
    words |= {"tuple[int, int]": "two whole numbers", "tuple[float, float]": "two numbers"}
    words |= {"list[float]": "a list of numbers"}
    words |= {
        "tuple[float, float, float]": "three numbers",
        "dict[str, Any]": "a mapping",
        "Any": "text, or a mapping of one text or more to numbers",
    }
    annotation = str(option.type)
    optional = annotation.startswith("Optional[")
    annotation = annotation.removeprefix("Optional[").removesuffix("]") if optional else annotation
    several = annotation.startswith("list[Literal")
    annotation = annotation.removeprefix("list[").removesuffix("]") if several else annotation
    if annotation.startswith("Literal"):
        names = annotation.removeprefix("Literal[").removesuffix("]").replace('"', "")
        text = f"a list of {names}" if several else f"one of {names}"
    else:
        text = words.get(annotation, annotation)
    return text, "or null" if optional else ""


def to_yaml(config: Any) -> str:
    """A resolved config, of any schema, as YAML that `merge` takes back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def flat(config: Any) -> dict[str, Any]:
    """Dotted key -> value, of any schema."""
    values = {}
    for key in option_fields(type(config)):
        node: Any = config
        for part in key.split("."):
            node = getattr(node, part)
        values[key] = node
    return values


def hyperparameters(config: Config) -> dict[str, Any]:
    """Dotted key -> value of what the numbers of a run follow from, without where things are and how it is watched."""
    return {key: value for key, value in flat(config).items() if not key.startswith(OPERATIONAL)}


def differences(old: Any, new: Any, also: tuple[str, ...] = ()) -> list[str]:
    """Keys whose change would make the continued run another run, as ``key: old -> new``.

    also: beginnings of operational keys that are to count too; one that ends in a colon is the whole key.
    """
    before, after = _told_apart(old), _told_apart(new)
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in before | after
        if before.get(key) != after.get(key) and (f"{key}:".startswith(also) or not key.startswith(OPERATIONAL))
    ]


def _told_apart(config: Any) -> dict[str, Any]:
    """`flat`, with a key for every option of every student."""
    values = flat(config)
    students = values.pop("students", None) or {}
    own = {f"students.{name}.{key}": value for name, keys in students.items() for key, value in keys.items()}
    return values | {f"students.{name}": "there" for name in students} | own


def abridged(changed: list[str]) -> str:
    """The first three of `differences`, and how many more there are."""
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return "; ".join(changed[:3]) + more


def describe(schema: type = Config) -> str:
    """All options with their defaults, by section: the body of ``--help``."""
    lines, section = [], None
    for key, option in option_fields(schema).items():
        owner = key.rpartition(".")[0]
        if owner != section:
            section = owner
            lines.append(f"\n{section or 'run'}:")
        lines.append(f"  {key + '=' + _shown_default(option):<44} {option.metadata['doc']}")
    return "\n".join(lines)


def tables(schema: type = Config) -> str:
    """All options as Markdown, a table a section: what `describe` says, and what a value must be."""
    lines, section = [], None
    for key, option in option_fields(schema).items():
        owner = key.rpartition(".")[0]
        if owner != section:
            section = owner
            lines += [
                f"\n## {section or 'The run'}\n",
                "| option | default | must be | what it does |",
                "|---|---|---|---|",
            ]
        text, null = _kind(option)
        allowed = ", ".join(filter(None, [text, RANGES[key].words if key in RANGES else "", null]))
        cells = (f"`{key}`", f"`{_shown_default(option)}`", allowed, option.metadata["doc"])
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _shown_default(option: dataclasses.Field) -> str:
    default = option.default_factory() if option.default is dataclasses.MISSING else option.default
    if default == MISSING:
        return "(required)"
    return default if isinstance(default, str) else json.dumps(default)  # as a YAML has it
