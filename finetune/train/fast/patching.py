"""Patches that make a model faster with the same results. They are found by structure, and verified.

    attention   packed sequences without a mask: each sample attends to itself (attention.py)
    lora        adapters and their frozen linears as one autograd Function; q, k and v together, gate and up too (quant/lora.py)
    blocks      RMSNorm, rotary positions and gated activations as one compiled pass each (blocks.py, kernels.py)

There is no list of supported models. Hooks record one forward pass: which modules call attention, which linears take the same
tensor. A module counts as an RMSNorm, or as a gated MLP, if that formula gives its own output on random inputs; attention
is compared, layer by layer and in fp32, with the model's own eager one on two packed samples. Modules that are not recognized
are not patched; `skipped` has their paths and reasons. (`head_of` verifies the chunked loss, chunked_loss.py, in the same way.)

While `install`ed, patched modules have an attribute `forward` of their own; weights, names and state are untouched. `remove`
restores the model and the process, `with patched(model)` does both (fast/__init__.py lists all changes). Calls with a
cache or a mask, as in generation, use the model's own attention.
"""

from __future__ import annotations

import functools
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from eval.model_state import device_of, evaluating
from eval.positions import short_windows
from finetune.errors import UserError
from finetune.train import parallel, trace_context
from finetune.train.fast import attention, chunked_loss, kernels
from finetune.train.fast.blocks import SAME, as_fast_as_it_gets, as_gated, as_norm, difference, like_norm
from quant.lora import LoraGroup, why_not

if TYPE_CHECKING:
    from finetune.recipe import Recipe

WORTH_COMPILING = {"cpu": 1e13, "cuda": 1e14}  # parameters × tokens: some ten seconds of training
TRIAL = "finetune_trial"
TRIAL_SAMPLES = (5, 11)  # tokens of the two packed samples of the trial
TRIAL_WINDOW = 3  # windows of attention are at most this long in the trial: both samples reach beyond


@dataclass(frozen=True)
class Patch:
    """A replacement that can be installed and removed. name: for the log."""

    name: str
    install: Callable[[], None]
    remove: Callable[[], None]


class _Shared:
    """A process-wide change that several patched models need: made for the first of them, undone after the last.

    do: makes the change and returns the function that undoes it.
    """

    _all: ClassVar[dict[str, _Shared]] = {}

    def __init__(self, do: Callable[[], Callable[[], object]]) -> None:
        self._do, self._users = do, 0

    @classmethod
    def named(cls, name: str, do: Callable[[], Callable[[], object]]) -> _Shared:
        """The change of that name; the first caller's `do` is used."""
        return cls._all.setdefault(name, cls(do))

    def acquire(self) -> None:
        if not self._users:
            self._undo = self._do()
        self._users += 1

    def release(self) -> None:
        self._users -= 1
        if not self._users:
            self._undo()


def _compile() -> Callable[[], object]:
    before = kernels.switch(True)
    return lambda: kernels.switch(before)


def _register_attention() -> Callable[[], object]:
    attention.register()
    return attention.unregister


_COMPILATION = _Shared.named("compilation", _compile)
_ATTENTION = _Shared.named("attention", _register_attention)


class FastStep:
    """Which modules of a model are patched, and why others are not.

    skipped: path → reason. head: for the chunked loss. compiled: kernels are compiled while it is installed.
    """

    def __init__(
        self,
        patches: list[Patch],
        skipped: dict[str, str],
        head: chunked_loss.LMHead | None = None,
        *,
        compiled: bool = False,
    ) -> None:
        self.patches, self.skipped, self.head, self.compiled = patches, skipped, head, compiled
        self.installed = False

    def install(self) -> None:
        if not self.installed:
            if self.compiled:
                _COMPILATION.acquire()
            for patch in self.patches:
                patch.install()
            self.installed = True

    def remove(self) -> None:
        if self.installed:
            for patch in reversed(self.patches):
                patch.remove()
            if self.compiled:
                _COMPILATION.release()
            self.installed = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Remove the patches inside the block: for generation, whose steps of one token gain nothing."""
        was = self.installed
        self.remove()
        try:
            yield
        finally:
            if was:
                self.install()

    def in_words(self) -> list[str]:
        """Lines for the log: one with all patches, and one for each reason why modules were skipped."""
        count = Counter(patch.name for patch in self.patches)
        parts = [f"{number} {name}" if number > 1 else name for name, number in count.items()]
        parts += ["chunked loss"] if self.head else []
        lines = ["fast: " + ", ".join(parts)] if parts else []
        reasons: dict[str, list[str]] = {}
        for path, why in self.skipped.items():
            reasons.setdefault(why, []).append(path)
        for why, paths in reasons.items():
            more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
            lines.append(f"not patched: {paths[0] or 'the model'}{more}: {why}")
        return lines


def apply_patches(model: nn.Module, recipe: Recipe, device: torch.device, *, work: float = math.inf) -> FastStep:
    """Find and install the patches that the recipe asks for. work: parameters × tokens of the run, for `fast.compile: auto`.

    Raises:
        UserError: `fast.compile: true`, and torch.compile does not work here.
    """
    settings, not_compiled = recipe.fast, None
    if settings.compile is False:
        not_compiled = "fast.compile: false"
    elif settings.compile == "auto" and work < WORTH_COMPILING[device.type]:
        not_compiled = "too few steps for torch.compile to pay off (fast.compile: true compiles anyway)"
    elif trace_context.current() is None:
        not_compiled = kernels.unavailable(device.type)
        if not_compiled is not None and settings.compile is True:
            raise UserError("torch.compile does not work here", where="fast.compile", got=not_compiled, hint="fast.compile=auto")
    chosen = recipe.model.attention != "auto"
    parts = {"attention": settings.attention and not chosen, "lora": settings.lora, "blocks": settings.blocks}
    fast_step = find(model, **parts, not_compiled=not_compiled)
    if settings.attention and chosen:
        fast_step.skipped["attention"] = f"model.attention: {recipe.model.attention}"
    if recipe.train.loss_chunk and recipe.distill.teacher is None:
        fast_step.head, why = chunked_loss.head_of(model)
        if why is not None:
            fast_step.skipped["the loss"] = why
    fast_step.install()
    return fast_step


def find(
    model: nn.Module, *, attention: bool = True, lora: bool = True, blocks: bool = True, not_compiled: str | None = None
) -> FastStep:
    """Find the patches for `model`, without installing them.

    model: a causal language model of transformers, with PEFT adapters or without, on the device and in the dtype of training.
    not_compiled: why kernels are not compiled; None switches compilation on. Without it `blocks` is no faster and is skipped.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    patches: list[Patch] = []
    skipped: dict[str, str] = {}
    decoder = getattr(base, "base_model", None)
    if decoder is None or decoder is base or not hasattr(base, "config"):
        return FastStep([], {"": f"{type(base).__name__} is not a causal language model of transformers"})
    trial = _run_trial(base, decoder)
    if attention:
        _attention(base, decoder, trial, patches, skipped)
    if lora:
        _lora(base, trial, patches, skipped)
    if blocks:
        if not_compiled is None:
            _blocks(base, trial, patches, skipped)
        else:
            skipped["norms, rotary positions and gated activations"] = not_compiled
    return FastStep(patches, skipped, compiled=not_compiled is None)


@contextmanager
def patched(model: nn.Module, **options: Any) -> Iterator[FastStep]:
    """Install what `find(model, **options)` finds inside the block, and restore the model and the process after it."""
    fast_step = find(model, **options)
    fast_step.install()
    try:
        yield fast_step
    finally:
        fast_step.remove()


# ------------------------------------------------------------------------------------------------------------ the trial pass


@dataclass
class _Trial:
    """Results of one forward pass. differences: attention module → relative difference of ours, or why it cannot be used.

    failed: the error that ended the pass early, so that there are no results.
    """

    differences: dict[nn.Module, float | str]
    inputs: list[tuple[str, nn.Module, Tensor]]  # path, PEFT layer, its input, in order of calls
    failed: str | None


def _run_trial(base: Any, decoder: Any) -> _Trial:
    """One pass of two packed samples, with the model's own eager attention and ours side by side."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    device = device_of(base)
    vocabulary = getattr(base.get_input_embeddings(), "num_embeddings", 2)
    positions = torch.cat([torch.arange(n, device=device) for n in TRIAL_SAMPLES])[None]
    ids = (torch.arange(positions.shape[1], device=device)[None] * 7 + 1) % vocabulary
    segments = attention.segments_of(positions, (1, positions.shape[1]), device)
    trial = _Trial({}, [], None)
    windows: set[bool] = set()  # whether attention was called with a window

    def compare(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        if eager is None:
            trial.differences[module] = "it has no eager attention to compare with"
            return q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[3]), None
        if kwargs.pop("dropout", 0.0):
            trial.differences[module] = "it uses dropout on attention weights"
        windows.add(kwargs.get("sliding_window") is not None)
        expected, _ = eager(module, q.float(), k.float(), v.float(), None if mask is None else mask.float(), **kwargs)
        try:
            attention.set_segments(segments)
            ours, _ = attention.packed(module, q.float(), k.float(), v.float(), None, **kwargs)
            trial.differences.setdefault(module, difference(ours, expected))
        except (ValueError, TypeError, NotImplementedError) as error:
            trial.differences[module] = str(error).splitlines()[0]
        return expected.to(q.dtype), None

    AttentionInterface.register(TRIAL, compare)
    AttentionMaskInterface.register(TRIAL, eager_mask)
    hooks = [
        module.register_forward_pre_hook(
            lambda module, args, path=path: trial.inputs.append((path, module, args[0])) if args else None
        )
        for path, module in base.named_modules()
        if _is_lora(module)
    ]
    configs = _configs(base)
    names = [config._attn_implementation for config in configs]
    try:
        with (
            evaluating(base),
            torch.no_grad(),
            torch.random.fork_rng(),
            torch.autocast(device.type, enabled=False),
            short_windows(base, TRIAL_WINDOW) as shortened,
        ):
            base.train()  # in training mode attention passes its dropout rate
            for config in configs:
                config._attn_implementation = TRIAL
            try:
                decoder(input_ids=ids, position_ids=positions, use_cache=False)
            except Exception as error:  # any error on packed samples: the model is not patched
                trial.failed = f"{type(error).__name__} in the trial pass: {str(error).strip().splitlines()[0][:200]}"
    finally:
        for config, name in zip(configs, names, strict=True):
            config._attn_implementation = name
        for hook in hooks:
            hook.remove()
        attention.set_segments(None)
        attention.unregister(TRIAL)
    if trace_context.current() is not None and shortened and True not in windows:  # values, where there are any, tell
        trial.differences = dict.fromkeys(trial.differences, f"its {' and '.join(sorted(shortened))} is in the mask alone")
    return trial


def _is_lora(module: Any) -> bool:
    from peft.tuners.lora import LoraLayer

    return isinstance(module, LoraLayer)


def _configs(base: Any) -> list[Any]:
    """The configurations whose `_attn_implementation` the model's modules read."""
    by_id = {id(config): config for module in base.modules() if (config := getattr(module, "config", None)) is not None}
    return [config for config in by_id.values() if hasattr(config, "_attn_implementation")]


# ------------------------------------------------------------------------------------------------------------------ attention


def _attention(base: Any, decoder: Any, trial: _Trial, patches: list[Patch], skipped: dict[str, str]) -> None:
    paths = {module: path for path, module in base.named_modules()}
    if trial.failed or not trial.differences:
        skipped["attention"] = trial.failed or f"{type(base).__name__} does not call attention through transformers' interface"
        return
    wrong = {
        module: difference if isinstance(difference, str) else f"ours differs by {difference:.1e}"
        for module, difference in trial.differences.items()
        if isinstance(difference, str) or not difference < SAME
    }
    for module, why in wrong.items():
        skipped[paths[module]] = f"{type(module).__name__}: {why}"
    if wrong:
        return  # the setting is one for the whole model
    configs = _configs(base)
    names = [config._attn_implementation for config in configs]
    hooks: list[Any] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        shape = (kwargs["inputs_embeds"] if ids is None else ids).shape[:2]
        busy = kwargs.get("past_key_values") is not None or kwargs.get("attention_mask") is not None or kwargs.get("use_cache")
        for config, name in zip(configs, names, strict=True):
            config._attn_implementation = name if busy else attention.NAME
        if not busy:
            device = (kwargs["inputs_embeds"] if ids is None else ids).device
            attention.set_segments(attention.segments_of(kwargs.get("position_ids"), shape, device))

    def install() -> None:
        _ATTENTION.acquire()
        hooks.append(decoder.register_forward_pre_hook(before, with_kwargs=True))

    def remove() -> None:
        hooks.pop().remove()
        _ATTENTION.release()
        attention.set_segments(None)
        for config, name in zip(configs, names, strict=True):
            config._attn_implementation = name

    patches.append(Patch("attention without padding", install, remove))


# ----------------------------------------------------------------------------------------------------------------------- LoRA


def _lora(base: Any, trial: _Trial, patches: list[Patch], skipped: dict[str, str]) -> None:
    calls = Counter(path for path, _, _ in trial.inputs)
    for path, module in base.named_modules():
        if _is_lora(module):
            why = trial.failed or why_not(module) or ("it is not called exactly once in a pass" if calls[path] != 1 else None)
            if why is not None:
                skipped[path] = f"adapter: {why}"
    calls_of_adapters = [call for call in trial.inputs if call[0] not in skipped]
    groups: list[list[tuple[str, Any, Tensor]]] = []
    for call in calls_of_adapters:
        last = groups[-1][-1] if groups else None
        if last is not None and last[2] is call[2] and _parent(last[0]) == _parent(call[0]) and _alike(last[1], call[1]):
            groups[-1].append(call)
        else:
            groups.append([call])
    for members in groups:
        group = LoraGroup([module for _, module, _ in members])
        patches.append(Patch("groups of adapters", group.install, group.remove))


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _alike(one: Any, other: Any) -> bool:
    """Whether two adapters have the same dropout rate, and their bases the same device."""
    rates = [getattr(layer.lora_dropout[layer.active_adapters[0]], "p", 0.0) for layer in (one, other)]
    return rates[0] == rates[1] and one.get_base_layer().weight.device == other.get_base_layer().weight.device


# --------------------------------------------------------------------------------------------------------------------- blocks


def _blocks(base: Any, trial: _Trial, patches: list[Patch], skipped: dict[str, str]) -> None:
    rotary, known = {}, set(trial.differences)
    gates: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}
    for path, module in parallel.named_modules(base):
        if like_norm(module):
            known.add(module)
            if (norm := as_norm(module)) is not None:
                patches.append(_forward("norms", module, norm))
            else:
                skipped[path] = f"{type(module).__name__} is not an RMSNorm of a known form"
        elif (gate := as_gated(module, gates)) is not None:
            patches.append(_forward("gated activations", module, gate))
            known.add(module)
        if module in trial.differences:
            source = sys.modules[type(module).__module__]
            if hasattr(source, "apply_rotary_pos_emb"):
                rotary[source.__name__] = source
    for source in rotary.values():
        patches.append(_rotary(source))
    for path, module in base.named_modules():
        if isinstance(module, nn.ModuleList):
            for number, layer in enumerate(module):
                for name, block in layer.named_children():
                    if block not in known and not as_fast_as_it_gets(block):
                        skipped[f"{path}.{number}.{name}"] = f"{type(block).__name__} is not a block of a known form"


def _forward(name: str, module: Any, forward: Callable[..., Any]) -> Patch:
    def install() -> None:
        module.forward = forward

    def remove() -> None:
        del module.forward

    return Patch(name, install, remove)


_compiled_once = functools.cache(kernels.compiled)  # so that a second install does not compile again


def _rotary(source: Any) -> Patch:
    """Compile the function that applies rotary positions, which all models of one transformers module share."""

    def replace() -> Callable[[], object]:
        own = source.apply_rotary_pos_emb
        source.apply_rotary_pos_emb = _compiled_once(own)
        return lambda: setattr(source, "apply_rotary_pos_emb", own)

    shared = _Shared.named(f"rotary positions of {source.__name__}", replace)
    return Patch("rotary positions", shared.acquire, shared.release)
