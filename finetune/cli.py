"""The commands. A few lines each; everything heavy is imported inside them, so that --help is instant."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune.errors import Mistake, Stop

if TYPE_CHECKING:
    from finetune.recipe import Recipe

app = typer.Typer(
    help="Fine-tune real models on one 12 GB card. Begin with: finetune run recipes/quickstart.yaml",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped one.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Override keys, such as train.lr=1e-4.")
]
Force = Annotated[bool, typer.Option("--force", help="Go on where the preflight or the plan refuses; the reason is recorded.")]
Processes = Annotated[
    int, typer.Option("--processes", metavar="N", min=1, help="Train with N processes of this machine, one GPU each.")
]
Dtype = Annotated[str, typer.Option(help="auto, bf16, fp16 or fp32.")]


@app.command()
def run(
    recipe: RecipeName,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    force: Force = False,
    processes: Processes = 1,
) -> None:
    """Execute a recipe: check, preflight, plan, load, measure, train, measure, merge, export, report."""
    path, resolved = _checked(recipe, overrides)
    if processes > 1:
        _spawned(processes, ["run", recipe, *(overrides or []), *["--resume"] * resume, *["--force"] * force])
    from finetune.run import run as story

    story(resolved, path.stem, resume=resume, force=force)
    _leave()


@app.command()
def resume(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")], force: Force = False, processes: Processes = 1
) -> None:
    """Go on with a run that was stopped, by its own resolved recipe."""
    from finetune.files import read_run
    from finetune.recipe import read_recipe

    name = read_run(run)["name"]
    resolved = read_recipe(run / "recipe.yaml", [f"run.dir={run}"])
    if processes > 1:
        _spawned(processes, ["resume", str(run), *["--force"] * force])
    from finetune.run import run as story

    story(resolved, name, resume=True, force=force)
    _leave()


@app.command()
def check(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Show all mistakes in a recipe's keys, then in the files and packages that it names, each with file:line."""
    path, _ = _checked(recipe, overrides)
    typer.echo(f"{path}: good")


@app.command()
def plan(
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped one.")] = None,
    overrides: Overrides = None,
    gpu: Annotated[str | None, typer.Option("--gpu", metavar="NAME", help="Such as rtx-4070; else the device here.")] = None,
    budget: Annotated[
        str | None, typer.Option("--fit", metavar="MEMORY", help="Change the recipe until it fits, such as 12GB.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON, and nothing else.")] = False,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="With --fit: write the changed recipe there.")] = None,
    table: Annotated[bool, typer.Option("--table", help="All shipped recipes (or RECIPE) with 8, 12, 16 and 24 GB.")] = False,
) -> None:
    """Say what a recipe will need, before anything is loaded: memory by phase and term, time, energy. Exit 3: it does not fit."""
    from finetune.commands import plan_command

    checked = _checked(recipe, overrides) if recipe is not None else None
    plan_command(checked, overrides or [], gpu=gpu, budget=budget, as_json=as_json, out=out, table=table)


@app.command()
def recipes() -> None:
    """List the recipes that ship."""
    from finetune.recipe import read_recipe, shipped_recipes

    for path in shipped_recipes():
        typer.echo(f"{path.stem:<28} {read_recipe(path).about}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes: every key with its type, default, unit and effect."""
    import json

    from finetune.recipe import Recipe

    typer.echo(json.dumps(Recipe.model_json_schema(), indent=1))


@app.command()
def show(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="The whole record.")] = False,
) -> None:
    """Show what a run has made: its state, losses before and after, speed, memory."""
    import json

    from finetune.files import read_run

    record = read_run(run)
    if as_json:
        typer.echo(json.dumps(record, indent=1, ensure_ascii=False))
        return
    from finetune.show import show_run

    show_run(record, run)


@app.command()
def merge(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A run, a checkpoint or an adapter folder.")],
    out: Annotated[Path, typer.Option("--out", help="The folder to make.")],
    dtype: Dtype = "auto",
) -> None:
    """Merge an adapter into a model folder that plain transformers loads; measured before it is kept."""
    from finetune.commands import merge_command

    merge_command(model, out, _dtype(dtype))


@app.command()
def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A run, a model folder, a hub id.")],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="bitnet, bitnet-online, gguf-tq2_0, gguf-tq1_0 or gguf-f16.")],
    out: Annotated[Path, typer.Option("--out", help="The folder or the .gguf file to make.")],
) -> None:
    """Write a model for another program; kept only if what runs there is the same model."""
    from finetune.commands import export_command

    export_command(model, to, out)


@app.command("eval")
def evaluate(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Runs, adapters, checkpoints, model folders, hub ids.")],
    file: Annotated[
        Path | None, typer.Option(help="Perplexity on a file: .txt as text, .json/.jsonl by the answers in it.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="lm-evaluation-harness tasks, a,b,c.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with task files of your own.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each task, or rows of the file.")] = None,
    dtype: Dtype = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results there.")] = None,
) -> None:
    """Score models: perplexity on a file, harness tasks; a run without either by its own held-out rows."""
    from finetune.commands import eval_command

    names = [task.strip() for task in tasks.split(",") if task.strip()] if tasks else []
    eval_command(models, file=file, tasks=names, include_path=include_path, limit=limit, dtype=_dtype(dtype), json_file=json_file)


@app.command()
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
    from finetune.commands import chat_command

    chat_command(models, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, system=system, dtype=_dtype(dtype))


@app.command()
def bench(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="To measure: quant, qlora, bitnet, plan, device.", show_default=False)
    ] = None,
    overrides: Overrides = None,
    recipe: Annotated[str | None, typer.Option("--recipe", metavar="RECIPE", help="qlora: what to train.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write rows and provenance there.")] = None,
) -> None:
    """Measure this program against others on this machine: the same work in one run, medians of pairs."""
    from finetune.bench import bench_command

    bench_command(name, json_file, recipe=recipe, overrides=overrides)


def _spawned(count: int, arguments: list[str]) -> None:
    """Run this command in `count` processes, and exit as they do."""
    from finetune import processes

    if processes.world() > 1:
        raise Mistake(
            "this process is one of several already",
            where="--processes",
            found=f"{count}, under a launcher that started {processes.world()} (WORLD_SIZE)",
            do="leave --processes out; or start it without the launcher",
        )
    sys.exit(processes.spawn(arguments, count))


def _leave() -> None:
    """A run that went well has no more to say to the other processes."""
    from finetune import processes

    if processes.world() > 1:
        from finetune.train import parallel

        parallel.end()


def _checked(name: str, overrides: list[str] | None) -> tuple[Path, Recipe]:
    """The recipe, once its keys and what it names are found good."""
    from finetune.recipe import find_recipe, locator, read_recipe

    path = find_recipe(name)
    recipe = read_recipe(path, overrides)
    from finetune.check import check_sources

    check_sources(recipe, str(path), locator(path, overrides))
    return path, recipe


def _dtype(name: str) -> str:
    if name not in ("auto", "bf16", "fp16", "fp32"):
        raise Mistake("unknown dtype", where="--dtype", found=name, do="auto, bf16, fp16 or fp32")
    return name


def _mistake_in(error: Exception) -> Mistake | None:
    """The user's mistake that an error of a library means, wherever it came from; None of a fault of ours."""
    from finetune.files import refusal

    kind = type(error).__name__  # their modules are not loaded by --help
    if kind == "BackendError" and isinstance(error, ValueError):  # of quant.backends
        return Mistake("this backend cannot be used", where="QUANT_BACKEND", found=str(error))
    if (mistake := refusal(error)) is not None:
        return mistake
    if kind == "SafetensorError":
        do = "fetch the model again, or take the checkpoint before"
        return Mistake("a file that should be safetensors cannot be read", found=str(error), do=do)
    return None


def main() -> None:
    """Run a command; exit 0 done, 2 the user's mistake, 3 a gate stopped it, 130 Ctrl-C, 1 a fault of ours (with traceback)."""
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
