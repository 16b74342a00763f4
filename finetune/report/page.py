"""The page of a run: one HTML file, readable before anything else is, on a laptop and a phone, by day and by night.

It reads only the run folder (run.json, metrics.jsonl, recipe.yaml, and those of its twin) and loads nothing: no network, no
script, plots as inline SVG; a content policy in the page says so to the browser. Every element is made by `el`, which escapes
whatever is not already an element, so text out of the data can never become markup. What a run did not make is shown as not
made, with the reason.
"""

from __future__ import annotations

from pathlib import Path

from finetune.files import write_atomic
from finetune.report.elements import Html, el
from finetune.report.folder import RunFiles
from finetune.report.sections import SECTIONS

NAME = "report.html"
STYLE = Path(__file__).with_name("page.css")


def page(run_dir: Path) -> str:
    """The page's text. The same folder gives the same bytes."""
    run = RunFiles.read(run_dir)
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        # The browser is told what the page promises: nothing is loaded, nothing runs.
        Html("<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"),
        el("title", f"{run.record.name} · {run.record.state}"),
        Html(f"<style>{STYLE.read_text(encoding='utf-8')}</style>"),
    )
    body = el("body", el("main", *(section(run) for section in SECTIONS)))
    text = "<!doctype html>\n" + el("html", head, "\n", body, lang="en") + "\n"
    return text.encode("utf-8", "replace").decode("utf-8")  # JSON can carry half a surrogate pair, a file cannot


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into the run folder, complete or not at all, and return its path.

    Raises:
        UserError: `run_dir` is no run folder, or its run.json cannot be read.
    """
    path = run_dir / NAME
    write_atomic(path, page(run_dir))
    return path
