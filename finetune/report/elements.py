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


# ------------------------------------------------------------------------------------------------------------------ parts


def section(title: str, *content: Any, note: Any = None) -> Html:
    name = re.sub(r"\W+", "-", title.lower())
    return el("section", el("h2", title), el("p", note, class_="note") if note else None, *content, id=name)


def not_made(state: str, reason: str, what: str | None = None) -> Html:
    """Why a part (or `what` of it) is missing; `reason` is that of a run which did all it should."""
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


def verdict_line(passed: bool, said: str) -> Html:
    """What a gate found, in a list of checks."""
    status = el("span", "✓" if passed else "✗", class_="badge")
    return el("li", status, el("div", el("b", said)), class_="pass" if passed else "fail")


def trimmed(text: str) -> str:
    """Without empty lines before and after: a row of text may begin anywhere, and a young model write a screenful of them."""
    return re.sub(r"\A\s*\n|\s+\Z", "", text)
