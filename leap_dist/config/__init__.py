"""Configuration: dataclasses merged by OmegaConf, checked before anything is built.

Imports no torch, so a mistyped key is reported in well under a second.
"""

from importlib import import_module
from typing import Any

from leap_dist.config.checks import problems
from leap_dist.config.options import (
    DEMO_TEACHER,
    DIGITS,
    HUB,
    NO_WEIGHTS,
    RANDOM,
    CheckpointConfig,
    Config,
    CurriculumConfig,
    DataConfig,
    EngineConfig,
    EvaluationConfig,
    ObjectiveConfig,
    OptimConfig,
    Source,
    StudentConfig,
    TeacherConfig,
    TelemetryConfig,
    is_remote,
    matching_head,
    option,
)

__all__ = [
    "DEMO_TEACHER",
    "DIGITS",
    "HUB",
    "NO_WEIGHTS",
    "RANDOM",
    "CheckpointConfig",
    "Config",
    "CurriculumConfig",
    "DataConfig",
    "EngineConfig",
    "EvaluationConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "Source",
    "StudentConfig",
    "TeacherConfig",
    "TelemetryConfig",
    "abridged",
    "describe",
    "differences",
    "flat",
    "hyperparameters",
    "is_remote",
    "load",
    "load_demo",
    "load_without_files",
    "matching_head",
    "members",
    "merge",
    "option",
    "option_fields",
    "problems",
    "read_yaml",
    "tables",
    "to_yaml",
]

# Modules of what needs OmegaConf: who only loads a student needs torch, timm and safetensors.
_READING = {
    "load_demo": "demo",
    "read_yaml": "yaml_files",
    **dict.fromkeys(
        (
            "abridged", "describe", "differences", "flat", "hyperparameters", "load", "load_without_files", "members",
            "merge", "option_fields", "tables", "to_yaml",
        ),
        "loading",
    ),
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """The names that read or write a config; their module is imported when the first of them is asked for."""
    if name not in _READING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_READING[name]}"), name)
