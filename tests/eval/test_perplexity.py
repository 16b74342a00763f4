"""Loss on rows: equal to transformers' loss of each row alone, independent of packing, with correct standard errors."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest
import torch

from eval.perplexity import LossResult, evaluate_loss, paired_difference, rows_stay_apart, text_rows

Rows = list[tuple[list[int], list[int]]]


def make_rows(count: int, *, seed: int = 0, longest: int = 40) -> Rows:
    """Rows of 2 to `longest` random tokens, about half of them supervised."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        ids = [rng.randrange(4, 260) for _ in range(rng.randint(2, longest))]
        rows.append((ids, [token if rng.random() < 0.5 else -100 for token in ids]))
    return rows


def reference(model: Any, row: tuple[list[int], list[int]]) -> tuple[float, int]:
    """(summed loss, tokens) of a row alone, by transformers' own loss function."""
    ids, labels = (torch.tensor([part]) for part in row)
    tokens = int((labels[:, 1:] != -100).sum())
    if not tokens:
        return 0.0, 0
    with torch.no_grad():
        return model(input_ids=ids, labels=labels).loss.item() * tokens, tokens


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_have_the_loss_of_each_row_alone(new_model: Any, attention: str) -> None:
    model, rows = new_model(attn_implementation=attention), make_rows(12)
    result = evaluate_loss(model, rows, batch_tokens=100)
    expected = [reference(model, row) for row in rows]
    assert rows_stay_apart(model, highest_id=259)  # otherwise the rows above would have run one by one
    assert result.row_tokens == tuple(tokens for _, tokens in expected)
    for actual, (loss, tokens) in zip(result.row_loss_sums, expected, strict=True):
        assert abs(actual - loss) <= 1e-5 * max(tokens, 1)
    assert result.loss == pytest.approx(sum(s for s, _ in expected) / sum(n for _, n in expected), abs=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert (result.rows, result.tokens) == (12, sum(n for _, n in expected))


def test_loss_is_independent_of_row_order_and_batch_size(model: Any) -> None:
    rows = make_rows(9)
    alone = evaluate_loss(model, rows, batch_tokens=1)  # every row is longer, so each runs alone
    together = evaluate_loss(model, rows, batch_tokens=100_000)
    reversed_rows = evaluate_loss(model, rows[::-1], batch_tokens=64)
    for a, b, c, n in zip(
        alone.row_loss_sums, together.row_loss_sums, reversed_rows.row_loss_sums[::-1], alone.row_tokens, strict=True
    ):
        assert abs(a - b) <= 1e-5 * max(n, 1)
        assert abs(a - c) <= 1e-5 * max(n, 1)


class _LogitShapes:
    def __init__(self, model: Any) -> None:
        self.shapes: list[tuple[int, ...]] = []
        model.register_forward_hook(
            lambda module, args, kwargs, output: self.shapes.append(tuple(output.logits.shape)), with_kwargs=True
        )


def test_logits_are_computed_only_for_supervised_tokens(model: Any) -> None:
    logits, rows = _LogitShapes(model), make_rows(6)
    result = evaluate_loss(model, rows, batch_tokens=100_000)
    assert logits.shapes[-1] == (1, result.tokens, 260)
    assert len(logits.shapes) == 3  # two to test whether packed rows are independent, one for all rows


def test_loss_of_a_model_without_logits_to_keep(model: Any) -> None:
    rows = make_rows(6)
    expected = evaluate_loss(model, rows)
    forward = model.forward
    model.forward = lambda input_ids, position_ids: forward(input_ids=input_ids, position_ids=position_ids, use_cache=False)
    logits = _LogitShapes(model)
    result = evaluate_loss(model, rows)
    assert logits.shapes[-1][1] == sum(len(ids) for (ids, _), n in zip(rows, result.row_tokens, strict=True) if n)
    assert result.row_loss_sums == pytest.approx(expected.row_loss_sums, abs=1e-4)


def test_loss_through_a_peft_adapter(model: Any) -> None:
    from peft import LoraConfig, get_peft_model

    rows = make_rows(6)
    without_adapter = evaluate_loss(model, rows)
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=True))
    logits = _LogitShapes(peft_model)
    with_zero_adapter = evaluate_loss(peft_model, rows)
    assert with_zero_adapter.row_loss_sums == pytest.approx(without_adapter.row_loss_sums, abs=1e-4)
    assert logits.shapes[-1][1] == with_zero_adapter.tokens
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert abs(evaluate_loss(peft_model, rows).loss - without_adapter.loss) > 1e-3


def _mamba() -> Any:
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(vocab_size=260, hidden_size=16, num_hidden_layers=1, state_size=4)).eval()


def test_state_space_model_is_evaluated_row_by_row() -> None:
    model, rows = _mamba(), make_rows(4, longest=10)
    assert not rows_stay_apart(model, highest_id=259)
    result = evaluate_loss(model, rows)
    assert result.row_loss_sums == pytest.approx([reference(model, row)[0] for row in rows], abs=1e-4)


def test_attention_across_rows_is_detected(new_model: Any) -> None:
    from transformers import AttentionInterface

    def everything_before(module: Any, query: Any, key: Any, value: Any, mask: Any, **_: Any) -> tuple[Any, None]:
        key, value = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (key, value))
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("everything_before", everything_before)
    model, rows = new_model(attn_implementation="everything_before"), make_rows(4)
    assert not rows_stay_apart(model, highest_id=259)
    result = evaluate_loss(model, rows)
    assert result.row_loss_sums == pytest.approx([reference(model, row)[0] for row in rows], abs=1e-4)


def test_evaluation_leaves_modes_weights_and_rng_unchanged(new_model: Any) -> None:
    model = new_model(attention_dropout=0.5)
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rng_state = torch.get_rng_state()
    first, second = (evaluate_loss(model, make_rows(4)) for _ in range(2))
    assert first == second  # no dropout
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng_state)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()

    with pytest.raises(IndexError):
        evaluate_loss(model, [([4, 100_000], [4, 4])])
    assert [module.training for module in model.modules()] == modes


def test_rows_without_supervised_tokens_do_not_change_the_loss(model: Any) -> None:
    rows = make_rows(3)
    empty: Rows = [([5, 6], [-100, -100]), ([7], [7]), ([], []), ([8, 9], [8, -100])]
    calls: list[tuple[int, int]] = []
    result = evaluate_loss(
        model, [empty[0], rows[0], *empty[1:], *rows[1:]], batch_tokens=1, progress=lambda *now: calls.append(now)
    )
    alone = evaluate_loss(model, rows)
    assert (result.loss, result.stderr) == pytest.approx((alone.loss, alone.stderr), abs=1e-5)
    assert [result.row_tokens[i] for i in (0, 2, 3, 4)] == [0] * 4
    assert [result.row_loss_sums[i] for i in (0, 2, 3, 4)] == [0] * 4
    assert calls[-1] == (7, 7)
    with pytest.raises(ValueError, match="none of the 4 rows has a supervised token"):
        evaluate_loss(model, empty)
    with pytest.raises(ValueError, match="no rows"):
        evaluate_loss(model, [])
    with pytest.raises(ValueError, match="row 1 has 2 input ids and 1 labels"):
        evaluate_loss(model, [rows[0], ([4, 5], [4])])


def result_of(sums: list[float], tokens: list[int]) -> LossResult:
    loss = sum(sums) / sum(tokens)
    return LossResult(loss, 0.0, math.exp(loss), sum(tokens), len(tokens), tuple(sums), tuple(tokens))


def test_standard_error_agrees_with_resampled_rows(model: Any) -> None:
    result = evaluate_loss(model, make_rows(200))
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(0, 200, (4000, 200), generator=generator)
    sums, tokens = torch.tensor(result.row_loss_sums), torch.tensor(result.row_tokens)
    resampled = (sums[indices].sum(1) / tokens[indices].sum(1)).std().item()
    assert result.stderr == pytest.approx(resampled, rel=0.05)
    naive = sums.std().item() / tokens.float().mean().item() / math.sqrt(200)  # ignores that Σn varies too
    assert abs(naive / resampled - 1) > 0.5


def test_paired_difference_and_its_standard_error(new_model: Any) -> None:
    rows = make_rows(50)
    before = evaluate_loss(new_model(), rows)
    model = new_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(0.9)
    after = evaluate_loss(model, rows)
    difference, stderr = paired_difference(before, after)
    assert difference == pytest.approx(after.loss - before.loss)
    assert difference < 0
    assert 0 < stderr < math.hypot(before.stderr, after.stderr) / 2
    assert paired_difference(before, before) == (0, 0)
    # by hand: d = (1, 3), n = (1, 1): mean 2, error sqrt(2/1 · (1 + 1)) / 2 = 1
    assert paired_difference(result_of([1, 1], [1, 1]), result_of([2, 4], [1, 1])) == pytest.approx((2, 1))
    with pytest.raises(ValueError, match="same rows"):
        paired_difference(before, evaluate_loss(model, rows[1:]))


def test_as_dict_serializes_to_json(model: Any) -> None:
    result = evaluate_loss(model, make_rows(1, seed=1, longest=30))
    assert math.isnan(result.stderr)
    content = json.loads(json.dumps(result.as_dict(by_row=True), allow_nan=False))
    assert content["stderr"] is None
    assert content["row_loss_sums"] == list(result.row_loss_sums)
    assert set(result.as_dict()) == {"loss", "stderr", "perplexity", "tokens", "rows"}


TEXT = "The quick brown fox jumps over the lazy dog. " * 5  # 225 bytes


def test_text_rows_contain_every_token_once(new_tokenizer: Any) -> None:
    plain, with_bos = new_tokenizer(), new_tokenizer(bos=True)
    ids = plain(TEXT, add_special_tokens=False)["input_ids"]
    rows = text_rows(plain, TEXT, length=64)
    assert [token for row, _ in rows for token in row] == ids
    assert [len(row) for row, _ in rows] == [64, 64, 64, 33]
    assert all(labels == [-100, *row[1:]] for row, labels in rows)

    rows = text_rows(with_bos, TEXT, length=64)
    assert all(row[0] == 1 and labels == [-100, *row[1:]] for row, labels in rows)
    assert [token for row, _ in rows for token in row[1:]] == ids
    assert max(len(row) for row, _ in rows) == 64
    assert text_rows(with_bos, TEXT, length=64, bos=False) == text_rows(plain, TEXT, length=64)
    with pytest.raises(ValueError, match="too short"):
        text_rows(plain, "a", length=8)
    with pytest.raises(ValueError, match="at least 2, one token to read and one to predict, not 1"):
        text_rows(plain, TEXT, length=1)
