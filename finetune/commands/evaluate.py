"""`finetune eval`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune.commands.common import Dtype, dtype_name, open_model, rows_of_run, typed
from finetune.errors import UserError

if TYPE_CHECKING:
    from eval.perplexity import LossResult
    from finetune.models.load import LoadedModel
    from finetune.screen import Screen

WINDOW = 1024  # window length for plain text, in tokens
LONGEST = 4096  # longest row, in tokens


@dataclass
class Scores:
    """Scores of one model. loss: on the data named by `on`, None if only tasks were scored; tasks: {task: {metric: value}}."""

    provenance: dict[str, Any]
    loss: LossResult | None = None
    on: str | None = None
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        result: dict[str, Any] = {"provenance": self.provenance}
        if self.loss is not None:
            result["loss"] = self.loss.as_dict() | {"on": self.on}
        return result | ({"tasks": self.tasks} if self.tasks else {})


def evaluate(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Runs, adapters, checkpoints, model folders, hub ids.")],
    file: Annotated[
        Path | None, typer.Option(help="Perplexity on a file: the text of a .txt, the answers in a .json or .jsonl.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="lm-evaluation-harness tasks, as a,b,c.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with your own task files.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents per task, or rows of the file.")] = None,
    dtype: Dtype = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None,
) -> None:
    """Evaluate models: perplexity on a file, harness tasks; without either, a run's own held-out rows."""
    from finetune.files import write_json
    from finetune.screen import Screen

    names, screen = [task.strip() for task in tasks.split(",") if task.strip()] if tasks else [], Screen()
    scores = evaluate_models(
        models, screen, file=file, tasks=names, include_path=include_path, limit=limit, dtype=dtype, command=typed()
    )
    _print_scores(scores, screen)
    if json_file is not None:
        write_json(json_file, {name: score.as_dict() for name, score in scores.items()})
        screen.say(f"wrote {json_file}")


def evaluate_models(
    names: list[str],
    screen: Screen,
    *,
    file: Path | None = None,
    tasks: list[str],
    include_path: Path | None = None,
    limit: int | None = None,
    dtype: str = "auto",
    command: str = "finetune eval",
) -> dict[str, Scores]:
    """Evaluate models one after another. command: what was typed, for their provenance.

    Raises:
        UserError: nothing to evaluate on, or no such model, file or task.
    """
    from finetune.libraries import quiet_libraries

    dtype = dtype_name(dtype)
    if file is not None and not file.is_file():
        raise UserError("no such file", where="--file", got=str(file))
    results: dict[str, Scores] = {}
    with quiet_libraries(screen):
        from finetune import provenance
        from finetune.stages.evaluate import score_tasks

        for name in names:
            loaded = open_model(name, dtype, screen)
            device = next(loaded.model.parameters()).device
            source = provenance.collect(device, 0, command) | {"dtype": str(loaded.model.dtype)}
            scores = results[name] = Scores(source)
            if file is not None or not tasks:
                if file is None and loaded.recipe is None:
                    raise UserError(
                        "nothing to evaluate this model on",
                        where="MODEL",
                        got=name,
                        hint="add --file FILE or --tasks a,b",
                    )
                scores.loss, scores.on = _loss(loaded, file, limit, screen)
            if tasks:
                folder = str(include_path) if include_path else None
                scores.tasks = score_tasks(loaded.model, loaded.tokenizer, tasks, screen, include_path=folder, limit=limit)
            del loaded
    return results


def _loss(loaded: LoadedModel, file: Path | None, limit: int | None, screen: Screen) -> tuple[LossResult, str]:
    """(the loss on a file or on the held-out rows of the model's run, a description of that data)."""
    from eval.perplexity import evaluate_loss

    rows, on = (rows_of_run(loaded), "the run's held-out rows") if file is None else _rows_of_file(loaded, file)
    with screen.phase("loss") as progress:
        try:
            return evaluate_loss(loaded.model, rows[:limit], progress=lambda d, t: progress(d, t, "rows")), on
        except ValueError as error:
            raise UserError(str(error), where=on) from None


def _rows_of_file(loaded: LoadedModel, file: Path) -> tuple[Any, str]:
    from eval.generation import eos_token_ids
    from eval.perplexity import text_rows
    from eval.positions import positions_of
    from finetune.data.rows import load_rows
    from finetune.data.samples import Encoder

    tokenizer, positions = loaded.tokenizer, positions_of(loaded.model.config)
    if file.suffix == ".txt":
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError("the file is not UTF-8", where=str(file), got=str(error)) from None
        window = min(WINDOW, positions or WINDOW)
        return text_rows(tokenizer, text, length=window), f"{file} in windows of {window} tokens"
    chats = bool(tokenizer.chat_template)
    read = load_rows(name=None, path=str(file), format_="auto" if chats else "text", skip_bad=not chats)
    if read.skipped:
        raise UserError(
            "this model has no chat template, and these rows are not plain text",
            where=str(file),
            got=f"{len(read.skipped)} of {len(read.rows) + len(read.skipped)} rows, the first {read.skipped[0]}",
            hint='give a .txt file, or rows with a "text" key',
        )
    longest = min(LONGEST, positions or LONGEST)
    encoder = Encoder(tokenizer, max_length=longest, eos_token_ids=frozenset(eos_token_ids(loaded.model, tokenizer)))
    samples = [sample for row in read.rows for sample in encoder.encode(row)]
    on = f"{file}, {'texts' if read.format == 'text' else f'answers only ({read.format})'}"
    if cut := sum(bool(sample.cut) for sample in samples):
        on += f", {cut} of {len(samples)} rows cut at {longest} tokens"
    return [(list(sample.input_ids), list(sample.labels)) for sample in samples], on


def _print_scores(results: dict[str, Scores], screen: Screen) -> None:
    from rich.table import Table

    from finetune.units import number

    table = Table(box=None, pad_edge=False)
    for column in ("model", "on", "metric", "value", "±"):
        table.add_column(column, justify="right" if column in ("value", "±") else "left")
    for name, scores in results.items():
        if scores.loss is not None:
            loss = scores.loss.as_dict()
            table.add_row(name, scores.on, "loss (nats)", number(loss["loss"]), number(loss["stderr"]))
            table.add_row(name, scores.on, "perplexity", number(loss["perplexity"], 3), "")
        for task, metrics in scores.tasks.items():
            for metric, value in metrics.items():
                if isinstance(value, float) and metric != "version" and not metric.endswith("_stderr"):
                    error = metrics.get(f"{metric}_stderr")
                    spread = f"{error:.4f}" if isinstance(error, float) else ""
                    table.add_row(name, f"{task} ({metrics['n']})", metric, f"{value:.4f}", spread)
    screen.console.print(table)
