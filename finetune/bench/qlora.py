"""`finetune bench qlora`: LoRA training with this suite and with TRL, PEFT and bitsandbytes, step by step in turn.

Both train the same model on the same rows in the same order, with the same adapters, initial weights, optimizer, learning rate
(constant) and batch, each in a process of its own (side.py) with all cores; one computes at a time, in turn. A ratio is taken
within a pair of steps; the table has the median and its bootstrap interval (measure.py). The first steps, which compile and grow
allocators, do not count. Tokens do not include padding.

With packing each side packs in its own way, so the pairs hold different samples, and rates are compared, not losses.
The matrix products of the linears alone, a lower bound of a step's time, are timed in the same turns: the ceiling.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from eval.perplexity import LossResult, paired_difference
from finetune import provenance
from finetune.bench import baselines
from finetune.bench.child import Progress, flags
from finetune.bench.measure import Row, interval
from finetune.errors import UserError
from finetune.memory import free_bytes
from finetune.recipe import Recipe, dump_recipe, find_recipe, locator, read_recipe
from finetune.run_dir import absolute
from finetune.screen import Screen, Shown
from finetune.sources import check_sources
from finetune.units import GIB, MIB, human_bytes

DEFAULT = Path(__file__).parent / "qlora.yaml"
# Default recipe: four rows of at most 256 tokens; packed, one sequence of 1,024. Other recipes set both themselves.
MODES = {"unpacked": "data.packing=false", "packed": "data.packing=true"}
DEFAULT_PACKED = ["data.max_length=1024", "train.micro_batch=1"]
FASTER, LEANER, CEILING, ALIKE, FASTER_LARGE = 3.0, 0.5, 0.4, 0.01, 1.3  # the targets
QUIET = {"TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1"}
BUSY = 0.05  # share of the machine that other programs may use without a warning
LEAST = 2  # steps that must remain to compare


@dataclass(frozen=True)
class Sizes:
    """steps, pairs: steps of each side, unpacked (the loss curves) and packed, of which the first `warm_up` do not count.

    large: the configuration of a Llama with random codes; None skips it. card_gib: memory of a GPU that each side may use.
    """

    steps: int = 30
    pairs: int = 11
    warm_up: int = 3
    large: dict[str, int] | None = field(
        default_factory=lambda: {  # Llama-2-7B
            "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 32, "vocab_size": 32000,
        }
    )  # fmt: skip
    large_length: int = 512
    large_pairs: int = 6
    large_warm_up: int = 1
    card_gib: float | None = None


SIZES = Sizes()


@dataclass(frozen=True)
class Opponent:
    """TRL, PEFT and bitsandbytes in one of their settings. name: in the table, at most 23 letters.
    as_ours: checkpointing as in the recipe, and adapters in the precision of ours; else TRL's defaults:
    it recomputes, and casts the adapters of a quantized base to bf16, in which AdamW loses part of each update.
    """

    name: str
    environment: dict[str, str]
    as_ours: bool


TUNED = Opponent("TRL, tuned", baselines.TUNED_ALLOCATOR, as_ours=True)
ALLOCATOR = Opponent("TRL, allocator tuned", baselines.TUNED_ALLOCATOR, as_ours=False)
DOCUMENTED = Opponent("TRL as documented", {}, as_ours=False)


@dataclass
class Result:
    rows: list[Row] = field(default_factory=list)
    contests: dict[str, dict[str, list[dict[str, Any]]]] = field(default_factory=dict)  # contest → side → answers, by step
    others: dict[str, float] = field(default_factory=dict)  # contest → share of the machine's cores used by other programs
    place: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, contest: Contest) -> None:
        self.contests[name], self.others[name] = contest.answers, contest.others

    @property
    def curves(self) -> dict[str, dict[str, list[float]]]:
        """contest → side → mean loss (nats per trained token) of each step, for the sides that train."""
        return {
            name: {side: [step["loss"] for step in steps] for side, steps in sides.items() if side != "ceiling"}
            for name, sides in self.contests.items()
        }


# ------------------------------------------------------------------------------------------------------------------ recipes


def recipes(name: str | None, overrides: list[str]) -> dict[str, Recipe]:
    """The recipe `name`, or the default one, in both modes.

    Raises:
        UserError: unknown recipe, a wrong key, or a setting that the other libraries do not support.
    """
    path = DEFAULT if name is None else find_recipe(name)
    recipe = read_recipe(path, overrides)
    check_sources(recipe, str(path), locator(path, overrides))
    _require_comparable(recipe, str(path))
    by_mode = {}
    for mode, setting in MODES.items():
        own = DEFAULT_PACKED if name is None and mode == "packed" else []
        by_mode[mode] = absolute(read_recipe(path, [*own, *overrides, setting]))
    return by_mode


def _require_comparable(recipe: Recipe, where: str) -> None:
    """Raise UserError for settings that TRL, PEFT and bitsandbytes do not support."""
    for key, value, able, instead in (
        ("kind", recipe.kind, not recipe.streams_text, "sft"),
        ("adapter.kind", recipe.adapter.kind, recipe.base_frozen and recipe.mergeable, "lora"),
        ("quant.scheme", recipe.quant.scheme, recipe.quant.scheme in ("nf4", "none"), "nf4"),
        ("model.dtype", recipe.model.dtype, recipe.model.dtype != "fp16", "auto"),
    ):
        if not able:
            raise UserError(
                "this benchmark needs supervised fine-tuning of LoRA adapters, on an NF4 base or a float one",
                where=f"{where}, {key}", got=str(value), hint=f"set {key}={instead}, or use another recipe",
            )  # fmt: skip


# -------------------------------------------------------------------------------------------------------------------- sides


class Lost(Exception):
    """A side failed, or cannot run here; the message says why."""


class Side:
    """A process that trains and answers commands. It ends with this one, however this one ends."""

    def __init__(self, name: str, spec: dict[str, Any], environment: dict[str, str], folder: Path) -> None:
        self.name, self.folder = name, Path(tempfile.mkdtemp(dir=folder))
        self.log = open(self.folder / "log.txt", "w+", encoding="utf-8", errors="replace")  # noqa: SIM115  # closed by `close`
        path = self.folder / "spec.json"
        path.write_text(json.dumps(spec | {"folder": str(self.folder)}), encoding="utf-8")
        child_environment = QUIET | {"TMPDIR": str(self.folder)}
        if spec["device"] == "cpu":
            child_environment["CUDA_VISIBLE_DEVICES"] = ""  # else libraries put the model on the GPU
        # -P: modules in the user's folder are not imported
        command = [sys.executable, "-P", "-m", "finetune.bench.side", str(path)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, encoding="utf-8",
            env=os.environ | child_environment | environment,
        )  # fmt: skip
        self.pid = self.process.pid

    def receive(self) -> dict[str, Any]:
        """The next answer of the process.

        Raises:
            Lost: it cannot run here, or died. UserError: it raised one.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self.log.seek(0)
            raise Lost(f"{self.name} failed (exit code {code}):\n{self.log.read()[-4000:].strip()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise UserError(**answer["error"])
        if "skip" in answer:
            raise Lost(answer["skip"])
        return answer

    def ask(self, do: str, **more: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it is dead, and `receive` raises the reason
            self.process.stdin.write(json.dumps({"do": do, **more}) + "\n")
            self.process.stdin.flush()
        return self.receive()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.log):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()


class Stage:
    """The temporary folder and the settings that all sides share."""

    def __init__(self, folder: Path, device: str, card_gib: float | None) -> None:
        self.folder, self.common = folder, {"device": device, "card_gib": card_gib}

    @contextmanager
    def side(self, name: str, spec: dict[str, Any], environment: dict[str, str] | None = None) -> Iterator[Side]:
        side = Side(name, self.common | spec, environment or {}, self.folder)
        try:
            yield side
        finally:
            side.close()

    def run(self, name: str, spec: dict[str, Any]) -> None:
        """Run a side that only writes files."""
        with self.side(name, spec) as side:
            try:
                side.receive()
            except Lost as why:
                raise RuntimeError(str(why)) from None

    def write(self, recipe: Recipe) -> str:
        path = Path(tempfile.mkdtemp(dir=self.folder)) / "recipe.yaml"
        path.write_text(dump_recipe(recipe), encoding="utf-8")
        return str(path)


@dataclass
class Contest:
    """Results of one contest: answers by step and side, peak memory, held-out losses, and why sides are missing."""

    answers: dict[str, list[dict[str, Any]]]
    ready: dict[str, dict[str, Any]]
    bytes: dict[str, int] = field(default_factory=dict)
    memory_kind: str = ""
    held_out: dict[str, LossResult] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    others: float = 0.0  # share of the machine's cores used by other programs


class Bystanders:
    """Measures the share of the machine used by other programs than these processes and this one."""

    def __init__(self, pids: list[int]) -> None:
        self.pids, self.began = [os.getpid(), *pids], time.monotonic()
        self.busy, self.own = self._busy(), self._own()

    def _busy(self) -> float:
        times = psutil.cpu_times()
        return sum(getattr(times, kind, 0.0) for kind in ("user", "nice", "system", "irq", "softirq", "steal"))

    def _own(self) -> dict[int, float]:
        times = {}
        for pid in self.pids:
            with suppress(psutil.Error):
                times[pid] = sum(psutil.Process(pid).cpu_times()[:2])
        return times

    def share(self) -> float:
        now, seconds = self._own(), max(time.monotonic() - self.began, 1e-9)
        own = sum(now[pid] - self.own[pid] for pid in now.keys() & self.own.keys())
        return max(0.0, (self._busy() - self.busy - own) / seconds / (psutil.cpu_count() or 1))


def contest(
    stage: Stage,
    recipe: Recipe,
    opponents: list[Opponent],
    *,
    steps: int,
    warm_up: int,
    tick: Callable[[float], None],
    ceiling: bool = False,
    evaluate: bool = False,
) -> Contest:
    """Run steps of ours and of each opponent in turn.

    Raises:
        UserError: the recipe has too little data, or it cannot be read. RuntimeError: our side failed, or the sides did not get
            the same work.
    """
    share = Path(tempfile.mkdtemp(dir=stage.folder))
    result = Contest({}, {})
    with ExitStack() as stack:
        spec = {"side": "ours", "recipe": stage.write(recipe), "share": str(share), "steps": steps}
        sides = {"ours": stack.enter_context(stage.side("ours", spec))}
        result.ready["ours"] = ready = _of_ours(sides["ours"].receive)["ready"]
        counts = ready["counts"]
        if len(counts) < warm_up + LEAST:
            raise UserError(
                "too few rows for this benchmark", where="data", got=f"{len(counts)} complete steps",
                hint=f"provide rows for at least {warm_up + LEAST}, or a smaller train.micro_batch or train.accumulation",
            )  # fmt: skip
        others: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
            one.name: ({"side": "plain", "share": str(share), "as_ours": one.as_ours}, one.environment) for one in opponents
        }
        if ceiling:
            others["ceiling"] = {"side": "ceiling", "share": str(share)}, baselines.TUNED_ALLOCATOR
        starting = {name: stack.enter_context(stage.side(name, *what)) for name, what in others.items()}
        for name, side in starting.items():
            try:
                result.ready[name] = side.receive()["ready"]
                sides[name] = side
            except Lost as why:
                result.missing[name] = _short(str(why))
        result.answers = {name: [] for name in sides}
        bystanders = Bystanders([side.pid for side in sides.values()])
        for turn, (tokens, trained) in enumerate(counts):
            for name in list(sides) if turn % 2 else list(reversed(sides)):
                if name == "ours":
                    answer = _of_ours(lambda: sides["ours"].ask("step"))
                else:
                    try:
                        answer = sides[name].ask("step", tokens=tokens, trained=trained)
                    except Lost as why:
                        result.missing[name] = _short(str(why))
                        del sides[name], result.answers[name]
                        continue
                if (name == "ours" or not recipe.data.packing) and (answer["tokens"], answer["trained"]) != (tokens, trained):
                    got = f"{answer['tokens']} tokens, {answer['trained']} trained; expected {tokens}, {trained}"
                    raise RuntimeError(f"step {turn + 1} of {name} was not the same work: {got}")
                result.answers[name].append(answer)
            tick((turn + 1) / len(counts))
        result.others = bystanders.share()
        for name in [name for name in sides if name != "ceiling"]:
            peak = sides[name].ask("peak")
            result.bytes[name], result.memory_kind = peak["bytes"], peak["kind"]
        if evaluate and ready["held_out"]:
            for name in result.bytes:
                result.held_out[name] = _loss_result(sides[name].ask("evaluate"))
    return result


def _of_ours(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return call()
    except Lost as why:
        raise RuntimeError(str(why)) from None


def _short(why: str) -> str:
    """The failure of a side as a note: its first line and the last one of a traceback."""
    lines = why.splitlines()
    return lines[0] if len(lines) == 1 else f"{lines[0].rstrip(':')}: {lines[-1][:300]}"


def _loss_result(answer: dict[str, Any]) -> LossResult:
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in answer.items()}
    return LossResult(**values)


# --------------------------------------------------------------------------------------------------------------------- rows


def _row(case: str, against: str, unit: str, target: float | None, *, higher: bool, note: str) -> Row:
    return {
        "case": case, "ours": None, "baseline": None, "ratio": None, "unit": unit, "target": target,
        "better": "higher" if higher else "lower", "low": None, "high": None, "pairs": 0, "met": None, "against": against,
        "backend": None, "note": note,
    }  # fmt: skip


def _judged(row: Row) -> Row:
    if row["target"] is not None and row["ratio"] is not None:
        row["met"] = row["ratio"] >= row["target"] if row["better"] == "higher" else row["ratio"] <= row["target"]
    return row


def _skipped(row: Row, why: str) -> Row:
    row["note"] = f"skipped: {why}"
    return row


def _rates(steps: list[dict[str, Any]], warm_up: int) -> list[float]:
    return [step["tokens"] / step["seconds"] for step in steps[warm_up:]]


def speed_row(case: str, against: str, held: Contest, side: str, *, target: float | None, warm_up: int, note: str) -> Row:
    """Tokens per second of ours and of `side`, without padding, by pairs of steps."""
    row = _row(case, against, "tokens/s", target, higher=True, note=note)
    if side not in held.answers:
        return _skipped(row, held.missing.get(side, "it did not run"))
    ours, theirs = _rates(held.answers["ours"], warm_up), _rates(held.answers[side], warm_up)
    row["ratio"], row["low"], row["high"] = interval([a / b for a, b in zip(ours, theirs, strict=True)])
    row["ours"], row["baseline"], row["pairs"] = statistics.median(ours), statistics.median(theirs), len(ours)
    row["backend"] = held.ready["ours"]["backend"]
    return _judged(row)


def memory_row(case: str, against: str, held: Contest, side: str, *, target: float | None, note: str) -> Row:
    row = _row(case, against, "MiB", target, higher=False, note=note)
    if side not in held.bytes:
        return _skipped(row, held.missing.get(side, "it did not run"))
    row["ours"], row["baseline"] = held.bytes["ours"] / MIB, held.bytes[side] / MIB
    row["ratio"], row["backend"] = held.bytes["ours"] / held.bytes[side], held.ready["ours"]["backend"]
    return _judged(row)


def loss_row(held: Contest, side: str, *, note: str) -> Row:
    """The held-out losses after the same number of steps; the target is for their difference, not their ratio."""
    row = _row("held-out loss", side, "nats", ALIKE, higher=False, note=note)
    if side not in held.held_out:
        return _skipped(row, held.missing.get(side, "there are no held-out rows"))
    ours, theirs = held.held_out["ours"], held.held_out[side]
    difference, error = paired_difference(theirs, ours)
    row["ours"], row["baseline"], row["ratio"] = ours.loss, theirs.loss, abs(difference)
    row["backend"] = held.ready["ours"]["backend"]
    row["note"] += f"; here the third column is |ours − theirs|, {difference:+.4f} ± {error:.4f} over {ours.rows} rows"
    return _judged(row)


# ------------------------------------------------------------------------------------------------------------- the benchmark


def bench(modes: dict[str, Recipe], sizes: Sizes, device: str, show: Shown, *, large: bool) -> Result:
    """Run all contests on `device`. large: also the model of random codes.

    Raises:
        UserError, RuntimeError: as `contest`.
    """
    result = Result()
    shares = 7.0 * sizes.steps, 10.0 * sizes.pairs, 85.0 * sizes.large_pairs * large  # seconds on two cores, with loading
    progress = Progress(list(shares))

    def tick(note: str) -> Callable[[float], None]:
        return lambda part: show(progress.percent(part), 100, note)

    with tempfile.TemporaryDirectory(prefix="finetune-bench-", ignore_cleanup_errors=True) as name:
        stage = Stage(Path(name), device, sizes.card_gib)
        first = modes["unpacked"]
        adapter = "QLoRA" if first.quant.scheme == "nf4" else "LoRA"
        missing = baselines.missing_for_qlora(first.quant.scheme == "nf4")
        opponents = [] if missing else [TUNED, ALLOCATOR, DOCUMENTED]
        absent = {} if missing is None else dict.fromkeys((TUNED.name, ALLOCATOR.name, DOCUMENTED.name), missing)
        progress.begin(shares[0])
        show(0, 100, "loading")
        modes = _in_folders(stage, modes)

        unpacked = contest(
            stage, modes["unpacked"], opponents, steps=sizes.steps, warm_up=sizes.warm_up, tick=tick("unpacked"), evaluate=True
        )
        unpacked.missing |= absent
        progress.end(True)
        note = _describe(modes["unpacked"], unpacked)
        result.add("unpacked", unpacked)
        for one, target, memory_target in ((TUNED, FASTER, LEANER), (ALLOCATOR, FASTER, None), (DOCUMENTED, None, None)):
            about = f"{note}; {_about(one, modes['unpacked'], unpacked)}"
            result.rows += [
                speed_row(f"{adapter} step", one.name, unpacked, one.name, target=target, warm_up=sizes.warm_up, note=about),
                memory_row("peak memory", one.name, unpacked, one.name, target=memory_target, note=about),
            ]
        after = f"after {len(unpacked.answers['ours'])} steps, constant learning rate {first.train.lr:g}"
        result.rows.append(loss_row(unpacked, TUNED.name, note=after))

        progress.begin(shares[1])
        packed = contest(
            stage, modes["packed"], opponents[:2], steps=sizes.pairs, warm_up=sizes.warm_up, tick=tick("packed"), ceiling=True
        )
        packed.missing |= absent
        progress.end(True)
        result.add("packed", packed)
        note = _describe(modes["packed"], packed)
        dtype = {"bfloat16": "bf16", "float32": "fp32"}[packed.ready["ours"]["dtype"]]
        bare = f"{note}; theirs: the bare {dtype} products of all linears, forward and for their inputs, and of the head"
        for one, memory_target in ((TUNED, LEANER), (ALLOCATOR, None)):
            name, about = one.name, f"{note}; {_about(one, modes['packed'], packed)}"
            result.rows += [
                speed_row(f"{adapter} step, packed", name, packed, name, target=FASTER, warm_up=sizes.warm_up, note=about),
                memory_row("peak memory, packed", name, packed, name, target=memory_target, note=about),
            ]
        result.rows.append(
            speed_row(
                "share of the ceiling", f"{dtype} products", packed, "ceiling", target=CEILING, warm_up=sizes.warm_up, note=bare
            )
        )
        if large and sizes.large is not None:
            progress.begin(shares[2])
            result.rows += _large(stage, first, sizes, tick("7B-shaped"), result, missing)
            progress.end(True)
        result.place = _place(device, unpacked.ready["ours"], unpacked.memory_kind) | {"others": result.others}
    return result


def _in_folders(stage: Stage, modes: dict[str, Recipe]) -> dict[str, Recipe]:
    """The recipes, with a GGUF converted to a folder once, because bitsandbytes cannot quantize a GGUF while loading it."""
    from finetune.models.source import source_of

    if source_of(modes["unpacked"].model).gguf is None:
        return modes
    out = str(stage.folder / "model")
    stage.run("reading the GGUF", {"side": "float", "recipe": stage.write(modes["unpacked"]), "out": out})
    return {
        mode: recipe.model_copy(update={"model": recipe.model.model_copy(update={"name": out})}) for mode, recipe in modes.items()
    }


def _large(
    stage: Stage, like: Recipe, sizes: Sizes, tick: Callable[[float], None], result: Result, missing: str | None
) -> list[Row]:
    """A model of the size of a 7B with random codes and the adapters of `like`. TRL recomputes activations, its default.

    Ours keeps them: at this length that takes little more memory than recomputing (Llama-2-7B: 7.7 and 6.7 GiB).
    """
    shape, length = sizes.large or {}, sizes.large_length
    size = f"{shape['hidden_size']} × {shape['num_hidden_layers']}"
    note = f"a Llama of {size}, random NF4 codes, {length} tokens per step; theirs recomputes activations, ours keeps them"
    rows = [
        _row("7B-shaped step", ALLOCATOR.name, "tokens/s", FASTER_LARGE, higher=True, note=note),
        _row("7B-shaped peak memory", ALLOCATOR.name, "MiB", None, higher=False, note=note),
    ]
    why = missing or _no_room(stage, shape)
    if why is not None:
        return [_skipped(row, why) for row in rows]
    out = stage.folder / "large"
    stage.run("a model", {"side": "random", "shape": shape, "rows": sizes.large_pairs, "length": length, "out": str(out)})
    recipe = Recipe.model_validate(
        {
            "model": {"name": str(out), "dtype": "bf16"}, "quant": {"scheme": "nf4"}, "adapter": like.adapter.model_dump(),
            "data": {"path": str(out / "rows.jsonl"), "format": "text", "max_length": length, "heldout": 0, "packing": False},
            "train": {"lr": like.train.lr}, "run": like.run.model_dump(),
        }
    )  # fmt: skip
    other = ALLOCATOR.name
    held = contest(stage, recipe, [ALLOCATOR], steps=sizes.large_pairs, warm_up=sizes.large_warm_up, tick=tick)
    result.add("large", held)
    return [
        speed_row(rows[0]["case"], other, held, other, target=FASTER_LARGE, warm_up=sizes.large_warm_up, note=note),
        memory_row(rows[1]["case"], other, held, other, target=None, note=note),
    ]


def _no_room(stage: Stage, shape: dict[str, int]) -> str | None:
    """Why two models of this shape do not fit here; None if they do."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    kept = shape["num_key_value_heads"] / shape["num_attention_heads"]
    linears = shape["num_hidden_layers"] * ((2 + 2 * kept) * hidden**2 + 3 * hidden * inner)
    stored = 0.52 * linears + 2 * 2 * hidden * shape["vocab_size"]
    need = 2 * (stored + 2.5 * GIB * hidden / 4096)  # two sides, each with activations, adapters and libraries
    free = free_bytes("cuda" if stage.common["device"] == "cuda" else "cpu")
    if free < need:
        return f"two models of this size need about {human_bytes(need)} of memory; {human_bytes(free)} are free"
    disk = shutil.disk_usage(stage.folder).free
    if disk < 1.1 * stored:
        return f"its weights need {human_bytes(stored)} of disk; {human_bytes(disk)} are free in {stage.folder.parent}"
    return None


def _describe(recipe: Recipe, held: Contest) -> str:
    ready, data, train, adapter = held.ready["ours"], recipe.data, recipe.train, recipe.adapter
    rows = f"{train.micro_batch} row{'s' if train.micro_batch > 1 else ''}"
    packed = f"packed to {data.max_length}" if data.packing else f"of ≤ {data.max_length} tokens"
    many = f" × {train.accumulation}" if train.accumulation > 1 else ""
    return (
        f"{ready['architecture']}, {ready['parameters'] / 1e6:.0f} M parameters, r = {adapter.rank} on {ready['adapters']} "
        f"linears, {rows} {packed}{many} a step"
    )


def _about(one: Opponent, recipe: Recipe, held: Contest) -> str:
    """A description of an opponent for the notes."""
    adapters = held.ready.get(one.name, {}).get("adapters")
    of = "" if adapters is None else f", adapters in {adapters}"
    if one.as_ours:
        recomputed = "recomputing activations as ours does" if recipe.train.checkpointing else "no recomputation, as ours"
        return f"theirs: allocator tuned, {recomputed}{of}, as ours"
    allocator = "allocator tuned" if one.environment else "default allocator"
    return f"theirs: TRL's defaults (it recomputes activations{of}), {allocator}"


def _place(device: str, ready: dict[str, Any], memory_kind: str) -> dict[str, Any]:
    """A description of the environment and the method."""
    torch.set_num_threads(ready["threads"])
    name = provenance.device_name(torch.device(device))
    return {
        "device": name, "threads": ready["threads"], "flags": flags() if device == "cpu" else [],
        "capability": torch.backends.cpu.get_cpu_capability(), "load_average": os.getloadavg(),
        "versions": provenance.versions((*provenance.PACKAGES, "trl", "pyarrow")), "allocator": baselines.TUNED_ALLOCATOR,
        "backends": {"ours": f"{ready['backend']}; {'; '.join(ready['fast']) or 'no patches'}"},
        "method": f"{name}; steps in alternating order, one side at a time, wall time, medians of pairs; memory: {memory_kind}, "
        "peak since before the first step; [95 %] is the noise within this run: another run, or a busy machine, can be "
        "outside it",
    }  # fmt: skip


def show_curves(curves: dict[str, list[float]], screen: Screen) -> None:
    """Print the losses of the sides, every fifth step."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("step", justify="right")
    for name in curves:
        table.add_column("loss, ours" if name == "ours" else name, justify="right")
    steps = len(curves["ours"])
    for step in sorted({1, *range(5, steps + 1, 5), steps}):
        table.add_row(str(step), *(f"{losses[step - 1]:.4f}" for losses in curves.values()))
    screen.console.print(table, soft_wrap=False)
