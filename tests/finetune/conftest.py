"""Runs of these tests are not planned, which takes a second or two each, but for those marked `planned`."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _unplanned(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "planned" not in request.keywords:
        monkeypatch.setattr("finetune.stages.planning.default_planner", None)
