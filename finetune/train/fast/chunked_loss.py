"""Fused linear cross-entropy: the head's product and the loss together, for a chunk of tokens at a time.

For T tokens and a vocabulary of V, logits, their float32 copy and their gradient take 10·T·V bytes and more: 1.3 GB for 2,048
tokens of a vocabulary of 65,536. Here only those of one chunk of tokens exist. The gradients are computed in the forward pass
while they do (as in Liger-Kernel's fused linear cross-entropy, arXiv 2410.10989), so that nothing is computed twice, and
the backward pass only scales them. Chunks are of tokens, not of the vocabulary: each token's softmax is whole.

`head_of` finds and verifies what a model does between its decoder and its logits; for a model that does something else,
this loss is not used.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from eval.model_state import device_of, evaluating
from eval.perplexity import accepted
from finetune.data.samples import IGNORE
from finetune.train import trace_context
from finetune.train.fast import kernels

CHUNK = 256  # tokens: their logits stay in the CPU's cache, and the matrix product is still efficient


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        chunk: int,
        scale: float,
        softcap: float | None,
        with_gradients: bool,
    ) -> torch.Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        of_hidden, of_weight, of_bias = (with_gradients and needed for needed in ctx.needs_input_grad[:3])
        with torch.autocast(device, enabled=False):
            h, w, b = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
            loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
            grad_hidden = torch.empty_like(h) if of_hidden else None
            grad_weight = torch.zeros_like(weight, dtype=torch.float32) if of_weight else None
            grad_bias = torch.zeros_like(weight[:, 0], dtype=torch.float32) if of_bias else None
            for start in range(0, h.shape[0], chunk):
                part, target = h[start : start + chunk], targets[start : start + chunk]
                valid = target != IGNORE
                index = torch.where(valid, target, 0)[:, None]
                some = of_hidden or of_weight or of_bias
                if some and kernels.switched_on():
                    losses, grad = kernels.cross_entropy_with_gradient(
                        F.linear(part, w, b), index[:, 0], valid.float(), scale, softcap
                    )
                    loss += losses.sum()
                    if grad_bias is not None:
                        grad_bias += grad.sum(0, dtype=torch.float32)
                    _to_gradients(grad, part, w, start, grad_hidden, grad_weight)
                    continue
                # One float32 buffer (tokens, V) from here on, changed in place: logits, their exponentials, their gradient.
                z = F.linear(part, w, b).float()
                slope = None
                if softcap is not None:
                    z.mul_(scale / softcap).tanh_()
                    slope = (z * z).neg_().add_(1) if with_gradients else None
                    z.mul_(softcap)
                elif scale != 1:
                    z.mul_(scale)
                z.sub_(z.amax(1, keepdim=True))
                at_target = z.gather(1, index)
                sums = z.exp_().sum(1, keepdim=True)
                loss += torch.where(valid, (sums.log() - at_target)[:, 0], 0.0).sum()
                if not some:
                    continue
                z.div_(sums).scatter_add_(1, index, torch.full_like(at_target, -1))
                z.masked_fill_(~valid[:, None], 0.0)
                if slope is not None:
                    z.mul_(slope)
                if scale != 1:
                    z.mul_(scale)
                if grad_bias is not None:
                    grad_bias += z.sum(0)
                _to_gradients(z.to(dtype), part, w, start, grad_hidden, grad_weight)
        ctx.gradients = (
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        )
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # Scaled in place and handed over, which saves a copy of the head's gradient; so it works once.
        if ctx.gradients is None:
            raise RuntimeError("chunked_cross_entropy: backward was called twice on the same loss; compute the loss again")
        gradients, ctx.gradients = ctx.gradients, None
        return (*(None if g is None else g.mul_(grad_output) for g in gradients), None, None, None, None, None)


def _to_gradients(
    grad: torch.Tensor,
    part: torch.Tensor,
    weight: torch.Tensor,
    start: int,
    grad_hidden: torch.Tensor | None,
    grad_weight: torch.Tensor | None,
) -> None:
    """Accumulate the gradient of a chunk's logits (n, V) into those of hidden and weight, in place."""
    if grad_hidden is not None:
        torch.mm(grad, weight, out=grad_hidden[start : start + len(grad)])
    if grad_weight is None:
        return
    if grad.dtype == torch.float32:
        grad_weight.addmm_(grad.t(), part)
    else:
        grad_weight += grad.t() @ part


def token_losses(hidden: torch.Tensor, head: LMHead, targets: torch.Tensor, *, chunk: int = CHUNK) -> torch.Tensor:
    """hidden (N, d), targets (N,) → the cross-entropy of each (nats, fp32), without gradients, `chunk` logits at a time."""
    weight, bias = head.linear.weight, head.linear.bias
    with torch.no_grad():
        return torch.cat(
            [
                kernels.cross_entropy(F.linear(part.to(weight.dtype), weight, bias), target, head.scale, head.softcap)
                for part, target in zip(hidden.split(chunk), targets.split(chunk), strict=True)
            ]
        )


def evaluator(head: LMHead, chunk: int = CHUNK) -> Callable[..., torch.Tensor]:
    """The `of_tokens` argument of `eval.perplexity.evaluate_loss` for a model with this head: losses in chunks of logits."""

    def of_tokens(ids: torch.Tensor, positions: torch.Tensor, keep: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return token_losses(head.hidden(ids, positions)[0][keep], head, targets, chunk=chunk)

    return of_tokens


def chunked_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    chunk: int = CHUNK,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    """Summed cross-entropy (nats, float32) of the logits hidden·weightᵀ + bias, `chunk` tokens at a time.

    hidden: (N, d). weight: (V, d), bias: (V,). targets: (N,) int64, -100 for tokens without a target.
    The logits are multiplied by `scale`, then capped: softcap·tanh(logits/softcap) (Gemma 2, arXiv 2408.00118, section 2).
    The product is in autocast's dtype, else in the weight's; everything after it is in float32. The weight's gradient is summed
    over the chunks in float32. Gradients are computed only if needed (not under `no_grad` or if frozen). `backward` works once.

    Raises:
        ValueError: shapes or dtypes do not match.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden must be (N, d) and weight (V, d), not {tuple(hidden.shape)} and {tuple(weight.shape)}")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"targets must be ({hidden.shape[0]},) of int64, not {tuple(targets.shape)} of {targets.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({weight.shape[0]},), not {tuple(bias.shape)}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, not {chunk}")
    return _ChunkedCrossEntropy.apply(hidden, weight, bias, targets, chunk, scale, softcap, torch.is_grad_enabled())


@dataclass(frozen=True)
class LMHead:
    """How a model computes logits: softcap(scale·linear(decoder(ids)))."""

    decoder: nn.Module  # returns hidden states (B, T, d) first
    linear: nn.Linear  # (V, d)
    scale: float
    softcap: float | None

    def hidden(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor:
        """(B, T) → (B, T, d)"""
        return self.decoder(**_arguments(self.decoder, input_ids, position_ids))[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(…, d) → (…, V) float32, not in chunks."""
        return _tail(self.linear(hidden.to(self.linear.weight.dtype)), self.scale, self.softcap)


def _tail(logits: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor:
    logits = logits.float() * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _arguments(module: nn.Module, input_ids: torch.Tensor, position_ids: torch.Tensor | None) -> dict[str, Any]:
    names = accepted(module)
    arguments: dict[str, Any] = {"input_ids": input_ids}
    if "use_cache" in names:
        arguments["use_cache"] = False
    if position_ids is not None and "position_ids" in names:
        arguments["position_ids"] = position_ids
    return arguments


def head_of(model: nn.Module) -> tuple[LMHead | None, str | None]:
    """The model's head, verified; or None and the reason why the chunked loss cannot be used.

    model: a transformers causal language model, with PEFT adapters or without. It needs a decoder (`base_model`), a plain
    `nn.Linear` on its hidden states (`get_output_embeddings`), and a scale or soft cap that the configuration names. Verified, on
    eight tokens and in evaluation mode: the linear gets the decoder's output unchanged; synthetic logits, put in place of
    the linear's, leave the model as that scale and cap predict (a fresh model's own are too small to reach a cap);
    and decoder, head, scale and cap together give the model's logits. The model and its modes do not change.
    """
    parts = _find(model)
    if isinstance(parts, str):
        return None, parts
    base, decoder, linear = parts
    name = type(base).__name__
    embedding = base.get_input_embeddings()
    ids = torch.arange(1, 9, device=device_of(base))[None] % getattr(embedding, "num_embeddings", linear.out_features)
    inputs: list[torch.Tensor] = []
    with evaluating(model), torch.no_grad(), torch.autocast(ids.device.type, enabled=False):
        input_hook = linear.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
        try:
            own = model(**_arguments(base, ids, None)).logits
        finally:
            input_hook.remove()
        if len(inputs) != 1:
            return None, f"{name} calls its head {len(inputs)} times"
        if trace_context.current() is not None:  # tensors without values: there are only shapes to compare
            if inputs[0].shape[:-1] != ids.shape or own.shape != (*ids.shape, linear.out_features):
                return None, f"{name} gives other logits than its decoder followed by its head"
            caps = _named(base, SOFT_CAPS)
            return LMHead(decoder, linear, 1.0, caps[0] if caps else None), None
        hidden = LMHead(decoder, linear, 1.0, None).hidden(ids, None)
        if not _equal(hidden, inputs[0]):
            return None, f"{name} changes the output of {type(decoder).__name__} before its head, or calls it differently"
        # (1, 8, V): from -0.001 … 0.001 at the first token to -10,000 … 10,000 at the last
        synthetic = 10.0 ** torch.arange(-3, 5, device=ids.device)[:, None] * torch.linspace(-1, 1, linear.out_features).to(
            ids.device
        )
        synthetic = synthetic[None].to(linear.weight.dtype)
        output_hook = linear.register_forward_hook(lambda module, arguments, output: synthetic)
        try:
            capped = model(**_arguments(base, ids, None)).logits
        finally:
            output_hook.remove()
        scale_and_cap = _fit(base, synthetic, capped)
        if scale_and_cap is None:
            return None, f"{name} does more to its logits than the scale and soft cap in its configuration"
        head = LMHead(decoder, linear, *scale_and_cap)
        if not _equal(head.logits(hidden), own):
            return None, f"{name} gives other logits than its decoder followed by its head"
    return head, None


def _find(model: nn.Module) -> tuple[Any, nn.Module, nn.Linear] | str:
    """(model inside its wrappers, decoder, head), or the reason why not."""
    base: Any = model
    if hasattr(base, "get_base_model"):  # PEFT
        base = base.get_base_model()
    name = type(base).__name__
    if hasattr(base, "_orig_mod") or base._compiled_call_impl is not None:
        return f"{name} is compiled as a whole"
    if not hasattr(base, "get_output_embeddings") or not hasattr(base, "base_model"):
        return f"{name} is not a transformers model"
    if base.config.is_encoder_decoder:
        return f"{name} has an encoder"
    decoder, linear = base.base_model, base.get_output_embeddings()
    if linear is None or decoder is base:
        return f"{name} has no {'output embedding' if linear is None else 'decoder of its own'}"
    location = next((path for path, module in base.named_modules() if module is linear), "its head")
    if type(linear) is not nn.Linear:
        return f"{location} of {name} is a {type(linear).__name__} of {type(linear).__module__}, not a plain nn.Linear"
    if linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or "forward" in vars(linear):
        return f"{location} of {name} has hooks, which the chunked loss would bypass"
    if any(parameter.is_meta for parameter in base.parameters()):
        return f"{name} has weights on the meta device, so it cannot be verified"
    return base, decoder, linear


SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier")
SOFT_CAPS = ("final_logit_softcapping", "output_logit_soft_cap", "logits_soft_cap")


def _named(base: Any, keys: tuple[str, ...]) -> list[float]:
    """Nonzero values that the model or its configuration has under these names."""
    values = [getattr(of, key, None) for of in (base, base.config) for key in keys]
    return [float(value) for value in values if isinstance(value, int | float) and value]


def _fit(base: Any, logits: torch.Tensor, answer: torch.Tensor) -> tuple[float, float | None] | None:
    """The (scale, softcap) of the model or its configuration that turn `logits` into `answer`; None if there are none."""
    scales, caps = _named(base, SCALES), _named(base, SOFT_CAPS)
    if answer.shape != logits.shape:
        return None
    best, closest = None, 4 * torch.finfo(answer.dtype).eps  # relative: a cap in the logits' dtype rounds three times
    for scale, cap in itertools.product([1.0, *scales, *(1 / s for s in scales)], [None, *caps]):
        expected = _tail(logits, scale, cap)
        difference = ((answer.float() - expected).abs() / expected.abs().clamp(min=1e-30)).max().item()
        if difference < closest:
            best, closest = (scale, cap), difference
    return best


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether they agree within 16 units in the last place of the largest value, in the coarser of their dtypes."""
    if a.shape != b.shape:
        return False
    eps = max(torch.finfo(a.dtype).eps, torch.finfo(b.dtype).eps)
    return bool((a.float() - b.float()).abs().max() <= 16 * eps * b.float().abs().max())


def fused_linear_cross_entropy(
    model: nn.Module,
    head: LMHead,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    *,
    chunk: int = CHUNK,
) -> tuple[torch.Tensor, int]:
    """(summed cross-entropy of the next tokens in nats, their number), of a `model` whose head is `head`.

    input_ids, position_ids: (B, T). labels: (B, T), the token AT each position or -100 if it is not trained on; None: all.
    Logits are computed for trained tokens only, `chunk` of them at a time.
    """
    if head.linear not in model.modules():
        raise ValueError("the head belongs to a different model")
    hidden = head.hidden(input_ids, position_ids)[:, :-1].flatten(0, 1)
    targets = (input_ids if labels is None else labels)[:, 1:].flatten()
    if labels is not None:
        trained = (targets != IGNORE).nonzero()[:, 0]
        hidden, targets = hidden[trained], targets[trained]
    weight, bias = head.linear.weight, head.linear.bias
    loss = chunked_cross_entropy(hidden, weight, targets, chunk=chunk, bias=bias, softcap=head.softcap, scale=head.scale)
    return loss, targets.numel()
