"""Plans in words and tables, for a screen of 80 columns and as Markdown."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from finetune.planning.fit import Change, Fit
from finetune.planning.result import Plan
from finetune.planning.rewrite import diff
from finetune.screen import Screen
from finetune.units import GIB, MINUS, gib, many, rough_duration, step_time

BAR = 24  # characters


# ------------------------------------------------------------------------------------------------------------------- figures


def of(peak_bytes: int, budget_bytes: int) -> str:
    """'6.9 of 12.0 GiB', with enough digits to tell which is larger."""
    if gib(peak_bytes) == gib(budget_bytes) and peak_bytes != budget_bytes:
        return f"{peak_bytes / GIB:.3f} of {budget_bytes / GIB:.3f} GiB"
    return f"{gib(peak_bytes)} of {gib(budget_bytes)} GiB"


def energy(plan: Plan) -> str:
    """'1.2 kWh, 0.38 at 0.32/kWh'; without a price if none is given."""
    used = f"{plan.kwh:,.0f} kWh" if plan.kwh >= 100 else f"{plan.kwh:.2g} kWh"
    if plan.price is None:
        return used
    price = f"{plan.price:,.2f}" if plan.price >= 0.1 or plan.price == 0 else f"{plan.price:.2g}"
    return f"{used}, {price} at {plan.price_per_kwh:g}/kWh"


def verdict(plan: Plan) -> str:
    """The plan in one line."""
    word = "fits" if plan.fits else "does not fit"
    cost = f"{rough_duration(plan.seconds)}, {energy(plan)}"
    return f"{word}: {of(plan.peak_bytes, plan.budget_bytes)}, highest in {plan.highest.name}; {cost}"


def work(plan: Plan) -> list[str]:
    """What is trained and how fast, in two lines."""
    speed = plan.tokens_per_step / plan.step_seconds if plan.step_seconds else 0.0
    training = plan.steps * plan.step_seconds
    rate = f", {plan.flops / training / 1e12:.3g} TFLOP/s" if training else ""
    return [
        f"{many(plan.parameters)} parameters, {many(plan.trainable)} trained; {plan.steps:,} steps of {plan.tokens_per_step:,} "
        f"tokens, {many(plan.tokens)} in total",
        f"{step_time(plan.step_seconds)} per step, {many(speed)} tokens/s; {plan.flops:.1e} FLOP{rate}",
    ]


# --------------------------------------------------------------------------------------------------------------------- a plan


def show(plan: Plan, screen: Screen) -> None:
    """Print verdict, memory by phase, terms of the highest phase, and notes."""
    _say(screen, Text(verdict(plan), "bold green" if plan.fits else "bold red"))
    _say(screen, f"{plan.recipe} on {plan.device}: {work(plan)[0]}")
    _say(screen, work(plan)[1])
    screen.say("")
    host = any(phase.host_bytes for phase in plan.phases)
    phases = _table("phase", ">peak GiB", *([">host GiB"] if host else []), ">time", "")
    most = max(plan.budget_bytes, plan.peak_bytes)
    for phase in plan.phases:
        over = phase.peak_bytes > plan.budget_bytes
        style = "red" if over else "bold" if phase is plan.highest else ""
        waits = [gib(phase.host_bytes) if phase.host_bytes else ""] if host else []
        bar = Text(_bar(phase.peak_bytes, most), "red" if over else "blue")
        phases.add_row(phase.name, gib(phase.peak_bytes), *waits, rough_duration(phase.seconds), bar, style=style)
    screen.console.print(phases, soft_wrap=False)
    terms = {name: count for name, count in plan.highest.terms.items() if count}
    if terms:
        screen.say("")
        table = _table(f"in {plan.highest.name}", ">GiB", ">share", "")
        for name, count in terms.items():
            share = count / plan.peak_bytes
            table.add_row(
                name, gib(count), f"{share:.0%}" if share >= 0.005 else "<1%", Text(_bar(count, max(terms.values())), "blue")
            )
        screen.console.print(table, soft_wrap=False)
    if plan.notes:
        screen.say("")
    for note in plan.notes:
        _say(screen, f"· {note}")


def _say(screen: Screen, text: str | Text) -> None:
    """Print a line, wrapped at words."""
    screen.console.print(text, markup=False, soft_wrap=False)


def _table(*columns: str) -> Table:
    """A table; columns whose name starts with > are right-aligned."""
    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(name.removeprefix(">"), justify="right" if name.startswith(">") else "left", overflow="fold")
    return table


def _bar(value: float, most: float) -> str:
    """A bar of at most BAR characters, in steps of 1/8 character."""
    eighths = round(8 * BAR * value / most) if most else 0
    return "█" * (eighths // 8) + ("▏▎▍▌▋▊▉"[eighths % 8 - 1] if eighths % 8 else "")


# ---------------------------------------------------------------------------------------------------------------------- a fit


def show_fit(fit: Fit, screen: Screen) -> None:
    """Print the changes with their savings and costs; if they are not enough, the smallest budget that would be."""
    before = fit.before
    if not fit.steps and fit.fits:
        _say(screen, f"fits unchanged: {of(before.peak_bytes, fit.budget_bytes)}")
        return
    if fit.fits:
        text = f"fits with changes: {gib(before.peak_bytes)} → {of(fit.plan.peak_bytes, fit.budget_bytes)}; "
        text += f"{rough_duration(before.seconds)} → {rough_duration(fit.plan.seconds)}"
        _say(screen, Text(text, "bold green"))
    else:
        _say(screen, Text(cannot(fit), "bold red"))
    if fit.steps:
        screen.say("")
        for line in diff(fit.keys):
            screen.say(Text(line, {"-": "red", "+": "green"}.get(line[0], "")))
        screen.say("")
        table = _table(">saves GiB", ">new peak", ">time", "change")
        for step in fit.steps:
            table.add_row(_saved(step), gib(step.peak_bytes[1]), _longer(step), _change(step))
        screen.console.print(table, soft_wrap=False)
    for reason in fit.refused:
        _say(screen, f"· not possible here: {reason}")


def cannot(fit: Fit) -> str:
    """Why a recipe could not be made to fit, in one line."""
    text = f"cannot fit into {gib(fit.budget_bytes)} GiB: with all changes that help it still needs "
    text += f"{gib(fit.smallest_bytes or 0)} GiB, highest in {fit.plan.highest.name}"
    if fit.proposal is not None:
        text += f"; data.max_length={fit.proposal} would fit, but shortens the samples"
    return text


def _change(step: Change) -> str:
    keys = ", ".join(f"{key}={new}" for key, new in _assignments(step).items())
    return f"{keys}\n{step.why}"


def _assignments(step: Change) -> dict[str, str]:
    return {key: str(new).lower() if isinstance(new, bool) else str(new) for key, (_, new) in step.keys.items()}


def _saved(step: Change) -> str:
    before, after = step.peak_bytes
    return gib(before - after) if before != after else "none by itself"


def _longer(step: Change) -> str:
    """The change of the run's time, in words."""
    before, after = step.seconds
    if abs(after - before) < 0.005 * max(before, 1.0):
        return "the same"
    share = f" ({after / before - 1:+.0%})" if before else ""
    sign = "+" if after >= before else MINUS
    return f"{sign}{rough_duration(abs(after - before))}{share}".replace("-", MINUS)


# ----------------------------------------------------------------------------------------------------------------- many plans


def rows_budgets(rows: list[dict[str, Any]]) -> list[int]:
    """All budgets (bytes) of the table's lines, ascending."""
    return sorted({budget for row in rows for budget in row["plans"]})


def card(budget_bytes: int) -> str:
    """GPU memory as vendors write it: 12 GB are 12 · 1024³ bytes."""
    return f"{budget_bytes / GIB:g} GB"


def _cell(answer: Plan | Fit) -> tuple[str, str, str]:
    """(fits, peak, time) in words."""
    plan = answer.plan if isinstance(answer, Fit) else answer
    if isinstance(answer, Fit):
        fits = "no" if not answer.fits else "changed" if answer.steps else "yes"
    else:
        fits = "yes" if plan.fits else "no"
    return fits, f"{gib(plan.peak_bytes)} GiB", rough_duration(plan.seconds)


def footnotes(rows: list[dict[str, Any]]) -> list[str]:
    """The changes for each budget, and recipes that could not be planned."""
    notes = []
    for row in rows:
        if row.get("error"):
            notes.append(f"{row['recipe']}: {row['error']}")
        for budget in sorted(row["plans"]):
            answer = row["plans"][budget]
            if not isinstance(answer, Fit) or not (answer.steps or not answer.fits):
                continue
            keys = " ".join(f"{key}={value}" for step in answer.steps for key, value in _assignments(step).items())
            outcome = (
                ""
                if answer.fits
                else "; " + (f"data.max_length={answer.proposal} would fit" if answer.proposal else "does not fit")
            )
            notes.append(f"{row['recipe']} on {card(budget)}: {keys or 'no change helps'}{outcome}")
    return notes


def show_many(rows: list[dict[str, Any]], screen: Screen) -> None:
    """Print recipes × budgets. rows: {recipe, parameters, tokens, plans: {bytes: Plan or Fit}}, or {recipe, plans: {}, error}."""
    budgets = rows_budgets(rows)
    table = _table("recipe", ">parameters", ">tokens", *(f">{card(budget)}" for budget in budgets))
    colours = {"yes": "green", "changed": "yellow", "no": "red"}
    for row in rows:
        cells = []
        for budget in budgets:
            if budget not in row["plans"]:
                cells.append(Text("–"))
                continue
            fits, peak, time = _cell(row["plans"][budget])
            cells.append(Text(fits, colours[fits]) + Text(f"\n{peak}\n{time}" if fits != "no" else f"\nneeds\n{peak}"))
        sizes = [many(row[name]) if row.get(name) is not None else "–" for name in ("parameters", "tokens")]
        table.add_row(row["recipe"], *sizes, *cells)
    screen.console.print(table, soft_wrap=False)
    for note in footnotes(rows):
        _say(screen, f"· {note}")


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of recipes × budgets as Markdown."""
    budgets = rows_budgets(rows)
    head = ["recipe", "parameters", "tokens", *(card(budget) for budget in budgets)]
    lines = ["| " + " | ".join(head) + " |", "|---|--:|--:" + "|---" * len(budgets) + "|"]
    for row in rows:
        cells = []
        for budget in budgets:
            if budget not in row["plans"]:
                cells.append("–")
                continue
            fits, peak, time = _cell(row["plans"][budget])
            cells.append(f"no: needs {peak}" if fits == "no" else f"{fits}: {peak}, {time}")
        sizes = [many(row[name]) if row.get(name) is not None else "–" for name in ("parameters", "tokens")]
        lines.append("| " + " | ".join([f"`{row['recipe']}`", *sizes, *cells]) + " |")
    notes = footnotes(rows)
    return "\n".join([*lines, *([""] if notes else []), *(f"- {note}" for note in notes)]) + "\n"


def claim(flops: float, days: tuple[float, float], *, what: str, device: str, rate: float, dtype: str = "bf16") -> str:
    """The arithmetic of a claim, in words. flops: of the training; days: claimed (least, most); rate: dense FLOP/s."""
    least, most = sorted(days)
    needs = [flops / (day * 86400) / 1e12 for day in (most, least)]
    span, needed = (f"{a:,.0f}–{b:,.0f}" if round(a) != round(b) else f"{a:,.0f}" for a, b in ((least, most), needs))
    text = f"{what} in {span} days on {device} would need {needed} TFLOP/s; its dense {dtype} rate is {rate / 1e12:,.0f}"
    if needs[0] * 1e12 > rate:
        text += f", at which it takes {flops / rate / 86400:,.0f} days"
    return text
