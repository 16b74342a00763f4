"""What is computed from a weight and kept: ternary codes of a master weight, layouts that a CPU kernel wants.

Kept for Parameters alone, for as long as they live: what a graph computes (a parametrization, an all-gather, a buffer that a
compiler uses twice) has no identity to know it by. Two kinds of weight, two rules of validity:

master   trained; valid until the next optimizer step, of any torch optimizer, those of bitsandbytes and steps inside the
         backward pass included (a hook on all of them from the first such value on, see `unhook_optimizers`), and until
         `weights_changed()`, which `load_state_dict`, casts and `train()`/`eval()` of our layers call. `_version` alone would
         be wrong: fused AdamW and bitsandbytes' optimizers change a weight and leave it as it is. It is looked at besides, so
         that an edit by hand (`weight.mul_(2)`) is seen.
frozen   packed codes, which no optimizer touches; valid while they are the same tensor of the same `_version`, and until
         `weights_changed()`.

What nobody can see is for the caller to say, by `weights_changed()`: an edit through `.data`, torch's functional optimizers, a
kernel or a collective that writes into a weight, another process that shares it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")  # a tensor, or a tuple of tensors and plain values

_kept = WeakTensorKeyDictionary()  # Parameter → {kind: (its storage, stamp, value)}
_lock = threading.RLock()  # autograd and servers call from threads of their own
_steps = 0
_edits = 0
_hook: RemovableHandle | None = None  # on all optimizers of the process


def weights_changed() -> None:
    """Say that weights were changed; what was derived from them is computed anew when it is next needed. In this process."""
    global _edits
    _edits += 1


def _after_step(optimizer: object, args: object, kwargs: object) -> None:
    global _steps
    _steps += 1


def _hook_optimizers() -> None:
    global _hook
    if _hook is None:
        _hook = register_optimizer_step_post_hook(_after_step)


def unhook_optimizers() -> None:
    """Leave the optimizers of this process as they were: the hook goes, and all that is kept, whose end it would have told.

    The next value that is kept of a trained weight brings it back.
    """
    global _hook
    with _lock:
        _kept.clear()
        if _hook is not None:
            _hook.remove()
            _hook = None


def keepable(weight: Tensor) -> bool:
    """Whether what is derived from `weight` is kept: it is a Parameter, with numbers in it, that counts its versions.

    Not of one that is marked as `streamed`: it is not kept in memory itself.
    """
    return type(weight) is nn.Parameter and not (weight.is_meta or weight.is_inference() or hasattr(weight, "streamed"))


def cached(weight: Tensor, kind: str, make: Callable[[Tensor], T], *, frozen: bool) -> T:
    """`make(weight)`, or what it gave the last time if that still holds; one value for each weight and `kind`."""
    if not keepable(weight):
        return make(weight)
    storage = weight.untyped_storage()
    place = (storage._cdata, weight.storage_offset(), weight.shape, weight.stride(), weight.dtype)
    stamp = (*place, weight._version, _edits, None if frozen else _steps)
    with _lock:
        if not frozen:
            _hook_optimizers()
        kinds = cast(dict[str, tuple[StorageWeakRef, object, Any]], _kept.setdefault(weight, {}))
        found = kinds.get(kind)
        if found is not None and found[1] == stamp and not found[0].expired():
            return cast(T, found[2])
        kinds.pop(kind, None)  # before the new value takes memory of its own
        value = make(weight)
        kinds[kind] = StorageWeakRef(storage), stamp, value
        return value


def forget(weights: Iterable[Tensor]) -> None:
    """Drop what is kept for these weights."""
    with _lock:
        for weight in weights:
            _kept.pop(weight, None)


def kept_bytes(weights: Iterable[Tensor]) -> int:
    """Bytes of the tensors that are kept for these weights, beside the weights themselves."""
    with _lock:
        values = [value for weight in weights for _, _, value in _kept.get(weight, {}).values()]
    tensors = [t for value in values for t in (value if isinstance(value, tuple) else (value,)) if isinstance(t, Tensor)]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)
