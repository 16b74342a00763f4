"""The chunked loss equals the loss of all logits at once, in value and gradients; its memory; heads of real architectures."""

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


class PeakBytes(TorchDispatchMode):
    """Peak bytes of the storages that operations in the context allocate, and the bytes of the largest storage."""

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = self.largest = 0
        self.known_storages: weakref.WeakSet[Any] = weakref.WeakSet()

    def _count(self, tensor: Any) -> None:
        if not isinstance(tensor, torch.Tensor):
            return
        storage = tensor.untyped_storage()
        if storage in self.known_storages:
            return
        size = storage.nbytes()
        self.known_storages.add(storage)
        self.current += size
        self.peak, self.largest = max(self.peak, self.current), max(self.largest, size)

        def freed() -> None:
            self.current -= size

        weakref.finalize(storage, freed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in args:
            if isinstance(tensor, torch.Tensor):
                self.known_storages.add(tensor.untyped_storage())  # inputs do not count
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            self._count(tensor)
        return out


def random_inputs(dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=g).to(dtype)
    weight = (torch.randn(V, D, generator=g) * 0.7).to(dtype)
    bias = torch.randn(V, generator=g).to(dtype)
    targets = torch.randint(0, V, (N,), generator=g)
    targets[::5] = -100
    return hidden, weight, bias, targets


def unchunked_cross_entropy(
    hidden: Any, weight: Any, targets: Any, bias: Any = None, softcap: float | None = None, scale: float = 1.0
) -> Any:
    logits = F.linear(hidden, weight, bias).float() * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, reduction="sum", ignore_index=-100)


def losses_and_gradients(
    dtype: torch.dtype, *, chunk: int, with_bias: bool, factor: float = 0.3, **options: Any
) -> list[list[torch.Tensor]]:
    """[loss, gradients…] of the chunked loss, and the same of the unchunked."""
    results = []
    for chunked in (True, False):
        hidden, weight, bias, targets = random_inputs(dtype)
        leaves = [t.requires_grad_() for t in ((hidden, weight, bias) if with_bias else (hidden, weight))]
        if chunked:
            loss = chunked_cross_entropy(hidden, weight, targets, chunk=chunk, bias=bias if with_bias else None, **options)
        else:
            loss = unchunked_cross_entropy(hidden, weight, targets, bias if with_bias else None, **options)
        (loss * factor).backward()
        results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    return results


@pytest.mark.parametrize("chunk", [1, 8, 37, 1000])
@pytest.mark.parametrize(
    ("with_bias", "options"),
    [(False, {}), (True, {}), (False, {"softcap": 3.0}), (True, {"scale": 0.25}), (True, {"softcap": 2.0, "scale": 1.7})],
)
def test_chunked_loss_and_gradients_equal_those_of_all_logits(chunk: int, with_bias: bool, options: dict[str, float]) -> None:
    actual, expected = losses_and_gradients(torch.float32, chunk=chunk, with_bias=with_bias, **options)
    assert actual[0].dtype == torch.float32
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-6, atol=0)
    for gradient, expected_gradient in zip(actual[1:], expected[1:], strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}])
def test_bfloat16_gradients_are_as_exact_as_those_of_all_logits(options: dict[str, float]) -> None:
    """Errors against float64 gradients: at most 2 % of the largest gradient, and about twice those of the unchunked loss."""
    chunked, unchunked = losses_and_gradients(torch.bfloat16, chunk=8, with_bias=True, **options)
    hidden, weight, bias, targets = (t.double() if t.is_floating_point() else t for t in random_inputs(torch.bfloat16))
    leaves = [hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    logits = F.linear(hidden, weight, bias)
    if options:
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    exact = F.cross_entropy(logits, targets, reduction="sum", ignore_index=-100)
    (exact * 0.3).backward()
    torch.testing.assert_close(chunked[0].double(), exact.detach(), rtol=3e-3, atol=0)
    for gradient, unchunked_gradient, leaf in zip(chunked[1:], unchunked[1:], leaves, strict=True):
        assert gradient.dtype == torch.bfloat16
        assert leaf.grad is not None
        largest = leaf.grad.abs().max()
        error, unchunked_error = (
            (gradient.double() - leaf.grad).abs().max(),
            (unchunked_gradient.double() - leaf.grad).abs().max(),
        )
        assert error < 0.02 * largest
        assert error < 2 * unchunked_error + 0.004 * largest


def test_weight_gradient_is_summed_in_float32() -> None:
    """256 equal chunks: a sum in bf16 stops growing once the gradient of a chunk is below its last place."""
    hidden, target = torch.ones(1024, 8, dtype=torch.bfloat16), torch.zeros(1024, dtype=torch.int64)
    weight = torch.zeros(4, 8, dtype=torch.bfloat16, requires_grad=True)
    chunked_cross_entropy(hidden, weight, target, chunk=4).backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad.float()[:, 0], torch.tensor([-768.0, 256.0, 256.0, 256.0]), rtol=0.005, atol=0)
    hidden = hidden * 0.3  # not a power of two, so that rounding matters
    weight.grad = None
    chunked_cross_entropy(hidden, weight, target, chunk=4).backward()
    expected = torch.tensor([-768.0, 256.0, 256.0, 256.0]) * hidden[0, 0].float()
    torch.testing.assert_close(weight.grad.float()[:, 0], expected, rtol=0.005, atol=0)


def test_autocast_gives_the_loss_and_gradients_of_all_logits() -> None:
    results = []
    for chunked in (True, False):
        hidden, weight, bias, targets = random_inputs()
        for leaf in (hidden, weight, bias):
            leaf.requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = (
                chunked_cross_entropy(hidden, weight, targets, chunk=64, bias=bias)
                if chunked
                else unchunked_cross_entropy(hidden, weight, targets, bias)
            )
        loss.backward()
        assert loss.dtype == torch.float32
        assert hidden.grad is not None
        assert weight.grad is not None
        assert hidden.grad.dtype == weight.grad.dtype == torch.float32
        results.append((loss.detach(), hidden.grad, weight.grad))
    (actual, *gradients), (expected, *expected_gradients) = results
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)  # the products are the same bf16 numbers
    for a, b in zip(gradients, expected_gradients, strict=True):
        assert (a - b).abs().max() < 0.01 * b.abs().max()


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_input_gets_no_gradient(frozen: str) -> None:
    hidden, weight, _, targets = random_inputs()
    leaf = weight if frozen == "hidden" else hidden
    leaf.requires_grad_()
    chunked_cross_entropy(hidden, weight, targets, chunk=8).backward()
    expected = torch.autograd.grad(unchunked_cross_entropy(hidden, weight, targets), leaf)[0]
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-5, atol=2e-6)
    assert (hidden if frozen == "hidden" else weight).grad is None


def test_loss_and_gradients_are_zero_without_targets() -> None:
    hidden, weight, _, targets = random_inputs()
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


def test_large_logits_do_not_overflow_and_invalid_targets_are_errors() -> None:
    hidden, weight, _, targets = random_inputs()
    torch.testing.assert_close(
        chunked_cross_entropy(hidden * 1e4, weight, targets, chunk=8),
        unchunked_cross_entropy(hidden * 1e4, weight, targets),
        rtol=1e-6,
        atol=0,
    )
    for bad in (V, -1):
        targets[1] = bad
        with pytest.raises((IndexError, RuntimeError)):
            chunked_cross_entropy(hidden, weight, targets)


def test_second_backward_and_second_derivatives_are_refused() -> None:
    hidden, weight, _, targets = random_inputs()
    hidden.requires_grad_()
    loss = chunked_cross_entropy(hidden, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward was called twice"):
        loss.backward()
    gradient = torch.autograd.grad(chunked_cross_entropy(hidden, weight, targets), hidden, create_graph=True)[0]
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        gradient.sum().backward()


def test_wrong_shapes_and_types_are_refused() -> None:
    hidden, weight, bias, targets = random_inputs()
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
def test_full_logits_are_never_allocated(dtype: torch.dtype) -> None:
    tokens, vocabulary, width, chunk = 1024, 2048, 16, 64
    hidden = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, vocabulary, (tokens,))
    logits = 4 * tokens * vocabulary
    with PeakBytes() as unchunked:
        unchunked_cross_entropy(hidden, weight, targets).backward()
    assert unchunked.peak > 1.9 * logits  # PeakBytes sees the full logits
    hidden.grad = weight.grad = None
    with PeakBytes() as chunked:
        chunked_cross_entropy(hidden, weight, targets, chunk=chunk).backward()
    chunk_bytes = 4 * chunk * vocabulary
    assert chunked.largest <= chunk_bytes
    # Buffers of three chunks (float32 logits, their source, masks), and gradients: in fp32, of one chunk, and in their dtype.
    assert chunked.peak <= 3 * chunk_bytes + 10 * vocabulary * width + 8 * tokens * width
    assert chunked.peak < logits / 3
    # Under no_grad no gradients are computed.
    with torch.no_grad(), PeakBytes() as without_grad:
        loss = chunked_cross_entropy(hidden, weight, targets, chunk=chunk)
    assert not loss.requires_grad
    assert without_grad.peak < chunked.peak - 4 * vocabulary * width


# --- heads

SMALL = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = SMALL | {"num_key_value_heads": 2, "max_position_embeddings": 64}
ARCHITECTURES: dict[str, tuple[dict[str, Any], float, float | None]] = {
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


def tiny_model(kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    torch.manual_seed(0)
    configuration = ARCHITECTURES[kind][0] if kind in ARCHITECTURES else GROUPED
    config = getattr(transformers, f"{kind}Config")(**(configuration | changes))
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()  # biases start at zero, where a missing one would go unnoticed
    return model.train()


def loss_of_logits(
    model: nn.Module, input_ids: torch.Tensor, position_ids: torch.Tensor | None, labels: torch.Tensor
) -> torch.Tensor:
    positions = {} if position_ids is None else {"position_ids": position_ids}
    logits = model(input_ids=input_ids, use_cache=False, **positions).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum", ignore_index=-100)


def no_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_fused_loss_equals_the_loss_of_each_architectures_logits(kind: str) -> None:
    model = tiny_model(kind)
    no_dropout(model)
    head, reason = head_of(model)
    assert reason is None
    assert head is not None
    assert (head.scale, head.softcap) == pytest.approx(ARCHITECTURES[kind][1:])
    assert model.training
    assert not head.linear._forward_hooks
    assert not head.linear._forward_pre_hooks
    ids = torch.randint(1, 97, (2, 16))
    labels = ids.clone()
    labels[0, :9] = -100
    expected_loss = loss_of_logits(model, ids, None, labels)
    expected_loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    loss, count = fused_linear_cross_entropy(model, head, ids, None, labels, chunk=5)
    loss.backward()
    assert count == 7 + 15
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    assert expected.keys() == {name for name, p in model.named_parameters() if p.grad is not None}
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", ["Llama", "Gemma2", "NanoChat", "Granite"])
def test_heads_are_recognized_in_bfloat16(kind: str) -> None:
    model = tiny_model(kind, torch.bfloat16)
    head, reason = head_of(model)
    assert head is not None, reason
    assert (head.scale, head.softcap) == pytest.approx(ARCHITECTURES[kind][1:])


def test_fused_loss_of_packed_rows_uses_their_positions() -> None:
    model = tiny_model("Llama")
    head, _ = head_of(model)
    assert head is not None
    ids = torch.randint(1, 97, (1, 12))
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    packed_loss, count = fused_linear_cross_entropy(model, head, ids, positions)
    assert count == 11
    torch.testing.assert_close(packed_loss, loss_of_logits(model, ids, positions, ids), rtol=1e-6, atol=0)
    joint_loss, _ = fused_linear_cross_entropy(model, head, ids)
    assert abs(packed_loss.item() - joint_loss.item()) > 1e-4
    with pytest.raises(ValueError, match="a different model"):
        fused_linear_cross_entropy(tiny_model("Llama"), head, ids)


def test_fused_loss_with_adapters_and_ternary_layers() -> None:
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    import quant

    ternary = tiny_model("Llama")
    quant.swap(ternary, scheme="ternary", trainable=True)
    head, reason = head_of(ternary)
    assert head is not None, reason
    ids = torch.randint(1, 97, (1, 12))
    loss, _ = fused_linear_cross_entropy(ternary, head, ids)
    torch.testing.assert_close(loss, loss_of_logits(ternary, ids, None, ids), rtol=1e-6, atol=0)
    lora = get_peft_model(tiny_model("Llama"), LoraConfig(target_modules="all-linear", init_lora_weights=False))
    head, reason = head_of(lora)
    assert head is not None, reason
    loss, _ = fused_linear_cross_entropy(lora, head, ids)
    loss.backward()
    torch.testing.assert_close(loss, loss_of_logits(lora, ids, None, ids), rtol=1e-6, atol=0)
    assert all((p.grad is not None) == ("lora" in name) for name, p in lora.named_parameters())
    on_head = get_peft_model(tiny_model("Llama"), LoraConfig(target_modules=["q_proj", "lm_head"]))
    assert head_of(on_head) == (None, "lm_head of LlamaForCausalLM is a Linear of peft.tuners.lora.layer, not a plain nn.Linear")
    prompts = get_peft_model(tiny_model("Llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert head_of(prompts)[0] is None


def scale_hidden(model: Any) -> None:
    """Change the hidden states before the head, as MiniCPM3 does."""
    real_forward = model.model.forward
    calls = iter(range(100))

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = real_forward(*args, **kwargs)
        if next(calls) == 0:
            output.last_hidden_state = output.last_hidden_state * 0.5
        return output

    model.model.forward = forward


def clamp_logits(model: Any) -> None:
    real_forward = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = real_forward(*args, **kwargs)
        output.logits = output.logits.clamp(max=50)  # changes only the probe's large logits
        return output

    model.forward = forward


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (scale_hidden, "changes the output of LlamaModel"),
        (clamp_logits, "does more to its logits"),
        (lambda model: model.lm_head.register_forward_hook(lambda *a: None), "lm_head of LlamaForCausalLM has hooks"),
        (lambda model: model.compile(), "compiled as a whole"),
        (lambda model: model.to("meta"), "meta device"),
        (lambda model: nn.utils.parametrizations.weight_norm(model.lm_head), "not a plain"),
    ],
)
def test_unsupported_heads_are_refused_with_a_reason(change: Callable[[Any], None], expected: str) -> None:
    model = tiny_model("Llama")
    change(model)
    head, reason = head_of(model)
    assert head is None
    assert expected in (reason or "")


def test_softcap_that_the_model_does_not_use_is_not_applied() -> None:
    model = tiny_model("Llama")
    model.config.final_logit_softcapping = 2.0
    head, reason = head_of(model)
    assert isinstance(head, LMHead), reason
    assert head.softcap is None


def test_models_other_than_decoders_are_refused() -> None:
    assert "not a transformers model" in (head_of(nn.Sequential(nn.Linear(2, 2)))[1] or "")
    config = transformers.T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    assert "encoder" in (head_of(transformers.T5ForConditionalGeneration(config))[1] or "")
