"""Formatting of figures for readers."""

from __future__ import annotations

import math
from typing import Any

import pytest

from finetune import units
from finetune.units import GIB, TIGHT


def test_bytes_are_shown_with_binary_units() -> None:
    assert [units.human_bytes(n) for n in (5, 1536, 3 << 30, 5 << 40)] == ["5 B", "1.5 KiB", "3.0 GiB", "5.00 TiB"]
    assert [units.gib(n) for n in (0, GIB // 2, int(6.94 * GIB))] == ["0.00", "0.50", "6.9"]
    assert [units.byte_scale(n)[1] for n in (GIB - 1, GIB)] == ["MiB", "GiB"]


def test_measured_times_are_exact_and_estimates_are_rounded() -> None:
    assert [units.clock(s) for s in (9.6, 75, 3675)] == ["0:10", "1:15", "1:01:15"]
    assert [units.duration(s) for s in (0.04, 9.96, 59.96, 192.3, 3600, 7384)] == [
        text.replace(" ", TIGHT) for text in ("0.0 s", "10 s", "1 min 00 s", "3 min 12 s", "1 h 00 min", "2 h 03 min")
    ]
    assert [units.rough_duration(s) for s in (None, 0, 0.3, 4.2, 45, 59.6, 720, 3590, 7800, 302_400, 171 * 86400)] == [
        "–", "0 s", "under 1 s", "4.2 s", "45 s", "1 min", "12 min", "1 h 00 min", "2 h 10 min", "3.5 days", "171 days",
    ]  # fmt: skip
    assert [units.step_time(s) for s in (0.4123, 3.214, 45, 720)] == ["412 ms", "3.21 s", "45.0 s", "12 min"]


def test_counts_are_grouped_or_shortened() -> None:
    assert [units.many(n) for n in (7, 9999, 10_000, 999_999, 134_515_008, 8_030_261_248, 2e13)] == [
        "7", "9,999", "10.0 k", "1,000.0 k", "134.5 M", "8.03 B", "20.0 T",
    ]  # fmt: skip
    assert [units.amount(n) for n in (12_345, 98_765_432)] == ["12345", "0.10G"]
    assert [units.plural(n, "step") for n in (1, 2000)] == ["1 step", "2,000 steps"]


@pytest.mark.parametrize("value", [None, True, "nan", "3", math.nan, math.inf, [1]])
def test_values_that_are_not_finite_numbers_are_shown_as_a_dash(value: Any) -> None:
    assert units.finite_number(value) is None
    assert units.short(value) == units.with_error(value, value, 2) == units.size(value) == units.many(value) == units.DASH


def test_measured_values_have_the_digits_of_their_error() -> None:
    assert [units.short(n) for n in (1.234, 12.34, 1234.5, 3.1e9)] == ["1.23", "12.3", "1,234", "3.10e+09"]
    assert units.with_error(-0.763, 0.0493, units.decimals(0.0493)).replace(TIGHT, " ") == "−0.76 ± 0.05"
    assert [units.significant(n, 4) for n in (0.29557, 12.3406, 1928.4)] == ["0.2956", "12.34", "1,928"]
    assert (units.number(None), units.number(1.23456), units.number(math.nan)) == ("–", "1.2346", "nan")
