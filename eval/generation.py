"""Answers of a chat model: whole ones to compare models by, and a stream to talk to.

Conversations run one at a time: a left-padded batch is wrong for a model that carries a state along the sequence, and for
any other it changes the rounding, so that an answer would depend on its neighbours.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from threading import Event, Thread
from typing import Any

import torch
from torch import nn

from eval.model_state import adds_bos, device_of, evaluating, forget, out_of_memory, randomness_kept

Message = dict[str, Any]  # role, content, …: what the tokenizer's chat template takes
Prompt = Sequence[Message] | str  # a conversation, or a text that the model goes on with
Progress = Callable[[int, int], None]  # (done, total)
PIECE = 128  # tokens of a prompt that are read at once where all of it is too much for the memory


@dataclass(frozen=True)
class Answer:
    text: str  # without special tokens
    tokens: int  # generated, the end token included
    ended: bool  # it stopped by itself, not at max_new_tokens
    seconds: float


def eos_token_ids(model: nn.Module, tokenizer: Any) -> list[int]:
    """Token ids that end an answer: the tokenizer's end token and those of the model's generation config, each once."""
    config = getattr(model, "generation_config", None)
    theirs = config.eos_token_id if config is not None else None
    found = [tokenizer.eos_token_id, *(theirs if isinstance(theirs, (list, tuple)) else [theirs])]
    return list(dict.fromkeys(int(token) for token in found if token is not None))


def _prompt(tokenizer: Any, messages: Prompt) -> list[int]:
    """Token ids up to where the answer begins, with one BOS where the tokenizer wants one: the template's or our own."""
    if isinstance(messages, str):
        ids = list(tokenizer(messages, add_special_tokens=False, verbose=False)["input_ids"])
        return [tokenizer.bos_token_id, *ids] if adds_bos(tokenizer) else ids or [tokenizer.eos_token_id]
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the tokenizer has no chat template, so there is no way to write a conversation for this model")
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if adds_bos(tokenizer) and ids[:1] != [tokenizer.bos_token_id]:
        ids = [tokenizer.bos_token_id, *ids]
    return ids


def _options(model: nn.Module, tokenizer: Any, max_new_tokens: int, temperature: float, top_p: float) -> dict[str, Any]:
    """Arguments of `model.generate` besides the prompt. At temperature 0 the most likely token, else samples of the whole
    vocabulary cut by top_p alone; penalties that the model's own generation config sets stay.
    """
    from transformers import GenerationConfig

    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be 1 or more, it is {max_new_tokens}")
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature must be 0 or more and top_p in (0, 1]; they are {temperature} and {top_p}")
    stops = eos_token_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (stops[0] if stops else 0)
    sampling = temperature > 0
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=sampling,
        temperature=temperature if sampling else 1.0,
        top_p=top_p if sampling else 1.0,
        top_k=0 if sampling else 50,  # 0: no cut; 50 is transformers' neutral value, anything else warns when not sampling
        num_beams=1,
        use_cache=True,
        eos_token_id=stops or None,
        pad_token_id=pad,
    )
    return {"generation_config": config}


def _seed(seed: int | None) -> None:
    """Call inside randomness_kept. Without a seed a new one is drawn: the kept state would give the same samples every time."""
    if seed is None:
        torch.seed()
    else:
        torch.manual_seed(seed)


def _whole_answer(model: Any, prompt: torch.Tensor, options: dict[str, Any], *, retry: bool = True) -> torch.Tensor:
    """Prompt and answer (1, T). Where memory runs out, once more: the prompt in pieces, and on a card the cache in CPU memory."""
    try:
        return model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)
    except Exception as error:
        if not retry or not out_of_memory(error):
            raise
        forget(error)
    smaller = copy.deepcopy(options["generation_config"])
    smaller.prefill_chunk_size = PIECE
    if prompt.device.type == "cuda":
        smaller.cache_implementation = "offloaded"
    return model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options | {"generation_config": smaller})


def generate(
    model: nn.Module,
    tokenizer: Any,
    messages_list: Sequence[Prompt],
    *,
    max_new_tokens: int = 96,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    retry: bool = True,
    progress: Progress | None = None,
) -> list[Answer]:
    """The model's answer to each conversation, written with the tokenizer's chat template, or how it goes on with each text;
    greedy by default.

    Args:
        seed: of the sampling, set anew for each conversation, so that an answer does not depend on the others; None draws one.
        retry: where memory runs out, with the prompt in pieces; not where other processes run the same passes with this one.
        progress: called with (conversations done, in all).

    Raises:
        ValueError: the tokenizer has no chat template, or a setting is out of range.
    """
    options = _options(model, tokenizer, max_new_tokens, temperature, top_p)
    stops, device = set(eos_token_ids(model, tokenizer)), device_of(model)
    answers: list[Answer] = []
    with evaluating(model), randomness_kept(), torch.no_grad():
        for messages in messages_list:
            prompt = torch.tensor([_prompt(tokenizer, messages)], device=device)
            _seed(seed)
            begin = time.perf_counter()
            output = _whole_answer(model, prompt, options, retry=retry)
            new = output[0, prompt.shape[1] :].tolist()  # waits for the device
            seconds = time.perf_counter() - begin
            text = tokenizer.decode(new, skip_special_tokens=True)
            answers.append(Answer(text, len(new), bool(new) and new[-1] in stops, seconds))
            if progress:
                progress(len(answers), len(messages_list))
    return answers


def stream(
    model: nn.Module,
    tokenizer: Any,
    messages: Prompt,
    *,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> Iterator[str]:
    """The answer in pieces of text as they come. Closing the iterator (or leaving the loop) stops the generation.

    The model runs in a thread of its own; what goes wrong there is raised here.

    Raises:
        ValueError: as `generate`, at the first piece.
    """
    from transformers import StoppingCriteriaList, TextIteratorStreamer
    from transformers.generation import StoppingCriteria

    class Closed(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            return torch.full((input_ids.shape[0],), closed.is_set(), device=input_ids.device, dtype=torch.bool)

    options = _options(model, tokenizer, max_new_tokens, temperature, top_p)
    prompt = torch.tensor([_prompt(tokenizer, messages)], device=device_of(model))
    pieces = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    closed = Event()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            model.generate(  # type: ignore[operator]
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                streamer=pieces,
                stopping_criteria=StoppingCriteriaList([Closed()]),
                **options,
            )
        except BaseException as error:
            failures.append(error)
            pieces.on_finalized_text("", stream_end=True)  # or the reader would wait for ever

    with evaluating(model), randomness_kept():
        _seed(seed)
        thread = Thread(target=work, daemon=True)
        thread.start()
        try:
            yield from (piece for piece in pieces if piece)
        finally:
            closed.set()
            thread.join()
        if failures:
            raise failures[0]
