"""What the page is made of: elements, figures in words, and parts.

Every element is made by `el`, which escapes whatever is not already an element, so text out of the data can never become markup.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable
from typing import Any

from finetune.files import human_bytes

MINUS, DASH, TIGHT = "−", "–", "\N{NO-BREAK SPACE}"


# --------------------------------------------------------------------------------------------------------------- elements


class Html(str):
    """Text that is markup already."""


def el(name: str, /, *children: Any, **attributes: Any) -> Html:
    """An element. Children that are not Html are escaped; None is nothing; attributes: `class_` is class, None is none."""
    known = [(key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items() if value is not None]
    shown = "".join(f' {key}="{html.escape(str(value))}"' for key, value in known)
    if name == "meta":
        return Html(f"<meta{shown}>")
    return Html(f"<{name}{shown}>{join(children)}</{name}>")


def join(parts: Iterable[Any]) -> Html:
    return Html("".join(part if isinstance(part, Html) else html.escape(str(part)) for part in parts if part is not None))


# ---------------------------------------------------------------------------------------------------------------- numbers


def pick(record: Any, path: str) -> Any:
    """`record["a"]["b"]` for "a.b", or None where there is no such thing."""
    for key in path.split("."):
        record = record.get(key) if isinstance(record, dict) else None
    return record


def number(value: Any) -> float | None:
    """A finite number, or None; "nan" and "inf" are how run folders write what is not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def decimals(*errors: float | None) -> int:
    """Digits behind the point that standard errors justify: 2 … 4."""
    known = [error for error in errors if error]
    return min(4, max(2, -math.floor(math.log10(min(known))))) if known else 3


def fixed(value: Any, digits: int, *, sign: bool = False) -> str:
    known = number(value)
    if known is None:
        return DASH
    return f"{known:{'+' if sign else ''},.{digits}f}".replace("-", MINUS)


def with_error(value: Any, error: Any, digits: int, *, sign: bool = False) -> str:
    """'2.45 ± 0.06'; without ± where the error is unknown."""
    return fixed(value, digits, sign=sign) + (f"{TIGHT}±{TIGHT}{fixed(error, digits)}" if number(error) is not None else "")


def digits_of(value: float | None) -> int:
    """Digits behind the point that leave about three in all."""
    return 0 if value is None or abs(value) >= 100 else 1 if abs(value) >= 10 else 2


def short(value: Any) -> str:
    """Three digits: 24.8 · 1,234 · 3.1e+09."""
    known = number(value)
    if known is None:
        return DASH
    if abs(known) >= 1e7:
        return f"{known:.2e}"
    return fixed(known, digits_of(known))


def count(value: Any) -> str:
    known = number(value)
    return DASH if known is None else f"{known:,.0f}"


def many(value: Any) -> str:
    """134515008 → '134.5 M'."""
    known = number(value)
    if known is None:
        return DASH
    for scale, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if known >= max(scale, 1e4):
            return f"{fixed(known / scale, 2 if known < 10 * scale else 1)} {unit}"
    return count(known)


def scientific(value: Any) -> str:
    """0.0000448 → '4.5e-05'; 0 stays 0."""
    known = number(value)
    return DASH if known is None else "0" if known == 0 else f"{known:.3g}" if known >= 1e-3 else f"{known:.1e}"


def percent(value: Any) -> str:
    known = number(value)
    return DASH if known is None else f"{100 * known:.{0 if known >= 0.995 else 1}f} %"


def size(value: Any) -> str:
    known = number(value)
    return DASH if known is None else human_bytes(known)


def duration(value: Any) -> str:
    """192 → '3 min 12 s'."""
    seconds = number(value)
    if seconds is None:
        return DASH
    if seconds < 59.95:
        parts = [f"{seconds:.1f}" if seconds < 9.95 else f"{seconds:.0f}", "s"]
    else:
        minutes, rest = divmod(round(seconds), 60)
        hours = [f"{minutes // 60}", "h", f"{minutes % 60:02d}", "min"]
        parts = hours if minutes >= 60 else [f"{minutes}", "min", f"{rest:02d}", "s"]
    return TIGHT.join(parts)


def moment(value: Any) -> str | None:
    """'2026-01-05T09:12:44+00:00' → '2026-01-05 09:12:44 UTC'."""
    return str(value).replace("T", " ").replace("+00:00", " UTC") if value else None


def plural(value: Any, word: str) -> str:
    return f"{count(value)} {word}{'' if value == 1 else 's'}"


# ------------------------------------------------------------------------------------------------------------------ parts


def section(title: str, *content: Any, note: Any = None) -> Html:
    name = re.sub(r"\W+", "-", title.lower())
    return el("section", el("h2", title), el("p", note, class_="note") if note else None, *content, id=name)


def not_made(record: dict[str, Any], reason: str, what: str | None = None) -> Html:
    """Why a part (or `what` of it) is missing; `reason` is that of a run which did all it should."""
    state = record.get("state")
    if state == "failed":
        reason = "the run failed before it; the error stands above"
    elif state == "stopped":
        reason = "the run was stopped before it"
    elif state == "running":
        reason = "the run had not come to it when this page was written"
    return el("p", el("b", f"{what} not made" if what else "Not made"), f": {reason}.", class_="none")


def table(head: list[str], rows: list[list[Any]], class_: str | None = None) -> Html:
    """The first column names the rows."""
    cells = [el("tr", el("th", row[0], scope="row"), *(el("td", cell) for cell in row[1:])) for row in rows]
    top = el("thead", el("tr", *(el("th", title, scope="col") for title in head)))
    return el("div", el("table", top, el("tbody", *cells), class_=class_), class_="scroll")


def facts(rows: list[tuple[str, Any]]) -> Html:
    """Name and value; rows without a value are left out."""
    return el("dl", *(join((el("dt", name), el("dd", value))) for name, value in rows if value not in (None, "")), class_="facts")


def figure(svg: str, caption: Any = None, class_: str | None = None) -> Html:
    return el("figure", Html(svg), el("figcaption", caption) if caption else None, class_=class_)


def key(variable: str, text: str) -> Html:
    return el("span", el("i", style=f"background:var(--{variable})"), text)
