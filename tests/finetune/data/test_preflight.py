"""Labels, splits and the preflight: templates and data are mutated until each check speaks."""

from __future__ import annotations

from typing import Any

import pytest

from finetune.data.preflight import Limits, Preflight, inspect, prepare
from finetune.data.rows import Row
from finetune.data.samples import ALPACA, IGNORE, Encoder, Sample, set_template
from finetune.errors import UserError

IM_END = 2


def talk(*turns: str, system: str | None = None, where: str = "rows:1") -> Row:
    first = ({"role": "system", "content": system},) if system else ()
    roles = ("user", "assistant")
    return Row(where, (*first, *({"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns))))


def encoder(tokenizer: Any, **options: Any) -> Encoder:
    settings = {"max_length": 512, "eos_token_ids": frozenset({tokenizer.eos_token_id})} | options
    return Encoder(tokenizer, **settings)


def trained_text(tokenizer: Any, sample: Sample) -> str:
    return tokenizer.decode([label for label in sample.labels if label != IGNORE])


def look(tokenizer: Any, rows: list[Row], heldout_rows: list[Row] | None = None, **options: Any) -> Preflight:
    split = {"heldout": options.pop("heldout", 0), "dedupe": options.pop("dedupe", True), "seed": 1}
    coder = encoder(tokenizer, **options)
    return inspect(prepare(rows, heldout_rows, coder, **split), coder)


def status(preflight: Preflight, name: str) -> str:
    return next(check.status for check in preflight.checks if check.name == name)


ROWS = [talk(f"question {n}", f"answer {n}", where=f"rows:{n}") for n in range(20)]


# ------------------------------------------------------------------------------------------------------------- labels


def test_the_answer_and_its_end_token_are_trained_and_nothing_else(tokenizer: Any) -> None:
    assert tokenizer.pad_token_id == tokenizer.eos_token_id  # the trap: masking pad would mask the end
    (sample,) = encoder(tokenizer).encode(talk("Hi?", "Hello.", "And?", "Bye."))
    assert trained_text(tokenizer, sample) == "Hello.<|im_end|>Bye.<|im_end|>"
    assert (sample.answers, sample.ended) == (2, 2)


def test_labels_are_the_tokens_at_their_own_position(tokenizer: Any) -> None:
    (sample,) = encoder(tokenizer).encode(ROWS[0])
    assert all(label in (IGNORE, token) for label, token in zip(sample.labels, sample.input_ids, strict=True))
    assert sample.labels[0] == IGNORE


def test_everything_can_be_learnt(tokenizer: Any) -> None:
    (sample,) = encoder(tokenizer, loss_on="all").encode(ROWS[0])
    assert sample.supervised == len(sample) - 1


def test_a_system_message_of_the_recipe_does_not_replace_the_rows_own(tokenizer: Any) -> None:
    coder = encoder(tokenizer, system="Be brief.")
    assert "Be brief." in tokenizer.decode(coder.encode(talk("a", "b"))[0].input_ids)
    assert "Be brief." not in tokenizer.decode(coder.encode(talk("a", "b", system="Mine."))[0].input_ids)


def test_what_follows_the_last_answer_is_left_out(tokenizer: Any) -> None:
    (sample,) = encoder(tokenizer).encode(talk("a", "b", "unanswered"))
    assert "unanswered" not in tokenizer.decode(sample.input_ids)


def test_a_template_that_rewrites_earlier_turns_gives_a_sample_an_answer(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    samples = encoder(tokenizer).encode(talk("q1", "a1", "q2", "a2"))
    assert [trained_text(tokenizer, s) for s in samples] == [
        "<think></think>a1<|im_end|>",
        "<think></think>a2<|im_end|>",
    ]
    assert "<think></think>a1" not in tokenizer.decode(samples[1].input_ids)  # as the model will see it


def test_the_default_template_of_a_base_model(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    assert "alpaca" in set_template(tokenizer, "auto")
    (sample,) = encoder(tokenizer).encode(talk("q", "a", "q2", "a2", system="s"))
    text = tokenizer.decode(sample.input_ids)
    assert text == (
        "s\n\n### Instruction:\nq\n\n### Response:\na<|im_end|>\n\n### Instruction:\nq2\n\n### Response:\na2<|im_end|>\n\n"
    )
    assert trained_text(tokenizer, sample) == "a<|im_end|>a2<|im_end|>"


def test_chatml_needs_its_tokens(tokenizer: Any) -> None:
    assert set_template(tokenizer, "chatml") == "chatml"
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(UserError, match="chatml"):
        set_template(plain, "chatml")


def test_a_row_that_the_template_refuses_is_named(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    with pytest.raises(UserError, match=r"rows:7[\s\S]*no system here"):
        encoder(tokenizer).encode(talk("q", "a", system="s", where="rows:7"))


# ---------------------------------------------------------------------------------------------------------- the checks


def test_good_data_passes(tokenizer: Any) -> None:
    preflight = look(tokenizer, ROWS, heldout=5)
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


def test_a_template_that_never_writes_the_end_token_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = ALPACA.replace("{{ eos_token }}", "")
    preflight = look(tokenizer, ROWS)
    assert status(preflight, "end token trained") == "fail"
    assert "never stop" in preflight.failed[0].detail


def test_a_template_that_ends_only_the_last_answer_is_warned_of(tokenizer: Any) -> None:
    tokenizer.chat_template = ALPACA.replace("{{ eos_token }}", "{% if loop.last %}{{ eos_token }}{% endif %}")
    rows = [talk("q", "a", "q2", "a2", where=f"rows:{n}") for n in range(3)]
    # Met turn by turn, because the template rewrites the first answer when a second follows: then each ends.
    assert status(look(tokenizer, rows), "end token trained") == "pass"
    tokenizer.chat_template = ALPACA.replace("{{ eos_token }}", "{% if message['content'] != 'a' %}{{ eos_token }}{% endif %}")
    preflight = look(tokenizer, rows)
    assert status(preflight, "end token trained") == "warn"


def test_two_bos_are_refused_and_one_is_added_where_the_template_has_none(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.bos_token = "<|endoftext|>"
    own = tokenizer.chat_template
    assert status(look(tokenizer, ROWS), "one BOS") == "pass"  # the template has none: added
    tokenizer.chat_template = "{{ bos_token }}" + own
    assert status(look(tokenizer, ROWS), "one BOS") == "pass"
    tokenizer.chat_template = "{{ bos_token }}{{ bos_token }}" + own
    preflight = look(tokenizer, ROWS)
    assert status(preflight, "one BOS") == "fail"
    assert "2 BOS" in preflight.failed[0].detail


def test_the_unknown_token_ends_nothing(tokenizer: Any) -> None:
    tokenizer.unk_token = "<|endoftext|>"
    tokenizer.chat_template = ALPACA.replace("{{ eos_token }}", "<|endoftext|>")
    assert status(look(tokenizer, ROWS), "end token trained") == "fail"


def test_what_the_model_cannot_take_is_refused(tokenizer: Any) -> None:
    coder = encoder(tokenizer)
    prepared = prepare(ROWS, None, coder, heldout=0, dedupe=True, seed=1)
    assert status(inspect(prepared, coder, Limits(positions=16)), "the model's length") == "fail"
    assert status(inspect(prepared, coder, Limits(vocabulary=100)), "the model's vocabulary") == "fail"
    assert inspect(prepared, coder, Limits(2048, 512)).failed == []


def test_nothing_to_learn_is_refused(tokenizer: Any) -> None:
    only_questions = [Row(f"rows:{n}", ({"role": "user", "content": f"q{n}"},)) for n in range(4)]
    assert status(look(tokenizer, only_questions), "something to learn") == "fail"
    all_empty = [talk(f"q{n}", " ") for n in range(4)]
    preflight = look(tokenizer, all_empty)
    assert status(preflight, "something to learn") == "fail"
    assert "all 4 answers are empty" in preflight.failed[0].detail


def test_some_empty_answers_and_rows_without_any_are_warned_of(tokenizer: Any) -> None:
    rows = [*ROWS, talk("q", "", where="rows:99"), Row("rows:100", ({"role": "user", "content": "only"},))]
    preflight = look(tokenizer, rows)
    assert status(preflight, "empty answers") == "warn"
    assert status(preflight, "rows without an answer") == "warn"
    assert preflight.failed == []
    assert any("rows:99" in check.detail for check in preflight.checks)


def test_truncation_says_what_it_cuts(tokenizer: Any) -> None:
    rows = [*ROWS, talk("q", "long " * 200, where="rows:50")]
    preflight = look(tokenizer, rows, max_length=64)
    assert status(preflight, "truncation") == "warn"
    (detail,) = [check.detail for check in preflight.checks if check.name == "truncation"]
    assert "1 of 21" in detail
    assert "1 end tokens" in detail
    assert preflight.rows_truncated == 1
    # A cut answer no longer ends; where all are cut, the model would never stop.
    assert status(preflight, "end token trained") == "warn"
    every = [talk(f"q{n}", "long " * 200, where=f"rows:{n}") for n in range(4)]
    assert status(look(tokenizer, every, max_length=64), "end token trained") == "fail"
    dropped = look(tokenizer, rows, max_length=64, truncation="drop")
    assert status(dropped, "too long") == "warn"
    assert dropped.rows_truncated == 0


def test_held_out_rows_that_are_trained_too_are_refused(tokenizer: Any) -> None:
    preflight = look(tokenizer, ROWS, heldout_rows=ROWS[:3])
    assert status(preflight, "train and held-out apart") == "fail"
    same_question = [talk("question 1", "another answer")]
    assert status(look(tokenizer, ROWS, heldout_rows=same_question), "train and held-out apart") == "warn"


def test_held_out_rows_must_measure_something(tokenizer: Any) -> None:
    preflight = look(tokenizer, ROWS, heldout_rows=[Row("h:1", ({"role": "user", "content": "x"},))])
    assert status(preflight, "held-out rows measure something") == "fail"


# ------------------------------------------------------------------------------------------------------------ the split


def test_the_split_is_by_seed_and_keeps_questions_together(tokenizer: Any) -> None:
    rows = [talk(f"q{n % 10}", f"a{n}", where=f"rows:{n}") for n in range(40)]
    coder = encoder(tokenizer)
    one, same, other = (prepare(rows, None, coder, heldout=8, dedupe=True, seed=seed) for seed in (3, 3, 4))
    assert len(one.heldout_rows) == 8
    assert len(one.train_rows) == 32
    assert {row.question for row in one.heldout_rows}.isdisjoint({row.question for row in one.train_rows})
    assert one == same
    assert {row.where for row in one.heldout_rows} != {row.where for row in other.heldout_rows}


def test_duplicates_are_removed_before_the_split(tokenizer: Any) -> None:
    coder = encoder(tokenizer)
    prepared = prepare(ROWS * 3, None, coder, heldout=0.25, dedupe=True, seed=0)
    assert (len(prepared.train_rows), len(prepared.heldout_rows), prepared.duplicates_removed) == (15, 5, 40)
    kept = prepare(ROWS * 3, None, coder, heldout=0.25, dedupe=False, seed=0)
    assert len(kept.train_rows) + len(kept.heldout_rows) == 60
    assert {row.key for row in kept.train_rows}.isdisjoint({row.key for row in kept.heldout_rows})
