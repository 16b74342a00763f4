"""What `finetune plan`, `merge`, `export`, `eval` and `chat` do, once their arguments are read."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from finetune.errors import Mistake
from finetune.files import write_json
from finetune.screen import Screen
from finetune.units import number

if TYPE_CHECKING:
    from finetune.recipe import Recipe
    from finetune.use import Opened

# What a merge is measured on where there is no held-out data: any text will do, since both sides read the same.
PASSAGE = (
    "A river is born where water gathers faster than the ground can drink it. High in the hills a spring fills a hollow, spills "
    "over its edge, and finds the steepest way down. Other streams join it; each brings sand, leaves and the colour of its own "
    "soil. In the plain the river slows, lays down what it carried, and begins to wander in wide bends. Farmers have always "
    "lived beside it, because the mud is rich and the water is near, and they have always feared it, because once in a lifetime "
    "it remembers its old bed and takes the fields back. Where it meets the sea the two waters mix twice a day, and the birds "
    "that feed on the mud know the hour of the tide better than any clock."
)


def _libraries(screen: Screen) -> None:
    with screen.phase("libraries"):
        from finetune.run import quiet_libraries

        quiet_libraries()
        import peft  # noqa: F401


def open_one(name: str, dtype: str, screen: Screen, *, merged: bool = True) -> Opened:
    from finetune.use import open_model

    with screen.phase(f"model {Path(name).name}") as progress:
        opened = open_model(name, dtype=dtype, merged=merged, progress=progress)
    if opened.note:
        screen.warn(opened.note)
    return opened


def _rows_of_run(opened: Opened) -> list[tuple[list[int], list[int]]]:
    """The held-out rows of the run that `opened` belongs to.

    Raises:
        Mistake: its data is gone, or is not what it was.
    """
    from finetune import model as models
    from finetune.data.preflight import Limits
    from finetune.files import read_run
    from finetune.material import gather
    from finetune.place import same_data

    assert opened.recipe is not None
    assert opened.run is not None
    recipe = opened.recipe
    stops = models.stop_ids(models.source_of(recipe.model), opened.tokenizer)
    material = gather(recipe, opened.tokenizer, stops, limits=Limits())
    same_data(read_run(opened.run), material.digest, opened.run)
    return material.held_out()


def plan_command(
    checked: tuple[Path, Recipe] | None,
    overrides: list[str],
    *,
    gpu: str | None,
    budget: str | None,
    as_json: bool,
    out: Path | None,
    table: bool,
) -> None:
    """Plan a recipe, or with `table` many of them. With `as_json` nothing but JSON goes to the standard output.

    Raises:
        GateStop: it does not fit, which has been shown. Mistake: the recipe, the device or the budget cannot be read.
    """
    from finetune.plan.command import all_recipes, plan_recipe, plan_table

    if table and (budget is not None or out is not None):
        given = "--fit" if budget is not None else "--out"
        raise Mistake("the table has its own budgets, and writes no recipe", where="--table", found=given, do="leave it out")
    if not table and checked is None:
        raise Mistake("which recipe?", where="RECIPE", found="nothing", do="finetune recipes lists what ships; or --table")
    console = Console(highlight=False, soft_wrap=True, stderr=True) if as_json else None
    screen = Screen(console)
    from finetune.run import quiet_libraries

    quiet_libraries()
    if table:
        plan_table([checked] if checked is not None else all_recipes(), gpu=gpu, as_json=as_json, screen=screen)
    elif checked is not None:
        path, recipe = checked
        plan_recipe(recipe, path, overrides, gpu=gpu, budget=budget, as_json=as_json, out=out, screen=screen)


def merge_command(name: str, out: Path, dtype: str) -> None:
    """Merge an adapter (of a run, a checkpoint or a folder) into `out`, gated; on a ternary base it becomes ternary again.

    Raises:
        Mistake: nothing to merge, or `out` is in the way. GateStop: the merged model is another.
    """
    from finetune import merge as merging
    from quant import PackedBitLinear

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise Mistake("the output folder is not empty", where="--out", found=str(out), do="give a new folder, or remove it")
    screen = Screen()
    _libraries(screen)
    # The trained model is opened as it was trained, and only what is written gets the dtype.
    opened = open_one(name, "auto", screen, merged=False)
    if not hasattr(opened.model, "merge_and_unload"):
        raise Mistake(
            "there is no adapter to merge",
            where="MODEL",
            found=opened.what,
            do="give a run with an adapter, or an adapter folder",
        )
    ternary = any(isinstance(module, PackedBitLinear) for module in opened.model.modules())
    if ternary and dtype != "auto":
        found = f"{dtype}, and the base of {opened.what} is ternary"
        raise Mistake("what is merged here stays ternary", where="--dtype", found=found, do="leave it out")
    from eval.perplexity import text_rows

    rows, limit, batch_tokens = None, 0.02, 2048
    if opened.recipe is not None:
        limit, batch_tokens = opened.recipe.eval.merge_limit, opened.recipe.eval.batch_tokens
        try:
            rows = _rows_of_run(opened)[: max(1, opened.recipe.eval.merge_rows)]
        except Mistake as mistake:
            screen.warn(
                f"the run's held-out rows cannot be had ({mistake.what}); the merge is measured on a passage of prose instead"
            )
    rows = rows or text_rows(opened.tokenizer, PASSAGE, length=1024)
    device = next(opened.model.parameters()).device
    if ternary:
        with screen.phase("merge") as progress:
            _, figures = merging.write_ternary(
                opened.model,
                opened.tokenizer,
                out,
                rows=rows,
                batch_tokens=batch_tokens,
                device=device,
                progress=progress,
            )
        screen.say(f"{out}: {merging.ternary_in_words(figures)}")
        if abs(figures["merged_loss"] - figures["adapter_loss"]) > limit:
            screen.warn(
                "the merged model is not the trained one: three values a weight do not hold what the adapter learned. "
                f"{opened.what} on its base is the trained model"
            )
        screen.say(f"next     finetune chat {out}")
        return
    with screen.phase("merge") as progress:
        gate = merging.write_gated(
            opened.model,
            opened.tokenizer,
            out,
            dtype=_merged_dtype(opened, dtype),
            rows=rows,
            limit=limit,
            batch_tokens=batch_tokens,
            device=device,
            progress=progress,
        )
    screen.say(
        f"merged into {out}: loss {gate['merged_loss']:.4f} against {gate['adapter_loss']:.4f} of the trained model "
        f"on {gate['rows']} rows, both in {gate['arithmetic']}"
    )
    screen.say(f"next     finetune chat {out}")


def export_command(name: str, to: str, out: Path) -> None:
    """Write a model for another program, compared with it by the gate.

    Raises:
        Mistake: nothing to export, what the format cannot express, or `out` is in the way. GateStop: it is another model there.
    """
    from finetune.export import check, export, in_words, known

    known(to)
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise Mistake("there is something already", where="--out", found=str(out), do="give a new name, or remove it")
    screen = Screen()
    _libraries(screen)
    from eval.perplexity import text_rows

    online = to == "bitnet-online"
    opened = open_one(name, "auto", screen, merged=not online)  # a run's merged/ is packed, its checkpoint has master weights
    if hasattr(opened.model, "merge_and_unload"):
        do = f"finetune merge {name} --out DIR, then export that" + (" --to bitnet: it has no master weights" if online else "")
        raise Mistake("an adapter cannot be exported", where="MODEL", found=opened.what, do=do)
    check(opened.model, to, tokenizer=opened.tokenizer)
    rows = None
    if opened.recipe is not None:
        try:
            rows = _rows_of_run(opened)
        except Mistake as mistake:
            screen.warn(f"the run's held-out rows cannot be had ({mistake.what}); the gate reads a passage of prose instead")
    device = next(opened.model.parameters()).device
    with screen.phase(f"export {to}") as progress:
        figures = export(
            opened.model,
            opened.tokenizer,
            out,
            format=to,
            rows=rows or text_rows(opened.tokenizer, PASSAGE, length=1024),
            device=device,
            progress=progress,
        )
    screen.say(in_words(figures))


def _merged_dtype(opened: Opened, dtype: str) -> Any:
    """What the merged weights are stored in: as asked, or as the base is."""
    from finetune.models.precision import DTYPES

    return DTYPES.get(dtype, opened.model.get_base_model().dtype)


def eval_command(
    names: list[str],
    *,
    file: Path | None,
    tasks: list[str],
    include_path: Path | None,
    limit: int | None,
    dtype: str,
    json_file: Path | None,
) -> None:
    """Score each model in turn; a table on the screen, JSON where asked.

    Raises:
        Mistake: nothing to score with, or a model, file or task that is not there.
    """
    if file is not None and not file.is_file():
        raise Mistake("there is no such file", where="--file", found=str(file))
    screen = Screen()
    _libraries(screen)
    from finetune import provenance
    from finetune.run import score_tasks

    results: dict[str, Any] = {}
    for name in names:
        opened = open_one(name, dtype, screen)
        weights = next(opened.model.parameters())
        result: dict[str, Any] = {
            "provenance": provenance.collect(weights.device, 0, " ".join(sys.argv)) | {"dtype": str(opened.model.dtype)}
        }
        if file is not None or not tasks:
            if file is None and opened.recipe is None:
                raise Mistake(
                    "there is nothing to score this model on",
                    where="MODEL",
                    found=name,
                    do="add --file FILE or --tasks a,b",
                )
            result["loss"] = _file_loss(opened, file, limit, screen)
        if tasks:
            result["tasks"] = score_tasks(
                opened.model,
                opened.tokenizer,
                tasks,
                str(include_path) if include_path else None,
                limit,
                screen,
                "tasks",
            )
        results[name] = result
        del opened
    _print_scores(results, screen)
    if json_file is not None:
        write_json(json_file, results)
        screen.say(f"written to {json_file}")


def _file_loss(opened: Opened, file: Path | None, limit: int | None, screen: Screen) -> dict[str, Any]:
    from eval.generation import stop_ids
    from eval.perplexity import evaluate_loss, text_rows
    from finetune.data.rows import load_rows
    from finetune.data.samples import Encoder

    rows: Any
    if file is None:
        rows, measured_on = _rows_of_run(opened), "the run's held-out rows"
    elif file.suffix == ".txt":
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise Mistake("the file is not UTF-8", where=str(file), found=str(error)) from None
        rows, measured_on = text_rows(opened.tokenizer, text, length=1024), f"{file} in windows of 1024 tokens"
    else:
        chats = bool(opened.tokenizer.chat_template)
        loaded = load_rows(name=None, path=str(file), format_="auto" if chats else "text", skip_bad=not chats)
        if loaded.skipped:
            raise Mistake(
                "this model goes on with text and has no chat template, and these rows are no text",
                where=str(file),
                found=f"{len(loaded.skipped)} of {len(loaded.rows) + len(loaded.skipped)} rows, the first {loaded.skipped[0]}",
                do='give a .txt, or rows with "text"',
            )
        encoder = Encoder(opened.tokenizer, max_length=4096, stop_ids=frozenset(stop_ids(opened.model, opened.tokenizer)))
        rows = [(list(sample.input_ids), list(sample.labels)) for row in loaded.rows for sample in encoder.encode(row)]
        measured_on = f"{file}, {'texts' if loaded.format == 'text' else f'answers only ({loaded.format})'}"
    with screen.phase("loss") as progress:
        try:
            result = evaluate_loss(opened.model, rows[:limit], progress=lambda d, t: progress(d, t, "rows"))
        except ValueError as error:
            raise Mistake(str(error), where=measured_on) from None
    return result.as_dict() | {"on": measured_on}


def _print_scores(results: dict[str, Any], screen: Screen) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("model", "on", "metric", "value", "±"):
        table.add_column(column, justify="right" if column in ("value", "±") else "left")
    for name, result in results.items():
        if "loss" in result:
            loss = result["loss"]
            table.add_row(name, loss["on"], "loss (nats)", number(loss["loss"]), number(loss["stderr"]))
            table.add_row(name, loss["on"], "perplexity", number(loss["perplexity"], 3), "")
        for task, scores in result.get("tasks", {}).items():
            for metric, value in scores.items():
                if isinstance(value, float) and metric != "version" and not metric.endswith("_stderr"):
                    error = scores.get(f"{metric}_stderr")
                    table.add_row(
                        name,
                        f"{task} ({scores['n']})",
                        metric,
                        f"{value:.4f}",
                        f"{error:.4f}" if isinstance(error, float) else "",
                    )
    screen.console.print(table)


def chat_command(
    names: list[str], *, max_new_tokens: int, temperature: float, top_p: float, system: str | None, dtype: str
) -> None:
    """Read a line, stream the answer, remember both. Ends with /quit or the end of the input."""
    from eval.generation import stream

    if len(names) > 2:
        raise Mistake("chat takes one model, or two", found=str(len(names)))
    screen = Screen()
    _libraries(screen)
    talks: list[tuple[Opened, list[dict[str, str]]]] = [(open_one(name, dtype, screen), []) for name in names]

    def begin_again() -> None:
        for opened, history in talks:
            told = system or (opened.recipe.data.system if opened.recipe is not None else None)
            history[:] = [{"role": "system", "content": told}] if told else []

    begin_again()
    for opened, _ in talks:
        if not opened.tokenizer.chat_template:
            screen.say(f"{opened.what} was trained on plain text: it goes on with what you type, and remembers nothing")
    screen.say("/new begins again, /quit leaves")
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
            for opened, history in talks:
                _answer(opened, history, line, stream, max_new_tokens, temperature, top_p, named=len(talks) > 1)


def _answer(
    opened: Opened,
    history: list[dict[str, str]],
    line: str,
    stream: Any,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    *,
    named: bool,
) -> None:
    history.append({"role": "user", "content": line})
    if named:
        print(f"[{opened.what}] ", end="", flush=True)
    said = ""
    prompt = history if opened.tokenizer.chat_template else line  # a model of plain text goes on with the line
    pieces = stream(opened.model, opened.tokenizer, prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
    try:
        for piece in pieces:
            said += piece
            print(piece, end="", flush=True)
    except KeyboardInterrupt:  # enough of this answer
        pieces.close()
    print(flush=True)
    history.append({"role": "assistant", "content": said})
