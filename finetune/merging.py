"""Merging adapters into weights; a merged folder is kept only if plain transformers loads it with the trained model's loss.

The adapter is added to the weights that it was trained on. For a quantized base these are the dequantized weights: merging into
the original ones degrades the model (transformers#31293). The gate reloads the written folder without this package and compares
losses on the same rows.
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
    """Convert the trained model (consumed) to a plain float model on the CPU: dequantized base plus adapters, in `dtype`.

    Raises:
        GateError: a merged weight is not finite.
    """
    if hasattr(model, "merge_and_unload"):
        model = model.to("cpu").merge_and_unload()
    to_float(model, dtype)  # linears without an adapter
    model = model.to("cpu", dtype)
    for name, tensor in model.named_parameters():
        if not torch.isfinite(tensor).all():
            raise GateError("a merged weight is not finite; nothing was written", where=name)
    return model


def write_folder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a folder for `from_pretrained`: weights, config, generation config, and the tokenizer with its template."""
    model.config.use_cache = True
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # describes the source, not this model
    model.save_pretrained(folder, max_shard_size=SHARD)
    tokenizer.save_pretrained(folder)


def arithmetic(parameters: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.dtype, torch.device]:
    """(dtype, device) for comparing the trained and the merged model: fp32 if `parameters` of them fit, else `dtype`.

    In bf16 a single rounding of a massive activation changes every token's loss (0.1 nats on SmolLM2, with a correct merge).
    """
    free = free_bytes()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        on_card = free_bytes(device)
        if on_card > 1.3 * 4 * parameters:
            return torch.float32, device
        if on_card > 1.3 * dtype.itemsize * parameters:
            return dtype, device
        device = torch.device("cpu")  # a merged 7B model is larger than the card it was trained on
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
    """Merge adapters on a packed ternary base and quantize the sum to ternary; `model` is consumed, `out` is a bitnet folder.

    Rounding to three values loses most of a small update, so this is measured but not gated: the loss with the adapter, of the
    base, merged in floats (without int8 activations) and ternary again; and the share of codes that changed.

    Returns:
        (the merged model, packed; these figures and the export's).

    Raises:
        GateError: plain transformers computes other logits from the written folder.
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
            repacked = PackedBitLinear.from_linear(linear) if moved else layer
            flipped += int((unpack(repacked.weight) != unpack(layer.weight)).sum())
            model.set_submodule(path, repacked)
    figures["flips"] = flipped / sum(layer.in_features * layer.out_features for layer in before.values())
    figures["merged_loss"] = measured("ternary again")
    exported = export(model, tokenizer, out, format="bitnet", rows=list(rows)[:8], device=device, progress=progress)
    return model, figures | exported


def ternary_in_words(figures: dict[str, Any]) -> str:
    """The figures of `write_ternary` in one line."""
    lost = figures["merged_loss"] - figures["adapter_loss"]
    return (
        f"merged to ternary: loss {figures['merged_loss']:.4f}, {lost:+.4f} nats against the trained model's "
        f"{figures['adapter_loss']:.4f} (merged in floats {figures['float_loss']:.4f}; base {figures['base_loss']:.4f}) "
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
    expected: float | None = None,
) -> dict[str, Any]:
    """Merge `model` (consumed) and write it to `out`; if the gate refuses, `out` is not created.

    rows: (input_ids, labels) to compare on; limit: largest difference of losses, in nats; progress(done, total, what).
    expected: the trained model's loss on these rows as measured in `dtype` after training.

    Returns:
        The gate's figures.

    Raises:
        GateError: the reloaded model's loss differs from the trained one's by more than `limit`, the trained one's from
            `expected` in the same arithmetic, or a weight is not finite.
    """
    from transformers import AutoModelForCausalLM

    from eval.perplexity import evaluate_loss
    from finetune.models.weights import cast, parameters_of

    def measured(candidate: Any, name: str) -> float:
        return evaluate_loss(
            candidate, rows, batch_tokens=batch_tokens, progress=lambda done, total: progress(done, total, f"rows, {name} model")
        ).loss

    compute, compute_device = arithmetic(parameters_of(model), dtype, device)
    if compute == torch.float32:
        cast(model, compute)
    trained = measured(model, "trained")
    if expected is not None and compute == dtype and abs(trained - expected) > limit:
        raise GateError(
            "the trained model has another loss than it had after training; nothing was merged",
            where=str(out),
            got=f"loss {trained:.4f} now, {expected:.4f} after training, on the same {len(rows)} rows in the same arithmetic",
            hint="a part of the fast step may not suit this model: train it with fast.attention=false fast.lora=false "
            "fast.blocks=false, and please report it",
        )
    with atomic_folder(out) as temporary:
        progress(0, 1, "merging")
        plain: Any = into_float(model, dtype)
        progress(0, 1, "writing")
        write_folder(plain, tokenizer, temporary)
        plain.to("meta")  # frees its memory even if others still hold the model
        size = sum(file.stat().st_size for file in temporary.glob("*.safetensors"))
        reloaded: Any = AutoModelForCausalLM.from_pretrained(temporary, dtype=dtype)
        cast(reloaded, compute).to(compute_device)
        merged = measured(reloaded, "merged")
        gate = {
            "adapter_loss": trained,
            "merged_loss": merged,
            "difference": merged - trained,
            "limit": limit,
            "rows": len(rows),
            "device": compute_device.type,
            "arithmetic": str(compute).removeprefix("torch."),
            "status": "pass" if abs(merged - trained) <= limit else "fail",
        }
        if gate["status"] == "fail":
            raise GateError(
                "the merged model differs from the trained one; it was not kept",
                where=str(out),
                got=f"loss {merged:.4f} merged, {trained:.4f} trained, on the same {len(rows)} rows in {gate['arithmetic']}",
                hint=f"the gate allows {limit} nats (eval.merge_limit); finetune merge RUN --dtype fp32 --out DIR rounds less",
            )
    return gate | {"bytes": size}
