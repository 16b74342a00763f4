"""What scoring must leave as it found it (modes, random numbers), and two questions that every score asks."""

from __future__ import annotations

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


def device_of(model: nn.Module) -> torch.device:
    """Where input ids go: the device of the first parameter, which is the embedding's in a causal language model."""
    return next(model.parameters()).device


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer by itself begins a text with BOS. Asked by doing: the flag `add_bos_token` is often wrong."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
