"""Generation: greedy answers, sampling, BOS and end tokens, streaming; the model is left unchanged."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from eval.generation import eos_token_ids, generate, prompt_ids, stream

CHAT = [{"role": "user", "content": "Say something."}]
CHATS = [CHAT, [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello, you there!"}]]


def greedy(model: Any, tokenizer: Any, messages: list[dict[str, str]], max_new_tokens: int) -> list[int]:
    """The most likely tokens, from full forward passes without a KV cache."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    new_ids: list[int] = []
    while len(new_ids) < max_new_tokens and (not new_ids or new_ids[-1] != tokenizer.eos_token_id):
        with torch.no_grad():
            new_ids.append(int(model(torch.tensor([ids + new_ids])).logits[0, -1].argmax()))
    return new_ids


def test_tools_are_in_the_prompt_of_their_conversation_alone(model: Any, tokenizer: Any) -> None:
    tokenizer.chat_template = "{% if tools %}{{ tools[0]['name'] }}{% endif %}" + tokenizer.chat_template
    plain, with_tools = (prompt_ids(tokenizer, CHAT, tools) for tools in (None, [{"name": "look_up"}]))
    assert tokenizer.decode(with_tools) == "look_up" + tokenizer.decode(plain)
    answers = generate(model, tokenizer, [CHAT, CHAT], tools=[[{"name": "look_up"}], None], max_new_tokens=8)
    assert answers[1].text == generate(model, tokenizer, [CHAT], max_new_tokens=8)[0].text != answers[0].text


def always_predicts(model: Any, token: int) -> Any:
    """Changes the model so that it always predicts `token`."""
    with torch.no_grad():
        model.model.norm.weight.zero_()
        model.lm_head = torch.nn.Linear(32, 260)
        model.lm_head.weight.zero_()
        model.lm_head.bias.zero_()[token] = 1
    return model


def test_eos_ids_come_from_tokenizer_and_generation_config(model: Any, tokenizer: Any) -> None:
    assert eos_token_ids(model, tokenizer) == [3]
    model.generation_config.eos_token_id = [7, 3, 9]
    assert eos_token_ids(model, tokenizer) == [3, 7, 9]
    model.generation_config.eos_token_id = 5
    assert eos_token_ids(model, tokenizer) == [3, 5]
    model.generation_config.eos_token_id = None
    assert eos_token_ids(model, tokenizer) == [3]


def test_greedy_answers_match_decoding_without_a_cache(model: Any, tokenizer: Any) -> None:
    calls: list[tuple[int, int]] = []
    answers = generate(model, tokenizer, CHATS, max_new_tokens=12, progress=lambda *now: calls.append(now))
    for answer, messages in zip(answers, CHATS, strict=True):
        expected = greedy(model, tokenizer, messages, 12)
        assert answer.text == tokenizer.decode(expected, skip_special_tokens=True)
        assert answer.tokens == len(expected)
        assert answer.ended == (expected[-1] == 3)
        assert answer.seconds > 0
    assert answers[0].text != answers[1].text
    assert calls == [(1, 2), (2, 2)]
    assert answers[1].text == generate(model, tokenizer, CHATS[1:], max_new_tokens=12)[0].text


@pytest.mark.parametrize("stop", [3, 9])
def test_generation_stops_at_any_eos_token(new_model: Any, tokenizer: Any, stop: int) -> None:
    """The tokenizer's end token (3) and one that is only in the model's generation config (9)."""
    model = always_predicts(new_model(), stop)
    model.generation_config.eos_token_id = [9]
    (answer,) = generate(model, tokenizer, [CHAT], max_new_tokens=5)
    assert (answer.tokens, answer.ended) == (1, True)
    (answer,) = generate(always_predicts(model, 100), tokenizer, [CHAT], max_new_tokens=5)
    assert (answer.tokens, answer.ended) == (5, False)


def test_prompt_has_at_most_one_bos(model: Any, new_tokenizer: Any) -> None:
    prompts: list[list[int]] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: prompts.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    chatml = new_tokenizer().chat_template
    for bos, template, bos_count in (
        (False, chatml, 0),
        (True, chatml, 1),
        (True, "{{ bos_token }}" + chatml, 1),
        (False, "{{ bos_token }}" + chatml, 1),
    ):
        prompts.clear()
        generate(model, new_tokenizer(bos=bos, template=template), [CHAT], max_new_tokens=1)
        assert prompts[0].count(1) == bos_count
        assert prompts[0][0] == (1 if bos_count else 2)
    with pytest.raises(ValueError, match="no chat template"):
        generate(model, new_tokenizer(template=None), [CHAT])


def test_sampling_depends_on_seed_temperature_and_top_p(model: Any, tokenizer: Any) -> None:
    def answer_texts(**settings: Any) -> list[str]:
        return [answer.text for answer in generate(model, tokenizer, CHATS, max_new_tokens=12, **settings)]

    sampled = answer_texts(temperature=1.0, seed=5)
    assert sampled == answer_texts(temperature=1.0, seed=5)
    assert sampled != answer_texts(temperature=1.0, seed=6)
    assert sampled != answer_texts()
    assert sampled[1] == generate(model, tokenizer, CHATS[1:], max_new_tokens=12, temperature=1.0, seed=5)[0].text
    assert len({answer_texts(temperature=1.0)[0] for _ in range(4)}) > 1  # without a seed, answers vary
    assert answer_texts(temperature=1.0, top_p=1e-6, seed=5) == answer_texts()
    for invalid in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"max_new_tokens": 0}):
        with pytest.raises(ValueError, match="must be"):
            generate(model, tokenizer, CHATS, **invalid)


def test_sampling_uses_the_whole_vocabulary(new_model: Any, tokenizer: Any) -> None:
    """All tokens are nearly equally likely; transformers' default top_k would keep only 50."""
    model = always_predicts(new_model(), 100)
    with torch.no_grad():
        model.lm_head.bias.copy_(torch.linspace(0, 0.1, 260))
    tokens: list[int] = []
    model.register_forward_pre_hook(lambda module, args, kwargs: tokens.append(int(kwargs["input_ids"][0, -1])), with_kwargs=True)
    for seed in range(6):
        generate(model, tokenizer, [CHAT], max_new_tokens=100, temperature=1.0, seed=seed)
    assert len(set(tokens)) > 100


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generation_leaves_modes_rng_and_config_unchanged(model: Any, tokenizer: Any, temperature: float) -> None:
    model.train()
    model.model.layers[0].eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    settings = model.generation_config.to_dict()
    generate(model, tokenizer, CHATS, max_new_tokens=3, temperature=temperature, seed=1)
    list(stream(model, tokenizer, CHAT, max_new_tokens=3, temperature=temperature))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert model.generation_config.to_dict() == settings


def test_generation_config_of_the_model_is_overridden_without_warnings(
    model: Any, tokenizer: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """Hub models bring sampling settings and a max_length; the answer is still greedy and of the requested length."""
    expected = generate(model, tokenizer, [CHAT], max_new_tokens=4)[0].text
    model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9, top_k=20, max_length=8)
    capfd.readouterr()
    assert generate(model, tokenizer, [CHAT], max_new_tokens=4)[0].text == expected
    assert capfd.readouterr().err == ""


def test_stream_yields_the_text_of_generate(model: Any, tokenizer: Any) -> None:
    answer = generate(model, tokenizer, [CHAT], max_new_tokens=40)[0].text
    assert "".join(stream(model, tokenizer, CHAT, max_new_tokens=40)) == answer


def test_stream_yields_several_pieces(new_model: Any, tokenizer: Any) -> None:
    """A piece ends at the end of a word; a model that predicts spaces yields one with each token."""
    model = always_predicts(new_model(), tokenizer(" ")["input_ids"][0])
    pieces = list(stream(model, tokenizer, CHAT, max_new_tokens=10))
    assert "".join(pieces) == " " * 10
    assert all(pieces)
    assert len(pieces) > 1


def test_closing_the_stream_stops_generation(new_model: Any, tokenizer: Any) -> None:
    model = always_predicts(new_model(), tokenizer(" ")["input_ids"][0])  # every space yields a piece
    steps: list[int] = []
    resume = threading.Event()

    def block_after_five_steps(module: Any, args: Any) -> None:
        steps.append(1)
        if len(steps) > 5:
            resume.wait(30)

    model.register_forward_pre_hook(block_after_five_steps)
    threads_before = set(threading.enumerate())
    pieces = stream(model, tokenizer, CHAT, max_new_tokens=300)
    next(pieces)
    timer = threading.Timer(0.2, resume.set)
    timer.start()
    pieces.close()  # type: ignore[attr-defined]
    assert len(steps) < 20
    timer.join()
    assert set(threading.enumerate()) <= threads_before  # the stream's thread has ended


def test_error_in_the_generation_thread_reaches_the_caller(model: Any, tokenizer: Any) -> None:
    steps: list[int] = []

    def fail(module: Any, args: Any) -> None:
        steps.append(1)
        if len(steps) == 4:
            raise RuntimeError("out of order")

    model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of order"):
        list(stream(model, tokenizer, CHAT, max_new_tokens=20))
