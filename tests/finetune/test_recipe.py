from __future__ import annotations

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

VALID = "model:\n  name: some/model\ndata:\n  path: rows.jsonl\n"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def mistakes(tmp_path: Path, text: str, overrides: list[str] | None = None) -> list[UserError]:
    with pytest.raises(UserErrors) as raised:
        read_recipe(write(tmp_path, text), overrides)
    return raised.value.errors


def test_all_mistakes_are_reported_at_once_with_their_lines(tmp_path: Path) -> None:
    text = (
        "model:\n  nam: x\n  dtype: bf17\n"
        "data:\n  packin: true\n  heldout: many\n  path: a.jsonl\n"
        "train:\n  lr: -1\n  max_setps: 3\n  betas: [0.9]\n"
        "lora:\n  rank: 4\n"
    )
    by_message = {mistake.message: mistake for mistake in mistakes(tmp_path, text)}
    lines = {message: int(re.search(r":(\d+)$", mistake.where or "")[1]) for message, mistake in by_message.items()}
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
    assert "model.name" in by_message["unknown key model.nam"].hint
    assert "did you mean bf16" in by_message["invalid value for model.dtype"].hint
    assert "> 0" in by_message["invalid value for train.lr"].hint
    assert "train.max_steps" in by_message["unknown key train.max_setps"].hint
    assert "adapter" in by_message["unknown key lora"].hint


def test_key_in_the_wrong_section_gets_a_hint_to_the_right_one(tmp_path: Path) -> None:
    (mistake,) = mistakes(tmp_path, VALID + "  rank: 3\n")
    assert "adapter.rank" in mistake.hint


def test_key_names_of_other_programs_map_to_existing_keys() -> None:
    assert set(ELSEWHERE_CALLED.values()) <= set(known_keys())


def values_of(key: str) -> tuple[str, ...]:
    return typing.get_args(known_keys()[key].annotation)


def test_values_of_other_programs_map_to_existing_keys_and_values() -> None:
    for key, aliases in SAME_VALUES.items():
        assert set(aliases.values()) <= set(values_of(key))
    for key, aliases in NEAR_VALUES.items():
        assert {suggestion.split(",")[0] for suggestion in aliases.values()} <= set(values_of(key))
        assert not set(aliases) & (set(values_of(key)) | set(SAME_VALUES.get(key, {}))), key
        assert set(re.findall(r"[a-z]+\.[a-z_]+", " ".join(aliases.values()))) <= set(known_keys())


@pytest.mark.parametrize(("key", "alias", "value"), [(k, t, o) for k, aliases in SAME_VALUES.items() for t, o in aliases.items()])
def test_equivalent_values_of_other_programs_are_accepted(tmp_path: Path, key: str, alias: str, value: str) -> None:
    assert canonical_value(key, alias) == canonical_value(key, value) == value
    with_alias, with_own_name = (read_recipe(write(tmp_path, VALID), [f"{key}={given}"]) for given in (alias, value))
    assert with_alias == with_own_name
    assert f"{key.partition('.')[2]}: {value}\n" in dump_recipe(with_alias)


def test_replacing_an_equivalent_value_keeps_the_rest_of_its_section(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path, VALID + "train:\n  optimizer: adamw_torch\n  precision: float32\n  lr: 1.0e-3\n"))
    assert (recipe.train.optimizer, recipe.train.precision, recipe.train.lr) == ("adamw", "fp32", 1e-3)
    assert canonical_value("model.dtype", "float64") == "float64"
    assert canonical_value("data.name", "float32") == "float32"
    assert canonical_value("model.dtype", ["float32"]) == ["float32"]


def test_similar_value_of_another_program_gets_a_hint(tmp_path: Path) -> None:
    for key, aliases in NEAR_VALUES.items():
        for alias, hint in aliases.items():
            (mistake,) = mistakes(tmp_path, VALID, [f"{key}={alias}"])
            assert mistake.message == f"invalid value for {key}"
            assert f"did you mean {hint}?" in mistake.hint
    (mistake,) = mistakes(tmp_path, VALID + "train:\n  schedule: cosine_with_min_lr\n")
    assert mistake.where.endswith(":6")
    assert mistake.hint.endswith("did you mean cosine, which ends at train.min_lr?")


def test_duplicate_key_is_a_mistake(tmp_path: Path) -> None:
    (mistake,) = mistakes(tmp_path, VALID + "model:\n  name: other\n")
    assert mistake.message == "duplicate key model"
    assert mistake.where.endswith(":5")


@pytest.mark.parametrize(
    "text", ["model: [", "- a\n- b\n", "a: &x [1]\nb: *y\n", "model:\n\tname: x\n", "!!python/object:os.system {}\n"]
)
def test_text_that_is_not_a_recipe_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError):
        read_recipe(write(tmp_path, text))


def test_a_yaml_bomb_is_refused(tmp_path: Path) -> None:
    text = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    text += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    with pytest.raises(UserError, match="10000"):
        read_recipe(write(tmp_path, text))


def test_overrides_replace_values_of_the_file(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path, VALID), ["train.lr=1e-4", "adapter.targets=[q_proj, v_proj]", "data.system=Be brief."])
    assert recipe.train.lr == 1e-4
    assert recipe.adapter.targets == ["q_proj", "v_proj"]
    assert recipe.data.system == "Be brief."


def test_mistake_in_an_override_points_at_the_command_line(tmp_path: Path) -> None:
    (mistake,) = mistakes(tmp_path, VALID, ["train.lr=fast"])
    assert mistake.where == "command line, train.lr"
    for malformed in ("train.lr", "=3", "train lr=3"):
        with pytest.raises(UserError, match=r"section\.key=value"):
            read_recipe(write(tmp_path, VALID), [malformed])


def test_quantized_full_training_is_refused_on_its_line(tmp_path: Path) -> None:
    (mistake,) = mistakes(tmp_path, VALID + "quant:\n  scheme: nf4\nadapter: {kind: none}\n")
    assert "full fine-tuning" in mistake.message
    assert mistake.where.endswith("recipe.yaml:6")


def test_each_broken_rule_is_reported_once_with_the_line_of_its_key(tmp_path: Path) -> None:
    text = (
        "kind: pretrain\n" + VALID + "  packing: false\n  system: Be brief.\n"
        "train:\n  epochs: 2\n  optimizer_in_backward: true\n  accumulation: 4\n  max_grad_norm: 0\n"
        "twin: true\n"
    )
    broken = mistakes(tmp_path, text, ["quant.warmup=0.5"])
    lines = [
        (mistake.message.split(" ")[0].strip(":"), (mistake.where or "").rpartition("recipe.yaml:")[2]) for mistake in broken
    ]
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
    assert len({mistake.message for mistake in broken}) == len(broken)


def test_rule_of_an_absent_key_points_at_its_section_or_override(tmp_path: Path) -> None:
    keys = "train: {load_best_at_end: true, optimizer_in_backward: true, eval_steps: 2, save_steps: 2}\n"
    (mistake,) = mistakes(tmp_path, VALID + keys + "adapter: {kind: none}\n")
    assert "train.max_grad_norm: 0" in mistake.message
    assert mistake.where.endswith("recipe.yaml:5")
    (mistake,) = mistakes(tmp_path, VALID, ["kind=pretrain"])
    assert mistake.where == "command line, kind"
    (mistake,) = mistakes(tmp_path, "# a comment\n" + VALID, ["quant={scheme: ternary}", "export={formats: [gguf-tq2_0]}",
                          "run.merge=false"])  # fmt: skip
    assert mistake.where == "command line, export"


def test_every_rule_has_an_existing_key_and_its_own_message() -> None:
    rules = [rule for rows in RULES.values() for rule in rows]
    assert len(rules) > 40
    assert {rule.key for rule in rules} <= set(known_keys())
    assert len({rule.message for rule in rules}) == len(rules)
    valid = Recipe.model_validate({"model": {"name": "some/model"}, "data": {"path": "rows.jsonl"}})
    assert [rule.message for rule in rules if rule.when(valid)] == []


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
def test_derived_properties_follow_from_adapter_and_quantization(
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
    pretraining = {"kind": "pretrain", "adapter": {"kind": "lora"}, "train": {"max_steps": 1}}
    assert Recipe.model_validate({"model": {"name": "some/model"}, "data": {"path": "a.txt"}, **pretraining}).streams_text


def test_every_key_has_a_description() -> None:
    keys = known_keys()
    assert len(keys) > 50
    assert [key for key, field in keys.items() if not field.description] == []


def test_dumped_recipe_reads_back_equal(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path, VALID), ["train.betas=[0.8,0.95]"])
    assert read_recipe(write(tmp_path, dump_recipe(recipe))) == recipe


def test_shipped_recipes_are_valid_and_described() -> None:
    paths = shipped_recipes()
    assert {path.stem for path in paths} >= {"quickstart", "llama7b-qlora-alpaca"}
    for path in paths:
        recipe = read_recipe(path)
        assert recipe.about, path
        # Keys may repeat their defaults, to teach; the sections must be those of the schema.
        assert set(yaml.safe_load(path.read_text())) <= set(Recipe.model_fields), path


def test_recipes_are_found_by_name_and_misspelled_names_get_a_hint() -> None:
    assert find_recipe("quickstart").samefile(find_recipe("recipes/quickstart.yaml"))
    with pytest.raises(UserError, match="quickstart"):
        find_recipe("quikstart")


def test_schema_covers_every_key() -> None:
    schema = Recipe.model_json_schema()

    def resolved(node: dict[str, Any]) -> dict[str, Any]:
        return schema["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node

    for key, field in known_keys().items():
        node = schema
        for part in key.split("."):
            node = resolved(node)["properties"][part]
        if not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            assert node["description"].startswith(field.description.split(".")[0][:40])
