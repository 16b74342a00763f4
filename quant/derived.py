"""What is computed from a weight and kept: ternary codes of a master weight, layouts that a CPU kernel wants.

An entry belongs to the storage of its weight, not to a module, so that it is found again from inside an opaque operator
and through `detach()`, and is dropped when the storage dies. Two kinds of weight, two rules of validity:

master   trained; valid until `weights_changed()`. Every optimizer step calls it (a hook on all torch optimizers, those of
         bitsandbytes and steps inside the backward pass included), and so do `load_state_dict` and casts of our layers.
         `_version` alone would be wrong: fused AdamW and bitsandbytes' optimizers change a weight and leave it as it is.
         It is looked at besides, so that an edit by hand (`weight.mul_(2)`) is seen; after an edit through `.data` or a
         kernel of one's own, call `weights_changed()`.
frozen   packed codes, which no optimizer touches; valid while storage and `_version` are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

T = TypeVar("T")  # a tensor, or a (named) tuple of tensors and plain values


@dataclass(frozen=True)
class _Entry:
    storage: StorageWeakRef
    stamp: tuple[object, ...]
    value: Any


_entries: dict[tuple[int, int, str], _Entry] = {}  # (storage, offset in it, kind)
_generation = 0


def weights_changed() -> None:
    """Say that trained weights were changed; what was derived from them is computed anew when it is next needed."""
    global _generation
    _generation += 1


def _after_step(optimizer: object, args: object, kwargs: object) -> None:
    weights_changed()


register_optimizer_step_post_hook(_after_step)


def derived(weight: Tensor, kind: str, make: Callable[[Tensor], T], *, frozen: bool) -> T:
    """`make(weight)`, or what it gave the last time if that still holds. One value for each storage, offset and `kind`.

    Nothing is kept for fake and meta tensors, which have no storage of their own, nor inside inference mode's tensors,
    which do not count their versions.
    """
    if weight.is_meta or type(weight) not in (Tensor, torch.nn.Parameter) or weight.is_inference():
        return make(weight)
    storage = weight.untyped_storage()
    key = (cast(int, storage._cdata), cast(int, weight.storage_offset()), kind)
    stamp = (weight.data_ptr(), weight.shape, weight.dtype, weight._version, None if frozen else _generation)
    entry = _entries.get(key)
    if entry is not None and entry.stamp == stamp and not entry.storage.expired():
        return cast(T, entry.value)
    if entry is not None:
        del _entries[key]  # before the new value takes memory of its own
    else:  # a weight not met before: the time to drop what is kept for those that died
        for dead in [k for k, e in _entries.items() if e.storage.expired()]:
            del _entries[dead]
    value = make(weight)
    _entries[key] = _Entry(StorageWeakRef(storage), stamp, value)
    return value


def forget(weights: Iterable[Tensor]) -> None:
    """Drop what is kept for these weights."""
    storages = {cast(int, w.untyped_storage()._cdata) for w in weights if not w.is_meta}
    for key in [k for k in _entries if k[0] in storages]:
        del _entries[key]


def kept_bytes(weights: Iterable[Tensor]) -> int:
    """Bytes of the tensors that are kept for these weights, beside the weights themselves."""
    storages = {cast(int, w.untyped_storage()._cdata) for w in weights if not w.is_meta}
    values = [e.value for k, e in _entries.items() if k[0] in storages]
    return sum(
        t.untyped_storage().nbytes() for v in values for t in (v if isinstance(v, tuple) else (v,)) if isinstance(t, Tensor)
    )
