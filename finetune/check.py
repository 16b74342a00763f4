"""What a recipe names beyond its keys: files, folders, packages. Cheap, without the network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from finetune.data.rows import PACKAGE, READABLE, package_files
from finetune.errors import Mistake, Mistakes, nearest
from finetune.recipe import Recipe


def check_sources(recipe: Recipe, name: str, where: Callable[[str], str]) -> None:
    """Look for every local thing that the recipe names; `where` gives a key's file:line.

    Raises:
        Mistakes: all that are missing.
    """
    mistakes: list[Mistake] = []

    def missing_file(key: str, text: str) -> None:
        path = Path(text).expanduser()
        if not path.is_file():
            near = nearest(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else None
            mistakes.append(
                Mistake(
                    "there is no such file",
                    where=f"{where(key)}, {key}",
                    found=text,
                    do=f"did you mean {path.parent / near}?" if near else None,
                )
            )
        elif path.suffix.lower() not in (*READABLE, ".gguf"):
            mistakes.append(
                Mistake(
                    "this kind of file is not read", where=f"{where(key)}, {key}", found=text, do="one of " + " ".join(READABLE)
                )
            )

    for key, value in (("data.path", recipe.data.path), ("data.heldout_path", recipe.data.heldout_path)):
        if value is not None:
            missing_file(key, value)
    if recipe.data.path is None and recipe.data.name is not None and recipe.data.name.startswith(PACKAGE):
        try:
            package_files(recipe.data.name, f"{where('data.name')}, data.name")
        except Mistake as mistake:
            mistakes.append(mistake)
    from finetune.model import find

    try:
        find(recipe.model.name, revision=recipe.model.revision, where=f"{where('model.name')}, model.name")
    except Mistake as mistake:
        mistakes.append(mistake)
    if recipe.eval.include_path is not None and not Path(recipe.eval.include_path).is_dir():
        mistakes.append(Mistake("there is no such folder", where=where("eval.include_path"), found=recipe.eval.include_path))
    if mistakes:
        raise Mistakes(mistakes, f"{name}: {len(mistakes)} mistake{'s' if len(mistakes) != 1 else ''}")
