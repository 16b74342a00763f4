"""Context of a plan that traces a step on fake tensors, which have shapes and no values.

While a context is in use, the fast step asks it. Numerical checks (that a patch computes what the model's own module does) are
skipped; what runs as one kernel is one call, so that memory inside it counts as the kernel's workspace and not tensor by tensor;
the bounds of samples in a sequence come from the context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from torch import Tensor

if TYPE_CHECKING:
    from finetune.train.fast.segments import Segments

R = TypeVar("R")


class Tracing(Protocol):
    """What a plan supplies instead of values (`finetune.planning.trace.TraceContext`)."""

    def segments(self, shape: tuple[int, int]) -> Segments:
        """The samples of packed sequences (B, T)."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor, options: Any) -> Tensor:
        """The result of `packed_attention`, (B, T, H, Dv)."""

    def fused(self, function: Callable[..., R]) -> Callable[..., R]:
        """`function` as one kernel."""


_current: Tracing | None = None


def current() -> Tracing | None:
    """The context in use; None outside a trace."""
    return _current


@contextmanager
def use(context: Tracing) -> Iterator[None]:
    """Trace with `context` inside the block."""
    global _current
    before, _current = _current, context
    try:
        yield
    finally:
        _current = before
