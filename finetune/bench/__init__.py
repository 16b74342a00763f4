"""`finetune bench NAME`: this suite against the plain stack, both sides on the same work in one run, on the user's own machine.

Each device is measured in a process of its own (child.py), which on the CPU has one thread on one core, so that what the
command itself does is no part of a time. What is measured stands in a module named after the benchmark (quant.py), how in
measure.py, the opponents in baselines.py; the table and the file are made here. `qlora` trains whole models, and has a process
for each side, with all cores (qlora.py, side.py). `device` has no opponents, and calibrates the plan (device.py); `plan`
compares that with real steps (plan.py).
"""

from __future__ import annotations

import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError, nearest
from finetune.files import write_json
from finetune.screen import Screen
from finetune.units import significant

if TYPE_CHECKING:
    from finetune.bench.measure import Row

# Each a module here; all but qlora, device and plan with SIZES, cases(device, sizes) and backends_here(device).
NAMES = {
    "quant": "the quantized linears against bf16 linears, bitsandbytes, llama.cpp and others",
    "qlora": "LoRA training of a recipe against TRL, PEFT and bitsandbytes: speed, memory, loss curves",
    "bitnet": "ternary training against bf16, transformers and the plain formula; the exports against 16 bits",
    "device": "this machine's products, memory and calls, which finetune plan counts with",
    "plan": "what finetune plan says of memory and time, against real steps",
}
TAKES_RECIPE = "qlora"
TARGETS = "targets: goals of this project; missing one is no failure of your machine"


def bench_command(
    name: str | None, json_file: Path | None, *, recipe: str | None = None, overrides: list[str] | None = None
) -> None:
    """Measure, show the table, and write `json_file` when all is there. recipe, overrides: for `qlora` alone.

    Raises:
        UserError: there is no such benchmark, it takes no recipe or not this one, or the file cannot be written.
    """
    if name is None:
        there = "; ".join(f"finetune bench {known}: {about}" for known, about in NAMES.items())
        raise UserError("which benchmark?", where="NAME", got="nothing", hint=there)
    if name not in NAMES:
        close = nearest(name, NAMES)
        meant = f"did you mean {close}? " if close else ""
        raise UserError("there is no such benchmark", where="NAME", got=name, hint=f"{meant}there are: {', '.join(NAMES)}")
    if name != TAKES_RECIPE and (recipe is not None or overrides):
        given = f"--recipe {recipe}" if recipe is not None else " ".join(overrides or [])
        hint = f"leave it out; finetune bench {TAKES_RECIPE} takes one"
        raise UserError("this benchmark takes no recipe", where=f"bench {name}", got=given, hint=hint)
    if json_file is not None:
        _require_writable(json_file)
    screen = Screen()
    if name == "device":
        with screen.phase("libraries"):
            from finetune.bench.device import device_command
        device_command(json_file, screen)
        return
    if name == "plan":
        with screen.phase("libraries"):
            from finetune.bench.plan import plan_command
        plan_command(json_file, screen)
        return
    if name == TAKES_RECIPE:
        _train_in_turn(name, recipe, overrides or [], json_file, screen)
        return
    with screen.phase("libraries"):
        import torch

        from finetune import provenance
        from quant import backends

        for scheme in backends.TABLE:
            backends.describe("cpu", scheme=scheme)  # a QUANT_BACKEND that cannot be used is told here, not by the child
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    rows: list[Row] = []
    places: dict[str, Any] = {}
    for device in devices:
        with screen.phase(f"{name} on {device}") as progress:
            found, places[device] = _measured(name, device, progress)
            rows += found
    _show(rows, screen)
    _tell_places(places, screen)
    if json_file is not None:
        collected = provenance.collect(torch.device(devices[-1]), 0, " ".join(sys.argv))
        where = {"device": "; ".join(place["device"] for place in places.values()), "devices": places}
        write_json(json_file, {"name": name, "rows": rows, "provenance": collected | where})
        screen.say(f"written to {json_file}")


def _train_in_turn(name: str, recipe: str | None, overrides: list[str], json_file: Path | None, screen: Screen) -> None:
    """The benchmark of whole training steps, on the device that the recipe takes."""
    with screen.phase("libraries"):
        from finetune import provenance
        from finetune.bench import qlora
        from finetune.models.device import pick_device

        modes = qlora.recipes(recipe, overrides)
    device = pick_device(modes["unpacked"].run.device)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: folders and processes end with it
    try:
        with screen.phase(f"{name} on {device.type}") as progress:
            result = qlora.bench(modes, qlora.SIZES, device.type, progress, large=recipe is None)
    finally:
        signal.signal(signal.SIGTERM, before)
    _show(result.rows, screen)
    screen.say("")
    qlora.show_curves(result.curves["unpacked"], screen)
    _tell_places({device.type: result.place}, screen)
    if busy := [f"{share:.0%} ({contest})" for contest, share in result.others.items() if share > qlora.BUSY]:
        screen.warn(f"other programs took {', '.join(busy)} of this machine's cores meanwhile: on an idle one figures are others")
    if json_file is not None:
        seed = modes["unpacked"].run.seed
        collected = provenance.collect(device, seed, " ".join(sys.argv)) | {"devices": {device.type: result.place}}
        recipes = {mode: one.model_dump(mode="json") for mode, one in modes.items()}
        found = {"rows": result.rows, "curves": result.curves, "contests": result.contests, "recipes": recipes}
        write_json(json_file, {"name": name, **found, "provenance": collected})
        screen.say(f"written to {json_file}")


def _tell_places(places: dict[str, Any], screen: Screen) -> None:
    screen.say(TARGETS)
    for place in places.values():
        screen.say(place["method"])
        for what, backend in place["backends"].items():
            screen.say(f"  {what}: {backend}")


def _require_writable(path: Path) -> None:
    """Say now what would otherwise be said when all has been measured."""
    what, where, folder = "the results cannot be written there", f"--json {path}", path.absolute().parent
    if path.exists() and not path.is_file():
        got = "a folder" if path.is_dir() else "no ordinary file"
        raise UserError(what, where=where, got=got, hint="give the name of a file")
    if not folder.is_dir():
        if folder.exists():
            raise UserError(what, where=where, got=f"{folder} is no folder", hint="give the name of a file in a folder")
        raise UserError(
            what, where=where, got=f"no folder {folder}", hint=f"make the folder: mkdir -p {shlex.quote(str(folder))}"
        )
    try:  # permissions do not tell: root has all of them, and still cannot write everywhere
        with tempfile.NamedTemporaryFile(prefix=f".{path.name}.", suffix=".finetune-try", dir=folder):
            pass
    except OSError as error:
        got = f"{folder} takes no file: {error.strerror or error}"
        raise UserError(what, where=where, got=got, hint="give the name of a file in a folder that can be written to") from None


def _measured(name: str, device: str, progress: Callable[[int, int, str], None]) -> tuple[list[Row], dict[str, Any]]:
    """The rows of `device`, and what a reader of them must know about it."""
    sizes = asdict(importlib.import_module(f"finetune.bench.{name}").SIZES)
    rows: list[Row] = []
    place: dict[str, Any] = {}
    with closing(_child(name, device, sizes)) as messages:
        for message in messages:
            if "progress" in message:
                percent, note = message["progress"]
                progress(percent, 100, note)
            elif "row" in message:
                rows.append(message["row"])
            else:
                place = message["place"]
    return rows, place


def _child(name: str, device: str, sizes: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
    """The messages of a process that measures. It ends with this one, however this one ends.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    # -P: what lies in the user's folder is not imported
    command = [sys.executable, "-P", "-m", "finetune.bench.child", name, device, json.dumps(sizes)]
    environment = os.environ | ({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} if device == "cpu" else {})
    with (
        tempfile.TemporaryDirectory(prefix="finetune-bench-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said,
    ):
        environment["TMPDIR"] = folder  # what it and the compilers write ends with it, also when it is stopped
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True, encoding="utf-8", env=environment)
        assert child.stdout is not None
        try:
            for line in child.stdout:
                yield json.loads(line)
            code = child.wait()
        finally:
            child.kill()
            child.wait()
            child.stdout.close()
        if code:
            said.seek(0)
            raise RuntimeError(f"measuring on {device} failed (exit code {code}):\n{said.read()[-4000:]}")


def verdict(row: Row) -> str:
    """What of the target, in words; the other lines of the table say why."""
    if row["ratio"] is None:
        return "skipped"
    if row["target"] is None:
        return "for context only"
    bound = {"lower": "≤", "higher": "≥"}[row["better"]]
    low, high = row["low"], row["high"]
    unsure = low is not None and high is not None and min(low, high) < row["target"] < max(low, high)
    return f"{bound} {row['target']:.3g}: {'met' if row['met'] else 'missed'}{', unsure' if unsure else ''}"


def _show(rows: list[Row], screen: Screen) -> None:
    """The table, two lines a row, in 80 columns; below it, by the rows' numbers, what was measured, and what else needs said."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("#", justify="right")
    table.add_column("case\nagainst")
    table.add_column("ours\ntheirs", justify="right", no_wrap=True)
    for column in ("ours/theirs\n[95 %]", "better ratio\ntarget"):
        table.add_column(column, no_wrap=True)
    for number, row in enumerate(rows, 1):
        unit = row["unit"].removeprefix("products").removeprefix("tokens").split()[0]
        amounts = ("–" if value is None else f"{significant(value, 4)} {unit}" for value in (row["ours"], row["baseline"]))
        ratio = "–" if row["ratio"] is None else f"{row['ratio']:.3g}"
        if row["low"] is not None and row["high"] is not None:
            ratio += f"\n[{row['low']:.3g}, {row['high']:.3g}]"
        cells = (str(number), f"{row['case']}\n{row['against']}", "\n".join(amounts), ratio, f"{row['better']}\n{verdict(row)}")
        table.add_row(*map(Text, cells))
    screen.console.print(table, soft_wrap=False)
    notes: dict[str, list[str]] = {}
    for number, row in enumerate(rows, 1):
        if row["note"]:
            notes.setdefault(row["note"], []).append(str(number))
    for note, numbers in notes.items():
        screen.say(f"{', '.join(numbers)}: {note}")
    if any(verdict(row).endswith("unsure") for row in rows):
        screen.say("unsure: the target lies within the interval")
