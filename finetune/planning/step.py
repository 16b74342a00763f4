"""Building a recipe's model without weights and tracing its steps: training, evaluation, generation."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from finetune.data.packing import Batch
from finetune.data.samples import IGNORE
from finetune.models.build import BuiltModel, build_model, build_teacher, distillation
from finetune.models.source import Source
from finetune.planning.trace import (
    GroupedProducts,
    Recorder,
    Trace,
    TraceContext,
    extrapolate,
    fake_tensors,
    layer_position,
    watch_layers,
)
from finetune.recipe import Recipe, Train
from finetune.train import checkpoint, offload, optim, trace_context
from finetune.train.distill import Distillation
from finetune.train.fast import chunked_loss, kernels, patching
from finetune.train.fast.patching import FastStep
from finetune.train.pretrain import Pretraining
from finetune.train.sft import SupervisedFineTuning
from quant.linear import PackedLinear

SMALL, LARGE = 2, 4  # numbers of layers of the two traces to extrapolate from


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch. shape: (B, T); bounds: of the samples in the flattened batch; supervised: tokens in the loss."""

    shape: tuple[int, int]
    bounds: tuple[int, ...]
    supervised: int

    @property
    def tokens(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class DeviceSpec:
    """The device to trace for. type: cuda or cpu; dtype: of the unquantized weights; autocast: of matrix products, or None."""

    type: str
    dtype: torch.dtype
    autocast: torch.dtype | None
    compiled: bool


@dataclass
class Static:
    """Bytes that are always allocated, by format, and those of the layers alone. parameters: with those in packed linears."""

    weights: Counter[str]
    layers: Counter[str]
    adapters: int
    frozen_in_layers: list[int]
    optimizer: dict[str, int]
    parameters: int
    trainable: int


@dataclass
class Traced:
    """The traces of a whole model. layers: (traced, of the model); uniform: whether all layers are alike."""

    static: Static
    train: Trace
    evaluate: Trace
    generate: Trace | None
    fast: list[str]
    layers: tuple[int, int]
    uniform: bool


def uniform(config: Any) -> bool:
    """Whether all decoder layers are alike: the same module classes and shapes, and equal entries in the config's lists."""
    from transformers import AutoModelForCausalLM

    text = config.get_text_config()
    if len(set(getattr(text, "layer_types", None) or ["one"])) > 1:
        return False
    if getattr(text, "num_kv_shared_layers", 0):
        return False
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    kinds = {
        tuple(
            (name, type(module).__name__, *(tuple(p.shape) for p in module.parameters(recurse=False)))
            for name, module in layer.named_modules()
        )
        for layer in offload.layers_of(model)
    }
    return len(kinds) == 1


def with_layers(config: Any, layers: int) -> Any:
    """A copy of the config with `layers` layers."""
    fewer = copy.deepcopy(config)
    text = fewer.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = list(text.layer_types)[:layers]
    return fewer


def layers_in(config: Any) -> int:
    """Number of decoder layers."""
    return int(config.get_text_config().num_hidden_layers)


def build_on_meta(recipe: Recipe, source: Source, config: Any, spec: DeviceSpec) -> BuiltModel:
    """Build the model on `meta` as a run builds it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return build_model(recipe, source, config, device=torch.device("meta"), dtype=spec.dtype)


def static_of(recipe: Recipe, model: Any, built: BuiltModel) -> Static:
    """The model's static memory, from the shapes of its parameters."""
    packed = {id(p): layer.quantized for layer in model.modules() if isinstance(layer, PackedLinear) for p in layer.parameters()}
    layers = offload.layers_of(model)
    in_layers = {id(p) for layer in layers for p in layer.parameters()}
    weights, layer_weights, adapters = Counter[str](), Counter[str](), 0
    for p in {id(p): p for p in [*model.parameters(), *model.buffers()]}.values():
        size = p.numel() * p.element_size()
        if recipe.base_frozen and p.requires_grad:
            adapters += size
            continue
        name = packed.get(id(p)) or {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}.get(p.dtype, "other")
        weights[f"weights ({name})"] += size
        if id(p) in in_layers:
            layer_weights[f"weights ({name})"] += size
    trained = list(checkpoint.trained(model).values())
    low = {"stochastic_rounding": recipe.train.stochastic_rounding, "in_backward": recipe.train.optimizer_in_backward}
    frozen = [sum(p.numel() * p.element_size() for p in layer.parameters() if not p.requires_grad) for layer in layers]
    return Static(
        weights, layer_weights, adapters, frozen, optim.memory_of(trained, name=recipe.train.optimizer, **low),
        built.parameters, built.trainable,
    )  # fmt: skip


def extrapolate_static(a: Any, b: Any, layers: int) -> Any:
    """Static memory with `layers` layers, linear in those with SMALL (a) and LARGE (b) layers."""

    def at(x: float, y: float) -> int:
        return round(x + (y - x) * (layers - SMALL) / (LARGE - SMALL))

    def counter(x: Any, y: Any) -> Any:
        return Counter({key: at(x.get(key, 0), y.get(key, 0)) for key in {**x, **y}})

    largest = {key: at(a.optimizer[key], b.optimizer[key]) for key in a.optimizer} | {"temporary": b.optimizer["temporary"]}
    return Static(
        counter(a.weights, b.weights), counter(a.layers, b.layers), at(a.adapters, b.adapters),
        [b.frozen_in_layers[-1]] * layers, largest, at(a.parameters, b.parameters), at(a.trainable, b.trainable),
    )  # fmt: skip


def trace(
    recipe: Recipe,
    source: Source,
    config: Any,
    spec: DeviceSpec,
    micro: MicroBatch,
    *,
    teacher: Any = None,
    evaluate: MicroBatch | None = None,
    generate: int = 0,
    whole: bool = False,
) -> Traced:
    """Trace the steps of a model: with two and four layers if there are more and all are alike, else with all.

    generate: tokens of the longest prompt, 0 for none; teacher: (source, config) of a teacher; whole: trace all layers.
    """
    layers, same = layers_in(config), uniform(config)
    options: dict[str, Any] = {"evaluate": evaluate, "generate": generate}
    if whole or not same or layers <= LARGE or teacher is not None:
        one = _trace(recipe, source, config, spec, micro, teacher=teacher, **options)
        return Traced(*one, (layers, layers), same)
    a, b = (_trace(recipe, source, with_layers(config, n), spec, micro, **options) for n in (SMALL, LARGE))
    train, evaluated, generated = (
        None if x is None or y is None else extrapolate(x, y, layers) for x, y in zip(a[1:4], b[1:4], strict=True)
    )
    assert train is not None
    assert evaluated is not None
    return Traced(extrapolate_static(a[0], b[0], layers), train, evaluated, generated, b[4], (LARGE, layers), True)


def _trace(
    recipe: Recipe,
    source: Source,
    config: Any,
    spec: DeviceSpec,
    micro: MicroBatch,
    *,
    evaluate: MicroBatch | None,
    generate: int,
    teacher: Any = None,
) -> tuple[Static, Trace, Trace, Trace | None, list[str]]:
    built = build_on_meta(recipe, source, config, spec)
    model = built.model
    static = static_of(recipe, model, built)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake_tensors(model, mode)
    vocabulary = config.get_text_config().vocab_size
    count = layers_in(config)
    with _quiet(), mode:
        was = kernels.switched_on()
        with (
            trace_context.use(TraceContext(Recorder(vocabulary=0, supervised=1, cuda=False), micro.bounds, micro.shape)),
            GroupedProducts(),
        ):
            patches = _speed_up(model, recipe, spec)
        try:
            with trace_context.use(TraceContext(Recorder(vocabulary=0, supervised=1, cuda=False), micro.bounds, micro.shape)):
                losses = _distillation(None if teacher is None else teacher[1], recipe, model, mode, spec)
            train = _train(model, recipe, spec, micro, patches, vocabulary, count, losses)
            generated = None
            evaluated = _evaluate(model, recipe, spec, evaluate or micro, patches, vocabulary, count)
            if generate:
                with patches.paused():
                    generated = _generate(model, spec, generate, vocabulary, count)
        finally:
            patches.remove()
            kernels.switch(was)
    return static, train, evaluated, generated, patches.in_words()


def _speed_up(model: Any, recipe: Recipe, spec: DeviceSpec) -> FastStep:
    """Patch the model as a run does, without its checks; compiled if the run would compile."""
    adjusted = recipe.model_copy(update={"fast": recipe.fast.model_copy(update={"compile": spec.compiled})})
    return patching.apply_patches(model, adjusted, torch.device(spec.type))


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _distillation(config: Any, recipe: Recipe, student: Any, mode: FakeTensorMode, spec: DeviceSpec) -> Distillation | None:
    dtype = spec.autocast or spec.dtype if recipe.model.dtype == "auto" else spec.dtype
    teacher = None if config is None else build_teacher(recipe, device=torch.device("meta"), dtype=dtype, config=config)
    if teacher is not None:
        fake_tensors(teacher, mode)
    return distillation(recipe, teacher, student)


def _recorder(vocabulary: int, micro: MicroBatch, spec: DeviceSpec, *models_: Any) -> Recorder:
    recorder = Recorder(vocabulary=vocabulary, supervised=micro.supervised, cuda=spec.type == "cuda")
    recorder.ignore(*models_)
    return recorder


def _train(
    model: Any,
    recipe: Recipe,
    spec: DeviceSpec,
    micro: MicroBatch,
    patches: FastStep,
    vocabulary: int,
    layer_count: int,
    teacher: Any,
) -> Trace:
    """Trace a micro-batch forward and backward; with accumulation also a second one on top of its gradients."""
    recorder = _recorder(vocabulary, micro, spec, model, *([] if teacher is None else [teacher.teacher]))
    context = TraceContext(recorder, micro.bounds, micro.shape)
    settings = recipe.train
    task: Any
    device = torch.device("cpu")
    if recipe.streams_text:
        size, chunk = micro.shape[0], settings.loss_chunk
        task = Pretraining(None, device, micro_batch=size, head=patches.head, chunk=chunk, teacher=teacher)  # type: ignore[arg-type]
    else:
        task = SupervisedFineTuning(None, device, head=patches.head, chunk=settings.loss_chunk)  # type: ignore[arg-type]
    model.train()
    layers = offload.layers_of(model)
    handles = watch_layers(layers, recorder)
    trained = [p for p in model.parameters() if p.requires_grad]
    arrived = _stepping(recorder, settings) if settings.optimizer_in_backward else _gradient(recorder)
    handles += [p.register_post_accumulate_grad_hook(arrived) for p in trained]
    try:
        for turn in range(1 if settings.accumulation == 1 else 2):
            if turn:
                recorder.work = Counter()
            recorder.phase, recorder.at = "inputs", ("forward", -1)
            kept = _offloaded() if settings.checkpointing == "offload" else nullcontext()
            with trace_context.use(context), recorder:
                batch = _batch(recipe, micro)
                recorder.phase = "activations"
                with torch.autocast("cpu", dtype=spec.autocast, enabled=spec.autocast is not None), kept:
                    loss, _ = task.loss(model, batch)
                recorder.phase, recorder.at = "workspace", ("backward", -1)
                recorder.look()
                loss.backward()
                recorder.at = ("step", -1)
                del loss, batch
    finally:
        for handle in handles:
            handle.remove()
    moments = {
        layer_position(at, layer_count): moment
        for at, moment in recorder.moments.items()
        if layer_position(at, layer_count)[1] != "between"
    }
    for p in trained:
        p.grad = None
    return Trace(layer_count, moments, recorder.work)


def _batch(recipe: Recipe, micro: MicroBatch) -> Any:
    ids = torch.zeros(micro.shape, dtype=torch.int64)
    if recipe.streams_text:
        return ids
    labels = torch.full(micro.shape, IGNORE, dtype=torch.int64)
    positions = torch.zeros(micro.shape, dtype=torch.int64)
    return Batch(ids, labels, positions, (), micro.tokens)


def _offloaded() -> Any:
    """Hooks that model offloaded activations: nothing stays on the device until the backward pass needs it."""
    return torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (tensor.shape, tensor.stride(), tensor.dtype),
        lambda kept: torch.empty_strided(kept[0], kept[1], dtype=kept[2]),
    )


def _gradient(recorder: Recorder) -> Callable[[Tensor], None]:
    return lambda parameter: recorder.rename(parameter.grad, "gradients") if parameter.grad is not None else None


def _stepping(recorder: Recorder, settings: Train) -> Callable[[Tensor], None]:
    """A hook that models the optimizer in the backward pass: its temporary memory, then the gradient is freed."""

    def hook(parameter: Tensor) -> None:
        low = {"stochastic_rounding": settings.stochastic_rounding, "in_backward": True}
        needed = optim.memory_of([parameter], name=settings.optimizer, **low)["temporary"]
        recorder.look(max(0, needed - parameter.numel() * parameter.element_size()))  # the gradient is already counted
        parameter.grad = None

    return hook


def _evaluate(
    model: Any, recipe: Recipe, spec: DeviceSpec, micro: MicroBatch, patches: FastStep, vocabulary: int, count: int
) -> Trace:
    recorder = _recorder(vocabulary, micro, spec, model)
    model.eval()
    recorder.phase, recorder.at = "inputs", ("evaluate", -1)
    with trace_context.use(TraceContext(recorder, micro.bounds, micro.shape)), recorder, torch.no_grad():
        ids, positions = torch.zeros(micro.shape, dtype=torch.int64), torch.zeros(micro.shape, dtype=torch.int64)
        targets = torch.zeros(micro.supervised, dtype=torch.int64)
        recorder.phase = "workspace"
        if patches.head is not None:
            hidden = patches.head.hidden(ids, positions).flatten(0, 1)[: micro.supervised]
            chunked_loss.token_losses(hidden, patches.head, targets, chunk=recipe.train.loss_chunk)
        else:
            logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits.flatten(0, 1)
            torch.nn.functional.cross_entropy(logits.float(), ids.flatten(), reduction="none")
    return Trace(count, {layer_position(at, count): moment for at, moment in recorder.moments.items()}, recorder.work)


def _generate(model: Any, spec: DeviceSpec, tokens: int, vocabulary: int, count: int) -> Trace:
    """Trace the prompt's forward pass with its key-value cache; the caller adds the cache of the answer."""
    micro = MicroBatch((1, tokens), (0, tokens), 1)
    recorder = _recorder(vocabulary, micro, spec, model)
    model.eval()
    recorder.phase, recorder.at = "workspace", ("generate", -1)
    with trace_context.use(TraceContext(recorder, micro.bounds, micro.shape)), recorder, torch.no_grad():
        out = model(input_ids=torch.zeros((1, tokens), dtype=torch.int64), use_cache=True, logits_to_keep=1)
        del out
    return Trace(count, {layer_position(at, count): moment for at, moment in recorder.moments.items()}, recorder.work)
