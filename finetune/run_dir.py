"""The folder of a run: which one it is, who owns it, whether what lies there may go on, and room for what will be written.

The run folder is a contract (scripts rely on it):

    recipe.yaml     the resolved recipe          adapter/   what PEFT loads
    run.json        state, provenance, results   merged/    what plain transformers loads
    metrics.jsonl   one line a step              export/    what other programs load
    tokenizer/      one that the run trained     twin/      the run of the float twin
    eval/  samples/  checkpoints/step-000100/  report.html
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError
from finetune.files import MARK, DiskError, finite, plain, write_json, writing
from finetune.processes import is_main_process
from finetune.recipe import Recipe, differences, read_resolved
from finetune.record import Record, read_record, write_record

if TYPE_CHECKING:
    from finetune.models.architecture import ArchitectureInfo

# A resumed run may differ from what was begun in these alone: they do not touch the weights.
SECTIONS = ("eval.", "run.", "plan.")

MAY_CHANGE = (
    "about",
    "data.bad_rows",
    "fit",
    "model.offload_layers",
    "train.save_steps",
    "train.keep_checkpoints",
    "train.max_bad_steps",
    "train.on_bad_step",
)

MUST_STAY = ("run.seed",)

UNBEGUN = {
    ".lock",
    "recipe.yaml",
    ".run.json.finetune-new",
    ".recipe.yaml.finetune-new",
}  # all that a kill at the start can leave


class RunDir:
    """One run's folder: who owns it, its state and its metrics. Of several processes the first one writes, others only read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.writes = is_main_process()
        self.metrics = path / "metrics.jsonl"
        self._lock: int | None = None

    @property
    def exists(self) -> bool:
        return (self.path / MARK).exists()

    def acquire(self) -> None:
        """Take the folder for this process; the lock dies with its owner.

        Raises:
            UserError: another process is running in the folder.
        """
        import fcntl

        if not self.writes:
            return
        file = self.path / ".lock"
        while self._lock is None:
            with writing(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
                handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                owner = os.read(handle, 20).decode(errors="replace")
                os.close(handle)
                raise UserError(
                    "another process is running in this folder",
                    where=str(self.path),
                    got=f"process {owner}" if owner else None,
                    hint="wait for it, or give run.dir=OTHER",
                ) from None
            # The owner before removes the file when it ends: what was locked here need not be what the next one will open.
            if file.exists() and os.path.samestat(os.fstat(handle), os.stat(file)):
                with writing(self.path):
                    os.truncate(handle, 0)
                    os.pwrite(handle, str(os.getpid()).encode(), 0)
                self._lock = handle
            else:
                os.close(handle)

    def release(self) -> None:
        if self._lock is not None:
            (self.path / ".lock").unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None

    def read(self) -> Record:
        """run.json.

        Raises:
            UserError: there is none, or it is damaged.
        """
        return read_record(self.path)

    def write(self, record: Record) -> None:
        if self.writes:
            write_record(self.path, record)

    def write_json(self, name: str, value: Any) -> None:
        if self.writes:
            write_json(self.path / name, value)

    def append(self, metrics: dict[str, Any]) -> None:
        if not self.writes:
            return
        with writing(self.metrics), open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(finite(metrics)) + "\n")

    def metrics_bytes(self) -> int:
        return self.metrics.stat().st_size if self.metrics.exists() else 0

    def cut_metrics(self, size: int, keep: tuple[str, ...] = ()) -> list[dict[str, Any]]:
        """Forget the metrics written after a checkpoint, which a resumed run writes again; returns lines with a key of `keep`."""
        if not self.writes or not self.metrics.exists():
            return []
        lines = self.metrics.read_bytes()[size:].decode("utf-8", "replace").splitlines() if keep else []
        os.truncate(self.metrics, min(size, self.metrics_bytes()))
        return [json.loads(line) for line in lines if any(f'"{key}"' in line for key in keep)]


def choose_dir(recipe: Recipe, name: str, resume: bool) -> Path:
    """Where the run lives.

    Raises:
        UserError: the folder that the recipe names belongs to another run, or holds other files; nothing to resume.
    """
    if recipe.run.dir is not None:
        path = Path(recipe.run.dir)
        if path.exists() and not path.is_dir():
            raise UserError("run.dir is a file", where="run.dir", got=str(path), hint="give a folder")
        if not resume and path.is_dir() and any(entry.name not in UNBEGUN for entry in path.iterdir()):
            owner = "belongs to another run" if (path / "run.json").exists() else "is not empty"
            raise UserError(
                f"the output folder {owner}",
                where="run.dir",
                got=str(path),
                hint="give another run.dir, remove it, or add --resume",
            )
        return path
    if not plain(name):
        raise UserError("no folder can be named after this recipe", where="runs/", got=repr(name), hint="give run.dir=FOLDER")
    own = re.compile(rf"{re.escape(name)}(-\d+)?")
    taken = sorted(
        (path for path in Path("runs").glob(f"{name}*") if own.fullmatch(path.name)), key=lambda path: _number(path, name)
    )
    if resume:
        if not taken:
            raise UserError("there is no run to resume", where="runs/", got=f"no {name}", hint="leave out --resume")
        return taken[-1]
    return Path("runs", f"{name}-{_number(taken[-1], name) + 1}" if taken else name)


def _number(path: Path, name: str) -> int:
    return int(path.name.removeprefix(name).removeprefix("-") or 1)


def absolute(recipe: Recipe) -> Recipe:
    """The recipe with its local paths absolute, so that its run can be resumed, merged and scored from anywhere."""

    def full(text: str | None) -> str | None:
        return str(Path(text).expanduser().absolute()) if text is not None and Path(text).expanduser().exists() else text

    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"name": full(recipe.model.name)}),
            "tokenizer": recipe.tokenizer.model_copy(update={"name": full(recipe.tokenizer.name)}),
            "distill": recipe.distill.model_copy(update={"teacher": full(recipe.distill.teacher)}),
            "data": recipe.data.model_copy(
                update={key: full(getattr(recipe.data, key)) for key in ("name", "path", "heldout_path")}
            ),
            "eval": recipe.eval.model_copy(update={"include_path": full(recipe.eval.include_path)}),
        }
    )


def check_resumable(folder: RunDir, recipe: Recipe) -> None:
    if not folder.exists:
        raise UserError("there is no run to resume", where=str(folder.path), got="no run.json", hint="leave out --resume")
    begun = read_resolved(folder.path / "recipe.yaml")
    changed = {
        key: values
        for key, values in differences(begun, recipe).items()
        if key in MUST_STAY or not (key.startswith(SECTIONS) or key in MAY_CHANGE)
    }
    if changed:
        shown = ", ".join(f"{key} was {old!r}, is {new!r}" for key, (old, new) in changed.items())
        raise UserError(
            "this folder belongs to a run with another recipe",
            where=str(folder.path / "recipe.yaml"),
            got=shown,
            hint=f"finetune resume {folder.path}, or another run.dir for a new run",
        )


def same_data(record: Record, digest: str, folder: Path) -> None:
    """Raise UserError when a run's data is no longer what it was trained on: its split would be another one."""
    data = record.provenance.data
    if data is not None and data.sha256 != digest:
        raise UserError(
            "the data has changed since this run began",
            where=f"{folder}: {data.source}",
            got=f"SHA-256 {digest[:12]}…, it was {data.sha256[:12]}…",
            hint="put the old file back, or begin a new run",
        )


def as_it_was_fitted(recipe: Recipe, record: Record) -> Recipe:
    """The recipe with what fit: auto changed of it when its run began: it goes on as it began."""
    fit = record.plan.fit if record.plan is not None and recipe.fit == "auto" else None
    if fit is None:
        return recipe
    values = recipe.model_dump()
    for key, change in (item for made in fit.changes for item in made.keys.items()):
        section, _, leaf = key.rpartition(".")
        if values[section][leaf] == change["old"]:
            values[section][leaf] = change["new"]
    return Recipe.model_validate(values)


def with_checkpoint(error: DiskError, run_dir: Path) -> DiskError:
    """What a disk refused, with the checkpoint of the run that stands, and what to type when the disk is mended."""
    whole = [file.parent.name for file in run_dir.glob("checkpoints/step-*/manifest.json")]
    last = max(whole, key=lambda name: (len(name), name), default=None)  # the longer number is the higher one
    stands = f"the last whole checkpoint is {last}" if last else "no checkpoint was written yet"
    hint = f"{error.hint}, then: finetune resume {run_dir}"
    return DiskError(error.message, where=error.where, got=f"{error.got}; {stands}", hint=hint)


def bytes_to_write(recipe: Recipe, info: ArchitectureInfo, trainable: int) -> int:
    """Upper bound of what the run needs of the disk: checkpoints (weights and two fp32 moments), adapter, merged model, and while
    it runs the base, where that is streamed from there."""
    stored = 4 if recipe.model.dtype == "fp32" or not recipe.base_frozen else 2
    one = trainable * (4 + 8)
    # The new one stands beside the kept ones for a moment.
    total = one * (recipe.train.keep_checkpoints + recipe.train.save_best + 1)
    if recipe.writes_adapter:
        total += 4 * trainable
    if recipe.run.merge or not recipe.base_frozen:
        total += info.parameters * stored * (1 + len(recipe.export.formats))
    return total * (2 if recipe.twin else 1) + _bytes_streamed(recipe, info) + (16 << 20)


def _bytes_streamed(recipe: Recipe, info: ArchitectureInfo) -> int:
    """Upper bound of the base's bytes where it is streamed from the disk: codes with their scales, the rest as floats."""
    if recipe.model.offload_layers != "disk":
        return 0
    from quant.swap import matches

    keep, scheme = recipe.quant.keep, recipe.quant.scheme
    weights = {path: rows * columns for path, (rows, columns) in info.linears.items() if path not in info.left}
    coded = sum(count for path, count in weights.items() if not matches(path, keep)) if scheme != "none" else 0
    floats = (info.parameters - coded) * (2 if recipe.model.dtype in ("bf16", "fp16") else 4)
    return floats + int(coded * {"none": 0.0, "nf4": 4.5 / 8, "ternary": 2 / 8}[scheme])
