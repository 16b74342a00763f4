"""Which linears get adapters: those that text passes; parts without are named with their shares."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from finetune.models.architecture import ArchitectureInfo, adapter_targets, architecture_of, parts_without_adapters
from finetune.models.source import Source
from finetune.recipe import Adapter

TEXT = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 128,
}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28}


def info_of(config: Any) -> ArchitectureInfo:
    return architecture_of(Source("model", "model"), config)


def gemma3() -> ArchitectureInfo:
    text = TEXT | {"head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 16}
    return info_of(transformers.Gemma3Config(text_config=text, vision_config=VISION | {"patch_size": 14}, mm_tokens_per_image=4))


def mixtral() -> ArchitectureInfo:
    return info_of(transformers.MixtralConfig(**TEXT, num_local_experts=4))


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj", "fc1"]])
def test_modules_that_text_does_not_pass_get_no_adapters(targets: Any) -> None:
    info = gemma3()
    if targets != "all-linear":
        with pytest.raises(Exception, match="matches no module"):  # fc1 is of the vision tower alone
            adapter_targets(Adapter(targets=targets), info)
        targets = targets[:2]
    chosen = adapter_targets(Adapter(targets=targets), info)
    assert len(chosen) == (14 if targets == "all-linear" else 4)
    assert all("language_model" in path for path in chosen)
    assert any("vision" in path for path in info.linears)


def test_module_named_by_its_whole_path_gets_an_adapter() -> None:
    info = gemma3()
    path = next(path for path in info.linears if "vision" in path and path.endswith("q_proj"))
    assert adapter_targets(Adapter(targets=[path]), info) == [path]


def test_parts_without_adapters_are_named_with_their_shares() -> None:
    info = gemma3()
    assert info.without_adapters.keys() == {"model.vision_tower", "model.multi_modal_projector"}
    line = parts_without_adapters(info, [])
    share = info.without_adapters["model.vision_tower"] / info.parameters
    assert line is not None
    assert f"model.vision_tower ({share:.1%})" in line
    assert "text does not pass" in line
    info = mixtral()
    assert info.without_adapters == {"experts": 2 * 4 * 3 * 64 * 128}
    line = parts_without_adapters(info, [])
    assert line is not None
    assert "experts (" in line
    assert "text does not pass" not in line


@pytest.mark.parametrize("config", [transformers.LlamaConfig(**TEXT), transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2)])
def test_models_of_text_alone_have_no_such_parts(config: Any) -> None:
    assert parts_without_adapters(info_of(config), []) is None
