"""Samples: token ids and labels of a row, encoded for training.

An answer's span is found by rendering the chat template twice: with the generation prompt before the answer, and with the
answer. The difference is the answer and its end token, for any template. Labels therefore never depend on the pad token: a
model whose pad token is its end token still learns to stop (the bug behind trl#3091 and unsloth#416).

A template that rewrites earlier turns when later ones follow (Qwen3 removes old thoughts) is rendered turn by turn: such a
conversation becomes one sample for each answer, which is what the model sees in use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.data.rows import Row
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
        probe = tokenizer("a")["input_ids"]
        self.adds_bos = bool(probe) and tokenizer.bos_token_id is not None and probe[0] == tokenizer.bos_token_id
        special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.end_ids = eos_token_ids | special - {tokenizer.unk_token_id, tokenizer.bos_token_id}
        self.ends: set[int] = set()  # those of them that ended an answer

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
        ids = self.tokenizer(row.text)["input_ids"]
        eos = self.tokenizer.eos_token_id
        if eos is not None:
            self.ends.add(eos)
            if not ids or ids[-1] != eos:
                ids = [*ids, eos]
        ends = (len(ids) - 1,) if eos is not None else ()
        return Sample(row.where, tuple(ids), (IGNORE, *ids[1:]), answers=1, ends=ends, bos=self._leading_bos(ids))

    def _render(self, messages: list[dict[str, str]], prompt: bool, where: str) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
        except Exception as error:  # jinja's errors and those of the template: each means that it rejects this row
            raise UserError(
                "the chat template rejects this row",
                where=where,
                got=f"{error} (roles: {', '.join(m['role'] for m in messages)})",
                hint="fix the row, or choose another template: data.template=alpaca",
            ) from None

    def _conversation(self, row: Row) -> list[Sample]:
        messages = list(row.messages)
        if self.system is not None and messages and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system})
        last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=None)
        if last is None:
            return [self._sample(row.where, self._render(messages, False, row.where), [])]
        messages = messages[: last + 1]  # nothing after the last answer is trained
        whole = self._render(messages, False, row.where)
        turns: list[tuple[str, str]] = []  # (text before the answer, text up to its end)
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self._render(messages[:index], True, row.where)
                through = whole if index == last else self._render(messages[: index + 1], False, row.where)
                if not through.startswith(before):  # the generation prompt has more text than the answer's beginning
                    before = self._common(before, through)
                turns.append((before, through))
        if all(whole.startswith(through) for _, through in turns):
            return [self._sample(row.where, whole, [(len(before), len(through)) for before, through in turns])]
        return [self._sample(row.where, through, [(len(before), len(through))]) for before, through in turns]

    @staticmethod
    def _common(a: str, b: str) -> str:
        length = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        return a[:length]

    def _sample(self, where: str, text: str, spans: list[tuple[int, int]]) -> Sample:
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids: list[int] = list(encoded["input_ids"])
        offsets: list[tuple[int, int]] = list(encoded["offset_mapping"])
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
        kept: dict[str, Any] = {**sample.__dict__}
        kept |= {
            "input_ids": sample.input_ids[: self.max_length],
            "labels": sample.labels[: self.max_length],
            "cut": len(lost),
            "cut_supervised": sum(label != IGNORE for label in lost),
        }
        return Sample(**kept)
