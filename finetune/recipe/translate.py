"""Old names of keys and values: resolved recipes of older run folders are translated, recipes written by hand get a hint."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

# Old dotted key → its new dotted key; or, where values have changed too, old value → {new dotted key: new value}:
#     "train.old": "train.new"
#     "train.on_fire": {"run": {"train.on_fire": "leave"}}           one value was renamed, the others keep their names
#     "train.both": {"yes": {"train.one": True, "train.two": True}}  one key was split into two
RENAMED: dict[str, str | Mapping[Any, Mapping[str, Any]]] = {
    "model.stream": "model.offload_layers",
    "data.learn": {"answers": {"data.loss_on": "answers"}, "everything": {"data.loss_on": "all"}},
    "data.too_long": "data.truncation",
    "train.best": {
        "none": {"train.save_best": False, "train.load_best_at_end": False},
        "keep": {"train.save_best": True, "train.load_best_at_end": False},
        "use": {"train.save_best": True, "train.load_best_at_end": True},
    },
    "train.on_bad_step": {"back": {"train.on_bad_step": "rollback"}},
    "train.step_in_backward": "train.optimizer_in_backward",
}

# Keys that came later → (kind, the value that means what a run did before they came).
ADDED = {"data.bos": ("pretrain", "none")}

# Keys, renamed since, by which a resolved recipe of the first version (f4a9b44) is known.
OF_FIRST_VERSION = ("data.learn", "data.too_long", "model.stream", "train.best", "train.step_in_backward")


def translate(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a resolved recipe, which has all keys of its time, with today's names of keys and values."""
    result = copy.deepcopy(dict(resolved))
    for key, (kind, value) in ADDED.items():
        if result.get("kind") == kind and _section(result, key)[0] is not None:
            _put(result, key, value)
    if any(key in RENAMED and _value(result, key) is not None for key in OF_FIRST_VERSION):
        _keep_precision(result)
    for old, new in RENAMED.items():
        section, leaf = _section(result, old)
        if section is None or leaf not in section:
            continue
        if isinstance(new, str):
            _put(result, new, section.pop(leaf))
        elif (changed := _of_value(new, section[leaf])) is not None:
            del section[leaf]
            for key, value in changed.items():
                _put(result, key, value)
    return result


def translate_item(key: str, value: Any) -> dict[str, Any]:
    """One dotted key with its value, as {dotted key: value} of today; as it is where neither was renamed."""
    new = RENAMED.get(key)
    if isinstance(new, str):
        return {new: value}
    changed = _of_value(new, value) if new is not None else None
    return {key: value} if changed is None else dict(changed)


def _keep_precision(first: dict[str, Any]) -> None:
    """Spell out `train.precision: auto` where it had another meaning in the first version.

    It followed model.dtype for sft, and was bf16 over fp32 weights for pretrain; whether all weights were trained did not matter.
    """
    if _value(first, "train.precision") != "auto":
        return
    dtype, trains_all = _value(first, "model.dtype"), _value(first, "adapter.kind") == "none"
    if first.get("kind") == "sft" and trains_all and dtype in ("auto", "fp32"):
        first["train"]["precision"] = "fp32"
    elif first.get("kind") == "pretrain" and not trains_all and dtype == "fp32":
        first["train"]["precision"] = "bf16"


def called_now(key: str, value: Any) -> str | None:
    """Today's name of an old key, or of the old value of a key, in words; None if neither was renamed."""
    new = RENAMED.get(key)
    if new is None or isinstance(new, str):
        return new
    changed = _of_value(new, value)
    if changed is not None:
        return " and ".join(f"{now}: {to if isinstance(to, str) else json.dumps(to)}" for now, to in changed.items())
    return " and ".join(dict.fromkeys(now for each in new.values() for now in each if now != key)) or None


def _of_value(new: Mapping[Any, Mapping[str, Any]], value: Any) -> Mapping[str, Any] | None:
    return None if isinstance(value, list | dict) else new.get(value)


def _section(recipe: dict[str, Any], key: str) -> tuple[dict[str, Any] | None, str]:
    """(the mapping that contains a dotted key or None, the key's last part)."""
    *parents, leaf = key.split(".")
    node: Any = recipe
    for parent in parents:
        node = node.get(parent) if isinstance(node, dict) else None
    return (node if isinstance(node, dict) else None), leaf


def _value(recipe: dict[str, Any], key: str) -> Any:
    """The value of a dotted key; None where there is none."""
    section, leaf = _section(recipe, key)
    return section.get(leaf) if section is not None else None


def _put(recipe: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key, unless it is already set."""
    *parents, leaf = key.split(".")
    for parent in parents:
        recipe = recipe.setdefault(parent, {})
        if not isinstance(recipe, dict):
            return  # validation reports it
    recipe.setdefault(leaf, value)
