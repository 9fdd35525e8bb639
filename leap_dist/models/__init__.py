"""What runs on images: a timm ViT as stem, blocks and norm, the student, their FLOPs, and the student as a file.

The frozen teacher's weights and where they live are in teacher/; losses are in matching/.
"""

from __future__ import annotations

from leap_dist.models.backbone import DTYPES, Backbone, TeacherSpec, build_model, outline, split
from leap_dist.models.export import current_state, empty_twin, export_average, export_student, load_student
from leap_dist.models.features import Features, on_grid
from leap_dist.models.flops import StepFlops, TeacherFlops, step_flops, teacher_costs, teacher_flops
from leap_dist.models.student import Student, build_student
from leap_dist.models.warm_start import warm_start

__all__ = [
    "DTYPES",
    "Backbone",
    "Features",
    "StepFlops",
    "Student",
    "TeacherFlops",
    "TeacherSpec",
    "build_model",
    "build_student",
    "current_state",
    "empty_twin",
    "export_average",
    "export_student",
    "load_student",
    "on_grid",
    "outline",
    "split",
    "step_flops",
    "teacher_costs",
    "teacher_flops",
    "warm_start",
]
