"""Answers: what the model would say token by token, with one BOS, one end, and nothing touched."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from eval.generation import eos_token_ids, generate, stream

TALK = [{"role": "user", "content": "Say something."}]
TALKS = [TALK, [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello, you there!"}]]


def greedy(model: Any, tokenizer: Any, messages: list[dict[str, str]], most: int) -> list[int]:
    """The most likely tokens, by whole forward passes without a cache."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    new: list[int] = []
    while len(new) < most and (not new or new[-1] != tokenizer.eos_token_id):
        with torch.no_grad():
            new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
    return new


def loves(model: Any, token: int) -> Any:
    """The model, changed so that it says `token` and nothing else."""
    with torch.no_grad():
        model.model.norm.weight.zero_()
        model.lm_head = torch.nn.Linear(32, 260)
        model.lm_head.weight.zero_()
        model.lm_head.bias.zero_()[token] = 1
    return model


def test_stop_ids(model: Any, tokenizer: Any) -> None:
    assert eos_token_ids(model, tokenizer) == [3]
    model.generation_config.eos_token_id = [7, 3, 9]
    assert eos_token_ids(model, tokenizer) == [3, 7, 9]
    model.generation_config.eos_token_id = 5
    assert eos_token_ids(model, tokenizer) == [3, 5]
    model.generation_config.eos_token_id = None
    assert eos_token_ids(model, tokenizer) == [3]


def test_greedy_answers(model: Any, tokenizer: Any) -> None:
    calls: list[tuple[int, int]] = []
    answers = generate(model, tokenizer, TALKS, max_new_tokens=12, progress=lambda *now: calls.append(now))
    for answer, messages in zip(answers, TALKS, strict=True):
        wanted = greedy(model, tokenizer, messages, 12)
        assert answer.text == tokenizer.decode(wanted, skip_special_tokens=True)
        assert answer.tokens == len(wanted)
        assert answer.ended == (wanted[-1] == 3)
        assert answer.seconds > 0
    assert answers[0].text != answers[1].text
    assert calls == [(1, 2), (2, 2)]
    assert answers[1].text == generate(model, tokenizer, TALKS[1:], max_new_tokens=12)[0].text


@pytest.mark.parametrize("stop", [3, 9])
def test_ended(new_model: Any, tokenizer: Any, stop: int) -> None:
    """By the tokenizer's end token and by one that only the model's generation config knows."""
    model = loves(new_model(), stop)
    model.generation_config.eos_token_id = [9]
    (answer,) = generate(model, tokenizer, [TALK], max_new_tokens=5)
    assert (answer.tokens, answer.ended) == (1, True)
    (answer,) = generate(loves(model, 100), tokenizer, [TALK], max_new_tokens=5)
    assert (answer.tokens, answer.ended) == (5, False)


def test_one_bos(model: Any, new_tokenizer: Any) -> None:
    seen: list[list[int]] = []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["input_ids"][0].tolist()), with_kwargs=True)
    chatml = new_tokenizer().chat_template
    for bos, template, wanted in (
        (False, chatml, 0),
        (True, chatml, 1),
        (True, "{{ bos_token }}" + chatml, 1),
        (False, "{{ bos_token }}" + chatml, 1),
    ):
        seen.clear()
        generate(model, new_tokenizer(bos=bos, template=template), [TALK], max_new_tokens=1)
        assert seen[0].count(1) == wanted
        assert seen[0][0] == (1 if wanted else 2)
    with pytest.raises(ValueError, match="no chat template"):
        generate(model, new_tokenizer(template=None), [TALK])


def test_sampling(model: Any, tokenizer: Any) -> None:
    def say(**settings: Any) -> list[str]:
        return [answer.text for answer in generate(model, tokenizer, TALKS, max_new_tokens=12, **settings)]

    warm = say(temperature=1.0, seed=5)
    assert warm == say(temperature=1.0, seed=5)
    assert warm != say(temperature=1.0, seed=6)
    assert warm != say()
    assert warm[1] == generate(model, tokenizer, TALKS[1:], max_new_tokens=12, temperature=1.0, seed=5)[0].text
    assert len({say(temperature=1.0)[0] for _ in range(4)}) > 1  # without a seed, not the same again
    assert say(temperature=1.0, top_p=1e-6, seed=5) == say()
    for bad in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"max_new_tokens": 0}):
        with pytest.raises(ValueError, match="must be"):
            generate(model, tokenizer, TALKS, **bad)


def test_sampling_sees_the_whole_vocabulary(new_model: Any, tokenizer: Any) -> None:
    """All tokens nearly equally likely: transformers' default would cut after the 50 first."""
    model = loves(new_model(), 100)
    with torch.no_grad():
        model.lm_head.bias.copy_(torch.linspace(0, 0.1, 260))
    seen: list[int] = []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(int(kwargs["input_ids"][0, -1])), with_kwargs=True)
    for seed in range(6):
        generate(model, tokenizer, [TALK], max_new_tokens=100, temperature=1.0, seed=seed)
    assert len(set(seen)) > 100


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_is_different_afterwards(model: Any, tokenizer: Any, temperature: float) -> None:
    model.train()
    model.model.layers[0].eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    settings = model.generation_config.to_dict()
    generate(model, tokenizer, TALKS, max_new_tokens=3, temperature=temperature, seed=1)
    list(stream(model, tokenizer, TALK, max_new_tokens=3, temperature=temperature))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert model.generation_config.to_dict() == settings


def test_settings_of_the_model_do_not_warn(model: Any, tokenizer: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """Models from the hub bring sampling settings and a max_length; the answer is greedy and as long as asked all the same."""
    wanted = generate(model, tokenizer, [TALK], max_new_tokens=4)[0].text
    model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9, top_k=20, max_length=8)
    capfd.readouterr()
    assert generate(model, tokenizer, [TALK], max_new_tokens=4)[0].text == wanted
    assert capfd.readouterr().err == ""


def test_stream_says_what_generate_says(model: Any, tokenizer: Any) -> None:
    answer = generate(model, tokenizer, [TALK], max_new_tokens=40)[0].text
    assert "".join(stream(model, tokenizer, TALK, max_new_tokens=40)) == answer


def test_stream_comes_in_pieces(new_model: Any, tokenizer: Any) -> None:
    """A piece ends where a word does: a model that says spaces gives one with each token."""
    model = loves(new_model(), tokenizer(" ")["input_ids"][0])
    pieces = list(stream(model, tokenizer, TALK, max_new_tokens=10))
    assert "".join(pieces) == " " * 10
    assert all(pieces)
    assert len(pieces) > 1


def test_closing_the_stream_stops_the_model(new_model: Any, tokenizer: Any) -> None:
    model = loves(new_model(), tokenizer(" ")["input_ids"][0])  # a piece comes with every space
    steps: list[int] = []
    first = threading.Event()

    def wait(module: Any, args: Any) -> None:
        steps.append(1)
        if len(steps) > 5:
            first.wait(30)

    model.register_forward_pre_hook(wait)
    before = set(threading.enumerate())
    pieces = stream(model, tokenizer, TALK, max_new_tokens=300)
    next(pieces)
    timer = threading.Timer(0.2, first.set)
    timer.start()
    pieces.close()  # type: ignore[attr-defined]
    assert len(steps) < 20
    timer.join()
    assert set(threading.enumerate()) <= before  # the stream's own is gone


def test_a_fault_in_the_thread_reaches_the_caller(model: Any, tokenizer: Any) -> None:
    steps: list[int] = []

    def fail(module: Any, args: Any) -> None:
        steps.append(1)
        if len(steps) == 4:
            raise RuntimeError("out of order")

    model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of order"):
        list(stream(model, tokenizer, TALK, max_new_tokens=20))
