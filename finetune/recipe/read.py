"""Reading a recipe: YAML with the line of each key, overrides, and all errors at once, in plain words."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ValidationError

from finetune.errors import UserError, UserErrors, nearest
from finetune.recipe.elsewhere import ELSEWHERE_CALLED, NEAR_VALUES
from finetune.recipe.schema import Recipe, known_keys
from finetune.recipe.translate import called_now, translate

MAX_NODES = 10_000  # a recipe has a few dozen; aliases that expand into more are a YAML bomb
RECIPES_IN_WHEEL = Path(__file__).parent.parent / "shipped_recipes"
RECIPES_IN_CHECKOUT = Path(__file__).parent.parent.parent / "recipes"


class _Source:
    """YAML as plain values, with the line number of each key."""

    def __init__(self, text: str, name: str) -> None:
        self.name = name
        self.lines: dict[tuple[str | int, ...], int] = {}
        self.errors: list[UserError] = []
        self._nodes = 0
        try:
            loader = yaml.SafeLoader(text)
            try:
                node = loader.get_single_node()
                self.value: Any = self._build(loader, node, ()) if node is not None else {}
            finally:
                loader.dispose()
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            raise UserError(
                "the recipe is not valid YAML",
                where=f"{name}:{mark.line + 1}" if mark else name,
                got=error.problem or str(error),
                hint="fix that line; indent keys with spaces and end them with a colon",
            ) from None
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            hint = "finetune schema shows the keys of a recipe"
            raise UserError("the recipe is not valid YAML", where=name, got=str(error).splitlines()[0], hint=hint) from None
        if not isinstance(self.value, dict):
            raise UserError(
                "a recipe must be a mapping of sections",
                where=name,
                got=type(self.value).__name__,
                hint="finetune recipes lists examples",
            )

    def _build(self, loader: yaml.SafeLoader, node: yaml.Node, path: tuple[str | int, ...]) -> Any:
        self._nodes += 1 + (len(node.value) // 1000 if isinstance(node, yaml.ScalarNode) else 0)
        if self._nodes > MAX_NODES:
            raise ValueError(f"expands to more than {MAX_NODES} values")
        self.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.SequenceNode):
            return [self._build(loader, item, (*path, index)) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            result: dict[str, Any] = {}
            for key_node, value_node in node.value:
                key = str(loader.construct_object(key_node))
                if key in result:
                    self.errors.append(
                        UserError(
                            f"duplicate key {dotted((*path, key))}",
                            where=f"{self.name}:{key_node.start_mark.line + 1}",
                            hint="keep one of them",
                        )
                    )
                self.lines[(*path, key)] = key_node.start_mark.line + 1
                result[key] = self._build(loader, value_node, (*path, key))
            return result
        return loader.construct_object(node)

    def where(self, path: tuple[str | int, ...], overridden: set[str]) -> str:
        for key in (dotted(path[:n]) for n in range(1, len(path) + 1)):
            if key in overridden:
                return f"command line, {key}"
        while path and path not in self.lines:
            path = path[:-1]
        return f"{self.name}:{self.lines.get(path, 1)}"


def dotted(path: tuple[str | int, ...]) -> str:
    return ".".join(map(str, path))


def allowed(annotation: Any) -> str:
    """A type annotation, in words."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (types.UnionType, typing.Union):
        return " or ".join(allowed(argument) for argument in arguments)
    if origin is Annotated:
        return allowed(arguments[0])
    if origin is list:
        return f"a list of {allowed(arguments[0])}"
    if origin is tuple:
        return f"{len(arguments)} × {allowed(arguments[0])}"
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _apply_overrides(value: dict[str, Any], overrides: list[str]) -> set[str]:
    """Set each `section.key=value` in `value`; the right-hand side is YAML. Returns the keys."""
    keys = set()
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
            raise UserError(
                "an override must have the form section.key=value",
                where="command line",
                got=override,
                hint="for example train.lr=1e-4",
            )
        try:
            parsed = yaml.safe_load(text) if text else None
        except (yaml.YAMLError, ValueError, RecursionError):  # a ValueError: an invalid date
            parsed = text
        *sections, last = key.split(".")
        section_keys = value
        for section in sections:
            section_keys = section_keys.setdefault(section, {})
            if not isinstance(section_keys, dict):
                raise UserError(f"{key}: {section} is not a section", where="command line", got=override)
        section_keys[last] = parsed
        keys.add(key)
    return keys


def _mistake(error: Any, source: _Source, overridden: set[str]) -> UserError:
    """A pydantic error as a UserError about the recipe."""
    known = known_keys()
    path = tuple(part for part in error["loc"])
    while path and dotted(path) not in known and error["type"] != "extra_forbidden":
        path = path[:-1]  # pydantic adds the branch of a union, or an index
    key, where = dotted(path), source.where(tuple(error["loc"]), overridden)
    if error["type"] == "extra_forbidden":
        section = dotted(path[:-1])
        siblings = [k for k in known if k.rpartition(".")[0] == section]
        word = str(path[-1])
        leaf = nearest(word, [k.rpartition(".")[2] for k in siblings])
        same_name = [k for k in known if k.rpartition(".")[2] == word]  # right name, wrong section
        near = (
            called_now(key, error["input"])
            or ELSEWHERE_CALLED.get(word)
            or (same_name[0] if same_name else None)
            or (f"{section}.{leaf}".lstrip(".") if leaf else None)
        )
        names = ", ".join(k.rpartition(".")[2] for k in siblings)
        hint = f"did you mean {near}?" if near else f"known keys here: {names}"
        return UserError(f"unknown key {key}", where=where, got=repr(error["input"]), hint=hint)
    if error["type"] == "missing" and key == dotted(tuple(error["loc"])):
        field = known[key]
        return UserError(f"missing key {key}", where=where, hint=f"add {key}: {field.description}")
    if error["type"] == "rule":
        return UserError(error["msg"], where=where)
    if error["type"] == "value_error":
        return UserError(f"{key or 'the recipe'}: {error['msg'].removeprefix('Value error, ')}", where=where)
    field = known.get(key)
    expected = allowed(field.annotation) if field is not None else error["msg"]
    bounds = " ".join(
        f"{sign} {getattr(limit, name)}"
        for limit in (field.metadata if field is not None else [])
        for name, sign in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤"))
        if getattr(limit, name, None) is not None
    )
    got = repr(error["input"])
    words = re.split(r" \| | or ", expected)
    near = called_now(key, error["input"]) or NEAR_VALUES.get(key, {}).get(str(error["input"]))
    near = near or (nearest(str(error["input"]), words) if len(words) > 1 else None)
    return UserError(
        f"invalid value for {key}",
        where=where,
        got=got if len(got) < 200 else got[:200] + "…",
        hint=f"allowed: {expected}{' ' + bounds if bounds else ''}" + (f"; did you mean {near}?" if near else ""),
    )


def find_recipe(name: str) -> Path:
    """Resolve a path or the name of a shipped recipe (`quickstart`, `recipes/quickstart.yaml`).

    Raises:
        UserError: neither exists; the hint names the nearest shipped recipe.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = {recipe.stem: recipe for recipe in shipped_recipes()}
    if path.stem in shipped and path.parent in (Path(), Path("recipes")):
        return shipped[path.stem]
    near = nearest(path.stem, shipped)
    raise UserError(
        "no such recipe",
        got=name,
        hint=f"did you mean {near}?" if near else "finetune recipes lists the shipped ones",
    )


def shipped_recipes() -> list[Path]:
    """All recipes of this installation."""
    folder = RECIPES_IN_WHEEL if RECIPES_IN_WHEEL.is_dir() else RECIPES_IN_CHECKOUT
    return sorted(folder.rglob("*.yaml"))


def read_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read the recipe in `path` and apply `overrides` (`section.key=value`).

    Raises:
        UserErrors: all errors in it, each with file:line.
        UserError: the file is not valid YAML.
    """
    return _validated(_source(path), overrides or [])


def read_resolved(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read the resolved recipe of a run folder, of this version or an older one. `overrides` use today's names.

    Raises: as read_recipe.
    """
    source = _source(path)
    source.value = translate(source.value)
    return _validated(source, overrides or [])


def _source(path: Path) -> _Source:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("cannot read the recipe", where=str(path), got=str(error)) from None
    return _Source(text, str(path))


def _validated(source: _Source, overrides: list[str]) -> Recipe:
    overridden = _apply_overrides(source.value, overrides)
    errors = source.errors
    recipe = None
    try:
        recipe = Recipe.model_validate(source.value)
    except ValidationError as error:
        # pydantic reports every failed branch of a union; one error per key is enough.
        distinct: dict[tuple[str, str], UserError] = {}
        for item in error.errors():
            user_error = _mistake(item, source, overridden)
            distinct.setdefault((user_error.message, user_error.where or ""), user_error)
        errors = errors + list(distinct.values())
    if errors or recipe is None:
        count = len(errors)
        raise UserErrors(errors, f"{source.name}: {count} error{'s' if count != 1 else ''}")
    return recipe


def locator(path: Path, overrides: list[str] | None = None) -> Callable[[str], str]:
    """A function from a key of a valid recipe to where it was set: file:line, or the command line."""
    source = _Source(path.read_text(encoding="utf-8"), str(path))
    overridden = _apply_overrides(source.value, overrides or [])
    return lambda key: source.where(tuple(key.split(".")), overridden)


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe with every key, as YAML."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def differences(old: Recipe, new: Recipe) -> dict[str, tuple[Any, Any]]:
    """{key: (old value, new value)} of keys whose values differ."""
    result: dict[str, tuple[Any, Any]] = {}
    for key, field in known_keys().items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            continue
        a: Any = old
        b: Any = new
        for part in key.split("."):
            a, b = getattr(a, part), getattr(b, part)
        if a != b:
            result[key] = (a, b)
    return result
