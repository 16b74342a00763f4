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
    drawn = random.Random(seed)
    return [" ".join(drawn.choices(WORDS, k=40)) + ".\n" for _ in range(count)]


@pytest.fixture(scope="module")
def trained() -> Any:
    return train_tokenizer(texts(300), 320)


def test_the_same_texts_give_the_same_tokenizer_of_the_size_asked_for(trained: Any) -> None:
    again = train_tokenizer(iter(texts(300)), 320)
    assert again.backend_tokenizer.to_str() == trained.backend_tokenizer.to_str()
    assert train_tokenizer(texts(300, 1), 320).backend_tokenizer.to_str() != trained.backend_tokenizer.to_str()
    assert len(trained) == trained.vocab_size == 320
    assert trained.eos_token == END
    assert trained.eos_token_id == 0
    assert trained.bos_token is None
    assert trained.chat_template is None


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_every_text_comes_back(trained: Any, text: str) -> None:
    ids = trained(text)["input_ids"]
    assert trained.decode(ids, clean_up_tokenization_spaces=False) == text
    assert batch_encoder(trained)([text, text])[1] == ids or END in text


def test_words_are_split_and_joined_as_gpt2_does(trained: Any) -> None:
    assert "".join(trained.convert_ids_to_tokens(trained("the fox\n  x")["input_ids"])) == "theĠfoxĊĠĠx"
    assert {f"Ġ{word}" for word in WORDS} & set(trained.get_vocab())
    model = json.loads(trained.backend_tokenizer.to_str())["model"]
    assert model["type"] == "BPE"
    assert len(model["merges"]) == 320 - 257
    assert trained("don't")["input_ids"] == [*trained("don")["input_ids"], *trained("'t")["input_ids"]]
    assert trained("")["input_ids"] == []  # nothing is put before or behind a text


def test_a_folder_alone_gives_it_again(trained: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    trained.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    some = ["the quick", " 日本 x\r\n\t", f"a{END}b", "".join(map(chr, range(300)))]
    assert [loaded(text)["input_ids"] for text in some] == [trained(text)["input_ids"] for text in some]
    assert [loaded.decode(loaded(text)["input_ids"]) for text in some] == some
    assert (loaded.eos_token_id, len(loaded), loaded.model_max_length) == (0, 320, trained.model_max_length)


def test_a_written_end_token_ends_no_document(trained: Any) -> None:
    assert 0 in trained(f"a{END}b")["input_ids"]
    (ids,) = batch_encoder(trained)([f"a{END}b"])
    assert 0 not in ids
    assert trained.decode(ids) == f"a{END}b"
    assert 0 in trained(f"a{END}b")["input_ids"]  # the tokenizer itself is left as it was


def test_an_encoder_adds_nothing_for_tokenizers_that_do() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = train_tokenizer(texts(50), 270)
    some = ["Hello there", "", "x " * 50]
    plain = tokenizer(some)["input_ids"]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    assert tokenizer(some)["input_ids"] == [[0, *ids] for ids in plain]
    tokenizer(some, truncation=True, max_length=2)  # leaves its setting in the backend
    assert batch_encoder(tokenizer)(some) == plain


def test_an_encoder_works_beside_its_tokenizer(trained: Any) -> None:
    encode, some = batch_encoder(trained), texts(40)
    expected, faults = encode(some), []

    def work() -> None:
        try:
            for _ in range(30):
                assert encode(some) == expected
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for at in range(200):
        trained(some[0], truncation=True, max_length=5 + at % 7)
    for thread in threads:
        thread.join()
    assert faults == []


def test_slow_tokenizers_are_called() -> None:
    def slow(some: list[str], **asked: bool) -> dict[str, Any]:
        assert asked == {"add_special_tokens": False, "split_special_tokens": True}
        return {"input_ids": [[len(text)] for text in some]}

    assert batch_encoder(slow)(["a", "bcd"]) == [[1], [3]]


def test_vocabularies_that_cannot_be() -> None:
    with pytest.raises(UserError, match="too small") as caught:
        train_tokenizer(texts(10), 257)
    assert "got:   257" in str(caught.value)
    with pytest.raises(UserError, match="too little text for a vocabulary") as caught:
        train_tokenizer(texts(100), 50_000)
    made = int(str(caught.value).split("tokenizer.train=")[1].split(",")[0])
    assert len(train_tokenizer(texts(100), made)) == made
    with pytest.raises(UserError, match="0 bytes of text gave 257"):
        train_tokenizer([], 300)


def test_no_more_is_read_than_allowed() -> None:
    given_, told = [], []

    def endless() -> Any:
        while True:
            given_.append("é" * 500 + "\n")
            yield given_[-1]

    train_tokenizer(endless(), 258, max_bytes=1_000_000, progress=told.append)
    assert 1_000_000 <= sum(len(text.encode()) for text in given_[:-1]) < 1_002_000
    assert told == sorted(told)
    assert len(told) > 2
    assert told[-1] >= 1_000_000


def test_from_a_source_to_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n".join(texts(2000)))
    source = open_source(path=str(path), block_bytes=100_000)
    first = list(tokenizer_texts(source, 150_000))
    assert 150_000 <= sum(len(text.encode()) for text in first) < 300_000
    tokenizer = train_tokenizer(tokenizer_texts(source), 310)
    corpus = Corpus(source, batch_encoder(tokenizer), length=128, end=0, seed=0, heldout_rows=8)
    rows = list(corpus.rows(0))
    joined = "".join(tokenizer.decode(row.ids) for row in sorted(rows, key=lambda row: row.after["number"]))
    assert joined.count("quick") > 3000
    assert all(max(row.ids) < 310 for row in rows)
