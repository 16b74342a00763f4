"""The run folder: choosing it, locking it, checking that a run in it can be resumed, and the disk space it needs.

The layout of the run folder is a contract (scripts rely on it):

    recipe.yaml     the resolved recipe              adapter/   for PEFT
    run.json        state, provenance, results       merged/    for plain transformers
    metrics.jsonl   one line per step                export/    for other programs
    tokenizer/      if the run trained a tokenizer   twin/      run folder of the float twin
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
from finetune.recipe import Recipe, differences, known_keys, read_resolved
from finetune.record import DataRecord, Record, read_record, write_record

if TYPE_CHECKING:
    from finetune.models.architecture import ArchitectureInfo

# The only keys that may change when a run is resumed, because they do not affect the weights.
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

STARTUP_FILES = {
    ".lock",
    "recipe.yaml",
    ".run.json.finetune-new",
    ".recipe.yaml.finetune-new",
}  # what a kill during startup can leave behind


class RunDir:
    """A run folder: its lock, record and metrics. Only the main process writes; others read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.writes = is_main_process()
        self.metrics = path / "metrics.jsonl"
        self._lock: int | None = None

    @property
    def exists(self) -> bool:
        return (self.path / MARK).exists()

    def acquire(self) -> None:
        """Lock the folder for this process; the lock is released when its owner ends.

        Raises:
            UserError: another process has locked the folder.
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
                    "another process is using this run folder",
                    where=str(self.path),
                    got=f"process {owner}" if owner else None,
                    hint="wait for it, or give run.dir=OTHER",
                ) from None
            # The previous owner removes the file when it ends, so the locked file may no longer be the one at this path.
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
        """Read run.json.

        Raises:
            UserError: it is missing or damaged.
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
        """Truncate the metrics to `size` bytes, because a resumed run writes later ones again.

        Returns:
            The removed lines that have a key of `keep`.
        """
        if not self.writes or not self.metrics.exists():
            return []
        lines = self.metrics.read_bytes()[size:].decode("utf-8", "replace").splitlines() if keep else []
        os.truncate(self.metrics, min(size, self.metrics_bytes()))
        return [json.loads(line) for line in lines if any(f'"{key}"' in line for key in keep)]


def choose_dir(recipe: Recipe, name: str, resume: bool) -> Path:
    """Choose the run folder.

    Raises:
        UserError: the recipe's folder belongs to another run or contains other files, or there is nothing to resume.
    """
    if recipe.run.dir is not None:
        path = Path(recipe.run.dir)
        if path.exists() and not path.is_dir():
            raise UserError("run.dir is a file, not a folder", where="run.dir", got=str(path), hint="give a folder")
        if not resume and path.is_dir() and any(entry.name not in STARTUP_FILES for entry in path.iterdir()):
            owner = "belongs to another run" if (path / "run.json").exists() else "is not empty"
            raise UserError(
                f"the output folder {owner}",
                where="run.dir",
                got=str(path),
                hint="give another run.dir, remove it, or add --resume",
            )
        return path
    if not plain(name):
        raise UserError("the recipe's name is not a valid folder name", where="runs/", got=repr(name), hint="give run.dir=FOLDER")
    own = re.compile(rf"{re.escape(name)}(-\d+)?")
    taken = sorted(
        (path for path in Path("runs").glob(f"{name}*") if own.fullmatch(path.name)), key=lambda path: _number(path, name)
    )
    if resume:
        if not taken:
            raise UserError("no run to resume", where="runs/", got=f"no {name}", hint="leave out --resume")
        return taken[-1]
    return Path("runs", f"{name}-{_number(taken[-1], name) + 1}" if taken else name)


def _number(path: Path, name: str) -> int:
    return int(path.name.removeprefix(name).removeprefix("-") or 1)


def absolute(recipe: Recipe) -> Recipe:
    """The recipe with absolute local paths, so that its run can be resumed, merged and evaluated from any directory."""

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
    """Raise UserError if there is no run in the folder, or its recipe differs in more than the keys that may change."""
    if not folder.exists:
        raise UserError("no run to resume", where=str(folder.path), got="no run.json", hint="leave out --resume")
    started = read_resolved(folder.path / "recipe.yaml")
    changed = {
        key: values
        for key, values in differences(started, recipe).items()
        if key in MUST_STAY or not (key.startswith(SECTIONS) or key in MAY_CHANGE)
    }
    if changed:
        shown = ", ".join(f"{key} was {old!r}, is {new!r}" for key, (old, new) in changed.items())
        raise UserError(
            "this folder belongs to a run with a different recipe",
            where=str(folder.path / "recipe.yaml"),
            got=shown,
            hint=f"finetune resume {folder.path}; or give another run.dir for a new run",
        )


def same_data(record: Record, digest: str, rows: DataRecord, folder: Path) -> None:
    """Raise UserError if the data has changed since the run started, or another version splits it otherwise.

    digest, rows: of the data as it is now.
    """
    data = record.provenance.data
    if data is not None and data.sha256 != digest:
        raise UserError(
            "the data has changed since this run started",
            where=f"{folder}: {data.source}",
            got=f"SHA-256 {digest[:12]}…, was {data.sha256[:12]}…",
            hint="restore the old file, or start a new run",
        )
    then, now = (part.model_dump() if part is not None else {} for part in (record.data, rows))
    counts = {key: (then[key], now[key]) for key in ("heldout_rows", "train_rows") if key in then and key in now}
    if any(was != is_now for was, is_now in counts.values()):
        raise UserError(
            "this version splits the rows otherwise than the one that started the run",
            where=str(folder),
            got=", ".join(f"{key} {was}, now {is_now}" for key, (was, is_now) in counts.items()),
            hint=f"finish it with that version{f' ({record.provenance.commit[:10]})' if record.provenance.commit else ''}, "
            "or start a new run",
        )


def with_fit_changes(recipe: Recipe, record: Record) -> Recipe:
    """The recipe with the changes that fit: auto made when its run started; a resumed run keeps them.

    Raises:
        UserError: the record has a key that recipes do not have.
    """
    fit = record.plan.fit if record.plan is not None and recipe.fit == "auto" else None
    if fit is None:
        return recipe
    values, known = recipe.model_dump(), known_keys()
    for key, change in (item for step in fit.changes for item in step.keys.items()):
        if key not in known:
            where, hint = f"{MARK}, plan.fit.changes", "restore it from a copy of the folder"
            raise UserError("cannot read the run's record", where=where, got=f"unknown recipe key {key}", hint=hint)
        *sections, leaf = key.split(".")
        section = values
        for name in sections:
            section = section[name]
        if section[leaf] == change.old:
            section[leaf] = change.new
    return Recipe.model_validate(values)


def with_checkpoint(error: DiskError, run_dir: Path) -> DiskError:
    """`error` with the run's last complete checkpoint, and the command to type when the disk is fixed."""
    complete = [file.parent.name for file in run_dir.glob("checkpoints/step-*/manifest.json")]
    last = max(complete, key=lambda name: (len(name), name), default=None)  # a longer number is a higher one
    kept = f"the last complete checkpoint is {last}" if last else "no checkpoint was written yet"
    hint = f"{error.hint}, then: finetune resume {run_dir}"
    return DiskError(error.message, where=error.where, got=f"{error.got}; {kept}", hint=hint)


def bytes_to_write(recipe: Recipe, info: ArchitectureInfo, trainable: int) -> int:
    """Upper bound of the run's disk space: checkpoints (weights and two fp32 moments), adapter, merged model, exports, and
    the base while its layers are offloaded to disk."""
    itemsize = 4 if recipe.model.dtype == "fp32" or not recipe.base_frozen else 2
    checkpoint = trainable * (4 + 8)
    # A new checkpoint briefly exists beside the kept ones.
    total = checkpoint * (recipe.train.keep_checkpoints + recipe.train.save_best + 1)
    if recipe.writes_adapter:
        total += 4 * trainable
    if recipe.run.merge or not recipe.base_frozen:
        total += info.parameters * itemsize * (1 + len(recipe.export.formats))
    return total * (2 if recipe.twin else 1) + _bytes_offloaded(recipe, info) + (16 << 20)


def _bytes_offloaded(recipe: Recipe, info: ArchitectureInfo) -> int:
    """Upper bound of the base's bytes if it is offloaded to disk: codes with scales, the rest in floats."""
    if recipe.model.offload_layers != "disk":
        return 0
    from quant.swap import matches

    keep, scheme = recipe.quant.keep, recipe.quant.scheme
    weights = {path: rows * columns for path, (rows, columns) in info.linears.items() if path not in info.left}
    coded = sum(count for path, count in weights.items() if not matches(path, keep)) if scheme != "none" else 0
    floats = (info.parameters - coded) * (2 if recipe.model.dtype in ("bf16", "fp16") else 4)
    return floats + int(coded * {"none": 0.0, "nf4": 4.5 / 8, "ternary": 2 / 8}[scheme])
