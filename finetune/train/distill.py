"""Distillation of a float teacher into its ternary student: logits and attention relations, as BitDistill does it.

    L = L_CE + λ · L_LD + γ · L_AD                                     (BitDistill, arXiv 2510.13998, equation 13)

    L_CE   cross-entropy of the student on the next token
    L_LD   KL(p_teacher ‖ p_student), p = softmax(logits / τ), mean over tokens; without the τ² of Hinton et al. (eqs. 8, 9)
    L_AD   Σ over Q, K, V of the mean over relation heads a and tokens t of KL(R_teacher ‖ R_student),
           R = softmax(u·uᵀ / τ), u the unit vectors of the projections in ONE layer (eqs. 10-12 and Algorithm 1;
           relations of Q, K and V and relation heads: MiniLMv2, arXiv 2012.15828)

The relation heads are the projections of a token cut into `split_heads` equal pieces, whatever the model's own heads are, so
that teacher and student may differ in width. Equation 12 divides by √d, Algorithm 1 makes unit vectors and divides by a
temperature: here it is the algorithm, with the one temperature that the paper gives, 5. There λ = 10 and γ = 1e5 for
classification, λ = 1 and γ = 1e3 for summarization, a late layer is best, and one layer better than all (sections 4.1, 4.4).

Sums over tokens come out, so that gradient accumulation by (sum, count) stays exact. Whole logits never exist: head, both
losses and their gradients are computed for some tokens at a time, the gradients already in the forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from eval.model_state import device_of, evaluating
from finetune.errors import UserError
from finetune.train import trace_context

TOKENS = 256  # whose logits exist at a time; in fp32 about five times (256, vocabulary)
PROJECTIONS = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Losses:
    """Sums over `count` next tokens. `total` is what is trained; the parts, without gradient and weights, are for metrics.

    ce: nats; logits: L_LD · count; relations: L_AD · count; 0 for a part whose weight is 0, which is not computed.
    """

    total: Tensor
    count: int
    ce: Tensor
    logits: Tensor
    relations: Tensor


class Distillation:
    """The losses of a student beside its teacher: `attach(student)` once it is swapped, then `loss(student, ids)` for a batch.

    teacher: a causal language model in floats with the student's vocabulary; it is frozen and put into eval mode, and must not
    share its weights with the student. logits, relations: λ and γ, 0 for none. temperature: τ. layer: whose Q, K and V are
    compared, counted from 0, or from the end where negative; None is the last but an eighth of all (21st of 24, as MiniLMv2
    has it for large models). split_heads: relation heads; None is the student's number of key-value heads.
    """

    def __init__(
        self,
        teacher: Any,
        *,
        logits: float,
        relations: float,
        temperature: float = 5.0,
        layer: int | None = None,
        split_heads: int | None = None,
    ) -> None:
        if logits < 0 or relations < 0 or temperature <= 0:
            raise ValueError(f"weights are 0 or more and τ above 0: got {logits}, {relations}, {temperature}")
        self.teacher = teacher.eval().requires_grad_(False)
        self.logits, self.relations, self.temperature = logits, relations, temperature
        self.layer, self.split_heads = layer, split_heads
        self._attached = False
        self._hooks: list[Any] = []
        self._capturing = False  # a backward pass with activation checkpointing runs the hooks again
        self._outputs: dict[str, dict[str, Tensor]] = {"teacher": {}, "student": {}}

    def attach(self, student: Any) -> None:
        """Check that both models match and, for relations, hook the Q, K and V projections of the chosen layer.

        Call it after the swap, which does not touch modules with hooks.

        Raises:
            UserError: the vocabularies differ, logits are more than the head's product, or the layer, its Q, K and V, or a
                division into `split_heads` do not exist.
        """
        self.detach()
        heads = {who: _head(model, who) for who, model in (("teacher", self.teacher), ("student", student))}
        if heads["teacher"].weight.shape[0] != heads["student"].weight.shape[0]:
            raise UserError(
                "teacher and student have different vocabularies",
                got=f"{heads['teacher'].weight.shape[0]} and {heads['student'].weight.shape[0]} tokens",
                hint="distill from a model with the same tokenizer",
            )
        storages = [{p.untyped_storage()._cdata for p in model.parameters()} for model in (self.teacher, student)]
        if storages[0] & storages[1]:
            raise ValueError("teacher and student share weights, so the teacher would change with every step; load it separately")
        if self.relations:
            projections = {who: self._projections(model, who) for who, model in (("teacher", self.teacher), ("student", student))}
            config = student.config.get_text_config()
            if self.split_heads is None:
                self.split_heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
            for who, modules in projections.items():
                for name, module in modules.items():
                    if module.out_features % self.split_heads:
                        raise UserError(
                            "the width of the projections is not divisible by the number of relation heads",
                            got=f"{name} of the {who} has {module.out_features} features, split_heads is {self.split_heads}",
                        )
                    self._hooks.append(module.register_forward_hook(self._capture_hook(who, name)))
        self._attached = True

    def detach(self) -> None:
        """Remove all hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._attached = [], False

    def loss(self, model: Any, input_ids: Tensor) -> Losses:
        """input_ids (B, T), full sequences without padding → the losses on their B · (T − 1) next tokens.

        Differentiable in the student's weights where gradients are enabled.
        """
        if not self._attached:
            raise RuntimeError("call attach(student) before loss(...)")
        with self._captured() as projections:
            hidden = _hidden(model, input_ids)
            with torch.no_grad():
                teacher_hidden = _hidden(self.teacher, input_ids) if self.logits or self.relations else None
        count = input_ids.shape[0] * (input_ids.shape[1] - 1)
        ce, divergence = self._of_head(model, hidden, teacher_hidden, input_ids)
        total, relations = ce + self.logits * divergence, torch.zeros_like(ce)
        if self.relations:
            relations = self._of_relations(projections["student"], projections["teacher"]) * count
            total = total + self.relations * relations
        return Losses(total, count, ce.detach(), divergence.detach(), relations.detach())

    def _of_head(self, model: Any, hidden: Tensor, teacher_hidden: Tensor | None, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(Σ cross-entropy, Σ KL) over next tokens; the first carries the gradient of their weighted sum."""
        weight = model.get_output_embeddings().weight
        dtype = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else hidden.dtype
        teacher = None
        if self.logits and teacher_hidden is not None:
            teacher = (_flatten_tokens(teacher_hidden[:, :-1]), self.teacher.get_output_embeddings().weight)
        want_grad = torch.is_grad_enabled()
        states, targets = _flatten_tokens(hidden[:, :-1]), input_ids[:, 1:].reshape(-1)
        losses = _HeadLosses.apply(states, weight, targets, teacher, self.temperature, self.logits, dtype, want_grad)
        return losses[0], losses[1]

    def _of_relations(self, student: dict[str, Tensor], teacher: dict[str, Tensor]) -> Tensor:
        """L_AD. One sequence and one projection at a time, (heads, T, T) each, recomputed in the backward pass."""
        assert self.split_heads is not None
        parts = []
        for name in PROJECTIONS:
            own, goal = student[name], teacher[name]
            if torch.is_grad_enabled() and not own.requires_grad:
                raise RuntimeError(
                    f"{name} of the student has no gradient, so its relations cannot be trained: is the layer frozen, or "
                    "are activations checkpointed with use_reentrant=True?"
                )
            for states, target in zip(own, goal.to(own.device), strict=True):  # (T, width) each
                parts.append(checkpoint(_relation_loss, states, target, self.split_heads, self.temperature, use_reentrant=False))
        return torch.stack(parts).sum() / len(own)

    def _projections(self, model: nn.Module, who: str) -> dict[str, Any]:
        blocks = [module for module in model.modules() if all(hasattr(module, name) for name in PROJECTIONS)]
        if not blocks:
            raise UserError(
                f"the {who} has no separate Q, K and V projections, so attention relations cannot be distilled",
                got=type(model).__name__,
                hint="distill logits only (relations 0)",
            )
        index = len(blocks) - 1 - len(blocks) // 8 if self.layer is None else self.layer
        if not -len(blocks) <= index < len(blocks):
            raise UserError(f"the {who} has no such attention layer", got=f"layer {index} of {len(blocks)}")
        return {name: getattr(blocks[index], name) for name in PROJECTIONS}

    def _capture_hook(self, who: str, name: str) -> Any:
        def capture(module: nn.Module, args: Any, output: Tensor) -> None:
            if self._capturing:
                self._outputs[who][name] = output

        return capture

    @contextmanager
    def _captured(self) -> Iterator[dict[str, dict[str, Tensor]]]:
        """Collect the projections of the forward passes inside the block; the references are dropped on exit."""
        self._outputs, self._capturing = {"teacher": {}, "student": {}}, True
        try:
            yield self._outputs
        finally:
            self._outputs, self._capturing = {"teacher": {}, "student": {}}, False


def _flatten_tokens(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _hidden(model: Any, input_ids: Tensor) -> Tensor:
    """The last hidden state, (B, T, hidden), to which the head is applied."""
    hidden: Tensor = model.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
    return hidden


def _head(model: Any, who: str) -> nn.Linear:
    """The head, after a check that logits are exactly its product with the last hidden state (no cap, no scale)."""
    head = model.get_output_embeddings()
    plain = type(head) is nn.Linear and head.bias is None
    if plain:
        ids = torch.arange(min(8, len(head.weight)), device=device_of(model))[None]
        with torch.no_grad(), evaluating(model):
            logits = model(input_ids=ids, use_cache=False).logits
            difference = (head(_hidden(model, ids)).float() - logits.float()).abs().max()
            # 2 %: roundings in bf16
            same = trace_context.current() is not None or bool(difference <= 0.02 * logits.float().abs().max())
    if not same:
        raise UserError(
            f"the {who}'s logits are more than a product with its head (a bias, a scale, a cap)", got=type(model).__name__
        )
    return head


def _relation_loss(own: Tensor, goal: Tensor, heads: int, temperature: float) -> Tensor:
    """Projections of one sequence, (T, width) each → KL of the teacher's relations from the student's, mean over tokens."""
    with torch.autocast(own.device.type, enabled=False):
        logs = []
        for states in (goal, own):
            units = F.normalize(states.float().view(len(states), heads, -1).transpose(0, 1), dim=-1)  # (heads, T, d)
            logs.append(F.log_softmax(units @ units.transpose(1, 2) / temperature, dim=-1))
        return (logs[0].exp() * (logs[0] - logs[1])).sum() / (heads * len(own))


class _HeadLosses(torch.autograd.Function):
    """hidden (N, h), head (V, h), targets (N,) → (2,): Σ cross-entropy, Σ KL at temperature τ; `TOKENS` tokens at a time.

        z = hidden · headᵀ       ∂CE/∂z = softmax(z) − onehot       ∂KL/∂z = (softmax(z/τ) − softmax(z_teacher/τ)) / τ

    The gradient of Σ CE + weight · Σ KL is computed on the way, products in `dtype`, sums in fp32, and is what the FIRST of the
    two carries: the caller adds weight · the second to it, whose own gradient is not taken a second time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        teacher: tuple[Tensor, Tensor] | None,
        temperature: float,
        weight: float,
        dtype: torch.dtype,
        want_grad: bool,
    ) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = head.to(dtype)
            goal_matrix = None if teacher is None else teacher[1].to(dtype)
            sums = torch.zeros(2, dtype=torch.float32, device=hidden.device)
            grad_hidden = torch.empty_like(hidden) if want_grad and ctx.needs_input_grad[0] else None
            grad_head = torch.zeros_like(head, dtype=torch.float32) if want_grad and ctx.needs_input_grad[1] else None
            for start in range(0, len(hidden), TOKENS):
                window = slice(start, start + TOKENS)
                x, goals = hidden[window].to(dtype), targets[window, None]
                z = (x @ matrix.t()).float()
                total = z.logsumexp(-1, keepdim=True)
                sums[0] += (total - z.gather(1, goals)).sum()
                grad = (z - total).exp_()
                grad.scatter_add_(1, goals, torch.full_like(total, -1))
                if teacher is not None and goal_matrix is not None:
                    log_goal = (teacher[0][window].to(dtype) @ goal_matrix.t()).float().div_(temperature)
                    log_goal -= log_goal.logsumexp(-1, keepdim=True)
                    log_own = z.div_(temperature)
                    log_own -= log_own.logsumexp(-1, keepdim=True)
                    goal = log_goal.exp()
                    sums[1] += log_goal.sub_(log_own).mul_(goal).sum()
                    grad.add_(log_own.exp_().sub_(goal), alpha=weight / temperature)
                grad = grad.to(dtype)
                if grad_hidden is not None:
                    grad_hidden[window] = (grad @ matrix).to(hidden.dtype)
                if grad_head is not None:
                    grad_head += grad.t() @ x
        ctx.save_for_backward(*(g for g in (grad_hidden, grad_head) if g is not None))
        ctx.which, ctx.dtypes = (grad_hidden is not None, grad_head is not None), (hidden.dtype, head.dtype)
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        of_both = [next(saved).mul_(grad[0]).to(dtype) if has else None for has, dtype in zip(ctx.which, ctx.dtypes, strict=True)]
        return *of_both, None, None, None, None, None, None
