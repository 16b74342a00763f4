"""Generates answers of a chat model, complete ones or as a stream.

Conversations run one at a time: a left-padded batch is wrong for recurrent models, and for
others it changes the rounding, so that an answer would depend on the others in the batch.
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
from eval.positions import positions_of

Message = dict[str, Any]  # role, content, …: as the tokenizer's chat template expects
Prompt = Sequence[Message] | str  # a conversation, or a text to continue
Tools = Sequence[dict[str, Any]] | None  # definitions of the tools that an answer may call
Progress = Callable[[int, int], None]  # (done, total)
PREFILL_CHUNK = 128  # tokens of a prompt that are read at once after memory ran out


@dataclass(frozen=True)
class Answer:
    """One generated answer."""

    text: str  # without special tokens
    tokens: int  # generated, the end token included
    ended: bool  # it stopped by itself, not at max_new_tokens
    seconds: float


def eos_token_ids(model: nn.Module, tokenizer: Any) -> list[int]:
    """Token ids that end an answer: the tokenizer's end token and those of the model's generation config, each once."""
    config = getattr(model, "generation_config", None)
    of_model = config.eos_token_id if config is not None else None
    token_ids = [tokenizer.eos_token_id, *(of_model if isinstance(of_model, (list, tuple)) else [of_model])]
    return list(dict.fromkeys(int(token) for token in token_ids if token is not None))


def prompt_ids(tokenizer: Any, messages: Prompt, tools: Tools = None) -> list[int]:
    """Token ids of the prompt, with exactly one BOS if the tokenizer uses one, whether the template writes it or not."""
    if isinstance(messages, str):
        ids = list(tokenizer(messages, add_special_tokens=False, verbose=False)["input_ids"])
        return [tokenizer.bos_token_id, *ids] if adds_bos(tokenizer) else ids or [tokenizer.eos_token_id]
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the tokenizer has no chat template, which a conversation needs")
    options = {"tools": list(tools)} if tools else {}
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True, **options)
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if adds_bos(tokenizer) and ids[:1] != [tokenizer.bos_token_id]:
        ids = [tokenizer.bos_token_id, *ids]
    return ids


def _options(model: nn.Module, tokenizer: Any, max_new_tokens: int, temperature: float, top_p: float) -> dict[str, Any]:
    """Arguments of `model.generate` besides the prompt: greedy at temperature 0, else sampling with top_p only.

    Penalties in the model's own generation config stay.
    """
    from transformers import GenerationConfig

    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature must be at least 0 and top_p in (0, 1]; got {temperature} and {top_p}")
    eos = eos_token_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (eos[0] if eos else 0)
    sampling = temperature > 0
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=sampling,
        temperature=temperature if sampling else 1.0,
        top_p=top_p if sampling else 1.0,
        top_k=0 if sampling else 50,  # 0: no limit; 50 is transformers' default, other values warn when not sampling
        num_beams=1,
        use_cache=True,
        eos_token_id=eos or None,
        pad_token_id=pad,
    )
    return {"generation_config": config}


def longest_answer(model: Any, prompt: list[int], max_new_tokens: int) -> int:
    """`max_new_tokens`, or as many as the model has positions left after the prompt.

    Raises:
        ValueError: the prompt leaves none.
    """
    positions = positions_of(getattr(model, "config", None))
    if positions is not None and len(prompt) >= positions:
        raise ValueError(f"the prompt has {len(prompt)} tokens, and the model {positions} positions, which leaves no answer")
    return max_new_tokens if positions is None else min(max_new_tokens, positions - len(prompt))


def _seed(seed: int | None) -> None:
    """Seed torch; without a seed draw a new one, since the restored state would repeat samples. Call in randomness_kept."""
    if seed is None:
        torch.seed()
    else:
        torch.manual_seed(seed)


def _complete_answer(model: Any, prompt: torch.Tensor, options: dict[str, Any], *, retry: bool = True) -> torch.Tensor:
    """Prompt and answer (1, T). If memory runs out, retry with the prompt in chunks, on a GPU with the cache in CPU memory."""
    try:
        return model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)
    except Exception as error:
        if not retry or not out_of_memory(error):
            raise
        forget(error)
    smaller = copy.deepcopy(options["generation_config"])
    smaller.prefill_chunk_size = PREFILL_CHUNK
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
    tools: Sequence[Tools] = (),
    retry: bool = True,
    progress: Progress | None = None,
) -> list[Answer]:
    """The model's answer to each conversation, formatted with the chat template, or its continuation of each text.

    Args:
        temperature: 0 (default) is greedy.
        seed: of the sampling, set again for each conversation, so that answers are independent; None draws one.
        tools: of each conversation; none by default.
        retry: if memory runs out, with the prompt in chunks; off if other processes run the same passes.
        progress: called with (conversations done, total).

    Raises:
        ValueError: the tokenizer has no chat template, a prompt fills the model's positions, or a setting is out of range.
    """
    options = _options(model, tokenizer, max_new_tokens, temperature, top_p)
    eos, device = set(eos_token_ids(model, tokenizer)), device_of(model)
    answers: list[Answer] = []
    with evaluating(model), randomness_kept(), torch.no_grad():
        for messages, callable_tools in zip(messages_list, tools or [None] * len(messages_list), strict=True):
            ids = prompt_ids(tokenizer, messages, callable_tools)
            options["generation_config"].max_new_tokens = longest_answer(model, ids, max_new_tokens)
            prompt = torch.tensor([ids], device=device)
            _seed(seed)
            started = time.perf_counter()
            output = _complete_answer(model, prompt, options, retry=retry)
            new = output[0, prompt.shape[1] :].tolist()  # synchronizes with the device
            seconds = time.perf_counter() - started
            text = tokenizer.decode(new, skip_special_tokens=True)
            answers.append(Answer(text, len(new), bool(new) and new[-1] in eos, seconds))
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
    """Yield the answer in pieces of text as they are generated. Closing the iterator (or leaving the loop) stops the generation.

    The model runs in a thread of its own, whose errors are raised here.

    Raises:
        ValueError: as `generate`, at the first piece.
    """
    from transformers import StoppingCriteriaList, TextIteratorStreamer
    from transformers.generation import StoppingCriteria

    class Closed(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            return torch.full((input_ids.shape[0],), closed.is_set(), device=input_ids.device, dtype=torch.bool)

    options = _options(model, tokenizer, max_new_tokens, temperature, top_p)
    ids = prompt_ids(tokenizer, messages)
    options["generation_config"].max_new_tokens = longest_answer(model, ids, max_new_tokens)
    prompt = torch.tensor([ids], device=device_of(model))
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
            pieces.on_finalized_text("", stream_end=True)  # else the reader would wait forever

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
