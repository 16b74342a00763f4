"""Labels, splits and preflight checks: for each check, a template or data that makes it fail or warn."""

from __future__ import annotations

from typing import Any

import pytest

from finetune.data.formats import Row
from finetune.data.preflight import Limits, Preflight, inspect, prepare
from finetune.data.samples import ALPACA, IGNORE, Encoder, Sample, set_template
from finetune.errors import UserError

IM_END = 2


def chat_row(*turns: str, system: str | None = None, where: str = "rows:1") -> Row:
    system_message = ({"role": "system", "content": system},) if system else ()
    roles = ("user", "assistant")
    return Row(where, (*system_message, *({"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns))))


def make_encoder(tokenizer: Any, **options: Any) -> Encoder:
    settings = {"max_length": 512, "eos_token_ids": frozenset({tokenizer.eos_token_id})} | options
    return Encoder(tokenizer, **settings)


def supervised_text(tokenizer: Any, sample: Sample) -> str:
    return tokenizer.decode([label for label in sample.labels if label != IGNORE])


def run_preflight(tokenizer: Any, rows: list[Row], heldout_rows: list[Row] | None = None, **options: Any) -> Preflight:
    split = {"heldout": options.pop("heldout", 0), "dedupe": options.pop("dedupe", True), "seed": 1}
    encoder = make_encoder(tokenizer, **options)
    return inspect(prepare(rows, heldout_rows, encoder, **split), encoder)


def status(preflight: Preflight, name: str) -> str:
    return next(check.status for check in preflight.checks if check.name == name)


ROWS = [chat_row(f"question {n}", f"answer {n}", where=f"rows:{n}") for n in range(20)]


# ------------------------------------------------------------------------------------------------------------- labels


def test_only_answers_and_their_end_tokens_are_supervised(tokenizer: Any) -> None:
    assert tokenizer.pad_token_id == tokenizer.eos_token_id  # so masking pad tokens would also mask the end token
    (sample,) = make_encoder(tokenizer).encode(chat_row("Hi?", "Hello.", "And?", "Bye."))
    assert supervised_text(tokenizer, sample) == "Hello.<|im_end|>Bye.<|im_end|>"
    assert (sample.answers, sample.ended) == (2, 2)


def test_labels_are_the_unshifted_input_ids(tokenizer: Any) -> None:
    (sample,) = make_encoder(tokenizer).encode(ROWS[0])
    assert all(label in (IGNORE, token) for label, token in zip(sample.labels, sample.input_ids, strict=True))
    assert sample.labels[0] == IGNORE


def test_loss_on_all_supervises_every_token_after_the_first(tokenizer: Any) -> None:
    (sample,) = make_encoder(tokenizer, loss_on="all").encode(ROWS[0])
    assert sample.supervised == len(sample) - 1


def test_system_message_of_a_row_overrides_the_recipes(tokenizer: Any) -> None:
    encoder = make_encoder(tokenizer, system="Be brief.")
    assert "Be brief." in tokenizer.decode(encoder.encode(chat_row("a", "b"))[0].input_ids)
    assert "Be brief." not in tokenizer.decode(encoder.encode(chat_row("a", "b", system="Mine."))[0].input_ids)


def test_turns_after_the_last_answer_are_dropped(tokenizer: Any) -> None:
    (sample,) = make_encoder(tokenizer).encode(chat_row("a", "b", "unanswered"))
    assert "unanswered" not in tokenizer.decode(sample.input_ids)


def test_template_that_rewrites_earlier_turns_gives_one_sample_per_answer(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    samples = make_encoder(tokenizer).encode(chat_row("q1", "a1", "q2", "a2"))
    assert [supervised_text(tokenizer, s) for s in samples] == [
        "<think></think>a1<|im_end|>",
        "<think></think>a2<|im_end|>",
    ]
    assert "<think></think>a1" not in tokenizer.decode(samples[1].input_ids)  # as at inference


def test_base_model_without_a_template_gets_alpaca(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    assert "alpaca" in set_template(tokenizer, "auto")
    (sample,) = make_encoder(tokenizer).encode(chat_row("q", "a", "q2", "a2", system="s"))
    text = tokenizer.decode(sample.input_ids)
    assert text == (
        "s\n\n### Instruction:\nq\n\n### Response:\na<|im_end|>\n\n### Instruction:\nq2\n\n### Response:\na2<|im_end|>\n\n"
    )
    assert supervised_text(tokenizer, sample) == "a<|im_end|>a2<|im_end|>"


def test_chatml_template_requires_its_special_tokens(tokenizer: Any) -> None:
    assert set_template(tokenizer, "chatml") == "chatml"
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(UserError, match="chatml"):
        set_template(plain, "chatml")


def test_error_names_the_row_that_the_template_rejects(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    with pytest.raises(UserError, match=r"rows:7[\s\S]*no system here"):
        make_encoder(tokenizer).encode(chat_row("q", "a", system="s", where="rows:7"))


# ---------------------------------------------------------------------------------------------------------- the checks


def test_good_data_passes_every_check(tokenizer: Any) -> None:
    preflight = run_preflight(tokenizer, ROWS, heldout=5)
    assert {check.status for check in preflight.checks} == {"pass"}
    assert {check.name for check in preflight.checks} >= {
        "something to learn",
        "end token trained",
        "truncation",
        "train and held-out apart",
    }
    assert len(preflight.examples) == 3
    text = "".join(piece["text"] for piece in preflight.examples[0] if piece["supervised"])
    assert text.startswith("answer")
    assert text.endswith("<|im_end|>")
    assert sum(preflight.length_histogram["counts"]) == 15


def test_template_without_an_end_token_fails(tokenizer: Any) -> None:
    tokenizer.chat_template = ALPACA.replace("{{ eos_token }}", "")
    preflight = run_preflight(tokenizer, ROWS)
    assert status(preflight, "end token trained") == "fail"
    assert "never stop" in preflight.failed[0].detail


def test_template_that_ends_only_some_answers_gives_a_warning(tokenizer: Any) -> None:
    tokenizer.chat_template = ALPACA.replace("{{ eos_token }}", "{% if loop.last %}{{ eos_token }}{% endif %}")
    rows = [chat_row("q", "a", "q2", "a2", where=f"rows:{n}") for n in range(3)]
    # This template rewrites the first answer when a second follows, so there is one sample per answer, and each ends.
    assert status(run_preflight(tokenizer, rows), "end token trained") == "pass"
    tokenizer.chat_template = ALPACA.replace("{{ eos_token }}", "{% if message['content'] != 'a' %}{{ eos_token }}{% endif %}")
    preflight = run_preflight(tokenizer, rows)
    assert status(preflight, "end token trained") == "warn"


def test_two_bos_fail_and_a_missing_bos_is_added(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.bos_token = "<|endoftext|>"
    template = tokenizer.chat_template
    assert status(run_preflight(tokenizer, ROWS), "one BOS") == "pass"  # the template has none, so one is added
    tokenizer.chat_template = "{{ bos_token }}" + template
    assert status(run_preflight(tokenizer, ROWS), "one BOS") == "pass"
    tokenizer.chat_template = "{{ bos_token }}{{ bos_token }}" + template
    preflight = run_preflight(tokenizer, ROWS)
    assert status(preflight, "one BOS") == "fail"
    assert "2 BOS" in preflight.failed[0].detail


def test_unknown_token_does_not_count_as_an_end_token(tokenizer: Any) -> None:
    tokenizer.unk_token = "<|endoftext|>"
    tokenizer.chat_template = ALPACA.replace("{{ eos_token }}", "<|endoftext|>")
    assert status(run_preflight(tokenizer, ROWS), "end token trained") == "fail"


def test_rows_beyond_the_models_length_or_vocabulary_fail(tokenizer: Any) -> None:
    encoder = make_encoder(tokenizer)
    prepared = prepare(ROWS, None, encoder, heldout=0, dedupe=True, seed=1)
    assert status(inspect(prepared, encoder, Limits(positions=16)), "the model's length") == "fail"
    assert status(inspect(prepared, encoder, Limits(vocabulary=100)), "the model's vocabulary") == "fail"
    assert inspect(prepared, encoder, Limits(2048, 512)).failed == []


def test_data_without_answers_fails(tokenizer: Any) -> None:
    only_questions = [Row(f"rows:{n}", ({"role": "user", "content": f"q{n}"},)) for n in range(4)]
    assert status(run_preflight(tokenizer, only_questions), "something to learn") == "fail"
    all_empty = [chat_row(f"q{n}", " ") for n in range(4)]
    preflight = run_preflight(tokenizer, all_empty)
    assert status(preflight, "something to learn") == "fail"
    assert "all 4 answers are empty" in preflight.failed[0].detail


def test_some_empty_or_missing_answers_give_warnings(tokenizer: Any) -> None:
    rows = [*ROWS, chat_row("q", "", where="rows:99"), Row("rows:100", ({"role": "user", "content": "only"},))]
    preflight = run_preflight(tokenizer, rows)
    assert status(preflight, "empty answers") == "warn"
    assert status(preflight, "rows without an answer") == "warn"
    assert preflight.failed == []
    assert any("rows:99" in check.detail for check in preflight.checks)


def test_truncation_check_reports_cut_rows_and_lost_end_tokens(tokenizer: Any) -> None:
    rows = [*ROWS, chat_row("q", "long " * 200, where="rows:50")]
    preflight = run_preflight(tokenizer, rows, max_length=64)
    assert status(preflight, "truncation") == "warn"
    (detail,) = [check.detail for check in preflight.checks if check.name == "truncation"]
    assert "1 of 21" in detail
    assert "1 end tokens" in detail
    assert preflight.rows_truncated == 1
    # A cut answer has no end token, which the line above tells; if all are cut, the model would never learn to stop.
    assert status(preflight, "end token trained") == "pass"
    all_long = [chat_row(f"q{n}", "long " * 200, where=f"rows:{n}") for n in range(4)]
    assert status(run_preflight(tokenizer, all_long, max_length=64), "end token trained") == "fail"
    dropped = run_preflight(tokenizer, rows, max_length=64, truncation="drop")
    assert status(dropped, "too long") == "warn"
    assert dropped.rows_truncated == 0


def test_overlap_of_train_and_heldout_rows_fails(tokenizer: Any) -> None:
    preflight = run_preflight(tokenizer, ROWS, heldout_rows=ROWS[:3])
    assert status(preflight, "train and held-out apart") == "fail"
    same_question = [chat_row("question 1", "another answer")]
    assert status(run_preflight(tokenizer, ROWS, heldout_rows=same_question), "train and held-out apart") == "warn"


def test_heldout_rows_without_answers_fail(tokenizer: Any) -> None:
    preflight = run_preflight(tokenizer, ROWS, heldout_rows=[Row("h:1", ({"role": "user", "content": "x"},))])
    assert status(preflight, "held-out rows measure something") == "fail"


# ------------------------------------------------------------------------------------------------------------ the split


def test_split_depends_on_the_seed_and_keeps_equal_questions_together(tokenizer: Any) -> None:
    rows = [chat_row(f"q{n % 10}", f"a{n}", where=f"rows:{n}") for n in range(40)]
    encoder = make_encoder(tokenizer)
    split, same_seed, other_seed = (prepare(rows, None, encoder, heldout=8, dedupe=True, seed=seed) for seed in (3, 3, 4))
    assert len(split.heldout_rows) == 8
    assert len(split.train_rows) == 32
    assert {row.question for row in split.heldout_rows}.isdisjoint({row.question for row in split.train_rows})
    assert split == same_seed
    assert {row.where for row in split.heldout_rows} != {row.where for row in other_seed.heldout_rows}


def test_duplicates_are_removed_before_the_split(tokenizer: Any) -> None:
    encoder = make_encoder(tokenizer)
    prepared = prepare(ROWS * 3, None, encoder, heldout=0.25, dedupe=True, seed=0)
    assert (len(prepared.train_rows), len(prepared.heldout_rows), prepared.duplicates_removed) == (15, 5, 40)
    kept = prepare(ROWS * 3, None, encoder, heldout=0.25, dedupe=False, seed=0)
    assert len(kept.train_rows) + len(kept.heldout_rows) == 60
    assert {row.key for row in kept.train_rows}.isdisjoint({row.key for row in kept.heldout_rows})
