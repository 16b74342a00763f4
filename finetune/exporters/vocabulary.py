"""Converts a tokenizer to GGUF: byte-level BPE with GPT-2's splitting rule, with or without single digits.

A GGUF only names the splitting rule, which llama.cpp implements, so only its rules are supported. That both tokenize alike
is tested on text in which such rules differ.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eval.model_state import adds_bos
from finetune.errors import GateError, UserError

if TYPE_CHECKING:
    from finetune.exporters.llama_cpp import Llama

MOST = 4000  # tokens of the vocabulary that are compared
PROBES = (
    "Hello world, it's 1234567 o'clock; don't they'll we've I'M?",
    "  two spaces\n\n\nthree lines\t\ttabs \r\n and a trailing space ",
    "naïve café — “quotes” 東京 привет 😀 ½ ²³ ١٢٣ e\u0301",
    "def f(x):\n    return x**2 + 3.14e-10  # 100%\n\n",
    "",
)


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer for GGUF. tokens: spelled as in the GGUF, by id. types: gguf.TokenType by id. rule: `tokenizer.ggml.pre`."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    rule: str
    bos: int | None
    eos: int
    pad: int | None
    adds_bos: bool
    template: str | None


def vocabulary(tokenizer: Any, size: int) -> Vocabulary:
    """Convert `tokenizer` for the GGUF of a model with `size` embeddings.

    Raises:
        UserError: it is not byte-level BPE with a rule of llama.cpp, has no end token, or does not match the model.
    """
    from gguf import TokenType

    where = type(tokenizer).__name__
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refusal(where, "not a tokenizer of the `tokenizers` library")
    spec = json.loads(backend.to_str())
    model = spec["model"]
    if model["type"] != "BPE" or model.get("byte_fallback") or model.get("ignore_merges") or spec.get("normalizer"):
        raise _refusal(where, f"model {model['type']}, normalizer {(spec.get('normalizer') or {}).get('type')}")
    rule = _rule(spec.get("pre_tokenizer"))
    if rule is None:
        raise _refusal(where, f"pre_tokenizer {json.dumps(spec.get('pre_tokenizer'))[:200]}")
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end token, and a GGUF needs one", where=where, hint="set tokenizer.eos_token")
    tokens, types = [f"[PAD{i}]" for i in range(size)], [int(TokenType.UNUSED)] * size
    added = {token["id"]: token for token in spec["added_tokens"]}
    for text, i in tokenizer.get_vocab().items():
        if i >= size:
            raise UserError(
                "the tokenizer does not match the model",
                where=where,
                got=f"token {text!r} has id {i}, the model has {size} embeddings",
            )
        token_type = TokenType.NORMAL if i not in added else TokenType.CONTROL if added[i]["special"] else TokenType.USER_DEFINED
        tokens[i], types[i] = text, int(token_type)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return Vocabulary(
        tokens,
        types,
        merges,
        rule,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        adds_bos=adds_bos(tokenizer),
        template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
    )


def compare(tokenizer: Any, llama: Llama) -> int:
    """Tokenize probes and the texts of (some of) the vocabulary's tokens with both: a wrong rule never produces some of these
    tokens. Returns the number of tokens; raises GateError if the results differ."""
    ids = range(0, len(tokenizer), 1 + len(tokenizer) // MOST)
    own = [tokenizer.decode(ids[start : start + 200], skip_special_tokens=True) for start in range(0, len(ids), 200)]
    count = 0
    for text in (*PROBES, *own):
        ours, theirs = list(tokenizer(text).input_ids), llama.tokenize(text)
        if ours != theirs:
            first = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
            raise GateError(
                "llama.cpp tokenizes differently from the model's tokenizer; the export was not kept",
                where=f"the text {tokenizer.decode(ours[max(first - 5, 0) : first + 5])!r}",
                got=f"{theirs[first : first + 5]} instead of {ours[first : first + 5]}",
            )
        count += len(ours)
    return count


def _rule(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """llama.cpp's name of the splitting rule, or None if it has none."""
    steps = [pre_tokenizer or {}]
    if steps[0].get("type") == "Sequence":
        steps = steps[0]["pretokenizers"]
    *before, last = steps
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space") or not last.get("use_regex", True):
        return None
    if not before:
        return "gpt-2"
    return "smollm" if before == [{"type": "Digits", "individual_digits": True}] else None


def _refusal(where: str, got: str) -> UserError:
    return UserError(
        "this tokenizer cannot be stored in a GGUF: only byte-level BPE with GPT-2's splitting rule is supported",
        where=where,
        got=got,
        hint="export --to bitnet, which keeps the tokenizer",
    )
