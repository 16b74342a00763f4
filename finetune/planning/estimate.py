"""A recipe on a device → its Plan: traced memory of each phase, time of what is computed, energy.

What is the same for every number: weights from shapes (exact), training and evaluation from the trace of the recipe's own step
(finetune/planning/trace.py), context and the allocator's waste from the device. Time is the work of that trace at the device's
rates, plus the host's part of each operation; on a card the longer of the two, since it does not wait for the host.

A plan is kept (~/.cache/finetune12g/plans) by the recipe, the device, the program's sources and the versions of its libraries.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from finetune.data.packing import MULTIPLE
from finetune.errors import GateError
from finetune.files import write_json
from finetune.models.architecture import architecture_of
from finetune.models.config import load_config, load_tokenizer, new_config
from finetune.models.precision import autocast_dtype, default_dtype, weights_dtype
from finetune.models.source import Source, find_model, find_tokenizer, source_of
from finetune.planning import hub_metadata, local
from finetune.planning.data import Facts, facts_of
from finetune.planning.devices import Device
from finetune.planning.result import Phase, Plan
from finetune.planning.step import DeviceSpec, Static, Traced, trace
from finetune.planning.trace import Trace, Work
from finetune.recipe import Recipe
from finetune.train.fast.patching import WORTH_COMPILING
from finetune.units import human_bytes

DISK = 0.7e9  # bytes/s, read or written: a SATA disk's; NVMe is several times faster
LINK = {"memory": 12e9, "disk": DISK}  # bytes/s to the device of layers that stream: PCIe 4.0 by 8 lanes, as laptops have it
# Of the process on a CPU: glibc keeps what is freed, in pieces (as much again as comes and goes), and oneDNN machine code and
# rearranged weights for each length of rows. Measured on the quickstart: 616 MB beside tensors and libraries.
WASTE_CPU, LENGTH_CPU = 1.0, 20 << 20
# What torch has cuBLAS work in, counted as allocated: ":4096:2:16:8" of CUBLAS_WORKSPACE_CONFIG, on Hopper ":4096:8".
CUBLAS, CUBLAS_HOPPER = 8_519_680, 32 << 20
WASTE = 0.04  # of what comes and goes: blocks that CUDA's allocator cannot use for the next size. Assumed, not measured here.


MOST_KEPT = 200  # plans


def plan(
    recipe: Recipe,
    name: str,
    device: Device,
    *,
    budget_bytes: int | None = None,
    material: Any = None,
    config: Any = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Plan:
    """What a run of `recipe` needs on `device`. material, config: of a run that has read its data and its model's configuration.

    Raises:
        UserError: the configuration of the model cannot be had, or the device cannot compute what the recipe asks for.
    """
    budget = device.memory_bytes if budget_bytes is None else budget_bytes
    source = source_of(recipe.model)
    key = _key(recipe, device, material, config)
    saved = _kept(key)
    if saved is None:
        if progress is not None:
            progress(0, 1, "tracing a step")
        saved = _plan(recipe, name, device, source, material, config)
        _keep(key, saved)
    return local.corrected(replace(saved, recipe=name, budget_bytes=budget, price_per_kwh=recipe.plan.price_per_kwh), recipe)


def fresh_plan(recipe: Recipe, name: str, device: Device) -> Plan:
    """A plan that is neither kept nor corrected by what runs have said: for whoever measures how good plans are."""
    return _plan(recipe, name, device, source_of(recipe.model), None, None)


# ----------------------------------------------------------------------------------------------------------------- the cache


@cache
def _program() -> str:
    """Of everything that a plan depends on but the recipe: sources and versions."""
    import peft
    import transformers

    digest = hashlib.sha256(f"{torch.__version__} {transformers.__version__} {peft.__version__}".encode())
    for package in (Path(__file__).parent.parent, Path(__file__).parent.parent.parent / "quant"):
        for path in sorted(package.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _key(recipe: Recipe, device: Device, material: Any, config: Any) -> str:
    said = recipe.model_dump(mode="json", exclude={"run", "about", "plan", "fit"}) | {"seed": recipe.run.seed}
    data = None if material is None else material.digest
    models_named = [str(Path(name) / "config.json") for name in (recipe.model.name, recipe.distill.teacher) if name]
    files = [recipe.data.path, recipe.data.heldout_path, *models_named]
    stamps = [os.stat(path).st_mtime_ns if path and Path(path).exists() else None for path in files]
    told = [said, asdict(device), data, None if config is None else config.to_dict(), stamps, _program()]
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def _kept(key: str) -> Plan | None:
    try:
        return Plan.of_dict(json.loads((local.folder() / "plans" / f"{key[:32]}.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):  # none, or one that was cut off: it is made anew
        return None


def _keep(key: str, made: Plan) -> None:
    path = local.folder() / "plans" / f"{key[:32]}.json"
    try:
        write_json(path, asdict(made))
        for old in sorted(path.parent.glob("*.json"), key=lambda plan: plan.stat().st_mtime)[:-MOST_KEPT]:
            old.unlink(missing_ok=True)
    except OSError:  # a home that cannot be written to: the next plan takes a few seconds again
        return


# --------------------------------------------------------------------------------------------------------------- what is planned


def config_of(recipe: Recipe, source: Source) -> Any:
    """The model's configuration: from its source, or from planning/hub_metadata.py, which asks no hub."""
    if source.init_config is not None:
        config = load_config(source)
        config.vocab_size = source.init_config.get("vocab_size") or _vocabulary(recipe)
        return config
    if source.name in hub_metadata.CONFIGS and not source.local:
        return new_config(dict(hub_metadata.CONFIGS[source.name]))
    return load_config(source)


def _vocabulary(recipe: Recipe) -> int:
    name = recipe.tokenizer.name
    if name is None:
        return int(recipe.tokenizer.train)
    if name in hub_metadata.CONFIGS:
        return int(hub_metadata.CONFIGS[name]["vocab_size"])
    return len(load_tokenizer(find_tokenizer(name)))


def place_of(recipe: Recipe, device: Device, work: float) -> DeviceSpec:
    """Dtypes and compilation as a run on `device` has them."""
    kind = "cpu" if device.type == "cpu" else "cuda"
    low = default_dtype("cpu") if kind == "cpu" else torch.bfloat16 if "bf16" in device.rates else torch.float32
    dtype = weights_dtype(recipe, kind, low)
    compiled = recipe.fast.compile is True or (recipe.fast.compile == "auto" and work >= WORTH_COMPILING[kind])
    return DeviceSpec(kind, dtype, autocast_dtype(recipe, dtype, kind, low), compiled)


def _plan(recipe: Recipe, name: str, device: Device, source: Source, material: Any, config: Any) -> Plan:
    notes: list[str] = []
    config = config_of(recipe, source) if config is None else config
    facts = facts_of(recipe, source, material)
    notes += facts.notes
    info = architecture_of(source, config)
    spec = place_of(recipe, device, info.parameters * facts.steps * facts.tokens_per_step)
    teacher = None
    if recipe.distill.teacher is not None:
        of = find_model(recipe.distill.teacher, where="distill.teacher")
        teacher = (of, load_config(of))
    prompt = facts.prompt if facts.answers else 0
    reads = facts.evaluate or facts.micro
    try:
        with torch.random.fork_rng(devices=[]):  # a run that plans draws the same random numbers as one that finds its plan
            found = trace(recipe, source, config, spec, facts.micro, teacher=teacher, evaluate=reads, generate=prompt)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, KeyError, AttributeError) as error:
        said = str(error).strip().splitlines()
        raise Untraceable(
            f"a step of {info.architecture} cannot be traced without its numbers",
            where="plan",
            got=f"{type(error).__name__}: {said[0][:300] if said else ''}",
            hint="finetune run trains it without a plan",
        ) from error
    made = _Phases(recipe, device, spec, facts, found, config, teacher)
    phases = made.all()
    training = next(phase for phase in phases if phase.name == "train")
    # What is recomputed is no work of the model: its forward pass, and twice that backward, or once where weights are frozen.
    forward = flops_of(found.evaluate.work) / reads.tokens
    flops = forward * (2 if recipe.base_frozen else 3) * facts.mean_tokens * recipe.train.accumulation * facts.steps
    if recipe.twin:
        notes.append("the twin doubles the time; its memory is that of the same model in floats, which is not more")
    if device.measured is None:
        notes.append(f"times are from the vendor's figures of {device.name}; finetune bench device measures this machine's")
    kept = recipe.train.keep_checkpoints + recipe.train.save_best
    notes.append(
        f"a checkpoint takes {human_bytes(made.checkpoint())} of the disk, and {kept + 1} are there while one is written"
    )
    if device.type != "cpu":
        notes.append("memory of cards was not compared with a card yet; context and waste are assumptions")
    return Plan(
        name,
        device.key,
        device.memory_bytes,
        phases,
        found.static.parameters,
        found.static.trainable,
        facts.steps,
        facts.tokens_per_step,
        (training.seconds or 0.0) / max(1, facts.steps) / (2 if recipe.twin else 1),
        flops * (2 if recipe.twin else 1),
        device.watts,
        recipe.plan.price_per_kwh,
        notes,
        {
            "layers": found.layers[0],
            "of": found.layers[1],
            "uniform": found.uniform,
            "fast": found.fast,
            "operations": found.train.work[("operations",)] * recipe.train.accumulation,
            "busy_seconds": made.step_busy()[0] * recipe.train.accumulation,
            "update_seconds": made.step_busy()[1],
            "checkpoint_bytes": made.checkpoint(),
        },
    )


def flops_of(work: Work) -> float:
    """Of products and attention."""
    total = 0.0
    for key, count in work.items():
        if key[0] == "gemm":
            total += 2.0 * key[2] * key[3] * key[4] * count
        elif key[0].startswith("attention"):
            total += (5.0 if key[0].endswith("backward") else 2.0) * key[2] ** 2 * key[3] * key[4] * count
    return total


def seconds_of(work: Work, device: Device) -> float:
    """What the device takes for it, the host's part included."""
    return device.together(busy_seconds(work, device), work[("operations",)])


def busy_seconds(work: Work, device: Device) -> float:
    """What its arithmetic takes, each operation by itself."""
    busy = 0.0
    for key, count in work.items():
        if count <= 0:
            continue
        match key[0]:
            case "gemm":
                m, n, k = (max(1, round(size)) for size in key[2:5])
                busy += count * device.gemm_seconds(key[1], m, n, k, key[5])
            case "attention":
                busy += count * device.attention_seconds(*key[1:])
            case "attention backward":
                both, forward = (device.attention_seconds(*key[1:], backward=b) for b in (True, False))
                busy += count * max(0.0, both - forward)
            case "bytes":
                calls = max(1.0, work[("calls", *key[1:])])
                busy += calls * device.memory_seconds(count / calls, key[1], key[2])
            case "dequantize":
                busy += device.dequantize_seconds(key[1], round(count))
            case "quantize":
                busy += device.quantize_seconds(key[1], round(count))
    return busy


class Untraceable(GateError):
    """The step of this model cannot be run on shapes alone."""


class _Phases:
    """The phases of a run, each with its highest point and what makes it up."""

    def __init__(
        self, recipe: Recipe, device: Device, spec: DeviceSpec, facts: Facts, found: Traced, config: Any, teacher: Any
    ) -> None:
        self.recipe, self.device, self.spec, self.facts, self.found, self.config = recipe, device, spec, facts, found, config
        self.static = found.static
        self.weights = self._weights(found.static)
        if teacher is not None:
            info = architecture_of(*teacher)
            size = (spec.autocast or spec.dtype).itemsize
            self.weights["weights (teacher)"] += info.parameters * size

    def _weights(self, static: Static) -> Counter[str]:
        """What lies on the device: all of it, or with model.offload_layers two layers and what is not in layers."""
        weights = Counter(static.weights)
        if self.recipe.model.offload_layers == "none":
            return weights
        largest, total = max(static.frozen_in_layers), sum(static.frozen_in_layers)
        share = 1 - min(1.0, 2 * largest / total) if total else 0.0
        weights.subtract({name: round(size * share) for name, size in static.layers.items()})
        return +weights

    def _phase(self, name: str, terms: Counter[str], seconds: float | None, host: int = 0) -> Phase:
        """With context and waste. On the CPU both are the process's own."""
        whole = Counter({key: round(value) for key, value in terms.items() if value > 0})
        moving = sum(value for key, value in whole.items() if key in ("activations", "logits", "workspace", "gradients", "cache"))
        whole["context"] = self.device.context_bytes
        if self.device.type != "cpu":
            if self.device.type == "cuda" and name != "load":
                whole["workspace"] += CUBLAS_HOPPER if self.device.capability == "9.0" else CUBLAS
            whole["fragmentation"] = round(WASTE * moving)
        else:
            lengths = 1 if self.recipe.streams_text else -(-self.facts.micro.tokens // MULTIPLE)
            whole["fragmentation"] = round(WASTE_CPU * moving) + lengths * LENGTH_CPU
        terms_ = dict(whole)
        return Phase(name, sum(terms_.values()), seconds, terms_, host)

    def _of_moments(self, traced: Trace, static: Counter[str]) -> Counter[str]:
        highest = max(traced.moments.values(), key=lambda moment: moment.total)
        dynamic = Counter({("workspace" if name == "inputs" else name): 0 for name in highest.terms})
        for name, value in highest.terms.items():
            dynamic["workspace" if name == "inputs" else "weights (codes)" if name == "weights" else name] += max(0, round(value))
        return static + dynamic

    def all(self) -> list[Phase]:
        phases = [self.load()]
        if self.facts.evaluate is not None:
            phases.append(self.evaluate())
        if self.found.generate is not None:
            phases.append(self.generate())
        phases += [self.train(), self.save(), self.merge()]
        return phases

    def load(self) -> Phase:
        size = sum(self.static.weights.values())
        read = self.static.parameters * 2
        seconds = read / DISK
        if self.recipe.quant.scheme != "none" and self.device.type == "cpu":
            seconds += self.device.quantize_seconds(self.recipe.quant.scheme, self.static.parameters)
        return self._phase("load", Counter(self.weights), seconds, host=0 if self.device.type == "cpu" else round(1.05 * size))

    def evaluate(self) -> Phase:
        traced, micro = self.found.evaluate, self.facts.evaluate
        assert micro is not None
        batches = self.facts.held_out_tokens / micro.tokens
        once = batches * max(seconds_of(traced.work, self.device), self.streaming())
        every = self.recipe.train.eval_steps
        times = 2 + ((self.facts.steps - 1) // every if every else 0)
        static = Counter(self.weights)
        static["adapters"] += self.static.adapters
        # Between steps the optimizer's states are there too.
        static["optimizer"] += self.static.optimizer["states"]
        return self._phase("evaluate", self._of_moments(traced, static), once * times)

    def generate(self) -> Phase:
        traced = self.found.generate
        assert traced is not None
        text = self.config.get_text_config()
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        tokens = self.facts.prompt + self.recipe.eval.max_new_tokens
        size = (self.spec.autocast or self.spec.dtype).itemsize
        layers = self.found.layers[1]
        cache_ = 2 * layers * heads * width * tokens * size
        static = Counter(self.weights)
        static["adapters"] += self.static.adapters
        static["cache"] += round(cache_)
        terms = self._of_moments(traced, static)
        terms["workspace"] = max(0, terms["workspace"] - round(cache_ * self.facts.prompt / tokens))  # the prompt's are in both
        # A token at a time: all weights are read (those in codes also written in floats), and the host calls every operation.
        prompt = seconds_of(traced.work, self.device)
        each = self.device.memory_seconds(sum(self.static.weights.values()))
        if self.recipe.quant.scheme == "nf4":
            each += self.device.dequantize_seconds("nf4", self.static.parameters)
        each = max(self.device.together(each, traced.work[("operations",)]), self.streaming())
        answers = 2 * self.facts.answers
        return self._phase("generate", terms, answers * (prompt + each * self.recipe.eval.max_new_tokens))

    def train(self) -> Phase:
        static = Counter(self.weights)
        static["adapters"] += self.static.adapters
        static["optimizer"] += self.static.optimizer["states"]
        every = self.recipe.train.save_steps
        if self.device.type == "cpu" and every and every < self.facts.steps:
            static["checkpoint"] += self.checkpoint()  # the copy that is written while training goes on
        passes = self._of_moments(self.found.train, static)
        step = static + Counter(gradients=self.static.optimizer["gradients"], workspace=self.static.optimizer["temporary"])
        terms = max(passes, step, key=lambda found: sum(found.values()))
        host = 0
        if self.recipe.model.offload_layers == "memory":
            host += sum(self.static.frozen_in_layers)
        if self.recipe.train.checkpointing == "offload":
            host += self.offloaded()
        return self._phase("train", terms, self.step_seconds() * self.facts.steps * (2 if self.recipe.twin else 1), host)

    def step_seconds(self) -> float:
        """One optimizer step of mean micro-batches."""
        settings = self.recipe.train
        # Layers come while the one before computes: forward, and once more for the backward pass.
        micro, update = self.step_busy()
        micro = max(self.device.together(micro, self.found.train.work[("operations",)]), 2 * self.streaming())
        if settings.checkpointing == "offload":
            micro += 2 * self.offloaded() / LINK["memory"]
        return micro * settings.accumulation + update

    def step_busy(self) -> tuple[float, float]:
        """Seconds of arithmetic, each operation by itself: of a mean micro-batch, and of the optimizer's update."""
        settings = self.recipe.train
        micro = busy_seconds(self.found.train.work, self.device) * self.facts.mean_tokens / self.facts.micro.tokens
        dtype = {torch.float32: "fp32", torch.bfloat16: "bf16"}.get(self.spec.dtype, "fp32")
        if self.recipe.base_frozen:
            dtype = "fp32"
        tensors = max(1, round(self.static.trainable / 1e6))
        update = self.device.optimizer_seconds(settings.optimizer, self.static.trainable, tensors, dtype)
        return micro, update

    def streaming(self) -> float:
        """Seconds in which all layers that stream come to the device once."""
        where = self.recipe.model.offload_layers
        return 0.0 if where == "none" else sum(self.static.frozen_in_layers) / LINK[where]

    def offloaded(self) -> int:
        """Bytes that wait in the CPU's memory: each layer's input."""
        text = self.config.get_text_config()
        return (
            self.facts.micro.tokens * text.hidden_size * self.found.layers[1] * (self.spec.autocast or self.spec.dtype).itemsize
        )

    def checkpoint(self) -> int:
        """Bytes of one: trained weights and optimizer states."""
        return self.static.optimizer["weights"] + self.static.optimizer["states"]

    def save(self) -> Phase:
        """A checkpoint: trained weights and states, copied to the host and written."""
        optimizer, size = self.static.optimizer, self.checkpoint()
        saves = 1 + (self.facts.steps // self.recipe.train.save_steps if self.recipe.train.save_steps else 0)
        terms = Counter(self.weights) + Counter(adapters=self.static.adapters, optimizer=optimizer["states"])
        if self.device.type == "cpu":
            terms["workspace"] += size
        return self._phase("save", terms, saves * size / DISK, host=0 if self.device.type == "cpu" else size)

    def merge(self) -> Phase:
        """The trained model in floats, written, read again, and compared with what was trained, in fp32 where that fits."""
        recipe, parameters = self.recipe, self.static.parameters
        if recipe.writes_adapter and not (recipe.mergeable and recipe.run.merge):
            return self._phase("merge", Counter(self.weights), 0.0)
        size = self.spec.dtype.itemsize
        written = parameters * size
        compared = 0.0
        if self.facts.evaluate is not None and self.facts.held_out_tokens:
            rows = min(1.0, recipe.eval.merge_rows / max(1, recipe.data.heldout)) if recipe.data.heldout >= 1 else 1.0
            batches = self.facts.held_out_tokens / self.facts.evaluate.tokens
            compared = 2 * rows * batches * seconds_of(self.found.evaluate.work, self.device)
        seconds = 2 * written / DISK + compared
        terms = Counter(self.weights)
        terms["adapters"] += self.static.adapters
        if self.device.type == "cpu":
            exact = self.device.memory_bytes > 3 * 4 * parameters
            # The merged model is read again when the first is gone, and cast one weight at a time.
            floats = 4 * parameters if exact else written
            return self._phase("merge", Counter({f"weights ({'fp32' if exact else 'bf16'})": floats}), seconds)
        if self.facts.evaluate is not None:
            terms = self._of_moments(self.found.evaluate, terms)
        return self._phase("merge", terms, seconds, host=round(1.05 * written))
