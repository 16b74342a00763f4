"""Runs of these tests are neither planned nor drawn, which takes a second or two each, but where they are marked so."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _unplanned(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "planned" not in request.keywords:
        monkeypatch.setattr("finetune.stages.planning.default_planner", None)


@pytest.fixture(autouse=True)
def _undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A report is written with empty figures."""
    if "drawn" not in request.keywords:
        monkeypatch.setattr("finetune.report.plots.draw", lambda *values, **options: "<svg></svg>")
