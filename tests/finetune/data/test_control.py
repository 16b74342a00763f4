"""Control tokens that somebody wrote into a row are encoded as text; those that belong in answers keep their ids."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from finetune.data.control import ControlTokens
from finetune.data.formats import Row
from finetune.data.preflight import PASS, WARN, control_tokens
from finetune.data.samples import CHATML, Encoder, Sample

CONTROLS = ["<|im_start|>", "<|im_end|>", "<s>", "</s>"]
TEXTS = ["the quick brown fox </s> jumps over <s> a lazy dog", "Write <think> and im_end | im_start."] * 40


def bpe(pre: Any, decoder: Any, normalizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre, decoder
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=CONTROLS, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def byte_level() -> Tokenizer:
    return bpe(pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel())


def metaspace() -> Tokenizer:
    """Prefixes a space at the beginning of a text alone, as Llama 3's predecessors do since `legacy: false`."""
    return bpe(pre_tokenizers.Metaspace(prepend_scheme="first"), decoders.Metaspace(prepend_scheme="first"))


def prepended() -> Tokenizer:
    """Prefixes a space after every control token, as Llama 2's does."""
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return bpe(pre_tokenizers.Split("\n", "isolated"), decoders.Replace("▁", " "), normalizer)


def words() -> Tokenizer:
    """A vocabulary in which the names of control tokens are words."""
    vocabulary = {word: index for index, word in enumerate([*CONTROLS, "?", "<", "s>", "/s>", "Write", "x", "here", "|im_end|>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(CONTROLS)
    return tokenizer


def wrapped(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    result = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", **special)
    result.chat_template = CHATML
    return result


def encoder_for(tokenizer: Any) -> Encoder:
    return Encoder(tokenizer, max_length=512, eos_token_ids=frozenset({tokenizer.eos_token_id}))


def sample_of(encoder: Encoder, question: str, answer: str) -> Sample:
    messages = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    (sample,) = encoder.encode(Row("d.jsonl:1", messages))
    return sample


KINDS = pytest.mark.parametrize("kind", [byte_level, metaspace, prepended])


@KINDS
def test_control_tokens_that_users_write_are_encoded_as_text(kind: Any) -> None:
    tokenizer = wrapped(kind())
    encoder = encoder_for(tokenizer)
    sample = sample_of(encoder, "What is <|im_end|> ?", "Write <s>x</s> here")
    counts = [sample.input_ids.count(tokenizer.convert_tokens_to_ids(name)) for name in CONTROLS]
    assert counts == [2, 2, 0, 0], "those of the template alone"
    text = tokenizer.decode(sample.input_ids)
    assert "Write <s>x</s> here" in text.replace("  ", " ")
    assert "What is <|im_end|> ?" in text
    trained = tokenizer.decode([label for label in sample.labels if label != -100])
    assert trained.strip() == "Write <s>x</s> here<|im_end|>"
    assert encoder.control.spelled == {"<|im_end|>": 1, "<s>": 1, "</s>": 1}


@KINDS
@pytest.mark.parametrize(
    "text", ["<|im_start|>user\nhello there<|im_end|>\n", "<s> two  spaces </s>\n<think>\nlazy\n</think>fox", "x"]
)
def test_texts_beside_a_guarded_name_are_encoded_as_before(kind: Any, text: str) -> None:
    tokenizer = wrapped(kind())
    control = ControlTokens(tokenizer, frozenset())
    plain = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    guard = control.guard("</s>", "here")
    ids, offsets = control.encode(f"{text}<|im_end|>{guard}")
    assert ids[: len(plain["input_ids"])] == plain["input_ids"]
    assert offsets[: len(plain["input_ids"])] == [tuple(pair) for pair in plain["offset_mapping"]]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    begin = len(plain["input_ids"])
    assert ids[begin] == end
    assert len(ids) > begin + 2, "the guarded name is several tokens"
    assert {first for first, _ in offsets[begin + 1 :]} == {len(text) + len("<|im_end|>")}
    assert tokenizer.convert_tokens_to_ids("</s>") not in ids[begin:]


def test_names_that_are_words_of_the_vocabulary_are_split() -> None:
    tokenizer = wrapped(words())
    control = ControlTokens(tokenizer, frozenset())
    ids, _ = control.encode(control.guard("Write </s> here", "d.jsonl:1"))
    assert tokenizer.convert_ids_to_tokens(ids) == ["Write", "<", "/s>", "here"]


def test_tokens_that_belong_in_answers_keep_their_ids_and_are_counted() -> None:
    tokenizer = wrapped(byte_level())
    encoder = encoder_for(tokenizer)
    sample = sample_of(encoder, "Why?", "<think>\nlazy\n</think>\n\nfox </s>")
    assert sample.input_ids.count(tokenizer.convert_tokens_to_ids("<think>")) == 1
    assert encoder.control.kept == {"<think>": 1, "</think>": 1}
    assert encoder.control.spelled == {"</s>": 1}


def test_role_marks_that_are_no_special_tokens_are_encoded_as_text() -> None:
    backend = byte_level()
    backend.add_tokens([AddedToken("<|user|>", normalized=False), AddedToken("<|bot|>", normalized=False)])
    tokenizer = wrapped(backend)
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ 'bot' if m['role'] == 'assistant' else 'user' }}|>"
        "{{ m['content'] }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|bot|>{% endif %}"
    )
    sample = sample_of(encoder_for(tokenizer), "a <|bot|> b", "c <|user|> d")
    assert [sample.input_ids.count(tokenizer.convert_tokens_to_ids(name)) for name in ("<|user|>", "<|bot|>")] == [1, 1]


def test_results_and_definitions_of_tools_are_guarded_too() -> None:
    tokenizer = wrapped(byte_level())
    tokenizer.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML
    encoder = encoder_for(tokenizer)
    messages = (
        {"role": "user", "content": "x"},
        {"role": "tool", "content": "</s>"},
        {"role": "assistant", "content": "y"},
    )
    tools = ({"type": "function", "function": {"name": "f", "description": "ends at </s>"}},)
    (sample,) = encoder.encode(Row("d.jsonl:1", messages, tools=tools))
    assert tokenizer.convert_tokens_to_ids("</s>") not in sample.input_ids
    assert tokenizer.decode(sample.input_ids).count("</s>") == 2
    assert encoder.control.spelled == {"</s>": 2}


def test_rendered_texts_keep_their_control_tokens_and_one_bos() -> None:
    from tokenizers import processors

    backend = byte_level()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    encoder = encoder_for(wrapped(backend, bos_token="<s>"))
    (sample,) = encoder.encode(Row("d.jsonl:1", text="<s><|im_start|>user\nfox<|im_end|>"))
    assert sample.bos == 1
    assert sample.input_ids[:2] == (2, 0)
    assert sample.input_ids[-1] == 1
    assert encoder.control.kept == {"<s>": 1, "<|im_start|>": 1, "<|im_end|>": 1}


def test_both_are_told_with_their_counts() -> None:
    encoder = encoder_for(wrapped(byte_level()))
    sample_of(encoder, "x", "a </s> b </s>")
    sample_of(encoder, "x", "<think></think>")
    control = encoder.control
    spelled, kept = control_tokens(control.spelled, control.kept, control.where)
    assert (spelled.status, kept.status) == (WARN, PASS)
    assert "</s> (2), such as d.jsonl:1" in spelled.detail
    assert "<think> (1), </think> (1)" in kept.detail


def test_longest_name_is_found_among_thousands_without_searching_each() -> None:
    import time

    backend = byte_level()
    backend.add_special_tokens([f"<unused{number}>" for number in range(6000)])
    control = ControlTokens(wrapped(backend), frozenset())
    started = time.perf_counter()
    assert control.guard("<div>a</div>" * 20_000, "here") == "<div>a</div>" * 20_000
    assert time.perf_counter() - started < 2
    control.guard("<unused12> and <unused1>2>", "here")
    assert control.spelled == {"<unused12>": 1, "<unused1>": 1}


@pytest.mark.parametrize("number", [0xE000, 0xF0001, 0x100000, 0x100001, 0x100004])
def test_private_use_characters_of_rows_stay_as_they_are(number: int) -> None:
    tokenizer = wrapped(byte_level())
    encoder = encoder_for(tokenizer)
    sample = sample_of(encoder, "x", f"icon {chr(number)} and </s>")
    assert f"icon {chr(number)} and </s>" in tokenizer.decode(sample.input_ids)
    assert encoder.control.spelled == {"</s>": 1}


def test_keys_of_calls_and_schemas_are_guarded_too() -> None:
    control = ControlTokens(wrapped(byte_level()), frozenset())
    call = {"function": {"name": "f", "arguments": {"role": "</s>", "</s>": "x"}}}
    message = {"role": "assistant", "content": "", "tool_calls": [call]}
    guarded = control.guard((message,), "here")
    assert guarded[0]["role"] == "assistant"
    assert "</s>" not in str(guarded)
    assert control.spelled == {"</s>": 2}


def test_guards_that_a_template_escapes_are_read_again() -> None:
    tokenizer = wrapped(byte_level())
    tokenizer.chat_template = CHATML.replace("{{ message['content'] }}", "{{ message['content'] | tojson(ensure_ascii=True) }}")
    sample = sample_of(encoder_for(tokenizer), "x", "a </s> b")
    assert '"a </s> b"' in tokenizer.decode(sample.input_ids)
    assert tokenizer.convert_tokens_to_ids("</s>") not in sample.input_ids


@pytest.mark.parametrize("flags", [{"normalized": True}, {"single_word": True}])
def test_marks_that_are_not_read_leave_the_templates_own_names(flags: dict[str, bool]) -> None:
    """A normalizer that removes what is no text (BERT's), and tokens that are read as whole words alone."""
    vocabulary = [
        "[UNK]",
        "<s>",
        "</s>",
        *"abcdefghijklmnopqrstuvwxyz<>/",
        *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"),
    ]
    backend = Tokenizer(models.WordPiece({word: index for index, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.add_special_tokens([AddedToken(name, **flags) for name in ("<s>", "</s>")])
    control = ControlTokens(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"), frozenset())
    plain, _ = control.encode("<s> ab </s>")
    ids, _ = control.encode("<s> ab " + control.guard("</s>", "here") + " </s>")
    assert [token for token in ids if token in (1, 2)] == [token for token in plain if token in (1, 2)]
