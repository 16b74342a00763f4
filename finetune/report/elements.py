"""What the page is made of: elements and parts.

Every element is made by `el`, which escapes whatever is not already an element, so text out of the data can never become markup.
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
    """An element. Children that are not Html are escaped; None is nothing; attributes: `class_` is class, None is none."""
    known = [(key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items() if value is not None]
    shown = "".join(f' {key}="{html.escape(str(value))}"' for key, value in known)
    if name == "meta":
        return Html(f"<meta{shown}>")
    return Html(f"<{name}{shown}>{join(children)}</{name}>")


def join(parts: Iterable[Any]) -> Html:
    return Html("".join(part if isinstance(part, Html) else html.escape(str(part)) for part in parts if part is not None))


def pick(record: Any, path: str) -> Any:
    """`record["a"]["b"]` for "a.b", or None where there is no such thing."""
    for key in path.split("."):
        record = record.get(key) if isinstance(record, dict) else None
    return record


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
