from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="session")
def accelerator() -> Any:
    from accelerate import Accelerator

    return Accelerator(cpu=True)
