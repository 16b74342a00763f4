from __future__ import annotations

import json
import re
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from finetune.errors import UserError, UserErrors
from finetune.recipe import (
    ELSEWHERE_CALLED,
    NEAR_VALUES,
    RULES,
    SAME_VALUES,
    Recipe,
    canonical_value,
    dump_recipe,
    find_recipe,
    known_keys,
    read_recipe,
    shipped_recipes,
)

GOOD = "model:\n  name: some/model\ndata:\n  path: rows.jsonl\n"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def mistakes(tmp_path: Path, text: str, overrides: list[str] | None = None) -> list[UserError]:
    with pytest.raises(UserErrors) as caught:
        read_recipe(write(tmp_path, text), overrides)
    return caught.value.errors


def test_all_mistakes_at_once_each_with_its_line(tmp_path: Path) -> None:
    text = (
        "model:\n  nam: x\n  dtype: bf17\n"
        "data:\n  packin: true\n  heldout: many\n  path: a.jsonl\n"
        "train:\n  lr: -1\n  max_setps: 3\n  betas: [0.9]\n"
        "lora:\n  rank: 4\n"
    )
    found = {mistake.message: mistake for mistake in mistakes(tmp_path, text)}
    lines = {what: int(re.search(r":(\d+)$", mistake.where or "")[1]) for what, mistake in found.items()}
    assert lines == {
        "unknown key model.nam": 2,
        "invalid value for model.dtype": 3,
        "unknown key data.packin": 5,
        "invalid value for data.heldout": 6,
        "invalid value for train.lr": 9,
        "unknown key train.max_setps": 10,
        "invalid value for train.betas": 11,
        "unknown key lora": 12,
    }
    assert "model.name" in found["unknown key model.nam"].hint
    assert "did you mean bf16" in found["invalid value for model.dtype"].hint
    assert "> 0" in found["invalid value for train.lr"].hint
    assert "train.max_steps" in found["unknown key train.max_setps"].hint
    assert "adapter" in found["unknown key lora"].hint


def test_a_key_in_the_wrong_section_is_sent_to_the_right_one(tmp_path: Path) -> None:
    (mistake,) = mistakes(tmp_path, GOOD + "  rank: 3\n")
    assert "adapter.rank" in mistake.hint


def test_names_of_other_programs_are_known() -> None:
    assert set(ELSEWHERE_CALLED.values()) <= set(known_keys())


def values_of(key: str) -> tuple[str, ...]:
    return typing.get_args(known_keys()[key].annotation)


def test_values_of_other_programs_name_keys_and_values_that_exist() -> None:
    for key, called in SAME_VALUES.items():
        assert set(called.values()) <= set(values_of(key))
    for key, called in NEAR_VALUES.items():
        assert {word.split(",")[0] for word in called.values()} <= set(values_of(key))
        assert not set(called) & (set(values_of(key)) | set(SAME_VALUES.get(key, {}))), key
        assert set(re.findall(r"[a-z]+\.[a-z_]+", " ".join(called.values()))) <= set(known_keys())


@pytest.mark.parametrize(("key", "theirs", "ours"), [(k, t, o) for k, called in SAME_VALUES.items() for t, o in called.items()])
def test_values_that_mean_the_same_are_accepted_as_called_elsewhere(tmp_path: Path, key: str, theirs: str, ours: str) -> None:
    assert canonical_value(key, theirs) == canonical_value(key, ours) == ours
    given, here = (read_recipe(write(tmp_path, GOOD), [f"{key}={value}"]) for value in (theirs, ours))
    assert given == here
    assert f"{key.partition('.')[2]}: {ours}\n" in dump_recipe(given)


def test_a_value_that_is_called_otherwise_keeps_the_rest_of_its_section(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path, GOOD + "train:\n  optimizer: adamw_torch\n  precision: float32\n  lr: 1.0e-3\n"))
    assert (recipe.train.optimizer, recipe.train.precision, recipe.train.lr) == ("adamw", "fp32", 1e-3)
    assert canonical_value("model.dtype", "float64") == "float64"
    assert canonical_value("data.name", "float32") == "float32"
    assert canonical_value("model.dtype", ["float32"]) == ["float32"]


def test_a_value_that_may_not_mean_the_same_gets_a_hint(tmp_path: Path) -> None:
    for key, called in NEAR_VALUES.items():
        for theirs, hint in called.items():
            (mistake,) = mistakes(tmp_path, GOOD, [f"{key}={theirs}"])
            assert mistake.message == f"invalid value for {key}"
            assert f"did you mean {hint}?" in mistake.hint
    (mistake,) = mistakes(tmp_path, GOOD + "train:\n  schedule: cosine_with_min_lr\n")
    assert mistake.where.endswith(":6")
    assert mistake.hint.endswith("did you mean cosine, which ends at train.min_lr?")


def test_a_key_that_stands_twice_is_a_mistake(tmp_path: Path) -> None:
    (mistake,) = mistakes(tmp_path, GOOD + "model:\n  name: other\n")
    assert mistake.message == "duplicate key model"
    assert mistake.where.endswith(":5")


@pytest.mark.parametrize(
    "text", ["model: [", "- a\n- b\n", "a: &x [1]\nb: *y\n", "model:\n\tname: x\n", "!!python/object:os.system {}\n"]
)
def test_what_is_no_recipe(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError):
        read_recipe(write(tmp_path, text))


def test_a_yaml_bomb_is_refused(tmp_path: Path) -> None:
    text = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    text += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    with pytest.raises(UserError, match="10000"):
        read_recipe(write(tmp_path, text))


def test_overrides(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path, GOOD), ["train.lr=1e-4", "adapter.targets=[q_proj, v_proj]", "data.system=Be brief."])
    assert recipe.train.lr == 1e-4
    assert recipe.adapter.targets == ["q_proj", "v_proj"]
    assert recipe.data.system == "Be brief."


def test_a_wrong_override_says_that_it_is_of_the_command_line(tmp_path: Path) -> None:
    (mistake,) = mistakes(tmp_path, GOOD, ["train.lr=fast"])
    assert mistake.where == "command line, train.lr"
    for bad in ("train.lr", "=3", "train lr=3"):
        with pytest.raises(UserError, match=r"section\.key=value"):
            read_recipe(write(tmp_path, GOOD), [bad])


def test_quantized_full_training_is_refused_on_its_line(tmp_path: Path) -> None:
    (mistake,) = mistakes(tmp_path, GOOD + "quant:\n  scheme: nf4\nadapter: {kind: none}\n")
    assert "full fine-tuning" in mistake.message
    assert mistake.where.endswith("recipe.yaml:6")


def test_each_broken_rule_is_told_once_with_the_line_of_its_key(tmp_path: Path) -> None:
    text = (
        "kind: pretrain\n" + GOOD + "  packing: false\n  system: Be brief.\n"
        "train:\n  epochs: 2\n  optimizer_in_backward: true\n  accumulation: 4\n  max_grad_norm: 0\n"
        "twin: true\n"
    )
    found = mistakes(tmp_path, text, ["quant.warmup=0.5"])
    lines = [(mistake.message.split(" ")[0].strip(":"), (mistake.where or "").rpartition("recipe.yaml:")[2]) for mistake in found]
    assert sorted(lines) == sorted(
        [
            ("kind", "1"),
            ("data.packing", "6"),
            ("data.system", "7"),
            ("train.epochs", "9"),
            ("train.optimizer_in_backward", "10"),
            ("quant.warmup", "command line, quant.warmup"),
            ("twin", "13"),
            ("twin", "13"),
        ]
    )
    assert len({mistake.message for mistake in found}) == len(found)


def test_a_rule_of_a_key_that_is_not_given_points_at_its_section_or_the_beginning(tmp_path: Path) -> None:
    keys = "train: {load_best_at_end: true, optimizer_in_backward: true, eval_steps: 2, save_steps: 2}\n"
    (mistake,) = mistakes(tmp_path, GOOD + keys + "adapter: {kind: none}\n")
    assert "train.max_grad_norm: 0" in mistake.message
    assert mistake.where.endswith("recipe.yaml:5")
    (mistake,) = mistakes(tmp_path, GOOD, ["kind=pretrain"])
    assert mistake.where == "command line, kind"
    (mistake,) = mistakes(tmp_path, "# a comment\n" + GOOD, ["quant={scheme: ternary}", "export={formats: [gguf-tq2_0]}",
                          "run.merge=false"])  # fmt: skip
    assert mistake.where == "command line, export"


def test_every_rule_names_a_key_of_the_schema_and_speaks_of_it() -> None:
    rules = [rule for rows in RULES.values() for rule in rows]
    assert len(rules) > 40
    assert {rule.key for rule in rules} <= set(known_keys())
    assert len({rule.message for rule in rules}) == len(rules)
    good = Recipe.model_validate({"model": {"name": "some/model"}, "data": {"path": "rows.jsonl"}})
    assert [rule.message for rule in rules if rule.when(good)] == []


@pytest.mark.parametrize(
    ("keys", "frozen", "adapter_files", "mergeable", "quantized"),
    [
        ({}, True, True, True, False),
        ({"quant": {"scheme": "nf4"}}, True, True, True, False),
        ({"quant": {"scheme": "ternary"}}, True, True, True, False),
        ({"adapter": {"kind": "none"}}, False, False, False, False),
        ({"adapter": {"kind": "none"}, "quant": {"scheme": "ternary"}}, False, False, False, True),
    ],
)
def test_facts_of_what_is_trained(
    keys: dict[str, Any], frozen: bool, adapter_files: bool, mergeable: bool, quantized: bool
) -> None:
    recipe = Recipe.model_validate({"model": {"name": "some/model"}, "data": {"path": "rows.jsonl"}, **keys})
    assert (recipe.base_frozen, recipe.writes_adapter, recipe.mergeable, recipe.trains_quantized) == (
        frozen,
        adapter_files,
        mergeable,
        quantized,
    )
    assert not recipe.streams_text
    text = {"kind": "pretrain", "adapter": {"kind": "lora"}, "train": {"max_steps": 1}}
    assert Recipe.model_validate({"model": {"name": "some/model"}, "data": {"path": "a.txt"}, **text}).streams_text


def test_every_field_says_its_effect() -> None:
    keys = known_keys()
    assert len(keys) > 50
    assert [key for key, field in keys.items() if not field.description] == []


def test_the_resolved_recipe_reads_back_equal(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path, GOOD), ["train.betas=[0.8,0.95]"])
    assert read_recipe(write(tmp_path, dump_recipe(recipe))) == recipe


def test_every_shipped_recipe_is_good() -> None:
    paths = shipped_recipes()
    assert {path.stem for path in paths} >= {"quickstart", "llama7b-qlora-alpaca"}
    for path in paths:
        recipe = read_recipe(path)
        assert recipe.about, path
        # A key that only repeats its default is noise, except where the recipe teaches by it: the sections must be used.
        assert set(yaml.safe_load(path.read_text())) <= set(Recipe.model_fields), path


def test_recipes_are_found_by_name_and_near_misses_are_named() -> None:
    assert find_recipe("quickstart").samefile(find_recipe("recipes/quickstart.yaml"))
    with pytest.raises(UserError, match="quickstart"):
        find_recipe("quikstart")


def test_schema_covers_every_key() -> None:
    schema = json.dumps(Recipe.model_json_schema(), ensure_ascii=False)
    for key, field in known_keys().items():
        assert f'"{key.rpartition(".")[2]}"' in schema
        if not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            assert field.description.split(".")[0][:40] in schema
