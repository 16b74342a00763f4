"""Patches of a model that compute its results faster. They are found by structure, and tried out.

    attention   rows of several samples without a mask: each sample attends to itself (attention.py)
    lora        adapters and their frozen linears as one autograd Function, q, k and v together, gate and up too (quant/lora.py)
    blocks      RMSNorm, rotary positions and gated activations as one compiled pass each (blocks.py, kernels.py)

No list of models is kept. One forward pass is watched: which modules ask for attention, which linears take the same tensor. A
module is taken for an RMSNorm, or for a gated MLP, when its own output comes out of that formula on random numbers; attention
is compared, layer by layer and in fp32, with the model's own eager one on two samples in a row. What is not recognized computes
as it did, and `skipped` says where and why. (The chunked loss, chunked_loss.py, is tried in the same way: `head_of`.)

While `install`ed, patched modules have an attribute `forward` of their own; weights, names and state are untouched. `remove`
leaves the model and the process as they were, `with patched(model)` does both (what is changed: fast/__init__.py). Calls with a
cache or a mask, as in generation, get the model's own attention.
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
from finetune.errors import UserError
from finetune.train import parallel, trace_context
from finetune.train.fast import attention, chunked_loss, kernels
from finetune.train.fast.blocks import SAME, as_fast_as_it_gets, as_gated, as_norm, difference, like_norm
from quant.lora import LoraGroup, why_not

if TYPE_CHECKING:
    from finetune.recipe import Recipe

WORTH_COMPILING = {"cpu": 1e13, "cuda": 1e14}  # parameters × tokens: some ten seconds of training
TRIAL = "finetune_trial"
TRIAL_SAMPLES = (5, 11)  # tokens of the two samples in the row that is tried


@dataclass(frozen=True)
class Patch:
    """One thing that is put in place of another. of: what it is, for the log."""

    of: str
    install: Callable[[], None]
    remove: Callable[[], None]


class _Shared:
    """Something of the process that several patched models need: done for the first of them, undone after the last.

    do: does it, and returns what undoes it.
    """

    _all: ClassVar[dict[str, _Shared]] = {}

    def __init__(self, do: Callable[[], Callable[[], object]]) -> None:
        self._do, self._users = do, 0

    @classmethod
    def named(cls, name: str, do: Callable[[], Callable[[], object]]) -> _Shared:
        """The one of that name; `do` is of the first who asks."""
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

    skipped: path → why. head: for the loss in chunks. compiled: kernels are, while it is installed.
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
        """Within it the model computes as it came: for generation, whose steps of one token gain nothing."""
        was = self.installed
        self.remove()
        try:
            yield
        finally:
            if was:
                self.install()

    def in_words(self) -> list[str]:
        """What the log says: one line of what is fast, and one for each kind of what is not."""
        count = Counter(patch.of for patch in self.patches)
        parts = [f"{number} {of}" if number > 1 else of for of, number in count.items()]
        parts += ["the loss in chunks"] if self.head else []
        lines = ["fast: " + ", ".join(parts)] if parts else []
        reasons: dict[str, list[str]] = {}
        for path, why in self.skipped.items():
            reasons.setdefault(why, []).append(path)
        for why, paths in reasons.items():
            more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
            lines.append(f"plain: {paths[0] or 'the model'}{more}: {why}")
        return lines


def apply_patches(model: nn.Module, recipe: Recipe, device: torch.device, *, work: float = math.inf) -> FastStep:
    """What the recipe wants of the fast step, installed. work: parameters × tokens of the run, for compilation that is `auto`.

    Raises:
        UserError: the recipe wants compilation, and there is no compiler.
    """
    said, not_compiled = recipe.fast, None
    if said.compile is False:
        not_compiled = "fast.compile: false"
    elif said.compile == "auto" and work < WORTH_COMPILING[device.type]:
        not_compiled = "this run is too short for compiling (fast.compile: true compiles)"
    elif trace_context.current() is None:
        not_compiled = kernels.unavailable(device.type)
        if not_compiled is not None and said.compile is True:
            raise UserError("nothing can be compiled here", where="fast.compile", got=not_compiled, hint="fast.compile=auto")
    chosen = recipe.model.attention != "auto"
    parts = {"attention": said.attention and not chosen, "lora": said.lora, "blocks": said.blocks}
    found = find(model, **parts, not_compiled=not_compiled)
    if said.attention and chosen:
        found.skipped["attention"] = f"model.attention: {recipe.model.attention}"
    if recipe.train.loss_chunk and recipe.distill.teacher is None:
        found.head, why = chunked_loss.head_of(model)
        if why is not None:
            found.skipped["the loss"] = why
    found.install()
    return found


def find(
    model: nn.Module, *, attention: bool = True, lora: bool = True, blocks: bool = True, not_compiled: str | None = None
) -> FastStep:
    """What of `model` can be computed fast; nothing is replaced yet.

    model: a causal language model of transformers, with PEFT adapters or without, in the place and dtype in which it trains.
    not_compiled: why kernels are not compiled; None switches compilation on. Without it `blocks` is no faster and is left out.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    patches: list[Patch] = []
    skipped: dict[str, str] = {}
    decoder = getattr(base, "base_model", None)
    if decoder is None or decoder is base or not hasattr(base, "config"):
        return FastStep([], {"": f"{type(base).__name__} is not a causal language model of transformers"})
    seen = _watch(base, decoder)
    if attention:
        _attention(base, decoder, seen, patches, skipped)
    if lora:
        _lora(base, seen, patches, skipped)
    if blocks:
        if not_compiled is None:
            _blocks(base, seen, patches, skipped)
        else:
            skipped["norms, rotary positions and gated activations"] = not_compiled
    return FastStep(patches, skipped, compiled=not_compiled is None)


@contextmanager
def patched(model: nn.Module, **options: Any) -> Iterator[FastStep]:
    """Within it what `find` finds is installed; after it the model and the process are as before. options: those of `find`."""
    found = find(model, **options)
    found.install()
    try:
        yield found
    finally:
        found.remove()


# ------------------------------------------------------------------------------------------------------------ watching a pass


@dataclass
class _Seen:
    """What one forward pass showed. differences: attention module → how far ours is off, or why it cannot be used.

    failed: why the pass did not come to its end, so that it shows nothing.
    """

    differences: dict[nn.Module, float | str]
    inputs: list[tuple[str, nn.Module, Tensor]]  # path, PEFT layer, what it was called with, in order
    failed: str | None


def _watch(base: Any, decoder: Any) -> _Seen:
    """One pass of two samples in one row, with the model's own eager attention and ours side by side."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    device = device_of(base)
    vocabulary = getattr(base.get_input_embeddings(), "num_embeddings", 2)
    positions = torch.cat([torch.arange(n, device=device) for n in TRIAL_SAMPLES])[None]
    ids = (torch.arange(positions.shape[1], device=device)[None] * 7 + 1) % vocabulary
    segments = attention.segments_of(positions, (1, positions.shape[1]), device)
    seen = _Seen({}, [], None)

    def compare(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        if eager is None:
            seen.differences[module] = "it has no eager attention to compare with"
            return q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[3]), None
        if kwargs.pop("dropout", 0.0):
            seen.differences[module] = "it drops attention weights out"
        own, _ = eager(module, q.float(), k.float(), v.float(), None if mask is None else mask.float(), **kwargs)
        try:
            attention.set_segments(segments)
            ours, _ = attention.packed(module, q.float(), k.float(), v.float(), None, **kwargs)
            seen.differences.setdefault(module, difference(ours, own))
        except (ValueError, TypeError, NotImplementedError) as error:
            seen.differences[module] = str(error).splitlines()[0]
        return own.to(q.dtype), None

    AttentionInterface.register(TRIAL, compare)
    AttentionMaskInterface.register(TRIAL, eager_mask)
    hooks = [
        module.register_forward_pre_hook(
            lambda module, args, path=path: seen.inputs.append((path, module, args[0])) if args else None
        )
        for path, module in base.named_modules()
        if _is_lora(module)
    ]
    configs = _configs(base)
    names = [config._attn_implementation for config in configs]
    try:
        with evaluating(base), torch.no_grad(), torch.random.fork_rng(), torch.autocast(device.type, enabled=False):
            base.train()  # in which attention says whether it drops weights out
            for config in configs:
                config._attn_implementation = TRIAL
            try:
                decoder(input_ids=ids, position_ids=positions, use_cache=False)
            except Exception as error:  # whatever a model says to a row of two samples: then it is left alone
                seen.failed = f"{type(error).__name__} when it was tried: {str(error).strip().splitlines()[0][:200]}"
    finally:
        for config, name in zip(configs, names, strict=True):
            config._attn_implementation = name
        for hook in hooks:
            hook.remove()
        attention.set_segments(None)
        attention.unregister(TRIAL)
    return seen


def _is_lora(module: Any) -> bool:
    from peft.tuners.lora import LoraLayer

    return isinstance(module, LoraLayer)


def _configs(base: Any) -> list[Any]:
    """The configurations whose `_attn_implementation` the model's modules read."""
    found = {id(config): config for module in base.modules() if (config := getattr(module, "config", None)) is not None}
    return [config for config in found.values() if hasattr(config, "_attn_implementation")]


# ------------------------------------------------------------------------------------------------------------------ attention


def _attention(base: Any, decoder: Any, seen: _Seen, patches: list[Patch], skipped: dict[str, str]) -> None:
    paths = {module: path for path, module in base.named_modules()}
    if seen.failed or not seen.differences:
        skipped["attention"] = seen.failed or f"{type(base).__name__} does not ask for attention by transformers' interface"
        return
    wrong = {
        module: found if isinstance(found, str) else f"ours differs by {found:.1e}"
        for module, found in seen.differences.items()
        if isinstance(found, str) or not found < SAME
    }
    for module, why in wrong.items():
        skipped[paths[module]] = f"{type(module).__name__}: {why}"
    if wrong:
        return  # one name serves the whole model
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


def _lora(base: Any, seen: _Seen, patches: list[Patch], skipped: dict[str, str]) -> None:
    calls = Counter(path for path, _, _ in seen.inputs)
    for path, module in base.named_modules():
        if _is_lora(module):
            why = seen.failed or why_not(module) or ("it is not called once in a pass" if calls[path] != 1 else None)
            if why is not None:
                skipped[path] = f"adapter: {why}"
    able = [one for one in seen.inputs if one[0] not in skipped]
    groups: list[list[tuple[str, Any, Tensor]]] = []
    for one in able:
        last = groups[-1][-1] if groups else None
        if last is not None and last[2] is one[2] and _parent(last[0]) == _parent(one[0]) and _alike(last[1], one[1]):
            groups[-1].append(one)
        else:
            groups.append([one])
    for members in groups:
        group = LoraGroup([module for _, module, _ in members])
        patches.append(Patch("groups of adapters", group.install, group.remove))


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _alike(one: Any, other: Any) -> bool:
    """Whether one mask of dropout serves both, on one device."""
    rates = [getattr(layer.lora_dropout[layer.active_adapters[0]], "p", 0.0) for layer in (one, other)]
    return rates[0] == rates[1] and one.get_base_layer().weight.device == other.get_base_layer().weight.device


# --------------------------------------------------------------------------------------------------------------------- blocks


def _blocks(base: Any, seen: _Seen, patches: list[Patch], skipped: dict[str, str]) -> None:
    rotary, known = {}, set(seen.differences)
    gates: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}
    for path, module in parallel.named_modules(base):
        if like_norm(module):
            known.add(module)
            if (norm := as_norm(module)) is not None:
                patches.append(_forward("norms", module, norm))
            else:
                skipped[path] = f"{type(module).__name__} is no norm that is known"
        elif (gate := as_gated(module, gates)) is not None:
            patches.append(_forward("gated activations", module, gate))
            known.add(module)
        if module in seen.differences:
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
                        skipped[f"{path}.{number}.{name}"] = f"{type(block).__name__} is no block that is known"


def _forward(of: str, module: Any, forward: Callable[..., Any]) -> Patch:
    def install() -> None:
        module.forward = forward

    def remove() -> None:
        del module.forward

    return Patch(of, install, remove)


_compiled_once = functools.cache(kernels.compiled)  # installed again, it finds its machine code again


def _rotary(source: Any) -> Patch:
    """The function that turns q and k by their positions, which all models of one file of transformers share, compiled."""

    def replace() -> Callable[[], object]:
        own = source.apply_rotary_pos_emb
        source.apply_rotary_pos_emb = _compiled_once(own)
        return lambda: setattr(source, "apply_rotary_pos_emb", own)

    shared = _Shared.named(f"rotary positions of {source.__name__}", replace)
    return Patch("rotary positions", shared.acquire, shared.release)
