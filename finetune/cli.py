"""The command line. Commands import heavy libraries only when they run, so that --help is instant."""

from __future__ import annotations

import sys
from collections.abc import Callable

import typer

from finetune import allocator
from finetune.commands.bench import bench
from finetune.commands.chat import chat
from finetune.commands.check import check
from finetune.commands.evaluate import evaluate
from finetune.commands.export import export
from finetune.commands.merge import merge
from finetune.commands.plan import plan
from finetune.commands.recipes import recipes, schema
from finetune.commands.resume import resume
from finetune.commands.run import run
from finetune.commands.show import show
from finetune.errors import Stop, UserError

app = typer.Typer(
    help="Fine-tune real models on one 12 GB card. To start: finetune run recipes/quickstart.yaml",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS: dict[str, Callable[..., None]] = {
    "run": run,
    "resume": resume,
    "check": check,
    "plan": plan,
    "recipes": recipes,
    "schema": schema,
    "show": show,
    "merge": merge,
    "export": export,
    "eval": evaluate,
    "chat": chat,
    "bench": bench,
}
for name, command in COMMANDS.items():
    app.command(name)(command)


def _as_user_error(error: Exception) -> UserError | None:
    """The UserError for a library's error that the user can fix; None if it is a bug."""
    from finetune.files import disk_error

    name = type(error).__name__  # --help must not import their modules
    if name == "BackendError" and isinstance(error, ValueError):  # quant.backends
        return UserError("this backend is not available", where="QUANT_BACKEND", got=str(error))
    if (refused := disk_error(error)) is not None:
        return refused
    if name == "SafetensorError":
        hint = "download the model again, or use the previous checkpoint"
        return UserError("cannot read a safetensors file", got=str(error), hint=hint)
    return None


def main() -> None:
    """Run a command. Exit codes: 0 done, 2 user error, 3 stopped by a gate, 130 Ctrl-C, 1 a bug (with traceback)."""
    try:
        app()
    except Stop as stop:
        print(f"error: {stop}", file=sys.stderr)
        sys.exit(stop.exit_code)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
    except Exception as error:
        if (user_error := _as_user_error(error)) is None:
            raise
        print(f"error: {user_error}", file=sys.stderr)
        sys.exit(user_error.exit_code)


def start() -> None:
    """The entry point: `main`, in a process with the allocator that suits the command."""
    allocator.restart_with_mimalloc()
    main()


if __name__ == "__main__":
    start()
