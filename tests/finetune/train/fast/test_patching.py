"""The patched training step has the loss and gradients of the plain one, on the architectures that people fine-tune."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from finetune.train.fast import kernels, patching
from finetune.train.fast.chunked_loss import LMHead, evaluator, fused_linear_cross_entropy, head_of
from quant import linear_targets, register_peft, swap

SIZES = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "smollm3": ("SmolLM3", {}),
    "mistral": ("Mistral", {"sliding_window": 9}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "gemma": ("Gemma", {"head_dim": 16}),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": 9, "query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3", {"head_dim": 16, "sliding_window": 9, "query_pre_attn_scalar": 16}),
    "phi": ("Phi", {}),
    "phi3": ("Phi3", {}),
    "bitnet": ("BitNet", {"hidden_act": "silu"}),
}
# Patches found in models of two layers. Phi has neither gated activations nor RMS norms; LayerNorm is one kernel already.
EXPECTED_PATCHES = {
    "phi": {"groups of adapters": 8},
    "phi3": {"groups of adapters": 8, "gated activations": 2, "norms": 5},
    "qwen3": {"groups of adapters": 8, "gated activations": 2, "norms": 9},
    "gemma2": {"groups of adapters": 8, "gated activations": 2, "norms": 9},
    "gemma3": {"groups of adapters": 8, "gated activations": 2, "norms": 13},
    "bitnet": {"groups of adapters": 8, "gated activations": 2, "norms": 9},
}
DEFAULT_PATCHES = {"groups of adapters": 8, "gated activations": 2, "norms": 5}
LENGTHS = (13, 1, 22, 7)


@pytest.fixture(autouse=True)
def _fail_on_recompile_limit() -> Iterator[None]:
    """A test fails where torch.compile would reach its recompile limit and fall back to eager mode."""
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield


def build_model(family: str, *, dtype: torch.dtype = torch.float32, scheme: str | None = "nf4", **lora: Any) -> Any:
    """A small random model with adapters whose B is not zero, quantized with `scheme` if given."""
    name, extra = FAMILIES[family]
    config_class = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config_class(**(SIZES | extra)))
    for module in model.modules():  # norms and biases other than the defaults
        if "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None:
            nn.init.normal_(module.weight, 0.5, 0.2)
        if getattr(module, "bias", None) is not None:
            nn.init.normal_(module.bias, 0.0, 0.2)
    model.to(dtype)
    if scheme is not None:
        swap(model, scheme=scheme)
    targets = linear_targets(model)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM", **({"lora_dropout": 0.0} | lora))
    register_peft(config)
    wrapped = get_peft_model(model, config, autocast_adapter_dtype=False)
    torch.manual_seed(1)
    for path, parameter in wrapped.named_parameters():
        if "lora_B" in path:
            nn.init.normal_(parameter, 0.0, 0.2)
    return wrapped.train()


def batch(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 128, (1, sum(lengths)), generator=generator)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    labels = ids.masked_fill((positions == 0) | (torch.rand(ids.shape, generator=generator) < 0.3), -100)
    return ids, positions, labels


def loss_and_gradients(model: Any, head: LMHead | None = None, lengths: tuple[int, ...] = LENGTHS) -> dict[str, Tensor]:
    """The loss as "loss", and the gradient of every trainable parameter by name."""
    ids, positions, labels = batch(lengths)
    model.zero_grad()
    if head is None:
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        mask = labels[0, 1:] != -100
        loss = nn.functional.cross_entropy(logits[0, :-1][mask].float(), labels[0, 1:][mask], reduction="sum")
    else:
        loss, _ = fused_linear_cross_entropy(model, head, ids, positions, labels, chunk=8)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


def max_relative_error(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest relative difference of the loss and of each gradient."""
    assert ours.keys() == theirs.keys()
    assert len(ours) > 8
    return max(float((ours[n].float() - theirs[n].float()).norm() / theirs[n].float().norm()) for n in ours)


def patch_counts(fast_step: patching.FastStep) -> dict[str, int]:
    names = [patch.name for patch in fast_step.patches]
    return {name: names.count(name) for name in names}


@pytest.mark.parametrize("family", FAMILIES)
def test_fast_step_equals_plain_step(family: str) -> None:
    model = build_model(family)
    plain = loss_and_gradients(model)
    fast_step = patching.find(model)
    always = {"attention without padding": 1, "rotary positions": 1}
    assert (fast_step.skipped, patch_counts(fast_step)) == ({}, always | EXPECTED_PATCHES.get(family, DEFAULT_PATCHES))
    head, reason = head_of(model)
    assert reason is None
    fast_step.install()
    assert max_relative_error(loss_and_gradients(model, head), plain) < 2e-5
    fast_step.remove()
    assert max_relative_error(loss_and_gradients(model), plain) == 0


@pytest.mark.parametrize("part", ["attention", "lora", "blocks", "loss"])
def test_each_patch_alone_equals_plain_step(part: str) -> None:
    model = build_model("qwen3")
    plain = loss_and_gradients(model)
    parts = dict.fromkeys(("attention", "lora", "blocks"), False) | ({} if part == "loss" else {part: True})
    fast_step = patching.find(model, **parts)
    assert bool(fast_step.patches) == (part != "loss")
    fast_step.install()
    assert max_relative_error(loss_and_gradients(model, head_of(model)[0] if part == "loss" else None), plain) < 2e-5
    fast_step.remove()


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi"])
def test_bf16_error_is_at_most_1_5_times_that_of_the_plain_step(family: str) -> None:
    """Both errors are against the same weights in fp32.

    The plain step casts x to fp32 for fp32 adapters; the fast one multiplies in bf16, as autocast does.
    """
    exact = loss_and_gradients(build_model(family, dtype=torch.bfloat16).float())
    model = build_model(family, dtype=torch.bfloat16)
    plain, head = loss_and_gradients(model), head_of(model)[0]
    with patching.patched(model):
        ours = loss_and_gradients(model, head)

    def error(actual: dict[str, Tensor]) -> float:
        return sum(float((actual[n].float() - exact[n].float()).norm() / exact[n].float().norm()) for n in exact) / len(exact)

    assert 0 < error(ours) < 1.5 * error(plain)


def test_other_sequence_lengths_do_not_recompile() -> None:
    model = build_model("llama")
    plain = {lengths: loss_and_gradients(model, lengths=lengths) for lengths in ((13, 1, 22, 7), (9,), (5, 40), (64, 2, 2))}
    head = head_of(model)[0]
    torch._dynamo.utils.counters.clear()
    with patching.patched(model):
        for number, (lengths, expected) in enumerate(plain.items()):
            assert max_relative_error(loss_and_gradients(model, head, lengths), expected) < 2e-5
            if number == 1:
                compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled
    assert not torch._dynamo.utils.counters["recompile_limit"]


@pytest.mark.parametrize(("scheme", "bound"), [(None, 2e-5), ("ternary", 4e-3)])
def test_float_and_ternary_bases_equal_plain_step(scheme: str | None, bound: float) -> None:
    """Ternary: a difference in the last bit of an activation can round it to another of the 256 int8 codes."""
    model = build_model("llama", scheme=scheme)
    plain = loss_and_gradients(model)
    with patching.patched(model, attention=False, blocks=False) as fast_step:
        assert patch_counts(fast_step) == {"groups of adapters": 8}
        assert max_relative_error(loss_and_gradients(model), plain) < bound


def test_dora_adapters_are_skipped_with_a_reason() -> None:
    model = build_model("llama", use_dora=True)
    plain = loss_and_gradients(model)
    fast_step = patching.find(model)
    assert set(fast_step.skipped.values()) == {"adapter: DoRA"}
    assert len(fast_step.skipped) == 14
    assert "groups of adapters" not in patch_counts(fast_step)
    assert any("DoRA" in line and "13 more" in line for line in fast_step.in_words())
    assert any(
        line.startswith("fast: attention without padding, 2 gated activations, 5 norms, rot") for line in fast_step.in_words()
    )
    fast_step.install()
    assert max_relative_error(loss_and_gradients(model), plain) < 2e-5
    fast_step.remove()


def test_rslora_and_checkpointing_equal_plain_step() -> None:
    model = build_model("llama", use_rslora=True)
    plain = loss_and_gradients(model)
    model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    head = head_of(model)[0]
    saved_shapes: list[torch.Size] = []
    with patching.patched(model):
        assert max_relative_error(loss_and_gradients(model, head), plain) < 2e-5
        with torch.autograd.graph.save_on_cpu():  # train.checkpointing: offload
            assert max_relative_error(loss_and_gradients(model, head), plain) < 2e-5
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved_shapes.append(t.shape), t)[1], lambda t: t):
            loss_and_gradients(model, head)
    assert saved_shapes[:2] == [(1, sum(LENGTHS), 64)] * 2  # what offloading moves: the input of each of the two layers


def test_unknown_blocks_are_named_and_left_unpatched() -> None:
    class Odd(nn.Module):
        """Like an MLP, but with the activation squared."""

        def __init__(self, mlp: Any) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj, self.act_fn = mlp.gate_proj, mlp.up_proj, mlp.down_proj, mlp.act_fn

        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)).pow(2) * self.up_proj(x))

    class OddNorm(nn.Module):
        def __init__(self, norm: Any) -> None:
            super().__init__()
            self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

        def forward(self, x: Tensor) -> Tensor:
            return x / (x.abs().mean(-1, keepdim=True) + self.variance_epsilon) * self.weight

    model = build_model("llama")
    layer = model.get_base_model().model.layers[1]
    layer.mlp, layer.input_layernorm = Odd(layer.mlp), OddNorm(layer.input_layernorm)
    plain = loss_and_gradients(model)
    fast_step = patching.find(model)
    assert set(fast_step.skipped) == {"model.layers.1.mlp", "model.layers.1.input_layernorm"}
    assert patch_counts(fast_step) | {"norms": 4, "gated activations": 1} == patch_counts(fast_step)
    fast_step.install()
    assert max_relative_error(loss_and_gradients(model), plain) < 2e-5
    fast_step.remove()


def test_model_that_fails_in_the_trial_pass_is_not_patched() -> None:
    model = build_model("llama")
    original = model.get_base_model().model.layers[1].self_attn.forward

    def failing_forward(hidden_states: Tensor, **kwargs: Any) -> Any:
        raise RuntimeError("no two samples in a row")

    model.get_base_model().model.layers[1].self_attn.forward = failing_forward
    fast_step = patching.find(model, not_compiled="off")
    model.get_base_model().model.layers[1].self_attn.forward = original
    assert fast_step.patches == []
    assert fast_step.skipped["attention"] == "RuntimeError in the trial pass: no two samples in a row"
    assert sum("RuntimeError" in why for why in fast_step.skipped.values()) == 15


def test_adapter_called_twice_is_not_patched() -> None:
    model = build_model("llama")
    layer = model.get_base_model().model.layers[0].mlp
    original = layer.forward
    layer.forward = lambda x: original(x) + 0.1 * layer.gate_proj(x).mean()
    plain = loss_and_gradients(model)
    fast_step = patching.find(model, not_compiled="off")
    assert fast_step.skipped["model.layers.0.mlp.gate_proj"] == "adapter: it is not called exactly once in a pass"
    fast_step.install()
    assert max_relative_error(loss_and_gradients(model), plain) < 2e-5
    fast_step.remove()


def test_unsupported_attention_is_not_patched() -> None:
    config = transformers.LlamaConfig(**(SIZES | {"attention_dropout": 0.1}))
    fast_step = patching.find(transformers.LlamaForCausalLM(config))
    assert "attention without padding" not in patch_counts(fast_step)
    assert fast_step.skipped["model.layers.0.self_attn"].endswith("it uses dropout on attention weights")
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1))
    fast_step = patching.find(mamba)
    assert "does not call attention" in fast_step.skipped["attention"]
    assert fast_step.skipped["backbone.layers.0.mixer"] == "MambaMixer is not a block of a known form"


def test_generation_is_unchanged_by_installed_patches() -> None:
    model = build_model("llama").eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    fast_step = patching.find(model)
    fast_step.install()
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=8, do_sample=False), expected)
    with fast_step.paused():
        assert not any("forward" in vars(module) for module in model.modules())
        assert model.get_base_model().config._attn_implementation == "sdpa"
    assert fast_step.installed
    mask = torch.tensor([[0, 1, 1, 1]])
    with torch.no_grad():
        patched_logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        fast_step.remove()
        assert torch.allclose(model(input_ids=ids, attention_mask=mask, use_cache=False).logits, patched_logits, atol=1e-5)


def test_evaluation_losses_equal_those_without_patches() -> None:
    from eval.perplexity import evaluate_loss

    model = build_model("gemma2").eval()
    generator = torch.Generator().manual_seed(2)
    rows = [(row := torch.randint(3, 128, (n,), generator=generator).tolist(), [-100, *row[1:]]) for n in (9, 30, 4, 17)]
    plain, head = evaluate_loss(model, rows, batch_tokens=40), head_of(model)[0]
    assert head is not None
    with patching.patched(model):
        ours = evaluate_loss(model, rows, batch_tokens=40, of_tokens=evaluator(head, 7))
    assert ours.row_loss_sums == pytest.approx(plain.row_loss_sums, rel=1e-5)


# ------------------------------------------------------------------------------------------------------------- removing patches


def process_state() -> dict[str, Any]:
    """Global state that patches change."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.models.llama import modeling_llama

    return {
        "rotary": modeling_llama.apply_rotary_pos_emb,
        "attention": dict(AttentionInterface._global_mapping),
        "masks": dict(AttentionMaskInterface._global_mapping),
        "limit": torch._dynamo.config.recompile_limit,
        "compiling": kernels.switched_on(),
    }


def model_state(model: Any) -> dict[str, Any]:
    modules = list(model.modules())
    return {
        "forward": [vars(module).get("forward") for module in modules],
        "hooks": [dict(hooks) for module in modules for hooks in (module._forward_pre_hooks, module._forward_hooks)],
        "configs": [module.config._attn_implementation for module in modules if hasattr(module, "config")],
    }


def test_removed_patches_restore_the_model_and_the_process() -> None:
    """The original objects are back, which is more than equal results."""
    model, before = build_model("llama"), process_state()
    model_before, head = model_state(model), head_of(model)[0]
    with patching.patched(model):
        loss_and_gradients(model, head)
        patched_state = process_state()
        changed = {key for key in patched_state if patched_state[key] != before[key]}
        assert changed >= {"rotary", "attention", "limit", "compiling"}
        assert model_state(model) != model_before
    assert process_state() == before
    assert process_state()["rotary"] is before["rotary"]
    assert model_state(model) == model_before
    patching.find(model)  # the trial pass changes nothing either
    assert (process_state(), model_state(model)) == (before, model_before)
    with pytest.raises(RuntimeError, match="in the middle"), patching.patched(model):
        raise RuntimeError("in the middle")
    assert (process_state(), model_state(model)) == (before, model_before)


@pytest.mark.parametrize("first", [0, 1])
def test_patches_of_two_models_can_be_removed_in_any_order(first: int) -> None:
    """Global patches are removed with the last patched model."""
    models, before = [build_model("llama"), build_model("llama")], process_state()
    plain = loss_and_gradients(models[0])
    fast_steps = [patching.find(models[0])]
    fast_steps[0].install()
    fast_steps.append(patching.find(models[1]))  # while the other is patched
    fast_steps[1].install()
    fast_steps[first].remove()
    assert process_state()["rotary"] is not before["rotary"]
    assert max_relative_error(loss_and_gradients(models[1 - first]), plain) < 2e-5
    fast_steps[1 - first].remove()
    assert process_state() == before
    assert max_relative_error(loss_and_gradients(models[0]), plain) == 0
