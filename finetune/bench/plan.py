"""`finetune bench plan`: memory and time of `finetune plan` against real steps of the same recipes.

Each case is a recipe for a model with random weights and generated rows, in a temporary folder; it runs in a process of its
own (`python -m finetune.bench.plan SPEC`), and is planned there after its steps. Measurement and plan share only
the recipe:

    measured   memory: allocations of torch. On the CPU all its allocator's events (torch.profiler), summed over
               the first steps, starting from the bytes of parameters and buffers; on CUDA max_memory_allocated.
               time: the median of later steps, without the profiler.
    planned    `finetune.planning.estimate.plan` for this device: the peak of its training phase without the process's own part
               (context) and fragmentation, which no allocator counts; and `step_seconds`.

All micro-batches of a case have about the same size, and the profiled steps cover all of them, because the
plan is for the largest.
"""

from __future__ import annotations

import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import torch

from finetune.bench.child import Progress, follow
from finetune.bench.measure import Row, interval
from finetune.recipe import Recipe
from finetune.run_dir import RunDir
from finetune.units import MIB

OVER, UNDER, MEDIAN, LATE = 0.04, 0.01, 0.01, 0.20  # targets: memory above and below the measured value, time either way
OVER_CUDA = 0.05
TIMED = 12  # cases whose time must be within the target
VOCABULARY, WORDS = 4096, 3000
SIZES = {"S": (128, 4, 4), "M": (384, 8, 6), "L": (768, 12, 12)}  # width, layers, heads
SHARE = {"S": 1.0, "M": 1.4, "L": 5.0}  # relative duration of a case


@dataclass(frozen=True)
class Steps:
    """Steps of a case: first profiled, then warm-up, then timed."""

    profiled: int = 3
    warm: int = 2
    timed: int = 7


@dataclass(frozen=True)
class Case:
    """One recipe. of: full, lora, qlora, bitnet (ternary, from scratch). rows: packed, pairs (of equal length, not packed),
    single (one row at a time), text (for a model from scratch). more: keys of the recipe, "train.accumulation" → 2."""

    architecture: str
    size: str
    of: str
    rows: str = "packed"
    checkpointing: bool = False
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        more = [f"{key.partition('.')[2]}={value}" for key, value in self.more.items() if key not in IMPLIED]
        recomputed = ["recomputed"] if self.checkpointing else []
        rows = [self.rows] if self.rows != "text" else []
        return " ".join([self.architecture, self.size, self.of, *rows, *recomputed, *more])


# Keys that other keys require (finetune/recipe/rules.py).
IN_BACKWARD = {"train.optimizer_in_backward": True, "train.save_steps": 1000, "train.max_grad_norm": 0.0}
IMPLIED = ("train.save_steps", "train.max_grad_norm", "model.dtype")
CASES = [
    Case("llama", "S", "full"),
    Case("llama", "S", "full", checkpointing=True),
    Case("llama", "S", "lora", "pairs"),
    Case("llama", "S", "qlora", checkpointing=True),
    Case("llama", "S", "qlora", "single"),
    Case("llama", "S", "bitnet", "text"),
    Case("llama", "M", "full"),
    Case("llama", "M", "full", "pairs", checkpointing=True),
    Case("llama", "M", "lora"),
    Case("llama", "M", "lora", "single", checkpointing=True),
    Case("llama", "M", "qlora"),
    Case("llama", "M", "qlora", "pairs"),
    Case("llama", "M", "qlora", checkpointing=True),
    Case("llama", "M", "bitnet", "text"),
    Case("llama", "M", "bitnet", "text", checkpointing=True),
    Case("llama", "L", "full", checkpointing=True),
    Case("llama", "L", "lora", "pairs"),
    Case("llama", "L", "qlora", checkpointing=True),
    Case("llama", "L", "bitnet", "text"),
    Case("gpt2", "S", "lora", "pairs", checkpointing=True),
    Case("gpt2", "S", "bitnet", "text"),
    Case("gpt2", "M", "full"),
    Case("gpt2", "M", "qlora"),
    Case("gpt2", "M", "qlora", "pairs", checkpointing=True),
    Case("gpt2", "L", "full", checkpointing=True),
    Case("mixtral", "S", "full"),
    Case("mixtral", "S", "lora", "single"),
    Case("mixtral", "M", "qlora", checkpointing=True),
    Case("mixtral", "M", "full", "pairs", checkpointing=True),
    Case("mixtral", "L", "qlora"),
    Case("llama", "M", "full", "pairs", more={"train.accumulation": 2}),
    Case("llama", "M", "qlora", "pairs", checkpointing=True, more={"train.accumulation": 2}),
    Case("llama", "M", "full", more={"train.optimizer": "adamw_8bit"}),
    Case("llama", "M", "full", more={"train.stochastic_rounding": True, "model.dtype": "bf16", **IN_BACKWARD}),
    Case("llama", "M", "qlora", more={"train.loss_chunk": 0}),
    Case("llama", "M", "qlora", more={"fast.compile": True}),
    Case("llama", "M", "lora", more={"fast.compile": True}),
    Case("llama", "M", "lora", checkpointing=True, more={"fast.compile": True}),
    Case("gpt2", "S", "full", checkpointing=True, more={"fast.compile": True}),
]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ models and data


def _text(words: list[str], count: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(words, k=count))


def make_data(folder: Path) -> None:
    """Write a tokenizer, text, and rows for each case; deterministic.

    packed: about three micro-batches of two sequences of 512 tokens. pairs, single: rows of nearly 512 tokens.
    """
    from finetune.data.tokenizer import train_tokenizer

    letters = random.Random(0)
    words = ["".join(letters.choices("etaoinshrdlu", k=letters.randint(2, 9))) for _ in range(WORDS)]
    text = "\n\n".join(_text(words, 400, number) for number in range(400))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    tokenizer = train_tokenizer([text], VOCABULARY)
    tokenizer.save_pretrained(folder / "tokenizer")
    ids = tokenizer(text)["input_ids"]

    def write(name: str, lengths: list[tuple[int, int]]) -> None:
        """Write questions and answers with these numbers of tokens."""

        def piece(count: int, at: int) -> str:
            return str(tokenizer.decode(ids[at : at + count]))

        lines = [
            json.dumps({"instruction": piece(asked, 700 * number), "output": piece(answered, 700 * number + 350)})
            for number, (asked, answered) in enumerate(lengths)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    varied = random.Random(1)
    packed: list[tuple[int, int]] = []
    while sum(map(sum, packed)) + FRAME * len(packed) < PACKED_TOKENS:
        packed.append((varied.randint(5, 60), varied.randint(5, 130)))
    write("packed", packed)
    write("pairs", [(60 + 20 * number, ROW - FRAME - 60 - 20 * number) for number in range(6)])
    write("single", [(60 + 20 * number, ROW - FRAME - 60 - 20 * number) for number in range(3)])


ROW = 500
FRAME = 24  # approximate tokens of the template per row
PACKED_TOKENS = 3 * 2 * 512 - 100


def config_of(architecture: str, size: str) -> dict[str, Any]:
    """The config of a small model of that architecture, without dropout."""
    width, layers, heads = SIZES[size]
    if architecture == "gpt2":
        quiet = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        return {"model_type": "gpt2", "n_embd": width, "n_layer": layers, "n_head": heads, "n_positions": 1024, **quiet}
    common = {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads // 2,
        "max_position_embeddings": 2048,
    }  # fmt: skip
    if architecture == "mixtral":
        experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
        return {"model_type": "mixtral", "intermediate_size": width, **experts, **common}
    return {"model_type": "llama", "intermediate_size": width * 8 // 96 * 32, "tie_word_embeddings": False, **common}


def model_folder(case: Case, folder: Path) -> Path:
    """The folder of a case's model with random weights, shared by cases with the same architecture and size."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from finetune.models.config import new_config

    out = folder / f"{case.architecture}-{case.size}"
    if not (out / "config.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            new_config(config_of(case.architecture, case.size), tokenizer), dtype=torch.float32
        )
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    return out


def recipe_of(case: Case, folder: Path, device: str) -> Recipe:
    sections: dict[str, dict[str, Any]] = {
        "train": {"micro_batch": 1 if case.rows == "single" else 2, "checkpointing": case.checkpointing, "save_steps": None},
        "fast": {"compile": False},
        "eval": {"samples": 0},
        "run": {"dir": str(folder / "run"), "device": device},
    }
    if case.rows == "text":
        sections["data"] = {"path": str(folder / "text.txt"), "max_length": 256, "heldout": 0}
        sections["model"] = {"config": config_of(case.architecture, case.size)}
        sections["tokenizer"] = {"name": str(folder / "tokenizer")}
        sections["train"]["max_steps"] = 1000
    else:
        sections["data"] = {
            "path": str(folder / f"{case.rows}.jsonl"), "template": "alpaca", "max_length": 512, "heldout": 0, "dedupe": False,
            "packing": case.rows == "packed",
        }  # fmt: skip
        sections["model"] = {"name": str(model_folder(case, folder))}
        sections["train"]["epochs"] = 1
    if case.of == "bitnet":
        sections["quant"] = {"scheme": "ternary"}
    elif case.of == "full":
        sections["adapter"] = {"kind": "none"}
    else:
        sections["model"]["dtype"] = "bf16"
        sections["quant"] = {"scheme": "nf4" if case.of == "qlora" else "none"}
    for key, value in case.more.items():
        section, _, leaf = key.partition(".")
        sections.setdefault(section, {})[leaf] = value
    return Recipe.model_validate({"kind": "pretrain" if case.rows == "text" else "sft", **sections})


# ------------------------------------------------------------------------------------------------- measuring: the child process


class Found(TypedDict):
    """Results of one case. Bytes: peak of the training steps. reserved: by CUDA's allocator, fragmentation included; None on the
    CPU. seconds: of each timed step. busy: share of the machine that other programs used meanwhile."""

    case: str
    planned_bytes: int
    measured_bytes: int
    planned_reserved: int | None
    reserved_bytes: int | None
    planned_seconds: float
    seconds: list[float]
    calibrated: bool
    busy: float
    layers: list[int]  # traced, of the model
    fast: list[str]
    terms: dict[str, int]


class _Enough(Exception):
    """Raised after the last step."""


class _Meter:
    """Peak bytes allocated by torch on `device` between `begin` and `end`, including parameters and buffers."""

    def __init__(self, device: torch.device, model: torch.nn.Module) -> None:
        self.device, self.cuda = device, device.type == "cuda"
        tensors = [*model.parameters(), *model.buffers()]
        self.base = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
        self.bytes = 0
        self.reserved: int | None = None
        self._profile: Any = None

    def begin(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self._profile.start()

    def end(self) -> None:
        if self.cuda:
            self.bytes = torch.cuda.max_memory_allocated(self.device)
            self.reserved = torch.cuda.max_memory_reserved(self.device)
            return
        self._profile.stop()
        events = self._profile.profiler.kineto_results.events()
        changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
        now = self.base
        for _, change in changes:
            now += change
            self.bytes = max(self.bytes, now)
        self._profile = None


def measured(
    recipe: Recipe, device: torch.device, steps: Steps, folder: Path, tick: Callable[[float], None]
) -> tuple[_Meter, list[float], float, list[str]]:
    """(memory, seconds of the timed steps, share of the machine used by other programs, lines on the patches)."""
    from finetune.assembly import assemble
    from finetune.bench.qlora import Bystanders

    run_dir = RunDir(folder)
    run_dir.path.mkdir(exist_ok=True)
    assembly = assemble(recipe, device, run_dir.path, {"eval_steps": None})
    meter = _Meter(device, assembly.built.model)
    seconds: list[float] = []
    warm, last = steps.profiled + steps.warm, steps.profiled + steps.warm + steps.timed
    began, bystanders = 0.0, Bystanders([])

    def now() -> float:
        if meter.cuda:
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def before(step: int) -> None:
        nonlocal began, bystanders
        if step == 1:
            meter.begin()
        elif step == steps.profiled + 1:
            meter.end()
        if step == warm + 1:
            bystanders = Bystanders([])
        tick((step - 1) / last)
        if step > last:
            raise _Enough
        began = now()

    def after(step: int) -> dict[str, Any]:
        if step > warm:
            seconds.append(now() - began)
        return {}

    with suppress(_Enough):
        assembly.train(run_dir, last + 1, before_step=before, after_step=after)
    busy = bystanders.share()
    assembly.patches.remove()
    return meter, seconds, busy, assembly.patches.in_words()


def found_of(
    case: Case, folder: Path, device: torch.device, steps: Steps, tick: Callable[[float], None] = lambda _: None
) -> Found:
    """Measure a case, then plan it as `finetune plan` does."""
    from finetune.planning import estimate
    from finetune.planning.devices import present

    here = present(device)  # with its saved calibration
    recipe = recipe_of(case, folder, device.type)
    with tempfile.TemporaryDirectory(dir=folder) as own:
        meter, seconds, busy, fast = measured(recipe, device, steps, Path(own) / "run", tick)
        gc.collect()
        plan = estimate.fresh_plan(recipe, case.name, here)
    terms = plan.phase("train").terms
    tensors = sum(size for name, size in terms.items() if name not in ("context", "fragmentation"))
    return {
        "case": case.name,
        "planned_bytes": tensors,
        "measured_bytes": meter.bytes,
        "planned_reserved": tensors + terms.get("fragmentation", 0) if meter.reserved is not None else None,
        "reserved_bytes": meter.reserved,
        "planned_seconds": plan.step_seconds,
        "seconds": seconds,
        "calibrated": here.measured is not None,
        "busy": busy,
        "layers": [plan.traced["layers"], plan.traced["of"]],
        "fast": fast,
        "terms": terms,
    }


def child(out: int, spec: str) -> None:
    """Measure the case in `spec`, JSON of {"case", "folder", "device", "steps"}. Writes {"part": 0 to 1} now and then, and at the
    end {"found": …}."""  # fmt: skip
    follow()
    given = json.loads(spec)

    def say(**message: Any) -> None:
        os.write(out, (json.dumps(message) + "\n").encode())

    case, steps = Case(**given["case"]), Steps(**given["steps"])
    say(found=found_of(case, Path(given["folder"]), torch.device(given["device"]), steps, lambda part: say(part=part)))


# ------------------------------------------------------------------------------------------------------------------ the grid


class Lost(Exception):
    """A case failed; the message is the end of its output."""


def in_a_child(
    case: Case, folder: Path, device: str, steps: Steps, tick: Callable[[float], None], *, cache: Path | None = None
) -> Found:
    """Run a case in a process of its own, which ends with this one. cache: replaces the user's cache folder.

    Raises:
        Lost: it failed.
    """
    from finetune.bench.qlora import QUIET

    spec = {"case": asdict(case), "folder": str(folder), "device": device, "steps": asdict(steps)}
    environment = os.environ | QUIET | {"TMPDIR": str(folder)} | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
    environment |= {} if cache is None else {"XDG_CACHE_HOME": str(cache)}
    # -P: modules in the user's folder are not imported
    command = [sys.executable, "-P", "-m", "finetune.bench.plan", json.dumps(spec)]
    result = None
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, encoding="utf-8", env=environment
        )
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            for line in process.stdout:
                message = json.loads(line)
                if "part" in message:
                    tick(message["part"])
                else:
                    result = message["found"]
            code = process.wait()
        finally:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()
        if code or result is None:
            log.seek(0)
            raise Lost(f"exit code {code}: {log.read()[-2000:].strip()}")
    return result


def grid(
    device: str, show: Callable[[int, int, str], None], cases: list[Case] | None = None, steps: Steps = Steps()
) -> tuple[list[Found], dict[str, str]]:
    """Results of all cases, and the reasons of those that failed."""
    cases = CASES if cases is None else cases
    progress = Progress([SHARE[case.size] for case in cases])
    found, failed = [], {}
    with tempfile.TemporaryDirectory(prefix="finetune-bench-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        show(0, 100, "tokenizer and rows")
        make_data(folder)
        for case in cases:
            progress.begin(SHARE[case.size])

            def tick(part: float, case: Case = case) -> None:
                show(progress.percent(part), 100, case.name)

            tick(0.0)
            try:
                found.append(in_a_child(case, folder, device, steps, tick))
            except Lost as why:
                failed[case.name] = str(why)
            progress.end(case.name not in failed)
    return found, failed


# -------------------------------------------------------------------------------------------------------------- rows and table


def _row(case: str, unit: str, ours: float, baseline: float, bounds: tuple[float, float] | None, **more: Any) -> Row:
    """A row with bounds on ours / baseline; the target is the bound on the ratio's side of 1."""
    ratio = ours / baseline
    below = ratio < 1
    return {
        "case": case, "ours": ours, "baseline": baseline, "ratio": ratio, "unit": unit,
        "target": None if bounds is None else bounds[0] if below else bounds[1], "better": "higher" if below else "lower",
        "low": None, "high": None, "pairs": 0, "met": None if bounds is None else bounds[0] <= ratio <= bounds[1],
        "against": "measured", "backend": None, "note": "",
    } | more  # type: ignore[return-value]  # fmt: skip


def _summary(case: str, ours: float, allowed: float, *, higher: bool = False, unit: str = "%") -> Row:
    met = ours >= allowed if higher else ours <= allowed
    better = "higher" if higher else "lower"
    return _row(case, unit, ours, allowed, None, target=1.0, better=better, met=met, against="allowed")


def rows(found: list[Found], device: str) -> list[Row]:
    """Planned (ours) against measured (baseline) for each case, then summaries against the allowed errors."""
    all_rows: list[Row] = []
    quantities = [("memory", "planned_bytes", "measured_bytes")]
    quantities += [("reserved", "planned_reserved", "reserved_bytes")] if device == "cuda" else []
    under, over = (UNDER, OVER) if device == "cpu" else (OVER_CUDA, OVER_CUDA)
    for name, planned, measured_key in quantities:
        own = [
            _row(f"{one['case']}: {name}", "MiB", one[planned] / MIB, one[measured_key] / MIB, (1 - under, 1 + over))  # type: ignore[literal-required]
            for one in found
        ]
        errors = [(row["ratio"] or 0.0) - 1 for row in own]
        all_rows += own
        all_rows.append(_summary(f"{name}: median error", 100 * statistics.median(map(abs, errors)), 100 * MEDIAN))
        all_rows.append(_summary(f"{name}: worst error", 100 * max(map(abs, errors)), 100 * max(under, over)))
        all_rows.append(_summary(f"{name}: worst below", 100 * max(0.0, -min(errors)), 100 * under))
    calibrated = all(one["calibrated"] for one in found)
    for one in found:
        ratio, low, high = interval([one["planned_seconds"] / seconds for seconds in one["seconds"]])
        bounds = (1 - LATE, 1 + LATE) if calibrated else None
        row = _row(f"{one['case']}: time", "s/step", one["planned_seconds"], one["planned_seconds"] / ratio, bounds)
        note = "" if calibrated else UNCALIBRATED
        all_rows.append(row | {"low": low, "high": high, "pairs": len(one["seconds"]), "note": note})
    if calibrated:
        right = sum(bool(row["met"]) for row in all_rows if row["unit"] == "s/step")
        all_rows.append(_summary(f"time: within {LATE:.0%}", right, min(TIMED, len(found)), higher=True, unit="cases"))
    return all_rows


UNCALIBRATED = "planned with the table of devices; run finetune bench device to measure this machine"


def show(found: list[Found], made: list[Row], device: str, screen: Any) -> None:
    """Print a line per case, then the summary."""
    from rich.table import Table

    of = {row["case"]: row for row in made}
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("case")
    for column in (
        "planned\nMiB",
        "measured",
        "off",
        *(["reserved\noff"] if device == "cuda" else []),
        "planned\ns/step",
        "measured",
        "off",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for one in found:
        cells = []
        for name, digits in (("memory", 1), ("reserved", 1), ("time", 3)):
            if (row := of.get(f"{one['case']}: {name}")) is None:
                continue
            amounts = [f"{value:,.{digits}f}" for value in (row["ours"], row["baseline"])]
            off = f"{(row['ratio'] or 0.0) - 1:+.{2 if name != 'time' else 0}%}" + ("" if row["met"] in (True, None) else " !")
            cells += [off] if name == "reserved" else [*amounts, off]
        table.add_row(one["case"], *cells)
    screen.console.print(table, soft_wrap=False)
    for row in made:
        if row["against"] == "allowed":
            sign = "≥" if row["better"] == "higher" else "≤"
            verdict = f"{sign} {row['baseline']:g}: {'met' if row['met'] else 'missed'}"
            screen.say(f"{row['case']}: {row['ours']:.3g} {row['unit']} ({verdict})")


def plan_command(json_file: Path | None, screen: Any) -> None:
    """Measure and plan all cases on the device that a run uses, show them, and write `json_file`.

    Raises:
        RuntimeError: every case failed.
    """
    import signal

    from finetune import provenance
    from finetune.bench.qlora import BUSY
    from finetune.files import write_json
    from finetune.models.device import pick_device

    device = pick_device("auto")
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: removes folders and ends processes
    try:
        with screen.phase(f"plan on {device.type}") as progress:
            found, failed = grid(device.type, progress)
    finally:
        signal.signal(signal.SIGTERM, before)
    if not found:
        raise RuntimeError("\n".join(f"{case}: {why}" for case, why in failed.items()))
    all_rows = rows(found, device.type)
    show(found, all_rows, device.type, screen)
    screen.say("off: planned / measured - 1; !: outside the target")
    for case, why in failed.items():
        screen.warn(f"{case} failed: {why}")
    if not all(one["calibrated"] for one in found):
        screen.warn(UNCALIBRATED)
    if busy := [f"{one['case']} ({one['busy']:.0%})" for one in found if one["busy"] > BUSY]:
        screen.warn(f"other programs used this machine while these cases were timed: {', '.join(busy)}")
    if json_file is not None:
        collected = provenance.collect(device, 0, " ".join(sys.argv))
        write_json(json_file, {"name": "plan", "rows": all_rows, "cases": found, "failed": failed, "provenance": collected})
        screen.say(f"written to {json_file}")


if __name__ == "__main__":
    own = os.dup(1)
    os.dup2(2, 1)
    try:
        child(own, sys.argv[1])
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(130)
