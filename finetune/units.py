"""Formatters for bytes, counts, times and measured values, for the terminal and the report."""

from __future__ import annotations

import math
from typing import Any

MIB, GIB = 1 << 20, 1 << 30
MINUS, DASH, TIGHT = "−", "–", "\N{NO-BREAK SPACE}"


# ------------------------------------------------------------------------------------------------------------------ bytes


def human_bytes(count: float) -> str:
    """1536 → '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def size(value: Any) -> str:
    """`human_bytes` of a recorded value; – if unknown."""
    known = finite_number(value)
    return DASH if known is None else human_bytes(known)


def gib(count: float) -> str:
    """Bytes in GiB: 6.9, below one 0.53, of a few MiB 0.004."""
    return f"{count / GIB:.{1 if count >= GIB else 2 if count >= GIB / 100 or not count else 3}f}"


def byte_scale(largest: float) -> tuple[int, str]:
    """(bytes of the unit, its name) for values up to `largest`: GiB, or MiB below one GiB."""
    return (GIB, "GiB") if largest >= GIB else (MIB, "MiB")


# ------------------------------------------------------------------------------------------------------------------- time


def clock(seconds: float) -> str:
    """75 → '1:15'."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"


def duration(value: Any) -> str:
    """A measured time, to the second: 192 → '3 min 12 s'; – if unknown."""
    seconds = finite_number(value)
    if seconds is None:
        return DASH
    if seconds < 59.95:
        parts = [f"{seconds:.1f}" if seconds < 9.95 else f"{seconds:.0f}", "s"]
    else:
        minutes, rest = divmod(round(seconds), 60)
        hours = [f"{minutes // 60}", "h", f"{minutes % 60:02d}", "min"]
        parts = hours if minutes >= 60 else [f"{minutes}", "min", f"{rest:02d}", "s"]
    return TIGHT.join(parts)


def rough_duration(seconds: float | None) -> str:
    """An estimated time: 45 s · 12 min · 2 h 10 min · 3.5 days · 171 days; – if unknown."""
    if seconds is None:
        return DASH
    if seconds < 59.5:
        return f"{seconds:.0f} s" if seconds >= 9.5 or seconds == 0 else f"{seconds:.1f} s" if seconds >= 0.95 else "under 1 s"
    if seconds < 3570:
        return f"{round(seconds / 60)} min"
    if seconds < 48 * 3600:
        minutes = round(seconds / 60)
        return f"{minutes // 60} h {minutes % 60:02d} min"
    days = seconds / 86400
    return f"{days:.1f} days" if days < 9.95 else f"{days:,.0f} days"


def step_time(seconds: float) -> str:
    """The estimated time of one step: 412 ms · 3.21 s · 45.0 s · 12 min."""
    if seconds < 0.995:
        return f"{1000 * seconds:.3g} ms"
    return f"{seconds:.2f} s" if seconds < 9.95 else f"{seconds:,.1f} s" if seconds < 100 else rough_duration(seconds)


def moment(value: Any) -> str | None:
    """'2026-01-05T09:12:44+00:00' → '2026-01-05 09:12:44 UTC'."""
    return str(value).replace("T", " ").replace("+00:00", " UTC") if value else None


# ----------------------------------------------------------------------------------------------------------------- counts


def count(value: Any) -> str:
    """12345 → '12,345'; – if unknown."""
    known = finite_number(value)
    return DASH if known is None else f"{known:,.0f}"


def many(value: Any) -> str:
    """134515008 → '134.5 M'; below ten thousand the whole number."""
    known = finite_number(value)
    if known is None:
        return DASH
    for scale, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if known >= max(scale, 1e4):
            return f"{fixed(known / scale, 2 if known < 10 * scale else 1)} {unit}"
    return count(known)


def amount(value: int) -> str:
    """A count in a progress bar; large ones (bytes of a download) in GB."""
    return str(value) if value < 10_000_000 else f"{value / 1e9:.2f}G"


def plural(value: Any, word: str) -> str:
    """'1 step', '2 steps'."""
    return f"{count(value)} {word}{'' if value == 1 else 's'}"


# -------------------------------------------------------------------------------------------------------- measured values


def finite_number(value: Any) -> float | None:
    """`value` if it is a finite number, else None (run folders store NaN and infinities as strings)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def number(value: float | None, digits: int = 4) -> str:
    """A value for the terminal, NaN included; – for None (the standard error of one row)."""
    return DASH if value is None else f"{value:.{digits}f}"


def fixed(value: Any, digits: int, *, sign: bool = False) -> str:
    """A recorded value for the report, with separators and a minus sign; – if unknown or not finite."""
    known = finite_number(value)
    if known is None:
        return DASH
    return f"{known:{'+' if sign else ''},.{digits}f}".replace("-", MINUS)


def decimals(*errors: float | None) -> int:
    """Decimals that the standard errors justify: 2 to 4."""
    known = [error for error in errors if error]
    return min(4, max(2, -math.floor(math.log10(min(known))))) if known else 3


def with_error(value: Any, error: Any, digits: int, *, sign: bool = False) -> str:
    """'2.45 ± 0.06'; without ± if the error is unknown."""
    spread = f"{TIGHT}±{TIGHT}{fixed(error, digits)}" if finite_number(error) is not None else ""
    return fixed(value, digits, sign=sign) + spread


def digits_of(value: float | None) -> int:
    """Decimals that leave about three significant digits."""
    return 0 if value is None or abs(value) >= 100 else 1 if abs(value) >= 10 else 2


def short(value: Any) -> str:
    """Three significant digits: 24.8 · 1,234 · 3.1e+09."""
    known = finite_number(value)
    if known is None:
        return DASH
    if abs(known) >= 1e7:
        return f"{known:.2e}"
    return fixed(known, digits_of(known))


def significant(value: float, digits: int) -> str:
    """`digits` significant digits: four give '0.2956', '12.34'; from a thousand on the whole number: '1,928'."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def scientific(value: Any) -> str:
    """0.0000448 → '4.5e-05'; 0 stays 0."""
    known = finite_number(value)
    return DASH if known is None else "0" if known == 0 else f"{known:.3g}" if known >= 1e-3 else f"{known:.1e}"


def percent(value: Any) -> str:
    """0.314 → '31.4 %'."""
    known = finite_number(value)
    return DASH if known is None else f"{100 * known:.{0 if known >= 0.995 else 1}f} %"
