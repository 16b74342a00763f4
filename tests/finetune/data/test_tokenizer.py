from __future__ import annotations

import json
import random
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.stream import Corpus, open_source
from finetune.data.tokenizer import END, batch_encoder, tokenizer_texts, train_tokenizer
from finetune.errors import UserError

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "don't", "answer", "Naïve", "日本語", "questions"]


def texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=40)) + ".\n" for _ in range(count)]


@pytest.fixture(scope="module")
def trained_tokenizer() -> Any:
    return train_tokenizer(texts(300), 320)


def test_training_is_deterministic_and_gives_the_requested_size(trained_tokenizer: Any) -> None:
    retrained = train_tokenizer(iter(texts(300)), 320)
    assert retrained.backend_tokenizer.to_str() == trained_tokenizer.backend_tokenizer.to_str()
    assert train_tokenizer(texts(300, 1), 320).backend_tokenizer.to_str() != trained_tokenizer.backend_tokenizer.to_str()
    assert len(trained_tokenizer) == trained_tokenizer.vocab_size == 320
    assert trained_tokenizer.eos_token == END
    assert trained_tokenizer.eos_token_id == 0
    assert trained_tokenizer.bos_token is None
    assert trained_tokenizer.chat_template is None


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_decoding_restores_every_text(trained_tokenizer: Any, text: str) -> None:
    ids = trained_tokenizer(text)["input_ids"]
    assert trained_tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert batch_encoder(trained_tokenizer)([text, text])[1] == ids or END in text


def test_pretokenization_is_that_of_gpt2(trained_tokenizer: Any) -> None:
    assert "".join(trained_tokenizer.convert_ids_to_tokens(trained_tokenizer("the fox\n  x")["input_ids"])) == "theĠfoxĊĠĠx"
    assert {f"Ġ{word}" for word in WORDS} & set(trained_tokenizer.get_vocab())
    model = json.loads(trained_tokenizer.backend_tokenizer.to_str())["model"]
    assert model["type"] == "BPE"
    assert len(model["merges"]) == 320 - 257
    assert trained_tokenizer("don't")["input_ids"] == [
        *trained_tokenizer("don")["input_ids"],
        *trained_tokenizer("'t")["input_ids"],
    ]
    assert trained_tokenizer("")["input_ids"] == []  # no special tokens are added


def test_saved_tokenizer_loads_with_auto_tokenizer(trained_tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    trained_tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    examples = ["the quick", " 日本 x\r\n\t", f"a{END}b", "".join(map(chr, range(300)))]
    assert [loaded(text)["input_ids"] for text in examples] == [trained_tokenizer(text)["input_ids"] for text in examples]
    assert [loaded.decode(loaded(text)["input_ids"]) for text in examples] == examples
    assert (loaded.eos_token_id, len(loaded), loaded.model_max_length) == (0, 320, trained_tokenizer.model_max_length)


def test_end_token_spelled_out_in_a_text_is_encoded_as_plain_text(trained_tokenizer: Any) -> None:
    assert 0 in trained_tokenizer(f"a{END}b")["input_ids"]
    (ids,) = batch_encoder(trained_tokenizer)([f"a{END}b"])
    assert 0 not in ids
    assert trained_tokenizer.decode(ids) == f"a{END}b"
    assert 0 in trained_tokenizer(f"a{END}b")["input_ids"]  # the tokenizer itself is unchanged


def test_batch_encoder_adds_no_special_tokens() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = train_tokenizer(texts(50), 270)
    examples = ["Hello there", "", "x " * 50]
    expected = tokenizer(examples)["input_ids"]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    assert tokenizer(examples)["input_ids"] == [[0, *ids] for ids in expected]
    tokenizer(examples, truncation=True, max_length=2)  # the backend keeps this setting
    assert batch_encoder(tokenizer)(examples) == expected


def test_batch_encoder_is_unaffected_by_concurrent_use_of_its_tokenizer(trained_tokenizer: Any) -> None:
    encode, examples = batch_encoder(trained_tokenizer), texts(40)
    expected, errors = encode(examples), []

    def work() -> None:
        try:
            for _ in range(30):
                assert encode(examples) == expected
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for step in range(200):
        trained_tokenizer(examples[0], truncation=True, max_length=5 + step % 7)
    for thread in threads:
        thread.join()
    assert errors == []


def test_batch_encoder_calls_a_slow_tokenizer() -> None:
    def slow(examples: list[str], **options: bool) -> dict[str, Any]:
        assert options == {"add_special_tokens": False, "split_special_tokens": True}
        return {"input_ids": [[len(text)] for text in examples]}

    assert batch_encoder(slow)(["a", "bcd"]) == [[1], [3]]


def test_impossible_vocabulary_sizes_are_user_errors() -> None:
    with pytest.raises(UserError, match="too small") as caught:
        train_tokenizer(texts(10), 257)
    assert "got:   257" in str(caught.value)
    with pytest.raises(UserError, match="too little text for a vocabulary") as caught:
        train_tokenizer(texts(100), 50_000)
    suggested = int(str(caught.value).split("tokenizer.train=")[1].split(",")[0])
    assert len(train_tokenizer(texts(100), suggested)) == suggested
    with pytest.raises(UserError, match="0 bytes of text gave 257"):
        train_tokenizer([], 300)


def test_training_reads_at_most_max_bytes() -> None:
    yielded, progress = [], []

    def endless() -> Any:
        while True:
            yielded.append("é" * 500 + "\n")
            yield yielded[-1]

    train_tokenizer(endless(), 258, max_bytes=1_000_000, progress=progress.append)
    assert 1_000_000 <= sum(len(text.encode()) for text in yielded[:-1]) < 1_002_000
    assert progress == sorted(progress)
    assert len(progress) > 2
    assert progress[-1] >= 1_000_000


def test_tokenizer_trained_on_a_source_encodes_its_corpus(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n".join(texts(2000)))
    source = open_source(path=str(path), block_bytes=100_000)
    limited = list(tokenizer_texts(source, 150_000))
    assert 150_000 <= sum(len(text.encode()) for text in limited) < 300_000
    tokenizer = train_tokenizer(tokenizer_texts(source), 310)
    corpus = Corpus(source, batch_encoder(tokenizer), length=128, end=0, seed=0, heldout_rows=8)
    rows = list(corpus.rows(0))
    joined = "".join(tokenizer.decode(row.ids) for row in sorted(rows, key=lambda row: row.after["number"]))
    assert joined.count("quick") > 3000
    assert all(max(row.ids) < 310 for row in rows)
