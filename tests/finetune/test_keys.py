"""Every key of the recipe does what it says: each is changed, and what came of the run is asked for the effect of this key.

Keys whose effects are apart are changed together, in one run (`Change`). No check reads the recipe, which would only be an echo.
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
# Ternary by pretraining on a text: from a model that exists, and from scratch.
TERNARY: dict[str, Any] = {
    "kind": "pretrain", "quant.scheme": "ternary", "adapter.kind": "none", "data.path": "STORY", "data.max_length": 32,
    "data.max_rows": None, "train.save_steps": None,
}  # fmt: skip
SCRATCH = TERNARY | {"model.name": None, "model.config": LLAMA, "tokenizer.train": 300}
LOOKED = TERNARY | {"train.health_steps": 1}
TAUGHT = LOOKED | {"distill.teacher": "OTHER_MODEL", "quant.warmup": 0.9, "train.max_steps": 4}


@dataclass
class Outcome:
    """What a run left behind, and what the loop was handed (`seen`); `refused`: the words of an error, and then nothing else."""

    folder: Path
    refused: str = ""
    record: dict[str, Any] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)  # the lines of metrics that have a loss
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    looks: list[dict[str, Any]] = field(default_factory=list)  # at what has flipped, in ternary
    seen: dict[str, Any] = field(default_factory=dict)

    def rates(self) -> list[float]:
        return [line["lr"] for line in self.steps]

    def blends(self) -> list[float]:
        return [look.get("blend", 1) for look in self.looks]

    def examples(self) -> str:
        return "".join(piece["text"] for example in self.record["preflight"]["examples"] for piece in example)

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
    """Keys that are changed in one run, against a run with `base` alone: key → (its other value, its effect)."""

    base: dict[str, Any]
    keys: dict[str, tuple[Any, Check]]


def only(key: str, value: Any, check: Check, base: dict[str, Any] | None = None) -> Change:
    return Change(base or {}, {key: (value, check)})


def mentions(*words: str) -> Check:
    """The other value cannot run here: the refusal is what shows that the key is read."""
    return lambda before, after: not before.refused and all(word in after.refused for word in words)


def both(of: Callable[[Outcome], Any], before: Any, after: Any) -> Check:
    return lambda one, other: (of(one), of(other)) == (before, after)


def grows(of: Callable[[Outcome], float]) -> Check:
    return lambda before, after: of(after) > of(before)


def counts(part: str, *names: str) -> Callable[[Outcome], list[Any]]:
    return lambda run: [run.record[part][name] for name in names]


def differs(of: Callable[[Outcome], Any]) -> Check:
    return lambda before, after: of(before) != of(after)


def model(name: str) -> Callable[[Outcome], Any]:
    return lambda run: run.record["model"][name]


def seen(name: str) -> Callable[[Outcome], Any]:
    return lambda run: run.seen[name]


def first(name: str) -> Callable[[Outcome], Any]:
    return lambda run: run.steps[0].get(name)


def distilled(run: Outcome, name: str, rest: str, weight: float) -> float:
    """The weight that a part of the first loss has, where the other one has `weight`."""
    line = run.steps[0]
    return (line["loss"] - line["ce"] - weight * line[rest]) / line[name]


HUB = {"data.path": None, "data.name": "HUB", "data.bad_rows": "skip", "data.max_length": 512}
PACKAGE = HUB | {"data.name": "package:chatterbot-corpus"}
TASKS = {"eval.include_path": "TASKS", "eval.limit": 2}
LOW = SCRATCH | {"model.dtype": "bf16", "train.max_grad_norm": 0, "train.save_steps": 2}

CHANGES = [
    Change({}, {
        "about": ("a sentence", both(lambda run: run.record["about"], "", "a sentence")),
        "model.attention": ("eager", both(lambda run: run.seen["attention"] == "eager", False, True)),
        "quant.double": (False, grows(lambda run: run.record["model"]["swap"]["bytes_after"])),
        "adapter.rank": (2, both(lambda run: run.seen["rank"], {4}, {2})),
        "adapter.alpha": (8, both(seen("scaling"), {32 / 4}, {8 / 2})),
        "adapter.dropout": (0.5, both(seen("dropout"), {0.0}, {0.5})),
        "adapter.targets": (["q_proj", "v_proj"], both(model("adapters"), 14, 4)),
        "data.system": ("Be brief.", both(lambda run: "Be brief." in run.examples(), False, True)),
        "data.max_rows": (15, both(lambda run: run.record["data"]["rows"], 20, 15)),
        "train.lr": (2e-3, lambda before, after: after.rates() == pytest.approx([2 * rate for rate in before.rates()])),
        "train.save_steps": (1, both(Outcome.checkpoints, ["step-000002"], ["step-000001", "step-000002"])),
        "train.eval_steps": (1, both(lambda run: [line["step"] for line in run.evaluations], [], [1])),
        "train.checkpointing": (True, both(seen("checkpointing"), False, True)),
        "eval.samples": (1, both(lambda run: sum(one["reference"] is not None for one in run.record["samples"]), 0, 1)),
        "eval.prompts": (["Hello?"], lambda before, after: "Hello?" in str(after.record["samples"][-1]["prompt"])),
        "eval.batch_tokens": (128, both(seen("batch_tokens"), 2048, 128)),
        "run.dir": ("OTHER_DIR", lambda before, after: (after.folder.parent / "elsewhere" / "run.json").exists()),
        "run.threads": (2, both(seen("threads"), 1, 2)),
        "run.merge": (True, both(lambda run: (run.folder / "merged").exists(), False, True)),
        "run.trackers": (["tensorboard"], both(lambda run: bool(list(run.folder.rglob("*tfevents*"))), False, True)),
    }),
    Change({}, {
        "model.dtype": ("bf16", both(model("dtype"), "float32", "bfloat16")),
        "quant.keep": (["*.o_proj"], both(lambda run: run.record["model"]["swap"]["swapped"], 14, 12)),
        "adapter.rslora": (True, both(seen("scaling"), {32 / 4}, {32 / math.sqrt(4)})),
        "adapter.dora": (True, both(lambda run: any("magnitude" in name for name in run.adapter()), False, True)),
        "data.template": ("alpaca", both(lambda run: "### Response" in run.examples(), False, True)),
        "data.heldout_path": ("OTHER_ROWS", both(counts("data", "train_rows", "heldout_rows"), [16, 4], [20, 20])),
        "train.max_steps": (3, both(lambda run: len(run.steps), 2, 3)),
        "train.schedule": ("constant", lambda before, after: len(set(after.rates())) == 1 < len(set(before.rates()))),
        "train.optimizer": ("adamw_8bit", both(seen("optimizer"), "AdamW", "AdamW8bit")),
        "train.micro_batch": (2, lambda before, after: after.steps[0]["tokens"] > 1.8 * before.steps[0]["tokens"]
                              and len(after.seen["forwards"]) == len(after.steps)),
        "fast.attention": (False, lambda before, after: "attention" in before.fast() and "attention" not in after.fast()),
        "fast.lora": (False, lambda before, after: "adapters" in before.fast() and "adapters" not in after.fast()),
    }),
    Change({"train.max_steps": 4, "train.save_steps": 1}, {
        "data.path": ("OTHER_ROWS", lambda before, after: "What is 5" in after.examples()),
        "data.loss_on": ("all", both(lambda run: run.record["preflight"]["supervised_share"] > 0.9, False, True)),
        "train.accumulation": (2, both(lambda run: len(run.seen["forwards"]), 4, 8)),
        "train.warmup": (0.9, both(lambda run: run.rates()[0] < run.rates()[1], False, True)),
        "train.weight_decay": (0.5, both(lambda run: run.seen["group"]["weight_decay"], 0.0, 0.5)),
        "train.betas": ([0.5, 0.9], both(lambda run: run.seen["group"]["betas"], (0.9, 0.999), (0.5, 0.9))),
        "train.eps": (1e-2, both(lambda run: run.seen["group"]["eps"], 1e-8, 1e-2)),
        "train.precision": ("bf16", both(lambda run: set(run.seen["forwards"]), {False}, {True})),
        "train.keep_checkpoints": (1, both(lambda run: len(run.checkpoints()), 2, 1)),
    }),
    Change({"train.eval_steps": 1, "train.save_steps": 1}, {
        "data.max_length": (120, both(lambda run: run.steps[0]["tokens"] > 96, False, True)),
        "data.heldout": (6, both(lambda run: run.record["eval"]["after"]["rows"], 4, 6)),
        "train.save_best": (True, both(lambda run: "best" in run.record["train"], False, True)),
        "train.load_best_at_end": (True, lambda before, after: after.record["eval"]["after"]["loss"]
         == pytest.approx(after.record["train"]["best"]["loss"], abs=1e-6)),
        "train.min_lr": (0.5, lambda before, after: (before.rates()[-1], after.rates()[-1]) == pytest.approx((1e-4, 5e-4))),
        "run.seed": (18, differs(Outcome.examples)),
        "fast.blocks": (False, differs(model("fast"))),
    }),
    only("fast.compile", False, differs(model("fast"))),
    Change({}, {
        "model.name": ("OTHER_MODEL", differs(lambda run: Path(run.record["provenance"]["model"]["source"]).name)),
        "quant.scheme": ("none", both(lambda run: run.record["model"]["swap"] is None, False, True)),
        "data.format": ("text", both(lambda run: "What is" in run.examples(), True, False)),
    }),
    Change({"data.path": "TWICE", "data.max_length": 120, "run.merge": True, "eval.samples": 1}, {
        "data.dedupe": (False, both(lambda run: run.record["data"]["duplicates_removed"], 10, 0)),
        "data.packing": (False, both(lambda run: run.steps[0]["tokens"] > 60, True, False)),
        "eval.max_new_tokens": (2, lambda before, after: len(after.record["samples"][0]["before"])
                                < len(before.record["samples"][0]["before"])),
        "eval.merge_rows": (2, both(lambda run: run.record["merge"]["gate"]["rows"], 4, 2)),
        "eval.merge_limit": (0.5, both(lambda run: run.record["merge"]["gate"]["limit"], 0.02, 0.5)),
    }),
    only("kind", "pretrain", both(lambda run: run.record["preflight"]["supervised_share"] == 1, False, True),
         {"data.path": "STORY", "data.max_rows": None, "data.max_length": 300, "adapter.kind": "lora"}),
    only("model.offload_layers", "disk", both(lambda run: (run.record["model"]["streamed"] or {}).get("layers"), None, 2),
         {"train.checkpointing": True}),
    only("adapter.kind", "none", both(lambda run: len(set(counts("model", "trainable", "parameters")(run))), 2, 1),
         {"quant.scheme": "none"}),
    only("data.name", "package:chatterbot-corpus", differs(lambda run: run.record["provenance"]["data"]["source"]),
         HUB),
    only("data.split", "test", both(lambda run: "What is 2" in run.examples(), False, True),
         HUB),
    only("data.files", ["*/english/coding.yml"], differs(Outcome.examples), PACKAGE),
    only("data.truncation", "drop", lambda before, after: before.record["preflight"]["rows_truncated"] > 0
         == after.record["preflight"]["rows_truncated"] < after.record["preflight"]["tokens"], {"data.max_length": 51}),
    only("data.bad_rows", "skip", lambda before, after: bool(before.refused) and after.record["data"]["rows_skipped"] == 1,
         {"data.path": "MIXED_ROWS"}),
    only("train.epochs", 1.5, both(lambda run: len(run.steps), 4, 6),
         {"train.max_steps": None, "data.max_rows": 8, "data.packing": False}),
    only("train.max_grad_norm", 1e-4, grows(lambda run: -sum(float(t.norm()) for n, t in run.adapter().items() if "lora_B" in n)),
         {"train.eps": 1.0}),
    only("eval.tasks", ["tiny_sums"], both(lambda run: "tiny_sums" in str(run.record["eval"]), False, True), TASKS),
    Change(TASKS | {"eval.tasks": ["tiny_sums"]}, {"eval.limit": (1, differs(lambda run: run.record["eval"]["tasks"]))}),
    only("eval.include_path", None, mentions("tiny_sums"), TASKS | {"eval.tasks": ["tiny_sums"]}),
    only("model.revision", "v2", mentions("revision")),
    only("plan.memory", "100MB", mentions("would not fit")),
    only("run.device", "cuda", differs(lambda run: run.record["provenance"]["device"]) if torch.cuda.is_available()
         else mentions("CUDA")),
    # ---------------------------------------------------------------------------------------------- pretraining, in ternary
    Change(SCRATCH, {
        "model.config": (LLAMA | {"intermediate_size": 64}, grows(lambda run: run.record["model"]["swap"]["bytes_before"])),
        "tokenizer.train": (290, both(lambda run: run.record["data"]["vocabulary"], 300, 290)),
        "quant.rms_norm": (True, differs(lambda run: json.loads((run.folder / "merged" / "config.json").read_text())
                                         ["quantization_config"].get("use_rms_norm"))),
        "train.health_steps": (1, both(lambda run: run.record["ternary"]["looks"], 0, 2)),
        "export.formats": (["bitnet"], both(lambda run: (run.folder / "export").exists(), False, True)),
        "export.gate_tokens": (20, both(lambda run: run.record["exports"]["bitnet"]["gate"]["tokens"], 128, 20)),
    }),
    Change(SCRATCH, {
        "train.loss_chunk": (7, lambda before, after: first("loss")(after) == pytest.approx(first("loss")(before), rel=1e-5)
                             and before.digest() != after.digest()),
        "twin": (True, both(lambda run: (run.folder / "twin" / "run.json").exists(), False, True)),
    }),
    only("train.twin_lr", 1e-5, lambda before, after: Workshop.lines(after.folder / "twin")[0]["lr"] < 1e-5
         < Workshop.lines(before.folder / "twin")[0]["lr"], SCRATCH | {"train.loss_chunk": 7, "twin": True}),
    Change(SCRATCH | {"train.max_steps": None, "train.max_tokens": 64}, {
        "tokenizer.name": ("OTHER_MODEL", both(lambda run: run.record["data"]["vocabulary"], 300, 512)),
        "train.max_tokens": (96, both(lambda run: len(run.steps), 2, 3)),
    }),
    only("data.text_key", "body", both(lambda run: "Some" in run.examples(), False, True), SCRATCH | {"data.path": "TWO_TEXTS"}),
    only("train.stochastic_rounding", True, differs(Outcome.digest), LOW),
    only("train.optimizer_in_backward", True, grows(lambda run: -run.record["model"]["bytes"]["gradients"]), LOW),
    Change(LOOKED, {
        "quant.sub_norms": (True, grows(model("parameters"))),
        "quant.warmup": (0.6, both(lambda run: run.blends()[0], 1, pytest.approx(1 / 2))),
        "distill.teacher": ("OTHER_MODEL", both(lambda run: "distill_logits" in run.steps[0], False, True)),
    }),
    Change(TAUGHT, {
        "quant.warmup_shape": ("cosine", differs(Outcome.blends)),
        "distill.logits": (200.0, lambda before, after: distilled(after, "distill_logits", "distill_relations", 500)
                           == pytest.approx(200, rel=0.1)),
        "distill.relations": (500.0, lambda before, after: distilled(after, "distill_relations", "distill_logits", 200)
                              == pytest.approx(500, rel=0.01)),
    }),
    Change(TAUGHT, {
        "distill.temperature": (2.0, differs(first("distill_logits"))),
        "distill.layer": (0, differs(first("distill_relations"))),
    }),
    only("data.revision", "v2", mentions("revision"), TERNARY | {"data.path": None, "data.name": "TEXTS"}),
]  # fmt: skip
# Tried on their own: in test_run.py, in plan/test_command.py, and with several processes in train/test_parallel.py.
BAD_STEPS = {"train.on_bad_step", "train.max_bad_steps", "train.spike"}  # there must be some: train/test_nothing_lost.py
ELSEWHERE = {"model.trust_remote_code", "fit", "plan.gpu", "plan.price_per_kwh", "run.parallel", *BAD_STEPS}


def leaves() -> list[str]:
    keys = known_keys()
    return [k for k, f in keys.items() if not (isinstance(f.annotation, type) and issubclass(f.annotation, BaseModel))]


def test_the_table_names_every_key_once() -> None:
    named = [key for change in CHANGES for key in change.keys]
    assert sorted(named) == sorted(set(leaves()) - ELSEWHERE)


class Workshop:
    """Runs recipes in one process and keeps what came of them."""

    def __init__(self, folder: Path, model: Path, other_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.count = folder, 0
        self.done: dict[str, Outcome] = {}
        tasks = folder / "tasks"
        tasks.mkdir()
        sums = write_jsonl(tasks / "sums.jsonl", [{"question": f"{n} + 1 =", "answer": str(n + 1)} for n in range(4)])
        (tasks / "tiny_sums.yaml").write_text(
            f"task: tiny_sums\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: {sums}}}\ntest_split: test\n"
            "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: ['{{answer}}', '7']\ndoc_to_target: 0\n"
            "metric_list:\n  - metric: acc\n"
        )
        two = [{"text": line * 8, "body": line.replace("The", "Some") * 8} for line in story(20_000).split("\n") if line]
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
        import lm_eval.tasks

        import finetune.report
        import finetune.train.loop as loop
        from finetune.stages import evaluate

        train, evaluate_loss = loop.Training.run, evaluate.evaluate_loss

        def watched_train(training: Any) -> Any:
            inner = training.model.get_base_model() if hasattr(training.model, "get_base_model") else training.model
            adapters = [module for module in inner.modules() if getattr(module, "lora_A", None)]
            group = {"betas": None, "eps": None, "weight_decay": None} | training.optimizer.param_groups[0]
            forwards: list[bool] = []  # whether each was in bf16
            self.seen |= {
                "checkpointing": inner.is_gradient_checkpointing,
                "attention": inner.config._attn_implementation,
                "optimizer": type(training.optimizer).__name__,
                "group": {name: tuple(value) if isinstance(value, list) else value for name, value in group.items()},
                "rank": {module.lora_A["default"].weight.shape[0] for module in adapters},
                "scaling": {module.scaling["default"] for module in adapters},
                "dropout": {getattr(module.lora_dropout["default"], "p", 0.0) for module in adapters},
                "threads": torch.get_num_threads(),
                "forwards": forwards,
            }
            hook = inner.model.layers[0].register_forward_pre_hook(
                lambda module, inputs: forwards.append(torch.is_autocast_enabled("cpu")) if module.training else None
            )
            try:
                return train(training)
            finally:
                hook.remove()

        def watched_loss(*arguments: Any, **options: Any) -> Any:
            self.seen.setdefault("batch_tokens", options.get("batch_tokens"))
            return evaluate_loss(*arguments, **options)

        monkeypatch.setattr(loop.Training, "run", watched_train)
        monkeypatch.setattr(evaluate, "evaluate_loss", watched_loss)
        tasks = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)  # thousands, which take seconds to read
        monkeypatch.setattr(lm_eval.tasks, "TaskManager", tasks)
        monkeypatch.setattr(finetune.report, "write_report", lambda path: path)  # seconds each; has its own tests

    def run(self, extra: dict[str, Any]) -> Outcome:
        """What came of a run of the base recipe with `extra`, made once."""
        key = json.dumps(extra, sort_keys=True)
        if key not in self.done:
            self.done[key] = self.once(extra)
        return self.done[key]

    def once(self, extra: dict[str, Any]) -> Outcome:
        from finetune.pipeline import run
        from finetune.stages import planning

        self.count += 1
        recipe = {section: dict(keys) for section, keys in self.base.items()}
        recipe["run"]["dir"] = str(self.folder / f"run{self.count}")
        top: dict[str, Any] = {}
        for dotted, value in extra.items():
            section, _, leaf = dotted.rpartition(".")
            value = self.names.get(value, value) if isinstance(value, str) else value
            (recipe.setdefault(section, {}) if section else top)[leaf] = value
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump({**recipe, **top}))
        folder, self.seen, threads = Path(recipe["run"]["dir"]), {}, torch.get_num_threads()
        try:
            with pytest.MonkeyPatch.context() as patch:
                if not any(key.startswith("plan.") for key in extra):  # a second each; has its own tests
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
            looks=[line["ternary"] for line in lines if "ternary" in line],
            seen=self.seen,
        )

    @staticmethod
    def lines(folder: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tokenizer_folder: Path) -> Iterator[Workshop]:
    from tests.conftest import tiny_llama

    other = tiny_llama(tmp_path_factory.mktemp("other-llama"), tokenizer_folder, seed=1)
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield Workshop(tmp_path_factory.mktemp("keys"), tiny_model, other, monkeypatch)


CLOCK = {"tokens_per_second", "step_seconds", "memory_bytes", "time"}


def test_the_same_recipe_twice_gives_the_same_run(workshop: Workshop) -> None:
    one, other = workshop.run({}), workshop.once({})
    assert one.digest() == other.digest()
    for first, second in zip(one.steps, other.steps, strict=True):
        assert {k: v for k, v in first.items() if k not in CLOCK} == {k: v for k, v in second.items() if k not in CLOCK}
    for part in ("eval", "data", "preflight", "samples", "model"):
        assert one.record[part] == other.record[part]


@pytest.mark.planned  # where the key is the plan's; the workshop leaves it out of the others
@pytest.mark.parametrize(("change", "key"), [pytest.param(c, key, id=key) for c in CHANGES for key in c.keys])
def test_a_key_does_what_it_says(workshop: Workshop, change: Change, key: str) -> None:
    before, after = workshop.run(change.base), workshop.run(change.base | {key: value for key, (value, _) in change.keys.items()})
    assert bool(before.refused) == (key == "data.bad_rows"), before.refused
    assert change.keys[key][1](before, after), after.refused or (before, after)
