"""The section of the merged model and the gate that compared it with the trained one."""

from __future__ import annotations

from typing import Any

from finetune.record import MergeGate, MergeRecord, Reternarized
from finetune.report.elements import Html, el, facts, missing, section, table, verdict_line
from finetune.report.folder import RunFiles
from finetune.units import finite_number, fixed, percent, plural, size


def merge_section(run: RunFiles) -> Html:
    record, merge = run.record, run.record.merge
    if merge is None:
        return section("Merge gate", missing(record.state, "the recipe does not ask for a merged model (run.merge)"))
    written = f"{merge.path}/" + (f", {size(merge.bytes)}" if merge.bytes is not None else "")
    if merge.reternarized is not None:
        return _reternarized(merge.reternarized, written)
    if merge.gate is not None:
        return _gated(merge.gate, written)
    exported = (record.exports or {}).get("bitnet")
    if exported is not None and exported.path == merge.path:
        return _exported(merge, written)
    reason = ": the merged model was written but not compared with the trained one, because there are no held-out rows."
    return section("Merge gate", el("p", el("b", "Not compared"), reason, class_="none"), facts([("written to", written)]))


def _exported(merge: MergeRecord, written: str) -> Html:
    """The merged model of a ternary run, which is its bitnet export."""
    text = (
        f"{merge.path}/ is the trained model in the bitnet format: the codes of its master weights, two bits each, "
        "and the rest in floats. Plain transformers loads it, and finetune chat and eval use it. There was nothing to merge; "
        "the gate that compared it with the trained model is shown under Exports."
    )
    return section("Merged model", el("p", text), facts([("written to", written)]))


def _gated(gate: MergeGate, written: str) -> Html:
    passed = gate.status == "pass"
    text = f"The merged model {'matches' if passed else 'does not match'} the trained one within the limit."
    difference = fixed(gate.merged_loss - gate.adapter_loss, 4, sign=True)
    return section(
        "Merge gate",
        el("ul", verdict_line(passed, text), class_="checks"),
        facts(
            [
                ("trained model", f"{fixed(gate.adapter_loss, 4)} nats per token on {plural(gate.rows, 'row')}"),
                ("merged model", f"{fixed(gate.merged_loss, 4)} nats per token on the same rows"),
                ("computed in", f"{gate.arithmetic} on {gate.device}"),
                ("difference", f"{difference} nats; allowed ± {gate.limit:g}"),
                ("written to", written),
            ]
        ),
        note="The merged weights were reloaded from disk with plain transformers and measured again.",
    )


def _reternarized(figures: Reternarized, written: str) -> Html:
    """Adapters merged into a ternary base, and how much of their update rounding back to ternary kept."""
    losses = [
        ("base without the adapter", figures.base_loss),
        ("trained: base with the adapter", figures.adapter_loss),
        ("merged, in floats", figures.float_loss),
        ("merged, ternary again", figures.merged_loss),
    ]
    rows: list[list[Any]] = [[name, fixed(loss, 4), fixed(loss - figures.adapter_loss, 4, sign=True)] for name, loss in losses]
    rows[1][-1] = ""  # the trained model against itself
    sentences = [f"{percent(figures.flips)} of the ternary codes changed."]
    gained, left = figures.base_loss - figures.adapter_loss, figures.base_loss - figures.merged_loss
    if gained > 0 and finite_number(left) is not None:
        kept = percent(left / gained) if left > 0 else "nothing"
        sentences.append(f"The adapter gained {fixed(gained, 4)} nats; rounding back to ternary kept {kept} of that.")
    sentences.append("Ternary weights cannot represent a small update: use the adapter on its base as the trained model.")
    passed = figures.gate.status == "pass"
    verdict = "Plain transformers computes the same from the written files as the merged model."
    if not passed:
        verdict = "Plain transformers computes something else from the written files than the merged model."
    return section(
        "Merged and ternary again",
        table(["", f"loss, nats per token, {plural(figures.rows, 'row')}", "against the trained model"], rows, "numbers"),
        el("p", " ".join(sentences), class_="told"),
        el("ul", verdict_line(passed, verdict), class_="checks"),
        facts([("written to", written)]),
        note="The adapter was added to the weights of its ternary base, and the sum was quantized to ternary again.",
    )
