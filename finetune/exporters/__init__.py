"""Exports a trained model to other programs, and verifies that they run the same model.

    bitnet        Hugging Face `bitnet`, a folder that plain transformers loads        bitnet.py
    bitnet-online the same with the float master weights, for further training
    gguf-tq2_0    GGUF for llama.cpp, ternary in 2.06 bits per weight                    gguf.py, vocabulary.py, llama_cpp.py
    gguf-tq1_0    the same in 1.69 bits
    gguf-f16      GGUF in F16, for float models, and as a reference for ternary ones

Models that a target cannot express are refused before anything is written (`check`). The written files are loaded by the other
program and must pass the gate (gate.py) before they are moved to their destination; otherwise they are deleted.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError, nearest
from finetune.files import atomic_file, atomic_folder, require_space
from finetune.units import human_bytes

if TYPE_CHECKING:
    import torch

    from finetune.exporters.gate import Rows, Verdict

Progress = Callable[[int, int, str], None]  # (done, total, what)


@dataclass(frozen=True)
class Format:
    """An export format. suffix: of the file's name; empty if the export is a folder."""

    description: str
    suffix: str


FORMATS = {
    "bitnet": Format("Hugging Face bitnet, packed: a folder that plain transformers loads", ""),
    "bitnet-online": Format("Hugging Face bitnet with its float master weights, quantized on the fly, for further training", ""),
    "gguf-tq2_0": Format("GGUF TQ2_0 for llama.cpp: ternary, 2.06 bits per weight", ".gguf"),
    "gguf-tq1_0": Format("GGUF TQ1_0 for llama.cpp: ternary, 1.69 bits per weight, slower", ".gguf"),
    "gguf-f16": Format("GGUF F16 for llama.cpp: float models, 16 bits per weight", ".gguf"),
}

GATE_TOKENS = 1024  # tokens on which the gate compares, by default
LONGEST = 512  # tokens of a row that the gate compares


def get_format(format: str) -> Format:  # noqa: A002
    """The format of that name; raises UserError if it does not exist."""
    if format not in FORMATS:
        guess = nearest(format, FORMATS)
        raise UserError(
            f"unknown export format {format!r}", got=format, hint=f"--to {guess}" if guess else f"one of {', '.join(FORMATS)}"
        )
    return FORMATS[format]


def check(
    model_or_config: Any,
    format: str,  # noqa: A002
    *,
    ternary: bool | None = None,
    keep: Sequence[str] = (),
    rms_norm: bool = False,
    tokenizer: Any = None,
) -> None:
    """Raise if `format` cannot express the model, before any work is done.

    model_or_config: a model, on `meta` if there are no weights yet; or a config of transformers, from which one is built there.
    ternary, keep, rms_norm: for a config only: whether its linears will be trained in ternary, and the recipe's `quant.keep`
    and `quant.rms_norm`. The config of a ternary checkpoint has all of that; None means what the config says.
    tokenizer: the model's, to fail now instead of after training if a GGUF cannot hold it.

    Raises:
        UserError: naming the layer and its shape, or the key of the config, and what to do; a keep pattern matches nothing.
    """
    from transformers import PretrainedConfig

    get_format(format)
    model = model_or_config
    if isinstance(model_or_config, PretrainedConfig):
        from finetune.exporters.layers import planned_model

        # A layer with an unsuitable shape stays in floats, which F16 can hold.
        model = planned_model(model_or_config, ternary=ternary, keep=keep, rms_norm=rms_norm, all_fit=format != "gguf-f16")
    if format.startswith("bitnet"):
        from finetune.exporters import bitnet

        bitnet.check(model, format)
    else:
        from finetune.exporters import gguf
        from finetune.exporters.llama_cpp import WHEEL

        if importlib.util.find_spec(WHEEL.partition("=")[0]) is None:
            hint = f"pip install {WHEEL} (or finetune12g[export])"
            raise UserError(
                "GGUF exports are verified by running them in llama.cpp, which is not installed", where=format, hint=hint
            )
        gguf.check(model, format)
        if tokenizer is not None:
            from finetune.exporters import vocabulary

            vocabulary.vocabulary(tokenizer, model.get_input_embeddings().weight.shape[0])


def export(
    model: Any,
    tokenizer: Any,
    out: Path,
    *,
    format: str,  # noqa: A002
    rows: Rows,
    device: torch.device | None = None,
    gate_tokens: int = GATE_TOKENS,
    progress: Progress = lambda done, total, what: None,
) -> dict[str, Any]:
    """Write `model` to `out` in `format`, if the gate passes.

    model: a causal language model of transformers; its linears BitLinear (the codes of the master weights are exported),
        PackedBitLinear, or nn.Linear. It does not change, but computes in fp32 while the gate runs. In addition a packed
        copy (bitnet-online: a whole one) is held on the CPU.
    out: a folder, or a file that ends in .gguf; replaced if it exists.
    rows: (input ids, labels) that were not trained on; the gate uses their first `gate_tokens` tokens. The export and its
        simulation, run on the CPU.
    device: where `model` runs; by default where its first parameter is.

    Returns:
        figures for JSON: format, path, bytes, parameters, bits_per_weight (of all files), gate.

    Raises:
        UserError: as `check`; unsupported tokenizer, no rows, no disk space, no llama.cpp.
        GateError: the export does not match the model; nothing was kept.
    """
    suffix = get_format(format).suffix
    if suffix and out.suffix != suffix:
        raise UserError(f"{format} needs a file name with {suffix}", where=str(out), hint=f"--out {out.with_suffix(suffix)}")
    check(model, format, tokenizer=tokenizer)
    sample = cut(rows, gate_tokens)
    if not sample:
        raise UserError("the export gate has no rows to compare on", hint="provide held-out data (data.eval), or a text")
    parameters = sum(p.numel() for p in model.parameters() if p.dtype.is_floating_point) + _packed_weights(model)
    require_space(out.parent, _size(model, format), f"the export to {format}")
    if format.startswith("bitnet"):
        verdict, extra = _export_bitnet(model, tokenizer, out, format, sample, device, progress)
    else:
        verdict, extra = _export_gguf(model, tokenizer, out, format, sample, device, progress)
    size = sum(file.stat().st_size for file in out.rglob("*.safetensors")) if out.is_dir() else out.stat().st_size
    return {
        "format": format,
        "path": str(out),
        "bytes": size,
        "parameters": parameters,
        "bits_per_weight": 8 * size / parameters,
        "gate": verdict.as_dict() | extra,
    }


def _export_bitnet(
    model: Any,
    tokenizer: Any,
    out: Path,
    format: str,  # noqa: A002
    rows: Rows,
    device: torch.device | None,
    progress: Progress,
) -> tuple[Verdict, dict[str, Any]]:
    from finetune.exporters import bitnet
    from finetune.exporters.gate import compare, require_pass
    from finetune.exporters.layers import computing_in_fp32, copied, function, packed_copy, widened

    progress(0, 1, "packing")
    packed = packed_copy(model) if format == "bitnet" else copied(model)
    with atomic_folder(out) as folder:
        progress(0, 1, "writing")
        bitnet.write(packed, tokenizer, folder)
        with bitnet.loaded(folder, format) as target, computing_in_fp32(model):
            exact = format == "bitnet" and (device or model.device).type == "cpu"  # elsewhere the order of sums differs
            simulated = None if exact else function(widened(packed) if format == "bitnet" else bitnet.simulation(packed))
            verdict = compare(
                rows,
                trained=function(model, device),
                simulation=simulated,
                target=target,
                bounds=bitnet.BOUNDS,
                progress=_with_label(progress, "rows, transformers"),
            )
        require_pass(verdict, where=str(out))
    return verdict, {"program": "transformers"}


def _export_gguf(
    model: Any,
    tokenizer: Any,
    out: Path,
    format: str,  # noqa: A002
    rows: Rows,
    device: torch.device | None,
    progress: Progress,
) -> tuple[Verdict, dict[str, Any]]:
    from finetune.exporters import gguf, vocabulary
    from finetune.exporters.gate import compare, require_pass
    from finetune.exporters.layers import computing_in_fp32, function, packed_copy
    from finetune.exporters.llama_cpp import WHEEL, Llama

    vocab = vocabulary.vocabulary(tokenizer, model.get_input_embeddings().weight.shape[0])
    progress(0, 1, "packing")
    packed = packed_copy(model)
    with atomic_file(out) as path:
        progress(0, 1, "writing")
        gguf.write(packed, vocab, path, format, name=out.stem)
        with Llama(path, context=max(len(ids) for ids, _ in rows)) as llama, computing_in_fp32(model):
            tokens_of_probes = vocabulary.compare(tokenizer, llama)
            verdict = compare(
                rows,
                trained=function(model, device),
                simulation=function(gguf.simulation(packed, format)),
                target=llama.logits,
                bounds=gguf.BOUNDS,
                progress=_with_label(progress, "rows, llama.cpp"),
            )
        require_pass(verdict, where=str(out))
    return verdict, {"program": WHEEL, "tokens_of_probes": tokens_of_probes}


def in_words(figures: dict[str, Any]) -> str:
    """A line for the screen from the figures that `export` returned."""
    correct, good, tokens = figures["gate"]["correct"], figures["gate"]["good"], figures["gate"]["tokens"]
    losses = f"{good['export_loss']:.4f}, the trained model's {good['trained_loss']:.4f}"
    return (
        f"{figures['path']}: {human_bytes(figures['bytes'])}, {figures['bits_per_weight']:.2f} bits per parameter; "
        f"{figures['gate']['program']} matches the simulation to {correct['error']:.1e} (allowed {correct['limit']:.1e}); "
        f"loss {losses}; KL {good['kl']:.1e} nats per token, on {tokens} tokens"
    )


def cut(rows: Rows, most: int) -> Rows:
    """The first rows, cut to LONGEST, up to `most` tokens in all; rows of one token, which have no target, are skipped."""
    chosen: list[tuple[list[int], list[int]]] = []
    for ids, labels in rows:
        room = min(most, LONGEST)
        if room < 2:
            break
        if len(ids) > 1:
            chosen.append((ids[:room], labels[:room]))
            most -= len(chosen[-1][0])
    return chosen


def _with_label(progress: Progress, label: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(done, total, label)


def _packed_weights(model: Any) -> int:
    from quant import PackedBitLinear

    return sum(m.out_features * m.in_features for m in model.modules() if isinstance(m, PackedBitLinear))


def _size(model: Any, format: str) -> int:  # noqa: A002
    """Estimated size of the export, bytes."""
    from finetune.exporters.layers import ternary_layers

    codes = sum(layer.out_features * layer.in_features for layer in ternary_layers(model).values())
    masters = sum(layer.weight.numel() for layer in ternary_layers(model).values())
    rest = sum(p.numel() for p in model.parameters()) - masters
    bits = {
        "bitnet": 2.0,
        "bitnet-online": 8.0 * model.dtype.itemsize,
        "gguf-tq2_0": 2.0625,
        "gguf-tq1_0": 1.6875,
        "gguf-f16": 16.0,
    }[format]
    return int(codes * bits / 8) + 4 * rest + (1 << 20)
