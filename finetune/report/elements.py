"""HTML elements and parts of the report.

Every element is made by `el`, which escapes everything that is not an element, so text from the data can never become markup.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import Any

# --------------------------------------------------------------------------------------------------------------- elements


class Html(str):
    """Text that is markup already."""


def el(name: str, /, *children: Any, **attributes: Any) -> Html:
    """An element. Children that are not Html are escaped, None is skipped; attributes: `class_` is class, None is skipped."""
    pairs = [(key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items() if value is not None]
    attributes_text = "".join(f' {key}="{html.escape(str(value))}"' for key, value in pairs)
    if name == "meta":
        return Html(f"<meta{attributes_text}>")
    return Html(f"<{name}{attributes_text}>{join(children)}</{name}>")


def join(parts: Iterable[Any]) -> Html:
    return Html("".join(part if isinstance(part, Html) else html.escape(str(part)) for part in parts if part is not None))


# ------------------------------------------------------------------------------------------------------------------ parts


def section(title: str, *content: Any, note: Any = None) -> Html:
    name = re.sub(r"\W+", "-", title.lower())
    return el("section", el("h2", title), el("p", note, class_="note") if note else None, *content, id=name)


def missing(state: str, reason: str, name: str | None = None) -> Html:
    """Why a part of the report (or `name` in it) is missing; `reason` applies to a run that completed."""
    if state == "failed":
        reason = "the run failed before this; the error is shown above"
    elif state == "stopped":
        reason = "the run was stopped before this"
    elif state == "running":
        reason = "the run had not reached this when the page was written"
    return el("p", el("b", f"{name} missing" if name else "Missing"), f": {reason}.", class_="none")


def table(head: list[str], rows: list[list[Any]], class_: str | None = None) -> Html:
    """A table whose first column holds the row headers."""
    cells = [el("tr", el("th", row[0], scope="row"), *(el("td", cell) for cell in row[1:])) for row in rows]
    top = el("thead", el("tr", *(el("th", title, scope="col") for title in head)))
    return el("div", el("table", top, el("tbody", *cells), class_=class_), class_="scroll")


def facts(rows: list[tuple[str, Any]]) -> Html:
    """A list of names and values; entries without a value are skipped."""
    return el("dl", *(join((el("dt", name), el("dd", value))) for name, value in rows if value not in (None, "")), class_="facts")


def figure(svg: str, caption: Any = None, class_: str | None = None) -> Html:
    return el("figure", Html(svg), el("figcaption", caption) if caption else None, class_=class_)


def key(variable: str, text: str) -> Html:
    return el("span", el("i", style=f"background:var(--{variable})"), text)


def verdict_line(passed: bool, text: str) -> Html:
    """The result of a gate as an item of a list of checks."""
    status = el("span", "✓" if passed else "✗", class_="badge")
    return el("li", status, el("div", el("b", text)), class_="pass" if passed else "fail")


def trimmed(text: str) -> str:
    """Text without leading and trailing blank lines, which samples of text and of untrained models may have."""
    return re.sub(r"\A\s*\n|\s+\Z", "", text)
