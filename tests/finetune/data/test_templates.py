"""Answers' spans under chat templates of every kind: what is trained is what the model writes behind the prompt in use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune.data.formats import Row
from finetune.data.preflight import Limits, inspect, prepare
from finetune.data.samples import Encoder, Sample
from finetune.errors import UserError
from finetune.recipe import Recipe
from finetune.task_data import Conversations
from tests.conftest import write_jsonl
from tests.finetune.data.test_preflight import chat_row, make_encoder, supervised_text

# The system message stands in the last question, which an answered conversation does not have (Mistral 7B v0.3, Nemo).
SYSTEM_IN_THE_LAST_QUESTION = (
    "{%- if messages[0]['role'] == 'system' %}{%- set first = messages[0]['content'] %}{%- set rest = messages[1:] %}"
    "{%- else %}{%- set rest = messages %}{%- endif %}"
    "{%- for m in rest %}{%- if m['role'] == 'user' %}"
    "{%- if loop.last and first is defined %}{{- '[INST] ' + first + '\n\n' + m['content'] + '[/INST]' }}"
    "{%- else %}{{- '[INST] ' + m['content'] + '[/INST]' }}{%- endif %}"
    "{%- else %}{{- ' ' + m['content']|trim + eos_token }}{%- endif %}{%- endfor %}"
)
# A thought is cut out of an answer, and the prompt opens one (DeepSeek-R1-Distill).
CUTS_THOUGHTS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[USER]{{ m['content'] }}{% else %}{% set text = m['content'] %}"
    "{% if '</think>' in text %}{% set text = text.split('</think>')[-1] %}{% endif %}[ANSWER]{{ text }}{{ eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}[ANSWER]<think>\n{% endif %}"
)
# Only its own key gives the thought (Qwen3's), and the prompt opens none.
REASONING_KEY = (
    "{% for m in messages %}[{{ m['role'] }}]"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m['content'] }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
PLAIN = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def encoded(tokenizer: Any, template: str, row: Row) -> tuple[list[Sample], Encoder]:
    tokenizer.chat_template = template
    encoder = make_encoder(tokenizer)
    return encoder.encode(row), encoder


def texts(tokenizer: Any, samples: list[Sample]) -> list[tuple[str, str]]:
    """(prompt, trained text) of each sample with one answer."""
    pairs = []
    for sample in samples:
        trained = supervised_text(tokenizer, sample)
        pairs.append((tokenizer.decode(sample.input_ids).split(trained)[0], trained))
    return pairs


def test_system_message_in_the_last_question_is_in_every_prompt(tokenizer: Any) -> None:
    row = chat_row("one", "ONE", "two", "TWO", system="Shout.")
    samples, encoder = encoded(tokenizer, SYSTEM_IN_THE_LAST_QUESTION, row)
    assert texts(tokenizer, samples) == [
        ("[INST] Shout.\n\none[/INST]", " ONE<|im_end|>"),
        ("[INST] one[/INST] ONE<|im_end|>[INST] Shout.\n\ntwo[/INST]", " TWO<|im_end|>"),
    ]
    assert encoder.left_out == {}


def test_thoughts_that_the_template_cuts_are_trained_behind_the_prompt_in_use(tokenizer: Any) -> None:
    samples, _ = encoded(tokenizer, CUTS_THOUGHTS, chat_row("one", "<think>\nwhy\n</think>\n\nONE"))
    assert texts(tokenizer, samples) == [("[USER]one[ANSWER]<think>\n", "why\n</think>\n\nONE<|im_end|>")]


def test_answer_without_a_thought_closes_the_one_that_the_prompt_opens(tokenizer: Any) -> None:
    samples, _ = encoded(tokenizer, CUTS_THOUGHTS, chat_row("one", "ONE"))
    assert texts(tokenizer, samples) == [("[USER]one[ANSWER]<think>\n", "\n</think>\n\nONE<|im_end|>")]


@pytest.mark.parametrize("template", [REASONING_KEY, PLAIN])
def test_reasoning_of_a_turn_is_trained_whether_the_template_knows_its_key(tokenizer: Any, template: str) -> None:
    row = Row("rows:1", ({"role": "user", "content": "one"}, {"role": "assistant", "content": "ONE", "reasoning_content": "why"}))
    samples, _ = encoded(tokenizer, template, row)
    assert texts(tokenizer, samples) == [("[user]one<|im_end|>[assistant]", "<think>\nwhy\n</think>\n\nONE<|im_end|>")]


def test_conversation_may_begin_with_an_answer(tokenizer: Any) -> None:
    row = Row("rows:1", ({"role": "assistant", "content": "Welcome!"}, *chat_row("one", "ONE").messages))
    samples, _ = encoded(tokenizer, tokenizer.chat_template, row)
    assert [supervised_text(tokenizer, sample) for sample in samples] == ["Welcome!<|im_end|>ONE<|im_end|>"]


def test_untrained_turns_stay_in_the_text(tokenizer: Any) -> None:
    row = Row("rows:1", chat_row("one", "WRONG", "two", "TWO").messages, untrained=frozenset({1}))
    encoder = make_encoder(tokenizer, system="Be brief.")  # a message before them moves their indices
    (sample,) = encoder.encode(row)
    assert "WRONG" in tokenizer.decode(sample.input_ids)
    assert supervised_text(tokenizer, sample) == "TWO<|im_end|>"


def test_turns_and_calls_that_the_template_does_not_write_are_told(tokenizer: Any) -> None:
    silent = PLAIN.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'tool' %}")
    call = {"type": "function", "function": {"name": "look_up", "arguments": {}}}
    messages = (
        {"role": "user", "content": "How warm?"}, {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "21 degrees"}, {"role": "assistant", "content": "Warm."},
    )  # fmt: skip
    row = Row("rows:5", messages, tools=({"type": "function", "function": {"name": "look_up"}},))
    tokenizer.chat_template = silent
    encoder = make_encoder(tokenizer)
    preflight = inspect(prepare([row], None, encoder, heldout=0, dedupe=True, seed=1), encoder)
    details = [check.detail for check in preflight.checks if check.name == "text in the template" and check.status == "warn"]
    assert len(details) == 3
    for part in ("turns of role tool", "tool calls", "tools"):
        assert any(f"nothing of {part}: rows:5" in detail for detail in details)


def test_template_that_does_not_write_answers_is_an_error(tokenizer: Any) -> None:
    tokenizer.chat_template = PLAIN.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'assistant' %}")
    with pytest.raises(UserError, match="does not write the text of answers"):
        make_encoder(tokenizer).encode(chat_row("one", "ONE"))


# -------------------------------------------------------------------------------------------------------------- the split


def split(tokenizer: Any, rows: list[Row], heldout: int, **options: Any) -> tuple[int, dict[str, tuple[str, str]]]:
    encoder = make_encoder(tokenizer, **options)
    prepared = prepare(rows, None, encoder, heldout=heldout, dedupe=True, seed=1)
    return len(prepared.heldout_rows), {c.name: (c.status, c.detail) for c in inspect(prepared, encoder).checks}


def test_conversations_that_begin_alike_are_held_out_as_asked(tokenizer: Any) -> None:
    rows = [chat_row("Hi", "Hello!", f"question {n}", f"answer {n}", where=f"rows:{n}") for n in range(30)]
    count, checks = split(tokenizer, rows, 7)
    assert count == 7
    assert checks["train and held-out apart"][0] == "pass"


def test_rows_with_one_question_are_held_out_with_a_warning(tokenizer: Any) -> None:
    count, checks = split(tokenizer, [chat_row("Joke!", f"joke {n}", where=f"rows:{n}") for n in range(30)], 7)
    assert count == 7
    assert checks["train and held-out apart"] == ("warn", "7 of 7 (100.0%) held-out questions are in the training data too")


def test_prompts_that_fill_max_length_leave_both_sides(tokenizer: Any) -> None:
    rows = [chat_row(f"question {n}", f"answer {n}", where=f"rows:{n}") for n in range(20)]
    long = [chat_row(f"{n} " + "long " * 200, "answer", where=f"long:{n}") for n in range(20)]
    encoder = make_encoder(tokenizer, max_length=64)
    prepared = prepare([*rows, *long], None, encoder, heldout=10, dedupe=True, seed=1)
    checks = {check.name: check for check in inspect(prepared, encoder).checks}
    assert not [row.where for row in (*prepared.train_rows, *prepared.heldout_rows) if row.where.startswith("long")]
    assert checks["prompts too long"].detail.startswith("20 samples are left out")
    assert "rows without an answer" not in checks
    assert all(sample.supervised for sample in (*prepared.train, *prepared.heldout))
    needed = int(checks["prompts too long"].detail.split("data.max_length=")[2].split()[0])
    assert make_encoder(tokenizer, max_length=needed).encode(long[-1])[0].cut == 0


def test_data_of_which_over_half_trains_nothing_fails(tokenizer: Any) -> None:
    unanswered = [chat_row(f"open {n}", where=f"open:{n}") for n in range(21)]
    rows = [chat_row(f"question {n}", f"answer {n}", where=f"rows:{n}") for n in range(20)]
    _, checks = split(tokenizer, [*rows, *unanswered], 0)
    assert checks["rows without an answer"][0] == "fail"
    _, checks = split(tokenizer, [*rows, *unanswered[:5]], 0)
    assert checks["rows without an answer"] == (
        "warn",
        "5 of 25 (20.0%) samples have no trained token and are left out, such as open:0",
    )


def test_long_prompts_in_over_half_of_the_rows_fail(tokenizer: Any) -> None:
    rows = [chat_row(f"question {n}", f"answer {n}", where=f"rows:{n}") for n in range(4)]
    long = [chat_row(f"{n} " + "long " * 200, "answer", where=f"long:{n}") for n in range(5)]
    _, checks = split(tokenizer, [*rows, *long], 0, max_length=64)
    assert checks["prompts too long"][0] == "fail"


def test_text_that_the_template_writes_as_json_is_not_told_as_left_out(tokenizer: Any) -> None:
    content = "{{ m['content']|tojson if m['role'] == 'tool' else m['content'] }}"
    template = PLAIN.replace("{{ m['content'] }}", content)
    result = {"role": "tool", "content": 'now:\n"21"'}
    messages = (*chat_row("How warm?", "Let me see.").messages, result, *chat_row("So?", "Warm.").messages)
    _, encoder = encoded(tokenizer, template, Row("rows:1", messages))
    assert encoder.left_out == {}


def test_keys_that_are_not_read_and_rows_that_are_not_asked_are_told(tokenizer: Any, tmp_path: Path) -> None:
    def rows(answer: str, **more: Any) -> list[dict[str, Any]]:
        turns = [[{"role": "user", "content": f"{answer[:6]} {n}"}, {"role": "assistant", "content": answer}] for n in range(3)]
        return [{"messages": messages, "id": 7} | more for messages in turns]

    tools = [{"type": "function", "function": {"name": "look_up"}}]
    data = write_jsonl(tmp_path / "rows.jsonl", rows("trained"))
    apart = write_jsonl(tmp_path / "apart.jsonl", [*rows("asked"), *rows("cut " * 100), *rows("tools", tools=tools)])
    recipe = Recipe.model_validate(
        {
            "model": {"name": "x"},
            "data": {"path": str(data), "heldout_path": str(apart), "max_length": 128, "truncation": "cut"},
            "eval": {"samples": 9},
        }
    )
    conversations = Conversations(recipe, tokenizer, frozenset({tokenizer.eos_token_id}), Limits())
    questions = conversations.questions()
    assert [sample.reference for sample in questions] == ["asked"] * 3 + ["tools"] * 3
    assert [sample.tools for sample in questions] == [None] * 3 + [tools] * 3
    unread, unasked = conversations.warnings()
    assert unread == "keys of the rows that are not read: id (3)"
    assert unasked.startswith("3 held-out rows are not asked")


MARKED = (
    "{% for m in messages %}[{{ m['role'] }}]{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{{ eos_token }}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (MARKED, "pass"),  # the end token that it does not mark is trained too
        (MARKED.replace("{% endgeneration %}{{ eos_token }}", "{{ eos_token }}{% endgeneration %}"), "pass"),
        (MARKED.replace("{% generation %}{{ m['content'] }}", "{{ m['content'] }}{% generation %}"), "warn"),
        (MARKED.replace("[{{ m['role'] }}]{% if", "{%- if").replace("{% generation %}", "{% generation %}[assistant]"), "warn"),
        (PLAIN, None),
    ],
)
def test_trained_tokens_are_compared_with_the_templates_own_marks(tokenizer: Any, template: str, expected: str | None) -> None:
    tokenizer.chat_template = template
    rows = [chat_row("What is 1?", "It is 1.", "And 2?", "It is 2."), chat_row("Say <think>.", "<think>ok</think> done")]
    encoder = make_encoder(tokenizer)
    preflight = inspect(prepare(rows, None, encoder, heldout=0, dedupe=True, seed=1), encoder)
    checks = [check for check in preflight.checks if check.name == "generation marks"]
    assert [check.status for check in checks] == ([expected] if expected else [])
    assert all("in 2 rows" in check.detail or "2 of 2" in check.detail for check in checks)
