"""Failures that come from outside: full disks, lost connections, damaged and malicious files. Each ends in one clear error.
Nothing from a file is executed, no file is left half-written, and a run resumes to the same weights once the cause is fixed."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.train import checkpoint
from tests.conftest import Terminal, alpaca, story, tiny_llama, write_jsonl
from tests.support.starts import Start

RECIPE = """\
model: {{name: {model}, dtype: fp32}}
quant: {{scheme: nf4}}
adapter: {{rank: 4}}
data: {{path: {rows}, max_length: 128, heldout: 6}}
train: {{max_steps: 16, lr: 1.0e-3, save_steps: 2}}
eval: {{samples: 0, max_new_tokens: 2}}
run: {{device: cpu, threads: 1}}
"""
LAST = "checkpoints/step-000016"
TEXT_RECIPE = """\
kind: pretrain
model:
  config: {{model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2,
    num_key_value_heads: 2, max_position_embeddings: 64, tie_word_embeddings: true}}
tokenizer: {{train: 300}}
data: {{path: {text}, max_length: 32, heldout: 4}}
train: {{max_steps: 80, micro_batch: 4, save_steps: 2, precision: fp32}}
eval: {{samples: 0}}
run: {{device: cpu, threads: 1, merge: false}}
"""


def write_recipe(folder: Path, model: Path) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(RECIPE.format(model=model, rows=write_jsonl(folder / "rows.jsonl", alpaca(40))))
    return path


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Path) -> Path:
    return write_recipe(tmp_path, tiny_model)


@pytest.fixture(scope="module")
def _recipe(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    return write_recipe(tmp_path_factory.mktemp("made"), tiny_model)


def use_small_blocks(patch: pytest.MonkeyPatch) -> None:
    """Split streamed text into many blocks, as a large file would be."""
    from finetune.data import stream

    patch.setitem(stream.open_source.__kwdefaults__, "block_bytes", 1500)  # type: ignore[arg-type]
    patch.setattr(stream, "PIECE", 200)


def write_text_recipe(folder: Path) -> Path:
    (folder / "story.txt").write_text(story(12_000))
    path = folder / "text.yaml"
    path.write_text(TEXT_RECIPE.format(text=folder / "story.txt"))
    return path


@pytest.fixture
def text_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    use_small_blocks(monkeypatch)
    return write_text_recipe(tmp_path)


@pytest.fixture(scope="module")
def uninterrupted_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the text recipe, trained on unchanged text."""
    from finetune.pipeline import run
    from finetune.recipe import read_recipe

    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finetune.stages.planning.default_planner", None)
        use_small_blocks(patch)
        run(read_recipe(write_text_recipe(folder), [f"run.dir={folder / 'whole'}"]), "text")
    return folder / "whole"


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Fail after `seconds` instead of hanging."""

    def fail(number: int, frame: Any) -> None:
        raise AssertionError(f"not done within {seconds} s")

    previous_handler = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous_handler)


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file under `folder`, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_clear_error(code: int, err: str, *, expected: int = 2) -> None:
    assert code == expected, err
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert "  got: " in err
    assert "  hint: " in err
    assert "  where: " in err or re.search(r"\S:\d+: ", err), err


def refused(finetune: Terminal, *arguments: str, code: int = 2) -> str:
    """The error message of a command that must be refused within a minute without changing any file."""
    before = contents(finetune.folder)
    with time_limit(60):
        exit_code, _, err = finetune(*arguments)
    assert_clear_error(exit_code, err, expected=code)
    assert contents(finetune.folder) == before
    return err


def mark_stopped(run: Path) -> None:
    """Change a finished run into one that was stopped between training and merging."""
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"state": "stopped"}))
    shutil.rmtree(run / "merged", ignore_errors=True)


def checkpoint_step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def weights_of(run: Path, step: int) -> bytes:
    return (run / "checkpoints" / f"step-{step:06d}" / "weights.safetensors").read_bytes()


class MaliciousPickle:
    """A pickle that creates the folder `marker` when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.marker),)


# ------------------------------------------------------------------------------------------------------------------- disks

# Start of a program that runs commands in one process, in its own mount namespace, on a real small disk.
# As `unshare --user --map-root-user --mount`, in a process that has imported the libraries and has one thread.
DISK_PROGRAM = """\
import contextlib, ctypes, io, json, os, subprocess, sys, threading, time
from pathlib import Path

user, group = os.getuid(), os.getgid()
assert ctypes.CDLL(None).unshare(0x10000000 | 0x00020000) == 0, "CLONE_NEWUSER | CLONE_NEWNS"
for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
    Path("/proc/self", name).write_text(text)

root, disk = Path(sys.argv[1]), Path(sys.argv[1], "disk")
os.chdir(root)
import numpy
import finetune.pipeline
import finetune.stages.planning
from finetune import cli
from finetune.errors import UserError
from finetune.files import atomic_file
from finetune.train import checkpoint

finetune.stages.planning.default_planner = None
results = {}


def mount(*options):
    subprocess.run(["mount", *options], check=True)


def command(name, *arguments):
    sys.argv = ["finetune", *arguments]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
    temporary = [str(path.relative_to(root)) for path in disk.rglob("*") if ".finetune-" in path.name or path.name == ".lock"]
    results[name] = {"code": code, "out": out.getvalue(), "err": err.getvalue(), "left": temporary, "files": os.listdir(disk)}
    for folder in disk.glob("*/checkpoints/*"):
        results[name].setdefault("checkpoints", {})[folder.name] = checkpoint.damage(folder)
    results[name]["state"] = {file.parent.name: json.loads(file.read_text())["state"] for file in disk.glob("*/run.json")}


def fill(leave):
    with open(disk / "filler", "ab", buffering=0) as file:
        with contextlib.suppress(OSError):
            while (room := os.statvfs(disk).f_bavail * 4096 - leave) > 0:
                file.write(bytes(min(room, 1 << 20)))


def fill_once(path, leave):
    def wait_and_fill():
        while not path.exists():
            time.sleep(0.001)
        fill(leave)

    threading.Thread(target=wait_and_fill, daemon=True).start()


def make_room():
    (disk / "filler").unlink()


"""


@pytest.fixture(scope="module")
def disk_results(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> dict[str, Any]:
    """The result of each command on a disk of 64 MiB: one that is full at the start, one that fills up during training or
    merging, and one that is read-only. Skips where mounting is not permitted."""
    root = tmp_path_factory.mktemp("disks")
    write_recipe(root, tiny_llama(root / "model", tokenizer_folder, vocab_size=49152))  # 12 MB: does not fit on the full disk
    (root / "disk").mkdir()
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    try:
        subprocess.run([*namespace, "mount", "-t", "tmpfs", "tmpfs", str(root / "disk")], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no disk can be mounted here: {error}")
    script = """
        command("whole", "run", "tiny.yaml", "run.dir=whole")
        mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk))
        fill(leave=1 << 20)
        command("at the start", "run", "tiny.yaml", "run.dir=disk/one")
        make_room()

        fill_once(disk / "one/checkpoints/step-000002/manifest.json", leave=0)
        command("while it trains", "run", "tiny.yaml", "run.dir=disk/one")
        command("still full", "resume", "disk/one")
        try:
            with atomic_file(disk / "a.gguf") as path:
                numpy.ones(1 << 22).tofile(path)  # as the GGUF export writes; it has its own error message
        except UserError as error:
            results["export"] = str(error)
        make_room()
        command("room again", "resume", "disk/one")

        fill_once(disk / "two/checkpoints/step-000002/manifest.json", leave=8 << 20)  # no room to merge
        command("while it merges", "run", "tiny.yaml", "run.dir=disk/two")
        make_room()
        command("room for a merge", "resume", "disk/two")
        for name in ("one", "two"):
            subprocess.run(["cp", "-r", str(disk / name), str(root / name)], check=True)

        record = json.loads((disk / "one/run.json").read_text())
        (disk / "one/run.json").write_text(json.dumps(record | {"state": "stopped"}))
        mount("-o", "remount,ro", str(disk))
        command("check", "check", "tiny.yaml", "run.dir=disk/three")
        command("run", "run", "tiny.yaml", "run.dir=disk/three")
        command("resume", "resume", "disk/one")
        command("merge", "merge", "disk/one", "--out", "disk/merged")
        command("show", "show", "disk/one")
        command("eval", "eval", "disk/one/adapter")
        print(json.dumps(results))
        """
    (root / "disk.py").write_text(DISK_PROGRAM + textwrap.dedent(script))
    with Start([str(root)], root, root / "disk.log", program=root / "disk.py") as start:
        printed = start.succeed(240)
    return {"root": root, **json.loads(printed.splitlines()[-1])}


def test_full_disk_ends_in_a_clear_error_and_the_run_resumes(disk_results: dict[str, Any]) -> None:
    results = disk_results
    assert results["whole"]["code"] == 0, results["whole"]
    at_start, training, still_full, merging = (
        results[key] for key in ("at the start", "while it trains", "still full", "while it merges")
    )
    assert_clear_error(at_start["code"], at_start["err"])
    assert "not enough disk space" in at_start["err"]
    assert "1.0 MiB free" in at_start["err"]
    assert at_start["files"] == ["filler"]

    for result in (training, still_full, merging):
        assert_clear_error(result["code"], result["err"])
        assert result["left"] == []
        assert set(result["checkpoints"].values()) == {None}  # every checkpoint that exists is complete
    for result, run in ((training, "disk/one"), (merging, "disk/two")):
        assert "No space left on device" in result["err"]
        assert re.findall(r"last complete checkpoint is (step-\d+)", result["err"])[0] in result["checkpoints"]
        assert f"finetune resume {run}" in result["err"]
    assert "not enough disk space" in still_full["err"]
    assert results["export"].startswith("the disk is full")
    assert still_full["checkpoints"] == training["checkpoints"]
    assert "disk/two/merged" in merging["err"]
    assert merging["state"] == {"one": "done", "two": "failed"}

    for name, resumed in (("one", results["room again"]), ("two", results["room for a merge"])):
        assert resumed["code"] == 0, resumed
        assert resumed["state"][name] == "done"
        for file in ("adapter/adapter_model.safetensors", "merged/model.safetensors", f"{LAST}/optimizer.safetensors"):
            assert (results["root"] / name / file).read_bytes() == (results["root"] / "whole" / file).read_bytes(), (name, file)


def test_read_only_disk_refuses_writes_but_show_and_eval_work(disk_results: dict[str, Any]) -> None:
    results = disk_results
    for name in ("check", "run", "resume", "merge"):
        assert_clear_error(results[name]["code"], results[name]["err"])
        assert "not writable" in results[name]["err"] or "Read-only file system" in results[name]["err"], results[name]["err"]
        assert (sorted(results[name]["files"]), results[name]["left"]) == (["one", "two"], [])
        assert results[name]["state"] == {"one": "stopped", "two": "done"}
    for name in ("show", "eval"):
        assert results[name]["code"] == 0, results[name]


# -------------------------------------------------------------------------------------------------------------------- data


def test_resume_is_refused_while_the_data_file_is_missing(finetune: Terminal, recipe: Path, tmp_path: Path) -> None:
    assert finetune("run", str(recipe), "run.dir=r")[0] == 0
    mark_stopped(tmp_path / "r")
    (tmp_path / "rows.jsonl").rename(tmp_path / "elsewhere.jsonl")
    for arguments in (("resume", "r"), ("check", "r/recipe.yaml")):
        assert "rows.jsonl" in refused(finetune, *arguments)
    (tmp_path / "elsewhere.jsonl").rename(tmp_path / "rows.jsonl")
    code, _, err = finetune("resume", "r")
    assert code == 0, err


@pytest.mark.parametrize("how", ["removed", "cut off", "written over"])
def test_text_that_changes_during_training_stops_at_a_checkpoint(
    finetune: Terminal, text_recipe: Path, uninterrupted_run: Path, tmp_path: Path, how: str
) -> None:
    """The last step is saved. With the original text back, the run resumes to the same weights."""
    text = tmp_path / "story.txt"
    original = text.read_bytes()
    first_manifest = tmp_path / "cut" / "checkpoints" / "step-000002" / "manifest.json"

    def change() -> None:
        while not first_manifest.exists():
            time.sleep(0.001)
        if how == "removed":
            text.unlink()
        else:
            text.write_bytes(original[:9_500] if how == "cut off" else original[::-1])

    writer = threading.Thread(target=change, daemon=True)
    writer.start()
    with time_limit(120):
        code, _, err = finetune("run", str(text_recipe), "run.dir=cut")
    writer.join()
    assert_clear_error(code, err)
    assert "story.txt" in err
    assert "finetune resume" in err
    record = json.loads((tmp_path / "cut" / "run.json").read_text())
    assert record["state"] == "failed"
    lines = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
    newest, _ = checkpoint.newest(tmp_path / "cut" / "checkpoints")
    assert newest is not None
    assert checkpoint_step(newest) == json.loads(lines[-1])["step"]
    refused(finetune, "resume", "cut")
    text.write_bytes(original)
    code, _, err = finetune("resume", "cut")
    assert code == 0, err
    assert weights_of(tmp_path / "cut", 80) == weights_of(uninterrupted_run, 80)


def network_errors() -> list[Exception]:
    """The exceptions of a lost connection: from requests, httpx2 (huggingface_hub), fsspec, datasets and sockets."""
    import httpx2
    import requests
    from fsspec.exceptions import FSTimeoutError

    return [
        requests.exceptions.ConnectionError("HTTPSConnectionPool(host='huggingface.co', port=443): Max retries exceeded"),
        httpx2.ConnectError("[Errno -3] Temporary failure in name resolution"),
        FSTimeoutError(),
        ConnectionError("Server Disconnected"),
        TimeoutError("The read operation timed out"),
    ]


def test_resume_after_lost_connections_while_streaming_is_bit_equal(
    finetune: Terminal, text_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each start loses its connection in another way. The last step is saved; the weights equal an uninterrupted run's."""
    import datasets

    (tmp_path / "hub").mkdir()
    rows = [{"text": part} for part in story(12_000).split("\n\n")]
    (tmp_path / "hub" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pending_errors: list[Exception] = []
    last_step = [0]

    def saved_a_checkpoint() -> bool:
        return any(checkpoint_step(path) > last_step[0] for path in (tmp_path / "cut" / "checkpoints").glob("step-*"))

    class UnreliableDataset:
        """A streamed dataset that raises the pending error once this start has saved a checkpoint."""

        def __init__(self, dataset: Any) -> None:
            self.dataset, self.state_dict, self.load_state_dict = dataset, dataset.state_dict, dataset.load_state_dict

        def __iter__(self) -> Iterator[Any]:
            for example in self.dataset:
                if pending_errors and saved_a_checkpoint():
                    raise pending_errors.pop()
                yield example

    load_local = datasets.load_dataset_builder

    def load(name: str, **options: Any) -> Any:
        assert name == "somebody/stories"
        builder = load_local(str(tmp_path / "hub"), data_files="*.jsonl")
        builder.hash, stream = "1" * 40, builder.as_streaming_dataset
        builder.as_streaming_dataset = lambda split: UnreliableDataset(stream(split=split))
        return builder

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    data_source = ("data.path=null", "data.name=somebody/stories")
    code, _, err = finetune("run", str(text_recipe), *data_source, "run.dir=whole")
    assert code == 0, err
    for error in network_errors():
        pending_errors[:] = [error]
        command = ("resume", "cut") if last_step[0] else ("run", str(text_recipe), *data_source, "run.dir=cut")
        with time_limit(120):
            code, _, err = finetune(*command)
        assert_clear_error(code, err)
        assert type(error).__name__ in err
        assert "finetune resume" in err
        newest, _ = checkpoint.newest(tmp_path / "cut" / "checkpoints")
        assert newest is not None
        lines = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
        assert checkpoint_step(newest) == json.loads(lines[-1])["step"] > last_step[0]
        last_step[0] = checkpoint_step(newest)
    code, _, err = finetune("resume", "cut")
    assert code == 0, err
    assert weights_of(tmp_path / "cut", 80) == weights_of(tmp_path / "whole", 80)


# ------------------------------------------------------------------------------------------------------------------ models


@pytest.fixture
def model(tmp_path: Path, tiny_model: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def refused_model(finetune: Terminal, recipe: Path, name: Path, *, in_check: bool = True) -> str:
    """The error message of a run with this model. in_check: `finetune check` gives the same message."""
    message = refused(finetune, "run", str(recipe), f"model.name={name}", "run.dir=r")
    if in_check:
        assert refused(finetune, "check", str(recipe), f"model.name={name}") == message
    return message


def test_damaged_safetensors_are_refused(finetune: Terminal, recipe: Path, model: Path) -> None:
    weights = model / "model.safetensors"
    content = weights.read_bytes()
    for damaged in (content[:-1000], content[:5], b"", struct.pack("<Q", 2**60) + content[8:], content[:8] + b"\0" + content[9:]):
        weights.write_bytes(damaged)
        message = refused_model(finetune, recipe, model)
        assert "cannot read this safetensors file" in message
        assert f"{weights}: " in message
        assert f"{len(damaged)} bytes" in message


def test_mismatched_or_missing_shards_are_refused(finetune: Terminal, recipe: Path, model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    first_file, second_file = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    halves = {
        first_file: {k: v for k, v in tensors.items() if ".1." not in k},
        second_file: {k: v for k, v in tensors.items() if ".1." in k},
    }
    missing = "model.layers.1.mlp.up_proj.weight"

    def write_shards(second: dict[str, torch.Tensor], **other_files: str) -> None:
        save_file(halves[first_file], model / first_file, metadata={"format": "pt"})
        save_file(second, model / second_file, metadata={"format": "pt"})
        weight_map = {key: name for name, half in halves.items() for key in half} | other_files
        (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    write_shards({key: torch.zeros(2, *value.shape) for key, value in halves[second_file].items()})
    message = refused_model(finetune, recipe, model, in_check=False)
    assert "the weights do not match config.json" in message
    assert f"in {second_file} is [2, " in message
    write_shards({key: value for key, value in halves[second_file].items() if key != missing})
    assert f"{second_file} has no {missing}" in refused_model(finetune, recipe, model)
    (model / second_file).unlink()
    assert second_file in refused_model(finetune, recipe, model)
    write_shards(halves[second_file])
    shutil.move(model / second_file, model.parent / "elsewhere.safetensors")
    for path in ("../elsewhere.safetensors", str(model.parent / "elsewhere.safetensors")):
        (model / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": dict.fromkeys(halves[first_file], first_file) | dict.fromkeys(halves[second_file], path)})
        )
        message = refused_model(finetune, recipe, model)
        assert "names a file outside its folder" in message
        assert path in message
    for text in ("[1]", "{", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}', "[" * 100_000):
        (model / "model.safetensors.index.json").write_text(text)
        assert "index" in refused_model(finetune, recipe, model)


def test_damaged_gguf_headers_are_refused_quickly(finetune: Terminal, recipe: Path, tmp_path: Path) -> None:
    """Absurdly large counts take neither memory nor time."""
    key = struct.pack("<Q", 1) + b"k" + struct.pack("<I", 9)  # an array named k
    padding = bytes(200)
    cases = {
        "magic": (b"GGML" + struct.pack("<IQQ", 3, 0, 0) + padding, True),
        "short": (b"GGUF" + struct.pack("<I", 3), True),
        "version": (b"GGUF" + struct.pack("<IQQ", 99, 0, 0) + padding, True),
        "tensors": (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0) + padding, True),
        "keys": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60) + padding, True),
        "bytes": (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key + struct.pack("<IQ", 0, 2**60) + padding, False),
        "strings": (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key + struct.pack("<IQ", 8, 2**60) + padding, False),
        "empty": (b"", True),
    }
    for name, (content, in_check) in cases.items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(content)
        started = time.monotonic()
        assert str(path) in refused_model(finetune, recipe, path, in_check=in_check)
        assert time.monotonic() - started < 20


def test_mismatched_or_damaged_tokenizers_are_refused(
    finetune: Terminal, recipe: Path, model: Path, tmp_path: Path, tokenizer_folder: Path
) -> None:
    tiny_llama(tmp_path / "small", tokenizer_folder, vocab_size=100)
    arguments = ("run", str(recipe), f"model.name={tmp_path / 'small'}", "run.dir=r")
    for force in ((), ("--force",)):
        message = refused(finetune, *arguments, *force, code=3)
        assert "the model has 100 embeddings: they do not belong together" in message
    (model / "tokenizer.json").write_text('{"version": "1.0"')
    assert "tokenizer.json" in refused_model(finetune, recipe, model, in_check=False)
    (model / "tokenizer.json").unlink()
    message = refused_model(finetune, recipe, model, in_check=False)
    assert "cannot read the tokenizer" in message
    (model / "tokenizer_config.json").unlink()
    assert "no tokenizer file" in refused_model(finetune, recipe, model, in_check=False)


def test_pickled_weights_are_refused_without_loading_them(finetune: Terminal, recipe: Path, model: Path, tmp_path: Path) -> None:
    marker = tmp_path / "sprung"
    weights = model / "model.safetensors"
    for write in (
        lambda: weights.write_bytes(pickle.dumps(MaliciousPickle(marker))),
        lambda: torch.save({"a": MaliciousPickle(marker)}, weights),
    ):
        write()
        message = refused_model(finetune, recipe, model)
        assert "cannot read this safetensors file" in message
        assert "a pickle" in message
    weights.unlink()
    torch.save({"a": MaliciousPickle(marker)}, model / "pytorch_model.bin")
    message = refused_model(finetune, recipe, model)
    assert "weights in pickle files are not loaded" in message
    assert "pytorch_model.bin" in message
    with pytest.raises(pickle.UnpicklingError):  # the pickle is malicious: loading it does create the folder
        torch.load(model / "pytorch_model.bin")
    pickle.loads(pickle.dumps(MaliciousPickle(marker)))
    assert marker.is_dir()


# -------------------------------------------------------------------------------------------------------------- run folders


@pytest.fixture(scope="module")
def _finished_run(_recipe: Path) -> Path:
    """A finished run."""
    from finetune.pipeline import run
    from finetune.recipe import read_recipe

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finetune.stages.planning.default_planner", None)
        run(read_recipe(_recipe, [f"run.dir={_recipe.parent / 'r'}", "train.max_steps=4"]), "tiny")
    return _recipe.parent / "r"


@pytest.fixture
def finished_run(_finished_run: Path, tmp_path: Path) -> Path:
    """A copy of a finished run that a test may damage."""
    return Path(shutil.copytree(_finished_run, tmp_path / "r"))


def test_resume_skips_damaged_checkpoints_and_names_them(finetune: Terminal, finished_run: Path) -> None:
    """Resume uses the newest intact checkpoint and names the damaged one. With none intact it is refused and does not restart."""
    trained_weights = weights_of(finished_run, 4)
    mark_stopped(finished_run)
    flipped = bytearray(trained_weights)
    flipped[-3] ^= 1
    (finished_run / "checkpoints" / "step-000004" / "weights.safetensors").write_bytes(flipped)
    code, out, err = finetune("resume", "r")
    assert code == 0, err
    assert "step-000004: weights.safetensors was changed after it was written" in out + err
    assert "resuming after step 2" in out
    assert weights_of(finished_run, 4) == trained_weights
    mark_stopped(finished_run)
    for name in ("step-000002", "step-000004"):
        (finished_run / "checkpoints" / name / "weights.safetensors").write_bytes(b"x")
    message = refused_resume(finetune, finished_run)
    assert "step-000002" in message
    assert "step-000004" in message
    shutil.rmtree(finished_run / "adapter")
    assert "every checkpoint of this run is damaged" in refused(finetune, "eval", "r")


def refused_resume(finetune: Terminal, run: Path) -> str:
    """The error message of a `finetune resume` that must change no file but run.json and the report."""
    before = contents(run)
    code, _, err = finetune("resume", run.name)
    assert_clear_error(code, err)
    after = contents(run)
    for name in ("run.json", "report.html"):
        before.pop(name, None), after.pop(name, None)
    assert after == before
    return err


def test_checkpoints_with_outside_paths_or_pickles_are_refused(finetune: Terminal, finished_run: Path, tmp_path: Path) -> None:
    """Also with correct hashes: who forges a checkpoint can forge its manifest."""
    mark_stopped(finished_run)
    newest, previous = finished_run / "checkpoints" / "step-000004", finished_run / "checkpoints" / "step-000002"
    shutil.rmtree(previous)
    manifest = json.loads((newest / "manifest.json").read_text())
    optimizer = newest / "optimizer.safetensors"

    def write_manifest(**files: Any) -> None:
        (newest / "manifest.json").write_text(json.dumps(manifest | files))

    for path in ("../../../secret", str(tmp_path / "secret"), "/dev/zero"):
        (tmp_path / "secret").write_text("x")
        write_manifest(**{path: {"bytes": 0 if path == "/dev/zero" else 1, "sha256": hashlib.sha256(b"x").hexdigest()}})
        with time_limit(30):
            assert path in refused_resume(finetune, finished_run)
    optimizer.write_bytes(pickle.dumps(MaliciousPickle(tmp_path / "sprung")))
    write_manifest(
        **{optimizer.name: {"bytes": optimizer.stat().st_size, "sha256": hashlib.sha256(optimizer.read_bytes()).hexdigest()}}
    )
    assert "safetensors" in refused_resume(finetune, finished_run)
    assert not (tmp_path / "sprung").exists()
    optimizer.unlink()
    (newest / "manifest.json").write_text("{}")  # an empty manifest lists no file that could be damaged
    assert "missing" in refused_resume(finetune, finished_run)


def test_invalid_run_records_are_refused(finetune: Terminal, finished_run: Path, tmp_path: Path) -> None:
    record, newest = json.loads((finished_run / "run.json").read_text()), "checkpoints/step-000004"
    (finished_run / "bytes").write_bytes(b"\xff\xfe\0")
    for text in ("[]", "{}", '"x"', '{"name": "x"', "[" * 100_000, json.dumps(record | {"name": "../../climbed"})):
        (finished_run / "run.json").write_text(text)
        for arguments in (("show", "r"), ("resume", "r"), ("eval", "r"), ("eval", "r/adapter"), ("eval", f"r/{newest}")):
            assert "cannot read the run's record" in refused(finetune, *arguments)
    shutil.move(finished_run / "bytes", finished_run / "run.json")
    assert "cannot read the run's record" in refused(finetune, "show", "r")
    unreadable, no_dtype = "cannot read the run's record", "has no valid dtype for its model"
    for model, message in (
        (None, no_dtype),
        (record["model"] | {"dtype": "load"}, no_dtype),
        (record["model"] | {"eos_token_ids": "x"}, unreadable),
        ({"dtype": "float32", "eos_token_ids": [2]}, unreadable),
    ):
        (finished_run / "run.json").write_text(json.dumps(record | {"model": model}))
        assert message in refused(finetune, "eval", "r/adapter")


def test_damaged_or_pickled_adapters_are_refused(finetune: Terminal, finished_run: Path, tmp_path: Path) -> None:
    adapter, marker = finished_run / "adapter", tmp_path / "sprung"
    weights, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    content, settings = weights.read_bytes(), json.loads(config.read_text())
    for damaged in (content[:-100], pickle.dumps(MaliciousPickle(marker)), b""):
        weights.write_bytes(damaged)
        for arguments in (("eval", "r/adapter"), ("merge", "r", "--out", "m")):
            assert "cannot read this safetensors file" in refused(finetune, *arguments)
    weights.unlink()
    torch.save({"a": MaliciousPickle(marker)}, adapter / "adapter_model.bin")
    assert "adapter_model.bin" in refused(finetune, "eval", "r/adapter")
    assert not marker.exists()

    weights.write_bytes(content)
    shutil.copytree(adapter, tmp_path / "alone")
    for changes, expected in (
        ({"base_model_name_or_path": "../../nowhere"}, "../../nowhere"),
        ({"base_model_name_or_path": ["x"]}, "base model"),
        ({"base_model_name_or_path": str(adapter)}, "contains an adapter"),
        ({"peft_type": "NOTHING"}, "NOTHING"),
    ):
        (tmp_path / "alone" / "adapter_config.json").write_text(json.dumps(settings | changes))
        assert expected in refused(finetune, "eval", "alone", "--file", str(adapter / "README.md"))


# ----------------------------------------------------------------------------------------------------- recipes and rows


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))

# One bracket per line: within a line each could open a mapping key, and ruling that out takes a second.
DEEP = "[\n" * 100_000 + "]" * 100_000


def test_yaml_bombs_and_tags_in_recipes_are_refused(finetune: Terminal, recipe: Path, tmp_path: Path) -> None:
    good = recipe.read_text()
    for name, text in {
        "bomb": BOMB + good,
        "long": f"about: &s {'x' * 200_000}\n{good}x: [{', '.join(['*s'] * 5_000)}]\n",  # 1 GB of text
        "deep": good + "x: " + DEEP,
        "self": good + "x: &a [*a]\n",
        "tag": good + f"x: !!python/object/apply:os.mkdir ['{tmp_path}/sprung']\n",
        "date": good + "x: 2024-99-99\n",
    }.items():
        path = tmp_path / f"{name}.yaml"
        path.write_text(text)
        for command in ("check", "run"):
            assert path.name in refused(finetune, command, str(path))
    for value in (f"!!python/object/apply:os.mkdir ['{tmp_path}/sprung']", "[" * 100_000, "2024-99-99", "&a [*a]"):
        assert "train.lr" in refused(finetune, "run", str(recipe), f"train.lr={value}")
    assert not (tmp_path / "sprung").exists()


def test_yaml_bombs_tags_and_deep_json_in_data_are_refused(finetune: Terminal, recipe: Path, tmp_path: Path) -> None:
    for name, text in {
        "bomb.yml": BOMB + "conversations: [*a11, *a11]\n",
        "deep.yml": "conversations: " + DEEP,
        "tag.yml": f"conversations:\n- !!python/object/apply:os.mkdir ['{tmp_path}/sprung']\n",
        "date.yml": "conversations: [[2024-99-99, b]]\n",
        "deep.json": "[" * 100_000 + "]" * 100_000,
        "deep.jsonl": "[" * 100_000 + "]" * 100_000,
    }.items():
        (tmp_path / name).write_text(text)
        assert name in refused(finetune, "run", str(recipe), f"data.path={name}", "run.dir=r")
    assert not (tmp_path / "sprung").exists()


def test_paths_outside_the_run_folder_and_dataset_are_refused(
    finetune: Terminal, recipe: Path, tmp_path: Path, tiny_model: Path
) -> None:
    """A recipe's file name becomes a folder name under runs/, and data.files may only match files of the dataset."""
    for name in ("..yaml", "...yaml"):
        (tmp_path / name).write_text(recipe.read_text())
        assert "run.dir" in refused(finetune, "run", name)
    (tmp_path / "set").mkdir()
    for kind in ("kind=sft", "kind=pretrain"):
        for pattern in ("../rows.jsonl", str(tmp_path / "rows.jsonl"), "a/../../rows.jsonl"):
            arguments = (str(recipe), "data.path=null", f"data.name={tmp_path / 'set'}", f"data.files=['{pattern}']", kind)
            arguments += ("quant.scheme=none", "adapter.kind=none", "data.heldout=4") if kind == "kind=pretrain" else ()
            assert refused(finetune, "run", *arguments) == refused(finetune, "check", *arguments)
            assert "matches files outside the dataset" in finetune("check", *arguments)[2]
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/etc"}))
    assert "contains an adapter" in refused(finetune, "run", str(recipe), f"model.name={tmp_path / 'model'}")
