"""A tokenizer as GGUF carries it: byte-level BPE with GPT-2's splitting rule, with or without single digits.

A GGUF names the splitting rule and llama.cpp has the rule itself, so only rules that it has can be carried. That the two split
alike is not believed but tried, on text with what such rules differ in.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.errors import GateError, UserError

if TYPE_CHECKING:
    from finetune.exporters.llama_cpp import Llama

MOST = 4000  # tokens of the vocabulary that are tried
PROBES = (
    "Hello world, it's 1234567 o'clock; don't they'll we've I'M?",
    "  two spaces\n\n\nthree lines\t\ttabs \r\n and a trailing space ",
    "naïve café — “quotes” 東京 привет 😀 ½ ²³ ١٢٣ e\u0301",
    "def f(x):\n    return x**2 + 3.14e-10  # 100%\n\n",
    "",
)


@dataclass(frozen=True)
class Vocabulary:
    """tokens: as the GGUF spells them, by id. kinds: gguf.TokenType by id. rule: `tokenizer.ggml.pre`."""

    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    rule: str
    bos: int | None
    eos: int
    pad: int | None
    adds_bos: bool
    template: str | None


def vocabulary(tokenizer: Any, size: int) -> Vocabulary:
    """What a GGUF needs to know of `tokenizer` for a model of `size` embeddings.

    Raises:
        UserError: it is not byte-level BPE with a rule that llama.cpp has, it has no end token, or does not fit the model.
    """
    from gguf import TokenType

    where = type(tokenizer).__name__
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refusal(where, "it is no tokenizer of the `tokenizers` library")
    spec = json.loads(backend.to_str())
    model = spec["model"]
    if model["type"] != "BPE" or model.get("byte_fallback") or model.get("ignore_merges") or spec.get("normalizer"):
        raise _refusal(where, f"model {model['type']}, normalizer {(spec.get('normalizer') or {}).get('type')}")
    rule = _rule(spec.get("pre_tokenizer"))
    if rule is None:
        raise _refusal(where, f"pre_tokenizer {json.dumps(spec.get('pre_tokenizer'))[:200]}")
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end token, and a GGUF needs one", where=where, hint="tokenizer.eos_token = …")
    tokens, kinds = [f"[PAD{i}]" for i in range(size)], [int(TokenType.UNUSED)] * size
    added = {token["id"]: token for token in spec["added_tokens"]}
    for text, i in tokenizer.get_vocab().items():
        if i >= size:
            raise UserError(
                "the tokenizer does not fit the model",
                where=where,
                got=f"token {text!r} has id {i}, the model has {size} embeddings",
            )
        kind = TokenType.NORMAL if i not in added else TokenType.CONTROL if added[i]["special"] else TokenType.USER_DEFINED
        tokens[i], kinds[i] = text, int(kind)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    plain = tokenizer("a").input_ids
    return Vocabulary(
        tokens,
        kinds,
        merges,
        rule,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        adds_bos=bool(plain) and tokenizer.bos_token_id is not None and plain[0] == tokenizer.bos_token_id,
        template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
    )


def compare(tokenizer: Any, llama: Llama) -> int:
    """Tokenize the probes with both, and the texts of (some of) the vocabulary's own tokens, since a wrong rule shows where the
    vocabulary has a token that it never splits off. Returns the number of tokens; raises GateError where they differ."""
    ids = range(0, len(tokenizer), 1 + len(tokenizer) // MOST)
    own = [tokenizer.decode(ids[start : start + 200], skip_special_tokens=True) for start in range(0, len(ids), 200)]
    count = 0
    for text in (*PROBES, *own):
        ours, theirs = list(tokenizer(text).input_ids), llama.tokenize(text)
        if ours != theirs:
            place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
            raise GateError(
                "llama.cpp tokenizes otherwise than the tokenizer that the model was trained with; the export was not kept",
                where=f"the text {tokenizer.decode(ours[max(place - 5, 0) : place + 5])!r}",
                got=f"{theirs[place : place + 5]} instead of {ours[place : place + 5]}",
            )
        count += len(ours)
    return count


def _rule(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """llama.cpp's name of the splitting rule, or None."""
    steps = [pre_tokenizer or {}]
    if steps[0].get("type") == "Sequence":
        steps = steps[0]["pretokenizers"]
    *before, last = steps
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space") or not last.get("use_regex", True):
        return None
    if not before:
        return "gpt-2"
    return "smollm" if before == [{"type": "Digits", "individual_digits": True}] else None


def _refusal(where: str, found: str) -> UserError:
    return UserError(
        "this tokenizer cannot be carried in a GGUF: byte-level BPE with GPT-2's splitting rule can",
        where=where,
        got=found,
        hint="--to bitnet keeps the tokenizer as it is",
    )
