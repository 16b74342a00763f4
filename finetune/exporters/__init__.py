"""A trained model for other programs, and the proof that they run the same model.

    bitnet        Hugging Face `bitnet`, a folder that plain transformers loads        bitnet.py
    bitnet-online the same with the float master weights, to be trained on
    gguf-tq2_0    GGUF for llama.cpp, ternary in 2.06 bits a weight                    gguf.py, vocabulary.py, llama_cpp.py
    gguf-tq1_0    the same in 1.69 bits
    gguf-f16      GGUF in F16, for float models, and to compare ternary ones with

What a target cannot express is refused before anything is written (`check`). What was written is loaded by the other program
and goes through the gate (gate.py) before it is put in its place; nothing is kept that the gate refuses.
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
    """suffix: of the file's name; empty where the export is a folder."""

    description: str
    suffix: str


FORMATS = {
    "bitnet": Format("Hugging Face bitnet, packed: a folder that plain transformers loads", ""),
    "bitnet-online": Format(
        "Hugging Face bitnet with its float master weights, quantized while it runs: to train it further", ""
    ),
    "gguf-tq2_0": Format("GGUF TQ2_0 for llama.cpp: ternary, 2.06 bits a weight", ".gguf"),
    "gguf-tq1_0": Format("GGUF TQ1_0 for llama.cpp: ternary, 1.69 bits a weight, slower", ".gguf"),
    "gguf-f16": Format("GGUF F16 for llama.cpp: float models, 16 bits a weight", ".gguf"),
}

GATE_TOKENS = 1024  # that the gate runs, unless told otherwise
LONGEST = 512  # tokens of a row that the gate runs


def get_format(format: str) -> Format:  # noqa: A002
    """The row of FORMATS; UserError for a name that has none."""
    if format not in FORMATS:
        guess = nearest(format, FORMATS)
        raise UserError(
            f"there is no export format {format!r}", got=format, hint=f"--to {guess}" if guess else f"one of {', '.join(FORMATS)}"
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
    """Refuse what `format` cannot express, before any work is done.

    model_or_config: a model, on `meta` if there are no weights yet; or a config of transformers, of which one is made there.
    ternary, keep, rms_norm: of a config alone: whether its linears will be trained in ternary, and the recipe's `quant.keep`
    and `quant.rms_norm`. A checkpoint that is ternary already says all that in its config; None is what the config says.
    tokenizer: the model's, to be told now and not after training when a GGUF cannot carry it.

    Raises:
        UserError: naming the layer and its shape, or the key of the config, and what to do; a keep pattern matches nothing.
    """
    from transformers import PretrainedConfig

    get_format(format)
    model = model_or_config
    if isinstance(model_or_config, PretrainedConfig):
        from finetune.exporters.layers import to_be

        # A layer whose shape is not fit stays in floats, which F16 holds as well.
        model = to_be(model_or_config, ternary=ternary, keep=keep, rms_norm=rms_norm, all_fit=format != "gguf-f16")
    if format.startswith("bitnet"):
        from finetune.exporters import bitnet

        bitnet.check(model, format)
    else:
        from finetune.exporters import gguf
        from finetune.exporters.llama_cpp import WHEEL

        if importlib.util.find_spec(WHEEL.partition("=")[0]) is None:
            hint = f"pip install {WHEEL} (or finetune12g[export])"
            raise UserError(
                "GGUF exports are proven by running them in llama.cpp, which is not installed", where=format, hint=hint
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
    """Write `model` to `out` in `format`, once the gate has seen that what runs there is this model.

    model: a causal language model of transformers; its linears BitLinear (the codes of the master weights are exported),
        PackedBitLinear, or nn.Linear. It is left as it was, and computes in fp32 while the gate runs. Beside it a packed
        copy (bitnet-online: a whole one) is held on the CPU.
    out: a folder, or a file that ends in .gguf; replaced where it exists.
    rows: (input ids, labels) that were not trained on; the first `gate_tokens` tokens of them are run. What was written, and its
        simulation, run on the CPU.
    device: where `model` runs; by default where its first parameter is.

    Returns:
        figures for JSON: format, path, bytes, parameters, bits_per_weight (of all that is written), gate.

    Raises:
        UserError: what `check` refuses, a tokenizer that cannot be carried, no rows, no space, no llama.cpp.
        GateError: the export is not the model; nothing was kept.
    """
    suffix = get_format(format).suffix
    if suffix and out.suffix != suffix:
        raise UserError(f"{format} is a file that ends in {suffix}", where=str(out), hint=f"--out {out.with_suffix(suffix)}")
    check(model, format, tokenizer=tokenizer)
    sample = cut(rows, gate_tokens)
    if not sample:
        raise UserError("the export's gate has no rows to run", hint="give held-out data (data.eval), or a text")
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
    from finetune.exporters.gate import compare, hold
    from finetune.exporters.layers import computing_in_fp32, copied, function, packed_copy, widened

    progress(0, 1, "packing")
    written = packed_copy(model) if format == "bitnet" else copied(model)
    with atomic_folder(out) as folder:
        progress(0, 1, "writing")
        bitnet.write(written, tokenizer, folder)
        with bitnet.loaded(folder, format) as target, computing_in_fp32(model):
            exact = format == "bitnet" and (device or model.device).type == "cpu"  # elsewhere sums have another order
            as_there = None if exact else function(widened(written) if format == "bitnet" else bitnet.simulation(written))
            verdict = compare(
                rows,
                trained=function(model, device),
                simulation=as_there,
                target=target,
                bounds=bitnet.BOUNDS,
                progress=_told(progress, "rows, transformers"),
            )
        hold(verdict, where=str(out))
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
    from finetune.exporters.gate import compare, hold
    from finetune.exporters.layers import computing_in_fp32, function, packed_copy
    from finetune.exporters.llama_cpp import WHEEL, Llama

    words = vocabulary.vocabulary(tokenizer, model.get_input_embeddings().weight.shape[0])
    progress(0, 1, "packing")
    packed = packed_copy(model)
    with atomic_file(out) as path:
        progress(0, 1, "writing")
        gguf.write(packed, words, path, format, name=out.stem)
        with Llama(path, context=max(len(ids) for ids, _ in rows)) as llama, computing_in_fp32(model):
            probed = vocabulary.compare(tokenizer, llama)
            verdict = compare(
                rows,
                trained=function(model, device),
                simulation=function(gguf.simulation(packed, format)),
                target=llama.logits,
                bounds=gguf.BOUNDS,
                progress=_told(progress, "rows, llama.cpp"),
            )
        hold(verdict, where=str(out))
    return verdict, {"program": WHEEL, "tokens_of_probes": probed}


def in_words(figures: dict[str, Any]) -> str:
    """What `export` returned, in a line."""
    correct, good, tokens = figures["gate"]["correct"], figures["gate"]["good"], figures["gate"]["tokens"]
    losses = f"{good['export_loss']:.4f}, the trained model's {good['trained_loss']:.4f}"
    return (
        f"{figures['path']}: {human_bytes(figures['bytes'])}, {figures['bits_per_weight']:.2f} bits a parameter; "
        f"{figures['gate']['program']} computes what it should to {correct['error']:.1e} (allowed {correct['limit']:.1e}); "
        f"loss {losses}; KL {good['kl']:.1e} nats a token, on {tokens} tokens"
    )


def cut(rows: Rows, most: int) -> Rows:
    """The first rows, none longer than LONGEST, up to `most` tokens in all; rows of one token tell nothing and are left out."""
    out: list[tuple[list[int], list[int]]] = []
    for ids, labels in rows:
        room = min(most, LONGEST)
        if room < 2:
            break
        if len(ids) > 1:
            out.append((ids[:room], labels[:room]))
            most -= len(out[-1][0])
    return out


def _told(progress: Progress, what: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(done, total, what)


def _packed_weights(model: Any) -> int:
    from quant import PackedBitLinear

    return sum(m.out_features * m.in_features for m in model.modules() if isinstance(m, PackedBitLinear))


def _size(model: Any, format: str) -> int:  # noqa: A002
    """About what will be written, bytes."""
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
