"""A program of two processes: trains tiny models together, and says how far each is from one process alone.

    RANK=… WORLD_SIZE=2 … python dealt.py FILE

The first process writes {case: figures} to FILE. The reference is written out in plain torch, without what is tested.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from transformers.integrations.fsdp import is_fsdp_enabled

from eval.perplexity import evaluate_loss
from finetune import processes
from finetune.errors import UserError
from finetune.models.prepare import packed, prepare
from finetune.models.source import Source
from finetune.recipe import Adapter, Quant
from finetune.train import checkpoint, offload, optim, parallel
from finetune.train.fast import kernels, patching
from finetune.train.fast.chunked_loss import LMHead, evaluator, fused_linear_cross_entropy, head_of
from quant import PackedLinear
from quant.linear import FakeQuantLinear

SIZES = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any], Quant, Adapter]] = {
    "lora": ("Llama", {}, Quant(), Adapter(rank=4)),
    "qlora": ("Llama", {"tie_word_embeddings": True}, Quant(scheme="nf4"), Adapter(rank=4)),
    "bitnet": ("Llama", {}, Quant(scheme="ternary"), Adapter(kind="none")),
    "experts": ("Mixtral", {"num_local_experts": 16}, Quant(scheme="nf4"), Adapter(rank=4)),
    "masters": ("Mixtral", {"num_local_experts": 16}, Quant(scheme="ternary"), Adapter(kind="none")),
}
STEPS, LR = 2, 1e-2
PROMPT = [[5, 9, 17, 3]]
FLOATS = (torch.float32, torch.bfloat16)


@functools.cache
def first(name: str) -> Any:
    """A random model whose norms have learnt something."""
    family, extra, _, _ = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(SIZES | extra))
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for path, parameter in model.named_parameters():
        if "norm" in path:
            torch.nn.init.normal_(parameter, 1.0, 0.1)
    return model


def made(name: str, *, checkpointing: bool, move: Any = None) -> Any:
    """A model as a run prepares it, ready to train."""
    model = copy.deepcopy(first(name))
    quant, adapter = MODELS[name][2:]
    targets = [path for path, module in model.named_modules() if isinstance(module, torch.nn.Linear) and path != "lm_head"]
    if quant.scheme == "nf4":
        packed(model, quant)
        targets = [path for path, module in model.named_modules() if isinstance(module, PackedLinear)]
        quant = Quant()  # it is done
    prepared = prepare(
        model, quant=quant, adapter=adapter, targets=targets, source=Source("tiny", ""), device=torch.device("cpu"),
        checkpointing=checkpointing, seed=1, move=move,
    ).model  # fmt: skip
    torch.manual_seed(1)
    for path, parameter in sorted(checkpoint.trained(prepared).items()):
        if "lora_B" in path:
            full = torch.randn(parameter.shape) * 0.1
            parallel.put(parameter, full)
    return prepared.train()


def quickened(model: Any, wanted: bool) -> LMHead | None:
    """The fast step in place, without a compiler; and the head for the loss in chunks."""
    if not wanted:
        return None
    found = patching.find(model)
    count = Counter(patch.name for patch in found.patches)
    assert (count["attention without padding"], count["norms"], count["gated activations"]) == (1, 5, 2), found.skipped
    found.install()
    kernels.switch(False)  # what would be compiled computes as it is written
    head, why = head_of(model)
    assert head is not None, why
    return head


def batches(count: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Micro-batches of unequal numbers of targets, each one row."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        ids = torch.randint(3, 128, (1, 5 + 4 * number), generator=generator)
        found.append((ids, ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, -100)))
    return found


def loss_of(model: Any, head: LMHead | None, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, int]:
    ids, labels = batch
    if head is not None:
        return fused_linear_cross_entropy(model, head, ids, None, labels, chunk=7)
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    targets = labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum"), int((targets != -100).sum())


def optimizer_of(model: Any, name: str = "adamw") -> torch.optim.Optimizer:
    trained = checkpoint.trained(model)
    return optim.build(trained, name=name, lr=LR, betas=(0.9, 0.99), eps=1e-4, weight_decay=0.1, device="cpu")[0]


def summed(grads: list[torch.Tensor | None], order: list[list[int]]) -> torch.Tensor | None:
    """Group by group, then the groups: floats added in that order and no other. None where no micro-batch gives any."""
    total = None
    for group in order:
        part = None
        for grad in (grads[number] for number in group):
            if grad is not None:
                part = grad.clone() if part is None else part + grad
        if part is not None:
            total = part if total is None else total + part
    return total


def alone(name: str, mode: str, count: int, quick: bool) -> dict[str, Any]:
    """What one process gives. mode: whose order of adding: its own (row), or that of two processes."""
    model = made(name, checkpointing=False)
    head = quickened(model, quick)
    optimizer, trained = optimizer_of(model), checkpoint.trained(model)
    by_process = [list(range(count))[rank::2] for rank in range(2)]
    by_turn = [list(range(count))[turn : turn + 2] for turn in range(0, count, 2)]
    start = {n: p.detach().clone() for n, p in trained.items()}
    losses, norms = [], []
    for number in range(STEPS):
        total, targets = 0.0, 0
        each: dict[str, list[torch.Tensor | None]] = {path: [] for path in trained}
        for batch in batches(count, number):
            loss, some = loss_of(model, head, batch)
            loss.backward()
            total, targets = total + loss.item(), targets + some
            for path, p in trained.items():
                each[path].append(p.grad)
                p.grad = None
        for path, p in trained.items():
            order = by_turn if mode == "fsdp" and ".layers." in path else by_process
            p.grad = summed(each[path], [list(range(count))] if mode == "row" else order)
            if p.grad is not None:
                p.grad *= 1 / targets
        norms.append(float(torch.stack([p.grad.norm() for p in trained.values() if p.grad is not None]).norm()))
        losses.append(total / targets)
        optimizer.step()
        optimizer.zero_grad()
    states = {f"{n}/{key}": value.clone() for n, p in trained.items() for key, value in optimizer.state.get(p, {}).items()}
    weights = {n: p.detach().clone() for n, p in trained.items()}
    figures = {"losses": losses, "norms": norms, "start": start, "weights": weights, "states": states}
    return figures | measured(model, head)


def references(keys: list[tuple[Any, ...]]) -> dict[tuple[Any, ...], dict[str, Any]]:
    """What one process gives for each key (the arguments of `alone`): each process computes its share of them."""
    own = {key: alone(*key) for key in keys[processes.rank() :: processes.world_size()]}
    shares: list[Any] = [None] * processes.world_size()
    torch.distributed.all_gather_object(shares, own)
    return {key: figures for share in shares for key, figures in share.items()}


def measured(model: Any, head: LMHead | None) -> dict[str, Any]:
    rows = [(ids[0].tolist(), labels[0].tolist()) for ids, labels in batches(3, 77)]
    of_tokens = evaluator(head) if head is not None else None
    loss = evaluate_loss(model, rows, of_tokens=of_tokens).loss
    model.eval()
    said = model.generate(input_ids=torch.tensor(PROMPT), max_new_tokens=6, do_sample=False, eos_token_id=None)[0].tolist()
    return {"evaluated": loss, "said": said}


def far(ours: torch.Tensor, own: torch.Tensor) -> float:
    return float((ours - own).norm() / own.norm().clamp(min=1e-30))


def together(name: str, mode: str, count: int, *, checkpointing: bool, quick: bool, reference: dict[str, Any]) -> dict[str, Any]:
    """The same by both processes, and how far that is from `reference`."""
    device = torch.device("cpu")

    def move(whole: Any) -> None:
        if mode == "fsdp":
            parallel.shard(whole, device)

    model = made(name, checkpointing=checkpointing, move=move)
    assert parallel.is_sharded(model) == (mode == "fsdp")
    head = quickened(model, quick)
    optimizer, trained = optimizer_of(model), checkpoint.trained(model)
    parameters = list(trained.values())
    rank, world = processes.rank(), processes.world_size()
    losses, norms, uneven = [], [], 0
    for number in range(STEPS):
        mine, total, targets = batches(count, number)[rank::world], 0.0, 0
        for turn in range(-(-count // world)):
            if turn >= len(mine):
                parallel.idle(model)
                continue
            loss, some = loss_of(model, head, mine[turn])
            loss.backward()
            total, targets = total + loss.item(), targets + some
        without = {n for n, p in trained.items() if p.grad is None or (parallel.is_shard(p) and not p.has_gradient)}  # type: ignore[attr-defined]
        parallel.sum_gradients(parameters)
        uneven += sum(trained[n].grad is not None for n in without)
        total, all_targets = parallel.all_reduce_sum([total, targets])
        parallel.scale_gradients(parameters, 1 / all_targets)
        norms.append(parallel.grad_norm(parameters))
        losses.append(total / all_targets)
        optimizer.step()
        optimizer.zero_grad()
    states = {
        f"{n}/{key}": parallel.full_tensor(value) for n, p in trained.items() for key, value in optimizer.state.get(p, {}).items()
    }
    assert states.keys() == reference["states"].keys(), sorted(states.keys() ^ reference["states"].keys())
    weights = {n: parallel.full_tensor(p).clone() for n, p in trained.items()}
    figures = {
        "losses": max(abs(a - b) / abs(b) for a, b in zip(losses, reference["losses"], strict=True)),
        "norms": max(abs(a - b) / abs(b) for a, b in zip(norms, reference["norms"], strict=True)),
        "weights": max(far(weights[n], w) for n, w in reference["weights"].items()),
        "states": max(far(states[n], s) for n, s in reference["states"].items()),
        "moved": max(far(weights[n], w) for n, w in reference["start"].items()),
        "untouched": sum(f"{n}/exp_avg" not in states for n in trained),  # no process ever had a gradient
        "uneven": uneven,  # gradients that came from the other process alone
        "agree": parallel.broadcast_object(losses) == losses and not parallel.any_rank(parallel.broadcast_object(norms) != norms),
    }
    found = measured(model, head)
    figures["evaluated"] = abs(found["evaluated"] - reference["evaluated"]) / reference["evaluated"]
    figures["said"] = found["said"] == reference["said"]
    if mode == "fsdp":
        figures |= shares(model)
        figures |= restored(model, weights, reference, head)
    return figures


def shares(model: Any) -> dict[str, Any]:
    """What of the layers this process has; large weights alone, which two processes can halve."""
    found: dict[str, list[float]] = {"codes": [], "floats": []}
    for path, p in model.named_parameters():
        if ".layers." in path and p.numel() > 64:
            part = p.to_local().numel() / p.numel() if parallel.is_shard(p) else 1.0
            found["codes" if p.dtype == torch.uint8 else "floats"].append(part)
    kept = 0  # bytes beside the parameters, which a layer that is shared out must not have
    for layer in offload.layers_of(model):
        with parallel.gathered(layer):
            kept += sum(m.cached_bytes() for m in layer.modules() if isinstance(m, PackedLinear | FakeQuantLinear))
    return {f"share of {key}": max(values, default=0.5) for key, values in found.items()} | {"kept": kept}


def restored(model: Any, weights: dict[str, torch.Tensor], reference: dict[str, Any], head: LMHead | None) -> dict[str, Any]:
    """`put`, `like` and `whole` go round bit for bit, of one parameter of each kind; the model is one process's own again."""
    torch.manual_seed(2)
    same = True
    kinds = {(path.rpartition(".")[2], p.shape, p.dtype, parallel.is_shard(p)): p for path, p in model.named_parameters()}
    for p in kinds.values():
        own = parallel.full_tensor(p).clone()
        noise = torch.randint(0, 256, p.shape).to(p.dtype) if not p.is_floating_point() else torch.randn(p.shape, dtype=p.dtype)
        parallel.put(p, noise)
        same &= bool((parallel.full_tensor(p) == noise).all())
        state = parallel.like(p, own)
        same &= bool((parallel.full_tensor(state) == own).all()) and state.shape == p.shape
        parallel.put(p, parallel.full_tensor(state))
    parallel.restore(model)
    plain = not any(parallel.is_shard(p) for p in model.parameters())
    kept = all(torch.equal(p, weights[n]) for n, p in checkpoint.trained(model).items())
    found = measured(model, head)
    return {
        "round": same,
        "restored": plain and kept and not any("FSDP" in type(module).__name__ for module in model.modules()),
        "restored evaluated": abs(found["evaluated"] - reference["evaluated"]) / reference["evaluated"],
    }


def words() -> dict[str, Any]:
    """What processes say to each other; and what is refused."""
    rank = processes.rank()
    said = {
        "total": parallel.all_reduce_sum([1.5, rank]),
        "any": [parallel.any_rank(rank == 1), parallel.any_rank(False)],
        "share": parallel.broadcast_object({"from": rank, "what": [1, None, "x"]}),
    }
    uneven = [torch.nn.Parameter(torch.zeros(n)) for n in (3, 5, 7)]  # a gradient here, there, nowhere
    uneven[rank].grad = torch.full_like(uneven[rank], rank + 1.0)
    parallel.sum_gradients(uneven)
    said["uneven"] = [None if p.grad is None else p.grad.tolist() for p in uneven]
    many = [torch.nn.Parameter(torch.zeros(n, dtype=d)) for n in (3_000_000, 5, 4_000_000, 7_000_000) for d in FLOATS]
    for number, p in enumerate(many):
        p.grad = torch.full_like(p, number + rank)
    parallel.sum_gradients(many)
    said["buckets"] = all(bool((p.grad == 2 * number + 1).all()) for number, p in enumerate(many) if p.grad is not None)
    model = made("lora", checkpointing=False, move=lambda whole: parallel.shard(whole, torch.device("cpu")))
    try:
        optimizer_of(model, "adamw_8bit")
    except UserError as mistake:
        said["8bit"] = mistake.hint
    return said


def cases(every: bool) -> list[tuple[Any, ...]]:
    """(model, mode, micro-batches, words); some of them, or all."""
    found: list[tuple[Any, ...]] = []
    for mode in ("ddp", "fsdp"):
        for name in ("lora", "qlora", "bitnet"):
            found += [
                (name, mode, 4),
                (name, mode, 4, "recomputed"),
                (name, mode, 4, "fast"),
                (name, mode, 3, "recomputed", "fast"),
            ]
        found += [("experts", mode, 3, *["recomputed"] * (mode == "fsdp")), ("lora", mode, 4, "row")]
    found.append(("masters", "fsdp", 4))
    few = [case for case in found if case[2] == 3 or case[0] == "masters"]
    return found if every else [case for case in few if case[0] != "lora"]


def main() -> None:
    warnings.filterwarnings("error", category=UserWarning, module=r"torch\.distributed\.fsdp")
    torch.set_num_threads(1)
    device = parallel.init_distributed("cpu")
    accelerator = Accelerator(cpu=True)
    assert device == torch.device("cpu")
    assert parallel.several()
    assert accelerator.num_processes == 2
    assert accelerator.mixed_precision == "no"
    assert not is_fsdp_enabled()
    results: dict[str, Any] = {}
    wanted = {
        case: (case[0], "row" if "row" in case else case[1], case[2], "fast" in case)
        for case in cases("EVERY_CASE" in os.environ)
    }
    expected = references(list(dict.fromkeys(wanted.values())))
    for case, key in wanted.items():
        options = {"checkpointing": "recomputed" in case, "quick": "fast" in case}
        results[" ".join(map(str, case))] = together(*case[:3], reference=expected[key], **options)
    results["words"] = words()
    parallel.wait()
    if processes.is_main_process():
        Path(sys.argv[1]).write_text(json.dumps(results, indent=1))
    parallel.shutdown()


if __name__ == "__main__":
    main()
