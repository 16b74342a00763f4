"""Caches values derived from a weight: ternary codes of a master weight, layouts for CPU kernels.

Only for Parameters, and as long as they live: a computed tensor (a parametrization, an all-gather, a buffer that a
compiler reuses) has no stable identity. Two kinds of weight, two rules of validity:

master   trained; valid until the next optimizer step, of any torch optimizer, those of bitsandbytes and steps inside the
         backward pass included (a hook on all of them from the first such value on, see `unhook_optimizers`), and until
         `weights_changed()`, which `load_state_dict`, casts and `train()`/`eval()` of our layers call. `_version` alone is
         not enough: fused AdamW and bitsandbytes' optimizers change a weight without changing it. It is checked too, so
         that a manual edit (`weight.mul_(2)`) is noticed.
frozen   packed codes, which no optimizer changes; valid while they are the same tensor of the same `_version`, and until
         `weights_changed()`.

The caller must call `weights_changed()` after changes that cannot be detected: an edit through `.data`, torch's functional
optimizers, a kernel or a collective that writes into a weight, another process that shares it.
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

_kept = WeakTensorKeyDictionary()  # Parameter → {key: (its storage, stamp, value)}
_lock = threading.RLock()  # autograd and servers call from other threads
_steps = 0
_edits = 0
_hook: RemovableHandle | None = None  # on all optimizers of the process


def weights_changed() -> None:
    """Invalidate all cached values of this process, after weights were changed."""
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
    """Remove the hook from all optimizers of this process, and all cached values, which the hook would have invalidated.

    The next cached value of a trained weight installs it again.
    """
    global _hook
    with _lock:
        _kept.clear()
        if _hook is not None:
            _hook.remove()
            _hook = None


def keepable(weight: Tensor) -> bool:
    """Whether values derived from `weight` can be cached: it is a Parameter with values that counts its versions.

    Not if it is marked as `streamed`: such a weight itself is not kept in memory.
    """
    return type(weight) is nn.Parameter and not (weight.is_meta or weight.is_inference() or hasattr(weight, "streamed"))


def cached(weight: Tensor, key: str, make: Callable[[Tensor], T], *, frozen: bool) -> T:
    """`make(weight)`, or its cached result if that is still valid; one value for each weight and `key`."""
    if not keepable(weight):
        return make(weight)
    storage = weight.untyped_storage()
    identity = (storage._cdata, weight.storage_offset(), weight.shape, weight.stride(), weight.dtype)
    stamp = (*identity, weight._version, _edits, None if frozen else _steps)
    with _lock:
        if not frozen:
            _hook_optimizers()
        entries = cast(dict[str, tuple[StorageWeakRef, object, Any]], _kept.setdefault(weight, {}))
        entry = entries.get(key)
        if entry is not None and entry[1] == stamp and not entry[0].expired():
            return cast(T, entry[2])
        entries.pop(key, None)  # before the new value takes memory of its own
        value = make(weight)
        entries[key] = StorageWeakRef(storage), stamp, value
        return value


def forget(weights: Iterable[Tensor]) -> None:
    """Drop the cached values of these weights."""
    with _lock:
        for weight in weights:
            _kept.pop(weight, None)


def kept_bytes(weights: Iterable[Tensor]) -> int:
    """Bytes of the cached tensors of these weights, without the weights themselves."""
    with _lock:
        values = [value for weight in weights for _, _, value in _kept.get(weight, {}).values()]
    tensors = [t for value in values for t in (value if isinstance(value, tuple) else (value,)) if isinstance(t, Tensor)]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)
