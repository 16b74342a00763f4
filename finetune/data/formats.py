"""Formats of rows: how a raw value (an object, a list, a string) becomes a `Row`, a conversation or a text.

If the recipe does not name the format, it is detected from the content, and the reason is kept. Keys that mean something for
training are read (a turn's tool calls, its reasoning, whether it is trained; a row's tools and history); the names of all others
are kept in `Row.unread`, so that the user is told. Data of another kind (preferences) is refused by name.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from finetune.errors import UserError

Raw = tuple[str, Any]  # (where, value)
Message = dict[str, Any]
"""`role` and `content` (text), and where the row has them: `tool_calls`, `tool_call_id`, `name`, `reasoning_content`."""

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "ipython": "tool",
}  # fmt: skip
# (question, additional input, answer): Alpaca's field names and their synonyms.
ALPACA_FIELDS = (
    ("instruction", "input", "output"),
    ("instruction", "context", "response"),
    ("prompt", None, "completion"),
    ("prompt", None, "response"),
    ("question", None, "answer"),
)
REASONING = ("reasoning_content", "reasoning", "thinking")
SCALARS = (str, int, float)


class BadRow(ValueError):
    """A row that has the shape of a format, but a value that cannot be trained on; the message says which."""


@dataclass(frozen=True)
class Row:
    """One example: either `messages` or `text`.

    tools: definitions of the tools that the conversation may call, for the chat template. untrained: indices of assistant turns
    that are not trained. unread: names of keys that were left out.
    """

    where: str
    messages: tuple[Message, ...] = ()
    text: str | None = None
    tools: tuple[dict[str, Any], ...] = ()
    untrained: frozenset[int] = frozenset()
    unread: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """A string that is equal for equal rows."""
        parts = [self.text, self.tools, sorted(self.untrained), self.messages]
        return json.dumps(parts, ensure_ascii=False, sort_keys=True, default=str)

    @property
    def question(self) -> str:
        """All text before the first answer: rows with the same question must not be on both sides of a split."""
        asked = []
        for message in self.messages:
            if message["role"] == "assistant":
                break
            asked.append(message["content"].strip())
        return self.text if self.text is not None else "\n".join(asked)

    @property
    def asked(self) -> str:
        """All text but the answers: conversations that begin alike differ in it."""
        return (
            self.text
            if self.text is not None
            else "\n".join(message["content"].strip() for message in self.messages if message["role"] != "assistant")
        )


def answers(row: Row) -> Iterator[str]:
    """The contents of the assistant's turns; of a turn that calls tools, the calls too."""
    for message in row.messages:
        if message["role"] == "assistant":
            calls = message.get("tool_calls")
            yield message["content"] + (json.dumps(calls, ensure_ascii=False) if calls else "")


TAG = r"(think|thinking|thought|reasoning)"
THOUGHT = re.compile(rf"<{TAG}>(?:(?!<\1>).)*?</\1>\s*", re.DOTALL)  # the innermost
OPENED = re.compile(rf"\s*<{TAG}>.*", re.DOTALL)  # at the beginning, and not closed
CLOSED = re.compile(rf".*</{TAG}>\s*", re.DOTALL)  # the prompt opened it (DeepSeek-R1)


def _without_thoughts(text: str) -> str:
    rest, before = text, None
    while rest != before:
        before, rest = rest, THOUGHT.sub("", rest)
    rest = CLOSED.sub("", rest)
    return "" if OPENED.fullmatch(rest) else rest.lstrip() if rest != text else text


def without_reasoning(row: Row) -> Row:
    """A row whose answers have no thoughts, neither by their own key nor between tags."""
    messages = []
    for message in row.messages:
        if message["role"] == "assistant":
            message = {key: value for key, value in message.items() if key != "reasoning_content"}
            message["content"] = _without_thoughts(message["content"])
        messages.append(message)
    return replace(row, messages=tuple(messages))


# ----------------------------------------------------------------------------------------------------------------- values


def _as_text(value: Any, key: str) -> str:
    """Numbers become text, as a data frame may have them; the parts of OpenAI's content lists are joined.

    Raises:
        BadRow: another type, or an image.
    """
    if isinstance(value, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in value]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) == len(parts):
            return "".join(texts)
        other = next(part for part, text in zip(value, parts, strict=True) if not isinstance(text, str))
        kind = other.get("type", "object") if isinstance(other, dict) else type(other).__name__
        raise BadRow(f"{key} has a part of type {kind}; only text can be trained")
    if isinstance(value, bool) or not isinstance(value, SCALARS):
        raise BadRow(f"{key} is {_kind(value)}, not text")
    return str(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, SCALARS) and not isinstance(value, bool)


def _kind(value: Any) -> str:
    return "null" if value is None else {"dict": "an object", "list": "a list", "bool": "true or false"}.get(
        type(value).__name__, type(value).__name__
    )  # fmt: skip


def _given(values: dict[str, Any], prefix: str = "") -> list[str]:
    """Names of the keys that have a value."""
    return [prefix + key for key, value in values.items() if value not in (None, "", [], {})]


def _tools(value: Any) -> tuple[dict[str, Any], ...]:
    """The row's tools; datasets often store them as a string of JSON."""
    value = _parsed(value, "tools")
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise BadRow("tools is not a list of objects")
    return tuple(value)


def _parsed(value: Any, key: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError):
        raise BadRow(f"{key} is text, but not JSON") from None


def _calls(value: Any) -> list[dict[str, Any]] | None:
    """Tool calls as transformers' templates take them: arguments are an object, not OpenAI's string of JSON."""
    value = _parsed(value, "tool_calls")
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(call, dict) for call in value):
        raise BadRow("tool_calls is not a list of objects")
    calls = []
    for call in value:
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow("a tool call has no name")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            with contextlib.suppress(ValueError, RecursionError):  # then the template gets the text
                parsed = json.loads(arguments)
                arguments = parsed if isinstance(parsed, dict) else arguments
        calls.append({**{k: v for k, v in call.items() if k in ("id", "type")} | {"type": "function"},
                      "function": {"name": function["name"], "arguments": arguments}})  # fmt: skip
    return calls


def _trained(turn: dict[str, Any]) -> bool:
    """Whether a turn is trained: `weight` as OpenAI's fine-tuning takes it, or `train`, both removed from `turn`."""
    trained = True
    for key in ("weight", "train"):
        value = turn.pop(key, None)
        if value is None:
            continue
        if not isinstance(value, int | float) or value not in (0, 1):
            raise BadRow(f"{key} of a turn is {value!r}; only 0 (not trained) and 1 are possible")
        trained &= bool(value)
    return trained


# ---------------------------------------------------------------------------------------------------------------- formats


def _alpaca(where: str, value: Any) -> Row | None:
    if not isinstance(value, dict):
        return None
    fields = next((keys for keys in ALPACA_FIELDS if _is_text(value.get(keys[0])) and _is_text(value.get(keys[2]))), None)
    if fields is None:
        return None
    question_key, input_key, answer_key = fields
    rest = dict(value)
    question, answer = (_as_text(rest.pop(key), key) for key in (question_key, answer_key))
    extra = rest.pop(input_key, None) if input_key else None
    if isinstance(extra, list) and all(isinstance(item, SCALARS) for item in extra):
        extra = "\n".join(map(str, extra))
    extra = "" if extra is None else _as_text(extra, str(input_key))
    messages: list[Message] = []
    system = rest.pop("system", None)
    if system is not None and _as_text(system, "system").strip():
        messages.append({"role": "system", "content": _as_text(system, "system")})
    history = rest.pop("history", None) or []
    if not isinstance(history, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in history):
        raise BadRow("history is not a list of [question, answer]")
    for earlier in history:
        turns = [_as_text(part, "history") for part in earlier]
        messages += [{"role": role, "content": part} for role, part in zip(("user", "assistant"), turns, strict=True)]
    messages.append({"role": "user", "content": f"{question}\n\n{extra}" if extra.strip() else question})
    messages.append({"role": "assistant", "content": answer})
    return Row(where, tuple(messages), unread=tuple(_given(rest)))


def _messages(where: str, value: Any) -> Row | None:
    if not isinstance(value, dict):
        return None
    rest = dict(value)
    key = "messages" if "messages" in rest else "conversations"
    turns = rest.pop(key, None)
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        return None
    if not all("role" in turn or "from" in turn for turn in turns):
        return None
    messages: list[Message] = []
    untrained: set[int] = set()
    unread: list[str] = []
    system = rest.pop("system", None)
    if system is not None and _as_text(system, "system").strip():
        messages.append({"role": "system", "content": _as_text(system, "system")})
    tools = _tools(rest.pop("tools", None))
    for number, given in enumerate(turns):
        turn = dict(given)
        role = turn.pop("role" if "role" in turn else "from")
        if not isinstance(role, str) or role not in ROLES:
            raise BadRow(f"turn {number + 1} has the role {role!r}; known are {', '.join(ROLES)}")
        content = turn.pop("content" if "content" in turn else "value", None)
        message: Message = {"role": ROLES[role]}
        calls = _calls(turn.pop("tool_calls", None))
        reasoning = next((text for name in REASONING if (text := turn.pop(name, None))), None)
        if content is None and not calls:
            raise BadRow(f"turn {number + 1} ({role}) has no content")
        message["content"] = "" if content is None else _as_text(content, "content")
        if reasoning is not None:
            message["reasoning_content"] = _as_text(reasoning, "reasoning")
        if calls:
            message["tool_calls"] = calls
        message |= {name: str(part) for name in ("name", "tool_call_id") if (part := turn.pop(name, None)) is not None}
        if not _trained(turn):
            untrained.add(len(messages))
        unread += _given(turn, f"{key}[].")
        messages.append(message)
    return Row(
        where, tuple(messages), tools=tools, untrained=frozenset(untrained), unread=(*_given(rest), *dict.fromkeys(unread))
    )


def _dialogue(where: str, value: Any) -> Row | None:
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(turn, SCALARS) for turn in value):
        return None
    roles = ("user", "assistant")
    # An odd last turn is a question without an answer: it is dropped.
    turns = value[: len(value) // 2 * 2]
    return Row(where, tuple({"role": roles[i % 2], "content": str(turn).strip()} for i, turn in enumerate(turns)))


def _text(where: str, value: Any) -> Row | None:
    rest = dict(value) if isinstance(value, dict) else {}
    text = rest.pop("text", None) if isinstance(value, dict) else value
    return Row(where, text=text, unread=tuple(_given(rest))) if isinstance(text, str) else None


FORMATS: dict[str, Callable[[str, Any], Row | None]] = {
    "alpaca": _alpaca, "messages": _messages, "dialogue": _dialogue, "text": _text,
}  # fmt: skip
EXPECTED = {
    "alpaca": 'an object with "instruction" and "output" (and perhaps "input")',
    "messages": 'an object with "messages": [{"role": "user", "content": …}, …]',
    "dialogue": "a list of at least two alternating turns",
    "text": 'a string, or an object with "text"',
}


def to_row(raw: Raw, format_: str) -> Row | None:
    """The row, or None if it does not have the shape of the format.

    Raises:
        BadRow: it has the shape, but a value that cannot be trained on.
    """
    row = FORMATS[format_](*raw)
    if row is not None:
        for text in (row.text or "", *(message["content"] for message in row.messages)):
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise BadRow(f"half of a surrogate pair at character {error.start + 1} of {text[:40]!r}: a cut emoji") from None
    return row


def shape(value: Any) -> str:
    """A raw value in words, for messages."""
    if isinstance(value, dict):
        return "an object with keys " + ", ".join(f"{key} ({type(item).__name__})" for key, item in list(value.items())[:6])
    return f"{type(value).__name__}: {str(value)[:60]!r}"


def refuse_preferences(raws: Sequence[Raw]) -> None:
    """Raise UserError for preference data: trained as plain answers it teaches the rejected ones too."""
    for where, value in raws:
        if not isinstance(value, dict):
            continue
        pairs = "chosen" in value and "rejected" in value
        if pairs or (isinstance(value.get("label"), bool) and {"completion", "response", "messages"} & value.keys()):
            why = "chosen and rejected answers" if pairs else "answers with a label, good or bad"
            raise UserError(
                f"this is preference data ({why}); supervised fine-tuning would train the bad answers as well",
                where=where,
                got=shape(value),
                hint='keep the good answers alone, as {"messages": […]} or {"prompt": …, "completion": …}',
            )


def detect(raws: Sequence[Raw]) -> tuple[str, str] | None:
    """Detect the format of raw rows from the first 200 of them; returns (format, reason), None if no format matches."""
    head = raws[:200]
    fits = dict.fromkeys(FORMATS, 0)
    for raw in head:
        for format_ in FORMATS:
            try:
                fits[format_] += to_row(raw, format_) is not None
            except BadRow:
                fits[format_] += 1  # it is that format, and the error says what is wrong with it
    best = max(FORMATS, key=lambda format_: fits[format_])
    return (best, f"{fits[best]} of the first {len(head)} rows are {EXPECTED[best]}") if fits[best] else None
