"""Runs of these tests are neither planned nor drawn, which takes a second or two each, but where they are marked so."""

from __future__ import annotations

import sys
from collections.abc import Iterator

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


@pytest.fixture(autouse=True)
def _no_patches_left() -> Iterator[None]:
    """No test leaves the fast step's attention in transformers' registers: the next one would not see that it is missing."""
    yield
    if (modeling := sys.modules.get("transformers.modeling_utils")) is not None:
        assert "finetune_packed" not in modeling.AttentionInterface._global_mapping
