"""A step on shapes alone, as a plan traces it: tensors without numbers, on which nothing can be tried.

While a context is in use, the fast step asks it. What it would try with numbers (that its pieces compute what the model's own
do) is taken for granted; what runs as one kernel is one piece, so that what exists within it counts as the kernel's workspace
and not tensor by tensor; where samples lie in a row is told beforehand.
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
    """What a plan answers in the place of numbers (`finetune.planning.trace.TraceContext`)."""

    def segments(self, shape: tuple[int, int]) -> Segments:
        """The samples of rows (B, T)."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor, options: Any) -> Tensor:
        """What `packed_attention` gives, (B, T, H, Dv)."""

    def fused(self, function: Callable[..., R]) -> Callable[..., R]:
        """`function` as one kernel."""


_current: Tracing | None = None


def current() -> Tracing | None:
    """What answers while this process traces; None where it computes with numbers."""
    return _current


@contextmanager
def use(context: Tracing) -> Iterator[None]:
    """Within it this process traces, and trains nothing."""
    global _current
    before, _current = _current, context
    try:
        yield
    finally:
        _current = before
