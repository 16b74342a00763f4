"""One assembly: what a run trains is what its plan has traced, what a benchmark trains, and what its checkpoint opens as."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.recipe import Recipe, read_recipe
from tests.conftest import story

NF4 = """\
model: {{name: {model}, dtype: fp32}}
quant: {{scheme: nf4, keep: ["*.v_proj"]}}
adapter: {{rank: 2, alpha: 4, targets: [q_proj, down_proj]}}
data: {{path: {rows}, heldout: 4, max_length: 64, packing: false}}
train: {{max_steps: 1, checkpointing: true}}
eval: {{samples: 0}}
run: {{dir: {run}, device: cpu, merge: false}}
fast: {{compile: false}}
"""
SUB_NORMS = """\
kind: pretrain
model: {{name: {model}}}
quant: {{scheme: ternary, sub_norms: true, warmup: 0.5}}
distill: {{teacher: {model}, layer: 0}}
data: {{path: {text}, max_length: 32, heldout: 2}}
train: {{max_steps: 1, lr: 1.0e-4}}
eval: {{samples: 0}}
run: {{dir: {run}, device: cpu}}
fast: {{compile: false}}
"""


def described(model: Any) -> dict[str, Any]:
    """Modules by path, and the shape, dtype and part in training of each parameter."""
    return {
        "modules": {path: type(module).__name__ for path, module in model.named_modules()},
        "parameters": {name: (tuple(p.shape), p.dtype, p.requires_grad) for name, p in model.named_parameters()},
    }


@pytest.fixture(params=["nf4", "sub-norms and a teacher"])
def recipe(request: pytest.FixtureRequest, tmp_path: Path, tiny_model: Path, rows_file: Path) -> Recipe:
    (tmp_path / "story.txt").write_text(story(20_000))
    path = tmp_path / "recipe.yaml"
    text = NF4 if request.param == "nf4" else SUB_NORMS
    path.write_text(text.format(model=tiny_model, rows=rows_file, text=tmp_path / "story.txt", run=tmp_path / "run"))
    return read_recipe(path)


def test_run_plan_and_bench_build_the_same_model(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune import pipeline
    from finetune.assembly import assemble
    from finetune.models.precision import weights_dtype
    from finetune.planning import step
    from finetune.stages import build, train

    seen: dict[str, Any] = {}
    built_by_run, set_up_by_run = build.build, train.set_up

    def watched_build(*arguments: Any) -> Any:
        result = built_by_run(*arguments)
        built = result[0]
        seen["run"] = described(built.model) | {"left": built.swap.left, "targets": built.targets}
        return result

    def watched_set_up(run: Any, checked: Any, built: Any, patches: Any) -> Any:
        result = set_up_by_run(run, checked, built, patches)
        seen["patches"], seen["teacher"] = patches.in_words(), result[0].teacher is not None
        return result

    monkeypatch.setattr(build, "build", watched_build)
    monkeypatch.setattr(train, "set_up", watched_set_up)
    pipeline.run(recipe, "run")

    made = assemble(recipe, torch.device("cpu"), tmp_path)
    made.patches.remove()
    assert described(made.built.model) | {"left": made.built.swap.left, "targets": made.built.targets} == seen["run"]
    assert made.patches.in_words() == seen["patches"]
    assert (made.setup.teacher is not None) == seen["teacher"] == (recipe.distill.teacher is not None)

    place = step.DeviceSpec("cpu", weights_dtype(recipe, "cpu"), None, compiled=False)
    planned = step.build_on_meta(recipe, made.inputs.source, made.inputs.config, place)
    assert described(planned.model) | {"left": planned.swap.left, "targets": planned.targets} == seen["run"]
    micro = step.MicroBatch((1, 32), (0, 32), 31)
    teacher = (None, made.inputs.config) if recipe.distill.teacher is not None else None
    traced = step.trace(recipe, made.inputs.source, made.inputs.config, place, micro, teacher=teacher)
    assert traced.fast == seen["patches"]
    assert (traced.static.parameters, traced.static.trainable) == (made.built.parameters, made.built.trainable)


def test_a_checkpoint_opens_as_the_model_that_was_trained(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune import pipeline
    from finetune.models.load import load_model
    from finetune.stages import merge

    seen: dict[str, Any] = {}
    finish = merge.finish

    def watched(run: Any, checked: Any, built: Any, after: Any) -> Any:
        seen["model"] = described(built.model)
        seen["weights"] = {name: p.detach().clone() for name, p in built.model.named_parameters()}
        return finish(run, checked, built, after)

    monkeypatch.setattr(merge, "finish", watched)
    folder = pipeline.run(recipe, "run").path
    opened = load_model(str(folder / "checkpoints" / "step-000001")).model
    assert described(opened)["modules"] == seen["model"]["modules"]
    assert {name: (tuple(p.shape), p.dtype) for name, p in opened.named_parameters()} == {
        name: values[:2] for name, values in seen["model"]["parameters"].items()
    }
    assert all(torch.equal(p, seen["weights"][name]) for name, p in opened.named_parameters())
