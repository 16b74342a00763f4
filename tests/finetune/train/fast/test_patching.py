"""The fast step against the plain one: the same loss and the same gradients, on the architectures that people fine-tune."""

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
# Groups of adapters, gated activations and norms of two layers; a Phi has neither, and LayerNorm is one kernel as it is.
FOUND = {
    "phi": {"groups of adapters": 8},
    "phi3": {"groups of adapters": 8, "gated activations": 2, "norms": 5},
    "qwen3": {"groups of adapters": 8, "gated activations": 2, "norms": 9},
    "gemma2": {"groups of adapters": 8, "gated activations": 2, "norms": 9},
    "gemma3": {"groups of adapters": 8, "gated activations": 2, "norms": 13},
    "bitnet": {"groups of adapters": 8, "gated activations": 2, "norms": 9},
}
USUAL = {"groups of adapters": 8, "gated activations": 2, "norms": 5}
LENGTHS = (13, 1, 22, 7)


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """Where torch.compile would give up on a function that it has compiled too often, and compute without, a test fails."""
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield


def made(family: str, *, dtype: torch.dtype = torch.float32, scheme: str | None = "nf4", **lora: Any) -> Any:
    """A small random model under adapters whose B is not zero, packed where `scheme` says so."""
    name, extra = FAMILIES[family]
    config_class = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config_class(**(SIZES | extra)))
    for module in model.modules():  # norms that have learnt something, biases that are not zero
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


def gradients(model: Any, head: LMHead | None = None, lengths: tuple[int, ...] = LENGTHS) -> dict[str, Tensor]:
    """The loss, under the name "loss", and every gradient."""
    ids, positions, labels = batch(lengths)
    model.zero_grad()
    if head is None:
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        places = labels[0, 1:] != -100
        loss = nn.functional.cross_entropy(logits[0, :-1][places].float(), labels[0, 1:][places], reduction="sum")
    else:
        loss, _ = fused_linear_cross_entropy(model, head, ids, positions, labels, chunk=8)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def apart(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest relative difference of the loss and of each gradient."""
    assert ours.keys() == theirs.keys()
    assert len(ours) > 8
    return max(float((ours[n].float() - theirs[n].float()).norm() / theirs[n].float().norm()) for n in ours)


def counted(found: patching.FastStep) -> dict[str, int]:
    of = [patch.name for patch in found.patches]
    return {name: of.count(name) for name in of}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fast_step_is_the_plain_one(family: str) -> None:
    model = made(family)
    plain = gradients(model)
    found = patching.find(model)
    own = {"attention without padding": 1, "rotary positions": 1}
    assert (found.skipped, counted(found)) == ({}, own | FOUND.get(family, USUAL))
    head, why = head_of(model)
    assert why is None
    found.install()
    assert apart(gradients(model, head), plain) < 2e-5
    found.remove()
    assert apart(gradients(model), plain) == 0


@pytest.mark.parametrize("part", ["attention", "lora", "blocks", "loss"])
def test_each_part_alone_is_the_plain_step(part: str) -> None:
    model = made("qwen3")
    plain = gradients(model)
    parts = dict.fromkeys(("attention", "lora", "blocks"), False) | ({} if part == "loss" else {part: True})
    found = patching.find(model, **parts)
    assert bool(found.patches) == (part != "loss")
    found.install()
    assert apart(gradients(model, head_of(model)[0] if part == "loss" else None), plain) < 2e-5
    found.remove()


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi"])
def test_in_bf16_it_is_no_further_from_fp32_than_the_plain_step(family: str) -> None:
    """The bound: 1.5 times the plain step's own error, both against the same weights in fp32.

    The plain step casts x to fp32 for adapters that are; the fast one multiplies them in bf16, as autocast does.
    """
    exact = gradients(made(family, dtype=torch.bfloat16).float())
    model = made(family, dtype=torch.bfloat16)
    plain, head = gradients(model), head_of(model)[0]
    with patching.patched(model):
        ours = gradients(model, head)

    def error(found: dict[str, Tensor]) -> float:
        return sum(float((found[n].float() - exact[n].float()).norm() / exact[n].float().norm()) for n in exact) / len(exact)

    assert 0 < error(ours) < 1.5 * error(plain)


def test_other_lengths_are_not_compiled_anew() -> None:
    model = made("llama")
    plain = {lengths: gradients(model, lengths=lengths) for lengths in ((13, 1, 22, 7), (9,), (5, 40), (64, 2, 2))}
    head = head_of(model)[0]
    torch._dynamo.utils.counters.clear()
    with patching.patched(model):
        for number, (lengths, theirs) in enumerate(plain.items()):
            assert apart(gradients(model, head, lengths), theirs) < 2e-5
            if number == 1:
                compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled
    assert not torch._dynamo.utils.counters["recompile_limit"]


@pytest.mark.parametrize(("scheme", "bound"), [(None, 2e-5), ("ternary", 4e-3)])
def test_other_bases_than_nf4(scheme: str | None, bound: float) -> None:
    """ternary: an activation that comes out otherwise in its last place can be rounded to another of its 256 steps."""
    model = made("llama", scheme=scheme)
    plain = gradients(model)
    with patching.patched(model, attention=False, blocks=False) as found:
        assert counted(found) == {"groups of adapters": 8}
        assert apart(gradients(model), plain) < bound


def test_dora_is_left_to_peft_with_a_word() -> None:
    model = made("llama", use_dora=True)
    plain = gradients(model)
    found = patching.find(model)
    assert set(found.skipped.values()) == {"adapter: DoRA"}
    assert len(found.skipped) == 14
    assert "groups of adapters" not in counted(found)
    assert any("DoRA" in line and "13 more" in line for line in found.in_words())
    assert any(line.startswith("fast: attention without padding, 2 gated activations, 5 norms, rot") for line in found.in_words())
    found.install()
    assert apart(gradients(model), plain) < 2e-5
    found.remove()


def test_rslora_and_checkpointing() -> None:
    model = made("llama", use_rslora=True)
    plain = gradients(model)
    model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    head = head_of(model)[0]
    kept: list[torch.Size] = []
    with patching.patched(model):
        assert apart(gradients(model, head), plain) < 2e-5
        with torch.autograd.graph.save_on_cpu():  # train.checkpointing: offload
            assert apart(gradients(model, head), plain) < 2e-5
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.shape), t)[1], lambda t: t):
            gradients(model, head)
    assert kept[:2] == [(1, sum(LENGTHS), 64)] * 2  # what offload takes along: the input of each of the two layers


def test_a_block_that_is_not_known_is_named_and_computes_as_it_did() -> None:
    class Odd(nn.Module):
        """Gate and up the other way round, and squared."""

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

    model = made("llama")
    layer = model.get_base_model().model.layers[1]
    layer.mlp, layer.input_layernorm = Odd(layer.mlp), OddNorm(layer.input_layernorm)
    plain = gradients(model)
    found = patching.find(model)
    assert set(found.skipped) == {"model.layers.1.mlp", "model.layers.1.input_layernorm"}
    assert counted(found) | {"norms": 4, "gated activations": 1} == counted(found)
    found.install()
    assert apart(gradients(model), plain) < 2e-5
    found.remove()


def test_a_model_that_fails_when_it_is_tried_is_left_alone() -> None:
    model = made("llama")
    own = model.get_base_model().model.layers[1].self_attn.forward

    def refuses(hidden_states: Tensor, **kwargs: Any) -> Any:
        raise RuntimeError("no two samples in a row")

    model.get_base_model().model.layers[1].self_attn.forward = refuses
    found = patching.find(model, not_compiled="off")
    model.get_base_model().model.layers[1].self_attn.forward = own
    assert found.patches == []
    assert found.skipped["attention"] == "RuntimeError in the trial pass: no two samples in a row"
    assert sum("RuntimeError" in why for why in found.skipped.values()) == 15


def test_an_adapter_that_is_called_twice_stays_pefts() -> None:
    model = made("llama")
    layer = model.get_base_model().model.layers[0].mlp
    own = layer.forward
    layer.forward = lambda x: own(x) + 0.1 * layer.gate_proj(x).mean()
    plain = gradients(model)
    found = patching.find(model, not_compiled="off")
    assert found.skipped["model.layers.0.mlp.gate_proj"] == "adapter: it is not called exactly once in a pass"
    found.install()
    assert apart(gradients(model), plain) < 2e-5
    found.remove()


def test_attention_of_its_own_stays_its_own() -> None:
    config = transformers.LlamaConfig(**(SIZES | {"attention_dropout": 0.1}))
    found = patching.find(transformers.LlamaForCausalLM(config))
    assert "attention without padding" not in counted(found)
    assert found.skipped["model.layers.0.self_attn"].endswith("it uses dropout on attention weights")
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1))
    found = patching.find(mamba)
    assert "does not call attention" in found.skipped["attention"]
    assert found.skipped["backbone.layers.0.mixer"] == "MambaMixer is not a block of a known form"


def test_generation_is_untouched_while_it_is_installed() -> None:
    model = made("llama").eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    own = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    found = patching.find(model)
    found.install()
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=8, do_sample=False), own)
    with found.paused():
        assert not any("forward" in vars(module) for module in model.modules())
        assert model.get_base_model().config._attn_implementation == "sdpa"
    assert found.installed
    mask = torch.tensor([[0, 1, 1, 1]])
    with torch.no_grad():
        fast_padded = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        found.remove()
        assert torch.allclose(model(input_ids=ids, attention_mask=mask, use_cache=False).logits, fast_padded, atol=1e-5)


def test_losses_of_an_evaluation() -> None:
    from eval.perplexity import evaluate_loss

    model = made("gemma2").eval()
    generator = torch.Generator().manual_seed(2)
    rows = [(row := torch.randint(3, 128, (n,), generator=generator).tolist(), [-100, *row[1:]]) for n in (9, 30, 4, 17)]
    plain, head = evaluate_loss(model, rows, batch_tokens=40), head_of(model)[0]
    assert head is not None
    with patching.patched(model):
        ours = evaluate_loss(model, rows, batch_tokens=40, of_tokens=evaluator(head, 7))
    assert ours.row_loss_sums == pytest.approx(plain.row_loss_sums, rel=1e-5)


# ------------------------------------------------------------------------------------------------------- nothing is left behind


def of_the_process() -> dict[str, Any]:
    """What patches change outside of a model."""
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


def of_the_model(model: Any) -> dict[str, Any]:
    modules = list(model.modules())
    return {
        "forward": [vars(module).get("forward") for module in modules],
        "hooks": [dict(hooks) for module in modules for hooks in (module._forward_pre_hooks, module._forward_hooks)],
        "configs": [module.config._attn_implementation for module in modules if hasattr(module, "config")],
    }


def test_a_patched_model_leaves_itself_and_the_process_as_they_were() -> None:
    """The same objects, not only the same results."""
    model, before = made("llama"), of_the_process()
    own, head = of_the_model(model), head_of(model)[0]
    with patching.patched(model):
        gradients(model, head)
        within = of_the_process()
        changed = {key for key in within if within[key] != before[key]}
        assert changed >= {"rotary", "attention", "limit", "compiling"}
        assert of_the_model(model) != own
    assert of_the_process() == before
    assert of_the_process()["rotary"] is before["rotary"]
    assert of_the_model(model) == own
    patching.find(model)  # trying out leaves nothing behind either
    assert (of_the_process(), of_the_model(model)) == (before, own)
    with pytest.raises(RuntimeError, match="in the middle"), patching.patched(model):
        raise RuntimeError("in the middle")
    assert (of_the_process(), of_the_model(model)) == (before, own)


@pytest.mark.parametrize("first", [0, 1])
def test_two_patched_models_in_any_order(first: int) -> None:
    """What they share of the process goes with the last of them."""
    models, before = [made("llama"), made("llama")], of_the_process()
    plain = gradients(models[0])
    found = [patching.find(models[0])]
    found[0].install()
    found.append(patching.find(models[1]))  # while the other is patched
    found[1].install()
    found[first].remove()
    assert of_the_process()["rotary"] is not before["rotary"]
    assert apart(gradients(models[1 - first]), plain) < 2e-5
    found[1 - first].remove()
    assert of_the_process() == before
    assert apart(gradients(models[0]), plain) == 0
