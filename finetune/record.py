"""run.json as a typed record: state, provenance and results of a run. This module is its only reader and writer.

A part or key is absent until the run has reached it; only keys that were set are written. Unknown keys (a section of a task)
are kept in `Record.model_extra`; the task reads them through its own type.

`version` counts changes of the layout; `UPGRADES` converts older records, and newer ones are refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError

from finetune.errors import UserError
from finetune.files import MARK, plain, write_json
from finetune.recipe.translate import translate_item

VERSION = 2
When = Literal["float", "before", "after"]


class Part(BaseModel):
    """A section of the record. Assignments are validated, and unknown keys are kept."""

    model_config = ConfigDict(extra="allow", validate_assignment=True, populate_by_name=True, protected_namespaces=())


# ------------------------------------------------------------------------------------------------------------- provenance

P = TypeVar("P", bound=Part)


class Resumed(Part):
    """The run was resumed at `time` from the checkpoint named `from` (None: from the start)."""

    time: str
    checkpoint: str | None = Field(None, alias="from")
    processes: int = 1


class DataSource(Part):
    source: str
    sha256: str
    rows: int | None = None


class ModelSource(Part):
    source: str
    parameters: int


class Provenance(Part):
    """Provenance of the results. Times in ISO 8601; `seconds`: of all phases of all processes (of every resume)."""

    command: str
    commit: str | None = None
    versions: dict[str, str]
    python: str
    platform: str
    device: str
    allocator: str | None = None
    seed: int
    started: str
    finished: str | None = None
    seconds: float
    resumed: list[Resumed]
    data: DataSource | None = None
    model: ModelSource | None = None


class Phase(Part):
    """A phase of the run as shown on the screen; `process`: process id."""

    name: str
    seconds: float
    process: int | None = None


# ------------------------------------------------------------------------------------------------------ before it is loaded


class PlannedPhase(Part):
    """Bytes by term at the phase's peak; `host_bytes`: CPU memory in addition."""

    name: str
    peak_bytes: int
    seconds: float | None = None
    terms: dict[str, int]
    host_bytes: int = 0


class Changed(Part):
    """A recipe key's value before and after."""

    old: Any
    new: Any


class FitChange(Part):
    keys: dict[str, Changed]
    why: str


class FitRecord(Part):
    """Changes that `fit: auto` made to the recipe."""

    keys: dict[str, Any]
    changes: list[FitChange]


class PlanRecord(Part):
    device: str
    budget_bytes: int
    phases: list[PlannedPhase]
    peak_bytes: int
    fits: bool
    tokens_per_step: int
    step_seconds: float
    seconds: float
    kwh: float | None = None
    price: float | None = None
    price_per_kwh: float | None = None
    notes: list[str]
    fit: FitRecord | None = None


class Planned(Part):
    """The plan's figures for training, in the terms in which training measures itself."""

    peak_bytes: int
    step_seconds: float
    seconds: float | None = None


class DataRecord(Part):
    """The data that was read. Each task extends this type (finetune/task_data.py)."""

    format: str
    format_reason: str
    heldout_rows: int
    rows_skipped: int
    template: str | None = None


class CheckRecord(Part):
    name: str
    status: Literal["pass", "warn", "fail"]
    detail: str


class Piece(Part):
    text: str
    supervised: bool


class Histogram(Part):
    edges: list[int]
    counts: list[int]


class PreflightRecord(Part):
    """`forced`: the failed checks that --force overrode."""

    checks: list[CheckRecord]
    tokens: int
    supervised_tokens: int
    supervised_share: float
    rows_truncated: int
    length_histogram: Histogram
    examples: list[list[Piece]]
    forced: str | None = None


# ------------------------------------------------------------------------------------------------------------------ model


class SwapRecord(Part):
    """`left`: {module path: why it stays in floats}; `share`: of the parameters."""

    scheme: str
    swapped: int
    left: dict[str, str]
    share: float
    bytes_before: int
    bytes_after: int
    backend: str


class OffloadRecord(Part):
    """Layers that are fetched from `source` (memory or disk, key `from`) while they are computed; sizes in bytes."""

    source: str = Field(alias="from")
    layers: int
    bytes: int
    largest_layer_bytes: int


class ModelRecord(Part):
    """`bytes`: memory of training without activations, by type; `fast`: applied patches, in words."""

    architecture: str
    parameters: int
    trainable: int
    swap: SwapRecord | None = None
    streamed: OffloadRecord | None = None
    adapters: int
    dtype: str
    eos_token_ids: list[int]
    fast: list[str] | None = None
    bytes: dict[str, int] | None = None


# ------------------------------------------------------------------------------------------------------------ measurements


class LossRecord(Part):
    """Loss in nats per supervised token; None for values that are not finite, and for the standard error of a single row."""

    loss: float | None
    stderr: float | None
    perplexity: float | None
    tokens: int
    rows: int


class EvalRecord(Part):
    """`tasks`: {when: {task: {metric: value}}}; `float`: the loss of a pretrained model before it was made ternary."""

    float_model: LossRecord | None = Field(None, alias="float")
    before: LossRecord | None = None
    after: LossRecord | None = None
    difference: float | None = None
    difference_stderr: float | None = None
    tasks: dict[When, dict[str, dict[str, Any]]] | None = None

    @property
    def got_worse(self) -> bool:
        """Whether the held-out loss rose by more than two of the difference's standard errors (0.1 nats if it has none)."""
        return self.difference is not None and self.difference > 2 * (0.05 if (e := self.difference_stderr) is None else e)


class Sample(Part):
    """A question (messages, or the start of a text) and the model's answers; `*_ended`: whether with an end token."""

    prompt: list[dict[str, Any]] | str
    tools: list[dict[str, Any]] | None = None
    reference: str | None = None
    before: str | None = None
    before_ended: bool | None = None
    after: str | None = None
    after_ended: bool | None = None


class Best(Part):
    step: int
    loss: float


class TrainRecord(Part):
    """Result of the training loop. `tokens_per_second`: of the steps since the last resume."""

    steps: int
    seconds: float
    tokens: int
    supervised_tokens: int
    tokens_per_second: float
    saving_seconds: float
    peak_bytes: int
    memory_kind: str
    bad_steps: int | None = None
    split: int | None = None
    best: Best | None = None
    processes: int | None = None
    parallel: str | None = None


class TernaryRecord(Part):
    """The last measurement of ternary codes: shares that flipped and that are zero; `turnover`: flips per weight in the run."""

    flips: float | None = None
    zeros: float | None = None
    turnover: float | None = None
    looks: int
    alarms: list[str]


# ------------------------------------------------------------------------------------------------------------ what it left


class Correct(Part):
    """Relative difference of logits between the export in the other program and a simulation of its arithmetic."""

    error: float
    worst_row: float
    noise: float
    limit: float


class Good(Part):
    """What the export loses against the trained model: nats per token (kl) and per supervised token (losses)."""

    kl: float
    worst_token: float
    limit: float
    arithmetic_kl: float
    same_top: float
    trained_loss: float
    export_loss: float
    trained_perplexity: float
    export_perplexity: float


class ExportGate(Part):
    """The equivalence gate's verdict (finetune/exporters/gate.py)."""

    status: str
    correct: Correct
    good: Good
    rows: int
    tokens: int
    program: str


class ExportRecord(Part):
    """`path`: relative to the run folder."""

    format: str
    path: str
    bytes: int
    parameters: int
    bits_per_weight: float
    gate: ExportGate


class MergeGate(Part):
    adapter_loss: float
    merged_loss: float
    difference: float
    limit: float
    rows: int
    device: str
    arithmetic: str
    status: str


class Reternarized(Part):
    """Losses (nats) of adapters on a ternary base, before and after merging and rounding to ternary."""

    base_loss: float
    adapter_loss: float
    float_loss: float
    merged_loss: float
    flips: float
    rows: int
    gate: ExportGate


class MergeRecord(Part):
    path: str
    gate: MergeGate | None = None
    bytes: int | None = None
    reternarized: Reternarized | None = None


class TwinRecord(Part):
    """`gap`: held-out loss of the ternary model minus that of its float twin."""

    path: str
    lr: float
    seed: int
    loss: float | None = None
    gap: float | None = None
    gap_stderr: float | None = None
    tokens_per_second: float | None = None


class Record(Part):
    """run.json of a run. `next`: commands to type next."""

    version: int = VERSION
    name: str
    kind: str
    about: str = ""
    state: Literal["running", "done", "stopped", "failed"]
    error: str | None = None
    provenance: Provenance
    phases: list[Phase]
    eval: EvalRecord
    samples: list[Sample]
    plan: PlanRecord | None = None
    planned: Planned | None = None
    data: SerializeAsAny[DataRecord] | None = None
    preflight: PreflightRecord | None = None
    model: ModelRecord | None = None
    tracker_id: str | None = None
    train: TrainRecord | None = None
    ternary: TernaryRecord | None = None
    merge: MergeRecord | None = None
    exports: dict[str, ExportRecord] | None = None
    twin: TwinRecord | None = None
    next: list[str] | None = None

    def as_dict(self) -> dict[str, Any]:
        """The keys that were set, by their names in run.json."""
        return self.model_dump(by_alias=True, exclude_unset=True)


# ----------------------------------------------------------------------------------------------------- reading and writing

RENAMED = {"stop_ids": "eos_token_ids"}  # of the part `model`


def _from_1(saved: dict[str, Any]) -> dict[str, Any]:
    """Version 1 → 2: `format` is now `version`, and `stop_ids` is `eos_token_ids`."""
    saved = {key: value for key, value in saved.items() if key != "format"} | {"version": 2}
    if isinstance(saved.get("eval"), dict):
        saved["eval"] = {key: value for key, value in saved["eval"].items() if key != "merged"}
    if isinstance(model := saved.get("model"), dict) and "stop_ids" in model:
        saved["model"] = {RENAMED.get(key, key): value for key, value in model.items()}
    if isinstance(plan := saved.get("plan"), dict) and isinstance(plan.get("fit"), dict):
        saved["plan"] = plan | {"fit": _renamed_fit(plan["fit"])}
    return saved


def _renamed_fit(fit: dict[str, Any]) -> dict[str, Any]:
    """The keys that `fit: auto` changed, as they are called now. What is no such record comes back as it is, to be refused."""
    try:
        changes = []
        for change in fit["changes"]:
            keys: dict[str, dict[str, Any]] = {}
            for key, values in change["keys"].items():
                old, new = (translate_item(key, values[which]) for which in ("old", "new"))
                keys |= {name: {"old": old[name], "new": new[name]} for name in old}
            changes.append(change | {"keys": keys})
        written = {name: value for key, old in fit["keys"].items() for name, value in translate_item(key, old).items()}
        return fit | {"changes": changes, "keys": written}
    except (AttributeError, KeyError, TypeError):
        return fit


UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _from_1}


def read_record(run_dir: Path) -> Record:
    """Read the record of the run folder `run_dir`.

    Raises:
        UserError: not a run folder, or its record is damaged, incomplete, or of a newer version.
    """
    path = run_dir / MARK
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(saved, dict):
            raise ValueError(f"{type(saved).__name__} instead of an object")
        version = saved.get("version", saved.get("format", 1))
        if type(version) is not int or not 1 <= version <= VERSION:
            raise ValueError(f"version {str(version)[:80]}; this program reads versions 1 to {VERSION}")
        while version in UPGRADES:
            saved = UPGRADES[version](saved)
            version = saved["version"]
        record = Record.model_validate(saved)
        if not plain(record.name):
            raise ValueError(f"name: {record.name[:80]!r} is not a plain file name")
    except FileNotFoundError:
        hint = "finetune show runs/NAME"
        raise UserError("not a run folder", where=str(run_dir), got=f"no {MARK} in it", hint=hint) from None
    except (OSError, ValueError, RecursionError) as error:  # invalid JSON or UTF-8 and a ValidationError are ValueErrors
        got = _first_error(error) if isinstance(error, ValidationError) else str(error)
        hint = "restore it from a copy of the folder"
        raise UserError("cannot read the run's record", where=str(path), got=got, hint=hint) from None
    return record


def part_as(part_type: type[P], part: Part, key: str) -> P:
    """Validate a part as the type of the task that wrote it.

    Raises:
        UserError: it does not validate.
    """
    try:
        return part_type.model_validate(part.model_dump(by_alias=True))
    except ValidationError as error:
        hint = "restore it from a copy of the folder"
        raise UserError("cannot read the run's record", where=f"{MARK}, {key}", got=_first_error(error), hint=hint) from None


def _first_error(error: ValidationError) -> str:
    first, *others = error.errors()
    key = ".".join(map(str, first["loc"]))
    text = f"{key} is missing" if first["type"] == "missing" else f"{key}: {str(first['input'])[:80]!r} ({first['msg']})"
    return text + (f", and {len(others)} more" if others else "")


def write_record(run_dir: Path, record: Record) -> None:
    """Replace run.json by `record` atomically."""
    write_json(run_dir / MARK, record.as_dict())
