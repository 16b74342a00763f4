"""Sections of the report, in order. A section takes the run's files; it returns None if it does not apply to the run."""

from __future__ import annotations

from collections.abc import Callable

from finetune.report.elements import Html
from finetune.report.folder import RunFiles
from finetune.report.sections.evaluation import eval_section
from finetune.report.sections.exports import exports_section
from finetune.report.sections.health import health_section
from finetune.report.sections.loss import loss_section
from finetune.report.sections.merge import merge_section
from finetune.report.sections.origin import next_section, provenance_section, recipe_section
from finetune.report.sections.plan import plan_section
from finetune.report.sections.preflight import preflight_section
from finetune.report.sections.result import header, tiles
from finetune.report.sections.samples import samples_section
from finetune.report.sections.speed import optimizer_section, speed_section, time_section

SECTIONS: tuple[Callable[[RunFiles], Html | None], ...] = (
    header,
    tiles,
    loss_section,
    eval_section,
    health_section,
    samples_section,
    preflight_section,
    speed_section,
    plan_section,
    optimizer_section,
    time_section,
    merge_section,
    exports_section,
    provenance_section,
    recipe_section,
    next_section,
)
