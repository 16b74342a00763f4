"""Limits of positions, and models that change at a length: found by trials beyond it, and the same for all that reads tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from eval.generation import generate, longest_answer, prompt_ids, stream
from eval.perplexity import evaluate_loss, kept_logits, rows_stay_apart
from eval.positions import positions_of, short_windows
from tests.eval.conftest import make_model, make_tokenizer
from tests.eval.test_perplexity import make_rows, reference

SMALL = {"vocab_size": 260, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def new_model(name: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**(SMALL | changes))
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def gpt_neo() -> Any:
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
    config = transformers.GPTNeoConfig(vocab_size=260, window_size=8, max_position_embeddings=48, **sizes)
    return transformers.GPTNeoForCausalLM(config).eval()


def roberta() -> Any:
    return new_model("Roberta", is_decoder=True, pad_token_id=1, max_position_embeddings=50, initializer_range=0.3)


def llama4() -> Any:
    text = SMALL | {
        "num_key_value_heads": 2, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 12,
        "pad_token_id": 0, "layer_types": ["chunked_attention", "full_attention"], "initializer_range": 0.3,
    }  # fmt: skip
    torch.manual_seed(0)
    return transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**text)).eval()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (transformers.GPT2Config(n_positions=64), 64),
        (transformers.LlamaConfig(max_position_embeddings=128), 128),
        (transformers.RobertaConfig(max_position_embeddings=514, pad_token_id=1), 512),
        (transformers.MptConfig(max_seq_len=96), 96),
        (transformers.BloomConfig(), None),
        (transformers.MambaConfig(), None),
        (None, None),
    ],
)
def test_positions_of_configurations(config: Any, expected: int | None) -> None:
    assert positions_of(config) == expected


def test_packed_sequence_longer_than_a_table_of_positions_runs_row_by_row() -> None:
    model, rows = gpt_neo(), make_rows(9, longest=30)
    assert rows_stay_apart(model, highest_id=259, longest=48)
    assert not rows_stay_apart(model, highest_id=259, longest=49)
    result = evaluate_loss(model, rows, batch_tokens=400)
    assert result.row_loss_sums == pytest.approx([reference(model, row)[0] for row in rows], abs=1e-4)


def test_rotary_models_have_no_table_and_pack_beyond_their_positions() -> None:
    assert rows_stay_apart(make_model(), highest_id=259, longest=10_000)


def test_decoder_that_numbers_its_tokens_gets_no_position_ids() -> None:
    model, rows = roberta(), make_rows(5, longest=20)
    result = evaluate_loss(model, rows)
    assert result.row_loss_sums == pytest.approx([reference(model, row)[0] for row in rows], abs=1e-4)
    ids = torch.tensor([[9, 8, 7]])
    own = model(input_ids=ids).logits[0]
    assert torch.equal(kept_logits(model, ids, torch.arange(3)[None], torch.arange(3)), own)


def test_chunks_of_attention_begin_with_each_packed_row() -> None:
    model, rows = llama4(), make_rows(6, longest=30)
    assert rows_stay_apart(model, highest_id=259)
    result = evaluate_loss(model, rows)
    assert result.row_loss_sums == pytest.approx([reference(model, row)[0] for row in rows], abs=1e-4)


def test_short_windows_are_restored() -> None:
    model = new_model("Gemma2", sliding_window=40, num_key_value_heads=2, head_dim=8)
    before = [module.sliding_window for module in model.modules() if hasattr(module, "sliding_window")]
    with short_windows(model, 3) as changed:
        assert changed == {"sliding_window"}
        assert {module.sliding_window for module in model.modules() if hasattr(module, "sliding_window")} == {3, None}
    after = [module.sliding_window for module in model.modules() if hasattr(module, "sliding_window")]
    assert (model.config.sliding_window, after) == (40, before)
    assert 40 in before


def test_answer_ends_at_the_last_position() -> None:
    tokenizer = make_tokenizer()
    model = make_model(max_position_embeddings=40)
    model.generation_config.eos_token_id = None
    tokenizer.eos_token = None
    chat = [{"role": "user", "content": "Hi"}]
    prompt = prompt_ids(tokenizer, chat)
    (answer,) = generate(model, tokenizer, [chat], max_new_tokens=100)
    assert answer.tokens == 40 - len(prompt)
    assert len("".join(stream(model, tokenizer, chat, max_new_tokens=100))) <= 40 - len(prompt)
    (short,) = generate(model, tokenizer, [chat], max_new_tokens=3)
    assert short.tokens == 3


def test_prompt_that_fills_the_positions_is_refused() -> None:
    tokenizer, model = make_tokenizer(), make_model(max_position_embeddings=40)
    chat = [{"role": "user", "content": "x" * 60}]
    with pytest.raises(ValueError, match=r"the prompt has \d+ tokens, and the model 40 positions"):
        generate(model, tokenizer, [chat])
    assert longest_answer(model, [1] * 39, 5) == 1
