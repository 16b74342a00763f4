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

from finetune.errors import GateStop
from finetune.files import atomic_folder
from quant import NF4Linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from eval.perplexity import LossResult

Rows = Sequence[tuple[list[int], list[int]]]
SHARD = "2GB"


def into_float(model: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The trained model (consumed) as a plain float model on the CPU: dequantized base plus adapters, in `dtype`.

    Raises:
        GateStop: a merged weight is not finite.
    """
    if hasattr(model, "merge_and_unload"):
        model = model.to("cpu").merge_and_unload()
    for path, module in list(model.named_modules()):
        if isinstance(module, NF4Linear):  # it had no adapter
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module.to_linear(dtype))
    model = _as_stored(model.to("cpu", dtype))
    for name, tensor in model.named_parameters():
        if not torch.isfinite(tensor).all():
            raise GateStop("a merged weight is not finite; nothing was written", where=name)
    return model


def _as_stored(model: PreTrainedModel) -> PreTrainedModel:
    """Linears that stand where the architecture has GPT-2's Conv1D (weight (in, out)) become that again."""
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        plain = type(model)(model.config)
    for path, original in plain.named_modules():
        linear = model.get_submodule(path)
        if isinstance(original, Conv1D) and isinstance(linear, torch.nn.Linear):
            back = Conv1D(linear.out_features, linear.in_features)
            back.weight = torch.nn.Parameter(linear.weight.detach().t().contiguous())
            back.bias = linear.bias
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, back)
    return model


def write_folder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """What `from_pretrained` loads: weights, config, the tokens at which to stop, and the tokenizer with its template."""
    model.config.use_cache = True
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # of the source; the weights are plain now
    model.save_pretrained(folder, max_shard_size=SHARD)
    tokenizer.save_pretrained(folder)


def write_gated(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    *,
    dtype: torch.dtype,
    rows: Rows,
    trained: LossResult,
    limit: float,
    batch_tokens: int,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[LossResult, dict[str, Any]]:
    """Merge `model` (consumed) and write it to `out`, unless the gate refuses: then `out` is not made.

    rows: (input_ids, labels) to compare on; trained: the loss of the trained model on the same rows; limit: nats.

    Returns:
        (loss of the merged model on `rows`, the gate's figures).

    Raises:
        GateStop: the reloaded model's loss differs by more than `limit`, or a weight is not finite.
    """
    from transformers import AutoModelForCausalLM

    from eval.perplexity import evaluate_loss

    with atomic_folder(out) as temporary:
        write_folder(into_float(model, dtype), tokenizer, temporary)
        size = sum(file.stat().st_size for file in temporary.glob("*.safetensors"))
        where = device
        if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < 1.3 * size:
            where = torch.device("cpu")  # a merged 7B is larger than the card it was trained on
        again: Any = AutoModelForCausalLM.from_pretrained(temporary, dtype=dtype)
        again.to(where)
        result = evaluate_loss(again, rows, batch_tokens=batch_tokens, progress=progress)
        gap = result.loss - trained.loss
        gate = {
            "adapter_loss": trained.loss,
            "merged_loss": result.loss,
            "difference": gap,
            "limit": limit,
            "rows": result.rows,
            "device": where.type,
            "status": "pass" if abs(gap) <= limit else "fail",
        }
        if gate["status"] == "fail":
            raise GateStop(
                "the merged model is not the model that was trained; it was not kept",
                where=str(out),
                found=f"loss {result.loss:.4f} after merging, {trained.loss:.4f} before, on the same {result.rows} rows",
                do=f"the gate allows {limit} nats (eval.merge_limit); finetune merge RUN --dtype fp32 --out DIR rounds less",
            )
    return result, gate | {"bytes": size}
