"""The section of exports to other programs, with the results of the gate."""

from __future__ import annotations

from typing import Any

from finetune.record import ExportRecord
from finetune.report.elements import Html, el, missing, section
from finetune.report.folder import RunFiles
from finetune.units import TIGHT, fixed, percent, plural, scientific, short, size

HEAD = ["export", "size", "computes correctly", "distance from the trained model", "loss, nats", "perplexity"]


def exports_section(run: RunFiles) -> Html | None:
    """All exports; None for a run without any, unless it trains ternary weights."""
    exports = run.record.exports
    if not exports:
        trains_ternary = run.trains_ternary
        return section("Exports", missing(run.record.state, "the recipe has no exports")) if trains_ternary else None
    top = el("thead", el("tr", *(el("th", title, scope="col") for title in HEAD)))
    rows = el("tbody", *(_row(name, export) for name, export in exports.items()))
    note = (
        "Each export was loaded by the program that runs it, and given the same tokens as the trained model. It computes "
        "correctly if its logits match a simulation of that program's arithmetic, within the relative error shown; the effect of "
        "that arithmetic is the distance from the trained model (mean KL divergence of the next token)."
    )
    return section(
        "Exports",
        el("div", el("table", top, rows, class_="exports"), class_="scroll"),
        el("h3", "How to run them, from the run's folder"),
        el("pre", "\n".join(map(_command, exports.values())), class_="commands"),
        note=note,
    )


def _row(name: str, export: ExportRecord) -> Html:
    gate, correct, good = export.gate, export.gate.correct, export.gate.good
    passed = gate.status == "pass"
    badge = el("span", "✓" if passed else "✗", class_="badge", title=gate.status)
    title = name.upper() if name.startswith("gguf") else name
    cells = [
        (size(export.bytes), f"{fixed(export.bits_per_weight, 2)} bits per parameter"),
        (
            "exactly" if correct.error == 0 else f"error {scientific(correct.error)}",
            f"allowed {scientific(correct.limit)}; {plural(gate.tokens, 'token')}",
        ),
        (f"KL {scientific(good.kl)} nats", f"same next token {percent(good.same_top)}"),
        (fixed(good.export_loss, 4), f"trained:{TIGHT}{fixed(good.trained_loss, 4)}"),
        (short(good.export_perplexity), f"trained:{TIGHT}{short(good.trained_perplexity)}"),
    ]
    return el(
        "tr",
        el(
            "th",
            el("div", badge, el("b", title), None if passed else ": refused by the gate"),
            el("code", export.path),
            el("span", f"run by {gate.program}", class_="sub"),
            scope="row",
        ),
        *(_cell(label, main, below) for label, (main, below) in zip(HEAD[1:], cells, strict=True)),
        class_="pass" if passed else "fail",
    )


def _cell(label: str, main: Any, below: str) -> Html:
    return el("td", el("div", main, el("span", below, class_="sub")), data_label=label)


def _command(export: ExportRecord) -> str:
    if export.format.startswith("gguf"):
        return f"llama-cli -m {export.path}    # llama.cpp; checked with {export.gate.program}"
    return f'AutoModelForCausalLM.from_pretrained("{export.path}")    # {export.gate.program}'
