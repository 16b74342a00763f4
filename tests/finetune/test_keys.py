"""Every key of the recipe has its effect: each test changes one and checks the results of a run for its effect.

Keys with independent effects are changed together in one run (`Change`). No check reads the recipe back, which proves nothing.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import BaseModel
from safetensors.torch import load_file

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
    "run": {"device": "cpu", "merge": False, "threads": 1},
}

LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip
# Ternary pretraining on text: from an existing model, and from scratch.
TERNARY: dict[str, Any] = {
    "kind": "pretrain", "quant.scheme": "ternary", "adapter.kind": "none", "data.path": "STORY", "data.max_length": 32,
    "data.max_rows": None, "train.save_steps": None,
}  # fmt: skip
SCRATCH = TERNARY | {"model.name": None, "model.config": LLAMA, "tokenizer.train": 300}
WITH_HEALTH = TERNARY | {"train.health_steps": 1}
WITH_TEACHER = WITH_HEALTH | {"distill.teacher": "OTHER_MODEL", "quant.warmup": 0.9, "train.max_steps": 4}


@dataclass
class Outcome:
    """The results of a run, and how its training was set up (`setup`). If the run was refused: the error (`refused`) alone."""

    folder: Path
    refused: str = ""
    record: dict[str, Any] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)  # lines of metrics.jsonl with a loss
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    measurements: list[dict[str, Any]] = field(default_factory=list)  # of ternary weights
    setup: dict[str, Any] = field(default_factory=dict)

    def rates(self) -> list[float]:
        return [line["lr"] for line in self.steps]

    def blends(self) -> list[float]:
        return [measurement.get("blend", 1) for measurement in self.measurements]

    def examples(self) -> str:
        return "".join(part["text"] for example in self.record["preflight"]["examples"] for part in example)

    def fast(self) -> str:
        return "\n".join(line for line in self.record["model"]["fast"] if line.startswith("fast"))

    def adapter(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "adapter" / "adapter_model.safetensors")

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "checkpoints").glob("step-*"))

    def digest(self) -> dict[str, str]:
        return {
            str(p.relative_to(self.folder)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in self.folder.rglob("*.safetensors")
        }


Check = Callable[[Outcome, Outcome], bool]


@dataclass
class Change:
    """Keys to change in one run, compared with a run of `base` alone: key → (another value, check of its effect)."""

    base: dict[str, Any]
    keys: dict[str, tuple[Any, Check]]


def single(key: str, value: Any, check: Check, base: dict[str, Any] | None = None) -> Change:
    return Change(base or {}, {key: (value, check)})


def refuses_with(*parts: str) -> Check:
    """The other value cannot run here; the error shows that the key is read."""
    return lambda before, after: not before.refused and all(part in after.refused for part in parts)


def changes(of: Callable[[Outcome], Any], before: Any, after: Any) -> Check:
    return lambda before_run, after_run: (of(before_run), of(after_run)) == (before, after)


def grows(of: Callable[[Outcome], float]) -> Check:
    return lambda before, after: of(after) > of(before)


def fields(part: str, *names: str) -> Callable[[Outcome], list[Any]]:
    return lambda run: [run.record[part][name] for name in names]


def differs(of: Callable[[Outcome], Any]) -> Check:
    return lambda before, after: of(before) != of(after)


def model_field(name: str) -> Callable[[Outcome], Any]:
    return lambda run: run.record["model"][name]


def setup(name: str) -> Callable[[Outcome], Any]:
    return lambda run: run.setup[name]


def first_step(name: str) -> Callable[[Outcome], Any]:
    return lambda run: run.steps[0].get(name)


def distillation_weight(run: Outcome, name: str, other: str, weight: float) -> float:
    """The weight of the loss `name` in the first step's total, when the loss `other` has `weight`."""
    line = run.steps[0]
    return (line["loss"] - line["ce"] - weight * line[other]) / line[name]


HUB = {"data.path": None, "data.name": "HUB", "data.bad_rows": "skip", "data.max_length": 512}
PACKAGE = HUB | {"data.name": "package:chatterbot-corpus"}
TASKS = {"eval.include_path": "TASKS", "eval.limit": 2}
LOW_MEMORY = SCRATCH | {"model.dtype": "bf16", "train.max_grad_norm": 0, "train.save_steps": 2}

CHANGES = [
    Change({}, {
        "about": ("a sentence", changes(lambda run: run.record["about"], "", "a sentence")),
        "model.attention": ("eager", changes(lambda run: run.setup["attention"] == "eager", False, True)),
        "quant.double": (False, grows(lambda run: run.record["model"]["swap"]["bytes_after"])),
        "adapter.rank": (2, changes(lambda run: run.setup["rank"], {4}, {2})),
        "adapter.alpha": (8, changes(setup("scaling"), {32 / 4}, {8 / 2})),
        "adapter.dropout": (0.5, changes(setup("dropout"), {0.0}, {0.5})),
        "adapter.targets": (["q_proj", "v_proj"], changes(model_field("adapters"), 14, 4)),
        "data.system": ("Be brief.", changes(lambda run: "Be brief." in run.examples(), False, True)),
        "data.max_rows": (15, changes(lambda run: run.record["data"]["rows"], 20, 15)),
        "train.lr": (2e-3, lambda before, after: after.rates() == pytest.approx([2 * rate for rate in before.rates()])),
        "train.save_steps": (1, changes(Outcome.checkpoints, ["step-000002"], ["step-000001", "step-000002"])),
        "train.eval_steps": (1, changes(lambda run: [line["step"] for line in run.evaluations], [], [1])),
        "train.checkpointing": (True, changes(setup("checkpointing"), False, True)),
        "eval.samples": (1, changes(lambda run: sum(row["reference"] is not None for row in run.record["samples"]), 0, 1)),
        "eval.prompts": (["Hello?"], lambda before, after: "Hello?" in str(after.record["samples"][-1]["prompt"])),
        "eval.batch_tokens": (128, changes(setup("batch_tokens"), 2048, 128)),
        "run.dir": ("OTHER_DIR", lambda before, after: (after.folder.parent / "elsewhere" / "run.json").exists()),
        "run.threads": (2, changes(setup("threads"), 1, 2)),
        "run.merge": (True, changes(lambda run: (run.folder / "merged").exists(), False, True)),
        "run.trackers": (["tensorboard"], changes(lambda run: bool(list(run.folder.rglob("*tfevents*"))), False, True)),
    }),
    Change({}, {
        "model.dtype": ("bf16", changes(model_field("dtype"), "float32", "bfloat16")),
        "quant.keep": (["*.o_proj"], changes(lambda run: run.record["model"]["swap"]["swapped"], 14, 12)),
        "adapter.rslora": (True, changes(setup("scaling"), {32 / 4}, {32 / math.sqrt(4)})),
        "adapter.dora": (True, changes(lambda run: any("magnitude" in name for name in run.adapter()), False, True)),
        "data.template": ("alpaca", changes(lambda run: "### Response" in run.examples(), False, True)),
        "data.heldout_path": ("OTHER_ROWS", changes(fields("data", "train_rows", "heldout_rows"), [16, 4], [20, 20])),
        "train.max_steps": (3, changes(lambda run: len(run.steps), 2, 3)),
        "train.schedule": ("constant", lambda before, after: len(set(after.rates())) == 1 < len(set(before.rates()))),
        "train.optimizer": ("adamw_8bit", changes(setup("optimizer"), "AdamW", "AdamW8bit")),
        "train.micro_batch": (2, lambda before, after: after.steps[0]["tokens"] > 1.8 * before.steps[0]["tokens"]
                              and len(after.setup["forwards"]) == len(after.steps)),
        "fast.attention": (False, lambda before, after: "attention" in before.fast() and "attention" not in after.fast()),
        "fast.lora": (False, lambda before, after: "adapters" in before.fast() and "adapters" not in after.fast()),
    }),
    Change({"train.max_steps": 4, "train.save_steps": 1}, {
        "data.path": ("OTHER_ROWS", lambda before, after: "What is 5" in after.examples()),
        "data.loss_on": ("all", changes(lambda run: run.record["preflight"]["supervised_share"] > 0.9, False, True)),
        "train.accumulation": (2, changes(lambda run: len(run.setup["forwards"]), 4, 8)),
        "train.warmup": (0.9, changes(lambda run: run.rates()[0] < run.rates()[1], False, True)),
        "train.weight_decay": (0.5, changes(lambda run: run.setup["group"]["weight_decay"], 0.0, 0.5)),
        "train.betas": ([0.5, 0.9], changes(lambda run: run.setup["group"]["betas"], (0.9, 0.999), (0.5, 0.9))),
        "train.eps": (1e-2, changes(lambda run: run.setup["group"]["eps"], 1e-8, 1e-2)),
        "train.precision": ("bf16", changes(lambda run: set(run.setup["forwards"]), {False}, {True})),
        "train.keep_checkpoints": (1, changes(lambda run: len(run.checkpoints()), 2, 1)),
    }),
    Change({"train.eval_steps": 1, "train.save_steps": 1}, {
        "data.max_length": (120, changes(lambda run: run.steps[0]["tokens"] > 96, False, True)),
        "data.heldout": (6, changes(lambda run: run.record["eval"]["after"]["rows"], 4, 6)),
        "train.save_best": (True, changes(lambda run: "best" in run.record["train"], False, True)),
        "train.load_best_at_end": (True, lambda before, after: after.record["eval"]["after"]["loss"]
         == pytest.approx(after.record["train"]["best"]["loss"], abs=1e-6)),
        "train.min_lr": (0.5, lambda before, after: (before.rates()[-1], after.rates()[-1]) == pytest.approx((1e-4, 5e-4))),
        "run.seed": (18, differs(Outcome.examples)),
        "fast.blocks": (False, differs(model_field("fast"))),
    }),
    single("fast.compile", False, differs(model_field("fast"))),
    Change({}, {
        "model.name": ("OTHER_MODEL", differs(lambda run: Path(run.record["provenance"]["model"]["source"]).name)),
        "quant.scheme": ("none", changes(lambda run: run.record["model"]["swap"] is None, False, True)),
        "data.format": ("text", changes(lambda run: "What is" in run.examples(), True, False)),
    }),
    Change({"data.path": "TWICE", "data.max_length": 120, "run.merge": True, "eval.samples": 1}, {
        "data.dedupe": (False, changes(lambda run: run.record["data"]["duplicates_removed"], 10, 0)),
        "data.packing": (False, changes(lambda run: run.steps[0]["tokens"] > 60, True, False)),
        "eval.max_new_tokens": (2, lambda before, after: len(after.record["samples"][0]["before"])
                                < len(before.record["samples"][0]["before"])),
        "eval.merge_rows": (2, changes(lambda run: run.record["merge"]["gate"]["rows"], 4, 2)),
        "eval.merge_limit": (0.5, changes(lambda run: run.record["merge"]["gate"]["limit"], 0.02, 0.5)),
    }),
    single("kind", "pretrain", changes(lambda run: run.record["preflight"]["supervised_share"] == 1, False, True),
         {"data.path": "STORY", "data.max_rows": None, "data.max_length": 300, "adapter.kind": "lora"}),
    single("model.offload_layers", "disk", changes(lambda run: (run.record["model"]["streamed"] or {}).get("layers"), None, 2),
         {"train.checkpointing": True}),
    single("adapter.kind", "none", changes(lambda run: len(set(fields("model", "trainable", "parameters")(run))), 2, 1),
         {"quant.scheme": "none"}),
    single("data.name", "package:chatterbot-corpus", differs(lambda run: run.record["provenance"]["data"]["source"]),
         HUB),
    single("data.split", "test", changes(lambda run: "What is 2" in run.examples(), False, True),
         HUB),
    single("data.files", ["*/english/coding.yml"], differs(Outcome.examples), PACKAGE),
    single("data.truncation", "drop", lambda before, after: before.record["preflight"]["rows_truncated"] > 0
         == after.record["preflight"]["rows_truncated"] < after.record["preflight"]["tokens"], {"data.max_length": 51}),
    single("data.bad_rows", "skip", lambda before, after: bool(before.refused) and after.record["data"]["rows_skipped"] == 1,
         {"data.path": "MIXED_ROWS"}),
    single("train.epochs", 1.5, changes(lambda run: len(run.steps), 4, 6),
         {"train.max_steps": None, "data.max_rows": 8, "data.packing": False}),
    single("train.max_grad_norm", 1e-4, grows(
        lambda run: -sum(float(t.norm()) for n, t in run.adapter().items() if "lora_B" in n)), {"train.eps": 1.0}),
    single("eval.tasks", ["tiny_sums"], changes(lambda run: "tiny_sums" in str(run.record["eval"]), False, True), TASKS),
    Change(TASKS | {"eval.tasks": ["tiny_sums"]}, {"eval.limit": (1, differs(lambda run: run.record["eval"]["tasks"]))}),
    single("eval.include_path", None, refuses_with("tiny_sums"), TASKS | {"eval.tasks": ["tiny_sums"]}),
    single("model.revision", "v2", refuses_with("revision")),
    single("plan.memory", "100MB", refuses_with("would not fit")),
    single("run.device", "cuda", differs(lambda run: run.record["provenance"]["device"]) if torch.cuda.is_available()
         else refuses_with("CUDA")),
    # ---------------------------------------------------------------------------------------------- pretraining, in ternary
    Change(SCRATCH, {
        "model.config": (LLAMA | {"intermediate_size": 64}, grows(lambda run: run.record["model"]["swap"]["bytes_before"])),
        "tokenizer.train": (290, changes(lambda run: run.record["data"]["vocabulary"], 300, 290)),
        "quant.rms_norm": (True, differs(lambda run: json.loads((run.folder / "merged" / "config.json").read_text())
                                         ["quantization_config"].get("use_rms_norm"))),
        "train.health_steps": (1, changes(lambda run: run.record["ternary"]["looks"], 0, 2)),
        "export.formats": (["bitnet"], changes(lambda run: (run.folder / "export").exists(), False, True)),
        "export.gate_tokens": (20, changes(lambda run: run.record["exports"]["bitnet"]["gate"]["tokens"], 128, 20)),
    }),
    Change(SCRATCH, {
        "train.loss_chunk": (7, lambda before, after: first_step("loss")(after) == pytest.approx(
                             first_step("loss")(before), rel=1e-5) and before.digest() != after.digest()),
        "twin": (True, changes(lambda run: (run.folder / "twin" / "run.json").exists(), False, True)),
    }),
    single("train.twin_lr", 1e-5, lambda before, after: Runner.lines(after.folder / "twin")[0]["lr"] < 1e-5
         < Runner.lines(before.folder / "twin")[0]["lr"], SCRATCH | {"train.loss_chunk": 7, "twin": True}),
    Change(SCRATCH | {"train.max_steps": None, "train.max_tokens": 64}, {
        "tokenizer.name": ("OTHER_MODEL", changes(lambda run: run.record["data"]["vocabulary"], 300, 512)),
        "train.max_tokens": (96, changes(lambda run: len(run.steps), 2, 3)),
    }),
    single("data.text_key", "body", changes(lambda run: "Some" in run.examples(), False, True),
           SCRATCH | {"data.path": "TWO_TEXTS"}),
    single("data.reasoning", "drop", changes(lambda run: "I count" in run.examples(), True, False), {"data.path": "THOUGHTS"}),
    single("data.bos", "none", changes(lambda run: "<|im_start|>" in run.examples(), True, False),
           SCRATCH | {"tokenizer.name": "ADDS_BOS"}),
    single("train.stochastic_rounding", True, differs(Outcome.digest), LOW_MEMORY),
    single("train.optimizer_in_backward", True, grows(lambda run: -run.record["model"]["bytes"]["gradients"]), LOW_MEMORY),
    Change(WITH_HEALTH, {
        "quant.sub_norms": (True, grows(model_field("parameters"))),
        "quant.warmup": (0.6, changes(lambda run: run.blends()[0], 1, pytest.approx(1 / 2))),
        "distill.teacher": ("OTHER_MODEL", changes(lambda run: "distill_logits" in run.steps[0], False, True)),
    }),
    Change(WITH_TEACHER, {
        "quant.warmup_shape": ("cosine", differs(Outcome.blends)),
        "distill.logits": (200.0, lambda before, after: distillation_weight(after, "distill_logits", "distill_relations", 500)
                           == pytest.approx(200, rel=0.1)),
        "distill.relations": (500.0, lambda before, after: distillation_weight(after, "distill_relations", "distill_logits", 200)
                              == pytest.approx(500, rel=0.01)),
    }),
    Change(WITH_TEACHER, {
        "distill.temperature": (2.0, differs(first_step("distill_logits"))),
        "distill.layer": (0, differs(first_step("distill_relations"))),
    }),
    single("data.revision", "v2", refuses_with("revision"), TERNARY | {"data.path": None, "data.name": "TEXTS"}),
]  # fmt: skip
# Tested in test_run.py, in planning/test_command.py, and with several processes in train/test_parallel.py.
BAD_STEP_KEYS = {"train.on_bad_step", "train.max_bad_steps", "train.spike"}  # these need bad steps: train/test_nothing_lost.py
TESTED_ELSEWHERE = {"model.trust_remote_code", "fit", "plan.gpu", "plan.price_per_kwh", "run.parallel", *BAD_STEP_KEYS}


def setting_keys() -> list[str]:
    keys = known_keys()
    return [k for k, f in keys.items() if not (isinstance(f.annotation, type) and issubclass(f.annotation, BaseModel))]


def test_changes_cover_every_key_once() -> None:
    keys = [key for change in CHANGES for key in change.keys]
    assert sorted(keys) == sorted(set(setting_keys()) - TESTED_ELSEWHERE)


class Runner:
    """Runs recipes in one process and caches their outcomes."""

    def __init__(self, folder: Path, model: Path, other_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.count = folder, 0
        self.outcomes: dict[str, Outcome] = {}
        tasks = folder / "tasks"
        tasks.mkdir()
        sums = write_jsonl(tasks / "sums.jsonl", [{"question": f"{n} + 1 =", "answer": str(n + 1)} for n in range(4)])
        (tasks / "tiny_sums.yaml").write_text(
            f"task: tiny_sums\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: {sums}}}\ntest_split: test\n"
            "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: ['{{answer}}', '7']\ndoc_to_target: 0\n"
            "metric_list:\n  - metric: acc\n"
        )
        two_texts = [{"text": line * 8, "body": line.replace("The", "Some") * 8} for line in story(20_000).split("\n") if line]
        texts = folder / "texts"  # a folder in place of a dataset of the hub, without revisions
        texts.mkdir()
        write_jsonl(texts / "train.jsonl", [{"text": line * 8} for line in story(20_000).split("\n") if line])
        hub = folder / "hub"
        hub.mkdir()
        write_jsonl(hub / "train.jsonl", alpaca(20))
        write_jsonl(hub / "test.jsonl", alpaca(20, start=200))
        thoughts = [row | {"output": f"<think>I count.</think>\n\n{row['output']}"} for row in alpaca(20)]
        self.placeholders = {
            "OTHER_MODEL": str(other_model),
            "ADDS_BOS": str(adding_bos(other_model, folder / "adds-bos")),
            "OTHER_ROWS": str(write_jsonl(folder / "other.jsonl", alpaca(20, start=500))),
            "MIXED_ROWS": str(write_jsonl(folder / "mixed.jsonl", [*alpaca(12), {"foo": 1}, *alpaca(6, start=50)])),
            "TWICE": str(write_jsonl(folder / "twice.jsonl", alpaca(10) * 2)),
            "TASKS": str(tasks),
            "HUB": str(hub),
            "OTHER_DIR": str(folder / "elsewhere"),
            "TEXTS": str(texts),
            "STORY": str(write_jsonl(folder / "story.jsonl", [{"text": line * 8} for line in story(20_000).split("\n") if line])),
            "THOUGHTS": str(write_jsonl(folder / "thoughts.jsonl", thoughts)),
            "TWO_TEXTS": str(write_jsonl(folder / "two.jsonl", two_texts)),
        }
        rows = write_jsonl(folder / "rows.jsonl", [{"text": f"t {n}", **row} for n, row in enumerate(alpaca(20))])
        self.base_recipe = {**BASE, "model": BASE["model"] | {"name": str(model)}, "data": BASE["data"] | {"path": str(rows)}}
        self.setup: dict[str, Any] = {}
        self._observe(monkeypatch)

    def _observe(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import lm_eval.tasks

        import finetune.report
        import finetune.train.loop as loop
        from finetune.stages import evaluate

        train, evaluate_loss = loop.Training.run, evaluate.evaluate_loss

        def observed_train(training: Any) -> Any:
            base_model = training.model.get_base_model() if hasattr(training.model, "get_base_model") else training.model
            adapters = [module for module in base_model.modules() if getattr(module, "lora_A", None)]
            group = {"betas": None, "eps": None, "weight_decay": None} | training.optimizer.param_groups[0]
            forwards: list[bool] = []  # of each forward pass: whether it was under autocast
            self.setup |= {
                "checkpointing": base_model.is_gradient_checkpointing,
                "attention": base_model.config._attn_implementation,
                "optimizer": type(training.optimizer).__name__,
                "group": {name: tuple(value) if isinstance(value, list) else value for name, value in group.items()},
                "rank": {module.lora_A["default"].weight.shape[0] for module in adapters},
                "scaling": {module.scaling["default"] for module in adapters},
                "dropout": {getattr(module.lora_dropout["default"], "p", 0.0) for module in adapters},
                "threads": torch.get_num_threads(),
                "forwards": forwards,
            }
            hook = base_model.model.layers[0].register_forward_pre_hook(
                lambda module, inputs: forwards.append(torch.is_autocast_enabled("cpu")) if module.training else None
            )
            try:
                return train(training)
            finally:
                hook.remove()

        def observed_loss(*arguments: Any, **options: Any) -> Any:
            self.setup.setdefault("batch_tokens", options.get("batch_tokens"))
            return evaluate_loss(*arguments, **options)

        monkeypatch.setattr(loop.Training, "run", observed_train)
        monkeypatch.setattr(evaluate, "evaluate_loss", observed_loss)
        tasks = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)  # reading the default tasks takes seconds
        monkeypatch.setattr(lm_eval.tasks, "TaskManager", tasks)
        monkeypatch.setattr(finetune.report, "write_report", lambda path: path)  # slow; has its own tests

    def run(self, extra: dict[str, Any]) -> Outcome:
        """The outcome of the base recipe with `extra`, cached."""
        key = json.dumps(extra, sort_keys=True)
        if key not in self.outcomes:
            self.outcomes[key] = self.run_uncached(extra)
        return self.outcomes[key]

    def run_uncached(self, extra: dict[str, Any]) -> Outcome:
        from finetune.pipeline import run
        from finetune.stages import planning

        self.count += 1
        recipe = {section: dict(keys) for section, keys in self.base_recipe.items()}
        recipe["run"]["dir"] = str(self.folder / f"run{self.count}")
        top_level: dict[str, Any] = {}
        for dotted, value in extra.items():
            section, _, leaf = dotted.rpartition(".")
            value = self.placeholders.get(value, value) if isinstance(value, str) else value
            (recipe.setdefault(section, {}) if section else top_level)[leaf] = value
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump({**recipe, **top_level}))
        folder, self.setup, threads = Path(recipe["run"]["dir"]), {}, torch.get_num_threads()
        try:
            with pytest.MonkeyPatch.context() as patch:
                if not any(key.startswith("plan.") for key in extra):  # slow; has its own tests
                    patch.setattr(planning, "default_planner", None)
                run(read_recipe(path), "keys")
        except Stop as stop:
            return Outcome(folder, refused=f"{stop.message} {stop}")
        finally:
            torch.set_num_threads(threads)
        lines = self.lines(folder)
        return Outcome(
            folder,
            record=json.loads((folder / "run.json").read_text()),
            steps=[line for line in lines if "loss" in line],
            evaluations=[line for line in lines if "eval_loss" in line],
            measurements=[line["ternary"] for line in lines if "ternary" in line],
            setup=self.setup,
        )

    @staticmethod
    def lines(folder: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def adding_bos(model: Path, folder: Path) -> Path:
    """A copy of a model's tokenizer that begins every text with a BOS token."""
    from tokenizers import processors
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    begin = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(f"{begin[0]} $A", special_tokens=[begin])
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tokenizer_folder: Path) -> Iterator[Runner]:
    from tests.conftest import tiny_llama

    other = tiny_llama(tmp_path_factory.mktemp("other-llama"), tokenizer_folder, seed=1)
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield Runner(tmp_path_factory.mktemp("keys"), tiny_model, other, monkeypatch)


CLOCK = {"tokens_per_second", "step_seconds", "memory_bytes", "time"}


def test_running_a_recipe_twice_gives_equal_runs(runner: Runner) -> None:
    run, repeated = runner.run({}), runner.run_uncached({})
    assert run.digest() == repeated.digest()
    for first, second in zip(run.steps, repeated.steps, strict=True):
        assert {k: v for k, v in first.items() if k not in CLOCK} == {k: v for k, v in second.items() if k not in CLOCK}
    for part in ("eval", "data", "preflight", "samples", "model"):
        assert run.record[part] == repeated.record[part]


@pytest.mark.planned  # for the keys of `plan`; Runner skips planning for all others
@pytest.mark.parametrize(("change", "key"), [pytest.param(c, key, id=key) for c in CHANGES for key in c.keys])
def test_key_has_its_effect(runner: Runner, change: Change, key: str) -> None:
    before, after = runner.run(change.base), runner.run(change.base | {key: value for key, (value, _) in change.keys.items()})
    assert bool(before.refused) == (key == "data.bad_rows"), before.refused
    assert change.keys[key][1](before, after), after.refused or (before, after)
