"""What the tokens of a vision transformer look like: how many dimensions an image fills, how its subspace rotates from
image to image, how a token's energy is spread over channels, and which layers of two models agree.

Definitions from "From Per-Image Low-Rank to Encoding Mismatch" (arXiv 2511.15572); docs/analysis.md explains them.
"""

from __future__ import annotations

from leap_dist.analysis.blocks import BlockReport, report_blocks, report_table, write_report
from leap_dist.analysis.results import Analysis, last_block_table, write_tables
from leap_dist.analysis.subjects import (
    Preprocessing,
    Subject,
    exported_at,
    exported_subject,
    native_image_size,
    timm_subject,
)
from leap_dist.analysis.summary import token_summary
from leap_dist.analysis.survey import SurveyOptions, survey

__all__ = [
    "Analysis",
    "BlockReport",
    "Preprocessing",
    "Subject",
    "SurveyOptions",
    "exported_at",
    "exported_subject",
    "last_block_table",
    "native_image_size",
    "report_blocks",
    "report_table",
    "survey",
    "timm_subject",
    "token_summary",
    "write_report",
    "write_tables",
]
