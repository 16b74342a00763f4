"""Control tokens in the text of rows: a `</s>` that somebody wrote is text, and does not end the answer.

A tokenizer reads the names of its special tokens wherever they stand. Names in the contents of messages are therefore replaced by
guards (characters of a private-use plane) before the chat template is rendered; where a rendering has guards, the names that the
template wrote are encoded as tokens and the guarded ones as text. Tokens that belong in answers (`<think>`, `<tool_call>`) are
not guarded. Both are counted.

The same distinction, made by encoding contents apart from the template, is that of torchtune and of Llama 3's reference code
(`encode` with `disallowed_special=()`).
"""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

BELONGS = re.compile(r"think|thought|reason|tool.?call|function.?call|python.?tag", re.IGNORECASE)
NAME = re.compile(r"[<\[]\S+[>\]]")  # an added token that is no word of a vocabulary
GUARDS, MARKS = 0x100000, 0xF0000  # first characters of the private-use planes 16 and 15
JOINT = chr(MARKS + 0xFFF0)


class ControlTokens:
    """Guards contents, and encodes renderings with guards. Counts by name: `spelled` as text, `kept` as tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_token_ids: frozenset[int]) -> None:
        self.tokenizer = tokenizer
        added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
        ids = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
        template = _names_in_template(tokenizer, list(added))
        names = [
            name
            for name, token in added.items()
            if name.strip() and not BELONGS.search(name) and (token.special or ids[name] in eos_token_ids or name in template)
        ]
        self.names = sorted(names, key=len, reverse=True)
        self._control = _Names(self.names)
        self._others = _Names([name for name in added if name not in self._control.names and NAME.fullmatch(name)])
        self._guards = {name: chr(GUARDS + number) for number, name in enumerate(self.names)}
        self._guarded = re.compile(f"[{chr(GUARDS)}-{chr(GUARDS + len(names))}]")
        self._ids = ids
        self._own: tuple[Tokenizer, dict[str, str], _Names] | None = None
        self.spelled: Counter[str] = Counter()
        self.kept: Counter[str] = Counter()
        self.where: dict[str, str] = {}  # name → location of the first row that has it

    def without_counts(self) -> ControlTokens:
        """A copy with counts of its own."""
        result = copy.copy(self)
        result.spelled, result.kept, result.where = Counter(), Counter(), {}
        return result

    def guard(self, value: Any, where: str) -> Any:
        """A copy of a message, a tool or a list of them, with guards in its texts."""
        if isinstance(value, dict):
            return {key: item if key == "role" else self.guard(item, where) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.guard(item, where) for item in value)
        if not isinstance(value, str):
            return value
        self._count(self.kept, [name for _, name in self._others.find(value)], where)
        found = self._control.find(value)
        self._count(self.spelled, [name for _, name in found], where)
        pieces, end = list[str](), 0
        for begin, name in found:
            pieces += [value[end:begin], self._guards[name]]
            end = begin + len(name)
        return "".join([*pieces, value[end:]])

    def count_text(self, text: str, where: str) -> None:
        """Count the names in a whole text, which keep their meaning there."""
        self._count(self.kept, [name for names in (self._control, self._others) for _, name in names.find(text)], where)

    def _count(self, counter: Counter[str], names: list[str], where: str) -> None:
        for name in names:
            counter[name] += 1
            self.where.setdefault(name, where)

    def unguarded(self, text: str) -> str:
        """The text with names instead of guards."""
        return self._guarded.sub(lambda match: self.names[ord(match[0]) - GUARDS], text)

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """(token ids, their spans in `text`) of a rendering that may have guards; adds no tokens."""
        if self._guarded.search(text) is None:
            plain = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            return list(plain["input_ids"]), list(plain["offset_mapping"])
        ids, offsets = self._encode_guarded(text, "")
        if any(count > text.count(name) for name, count in self._tokens(ids).items()):
            ids, offsets = self._encode_guarded(text, JOINT)  # a vocabulary whose words include the names of control tokens
        return ids, offsets

    def _tokens(self, ids: list[int]) -> Counter[str]:
        """Control tokens among `ids`, by name."""
        counts = Counter(ids)
        return Counter({name: counts[self._ids[name]] for name in self.names if self._ids[name] in counts})

    def _encode_guarded(self, text: str, joint: str) -> tuple[list[int], list[tuple[int, int]]]:
        """`joint`: written after the first character of a guarded name, and removed from the result."""
        own, marks, special = self._guarding_tokenizer()
        pieces: list[str] = []
        places: list[int] = []  # of each character of the encoded text, its position in `text`
        position = 0
        guards = [(match.start(), match[0]) for match in self._guarded.finditer(text)]
        lengths: dict[int, int] = {}  # position of a name or a guard in `text` → its length there
        for begin, name in sorted([*special.find(text), *guards]):
            written = self.unguarded(name)
            piece = marks[name] if written == name else written[:1] + joint + written[1:]
            pieces += [text[position:begin], piece]
            places += [*range(position, begin), *[begin] * len(piece)]
            position, lengths[begin] = begin + len(name), len(name)
        pieces.append(text[position:])
        places += [*range(position, len(text)), len(text)]
        encoding = own.encode("".join(pieces), add_special_tokens=False)
        original = {own.token_to_id(mark): self._ids[name] for name, mark in marks.items()}
        dropped = own.token_to_id(JOINT)
        kept = [(i, *span) for i, span in zip(encoding.ids, encoding.offsets, strict=True) if i != dropped]
        ids = [original.get(index, index) for index, _, _ in kept]
        # A span ends after its last character; that of a name or a mark is as long as what it replaced.
        ends = [places[end - 1] + lengths.get(places[end - 1], 1) if end > begin else places[end] for _, begin, end in kept]
        return ids, [(places[begin], end) for (_, begin, _), end in zip(kept, ends, strict=True)]

    def _guarding_tokenizer(self) -> tuple[Tokenizer, dict[str, str], _Names]:
        """(a copy of the tokenizer that encodes names of special tokens as text, name → its mark there, the names)"""
        if self._own is None:
            from tokenizers import AddedToken, Tokenizer

            config = json.loads(self.tokenizer.backend_tokenizer.to_str())
            for token in config["added_tokens"]:
                token["special"] = token["special"] or token["content"] in self._guards
            own = Tokenizer.from_str(json.dumps(config))
            own.no_truncation()
            own.no_padding()
            own.encode_special_tokens = True
            special = [token for token in config["added_tokens"] if token["special"]]
            marks = {token["content"]: chr(MARKS + number) for number, token in enumerate(special)}
            flags = ("single_word", "lstrip", "rstrip", "normalized")
            own.add_tokens([AddedToken(marks[t["content"]], **{flag: t[flag] for flag in flags}) for t in special])
            own.add_tokens([AddedToken(JOINT, normalized=False)])
            self._own = own, marks, _Names(list(marks))
        return self._own


def _names_in_template(tokenizer: PreTrainedTokenizerBase, names: list[str]) -> set[str]:
    """The added tokens that the chat template writes around a question and an answer."""
    question, answer = {"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}
    try:
        text = str(tokenizer.apply_chat_template([question, answer], tokenize=False))
        text += str(tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True))
    except Exception:  # jinja's errors and those of the template; a row will show them
        return set()
    return {name for name in names if NAME.fullmatch(name) and name in text}


class _Names:
    """Finds the longest of many names at each position of a text (Gemma 3 has 6,000)."""

    def __init__(self, names: list[str]) -> None:
        self.names = frozenset(names)
        self._lengths = sorted({len(name) for name in names}, reverse=True)
        self._first = re.compile("|".join(sorted({re.escape(name[0]) for name in names})) or "(?!)")

    def find(self, text: str) -> list[tuple[int, str]]:
        """(position, name) of each, in order; they do not overlap."""
        found, end = list[tuple[int, str]](), 0
        for match in self._first.finditer(text):
            begin = match.start()
            if begin < end:
                continue
            candidates = (text[begin : begin + length] for length in self._lengths)
            if (name := next((each for each in candidates if each in self.names), None)) is not None:
                found.append((begin, name))
                end = begin + len(name)
        return found
