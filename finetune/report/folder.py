"""The files that the report reads: those of a run's folder, and of its twin's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.files import MARK
from finetune.record import Record, TrainRecord, read_record
from finetune.report.metrics import Metrics, TrainedSoFar
from finetune.task_data import ConversationsRecord, TextRecord, data_record
from finetune.units import finite_number

TWIN = "twin"  # the folder in a run of its float twin


@dataclass(frozen=True)
class RunFiles:
    """Files of a run. recipe: the text of recipe.yaml, None if missing. twin: the files of the twin, None if there is none."""

    record: Record
    metrics: Metrics
    recipe: str | None
    twin: RunFiles | None

    @classmethod
    def read(cls, run_dir: Path) -> RunFiles:
        """Read the run in `run_dir`.

        Raises:
            UserError: `run_dir` is not a run folder, or its record or that of its twin cannot be read.
        """
        recipe = run_dir / "recipe.yaml"
        return cls(
            record=read_record(run_dir),
            metrics=Metrics(run_dir / "metrics.jsonl"),
            recipe=recipe.read_text(encoding="utf-8", errors="replace") if recipe.exists() else None,
            twin=cls.read(run_dir / TWIN) if (run_dir / TWIN / MARK).is_file() else None,
        )

    @property
    def data(self) -> ConversationsRecord | TextRecord | None:
        """The data part of the record. Raises UserError if it is damaged."""
        return data_record(self.record)

    @property
    def on_text(self) -> bool:
        """Whether the run trains on plain text rather than conversations."""
        return self.record.kind == "pretrain"

    @property
    def trains_ternary(self) -> bool:
        """Whether the trained weights are ternary."""
        model = self.record.model
        return model is not None and model.swap is not None and model.swap.scheme == "ternary" and not model.adapters

    @property
    def trained(self) -> TrainRecord | TrainedSoFar | None:
        """Totals of training: from the record of a completed run, else from its metrics."""
        return self.record.train or self.metrics.so_far()

    def peak_rate(self) -> float | None:
        """The peak learning rate in recipe.yaml."""
        import yaml

        try:
            settings: Any = yaml.safe_load(self.recipe or "")
        except yaml.YAMLError:
            return None
        train = settings.get("train") if isinstance(settings, dict) else None
        return finite_number(train.get("lr")) if isinstance(train, dict) else None

    def held_out(self) -> list[tuple[float, float, float]]:
        """(step, loss, standard error or NaN) of every evaluation: before, during, after."""
        points = [(entry["step"], entry["eval_loss"], entry.get("eval_stderr")) for entry in self.metrics.evaluations]
        before, after, train = self.record.eval.before, self.record.eval.after, self.record.train
        if before is not None:
            points.insert(0, (0, before.loss, before.stderr))
        if after is not None and train is not None:
            points = [point for point in points if point[0] != train.steps]
            points.append((train.steps, after.loss, after.stderr))
        finite = []
        for step, loss, error in points:
            value, spread = finite_number(loss), finite_number(error)
            if value is not None:
                finite.append((float(step), value, math.nan if spread is None else spread))
        return finite
