"""Control tokens in the text of rows: a `</s>` that somebody wrote is text, and does not end the answer.

A tokenizer reads the names of its special tokens wherever they stand. Names in the contents of messages are therefore replaced by
guards (noncharacters of Unicode) before the chat template is rendered; where a rendering has guards, the names that the
template wrote are encoded as tokens and the guarded ones as text. Tokens that belong in answers (`<think>`, `<tool_call>`) are
not guarded. Both are counted.
"""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

BELONGS = re.compile(r"think|thought|reason|tool.?call|function.?call|python.?tag", re.IGNORECASE)
NAME = re.compile(r"[<\[]\S+[>\]]")  # an added token that is no word of a vocabulary
# Guards and marks are spelt in noncharacters, which Unicode keeps for a program's own use: no text has them.
INTERNAL = re.compile("[\ufdd0-\ufdef]")
ESCAPED = re.compile(r"\\u(fd[de][0-9a-f])")
GUARD = re.compile("\ufde0([\ufdd0-\ufdd9]+)\ufde1")
JOINT = "\ufde4"


def _internal(number: int, begin: str, end: str) -> str:
    return begin + "".join(chr(0xFDD0 + int(digit)) for digit in str(number)) + end


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
        self._guards = {name: _internal(number, "\ufde0", "\ufde1") for number, name in enumerate(self.names)}
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
            is_message = isinstance(value.get("role"), str) and "content" in value
            return {
                self.guard(key, where): item if key == "role" and is_message else self.guard(item, where)
                for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return type(value)(self.guard(item, where) for item in value)
        if not isinstance(value, str):
            return value
        value = INTERNAL.sub("\ufffd", value)
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

    def has_names(self, text: str) -> bool:
        return bool(self._control.find(text))

    def unescaped(self, text: str) -> str:
        """A rendering in which guards that a template wrote as JSON escapes are guards again."""
        return ESCAPED.sub(lambda match: chr(int(match[1], 16)), text) if "\\ufd" in text else text

    def unguarded(self, text: str) -> str:
        """The text with names instead of guards."""
        return GUARD.sub(lambda match: self.names[int("".join(str(ord(c) - 0xFDD0) for c in match[1]))], text)

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """(token ids, their spans in `text`) of a rendering that may have guards; adds no tokens."""
        if GUARD.search(text) is None:
            return self._plain(text)
        own, marks, special = self._guarding_tokenizer()
        original = {own.token_to_id(mark): self._ids[name] for name, mark in marks.items()}
        dropped = own.token_to_id(JOINT)

        def guarding(written: str) -> tuple[list[int], list[tuple[int, int]]]:
            encoding = own.encode(written, add_special_tokens=False)
            kept = [(original.get(i, i), span) for i, span in zip(encoding.ids, encoding.offsets, strict=True) if i != dropped]
            return [i for i, _ in kept], [span for _, span in kept]

        expected = Counter(name for _, name in special.find(text))
        # A joint splits names that are words of the vocabulary. Where marks are not read as the names are (a normalizer
        # removes them, or flags of the tokens), the template's names stay, and a space splits the others.
        for joint, spelling, encode in (("", marks, guarding), (JOINT, marks, guarding), (" ", {}, self._plain)):
            try:
                ids, offsets = self._encode_guarded(text, special, spelling, joint, encode)
            except BaseException as error:
                if type(error).__name__ != "PanicException":  # of a normalizer written in Rust
                    raise
                continue
            counts = Counter(ids)
            if all(counts[self._ids[name]] == expected[name] for name in marks):
                break
        else:  # names that no spelling keeps from being tokens are counted as such
            self.kept.update({name: more for name in marks if (more := counts[self._ids[name]] - expected[name]) > 0})
        return ids, offsets

    def _plain(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        plain = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(plain["input_ids"]), list(plain["offset_mapping"])

    def _encode_guarded(
        self, text: str, special: _Names, marks: dict[str, str], joint: str, encode: Callable[[str], Any]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """marks: what is written for the names of the template. joint: written after the first character of a guarded name."""
        pieces: list[str] = []
        places: list[int] = []  # of each character of the encoded text, its position in `text`
        position = 0
        guards = [(match.start(), match[0]) for match in GUARD.finditer(text)]
        lengths: dict[int, int] = {}  # position of a name or a guard in `text` → its length there
        for begin, name in sorted([*special.find(text), *guards]):
            written = self.unguarded(name)
            piece = marks.get(name, name) if written == name else written[:1] + joint + written[1:]
            pieces += [text[position:begin], piece]
            places += [*range(position, begin), *[begin] * len(piece)]
            position, lengths[begin] = begin + len(name), len(name)
        pieces.append(text[position:])
        places += [*range(position, len(text)), len(text)]
        ids, spans = encode("".join(pieces))
        # A span ends after its last character; that of a name or a mark is as long as what it replaced.
        ends = [places[end - 1] + lengths.get(places[end - 1], 1) if end > begin else places[end] for begin, end in spans]
        return ids, [(places[begin], end) for (begin, _), end in zip(spans, ends, strict=True)]

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
            marks = {token["content"]: _internal(number, "\ufde2", "\ufde3") for number, token in enumerate(special)}
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
