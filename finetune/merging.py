"""Adapters into weights, measured: a merged folder is kept only if plain transformers loads it and it is the trained model.

The adapter is added to the weights that it was trained on. For a quantized base these are the dequantized ones, not the
originals: that is the function whose loss was measured (merging into the originals is what degrades, transformers#31293). The
gate reloads what was written, without this package, and compares the loss on the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetune.errors import GateError
from finetune.files import atomic_folder
from finetune.memory import free_bytes
from quant import to_float
from quant.ternary import unpack

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Rows = Sequence[tuple[list[int], list[int]]]
SHARD = "2GB"


def into_float(model: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The trained model (consumed) as a plain float model on the CPU: dequantized base plus adapters, in `dtype`.

    Raises:
        GateError: a merged weight is not finite.
    """
    if hasattr(model, "merge_and_unload"):
        model = model.to("cpu").merge_and_unload()
    to_float(model, dtype)  # what had no adapter
    model = model.to("cpu", dtype)
    for name, tensor in model.named_parameters():
        if not torch.isfinite(tensor).all():
            raise GateError("a merged weight is not finite; nothing was written", where=name)
    return model


def write_folder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """What `from_pretrained` loads: weights, config, the tokens at which to stop, and the tokenizer with its template."""
    model.config.use_cache = True
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # of the source
    model.save_pretrained(folder, max_shard_size=SHARD)
    tokenizer.save_pretrained(folder)


def arithmetic(parameters: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.dtype, torch.device]:
    """(dtype, device) in which trained and merged model are compared: fp32 where `parameters` of them fit, else `dtype`.

    In bf16 one rounding of a massive activation moves every token's loss (seen with SmolLM2: by 0.1 nats, the merge being right).
    """
    free = free_bytes()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        on_card = free_bytes(device)
        if on_card > 1.3 * 4 * parameters:
            return torch.float32, device
        if on_card > 1.3 * dtype.itemsize * parameters:
            return dtype, device
        device = torch.device("cpu")  # a merged 7B is larger than the card it was trained on
    return (torch.float32 if free > 3 * 4 * parameters else dtype), device


def write_ternary(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    *,
    rows: Rows,
    batch_tokens: int,
    device: torch.device,
    progress: Callable[[int, int, str], None],
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Merge adapters on a packed ternary base and make the sum ternary again; `model` is consumed, `out` a bitnet folder.

    Rounding to three values undoes most of a small update, so this is measured, not gated: loss with the adapter, without it,
    merged in floats (whose inputs are not int8 any more), and ternary again; and the share of codes that are others than the
    base's.

    Returns:
        (the merged model, packed; those figures and the export's).

    Raises:
        GateError: plain transformers computes something else from what was written.
    """
    from eval.perplexity import evaluate_loss
    from finetune.exporters import export
    from quant import PackedBitLinear

    def measured(name: str) -> float:
        return evaluate_loss(
            model, rows, batch_tokens=batch_tokens, progress=lambda done, total: progress(done, total, f"rows, {name}")
        ).loss

    before = {path: layer for path, layer in model.get_base_model().named_modules() if isinstance(layer, PackedBitLinear)}
    before = {path.removesuffix(".base_layer"): layer for path, layer in before.items()}
    figures: dict[str, Any] = {"adapter_loss": measured("with the adapter"), "rows": len(rows)}
    with model.disable_adapter():
        figures["base_loss"] = measured("the base")
    model = model.merge_and_unload()
    figures["float_loss"] = measured("merged in floats")
    flipped = 0
    for path, layer in before.items():
        linear = model.get_submodule(path)
        if isinstance(linear, torch.nn.Linear):
            moved = not torch.equal(linear.weight, layer.dequantize(linear.weight.dtype))
            again = PackedBitLinear.from_linear(linear) if moved else layer
            flipped += int((unpack(again.weight) != unpack(layer.weight)).sum())
            model.set_submodule(path, again)
    figures["flips"] = flipped / sum(layer.in_features * layer.out_features for layer in before.values())
    figures["merged_loss"] = measured("ternary again")
    exported = export(model, tokenizer, out, format="bitnet", rows=list(rows)[:8], device=device, progress=progress)
    return model, figures | exported


def ternary_in_words(figures: dict[str, Any]) -> str:
    """What `write_ternary` measured, in a line."""
    lost = figures["merged_loss"] - figures["adapter_loss"]
    return (
        f"merged and ternary again: loss {figures['merged_loss']:.4f}, {lost:+.4f} nats against the trained model's "
        f"{figures['adapter_loss']:.4f} (merged in floats {figures['float_loss']:.4f}; the base {figures['base_loss']:.4f}) "
        f"on {figures['rows']} rows; {figures['flips']:.2%} of the codes changed"
    )


def write_gated(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    *,
    dtype: torch.dtype,
    rows: Rows,
    limit: float,
    batch_tokens: int,
    device: torch.device,
    progress: Callable[[int, int, str], None],
) -> dict[str, Any]:
    """Merge `model` (consumed) and write it to `out`, unless the gate refuses: then `out` is not made.

    rows: (input_ids, labels) to compare on; limit: nats; progress(done, total, what).

    Returns:
        the gate's figures.

    Raises:
        GateError: the reloaded model's loss differs from the trained one's by more than `limit`, or a weight is not finite.
    """
    from transformers import AutoModelForCausalLM

    from eval.perplexity import evaluate_loss
    from finetune.models.weights import cast, parameters_of

    def measured(what: Any, name: str) -> float:
        return evaluate_loss(
            what, rows, batch_tokens=batch_tokens, progress=lambda done, total: progress(done, total, f"rows, {name} model")
        ).loss

    compute, where = arithmetic(parameters_of(model), dtype, device)
    if compute == torch.float32:
        cast(model, compute)
    trained = measured(model, "trained")
    with atomic_folder(out) as temporary:
        progress(0, 1, "merging")
        plain: Any = into_float(model, dtype)
        progress(0, 1, "writing")
        write_folder(plain, tokenizer, temporary)
        plain.to("meta")  # frees it, whoever still holds it
        size = sum(file.stat().st_size for file in temporary.glob("*.safetensors"))
        again: Any = AutoModelForCausalLM.from_pretrained(temporary, dtype=dtype)
        cast(again, compute).to(where)
        merged = measured(again, "merged")
        gate = {
            "adapter_loss": trained,
            "merged_loss": merged,
            "difference": merged - trained,
            "limit": limit,
            "rows": len(rows),
            "device": where.type,
            "arithmetic": str(compute).removeprefix("torch."),
            "status": "pass" if abs(merged - trained) <= limit else "fail",
        }
        if gate["status"] == "fail":
            raise GateError(
                "the merged model is not the model that was trained; it was not kept",
                where=str(out),
                got=f"loss {merged:.4f} after, {trained:.4f} before, on the same {len(rows)} rows in {gate['arithmetic']}",
                hint=f"the gate allows {limit} nats (eval.merge_limit); finetune merge RUN --dtype fp32 --out DIR rounds less",
            )
    return gate | {"bytes": size}
