"""Distillation: losses and gradients equal the plain formulas, hooks are removed, and mismatched models are refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.errors import UserError
from finetune.train import distill
from finetune.train.distill import Distillation
from quant import swap

SIZES: dict[str, Any] = {
    "vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip


def _llama(seed: int = 0, **changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**(SIZES | changes)))


def _ids(rows: int = 2, length: int = 9) -> Tensor:
    return torch.randint(0, 90, (rows, length), generator=torch.Generator().manual_seed(5))


def _grads(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _plain_losses(
    student: Any, teacher: Any, ids: Tensor, *, logits: float, relations: float, tau: float, layer: int, heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The formulas on unchunked logits and states, in the order of Algorithm 1: the total and its three terms."""
    states: dict[str, list[Tensor]] = {"s": [], "t": []}
    hooks = [
        getattr(model.model.layers[layer].self_attn, name).register_forward_hook(
            lambda m, a, out, role=role: states[role].append(out)
        )
        for role, model in (("s", student), ("t", teacher))
        for name in ("q_proj", "k_proj", "v_proj")
    ]
    student_logits = student(ids).logits[:, :-1].float().flatten(0, 1)
    with torch.no_grad():
        teacher_logits = teacher(ids).logits[:, :-1].float().flatten(0, 1)
    for hook in hooks:
        hook.remove()
    count = len(student_logits)
    ce = F.cross_entropy(student_logits, ids[:, 1:].flatten(), reduction="sum")
    kl = F.kl_div(F.log_softmax(student_logits / tau, -1), F.softmax(teacher_logits / tau, -1), reduction="sum")
    ad = torch.zeros(())
    for s, t in zip(states["s"], states["t"], strict=True):
        relation = []
        for x in (s, t):
            normalized = F.normalize(x.float().view(*x.shape[:2], heads, -1).transpose(1, 2), dim=-1)
            relation.append((normalized @ normalized.transpose(-2, -1) / tau).reshape(-1, x.shape[1]))
        ad = ad + F.kl_div(F.log_softmax(relation[0], -1), F.softmax(relation[1], -1), reduction="batchmean")
    return ce + logits * kl + relations * ad * count, ce, kl, ad * count


@pytest.mark.parametrize(("logits", "relations"), [(0.0, 0.0), (2.0, 0.0), (0.0, 50.0), (2.0, 50.0)])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_losses_and_gradients_equal_the_plain_formulas(
    monkeypatch: pytest.MonkeyPatch, checkpointing: bool, tied: bool, logits: float, relations: float
) -> None:
    monkeypatch.setattr(distill, "TOKENS", 5)  # 16 targets in pieces of 5
    student, teacher = _llama(0, tie_word_embeddings=tied), _llama(1, hidden_size=48, num_hidden_layers=4)
    swap(student, scheme="ternary", trainable=True)
    reference, ids = copy.deepcopy(student), _ids()
    if checkpointing:
        student.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        student.train()
    distillation = Distillation(teacher, logits=logits, relations=relations, temperature=2.0, layer=1, split_heads=2)
    distillation.attach(student)
    losses = distillation.loss(student, ids)
    losses.total.backward()
    expected = _plain_losses(reference, teacher, ids, logits=logits, relations=relations, tau=2.0, layer=1, heads=2)
    expected[0].backward()
    assert losses.count == 16
    torch.testing.assert_close(losses.total, expected[0])
    for actual, term, weight in zip(
        (losses.ce, losses.logits, losses.relations), expected[1:], (1, logits, relations), strict=True
    ):
        torch.testing.assert_close(actual, term.detach() if weight else torch.zeros(()))
        assert not actual.requires_grad
    grads, expected_grads = _grads(student), _grads(reference)
    assert grads.keys() == expected_grads.keys()
    for name in grads:
        torch.testing.assert_close(
            grads[name], expected_grads[name], rtol=1e-4, atol=1e-4 * float(expected_grads[name].abs().max())
        )
    assert all(p.grad is None for p in teacher.parameters())


def test_identical_teacher_adds_no_loss_and_no_gradient() -> None:
    student, ids = _llama(), _ids()
    distillation = Distillation(copy.deepcopy(student), logits=10.0, relations=100.0)
    distillation.attach(student)
    losses = distillation.loss(student, ids)
    assert float(losses.logits) == pytest.approx(0, abs=1e-4)
    assert float(losses.relations) == pytest.approx(0, abs=1e-4)
    losses.total.backward()
    with_teacher = _grads(student)
    student.zero_grad()
    F.cross_entropy(student(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    for name, grad in _grads(student).items():
        torch.testing.assert_close(with_teacher[name], grad, rtol=1e-3, atol=1e-3)


def test_losses_and_gradients_of_rows_add_up_to_those_of_the_batch() -> None:
    """Gradient accumulation: losses and gradients of single rows add up to those of the batch."""
    student, teacher, ids = _llama(0), _llama(1), _ids(4)
    distillation = Distillation(teacher, logits=2.0, relations=50.0)
    distillation.attach(student)
    batch_loss = distillation.loss(student, ids)
    batch_loss.total.backward()
    batch_grads = _grads(student)
    student.zero_grad()
    row_losses = [distillation.loss(student, row[None]) for row in ids]
    for row_loss in row_losses:
        row_loss.total.backward()
    assert sum(row_loss.count for row_loss in row_losses) == batch_loss.count
    torch.testing.assert_close(torch.stack([row_loss.total for row_loss in row_losses]).sum(), batch_loss.total)
    for name, grad in _grads(student).items():
        torch.testing.assert_close(grad, batch_grads[name], rtol=1e-3, atol=1e-3)


def test_loss_under_autocast_and_without_gradients() -> None:
    student, teacher, ids = _llama(0), _llama(1), _ids()
    distillation = Distillation(teacher, logits=2.0, relations=50.0)
    distillation.attach(student)
    exact = distillation.loss(student, ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        bf16 = distillation.loss(student, ids)
    bf16.total.backward()
    torch.testing.assert_close(bf16.total, exact.total, rtol=3e-2, atol=0)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in student.parameters())
    with torch.no_grad():
        without_grad = distillation.loss(student, ids)
    assert not without_grad.total.requires_grad
    torch.testing.assert_close(without_grad.total, exact.total.detach())


def test_detach_removes_hooks_and_no_activations_are_kept() -> None:
    student, teacher = _llama(0), _llama(1)
    distillation = Distillation(teacher, logits=1.0, relations=1.0, layer=-1)
    distillation.attach(student)
    layers = [name for name, module in student.named_modules() if module._forward_hooks]
    assert layers == [f"model.layers.2.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")]
    distillation.attach(student)  # attaching again adds no second hook
    assert all(len(student.get_submodule(name)._forward_hooks) == 1 for name in layers)
    student.eval()
    student(_ids())
    assert distillation._outputs == {"teacher": {}, "student": {}}
    distillation.loss(student, _ids())
    assert distillation._outputs == {"teacher": {}, "student": {}}
    distillation.detach()
    assert not any(module._forward_hooks for model in (student, teacher) for module in model.modules())
    with pytest.raises(RuntimeError, match="attach"):
        distillation.loss(student, _ids())


def test_default_layer_is_near_the_end() -> None:
    student = _llama(0, num_hidden_layers=24, hidden_size=16, intermediate_size=16)
    distillation = Distillation(copy.deepcopy(student), logits=0.0, relations=1.0)
    distillation.attach(student)
    assert student.model.layers[20].self_attn.q_proj._forward_hooks
    assert distillation.split_heads == 2


def test_mismatched_models_are_refused() -> None:
    from transformers import CohereConfig, CohereForCausalLM, GPT2Config, GPT2LMHeadModel

    student = _llama()
    with pytest.raises(UserError, match="different vocabularies"):
        Distillation(_llama(1, vocab_size=91), logits=1, relations=0).attach(student)
    with pytest.raises(UserError, match=r"layer 3 of 3"):
        Distillation(_llama(1), logits=0, relations=1, layer=3).attach(student)
    with pytest.raises(UserError, match=r"q_proj of the teacher has 32 features, split_heads is 3"):
        Distillation(_llama(1), logits=0, relations=1, split_heads=3).attach(student)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=90, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1))
    with pytest.raises(UserError, match="the teacher has no separate Q, K and V"):
        Distillation(gpt2, logits=1, relations=1).attach(student)
    Distillation(gpt2, logits=1, relations=0).attach(student)
    cohere = CohereForCausalLM(CohereConfig(**(SIZES | {"logit_scale": 3.0, "eos_token_id": 1})))
    with pytest.raises(UserError, match="more than a product with its head"):
        Distillation(cohere, logits=1, relations=0).attach(student)
    with pytest.raises(ValueError, match="share weights"):
        Distillation(student, logits=1, relations=0).attach(student)
    with pytest.raises(ValueError, match="τ above 0"):
        Distillation(_llama(1), logits=1, relations=0, temperature=0)
