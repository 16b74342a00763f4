"""Writes the report of a run: one HTML file for wide and narrow screens, light and dark.

It reads only the run folder (run.json, metrics.jsonl, recipe.yaml, and those of its twin) and loads nothing: no network, no
script, plots as inline SVG; a content security policy in the page enforces it. Every element is made by `el`, which escapes
everything that is not an element, so text from the data can never become markup. Missing parts of a run are shown as missing,
with the reason.
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
    """The HTML of the page; deterministic for the same folder."""
    run = RunFiles.read(run_dir)
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        # The browser enforces that nothing is loaded and nothing runs.
        Html("<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"),
        el("title", f"{run.record.name} · {run.record.state}"),
        Html(f"<style>{STYLE.read_text(encoding='utf-8')}</style>"),
    )
    body = el("body", el("main", *(section(run) for section in SECTIONS)))
    text = "<!doctype html>\n" + el("html", head, "\n", body, lang="en") + "\n"
    return text.encode("utf-8", "replace").decode("utf-8")  # JSON can carry half a surrogate pair, a file cannot


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into the run folder atomically, and return its path.

    Raises:
        UserError: `run_dir` is not a run folder, or its run.json cannot be read.
    """
    path = run_dir / NAME
    write_atomic(path, page(run_dir))
    return path
