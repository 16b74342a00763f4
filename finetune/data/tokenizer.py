"""The tokenizer of a model from scratch: byte-level BPE, as GPT-2's, trained on the beginning of the data.

Every text is encoded and comes back as it was, for all 256 bytes are tokens. There is one special token, the end of a document;
nothing is put before a text. Its merges and its splitting rule are GPT-2's, which llama.cpp knows.
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
SMALLEST = 258  # the end, 256 bytes, and something learnt
MAX_BYTES = 64 << 20


def tokenizer_texts(source: Source, max_bytes: int = MAX_BYTES) -> Iterator[str]:
    """Texts of the first blocks of a source, `max_bytes` or a little more.

    What will be held out is not taken out: a tokenizer learns which pieces of words are frequent, and is made before the split.
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
    """A byte-level BPE tokenizer with exactly `vocabulary` tokens: the same one for the same texts.

    max_bytes: so much of the texts is read, in UTF-8. progress is told now and then how many bytes were.

    Raises:
        UserError: the vocabulary is smaller than 258, or larger than these texts give.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if vocabulary < SMALLEST:
        got = f"{vocabulary}; the end token and all 256 bytes are 257"
        raise UserError("the vocabulary is too small", where="tokenizer.train", got=got, hint="such as tokenizer.train=4096")
    read = 0

    def limited() -> Iterator[str]:
        nonlocal read
        for number in itertools.count():
            text = next(given, None)
            if text is None or read >= max_bytes:
                return
            read += len(text.encode())
            if progress is not None and not number % 256:
                progress(read)
            yield text

    given = iter(texts)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,  # what stands together once only is not learnt
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(limited(), trainer)
    if progress is not None:
        progress(read)
    made = tokenizer.get_vocab_size()
    if made < vocabulary:
        raise UserError(
            "the text is too small for this vocabulary",
            where="tokenizer.train",
            got=f"{vocabulary:,} tokens were asked for, {read:,} bytes of text gave {made:,}",
            hint=(f"tokenizer.train={made}, or " if made >= SMALLEST else "") + "more text",
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, model_max_length=1 << 20, clean_up_tokenization_spaces=False
    )


def batch_encoder(tokenizer: PreTrainedTokenizerBase | Any) -> Encode:
    """What turns texts into token ids for a `Corpus`: no special token is added, none is taken out of a text.

    An end token that stands written in a text is spelt, as text is, and ends no document. The encoder has a copy of the
    tokenizer to itself: it works in the background, and a tokenizer must not be changed by two threads at once.
    """
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return lambda texts: tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    own = Tokenizer.from_str(backend.to_str())
    own.no_truncation()
    own.no_padding()
    own.encode_special_tokens = True

    def encode(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in own.encode_batch_fast(texts, add_special_tokens=False)]

    return encode
