"""Runs, plans and benchmarks build the same model, and a checkpoint opens as that model."""

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


def describe(model: Any) -> dict[str, Any]:
    """Module types by path, and shape, dtype and requires_grad of each parameter."""
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

    recorded: dict[str, Any] = {}
    original_build, original_set_up = build.build, train.set_up

    def recording_build(*arguments: Any) -> Any:
        result = original_build(*arguments)
        built = result[0]
        recorded["run"] = describe(built.model) | {"left": built.swap.left, "targets": built.targets}
        return result

    def recording_set_up(run: Any, checked: Any, built: Any, patches: Any) -> Any:
        result = original_set_up(run, checked, built, patches)
        recorded["patches"], recorded["teacher"] = patches.in_words(), result[0].teacher is not None
        return result

    monkeypatch.setattr(build, "build", recording_build)
    monkeypatch.setattr(train, "set_up", recording_set_up)
    pipeline.run(recipe, "run")

    assembled = assemble(recipe, torch.device("cpu"), tmp_path)
    assembled.patches.remove()
    assert (
        describe(assembled.built.model) | {"left": assembled.built.swap.left, "targets": assembled.built.targets}
        == recorded["run"]
    )
    assert assembled.patches.in_words() == recorded["patches"]
    assert (assembled.setup.teacher is not None) == recorded["teacher"] == (recipe.distill.teacher is not None)

    device = step.DeviceSpec("cpu", weights_dtype(recipe, "cpu"), None, compiled=False)
    planned = step.build_on_meta(recipe, assembled.inputs.source, assembled.inputs.config, device)
    assert describe(planned.model) | {"left": planned.swap.left, "targets": planned.targets} == recorded["run"]
    micro_batch = step.MicroBatch((1, 32), (0, 32), 31)
    teacher = (None, assembled.inputs.config) if recipe.distill.teacher is not None else None
    traced = step.trace(recipe, assembled.inputs.source, assembled.inputs.config, device, micro_batch, teacher=teacher)
    assert traced.fast == recorded["patches"]
    assert (traced.static.parameters, traced.static.trainable) == (assembled.built.parameters, assembled.built.trainable)


def test_checkpoint_opens_as_the_trained_model(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune import pipeline
    from finetune.models.load import load_model
    from finetune.stages import merge

    recorded: dict[str, Any] = {}
    finish = merge.finish

    def recording_finish(run: Any, checked: Any, built: Any, after: Any) -> Any:
        recorded["model"] = describe(built.model)
        recorded["weights"] = {name: p.detach().clone() for name, p in built.model.named_parameters()}
        return finish(run, checked, built, after)

    monkeypatch.setattr(merge, "finish", recording_finish)
    folder = pipeline.run(recipe, "run").path
    loaded = load_model(str(folder / "checkpoints" / "step-000001")).model
    assert describe(loaded)["modules"] == recorded["model"]["modules"]
    assert {name: (tuple(p.shape), p.dtype) for name, p in loaded.named_parameters()} == {
        name: values[:2] for name, values in recorded["model"]["parameters"].items()
    }
    assert all(torch.equal(p, recorded["weights"][name]) for name, p in loaded.named_parameters())
