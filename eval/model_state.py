"""The state that scoring puts back: a model's modes, the random generators, memory after an out-of-memory error.

And two questions that every score asks: where input ids go, and whether a tokenizer adds BOS by itself.
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
    """Evaluation mode inside; afterwards every module is in the mode that it had, also where they differed.

    The way back goes through `model.train(...)`, so that layers which act on a change of mode see it.
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
    """Whatever is seeded or drawn inside, the generators of python, numpy and torch (CPU, every CUDA device) go on as before."""
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


# What says that memory has run out, beside torch's own exception: its CPU allocator, and libraries that allocate by themselves.
NO_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "not enough memory",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory has run out, of the device or of the process."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)


def forget(error: BaseException) -> str:
    """The first line of an error of which nothing is kept: its frames hold what filled the memory, and that is given back."""
    said = str(error).strip().splitlines()
    error.__traceback__ = error.__context__ = error.__cause__ = None
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return said[0][:300] if said else type(error).__name__


def device_of(model: nn.Module) -> torch.device:
    """Where input ids go: the device of the first parameter, which is the embedding's in a causal language model."""
    return next(model.parameters()).device


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer by itself begins a text with BOS. Asked by doing: the flag `add_bos_token` is often wrong."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
