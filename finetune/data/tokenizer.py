"""Trains the tokenizer of a model from scratch: byte-level BPE as in GPT-2, on the beginning of the data.

Encoding is lossless, because all 256 bytes are tokens. There is one special token, the end of a document; there is no BOS.
Merges and the splitting rule are those of GPT-2, which llama.cpp supports.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from finetune.data.stream import Encode, Source
from finetune.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END = "<|endoftext|>"  # id 0
SMALLEST = 258  # the end token, 256 bytes, and one merge
MAX_BYTES = 64 << 20


def tokenizer_texts(source: Source, max_bytes: int = MAX_BYTES) -> Iterator[str]:
    """Texts of the first blocks of a source, of `max_bytes` or slightly more.

    Held-out text is included: a tokenizer only learns which pieces of words are frequent, and is trained before the split.
    """
    read = 0
    for block in source.blocks():
        for document in block.documents:
            yield document.text
            read += len(document.text.encode())
        if read >= max_bytes:
            return


def train_tokenizer(
    texts: Iterable[str], vocabulary: int, *, max_bytes: int = MAX_BYTES, progress: Callable[[int], None] | None = None
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with exactly `vocabulary` tokens; deterministic for the same texts.

    max_bytes: how much text is read, in UTF-8. progress is called now and then with the bytes read so far.

    Raises:
        UserError: the vocabulary is smaller than 258, or larger than these texts support.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if vocabulary < SMALLEST:
        got = f"{vocabulary}; the end token and all 256 bytes are 257"
        raise UserError("the vocabulary is too small", where="tokenizer.train", got=got, hint="for example tokenizer.train=4096")
    read = 0

    def limited() -> Iterator[str]:
        nonlocal read
        for number in itertools.count():
            text = next(remaining, None)
            if text is None or read >= max_bytes:
                return
            read += len(text.encode())
            if progress is not None and not number % 256:
                progress(read)
            yield text

    remaining = iter(texts)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,  # a pair that occurs once is not merged
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(limited(), trainer)
    if progress is not None:
        progress(read)
    size = tokenizer.get_vocab_size()
    if size < vocabulary:
        raise UserError(
            "too little text for a vocabulary of this size",
            where="tokenizer.train",
            got=f"{vocabulary:,} tokens requested; {read:,} bytes of text gave {size:,}",
            hint=(f"set tokenizer.train={size}, or " if size >= SMALLEST else "") + "use more text",
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, model_max_length=1 << 20, clean_up_tokenization_spaces=False
    )


def batch_encoder(tokenizer: PreTrainedTokenizerBase | Any, bos: int | None = None) -> Encode:
    """A function from texts to token ids for a `Corpus`; adds only `bos`, if given, and encodes no special token in a text.

    An end token written in a text is encoded as ordinary characters and does not end the document. The encoder has its own copy
    of the tokenizer: it works in the background, and a tokenizer is not thread-safe.
    """
    from tokenizers import Tokenizer

    begin = [] if bos is None else [bos]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return lambda texts: [
            begin + ids for ids in tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ]
    own = Tokenizer.from_str(backend.to_str())
    own.no_truncation()
    own.no_padding()
    own.encode_special_tokens = True

    def encode(texts: list[str]) -> list[list[int]]:
        return [begin + encoding.ids for encoding in own.encode_batch_fast(texts, add_special_tokens=False)]

    return encode
