"""Benchmark tasks with lm-evaluation-harness, on a model in memory.

Scores equal those of the `lm_eval` command line for the same model, dtype, batch size and limit: the harness does the work
(its `HFLM` and `simple_evaluate`, with its seeds); this module only silences it, reports progress, and restores the
model, the tokenizer and the random generators.
"""

from __future__ import annotations

import copy
import difflib
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch import nn

from eval.model_state import evaluating, randomness_kept

Progress = Callable[[int, int], None]  # (done, total)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the harness inside the block: log lines below errors, prints, progress bars (its own and those of `datasets`),
    and its queries of git and pip, which take seconds and print warnings.
    """
    import lm_eval.api.metrics
    import lm_eval.evaluator
    from tqdm import tqdm

    original_init = tqdm.__init__

    def hidden(self: Any, *args: Any, **kwargs: Any) -> None:
        original_init(self, *args, **(kwargs | {"disable": True}))

    def nothing(*_: Any, **__: Any) -> None:
        pass

    loggers = [logging.getLogger(name) for name in ("lm_eval", "transformers", "datasets")]
    levels = [logger.level for logger in loggers]
    with ExitStack() as stack:
        stack.enter_context(patch.object(tqdm, "__init__", hidden))
        stack.enter_context(patch.object(lm_eval.api.metrics, "print", nothing, create=True))
        stack.enter_context(patch.object(lm_eval.evaluator, "get_git_commit_hash", nothing, create=True))
        stack.enter_context(patch.object(lm_eval.evaluator, "add_env_info", nothing, create=True))
        for logger, level in zip(loggers, levels, strict=True):
            stack.callback(logger.setLevel, level)
            logger.setLevel(logging.ERROR)
        yield


class UnknownTask(ValueError):
    """A task that the harness does not have; the message names the nearest ones."""


def _language_model(model: nn.Module, tokenizer: Any, batch_size: int, progress: Progress | None) -> Any:
    """The model as the harness expects it. The class is defined here because its base is imported late."""
    from lm_eval.models.huggingface import HFLM

    class Counted(HFLM):
        """HFLM that reports its progress in requests; in windows of text for rolling log-likelihoods."""

        done = total = 0

        def _expect(self, requests: int) -> None:
            self.total += requests

        def _advance(self, requests: int) -> None:
            self.done = min(self.done + requests, self.total)
            if progress:
                progress(self.done, self.total)

        def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
            logits = super()._model_call(inps, *args, **kwargs)
            self._advance(len(inps))
            return logits

        def _model_generate(self, context: Any, *args: Any, **kwargs: Any) -> Any:
            tokens = super()._model_generate(context, *args, **kwargs)
            self._advance(len(context))
            return tokens

        def loglikelihood(self, requests: list[Any], *args: Any, **kwargs: Any) -> Any:
            self._expect(len(requests))
            answers = super().loglikelihood(requests, *args, **kwargs)
            self._advance(self.total - self.done)  # requests with a shared context run as one row
            return answers

        def loglikelihood_rolling(self, requests: list[Any], *args: Any, **kwargs: Any) -> Any:
            self._expect(sum(-(-len(self.tok_encode(request.args[0])) // self.max_length) for request in requests))
            return super().loglikelihood_rolling(requests, *args, **kwargs)

        def generate_until(self, requests: list[Any], *args: Any, **kwargs: Any) -> Any:
            self._expect(len(requests))
            return super().generate_until(requests, *args, **kwargs)

    # HFLM ties the weights of its model: needless here, and it breaks one whose tied head is wrapped or packed.
    with patch.object(model, "tie_weights", lambda *_, **__: None, create=True):
        # a copy of the tokenizer: HFLM sets its padding
        return Counted(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)


def _plain(result: dict[str, Any], version: Any) -> dict[str, Any]:
    """One task's results. The harness writes `metric,filter`; the filter "none" is removed, others stay in the name."""
    values: dict[str, Any] = {}
    for key, value in result.items():
        metric, comma, name = key.partition(",")
        if comma:
            values[metric if name == "none" else key] = float(value) if isinstance(value, (int, float)) else None
    return values | {"version": version, "n": result.get("sample_len")}


def run_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: list[str],
    *,
    include_path: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    num_fewshot: int | None = None,
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """Scores of the model on harness tasks, equal to those of `lm_eval --model hf`.

    Args:
        tasks: names of tasks, groups or tags.
        include_path: a folder of task files in addition to those of the harness.
        limit: use only the first `limit` documents of each task.
        num_fewshot: examples in the prompt; default: the task's setting.
        progress: called with (requests done, total); the total grows if tasks have several types of requests.

    Returns:
        {task: {metric: value, metric_stderr: value or None, "version": …, "n": documents}}; a filtered metric keeps the
        harness's name `metric,filter`.

    Raises:
        ImportError: lm-eval is not installed.
        UnknownTask: a task that the harness does not have. ValueError: no tasks, or an include_path that is not a folder.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError("tasks need lm-evaluation-harness: pip install 'finetune12g[eval]'") from error

    if not tasks:
        raise ValueError("no tasks given")
    if include_path is not None and not include_path.is_dir():
        raise ValueError(f"include_path is not a folder: {include_path}")
    with _quiet(), randomness_kept(), evaluating(model):
        manager = TaskManager(include_path=include_path)
        for task in tasks:
            if task not in manager.task_index:
                near = difflib.get_close_matches(task, manager.all_tasks, n=3)
                hint = f"; nearest: {', '.join(near)}" if near else ""
                raise UnknownTask(f"lm-evaluation-harness has no task {task!r}{hint}")
        results = simple_evaluate(
            model=_language_model(model, tokenizer, batch_size, progress),
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            batch_size=batch_size,
            limit=limit,
            task_manager=manager,
            log_samples=False,
        )
    assert results is not None  # None only on other ranks, and a model in memory has one rank
    versions = results.get("versions", {})
    return {task: _plain(dict(result), versions.get(task)) for task, result in results["results"].items()}
