"""`finetune bench NAME`: compares this suite with other libraries on the same work, on the user's own machine.

Each device is measured in a process of its own (child.py), which on the CPU has one thread on one core, so that the work of
the command itself is not timed. The cases are in a module named after the benchmark (quant.py), the method in
measure.py, the other libraries in baselines.py; the table and the file are written here. `qlora` trains whole models, with a
process for each side and all cores (qlora.py, side.py). `device` has no baseline, and calibrates the plan (device.py); `plan`
compares the plan with real steps (plan.py).
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
    "device": "speed of matrix products, memory and calls on this machine, used by finetune plan",
    "plan": "memory and time of finetune plan against real steps",
}
TAKES_RECIPE = "qlora"
TARGETS = "targets: goals of this project; a missed one does not mean that your machine is at fault"


def bench_command(
    name: str | None, json_file: Path | None, *, recipe: str | None = None, overrides: list[str] | None = None
) -> None:
    """Measure, show the table, and write `json_file` at the end. recipe, overrides: for `qlora` only.

    Raises:
        UserError: unknown benchmark, unsuitable or superfluous recipe, or the file cannot be written.
    """
    if name is None:
        hint = "; ".join(f"finetune bench {known}: {about}" for known, about in NAMES.items())
        raise UserError("which benchmark?", where="NAME", got="nothing", hint=hint)
    if name not in NAMES:
        close = nearest(name, NAMES)
        meant = f"did you mean {close}? " if close else ""
        raise UserError("unknown benchmark", where="NAME", got=name, hint=f"{meant}available: {', '.join(NAMES)}")
    if name != TAKES_RECIPE and (recipe is not None or overrides):
        given = f"--recipe {recipe}" if recipe is not None else " ".join(overrides or [])
        hint = f"remove it; finetune bench {TAKES_RECIPE} accepts a recipe"
        raise UserError("this benchmark does not accept a recipe", where=f"bench {name}", got=given, hint=hint)
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
            backends.describe("cpu", scheme=scheme)  # an unusable QUANT_BACKEND raises here, not in the child
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    rows: list[Row] = []
    environments: dict[str, Any] = {}
    for device in devices:
        with screen.phase(f"{name} on {device}") as progress:
            device_rows, environments[device] = _measured(name, device, progress)
            rows += device_rows
    _show(rows, screen)
    _show_environments(environments, screen)
    if json_file is not None:
        collected = provenance.collect(torch.device(devices[-1]), 0, " ".join(sys.argv))
        where = {"device": "; ".join(environment["device"] for environment in environments.values()), "devices": environments}
        write_json(json_file, {"name": name, "rows": rows, "provenance": collected | where})
        screen.say(f"written to {json_file}")


def _train_in_turn(name: str, recipe: str | None, overrides: list[str], json_file: Path | None, screen: Screen) -> None:
    """The benchmark of whole training steps, on the recipe's device."""
    with screen.phase("libraries"):
        from finetune import provenance
        from finetune.bench import qlora
        from finetune.models.device import pick_device

        modes = qlora.recipes(recipe, overrides)
    device = pick_device(modes["unpacked"].run.device)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: removes folders and ends processes
    try:
        with screen.phase(f"{name} on {device.type}") as progress:
            result = qlora.bench(modes, qlora.SIZES, device.type, progress, large=recipe is None)
    finally:
        signal.signal(signal.SIGTERM, before)
    _show(result.rows, screen)
    screen.say("")
    qlora.show_curves(result.curves["unpacked"], screen)
    _show_environments({device.type: result.place}, screen)
    if busy := [f"{share:.0%} ({contest})" for contest, share in result.others.items() if share > qlora.BUSY]:
        screen.warn(f"other programs used {', '.join(busy)} of this machine's cores: measure again on an idle machine")
    if json_file is not None:
        seed = modes["unpacked"].run.seed
        collected = provenance.collect(device, seed, " ".join(sys.argv)) | {"devices": {device.type: result.place}}
        recipes = {mode: one.model_dump(mode="json") for mode, one in modes.items()}
        results = {"rows": result.rows, "curves": result.curves, "contests": result.contests, "recipes": recipes}
        write_json(json_file, {"name": name, **results, "provenance": collected})
        screen.say(f"written to {json_file}")


def _show_environments(environments: dict[str, Any], screen: Screen) -> None:
    screen.say(TARGETS)
    for environment in environments.values():
        screen.say(environment["method"])
        for scheme, backend in environment["backends"].items():
            screen.say(f"  {scheme}: {backend}")


def _require_writable(path: Path) -> None:
    """Raise now the error that would otherwise come after all measurements."""
    message, where, folder = "cannot write the results there", f"--json {path}", path.absolute().parent
    if path.exists() and not path.is_file():
        got = "a folder" if path.is_dir() else "not a regular file"
        raise UserError(message, where=where, got=got, hint="use the name of a file")
    if not folder.is_dir():
        if folder.exists():
            raise UserError(message, where=where, got=f"{folder} is not a folder", hint="give the name of a file in a folder")
        raise UserError(message, where=where, got=f"no folder {folder}", hint=f"create it: mkdir -p {shlex.quote(str(folder))}")
    try:  # permissions are not enough: root has all of them, and still cannot write everywhere
        with tempfile.NamedTemporaryFile(prefix=f".{path.name}.", suffix=".finetune-try", dir=folder):
            pass
    except OSError as error:
        got = f"cannot create a file in {folder}: {error.strerror or error}"
        raise UserError(message, where=where, got=got, hint="give the name of a file in a writable folder") from None


def _measured(name: str, device: str, progress: Callable[[int, int, str], None]) -> tuple[list[Row], dict[str, Any]]:
    """The rows of `device`, and a description of the environment."""
    sizes = asdict(importlib.import_module(f"finetune.bench.{name}").SIZES)
    rows: list[Row] = []
    environment: dict[str, Any] = {}
    with closing(_child(name, device, sizes)) as messages:
        for message in messages:
            if "progress" in message:
                percent, note = message["progress"]
                progress(percent, 100, note)
            elif "row" in message:
                rows.append(message["row"])
            else:
                environment = message["place"]
    return rows, environment


def _child(name: str, device: str, sizes: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
    """Yield the messages of a measuring process, which ends with this one, however this one ends.

    Raises:
        RuntimeError: it failed; with the end of its output.
    """
    # -P: modules in the user's folder are not imported
    command = [sys.executable, "-P", "-m", "finetune.bench.child", name, device, json.dumps(sizes)]
    environment = os.environ | ({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} if device == "cpu" else {})
    with (
        tempfile.TemporaryDirectory(prefix="finetune-bench-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log,
    ):
        environment["TMPDIR"] = folder  # files of it and of compilers are removed with it, also if it is stopped
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, encoding="utf-8", env=environment)
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
            log.seek(0)
            raise RuntimeError(f"measuring on {device} failed (exit code {code}):\n{log.read()[-4000:]}")


def verdict(row: Row) -> str:
    """Whether the target was met, for the table."""
    if row["ratio"] is None:
        return "skipped"
    if row["target"] is None:
        return "for context only"
    bound = {"lower": "≤", "higher": "≥"}[row["better"]]
    low, high = row["low"], row["high"]
    unsure = low is not None and high is not None and min(low, high) < row["target"] < max(low, high)
    return f"{bound} {row['target']:.3g}: {'met' if row['met'] else 'missed'}{', unsure' if unsure else ''}"


def _show(rows: list[Row], screen: Screen) -> None:
    """Print the table in 80 columns, two lines per row, and below it notes by row number."""
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
        screen.say("unsure: the target is within the interval")
