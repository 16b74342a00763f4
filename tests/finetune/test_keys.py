"""Every key of the recipe is read by something: each is changed, and the run that comes out is another one.

A run is reduced to what it left behind and to what was handed to the loop; the recipe itself is not part of it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import BaseModel

from finetune.errors import Stop
from finetune.recipe import known_keys, read_recipe
from tests.conftest import alpaca, story, write_jsonl

BASE: dict[str, Any] = {
    "model": {"dtype": "fp32"},
    "quant": {"scheme": "nf4"},
    "adapter": {"rank": 4},
    "data": {"max_length": 96, "heldout": 4, "max_rows": 20},
    "train": {"max_steps": 2, "lr": 1e-3},
    "eval": {"samples": 0, "max_new_tokens": 4},
    "run": {"device": "cpu", "merge": False, "threads": 2},
}

LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip
# Ternary by pretraining on a text: from a model that exists, and from scratch.
TERNARY: dict[str, Any] = {
    "kind": "pretrain", "quant.scheme": "ternary", "adapter.kind": "none", "data.path": "STORY", "data.max_length": 32,
    "data.max_rows": None, "train.save_steps": None,
}  # fmt: skip
SCRATCH = TERNARY | {"model.name": None, "model.config": LLAMA, "tokenizer.train": 300}
TAUGHT = TERNARY | {"distill.teacher": "OTHER_MODEL"}

# key → (its other value, what else must be set on both sides for it to matter)
CHANGES: dict[str, tuple[Any, dict[str, Any]]] = {
    "kind": ("pretrain", {"data.path": "STORY", "data.max_rows": None, "data.max_length": 300, "adapter.kind": "lora"}),
    "about": ("a sentence", {}),
    "model.name": ("OTHER_MODEL", {}),
    "model.revision": ("v2", {}),
    "model.dtype": ("bf16", {}),
    "model.attention": ("eager", {}),
    "model.stream": ("disk", {"train.checkpointing": True}),
    "model.config": (LLAMA | {"intermediate_size": 64}, SCRATCH),
    "tokenizer.name": ("OTHER_MODEL", SCRATCH),
    "tokenizer.train": (290, SCRATCH),
    "quant.scheme": ("none", {}),
    "quant.rms_norm": (True, SCRATCH),
    "quant.sub_norms": (True, TERNARY),
    "quant.warmup": (0.6, TERNARY),
    "quant.warmup_shape": ("cosine", TERNARY | {"quant.warmup": 0.9, "train.max_steps": 4}),
    "distill.teacher": ("OTHER_MODEL", TERNARY),
    "distill.logits": (2.0, TAUGHT),
    "distill.temperature": (2.0, TAUGHT),
    "distill.relations": (0.0, TAUGHT),
    "distill.layer": (0, TAUGHT),
    "quant.double": (False, {}),
    "quant.keep": (["*.o_proj"], {}),
    "adapter.kind": ("none", {"quant.scheme": "none"}),
    "adapter.rank": (2, {}),
    "adapter.alpha": (8, {}),
    "adapter.dropout": (0.5, {}),
    "adapter.targets": (["q_proj", "v_proj"], {}),
    "adapter.rslora": (True, {}),
    "adapter.dora": (True, {}),
    "data.name": ("package:chatterbot-corpus", {"data.path": None, "data.name": "HUB", "data.bad_rows": "skip"}),
    "data.path": ("OTHER_ROWS", {}),
    "data.files": (
        ["*/english/coding.yml"],
        {"data.path": None, "data.name": "package:chatterbot-corpus", "data.bad_rows": "skip"},
    ),
    "data.revision": ("v2", TERNARY | {"data.path": None, "data.name": "TEXTS"}),
    "data.split": ("test", {"data.path": None, "data.name": "HUB"}),
    "data.format": ("text", {}),
    "data.text_key": ("body", SCRATCH | {"data.path": "TWO_TEXTS"}),
    "data.template": ("alpaca", {}),
    "data.system": ("Be brief.", {}),
    "data.learn": ("everything", {}),
    "data.max_rows": (15, {}),
    "data.max_length": (64, {}),
    "data.too_long": ("drop", {"data.max_length": 50}),
    "data.bad_rows": ("skip", {"data.path": "MIXED_ROWS"}),
    "data.dedupe": (False, {"data.path": "TWICE"}),
    "data.heldout": (6, {}),
    "data.heldout_path": ("OTHER_ROWS", {}),
    "data.packing": (False, {}),
    "train.epochs": (1.5, {"train.max_steps": None, "data.max_rows": 8, "data.packing": False}),
    "train.max_steps": (3, {}),
    "train.max_tokens": (96, SCRATCH | {"train.max_steps": None, "train.max_tokens": 64}),
    "train.micro_batch": (2, {}),
    "train.accumulation": (2, {}),
    "train.lr": (2e-3, {}),
    "train.twin_lr": (1e-5, SCRATCH | {"twin": True}),
    "train.schedule": ("constant", {}),
    "train.warmup": (0.9, {}),
    "train.min_lr": (0.5, {}),
    "train.weight_decay": (0.5, {"train.max_steps": 4}),
    "train.optimizer": ("adamw_8bit", {}),
    "train.betas": ([0.5, 0.9], {}),
    "train.eps": (1e-2, {}),
    "train.max_grad_norm": (1e-4, {"train.eps": 1.0}),
    "train.stochastic_rounding": (True, SCRATCH | {"model.dtype": "bf16"}),
    "train.step_in_backward": (True, SCRATCH | {"train.max_grad_norm": 0, "train.save_steps": 2}),
    "train.loss_chunk": (7, SCRATCH),
    "train.health_steps": (1, SCRATCH),
    "train.checkpointing": (True, {}),
    "train.precision": ("bf16", {}),
    "train.save_steps": (1, {}),
    "train.keep_checkpoints": (1, {"train.save_steps": 1}),
    "train.eval_steps": (1, {}),
    "train.best": ("keep", {"train.eval_steps": 1}),
    "fast.attention": (False, {}),
    "fast.lora": (False, {}),
    "fast.blocks": (False, {}),
    "fast.compile": (False, {}),
    "twin": (True, SCRATCH),
    "eval.samples": (1, {}),
    "eval.prompts": (["Hello?"], {}),
    "eval.max_new_tokens": (2, {"eval.samples": 1}),
    "eval.batch_tokens": (128, {}),
    "eval.merge_rows": (2, {"run.merge": True}),
    "eval.merge_limit": (0.5, {"run.merge": True}),
    "eval.tasks": (["tiny_sums"], {"eval.include_path": "TASKS", "eval.limit": 2}),
    "eval.include_path": (None, {"eval.include_path": "TASKS", "eval.tasks": ["tiny_sums"], "eval.limit": 2}),
    "eval.limit": (1, {"eval.include_path": "TASKS", "eval.tasks": ["tiny_sums"], "eval.limit": 2}),
    "export.formats": (["bitnet"], SCRATCH),
    "export.gate_tokens": (20, SCRATCH),
    "plan.memory": ("100MB", {}),
    "run.dir": ("OTHER_DIR", {}),
    "run.seed": (18, {}),
    "run.device": ("cuda", {}),
    "run.threads": (1, {}),
    "run.merge": (True, {}),
    "run.trackers": (["tensorboard"], {}),
}
# Tried on their own: in test_run.py, in plan/test_command.py, and with several processes in train/test_parallel.py.
BAD_STEPS = {"train.on_bad_step", "train.max_bad_steps", "train.spike"}  # there must be some: train/test_nothing_lost.py
ELSEWHERE = {"model.trust_remote_code", "fit", "plan.gpu", "plan.price_per_kwh", "run.parallel", *BAD_STEPS}

# The other value cannot run here: the refusal is what shows that the key is read.
REFUSED = {
    "model.revision",
    "data.revision",
    "eval.include_path",
    "plan.memory",
    *([] if torch.cuda.is_available() else ["run.device"]),
}

VOLATILE = {"provenance", "phases", "next", "error", "plan", "planned"}  # a plan knows every key; whether the run does is asked
CLOCK = {"tokens_per_second", "step_seconds", "memory_bytes", "time", "seconds", "saving_seconds", "peak_bytes"}


def leaves() -> list[str]:
    keys = known_keys()
    return [k for k, f in keys.items() if not (isinstance(f.annotation, type) and issubclass(f.annotation, BaseModel))]


def test_the_table_names_every_key() -> None:
    assert set(leaves()) == set(CHANGES) | ELSEWHERE


class Workshop:
    """Runs recipes in one process and keeps what came of them."""

    def __init__(self, folder: Path, model: Path, other_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.count = folder, 0
        self.done: dict[str, dict[str, Any]] = {}
        tasks = folder / "tasks"
        tasks.mkdir()
        sums = write_jsonl(tasks / "sums.jsonl", [{"question": f"{n} + 1 =", "answer": str(n + 1)} for n in range(4)])
        (tasks / "tiny_sums.yaml").write_text(
            f"task: tiny_sums\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: {sums}}}\ntest_split: test\n"
            "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: ['{{answer}}', '7']\ndoc_to_target: 0\n"
            "metric_list:\n  - metric: acc\n"
        )
        two = [
            {"text": a * 8, "body": b * 8} for a, b in zip(story(20_000).split("\n"), story(20_000, 1).split("\n"), strict=False)
        ]
        texts = folder / "texts"  # a folder stands in for a dataset of the hub, and has no revisions
        texts.mkdir()
        write_jsonl(texts / "train.jsonl", [{"text": line * 8} for line in story(20_000).split("\n") if line])
        hub = folder / "hub"
        hub.mkdir()
        write_jsonl(hub / "train.jsonl", alpaca(20))
        write_jsonl(hub / "test.jsonl", alpaca(20, start=200))
        self.names = {
            "OTHER_MODEL": str(other_model),
            "OTHER_ROWS": str(write_jsonl(folder / "other.jsonl", alpaca(20, start=500))),
            "MIXED_ROWS": str(write_jsonl(folder / "mixed.jsonl", [*alpaca(12), {"foo": 1}, *alpaca(6, start=50)])),
            "TWICE": str(write_jsonl(folder / "twice.jsonl", alpaca(10) * 2)),
            "TASKS": str(tasks),
            "HUB": str(hub),
            "OTHER_DIR": str(folder / "elsewhere"),
            "TEXTS": str(texts),
            "STORY": str(write_jsonl(folder / "story.jsonl", [{"text": line * 8} for line in story(20_000).split("\n") if line])),
            "TWO_TEXTS": str(write_jsonl(folder / "two.jsonl", two)),
        }
        rows = write_jsonl(folder / "rows.jsonl", [{"text": f"t {n}", **row} for n, row in enumerate(alpaca(20))])
        self.base = {**BASE, "model": BASE["model"] | {"name": str(model)}, "data": BASE["data"] | {"path": str(rows)}}
        self.seen: dict[str, Any] = {}
        self._watch(monkeypatch)

    def _watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import eval.perplexity as perplexity
        import finetune.report
        import finetune.train.loop as loop

        train, evaluate_loss = loop.Training.run, perplexity.evaluate_loss

        def watched_train(training: Any) -> Any:
            inner = training.model.get_base_model() if hasattr(training.model, "get_base_model") else training.model
            self.seen["loop"] = [
                inner.is_gradient_checkpointing,
                inner.config._attn_implementation,
                type(training.optimizer).__name__,
            ]
            return train(training)

        def watched_loss(*arguments: Any, **options: Any) -> Any:
            self.seen.setdefault("batch_tokens", options.get("batch_tokens"))
            return evaluate_loss(*arguments, **options)

        monkeypatch.setattr(loop.Training, "run", watched_train)
        monkeypatch.setattr(perplexity, "evaluate_loss", watched_loss)
        monkeypatch.setattr(finetune.report, "write_report", lambda path: path)  # seconds each; has its own tests

    def run(self, extra: dict[str, Any]) -> dict[str, Any]:
        """What a run of the base recipe with `extra` leaves behind; an error's words where it is refused."""
        key = json.dumps(extra, sort_keys=True)
        if key not in self.done:
            self.done[key] = self._run(extra)
        return self.done[key]

    def _run(self, extra: dict[str, Any]) -> dict[str, Any]:
        from finetune.pipeline import run
        from finetune.stages import planning

        self.count += 1
        recipe = {section: dict(keys) for section, keys in self.base.items()}
        folder = self.folder / f"run{self.count}"
        recipe["run"]["dir"] = str(folder)
        top: dict[str, Any] = {}
        for dotted, value in extra.items():
            section, _, leaf = dotted.rpartition(".")
            value = self.names.get(value, value) if isinstance(value, str) else value
            (recipe.setdefault(section, {}) if section else top)[leaf] = value
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump({**recipe, **top}))
        self.seen = {}
        try:
            with pytest.MonkeyPatch.context() as patch:
                if not any(key.startswith("plan.") for key in extra):  # a second each; has its own tests
                    patch.setattr(planning, "default_planner", None)
                run(read_recipe(path), "keys")
        except Stop as stop:
            return {"refused": stop.what}
        finally:
            torch.set_num_threads(2)
        where = Path(recipe["run"]["dir"])
        record = json.loads((where / "run.json").read_text())
        metrics = [json.loads(line) for line in (where / "metrics.jsonl").read_text().splitlines()]
        weights = {str(p.relative_to(where)): hashlib.sha256(p.read_bytes()).hexdigest() for p in where.rglob("*.safetensors")}
        return {
            "record": {k: v for k, v in record.items() if k not in VOLATILE and k != "train"},
            "device": record["provenance"]["device"],
            "place": folder.exists(),
            "metrics": [{k: v for k, v in line.items() if k not in CLOCK} for line in metrics],
            "weights": weights,
            "files": sorted({str(p.relative_to(where)).split(".out")[0] for p in where.rglob("*") if "tfevents" not in p.name}),
            "adapter": [p.read_text() for p in where.glob("adapter/adapter_config.json")],
            "seen": self.seen,
        }


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tokenizer_folder: Path) -> Any:
    from tests.conftest import tiny_llama

    other = tiny_llama(tmp_path_factory.mktemp("other-llama"), tokenizer_folder, seed=1)
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield Workshop(tmp_path_factory.mktemp("keys"), tiny_model, other, monkeypatch)


def test_the_same_recipe_twice_gives_the_same_run(workshop: Workshop) -> None:
    first = workshop.run({})
    assert "refused" not in first
    assert workshop._run({}) == first


@pytest.mark.planned  # where the key is the plan's; the workshop leaves it out of the others
@pytest.mark.parametrize("key", CHANGES)
def test_a_changed_key_changes_the_run(workshop: Workshop, key: str) -> None:
    value, extra = CHANGES[key]
    before, after = workshop.run(extra), workshop.run(extra | {key: value})
    assert before != after
    assert ("refused" in before) == (key == "data.bad_rows")
    assert ("refused" in after) == (key in REFUSED)
