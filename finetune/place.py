"""Where a run lives, and whether what lies there may go on: the folder, the recipe it was begun with, its data, room for it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import Mistake
from finetune.files import RunFolder, plain
from finetune.recipe import Recipe, differences, read_recipe

if TYPE_CHECKING:
    from finetune.model import Skeleton

# A resumed run may differ from what was begun in these alone: they do not touch the weights.
SECTIONS = ("eval.", "run.", "plan.")
MAY_CHANGE = (
    "about",
    "data.bad_rows",
    "fit",
    "model.stream",
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


def choose_folder(recipe: Recipe, name: str, resume: bool) -> Path:
    """Where the run lives.

    Raises:
        Mistake: the folder that the recipe names belongs to another run, or holds other files; nothing to resume.
    """
    if recipe.run.dir is not None:
        path = Path(recipe.run.dir)
        if path.exists() and not path.is_dir():
            raise Mistake("run.dir is a file", where="run.dir", found=str(path), do="give a folder")
        if not resume and path.is_dir() and any(entry.name not in UNBEGUN for entry in path.iterdir()):
            owner = "belongs to another run" if (path / "run.json").exists() else "is not empty"
            raise Mistake(
                f"the output folder {owner}",
                where="run.dir",
                found=str(path),
                do="give another run.dir, remove it, or add --resume",
            )
        return path
    if not plain(name):
        raise Mistake("no folder can be named after this recipe", where="runs/", found=repr(name), do="give run.dir=FOLDER")
    own = re.compile(rf"{re.escape(name)}(-\d+)?")
    taken = sorted(
        (path for path in Path("runs").glob(f"{name}*") if own.fullmatch(path.name)), key=lambda path: _number(path, name)
    )
    if resume:
        if not taken:
            raise Mistake("there is no run to resume", where="runs/", found=f"no {name}", do="leave out --resume")
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


def check_resumable(folder: RunFolder, recipe: Recipe) -> None:
    if not folder.exists:
        raise Mistake("there is no run to resume", where=str(folder.path), found="no run.json", do="leave out --resume")
    begun = read_recipe(folder.path / "recipe.yaml")
    changed = {
        key: values
        for key, values in differences(begun, recipe).items()
        if key in MUST_STAY or not (key.startswith(SECTIONS) or key in MAY_CHANGE)
    }
    if changed:
        shown = ", ".join(f"{key} was {old!r}, is {new!r}" for key, (old, new) in changed.items())
        raise Mistake(
            "this folder belongs to a run with another recipe",
            where=str(folder.path / "recipe.yaml"),
            found=shown,
            do=f"finetune resume {folder.path}, or another run.dir for a new run",
        )


def same_data(record: dict[str, Any], digest: str, folder: Path) -> None:
    """Raise Mistake when a run's data is no longer what it was trained on: its split would be another one."""
    data = record["provenance"].get("data", {"sha256": digest})
    if data["sha256"] != digest:
        raise Mistake(
            "the data has changed since this run began",
            where=f"{folder}: {data['source']}",
            found=f"SHA-256 {digest[:12]}…, it was {data['sha256'][:12]}…",
            do="put the old file back, or begin a new run",
        )


def bytes_to_write(recipe: Recipe, bones: Skeleton, trainable: int) -> int:
    """Upper bound of what the run needs of the disk: checkpoints (weights and two fp32 moments), adapter, merged model, and while
    it runs the base, where that is streamed from there."""
    stored = 4 if recipe.model.dtype == "fp32" or recipe.adapter.kind == "none" else 2
    one = trainable * (4 + 8)
    # The new one stands beside the kept ones for a moment.
    total = one * (recipe.train.keep_checkpoints + (recipe.train.best != "none") + 1)
    if recipe.adapter.kind == "lora":
        total += 4 * trainable
    if recipe.run.merge or recipe.adapter.kind == "none":
        total += bones.parameters * stored * (1 + len(recipe.export.formats))
    return total * (2 if recipe.twin else 1) + _bytes_streamed(recipe, bones) + (16 << 20)


def _bytes_streamed(recipe: Recipe, bones: Skeleton) -> int:
    """Upper bound of the base's bytes where it is streamed from the disk: codes with their scales, the rest as floats."""
    if recipe.model.stream != "disk":
        return 0
    from quant.swap import matches

    keep, scheme = recipe.quant.keep, recipe.quant.scheme
    weights = {path: rows * columns for path, (rows, columns) in bones.linears.items() if path not in bones.left}
    coded = sum(count for path, count in weights.items() if not matches(path, keep)) if scheme != "none" else 0
    floats = (bones.parameters - coded) * (2 if recipe.model.dtype in ("bf16", "fp16") else 4)
    return floats + int(coded * {"none": 0.0, "nf4": 4.5 / 8, "ternary": 2 / 8}[scheme])
