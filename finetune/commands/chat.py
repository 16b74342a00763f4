"""`finetune chat`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune.commands.common import Dtype, dtype_name, open_model
from finetune.errors import UserError

if TYPE_CHECKING:
    from finetune.models.load import LoadedModel


def chat(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL [MODEL]", help="One model, or two that answer the same questions.")
    ],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Sampling temperature; 0 always takes the most likely token.")
    ] = 0.7,
    top_p: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="Nucleus sampling: sample from the most likely tokens with this total probability."),
    ] = 0.9,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    dtype: Dtype = "auto",
) -> None:
    """Chat with a model, with history. /new starts over, /quit leaves."""
    from finetune.libraries import quiet_libraries
    from finetune.screen import Screen

    model_dtype, screen = dtype_name(dtype), Screen()
    if len(models) > 2:
        raise UserError("chat takes one or two models", got=str(len(models)))
    with quiet_libraries(screen):
        chats: list[tuple[LoadedModel, list[dict[str, str]]]] = [(open_model(name, model_dtype, screen), []) for name in models]

        def start_over() -> None:
            for loaded, history in chats:
                message = system or (loaded.recipe.data.system if loaded.recipe is not None else None)
                history[:] = [{"role": "system", "content": message}] if message else []

        start_over()
        for loaded, _ in chats:
            if not loaded.tokenizer.chat_template:
                screen.say(f"{loaded.what} was trained on plain text: it continues what you type, without history")
        screen.say("/new starts over, /quit leaves")
        sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
        while True:
            try:
                line = input("\n> ").strip()
            except (EOFError, KeyboardInterrupt):
                return
            if line in ("/quit", "/exit"):
                return
            if line == "/new":
                start_over()
            elif line:
                for loaded, history in chats:
                    _answer(loaded, history, line, sampling, named=len(chats) > 1)


def _answer(loaded: LoadedModel, history: list[dict[str, str]], line: str, sampling: dict[str, Any], *, named: bool) -> None:
    from eval.generation import stream

    history.append({"role": "user", "content": line})
    if named:
        print(f"[{loaded.what}] ", end="", flush=True)
    answer = ""
    prompt = history if loaded.tokenizer.chat_template else line  # a model of plain text continues the line
    pieces: Any = stream(loaded.model, loaded.tokenizer, prompt, **sampling)
    try:
        for piece in pieces:
            answer += piece
            print(piece, end="", flush=True)
    except KeyboardInterrupt:  # stops this answer only
        pieces.close()
    except ValueError as error:  # of a conversation that fills the model's positions
        print(f"{error}; /new starts over", flush=True)
        history.pop()
        return
    print(flush=True)
    history.append({"role": "assistant", "content": answer})
