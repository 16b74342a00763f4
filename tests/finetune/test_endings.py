"""Runs that are stopped or fail late: their records describe what exists, and `resume` finishes them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import finetune
from finetune.errors import GateError, Interruption
from finetune.record import read_record
from tests.conftest import record_of, story

LORA = """\
model: {{name: {model}, dtype: fp32}}
adapter: {{rank: 2}}
data: {{path: {data}, max_length: 64, heldout: 4}}
train: {{max_steps: 2}}
eval: {{samples: 0}}
run: {{dir: {run}, device: cpu, threads: 1, merge: false}}
"""
TERNARY = """\
kind: pretrain
model:
  config: {{model_type: llama, hidden_size: 32, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2}}
tokenizer: {{train: 290}}
quant: {{scheme: ternary}}
data: {{path: {data}, max_length: 32, heldout: 2}}
train: {{max_steps: 2}}
eval: {{samples: 0}}
export: {{formats: [bitnet-online, gguf-f16]}}
run: {{dir: {run}, device: cpu, threads: 1}}
"""


@pytest.fixture
def lora(tmp_path: Path, tiny_model: Path, rows_file: Path) -> Path:
    path = tmp_path / "lora.yaml"
    path.write_text(LORA.format(model=tiny_model, data=rows_file, run=tmp_path / "run"))
    return path


def test_ctrl_c_while_the_report_is_written_leaves_a_stopped_run(
    lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import finetune.report

    write_report, calls = finetune.report.write_report, 0

    def interrupt_once(path: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise KeyboardInterrupt
        return write_report(path)

    monkeypatch.setattr(finetune.report, "write_report", interrupt_once)
    with pytest.raises(Interruption):
        finetune.run(lora)
    record = record_of(tmp_path / "run")
    assert (record["state"], record["next"]) == ("stopped", [f"finetune resume {tmp_path / 'run'}"])
    assert (tmp_path / "run" / "report.html").exists()
    phases = [phase["name"] for phase in record["phases"]]
    result = finetune.run(lora, resume=True)
    assert result.state == "done"
    # Resuming in the same process keeps the phases of the first part.
    assert [phase.name for phase in result.record.phases][: len(phases)] == phases


def test_run_stops_when_the_model_bypasses_a_linear(lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the model read a weight without calling its layer, training and evaluation would use different models."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    def forward(self: Any, x: Any) -> Any:
        gate = getattr(self.gate_proj, "base_layer", self.gate_proj)
        weight = gate.dequantize(x.dtype) if hasattr(gate, "dequantize") else gate.weight
        return self.down_proj(self.act_fn(x @ weight.t()) * self.up_proj(x))

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    with pytest.raises(GateError, match="bypassed") as error:
        finetune.run(lora, {"quant.scheme": "nf4"})
    assert "gate_proj" in str(error.value.got)
    assert record_of(tmp_path / "run")["state"] == "failed"


def test_failed_run_removes_its_patches(lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AttentionInterface
    from transformers.models.llama import modeling_llama

    from finetune.stages import train

    before = (modeling_llama.apply_rotary_pos_emb, dict(AttentionInterface._global_mapping))
    patched: list[bool] = []

    def fail(*arguments: Any) -> Any:
        patched.append(dict(AttentionInterface._global_mapping) != before[1])
        raise GateError("no more")

    monkeypatch.setattr(train, "train", fail)
    with pytest.raises(GateError):
        finetune.run(lora)
    assert patched == [True]  # the patches were installed
    assert (modeling_llama.apply_rotary_pos_emb, dict(AttentionInterface._global_mapping)) == before


def test_exports_before_a_failed_export_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune.stages import export

    (tmp_path / "story.txt").write_text(story(12_000))
    path = tmp_path / "ternary.yaml"
    path.write_text(TERNARY.format(data=tmp_path / "story.txt", run=tmp_path / "run"))
    real_export = export.export

    def refuse_gguf(*arguments: Any, **options: Any) -> Any:
        if options["format"] == "gguf-f16":
            raise GateError("another model")
        return real_export(*arguments, **options)

    monkeypatch.setattr(export, "export", refuse_gguf)
    with pytest.raises(GateError):
        finetune.run(path)
    record = record_of(tmp_path / "run")
    assert record["state"] == "failed"
    assert record["merge"]["path"] == "merged"
    assert set(record["exports"]) == {"bitnet", "bitnet-online"}


def test_fit_changes_of_a_version_1_record_get_the_current_names(lora: Path, tmp_path: Path) -> None:
    """Version 1 recorded the changes of `fit: auto` under the names that keys and values had then."""
    from finetune.recipe import read_recipe
    from finetune.run_dir import with_fit_changes

    finetune.run(lora)
    record = record_of(tmp_path / "run")
    plan = {
        "device": "cpu", "budget_bytes": 1, "phases": [], "peak_bytes": 1, "fits": True, "tokens_per_step": 1,
        "step_seconds": 1.0, "seconds": 1.0, "notes": [],
        "fit": {
            "keys": {"model.stream": "disk", "train.on_bad_step": "back", "train.micro_batch": 1},
            "changes": [
                {"why": "room", "keys": {
                    "model.stream": {"old": "none", "new": "disk"},
                    "train.on_bad_step": {"old": "skip", "new": "back"},
                    "train.checkpointing": {"old": False, "new": True},
                }},
            ],
        },
    }  # fmt: skip
    version_1 = {key: value for key, value in record.items() if key != "version"} | {"format": 1, "plan": plan}
    (tmp_path / "run" / "run.json").write_text(json.dumps(version_1))
    upgraded = read_record(tmp_path / "run")
    assert upgraded.plan.fit.keys == {"model.offload_layers": "disk", "train.on_bad_step": "rollback", "train.micro_batch": 1}
    fitted = with_fit_changes(read_recipe(lora, ["fit=auto", "train.save_steps=1"]), upgraded)
    assert (fitted.model.offload_layers, fitted.train.on_bad_step, fitted.train.checkpointing) == ("disk", "rollback", True)


def test_python_overrides_accept_any_text_and_paths(lora: Path, rows_file: Path) -> None:
    recipe = finetune.check(lora, {"about": "😀 é 漢", "data.path": rows_file})
    assert (recipe.about, recipe.data.path) == ("😀 é 漢", str(rows_file))


def test_signal_while_libraries_load_ends_the_run_before_it_writes_files(
    lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune import pipeline

    @contextlib.contextmanager
    def terminate(*arguments: Any) -> Iterator[None]:
        os.kill(os.getpid(), signal.SIGTERM)
        yield

    monkeypatch.setattr(pipeline, "quiet_libraries", terminate)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        finetune.run(lora)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert not (tmp_path / "run").exists()


def test_twin_ends_unlocked_with_its_own_next_commands(tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_text(story(12_000))
    path = tmp_path / "ternary.yaml"
    path.write_text(TERNARY.format(data=tmp_path / "story.txt", run=tmp_path / "run") + "twin: true\n")
    result = finetune.run(path, {"export.formats": []})
    twin = tmp_path / "run" / "twin"
    assert record_of(twin)["next"] == [f"finetune chat {twin}", f"finetune show {twin}"]
    assert result.record.next == [f"finetune chat {tmp_path / 'run'} {twin}", f"finetune show {tmp_path / 'run'}"]
    assert not list((tmp_path / "run").rglob(".lock"))
    assert finetune.run(path, {"export.formats": []}, resume=True).record.next == result.record.next
