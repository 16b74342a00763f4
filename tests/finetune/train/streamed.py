"""A program: makes a Llama of NF4 weights that are never all in memory, trains it from the disk, and says what memory it took.

    python streamed.py FOLDER '{"hidden_size": …, "tokens": 96, "rank": 16, "steps": 1, …}'

The last line is JSON, in bytes: `weights` on the disk; `before` there was a model, anonymous memory; `anonymous` and `resident`,
their peaks while it trained. mmap_threshold: bytes from which the allocator gives memory back at once when it is freed.
"""

from __future__ import annotations

import ctypes
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from finetune.models.prepare import prepare
from finetune.models.source import Source
from finetune.recipe import Adapter, Quant
from finetune.train import offload
from finetune.train.fast.chunked_loss import fused_linear_cross_entropy, head_of
from finetune.train.offload import Scratch
from quant import PackedLinear, swap


def memory() -> tuple[int, int]:
    """(anonymous, resident) now."""
    said = Path("/proc/self/status").read_text()
    anonymous, resident = (int(said.split(f"{key}:")[1].split()[0]) * 1024 for key in ("RssAnon", "VmRSS"))
    return anonymous, resident


class Peak:
    def __init__(self) -> None:
        self.peak, self.on = (0, 0), True
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self) -> None:
        while self.on:
            now = memory()
            self.peak = max(self.peak[0], now[0]), max(self.peak[1], now[1])
            time.sleep(0.005)


def numbers(name: str, like: torch.Tensor) -> torch.Tensor:
    """Random codes and floats; scales such that weights are as those of a fresh model."""
    leaf = name.rpartition(".")[2]
    if leaf in ("nested_absmax", "offset"):
        return torch.full((like.numel() // 4,), 0.01 if leaf == "nested_absmax" else 0.02).view(torch.uint8)
    if like.dtype == torch.uint8:
        return torch.randint(0, 256, like.shape, dtype=torch.uint8)
    return torch.ones_like(like, device="cpu") if "norm" in name else torch.randn(like.shape, dtype=like.dtype).mul_(0.02)


M_MMAP_THRESHOLD = -3  # malloc.h
TINY = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}


def train(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    tokens, rank, steps = (settings.pop(key) for key in ("tokens", "rank", "steps"))
    config = LlamaConfig(**settings)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    swap(model)
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    before, scratch, weights = memory()[0], Scratch(folder), 0
    for name, parameter in list(model.named_parameters()):
        path, _, leaf = name.rpartition(".")
        made = scratch.put(numbers(name, parameter))
        weights += made.numel() * made.element_size()
        setattr(model.get_submodule(path), leaf, nn.Parameter(made, requires_grad=False))
    prepared = prepare(
        model,
        quant=Quant(),
        adapter=Adapter(rank=rank),
        targets=[name for name, module in model.named_modules() if isinstance(module, PackedLinear)],
        source=Source("made here", ""),
        device=torch.device("cpu"),
        checkpointing=True,
        move=lambda whole: offload.stream(whole, torch.device("cpu"), scratch),
    )
    optimizer = torch.optim.AdamW([p for p in prepared.model.parameters() if p.requires_grad], lr=1e-3, fused=True)
    peak, losses, ids = Peak(), [], torch.randint(0, config.vocab_size, (1, tokens))
    head, why_not = head_of(prepared.model)
    assert head is not None, why_not
    prepared.model.train()
    for _ in range(steps):
        loss, count = fused_linear_cross_entropy(prepared.model, head, ids)
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()) / count)
    peak.on = False
    figures = {"weights": weights, "before": before, "anonymous": peak.peak[0], "resident": peak.peak[1]}
    return {**figures, "trained": prepared.trainable, "losses": losses}


if __name__ == "__main__":
    torch.set_num_threads(1)
    wanted = json.loads(sys.argv[2])
    if (threshold := wanted.pop("mmap_threshold", None)) is not None:
        assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, threshold) == 1
    train(Path(sys.argv[1]), TINY | {"tokens": 8, "rank": 1, "steps": 1})  # what libraries take is there before
    print(json.dumps(train(Path(sys.argv[1]), wanted)))
