"""The chunked loss equals the whole one, in value and gradients; its memory; heads of real architectures."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.train.fast.chunked_loss import LMHead, chunked_cross_entropy, fused_linear_cross_entropy, head_of

N, D, V = 37, 24, 53


class Peak(TorchDispatchMode):
    """The most bytes that live at once in storages which operations inside have made, and the largest of them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = self.largest = 0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()

    def _made(self, tensor: Any) -> None:
        if not isinstance(tensor, torch.Tensor):
            return
        storage = tensor.untyped_storage()
        if storage in self.known:
            return
        size = storage.nbytes()
        self.known.add(storage)
        self.now += size
        self.most, self.largest = max(self.most, self.now), max(self.largest, size)

        def freed() -> None:
            self.now -= size

        weakref.finalize(storage, freed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in args:
            if isinstance(tensor, torch.Tensor):
                self.known.add(tensor.untyped_storage())  # what came from outside does not count
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            self._made(tensor)
        return out


def problem(dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=g).to(dtype)
    weight = (torch.randn(V, D, generator=g) * 0.7).to(dtype)
    bias = torch.randn(V, generator=g).to(dtype)
    targets = torch.randint(0, V, (N,), generator=g)
    targets[::5] = -100
    return hidden, weight, bias, targets


def whole(hidden: Any, weight: Any, targets: Any, bias: Any = None, softcap: float | None = None, scale: float = 1.0) -> Any:
    logits = F.linear(hidden, weight, bias).float() * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, reduction="sum", ignore_index=-100)


def both(dtype: torch.dtype, *, chunk: int, with_bias: bool, factor: float = 0.3, **options: Any) -> list[list[torch.Tensor]]:
    """[[loss, gradients…] of the chunked, of the whole]"""
    results = []
    for chunked in (True, False):
        hidden, weight, bias, targets = problem(dtype)
        leaves = [t.requires_grad_() for t in ((hidden, weight, bias) if with_bias else (hidden, weight))]
        if chunked:
            loss = chunked_cross_entropy(hidden, weight, targets, chunk=chunk, bias=bias if with_bias else None, **options)
        else:
            loss = whole(hidden, weight, targets, bias if with_bias else None, **options)
        (loss * factor).backward()
        results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    return results


@pytest.mark.parametrize("chunk", [1, 8, 37, 1000])
@pytest.mark.parametrize(
    ("with_bias", "options"),
    [(False, {}), (True, {}), (False, {"softcap": 3.0}), (True, {"scale": 0.25}), (True, {"softcap": 2.0, "scale": 1.7})],
)
def test_it_is_the_cross_entropy_of_whole_logits(chunk: int, with_bias: bool, options: dict[str, float]) -> None:
    ours, theirs = both(torch.float32, chunk=chunk, with_bias=with_bias, **options)
    assert ours[0].dtype == torch.float32
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=0)
    for mine, other in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}])
def test_in_bfloat16_the_error_is_that_of_its_roundings(options: dict[str, float]) -> None:
    """Against exact gradients of the same bf16 numbers: within 2 % of the largest, and no worse than twice the whole one's."""
    ours, theirs = both(torch.bfloat16, chunk=8, with_bias=True, **options)
    hidden, weight, bias, targets = (t.double() if t.is_floating_point() else t for t in problem(torch.bfloat16))
    leaves = [hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    logits = F.linear(hidden, weight, bias)
    if options:
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    exact = F.cross_entropy(logits, targets, reduction="sum", ignore_index=-100)
    (exact * 0.3).backward()
    torch.testing.assert_close(ours[0].double(), exact.detach(), rtol=3e-3, atol=0)
    for mine, other, leaf in zip(ours[1:], theirs[1:], leaves, strict=True):
        assert mine.dtype == torch.bfloat16
        assert leaf.grad is not None
        largest = leaf.grad.abs().max()
        error, plain = (mine.double() - leaf.grad).abs().max(), (other.double() - leaf.grad).abs().max()
        assert error < 0.02 * largest
        assert error < 2 * plain + 0.004 * largest


def test_the_weights_gradient_is_summed_in_float32() -> None:
    """256 chunks that say the same: a sum in bf16 stops growing when a chunk's part falls below its last place."""
    hidden, target = torch.ones(1024, 8, dtype=torch.bfloat16), torch.zeros(1024, dtype=torch.int64)
    weight = torch.zeros(4, 8, dtype=torch.bfloat16, requires_grad=True)
    chunked_cross_entropy(hidden, weight, target, chunk=4).backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad.float()[:, 0], torch.tensor([-768.0, 256.0, 256.0, 256.0]), rtol=0.005, atol=0)
    hidden = hidden * 0.3  # not a power of two: nothing is exact by luck
    weight.grad = None
    chunked_cross_entropy(hidden, weight, target, chunk=4).backward()
    expected = torch.tensor([-768.0, 256.0, 256.0, 256.0]) * hidden[0, 0].float()
    torch.testing.assert_close(weight.grad.float()[:, 0], expected, rtol=0.005, atol=0)


def test_under_autocast_as_the_whole_one() -> None:
    results = []
    for chunked in (True, False):
        hidden, weight, bias, targets = problem()
        for leaf in (hidden, weight, bias):
            leaf.requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = (
                chunked_cross_entropy(hidden, weight, targets, chunk=64, bias=bias)
                if chunked
                else whole(hidden, weight, targets, bias)
            )
        loss.backward()
        assert loss.dtype == torch.float32
        assert hidden.grad is not None
        assert weight.grad is not None
        assert hidden.grad.dtype == weight.grad.dtype == torch.float32
        results.append((loss.detach(), hidden.grad, weight.grad))
    (ours, *mine), (theirs, *others) = results
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)  # the products are the same bf16 numbers
    for a, b in zip(mine, others, strict=True):
        assert (a - b).abs().max() < 0.01 * b.abs().max()


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    hidden, weight, _, targets = problem()
    leaf = weight if frozen == "hidden" else hidden
    leaf.requires_grad_()
    chunked_cross_entropy(hidden, weight, targets, chunk=8).backward()
    expected = torch.autograd.grad(whole(hidden, weight, targets), leaf)[0]
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-5, atol=2e-6)
    assert (hidden if frozen == "hidden" else weight).grad is None


def test_no_targets_no_loss() -> None:
    hidden, weight, _, targets = problem()
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = chunked_cross_entropy(hidden, weight, torch.full_like(targets, -100), chunk=8)
    loss.backward()
    assert loss == 0
    assert hidden.grad is not None
    assert weight.grad is not None
    assert not hidden.grad.any()
    assert not weight.grad.any()
    empty = chunked_cross_entropy(hidden[:0], weight, targets[:0])
    empty.backward()
    assert empty == 0


def test_a_large_logit_neither_overflows_nor_hides_a_bad_target() -> None:
    hidden, weight, _, targets = problem()
    torch.testing.assert_close(
        chunked_cross_entropy(hidden * 1e4, weight, targets, chunk=8), whole(hidden * 1e4, weight, targets), rtol=1e-6, atol=0
    )
    for bad in (V, -1):
        targets[1] = bad
        with pytest.raises((IndexError, RuntimeError)):
            chunked_cross_entropy(hidden, weight, targets)


def test_backward_once_and_not_twice_differentiable() -> None:
    hidden, weight, _, targets = problem()
    hidden.requires_grad_()
    loss = chunked_cross_entropy(hidden, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward was called twice"):
        loss.backward()
    gradient = torch.autograd.grad(chunked_cross_entropy(hidden, weight, targets), hidden, create_graph=True)[0]
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        gradient.sum().backward()


def test_shapes_are_looked_at() -> None:
    hidden, weight, bias, targets = problem()
    for arguments, message in [
        ((hidden[None], weight, targets), "hidden must be"),
        ((hidden, weight[:, 1:], targets), "hidden must be"),
        ((hidden, weight, targets[1:]), "targets must be"),
        ((hidden, weight, targets.int()), "targets must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            chunked_cross_entropy(*arguments)
    with pytest.raises(ValueError, match="bias"):
        chunked_cross_entropy(hidden, weight, targets, bias=bias[1:])
    with pytest.raises(ValueError, match="chunk"):
        chunked_cross_entropy(hidden, weight, targets, chunk=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_never_whole(dtype: torch.dtype) -> None:
    tokens, vocabulary, width, chunk = 1024, 2048, 16, 64
    hidden = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, vocabulary, (tokens,))
    logits = 4 * tokens * vocabulary
    with Peak() as plain:
        whole(hidden, weight, targets).backward()
    assert plain.most > 1.9 * logits  # the measure sees what it should
    hidden.grad = weight.grad = None
    with Peak() as chunked:
        chunked_cross_entropy(hidden, weight, targets, chunk=chunk).backward()
    one = 4 * chunk * vocabulary
    assert chunked.largest <= one
    # three chunks' buffers (float32, what it is made from, masks) and the gradients: fp32, one chunk's part, in their dtype
    assert chunked.most <= 3 * one + 10 * vocabulary * width + 8 * tokens * width
    assert chunked.most < logits / 3
    # without gradients none are computed
    with torch.no_grad(), Peak() as scored:
        loss = chunked_cross_entropy(hidden, weight, targets, chunk=chunk)
    assert not loss.requires_grad
    assert scored.most < chunked.most - 4 * vocabulary * width


# --- heads

SMALL = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = SMALL | {"num_key_value_heads": 2, "max_position_embeddings": 64}
HANDLED: dict[str, tuple[dict[str, Any], float, float | None]] = {
    "Llama": (GROUPED, 1.0, None),
    "Qwen2": (GROUPED, 1.0, None),
    "Qwen3": (GROUPED | {"head_dim": 8}, 1.0, None),
    "BitNet": (GROUPED | {"pad_token_id": 0}, 1.0, None),
    "Gemma2": (GROUPED | {"head_dim": 8, "final_logit_softcapping": 3.0, "pad_token_id": 0}, 1.0, 3.0),
    "Granite": (GROUPED | {"logits_scaling": 8.0}, 1 / 8, None),
    "Cohere": (GROUPED | {"logit_scale": 0.0625, "pad_token_id": 0}, 0.0625, None),
    "GPT2": ({"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, 1.0, None),
    "Phi": (GROUPED, 1.0, None),  # its head has a bias
    "GPTNeoX": (SMALL | {"max_position_embeddings": 64}, 1.0, None),
    "NanoChat": (GROUPED | {"final_logit_softcapping": 15.0}, 1.0, 15.0),
    "Mamba": ({"vocab_size": 97, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2}, 1.0, None),
}  # fmt: skip


def tiny(kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    torch.manual_seed(0)
    configuration = HANDLED[kind][0] if kind in HANDLED else GROUPED
    config = getattr(transformers, f"{kind}Config")(**(configuration | changes))
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()  # they begin at zero, where a forgotten one would not be seen
    return model.train()


def plain_sum(model: nn.Module, input_ids: torch.Tensor, position_ids: torch.Tensor | None, labels: torch.Tensor) -> torch.Tensor:
    more = {} if position_ids is None else {"position_ids": position_ids}
    logits = model(input_ids=input_ids, use_cache=False, **more).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum", ignore_index=-100)


def no_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


@pytest.mark.parametrize("kind", HANDLED)
def test_the_loss_of_an_architecture_is_that_of_its_own_logits(kind: str) -> None:
    model = tiny(kind)
    no_dropout(model)
    head, why = head_of(model)
    assert why is None
    assert head is not None
    assert (head.scale, head.softcap) == pytest.approx(HANDLED[kind][1:])
    assert model.training
    assert not head.linear._forward_hooks
    assert not head.linear._forward_pre_hooks
    ids = torch.randint(1, 97, (2, 16))
    labels = ids.clone()
    labels[0, :9] = -100
    plain = plain_sum(model, ids, None, labels)
    plain.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    loss, count = fused_linear_cross_entropy(model, head, ids, None, labels, chunk=5)
    loss.backward()
    assert count == 7 + 15
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
    assert expected.keys() == {name for name, p in model.named_parameters() if p.grad is not None}
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", ["Llama", "Gemma2", "NanoChat", "Granite"])
def test_heads_in_bfloat16(kind: str) -> None:
    model = tiny(kind, torch.bfloat16)
    head, why = head_of(model)
    assert head is not None, why
    assert (head.scale, head.softcap) == pytest.approx(HANDLED[kind][1:])


def test_packed_rows_and_every_next_token() -> None:
    model = tiny("Llama")
    head, _ = head_of(model)
    assert head is not None
    ids = torch.randint(1, 97, (1, 12))
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    apart, count = fused_linear_cross_entropy(model, head, ids, positions)
    assert count == 11
    torch.testing.assert_close(apart, plain_sum(model, ids, positions, ids), rtol=1e-6, atol=0)
    together, _ = fused_linear_cross_entropy(model, head, ids)
    assert abs(apart.item() - together.item()) > 1e-4
    with pytest.raises(ValueError, match="a different model"):
        fused_linear_cross_entropy(tiny("Llama"), head, ids)


def test_adapters_and_ternary_layers() -> None:
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    import quant

    ternary = tiny("Llama")
    quant.swap(ternary, scheme="ternary", trainable=True)
    head, why = head_of(ternary)
    assert head is not None, why
    ids = torch.randint(1, 97, (1, 12))
    loss, _ = fused_linear_cross_entropy(ternary, head, ids)
    torch.testing.assert_close(loss, plain_sum(ternary, ids, None, ids), rtol=1e-6, atol=0)
    lora = get_peft_model(tiny("Llama"), LoraConfig(target_modules="all-linear", init_lora_weights=False))
    head, why = head_of(lora)
    assert head is not None, why
    loss, _ = fused_linear_cross_entropy(lora, head, ids)
    loss.backward()
    torch.testing.assert_close(loss, plain_sum(lora, ids, None, ids), rtol=1e-6, atol=0)
    assert all((p.grad is not None) == ("lora" in name) for name, p in lora.named_parameters())
    on_head = get_peft_model(tiny("Llama"), LoraConfig(target_modules=["q_proj", "lm_head"]))
    assert head_of(on_head) == (None, "lm_head of LlamaForCausalLM is a Linear of peft.tuners.lora.layer, not a plain nn.Linear")
    prompts = get_peft_model(tiny("Llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert head_of(prompts)[0] is None


def scaled_hidden(model: Any) -> None:
    """As MiniCPM3: the hidden states are changed before the head."""
    inner = model.model.forward
    calls = iter(range(100))

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = inner(*args, **kwargs)
        if next(calls) == 0:
            output.last_hidden_state = output.last_hidden_state * 0.5
        return output

    model.model.forward = forward


def odd_tail(model: Any) -> None:
    inner = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = inner(*args, **kwargs)
        output.logits = output.logits.clamp(max=50)  # felt by made-up logits alone
        return output

    model.forward = forward


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (scaled_hidden, "changes the output of LlamaModel"),
        (odd_tail, "does more to its logits"),
        (lambda model: model.lm_head.register_forward_hook(lambda *a: None), "lm_head of LlamaForCausalLM has hooks"),
        (lambda model: model.compile(), "compiled as a whole"),
        (lambda model: model.to("meta"), "meta device"),
        (lambda model: nn.utils.parametrizations.weight_norm(model.lm_head), "not a plain"),
    ],
)
def test_what_cannot_be_taken_apart_is_said(change: Callable[[Any], None], reason: str) -> None:
    model = tiny("Llama")
    change(model)
    head, why = head_of(model)
    assert head is None
    assert reason in (why or "")


def test_a_cap_that_is_only_in_the_configuration_is_not_applied() -> None:
    model = tiny("Llama")
    model.config.final_logit_softcapping = 2.0
    head, why = head_of(model)
    assert isinstance(head, LMHead), why
    assert head.softcap is None


def test_other_models_are_refused() -> None:
    assert "not a transformers model" in (head_of(nn.Sequential(nn.Linear(2, 2)))[1] or "")
    config = transformers.T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    assert "encoder" in (head_of(transformers.T5ForConditionalGeneration(config))[1] or "")
