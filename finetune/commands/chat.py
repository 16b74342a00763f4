"""`finetune chat`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune.commands.common import Dtype, dtype_name, open_model
from finetune.errors import UserError

if TYPE_CHECKING:
    from finetune.models.load import LoadedModel


def chat(
    models: Annotated[list[str], typer.Argument(metavar="MODEL [MODEL]", help="One model, or two that answer the same.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.7,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Sample among the likeliest tokens of this total probability.")
    ] = 0.9,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    dtype: Dtype = "auto",
) -> None:
    """Talk to a model, streaming, with history. /new begins again, /quit leaves."""
    from finetune.libraries import quiet_libraries
    from finetune.screen import Screen

    wanted, screen = dtype_name(dtype), Screen()
    if len(models) > 2:
        raise UserError("chat takes one model, or two", got=str(len(models)))
    with quiet_libraries(screen):
        talks: list[tuple[LoadedModel, list[dict[str, str]]]] = [(open_model(name, wanted, screen), []) for name in models]

        def begin_again() -> None:
            for loaded, history in talks:
                told = system or (loaded.recipe.data.system if loaded.recipe is not None else None)
                history[:] = [{"role": "system", "content": told}] if told else []

        begin_again()
        for loaded, _ in talks:
            if not loaded.tokenizer.chat_template:
                screen.say(f"{loaded.what} was trained on plain text: it goes on with what you type, and remembers nothing")
        screen.say("/new begins again, /quit leaves")
        sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
        while True:
            try:
                line = input("\n> ").strip()
            except (EOFError, KeyboardInterrupt):
                return
            if line in ("/quit", "/exit"):
                return
            if line == "/new":
                begin_again()
            elif line:
                for loaded, history in talks:
                    _answer(loaded, history, line, sampling, named=len(talks) > 1)


def _answer(loaded: LoadedModel, history: list[dict[str, str]], line: str, sampling: dict[str, Any], *, named: bool) -> None:
    from eval.generation import stream

    history.append({"role": "user", "content": line})
    if named:
        print(f"[{loaded.what}] ", end="", flush=True)
    answer = ""
    prompt = history if loaded.tokenizer.chat_template else line  # a model of plain text goes on with the line
    pieces: Any = stream(loaded.model, loaded.tokenizer, prompt, **sampling)
    try:
        for piece in pieces:
            answer += piece
            print(piece, end="", flush=True)
    except KeyboardInterrupt:  # enough of this answer
        pieces.close()
    print(flush=True)
    history.append({"role": "assistant", "content": answer})
