"""Checking the files, folders and packages that a recipe names. Cheap, without network access."""

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
    """Check every local file, folder and package that the recipe names. where: from a key to its file:line.

    Raises:
        UserErrors: all that are missing, damaged, or outside their folder.
    """
    errors: list[UserError] = []

    def look(check: Callable[[], object]) -> None:
        try:
            check()
        except UserError as error:
            errors.append(error)

    def location(key: str) -> str:
        line = where(key)
        return line if line.endswith(key) else f"{line}, {key}"

    def data_file(key: str, path: Path) -> None:
        if recipe.streams_text:
            if not path.exists():
                raise no_such_file(path, location(key))
            return  # its content is checked when it is opened
        if not path.is_file():
            raise no_such_file(path, location(key))
        if path.suffix.lower() not in READABLE:
            hint = "use one of " + " ".join(READABLE)
            raise UserError("unsupported data file", where=location(key), got=str(path), hint=hint)

    def model_of(key: str, name: str, revision: str | None = None) -> None:
        check_files(find_model(name, revision=revision, where=location(key)), location(key))

    data, model = recipe.data, recipe.model
    if data.path is not None:
        look(lambda: data_file("data.path", Path(str(data.path))))
    elif data.name is not None and data.name.startswith(PACKAGE):
        look(lambda: package_files(str(data.name), location("data.name")))
    look(lambda: check_patterns(data.files, location("data.files")))
    if data.heldout_path is not None:
        look(lambda: data_file("data.heldout_path", Path(str(data.heldout_path))))
    if model.config is not None:
        look(lambda: new_config(dict(model.config or {}), where=location("model.config")))
    if model.name is not None:
        look(lambda: model_of("model.name", str(model.name), model.revision))
    if recipe.tokenizer.name is not None:
        look(lambda: find_tokenizer(str(recipe.tokenizer.name), where=location("tokenizer.name")))
    if recipe.distill.teacher is not None:
        look(lambda: model_of("distill.teacher", str(recipe.distill.teacher)))
    tasks = recipe.eval.include_path
    if tasks is not None and not Path(tasks).is_dir():
        errors.append(UserError("no such folder", where=location("eval.include_path"), got=tasks))
    if recipe.run.dir is not None:
        look(lambda: require_space(Path(str(recipe.run.dir)), 1, "this run"))
    if errors:
        raise UserErrors(errors, f"{name}: {len(errors)} error{'s' if len(errors) != 1 else ''}")
