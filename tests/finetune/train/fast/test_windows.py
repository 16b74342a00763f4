"""Windows of attention that are in the mask alone, which the fast attention does not see: the model keeps its own attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from finetune.train import trace_context
from finetune.train.fast import patching
from finetune.train.fast.segments import Segments
from tests.finetune.train.fast.test_patching import SIZES

MIXTURE = {"num_local_experts": 2, "intermediate_size": 32, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0}


def model_of(name: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**(SIZES | {"initializer_range": 0.3} | changes))
    return getattr(transformers, f"{name}ForCausalLM")(config)


@pytest.mark.parametrize(
    ("name", "changes", "is_patched"),
    [
        ("Phimoe", MIXTURE | {"sliding_window": 64}, False),
        ("Phimoe", MIXTURE | {"sliding_window": None}, True),
        ("Mistral", {"sliding_window": 64}, True),
        ("Qwen2Moe", {"num_experts": 2, "num_experts_per_tok": 1, "use_sliding_window": True, "sliding_window": 64}, None),
    ],
)
def test_attention_is_patched_only_where_it_is_told_the_window(
    name: str, changes: dict[str, Any], is_patched: bool | None
) -> None:
    """None: by what transformers passes on; in any case the patched model computes what the plain one does beyond the window."""
    model = model_of(name, **changes).eval()
    ids = (torch.arange(100)[None] * 7 + 1) % 128
    with torch.no_grad():
        plain = model(input_ids=ids, use_cache=False).logits
        fast_step = patching.find(model, lora=False, blocks=False)
        fast_step.install()
        patched = model(input_ids=ids, use_cache=False).logits
        fast_step.remove()
    assert is_patched is None or bool(fast_step.patches) == is_patched, fast_step.skipped
    assert (patched - plain).abs().max() < 1e-3 * plain.abs().max()
    assert model.config.sliding_window == changes["sliding_window"]


class Shapes:
    """The context of a plan: tensors have no values to compare."""

    def segments(self, shape: tuple[int, int]) -> Segments:
        return Segments((0, shape[0] * shape[1]), shape, torch.device("cpu"))

    def attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Any) -> torch.Tensor:
        return v.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


@pytest.mark.parametrize(("window", "is_patched"), [(64, False), (None, True)])
def test_plan_without_values_decides_as_the_run_does(window: int | None, is_patched: bool) -> None:
    model = model_of("Phimoe", **MIXTURE, sliding_window=window)
    with trace_context.use(Shapes()):  # type: ignore[arg-type]
        fast_step = patching.find(model, lora=False, blocks=False)
    assert bool(fast_step.patches) == is_patched
    assert is_patched or "its sliding_window is in the mask alone" in " ".join(fast_step.skipped.values())
