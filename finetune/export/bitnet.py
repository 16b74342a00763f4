"""Export as Hugging Face `bitnet`: a model folder that plain transformers loads, two bits a weight.

Everything is in the folder: codes and scales, the activation and the norms through config.json, `use_rms_norm` where the norm
is inside the linears. The gate loads it with plain transformers, whose layers compute what ours do, so the logits are the same
but for the order of sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.errors import GateStop, Mistake
from finetune.export.gate import Bounds
from finetune.export.layers import check_layers, function, require_ternary

SHARD = "2GB"
BOUNDS = Bounds(factor=0.0, floor=1e-3, ceiling=1e-3, kl=0.02)
"""On the CPU the error is 0; sums in another order, as on a GPU, cost up to 0.001 nats (untrained models)."""


def check(model: nn.Module, *, ternary_to_be: bool = False) -> None:
    """Refuse what the format cannot express. Raises Mistake."""
    check_layers(model, ternary_to_be=ternary_to_be)
    if not ternary_to_be:
        require_ternary(model, "bitnet")


def write(packed: Any, tokenizer: Any, folder: Path) -> None:
    """Write `packed` (layers.packed_copy) to `folder`, which exists.

    Raises:
        Mistake: a setting that the format has once for all layers differs between them; a layer that it does not know.
    """
    from quant.pretrained import attach_quantizer

    try:
        attach_quantizer(packed)
    except ValueError as error:
        raise Mistake("Hugging Face bitnet cannot express this model", where=type(packed).__name__, found=str(error)) from None
    packed.config.use_cache = True
    packed.save_pretrained(folder, max_shard_size=SHARD)
    tokenizer.save_pretrained(folder)


@contextmanager
def loaded(folder: Path) -> Iterator[Callable[[list[int]], Tensor]]:
    """The folder as plain transformers runs it, in fp32 on the CPU: token ids → logits.

    Its layers are compiled by torch, for which a C++ compiler is needed; they are run without. Raises GateStop when it loads
    something else than packed layers.
    """
    from transformers import AutoModelForCausalLM
    from transformers.integrations import bitnet as plain

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if not any(isinstance(module, plain.BitLinear) for module in model.modules()):
        raise GateStop("plain transformers found no packed ternary layers in the export", where=str(folder))
    run = function(model.eval())
    with torch.compiler.set_stance("force_eager"):
        yield run
    model.to("meta")  # frees it, whoever still holds it
