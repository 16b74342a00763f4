"""Samples: token ids and labels of a row, encoded for training.

An answer's span is found by rendering the chat template twice: the prompt in use (the earlier messages with the generation
prompt), and the conversation up to the answer. Where the second begins with the first, the difference is the answer and its end
token. Labels therefore never depend on the pad token: a model whose pad token is its end token still learns to stop (the bug
behind trl#3091 and unsloth#416).

Templates that do otherwise are served by what the model sees in use. One that rewrites earlier turns when later ones follow
(Qwen3 removes old thoughts) is rendered turn by turn: the conversation becomes one sample for each answer. One whose prompt is
not how the answered conversation begins (Mistral v0.3 moves the system message into the last question; DeepSeek-R1 opens a
thought, and cuts thoughts out of answers) gives the prompt in use, followed by the answer as it was written and the text with
which the template closes an answer, found by rendering a probe.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from finetune.data.control import ControlTokens
from finetune.data.formats import Message, Row
from finetune.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100  # torch's and transformers' label for "not trained"

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The prompt of Stanford Alpaca, extended to several turns; it needs no special tokens.
ALPACA = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}\n\n"
    "{% elif message['role'] == 'assistant' %}### Response:\n{{ message['content'] }}{{ eos_token }}\n\n"
    "{% else %}### Instruction:\n{{ message['content'] }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "alpaca": ALPACA}


def set_template(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """Set the tokenizer's chat template as the recipe asks; returns its name for the screen."""
    if template == "auto":
        if tokenizer.chat_template:
            return "the tokenizer's own"
        tokenizer.chat_template = ALPACA
        return "alpaca (the tokenizer has no template)"
    if template == "chatml":
        missing = [t for t in ("<|im_start|>", "<|im_end|>") if t not in tokenizer.get_vocab()]
        if missing:
            raise UserError(
                "the chatml template needs tokens that this tokenizer does not have",
                where="data.template",
                got=", ".join(missing),
                hint="set data.template=alpaca",
            )
    tokenizer.chat_template = TEMPLATES[template]
    return template


PROBE = "Qx7 probe 7xQ"
OPEN_THOUGHT = re.compile(r"(?P<tag><(?:think|thinking|thought|reasoning)>)\s*$")
GENERATION = re.compile(r"{%-?\s*generation\b")
THOUGHT_TAGS = re.compile(r"</?(?:think|thinking|thought|reasoning)>")


def _pieces(answer: Message) -> list[str]:
    """The texts of an answer: its reasoning, and its content between tags of thoughts."""
    texts = [answer.get("reasoning_content") or "", *THOUGHT_TAGS.split(answer["content"])]
    return [text.strip() for text in texts if text.strip()]


def _lost(answer: Message, rendered: str) -> bool:
    """Whether the template leaves out a part of the answer (R1's cuts thoughts)."""
    return any(piece not in rendered for piece in _pieces(answer))


def _written(answer: Message) -> str:
    """The answer's text as the row has it, with its reasoning as a thought before it."""
    reasoning = answer.get("reasoning_content")
    return f"<think>\n{reasoning.strip()}\n</think>\n\n{answer['content']}" if reasoning else str(answer["content"])


class _Turn(NamedTuple):
    """A conversation's text up to the end of an answer; begin: position of the answer's first character."""

    text: str
    begin: int


@dataclass(frozen=True)
class Sample:
    """Token ids and labels of equal length; labels are at their token's position (the loss shifts them), -100 is not trained."""

    where: str
    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    answers: int = 0  # assistant turns in the text
    ends: tuple[int, ...] = ()  # positions of the end tokens that close answers
    bos: int = 0  # BOS tokens at the beginning
    merged: int = 0  # tokens that hold the last character of a prompt and the first of an answer
    cut: int = 0  # tokens that truncation removed
    cut_supervised: int = 0  # of these, supervised ones

    @property
    def supervised(self) -> int:
        return sum(label != IGNORE for label in self.labels[1:])

    @property
    def ended(self) -> int:
        """Number of answers whose end token was not cut off."""
        return sum(position < len(self.input_ids) for position in self.ends)

    @property
    def cut_ends(self) -> int:
        return len(self.ends) - self.ended

    def __len__(self) -> int:
        return len(self.input_ids)


class Encoder:
    """Encodes rows as samples. `eos_token_ids`: the tokens at which generation stops."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        eos_token_ids: frozenset[int],
        system: str | None = None,
        loss_on: str = "answers",
        truncation: str = "cut",
    ) -> None:
        from eval.model_state import adds_bos

        if not tokenizer.is_fast:
            raise UserError(
                "this is a slow tokenizer, which does not report character offsets; a fast one is required", where="model.name"
            )
        self.tokenizer, self.max_length, self.system, self.loss_on, self.truncation = (
            tokenizer,
            max_length,
            system,
            loss_on,
            truncation,
        )
        self.adds_bos = adds_bos(tokenizer)
        self.control = ControlTokens(tokenizer, eos_token_ids)
        special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.end_ids = eos_token_ids | special - {tokenizer.unk_token_id, tokenizer.bos_token_id}
        self.ends: set[int] = set()  # those of them that ended an answer
        self.long_prompts: list[tuple[str, int]] = []  # samples without an answer token in max_length: location, whole length
        self.left_out: dict[str, list[str]] = {}  # what the template writes nothing of: locations of the rows

    def encode(self, row: Row) -> list[Sample]:
        """The samples of a row (several if the template rewrites earlier turns; none if too long and dropped).

        Raises:
            UserError: the chat template rejects the row.
        """
        samples = [self._text_sample(row)] if row.text is not None else self._conversation(row)
        if self.truncation == "drop":
            return [sample for sample in samples if len(sample) <= self.max_length]
        return [self._cut(sample) for sample in samples]

    def _text_sample(self, row: Row) -> Sample:
        self.control.count_text(row.text or "", row.where)
        ids = self.tokenizer(row.text)["input_ids"]
        if self._leading_bos(ids) > 1:  # the text has been rendered, and begins with one
            ids = ids[1:]
        eos = self.tokenizer.eos_token_id
        if eos is not None:
            self.ends.add(eos)
            if not ids or ids[-1] != eos:
                ids = [*ids, eos]
        ends = (len(ids) - 1,) if eos is not None else ()
        return Sample(row.where, tuple(ids), (IGNORE, *ids[1:]), answers=1, ends=ends, bos=self._leading_bos(ids))

    def _render(self, messages: Sequence[Message], prompt: bool, row: Row) -> str:
        options: dict[str, Any] = {"tools": list(row.tools)} if row.tools else {}
        try:
            text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt, **options)
            return self.control.unescaped(str(text))
        except Exception as error:  # jinja's errors and those of the template: each means that it rejects this row
            raise UserError(
                "the chat template rejects this row",
                where=row.where,
                got=f"{error} (roles: {', '.join(m['role'] for m in messages)})",
                hint="fix the row, or choose another template: data.template=alpaca",
            ) from None

    def _conversation(self, row: Row) -> list[Sample]:
        row = replace(row, messages=self.control.guard(row.messages, row.where), tools=self.control.guard(row.tools, row.where))
        messages = list(row.messages)
        untrained = row.untrained
        if self.system is not None and messages and messages[0]["role"] != "system":
            messages.insert(0, self.control.guard({"role": "system", "content": self.system}, "data.system"))
            untrained = frozenset(index + 1 for index in untrained)
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        if not answers:
            return [self._sample(row.where, self._render(messages, False, row), [])]
        messages = messages[: answers[-1] + 1]  # nothing after the last answer is trained
        whole = self._render(messages, False, row)
        turns = [self._turn(row, messages[: index + 1], whole if index == answers[-1] else None) for index in answers]
        self._note_left_out(row, messages, [whole, *(turn.text for turn in turns)])
        trained = [index not in untrained for index in answers]
        if all(whole.startswith(turn.text) for turn in turns):
            spans = [(turn.begin, len(turn.text)) for turn, train in zip(turns, trained, strict=True) if train]
            return [self._sample(row.where, whole, spans)]
        return [
            self._sample(row.where, turn.text, [(turn.begin, len(turn.text))])
            for turn, train in zip(turns, trained, strict=True)
            if train
        ]

    def agrees_with_marks(self, row: Row) -> bool | None:
        """Whether the trained tokens of a conversation are those that its template marks by `{% generation %}`.

        End tokens that it does not mark are trained here. None where there is nothing to compare: no marks, several samples of
        one conversation, turns that are not trained, or names of control tokens in the text.
        """
        template = self.tokenizer.chat_template
        if row.text is not None or row.untrained or not isinstance(template, str) or not GENERATION.search(template):
            return None
        uncounted = copy.copy(self)
        uncounted.control, uncounted.left_out = self.control.without_counts(), {}
        samples = uncounted._conversation(row)
        messages = list(row.messages[: max(i for i, m in enumerate(row.messages) if m["role"] == "assistant") + 1])
        if self.system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system})
        options: dict[str, Any] = {"tools": list(row.tools)} if row.tools else {}
        marked: Any = self.tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **options
        )
        ids = list(marked["input_ids"])
        if len(samples) != 1 or list(samples[0].input_ids)[-len(ids) :] != ids:
            return None
        labels = samples[0].labels[-len(ids) :]
        ours = {at for at, label in enumerate(labels) if label != IGNORE}
        theirs = {at for at, mark in enumerate(marked["assistant_masks"]) if mark}
        return theirs <= ours and all(ids[at] in self.end_ids for at in ours - theirs)

    def _turn(self, row: Row, messages: list[Message], rendered: str | None) -> _Turn:
        """The text up to the end of the last message, an answer, and where the answer begins. rendered: `messages`, if known."""
        answer = messages[-1]
        through = self._render(messages, False, row) if rendered is None else rendered
        try:
            prompt = self._render(messages[:-1], True, row)
        except UserError:  # no prompt without a question: the conversation opens with this answer
            before, _ = self._around(row, messages)
            if not through.startswith(before):
                raise
            return _Turn(through, len(before))
        if through.startswith(prompt) and not _lost(answer, through[len(prompt) :]):
            return _Turn(through, len(prompt))
        before, closing = self._around(row, messages)
        if through.startswith(before) and not _lost(answer, through[len(before) :]):
            body = through[len(before) :]
        else:
            body = _written(answer) + closing
        # White space that the template writes before an answer, but not into the prompt (Mistral's).
        blank = len(before) - len(before.rstrip())
        ends = [before[: len(before) - count][-4:] == prompt[-4:] for count in range(blank + 1)]
        body = before[len(before) - ends.index(True) :] + body if True in ends[1:] and not ends[0] else body
        if (opened := OPEN_THOUGHT.search(prompt)) is not None:
            tag = opened["tag"]
            if body.lstrip().startswith(tag):
                body = body.lstrip()[len(tag) :].lstrip()
            elif tag.replace("<", "</") not in body:  # in use the model ends its thought before it answers
                body = f"\n{tag.replace('<', '</')}\n\n{body.lstrip()}"
        return _Turn(prompt + body, len(prompt))

    def _note_left_out(self, row: Row, messages: list[Message], texts: list[str]) -> None:
        """Note roles, tools and tool calls of which no rendering has the text."""
        for message in messages:
            content = message["content"].strip()
            forms = content, json.dumps(content, ensure_ascii=False)[1:-1]  # Llama 3.1 writes results of tools as JSON
            if message["role"] != "assistant" and content and not any(form in text for form in forms for text in texts):
                self.left_out.setdefault(f"turns of role {message['role']}", []).append(row.where)
            for call in message.get("tool_calls", ()):
                if not any(call["function"]["name"] in text for text in texts):
                    self.left_out.setdefault("tool calls", []).append(row.where)
        names = [str(tool.get("function", tool).get("name", "")) for tool in row.tools]
        if any(name and not any(name in text for text in texts) for name in names):
            self.left_out.setdefault("tools", []).append(row.where)

    def _around(self, row: Row, messages: list[Message]) -> tuple[str, str]:
        """What the template writes before and after the last message, an answer.

        Raises:
            UserError: the template does not write the answer's text.
        """
        text = self._render([*messages[:-1], {"role": "assistant", "content": PROBE}], False, row)
        before, found, after = text.rpartition(PROBE)
        if not found:
            raise UserError(
                "the chat template does not write the text of answers",
                where=row.where,
                got=f"{text[-80:]!r}",
                hint="choose another template: data.template=alpaca",
            )
        return before, after

    def _sample(self, where: str, text: str, spans: list[tuple[int, int]]) -> Sample:
        ids, offsets = self.control.encode(text)
        bos = self.tokenizer.bos_token_id
        if self.adds_bos and (not ids or ids[0] != bos):
            ids.insert(0, bos)
            offsets.insert(0, (0, 0))
        labels = [IGNORE] * len(ids)
        ends: list[int] = []
        merged = 0
        for begin, end in spans:
            inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > begin]
            merged += any(offsets[i][0] < begin for i in inside)
            # The end token closes the answer; text that a template writes after it (a newline) is never generated.
            closing = next((i for i in reversed(inside) if ids[i] in self.end_ids), None)
            if closing is not None and not text[offsets[closing][1] : end].strip():
                inside = [i for i in inside if i <= closing]
                ends.append(closing)
                self.ends.add(ids[closing])
            for i in inside:
                labels[i] = ids[i]
        if self.loss_on == "all":
            labels = list(ids)
        labels[:1] = [IGNORE]
        return Sample(
            where, tuple(ids), tuple(labels), answers=len(spans), ends=tuple(ends), bos=self._leading_bos(ids), merged=merged
        )

    def _leading_bos(self, ids: list[int]) -> int:
        count = 0
        while self.adds_bos and count < len(ids) and ids[count] == self.tokenizer.bos_token_id:
            count += 1
        return count

    def _cut(self, sample: Sample) -> Sample:
        if len(sample) <= self.max_length:
            return sample
        lost = sample.labels[self.max_length :]
        if sample.supervised and not any(label != IGNORE for label in sample.labels[1 : self.max_length]):
            self.long_prompts.append((sample.where, len(sample)))
        kept: dict[str, Any] = {**sample.__dict__}
        kept |= {
            "input_ids": sample.input_ids[: self.max_length],
            "labels": sample.labels[: self.max_length],
            "cut": len(lost),
            "cut_supervised": sum(label != IGNORE for label in lost),
        }
        return Sample(**kept)
