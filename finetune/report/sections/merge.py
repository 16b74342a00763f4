"""The merged model, and the gate that compared it with the trained one."""

from __future__ import annotations

from typing import Any

from finetune.record import MergeGate, MergeRecord, Reternarized
from finetune.report.elements import Html, el, facts, not_made, section, table, verdict_line
from finetune.report.folder import RunFiles
from finetune.units import finite_number, fixed, percent, plural, size


def merge_section(run: RunFiles) -> Html:
    record, merge = run.record, run.record.merge
    if merge is None:
        return section("Merge gate", not_made(record.state, "the recipe asks for no merged model (run.merge)"))
    written = f"{merge.path}/" + (f", {size(merge.bytes)}" if merge.bytes is not None else "")
    if merge.reternarized is not None:
        return _reternarized(merge.reternarized, written)
    if merge.gate is not None:
        return _gated(merge.gate, written)
    exported = (record.exports or {}).get("bitnet")
    if exported is not None and exported.path == merge.path:
        return _exported(merge, written)
    said = ": the merged model was written but not measured against the trained one, for want of held-out rows."
    return section("Merge gate", el("p", el("b", "Not compared"), said, class_="none"), facts([("written to", written)]))


def _exported(merge: MergeRecord, written: str) -> Html:
    """What a ternary run trained is in its export: nothing had to be merged."""
    said = (
        f"{merge.path}/ is the trained model in the bitnet format: the codes of its master weights, two bits each, "
        "and the rest in floats. Plain transformers loads it, and finetune chat and eval use it. Nothing had to be merged; "
        "the gate that compared it with the trained model stands under Exports."
    )
    return section("Merged model", el("p", said), facts([("written to", written)]))


def _gated(gate: MergeGate, written: str) -> Html:
    passed = gate.status == "pass"
    said = f"The merged model is {'' if passed else 'not '}the trained one, within the limit."
    difference = fixed(gate.merged_loss - gate.adapter_loss, 4, sign=True)
    return section(
        "Merge gate",
        el("ul", verdict_line(passed, said), class_="checks"),
        facts(
            [
                ("trained model", f"{fixed(gate.adapter_loss, 4)} nats per token on {plural(gate.rows, 'row')}"),
                ("merged model", f"{fixed(gate.merged_loss, 4)} nats per token, the same rows"),
                ("computed in", f"{gate.arithmetic} on {gate.device}"),
                ("difference", f"{difference} nats; allowed ± {gate.limit:g}"),
                ("written to", written),
            ]
        ),
        note="The merged weights were reloaded from disk by plain transformers and measured again.",
    )


def _reternarized(figures: Reternarized, written: str) -> Html:
    """Adapters merged into a ternary base: what rounding to three values left of them."""
    losses = [
        ("the base, without the adapter", figures.base_loss),
        ("trained: the adapter on its base", figures.adapter_loss),
        ("merged, in floats", figures.float_loss),
        ("merged, ternary again", figures.merged_loss),
    ]
    rows: list[list[Any]] = [[said, fixed(loss, 4), fixed(loss - figures.adapter_loss, 4, sign=True)] for said, loss in losses]
    rows[1][-1] = ""  # the trained model against itself
    told = [f"{percent(figures.flips)} of the ternary codes changed."]
    gained, left = figures.base_loss - figures.adapter_loss, figures.base_loss - figures.merged_loss
    if gained > 0 and finite_number(left) is not None:
        kept = percent(left / gained) if left > 0 else "nothing"
        told.append(f"The adapter had gained {fixed(gained, 4)} nats; after rounding to three values {kept} of that is left.")
    told.append("Three values a weight cannot hold a small update: the adapter on its base stays the trained model.")
    passed = figures.gate.status == "pass"
    said = "What was written is what was merged: plain transformers computes the same from it."
    if not passed:
        said = "Plain transformers computes something else from what was written."
    return section(
        "Merged and ternary again",
        table(["", f"loss, nats per token, {plural(figures.rows, 'row')}", "against the trained model"], rows, "numbers"),
        el("p", " ".join(told), class_="told"),
        el("ul", verdict_line(passed, said), class_="checks"),
        facts([("written to", written)]),
        note="The adapter was added to the weights of its ternary base, and the sum was made ternary again.",
    )
