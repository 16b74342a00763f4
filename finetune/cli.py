"""The command line. Its commands import what is heavy when they need it, so that --help is instant."""

from __future__ import annotations

import sys
from collections.abc import Callable

import typer

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
    help="Fine-tune real models on one 12 GB card. Begin with: finetune run recipes/quickstart.yaml",
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


def _mistake_in(error: Exception) -> UserError | None:
    """The user's mistake that an error of a library means, wherever it came from; None of a bug of ours."""
    from finetune.files import disk_error

    kind = type(error).__name__  # their modules are not loaded by --help
    if kind == "BackendError" and isinstance(error, ValueError):  # of quant.backends
        return UserError("this backend cannot be used", where="QUANT_BACKEND", got=str(error))
    if (refused := disk_error(error)) is not None:
        return refused
    if kind == "SafetensorError":
        hint = "fetch the model again, or take the checkpoint before"
        return UserError("a file that should be safetensors cannot be read", got=str(error), hint=hint)
    return None


def main() -> None:
    """Run a command; exit 0 done, 2 the user's mistake, 3 a gate stopped it, 130 Ctrl-C, 1 a bug of ours (with traceback)."""
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
        if (mistake := _mistake_in(error)) is None:
            raise
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(mistake.exit_code)


if __name__ == "__main__":
    main()
