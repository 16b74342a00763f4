"""State that evaluation restores: a model's modes, the random generators, memory after an out-of-memory error.

Also the device of input ids, and whether a tokenizer adds BOS.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode inside the block, and restore the mode of every module after it.

    The mode is restored with `model.train(...)`, so that layers which react to a change of mode are notified.
    """
    root, modes = model.training, [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        model.train(root)
        for module, mode in modes:
            module.training = mode


@contextmanager
def randomness_kept() -> Iterator[None]:
    """Restore the generators of python, numpy and torch (CPU, every CUDA device) after the block."""
    python, numbers, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


# Messages of out-of-memory errors besides torch's own exception: of its CPU allocator, and of libraries that allocate memory.
NO_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "not enough memory",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that the device or the process is out of memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)


def forget(error: BaseException) -> str:
    """Release the frames of an error, which hold the memory that ran out, and return the first line of its message."""
    lines = str(error).strip().splitlines()
    error.__traceback__ = error.__context__ = error.__cause__ = None
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return lines[0][:300] if lines else type(error).__name__


def device_of(model: nn.Module) -> torch.device:
    """The device of input ids: that of the first parameter, which is the embedding's in a causal language model."""
    return next(model.parameters()).device


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer adds a BOS to texts, found by encoding one: the flag `add_bos_token` is often wrong."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
