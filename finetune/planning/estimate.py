"""Planning a recipe on a device: memory of each phase, time and energy.

Memory: weights from their shapes (exact), training and evaluation from a trace of the recipe's own step
(finetune/planning/trace.py), context and fragmentation from the device. Time: the traced work at the device's rates, plus the
host's time for each operation; on a GPU the longer of the two, because it does not wait for the host.

Plans are cached in ~/.cache/finetune12g/plans, keyed by the recipe, the device, the program's sources and library versions.
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

DISK = 0.7e9  # bytes/s of reading or writing: a SATA disk; NVMe is several times faster
LINK = {"memory": 12e9, "disk": DISK}  # bytes/s of offloaded layers to the device: PCIe 4.0 x8, as in laptops
# Waste of a CPU process: glibc keeps freed memory in fragments (as much again as is temporary), and oneDNN keeps machine code and
# reordered weights for each sequence length. Measured on the quickstart: 616 MB besides tensors and libraries.
WASTE_CPU, LENGTH_CPU = 1.0, 20 << 20
# cuBLAS's workspace, which torch counts as allocated: ":4096:2:16:8" of CUBLAS_WORKSPACE_CONFIG, on Hopper ":4096:8".
CUBLAS, CUBLAS_HOPPER = 8_519_680, 32 << 20
WASTE = 0.04  # share of temporary memory that CUDA's allocator cannot reuse for other sizes. Assumed, not measured.


MOST_KEPT = 200  # cached plans


def plan(
    recipe: Recipe,
    name: str,
    device: Device,
    *,
    budget_bytes: int | None = None,
    data: Any = None,
    config: Any = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Plan:
    """Plan a run of `recipe` on `device`. data, config: of a run that has already read its data and its model's config.

    Raises:
        UserError: the model's config is not available, or the device does not support what the recipe asks for.
    """
    budget = device.memory_bytes if budget_bytes is None else budget_bytes
    source = source_of(recipe.model)
    key = _key(recipe, device, data, config)
    saved = _cached(key)
    if saved is None:
        if progress is not None:
            progress(0, 1, "tracing a step")
        saved = _plan(recipe, name, device, source, data, config)
        _store(key, saved)
    return local.corrected(replace(saved, recipe=name, budget_bytes=budget, price_per_kwh=recipe.plan.price_per_kwh), recipe)


def fresh_plan(recipe: Recipe, name: str, device: Device) -> Plan:
    """A plan without cache and correction, for measuring the accuracy of plans."""
    return _plan(recipe, name, device, source_of(recipe.model), None, None)


# ----------------------------------------------------------------------------------------------------------------- the cache


@cache
def _program() -> str:
    """Digest of this program's sources and of library versions, on which plans depend."""
    import peft
    import transformers

    digest = hashlib.sha256(f"{torch.__version__} {transformers.__version__} {peft.__version__}".encode())
    for package in (Path(__file__).parent.parent, Path(__file__).parent.parent.parent / "quant"):
        for path in sorted(package.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _key(recipe: Recipe, device: Device, data: Any, config: Any) -> str:
    keys = recipe.model_dump(mode="json", exclude={"run", "about", "plan", "fit"}) | {"seed": recipe.run.seed}
    digest = None if data is None else data.digest
    models_named = [str(Path(name) / "config.json") for name in (recipe.model.name, recipe.distill.teacher) if name]
    files = [recipe.data.path, recipe.data.heldout_path, *models_named]
    stamps = [os.stat(path).st_mtime_ns if path and Path(path).exists() else None for path in files]
    inputs = [keys, asdict(device), digest, None if config is None else config.to_dict(), stamps, _program()]
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()


def _cached(key: str) -> Plan | None:
    try:
        return Plan.of_dict(json.loads((local.folder() / "plans" / f"{key[:32]}.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):  # missing or incomplete: plan again
        return None


def _store(key: str, new: Plan) -> None:
    path = local.folder() / "plans" / f"{key[:32]}.json"
    try:
        write_json(path, asdict(new))
        for old in sorted(path.parent.glob("*.json"), key=lambda plan: plan.stat().st_mtime)[:-MOST_KEPT]:
            old.unlink(missing_ok=True)
    except OSError:  # not writable: the next plan takes a few seconds again
        return


# --------------------------------------------------------------------------------------------------------------- what is planned


def config_of(recipe: Recipe, source: Source) -> Any:
    """The model's config, from its source or from planning/hub_metadata.py (without network)."""
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


def device_spec(recipe: Recipe, device: Device, work: float) -> DeviceSpec:
    """dtypes and compilation of a run on `device`."""
    device_type = "cpu" if device.type == "cpu" else "cuda"
    low = default_dtype("cpu") if device_type == "cpu" else torch.bfloat16 if "bf16" in device.rates else torch.float32
    dtype = weights_dtype(recipe, device_type, low)
    compiled = recipe.fast.compile is True or (recipe.fast.compile == "auto" and work >= WORTH_COMPILING[device_type])
    return DeviceSpec(device_type, dtype, autocast_dtype(recipe, dtype, device_type, low), compiled)


def _plan(recipe: Recipe, name: str, device: Device, source: Source, data: Any, config: Any) -> Plan:
    notes: list[str] = []
    config = config_of(recipe, source) if config is None else config
    facts = facts_of(recipe, source, data)
    notes += facts.notes
    info = architecture_of(source, config)
    spec = device_spec(recipe, device, info.parameters * facts.steps * facts.tokens_per_step)
    teacher = None
    if recipe.distill.teacher is not None:
        teacher_source = find_model(recipe.distill.teacher, where="distill.teacher")
        teacher = (teacher_source, load_config(teacher_source))
    prompt = facts.prompt if facts.answers else 0
    reads = facts.evaluate or facts.micro
    try:
        with torch.random.fork_rng(devices=[]):  # planning must not change the random numbers of a run
            traced = trace(recipe, source, config, spec, facts.micro, teacher=teacher, evaluate=reads, generate=prompt)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, KeyError, AttributeError) as error:
        reason = str(error).strip().splitlines()
        raise Untraceable(
            f"cannot trace a training step of {info.architecture}",
            where="plan",
            got=f"{type(error).__name__}: {reason[0][:300] if reason else ''}",
            hint="finetune run trains it without a plan",
        ) from error
    estimate = _Phases(recipe, device, spec, facts, traced, config, teacher)
    phases = estimate.all()
    training = next(phase for phase in phases if phase.name == "train")
    # Without recomputation: the forward pass, and twice that backward, or once if the weights are frozen.
    forward = flops_of(traced.evaluate.work) / reads.tokens
    flops = forward * (2 if recipe.base_frozen else 3) * facts.mean_tokens * recipe.train.accumulation * facts.steps
    if recipe.twin:
        notes.append("the float twin doubles the time; it does not need more memory")
    if device.measured is None:
        notes.append(
            f"times are estimated from the vendor's figures for {device.name}; finetune bench device measures this machine"
        )
    kept = recipe.train.keep_checkpoints + recipe.train.save_best
    notes.append(f"a checkpoint takes {human_bytes(estimate.checkpoint())} on disk; while one is written there are {kept + 1}")
    if device.type != "cpu":
        notes.append("memory on GPUs was not verified on a GPU yet; context and fragmentation are assumptions")
    return Plan(
        name,
        device.key,
        device.memory_bytes,
        phases,
        traced.static.parameters,
        traced.static.trainable,
        facts.steps,
        facts.tokens_per_step,
        (training.seconds or 0.0) / max(1, facts.steps) / (2 if recipe.twin else 1),
        flops * (2 if recipe.twin else 1),
        device.watts,
        recipe.plan.price_per_kwh,
        notes,
        {
            "layers": traced.layers[0],
            "of": traced.layers[1],
            "uniform": traced.uniform,
            "fast": traced.fast,
            "operations": traced.train.work[("operations",)] * recipe.train.accumulation,
            "busy_seconds": estimate.step_busy()[0] * recipe.train.accumulation,
            "update_seconds": estimate.step_busy()[1],
            "checkpoint_bytes": estimate.checkpoint(),
        },
    )


def flops_of(work: Work) -> float:
    """FLOP of matrix products and attention."""
    total = 0.0
    for key, count in work.items():
        if key[0] == "gemm":
            total += 2.0 * key[2] * key[3] * key[4] * count
        elif key[0].startswith("attention"):
            total += (5.0 if key[0].endswith("backward") else 2.0) * key[2] ** 2 * key[3] * key[4] * count
    return total


def seconds_of(work: Work, device: Device) -> float:
    """Seconds of the work on the device, with the host's part."""
    return device.together(busy_seconds(work, device), work[("operations",)])


def busy_seconds(work: Work, device: Device) -> float:
    """Seconds of the work on the device, without the host's part: each operation by itself."""
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
    """The training step of this model cannot be traced on fake tensors."""


class _Phases:
    """Computes the phases of a run: peak memory by term, and time."""

    def __init__(
        self, recipe: Recipe, device: Device, spec: DeviceSpec, facts: Facts, traced: Traced, config: Any, teacher: Any
    ) -> None:
        self.recipe, self.device, self.spec, self.facts, self.traced, self.config = recipe, device, spec, facts, traced, config
        self.static = traced.static
        self.weights = self._weights(traced.static)
        if teacher is not None:
            info = architecture_of(*teacher)
            size = (spec.autocast or spec.dtype).itemsize
            self.weights["weights (teacher)"] += info.parameters * size

    def _weights(self, static: Static) -> Counter[str]:
        """Weights on the device: all, or with model.offload_layers two layers and the weights outside of layers."""
        weights = Counter(static.weights)
        if self.recipe.model.offload_layers == "none":
            return weights
        largest, total = max(static.frozen_in_layers), sum(static.frozen_in_layers)
        share = 1 - min(1.0, 2 * largest / total) if total else 0.0
        weights.subtract({name: round(size * share) for name, size in static.layers.items()})
        return +weights

    def _phase(self, name: str, terms: Counter[str], seconds: float | None, host: int = 0) -> Phase:
        """A phase with context and fragmentation added (on a CPU, of the process)."""
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
        if self.traced.generate is not None:
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
        traced, micro = self.traced.evaluate, self.facts.evaluate
        assert micro is not None
        batches = self.facts.held_out_tokens / micro.tokens
        once = batches * max(seconds_of(traced.work, self.device), self.streaming())
        every = self.recipe.train.eval_steps
        times = 2 + ((self.facts.steps - 1) // every if every else 0)
        static = Counter(self.weights)
        static["adapters"] += self.static.adapters
        # During training the optimizer states exist too.
        static["optimizer"] += self.static.optimizer["states"]
        return self._phase("evaluate", self._of_moments(traced, static), once * times)

    def generate(self) -> Phase:
        traced = self.traced.generate
        assert traced is not None
        text = self.config.get_text_config()
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        tokens = self.facts.prompt + self.recipe.eval.max_new_tokens
        size = (self.spec.autocast or self.spec.dtype).itemsize
        layers = self.traced.layers[1]
        cache_ = 2 * layers * heads * width * tokens * size
        static = Counter(self.weights)
        static["adapters"] += self.static.adapters
        static["cache"] += round(cache_)
        terms = self._of_moments(traced, static)
        terms["workspace"] = max(
            0, terms["workspace"] - round(cache_ * self.facts.prompt / tokens)
        )  # the prompt's keys and values are counted in both
        # Per token all weights are read (codes are also dequantized), and the host launches every operation.
        prompt = seconds_of(traced.work, self.device)
        token_seconds = self.device.memory_seconds(sum(self.static.weights.values()))
        if self.recipe.quant.scheme == "nf4":
            token_seconds += self.device.dequantize_seconds("nf4", self.static.parameters)
        token_seconds = max(self.device.together(token_seconds, traced.work[("operations",)]), self.streaming())
        answers = 2 * self.facts.answers
        return self._phase("generate", terms, answers * (prompt + token_seconds * self.recipe.eval.max_new_tokens))

    def train(self) -> Phase:
        static = Counter(self.weights)
        static["adapters"] += self.static.adapters
        static["optimizer"] += self.static.optimizer["states"]
        every = self.recipe.train.save_steps
        if self.device.type == "cpu" and every and every < self.facts.steps:
            static["checkpoint"] += self.checkpoint()  # the copy that is written while training continues
        passes = self._of_moments(self.traced.train, static)
        step = static + Counter(gradients=self.static.optimizer["gradients"], workspace=self.static.optimizer["temporary"])
        terms = max(passes, step, key=lambda terms: sum(terms.values()))
        host = 0
        if self.recipe.model.offload_layers == "memory":
            host += sum(self.static.frozen_in_layers)
        if self.recipe.train.checkpointing == "offload":
            host += self.offloaded()
        return self._phase("train", terms, self.step_seconds() * self.facts.steps * (2 if self.recipe.twin else 1), host)

    def step_seconds(self) -> float:
        """Seconds of one optimizer step of mean micro-batches."""
        settings = self.recipe.train
        # Offloaded layers are loaded while the previous one computes, in the forward and again in the backward pass.
        micro, update = self.step_busy()
        micro = max(self.device.together(micro, self.traced.train.work[("operations",)]), 2 * self.streaming())
        if settings.checkpointing == "offload":
            micro += 2 * self.offloaded() / LINK["memory"]
        return micro * settings.accumulation + update

    def step_busy(self) -> tuple[float, float]:
        """(seconds of a mean micro-batch, seconds of the optimizer's update), without the host's part."""
        settings = self.recipe.train
        micro = busy_seconds(self.traced.train.work, self.device) * self.facts.mean_tokens / self.facts.micro.tokens
        dtype = {torch.float32: "fp32", torch.bfloat16: "bf16"}.get(self.spec.dtype, "fp32")
        if self.recipe.base_frozen:
            dtype = "fp32"
        tensors = max(1, round(self.static.trainable / 1e6))
        update = self.device.optimizer_seconds(settings.optimizer, self.static.trainable, tensors, dtype)
        return micro, update

    def streaming(self) -> float:
        """Seconds to load all offloaded layers once."""
        where = self.recipe.model.offload_layers
        return 0.0 if where == "none" else sum(self.static.frozen_in_layers) / LINK[where]

    def offloaded(self) -> int:
        """Bytes of activations in CPU memory: each layer's input."""
        text = self.config.get_text_config()
        return (
            self.facts.micro.tokens * text.hidden_size * self.traced.layers[1] * (self.spec.autocast or self.spec.dtype).itemsize
        )

    def checkpoint(self) -> int:
        """Bytes of a checkpoint: trained weights and optimizer states."""
        return self.static.optimizer["weights"] + self.static.optimizer["states"]

    def save(self) -> Phase:
        """Saving checkpoints: trained weights and states, copied to the host and written."""
        optimizer, size = self.static.optimizer, self.checkpoint()
        saves = 1 + (self.facts.steps // self.recipe.train.save_steps if self.recipe.train.save_steps else 0)
        terms = Counter(self.weights) + Counter(adapters=self.static.adapters, optimizer=optimizer["states"])
        if self.device.type == "cpu":
            terms["workspace"] += size
        return self._phase("save", terms, saves * size / DISK, host=0 if self.device.type == "cpu" else size)

    def merge(self) -> Phase:
        """Merging: the model in floats is written, reloaded, and compared with the trained one, in fp32 if that fits."""
        recipe, parameters = self.recipe, self.static.parameters
        if recipe.writes_adapter and not (recipe.mergeable and recipe.run.merge):
            return self._phase("merge", Counter(self.weights), 0.0)
        size = self.spec.dtype.itemsize
        written = parameters * size
        compared = 0.0
        if self.facts.evaluate is not None and self.facts.held_out_tokens:
            rows = min(1.0, recipe.eval.merge_rows / max(1, recipe.data.heldout)) if recipe.data.heldout >= 1 else 1.0
            batches = self.facts.held_out_tokens / self.facts.evaluate.tokens
            compared = 2 * rows * batches * seconds_of(self.traced.evaluate.work, self.device)
        seconds = 2 * written / DISK + compared
        terms = Counter(self.weights)
        terms["adapters"] += self.static.adapters
        if self.device.type == "cpu":
            exact = self.device.memory_bytes > 3 * 4 * parameters
            # The merged model is reloaded after the first one is freed, and cast one weight at a time.
            floats = 4 * parameters if exact else written
            return self._phase("merge", Counter({f"weights ({'fp32' if exact else 'bf16'})": floats}), seconds)
        if self.facts.evaluate is not None:
            terms = self._of_moments(self.traced.evaluate, terms)
        return self._phase("merge", terms, seconds, host=round(1.05 * written))
