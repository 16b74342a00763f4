"""What a recipe names beyond its keys: files, folders, packages. Cheap, without the network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from finetune.data.rows import PACKAGE, READABLE, check_patterns, no_such_file, package_files
from finetune.errors import UserError, UserErrors
from finetune.files import require_space
from finetune.models.config import new_config
from finetune.models.source import check_files, find_model, find_tokenizer
from finetune.recipe import Recipe


def check_sources(recipe: Recipe, name: str, where: Callable[[str], str]) -> None:
    """Look for every local thing that the recipe names; `where` gives a key's file:line.

    Raises:
        UserErrors: all that is missing, damaged, or leads elsewhere.
    """
    mistakes: list[UserError] = []

    def look(check: Callable[[], object]) -> None:
        try:
            check()
        except UserError as mistake:
            mistakes.append(mistake)

    def place(key: str) -> str:
        found = where(key)
        return found if found.endswith(key) else f"{found}, {key}"

    def data_file(key: str, path: Path) -> None:
        if recipe.streams_text:
            if not path.exists():
                raise no_such_file(path, place(key))
            return  # what is in it is looked at when it is opened
        if not path.is_file():
            raise no_such_file(path, place(key))
        if path.suffix.lower() not in READABLE:
            hint = "one of " + " ".join(READABLE)
            raise UserError("this kind of data file is not read", where=place(key), got=str(path), hint=hint)

    def model_of(key: str, name: str, revision: str | None = None) -> None:
        check_files(find_model(name, revision=revision, where=place(key)), place(key))

    data, model = recipe.data, recipe.model
    if data.path is not None:
        look(lambda: data_file("data.path", Path(str(data.path))))
    elif data.name is not None and data.name.startswith(PACKAGE):
        look(lambda: package_files(str(data.name), place("data.name")))
    look(lambda: check_patterns(data.files, place("data.files")))
    if data.heldout_path is not None:
        look(lambda: data_file("data.heldout_path", Path(str(data.heldout_path))))
    if model.config is not None:
        look(lambda: new_config(dict(model.config or {}), where=place("model.config")))
    if model.name is not None:
        look(lambda: model_of("model.name", str(model.name), model.revision))
    if recipe.tokenizer.name is not None:
        look(lambda: find_tokenizer(str(recipe.tokenizer.name), where=place("tokenizer.name")))
    if recipe.distill.teacher is not None:
        look(lambda: model_of("distill.teacher", str(recipe.distill.teacher)))
    tasks = recipe.eval.include_path
    if tasks is not None and not Path(tasks).is_dir():
        mistakes.append(UserError("there is no such folder", where=place("eval.include_path"), got=tasks))
    if recipe.run.dir is not None:
        look(lambda: require_space(Path(str(recipe.run.dir)), 1, "this run"))
    if mistakes:
        raise UserErrors(mistakes, f"{name}: {len(mistakes)} mistake{'s' if len(mistakes) != 1 else ''}")
