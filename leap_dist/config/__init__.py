"""Configuration: dataclasses merged by OmegaConf, checked before anything is built.

Imports no torch, so a mistyped key is reported in well under a second.
"""

from leap_dist.config.checks import problems
from leap_dist.config.demo import load_demo
from leap_dist.config.loading import (
    abridged,
    describe,
    differences,
    flat,
    hyperparameters,
    load,
    load_without_files,
    merge,
    option_fields,
    tables,
    to_yaml,
)
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
    StudentConfig,
    TeacherConfig,
    TelemetryConfig,
    is_remote,
    matching_head,
    option,
)
from leap_dist.config.yaml_files import read_yaml

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
    "merge",
    "option",
    "option_fields",
    "problems",
    "read_yaml",
    "tables",
    "to_yaml",
]
