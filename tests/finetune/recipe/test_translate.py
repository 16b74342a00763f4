from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.errors import UserErrors
from finetune.recipe import Recipe, dump_recipe, known_keys, read_recipe, read_resolved
from finetune.recipe.translate import OF_FIRST_VERSION, RENAMED, called_now, translate

# Names that an invented older version had for keys and values of this one.
OLDER_NAMES: dict[str, Any] = {
    "train.speed": "train.lr",
    "where": "run.dir",
    "base": "model",
    "train.order": {"curved": {"train.schedule": "cosine"}, "straight": {"train.schedule": "linear"}},
    "train.on_bad_step": {"leave_out": {"train.on_bad_step": "skip"}},
    "train.small": {True: {"train.optimizer": "adamw_8bit", "train.checkpointing": True}, False: {}},
}


@pytest.fixture
def older_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, new in OLDER_NAMES.items():
        monkeypatch.setitem(RENAMED, key, new)


def write(tmp_path: Path, content: dict[str, Any]) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def resolved_recipe() -> dict[str, Any]:
    recipe = Recipe.model_validate({"model": {"name": "some/model"}, "data": {"path": "rows.jsonl"}})
    return yaml.safe_load(dump_recipe(recipe))  # type: ignore[no-any-return]


def test_recipe_of_the_current_version_is_unchanged() -> None:
    assert translate(resolved_recipe()) == resolved_recipe()
    assert translate({}) == {}


def test_rename_table_maps_removed_names_to_existing_keys() -> None:
    for old, new in RENAMED.items():
        targets = {new} if isinstance(new, str) else {key for each in new.values() for key in each}
        assert targets <= set(known_keys())
        assert old not in known_keys() or (not isinstance(new, str) and old in targets), old


@pytest.mark.usefixtures("older_names")
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"train": {"speed": 1e-3, "warmup": 0.1}}, {"train": {"lr": 1e-3, "warmup": 0.1}}),
        ({"where": "runs/one"}, {"run": {"dir": "runs/one"}}),
        ({"where": "runs/one", "run": {"seed": 3}}, {"run": {"dir": "runs/one", "seed": 3}}),
        ({"base": {"name": "some/model"}}, {"model": {"name": "some/model"}}),
        ({"train": {"order": "curved"}}, {"train": {"schedule": "cosine"}}),
        ({"train": {"order": "unheard of"}}, {"train": {"order": "unheard of"}}),
        ({"train": {"on_bad_step": "leave_out"}}, {"train": {"on_bad_step": "skip"}}),
        ({"train": {"on_bad_step": "stop"}}, {"train": {"on_bad_step": "stop"}}),
        ({"train": {"small": True}}, {"train": {"optimizer": "adamw_8bit", "checkpointing": True}}),
        ({"train": {"small": False}}, {"train": {}}),
        ({"train": {"small": [1]}}, {"train": {"small": [1]}}),
        ({"train": {"speed": 1e-3, "lr": 2e-3}}, {"train": {"lr": 2e-3}}),  # the new name wins
        ({"train": 5, "where": "x", "run": 7}, {"train": 5, "run": 7}),  # invalid; reading it raises
    ],
)
def test_translate_renames_keys_and_values(old: dict[str, Any], new: dict[str, Any]) -> None:
    original = copy.deepcopy(old)
    assert translate(old) == new
    assert old == original


@pytest.mark.usefixtures("older_names")
def test_recipe_in_a_run_folder_of_an_older_version_is_readable(tmp_path: Path) -> None:
    current = resolved_recipe()
    old = copy.deepcopy(current)
    old["train"]["speed"] = old["train"].pop("lr")
    old["train"]["order"], _ = "curved", old["train"].pop("schedule")
    old["train"]["on_bad_step"] = "leave_out"
    old["base"] = old.pop("model")
    path = write(tmp_path, old)
    assert read_resolved(path) == Recipe.model_validate(current)
    assert read_resolved(path, ["train.lr=1e-3"]).train.lr == 1e-3
    with pytest.raises(UserErrors, match=r"unknown key train\.speed[\s\S]*did you mean train\.lr\?"):
        read_resolved(path, ["train.speed=1e-3"])


@pytest.mark.usefixtures("older_names")
def test_old_key_in_a_user_recipe_gets_a_hint_with_the_new_key(tmp_path: Path) -> None:
    content = resolved_recipe() | {"where": "runs/one"}
    content["train"] |= {"speed": 1e-3, "small": True, "on_bad_step": "leave_out"}
    with pytest.raises(UserErrors) as caught:
        read_recipe(write(tmp_path, content))
    hints = {error.message: str(error.hint).rpartition("did you mean ")[2] for error in caught.value.errors}
    assert hints == {
        "unknown key where": "run.dir?",
        "unknown key train.speed": "train.lr?",
        "unknown key train.small": "train.optimizer: adamw_8bit and train.checkpointing: true?",
        "invalid value for train.on_bad_step": "train.on_bad_step: skip?",
    }
    assert called_now("train.order", "unheard of") == "train.schedule"
    assert called_now("train.on_bad_step", "unheard of") is None
    assert called_now("train.lr", 1) is None


@pytest.mark.parametrize("old_key", OF_FIRST_VERSION)
@pytest.mark.parametrize(
    ("kind", "adapter", "dtype", "precision", "expected"),
    [
        ("sft", "none", "auto", "auto", "fp32"),
        ("sft", "none", "fp32", "auto", "fp32"),
        ("sft", "none", "bf16", "auto", "auto"),
        ("sft", "none", "fp32", "bf16", "bf16"),
        ("sft", "none", "auto", "fp32", "fp32"),
        ("sft", "lora", "auto", "auto", "auto"),
        ("sft", "lora", "fp32", "auto", "auto"),
        ("pretrain", "none", "auto", "auto", "auto"),
        ("pretrain", "none", "fp32", "auto", "auto"),
        ("pretrain", "lora", "fp32", "auto", "bf16"),
        ("pretrain", "lora", "fp32", "fp32", "fp32"),
        ("pretrain", "lora", "auto", "auto", "auto"),
        ("pretrain", "lora", "bf16", "auto", "auto"),
    ],
)
def test_run_of_the_first_version_keeps_its_precision(
    monkeypatch: pytest.MonkeyPatch, old_key: str, kind: str, adapter: str, dtype: str, precision: str, expected: str
) -> None:
    monkeypatch.setitem(RENAMED, old_key, "train.marked")
    recipe = {
        "kind": kind,
        "adapter": {"kind": adapter},
        "model": {"dtype": dtype},
        "data": {},
        "train": {"precision": precision},
    }
    assert translate(recipe)["train"]["precision"] == precision
    section, _, key = old_key.partition(".")
    recipe[section][key] = "as it was"  # type: ignore[index]
    translated = translate(recipe)
    assert translated["train"] == {"precision": expected, "marked": "as it was"}
    assert translated["model"] == {"dtype": dtype}
