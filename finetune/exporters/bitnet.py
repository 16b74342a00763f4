"""Export as Hugging Face `bitnet`: a model folder that plain transformers loads, two bits per weight; `bitnet-online` has the
float master weights instead, which are quantized on the fly and can be trained further.

The folder is complete: codes and scales; config.json has the activation, the norms, and `use_rms_norm` if the norm
is inside the linears. The gate loads it with plain transformers, whose layers compute the same as ours, so the logits are equal
up to the order of sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.errors import GateError, UserError
from finetune.exporters.gate import Bounds
from finetune.exporters.layers import Ternary, check_layers, function, require_ternary, ternary_layers, widened
from quant import BitLinear, ternary

SHARD = "2GB"
BOUNDS = Bounds(factor=0.0, floor=1e-3, ceiling=1e-3, kl=0.02)
"""On the CPU the error is 0: packed, transformers computes as we do; online it multiplies floats instead of codes, which is
simulated. A different order of sums, as on a GPU, costs up to 0.0003 nats (untrained, 16 layers)."""


def check(model: Any, format: str) -> None:  # noqa: A002
    """Raise UserError for a model that the format cannot express."""
    from quant.pretrained import quantizer_for

    check_layers(model)
    require_ternary(model, format)
    for name, layer in ternary_layers(model).items():
        if format == "bitnet-online" and not isinstance(layer, BitLinear):
            raise UserError("this model is packed and has no master weights", where=name, hint="--to bitnet keeps its codes")
    config = getattr(model.config, "quantization_config", None)
    try:
        quantizer_for(model).refresh(model)
    except ValueError as error:
        raise _inexpressible(model, error) from None
    finally:  # `refresh` writes into the config
        if config is not None:
            model.config.quantization_config = config
        elif hasattr(model.config, "quantization_config"):
            del model.config.quantization_config


def write(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write `model` (a copy of layers.py: packed, or with its master weights) to `folder`, which exists.

    Raises:
        UserError: layers differ in a setting that the format has once for all; an unsupported layer.
    """
    from quant.pretrained import attach_quantizer

    try:
        attach_quantizer(model)
    except ValueError as error:
        raise _inexpressible(model, error) from None
    model.config.use_cache = True
    model.save_pretrained(folder, max_shard_size=SHARD)
    tokenizer.save_pretrained(folder)


def _inexpressible(model: Any, error: ValueError) -> UserError:
    return UserError("Hugging Face bitnet cannot express this model", where=type(model).__name__, got=str(error))


@contextmanager
def loaded(folder: Path, format: str) -> Iterator[Callable[[list[int]], Tensor]]:  # noqa: A002
    """Load the folder with plain transformers, in fp32 on the CPU: token ids → logits.

    torch.compile on its layers, which needs a C++ compiler, is switched off. Raises GateError if it loads no packed
    layers.
    """
    from transformers import AutoModelForCausalLM
    from transformers.integrations import bitnet as plain

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layer_class = plain.BitLinear if format == "bitnet" else plain.AutoBitLinear
    if not any(type(module) is layer_class for module in model.modules()):
        raise GateError("plain transformers found no ternary layers of this format in the export", where=str(folder))
    run = function(model.eval())
    with torch.compiler.set_stance("force_eager"):
        yield run
    model.to("meta")  # frees its memory even if it is still referenced


def simulation(model: Any) -> Any:
    """`model` (a copy of layers.py, consumed) with the arithmetic of the online format: dequantized weights, as floats."""
    widened(model)
    for path, layer in ternary_layers(model).items():
        model.set_submodule(path, _Floats(layer))
    return model


class _Floats(nn.Module):
    def __init__(self, layer: Ternary) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        if self.layer.rms_norm is not None:
            x = self.layer.rms_norm(x)
        x = ternary.dequantize_activations(*ternary.quantize_activations(x))
        return nn.functional.linear(x, self.layer.dequantize(), self.layer.bias)
