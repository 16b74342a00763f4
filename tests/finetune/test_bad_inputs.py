"""What goes wrong outside of a run: disks, networks, damaged and foreign files. Each ends in one clear error; nothing is
executed, nothing is left half-written, and what was trained goes on to the same weights once the cause is mended."""

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
import sys
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
from tests.conftest import REPOSITORY, Terminal, alpaca, story, tiny_llama, write_jsonl

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


def recipe_in(folder: Path, model: Path) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(RECIPE.format(model=model, rows=write_jsonl(folder / "rows.jsonl", alpaca(40))))
    return path


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Path) -> Path:
    return recipe_in(tmp_path, tiny_model)


@pytest.fixture(scope="module")
def _recipe(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    return recipe_in(tmp_path_factory.mktemp("made"), tiny_model)


def in_many_blocks(patch: pytest.MonkeyPatch) -> None:
    """Text comes in many blocks, as a large one would."""
    from finetune.data import stream

    patch.setitem(stream.open_source.__kwdefaults__, "block_bytes", 1500)  # type: ignore[arg-type]
    patch.setattr(stream, "PIECE", 200)


def text_recipe_in(folder: Path) -> Path:
    (folder / "story.txt").write_text(story(12_000))
    path = folder / "text.yaml"
    path.write_text(TEXT_RECIPE.format(text=folder / "story.txt"))
    return path


@pytest.fixture
def text_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    in_many_blocks(monkeypatch)
    return text_recipe_in(tmp_path)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the text recipe whose text nobody touched."""
    from finetune.pipeline import run
    from finetune.recipe import read_recipe

    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finetune.stages.planning.default_planner", None)
        in_many_blocks(patch)
        run(read_recipe(text_recipe_in(folder), [f"run.dir={folder / 'whole'}"]), "text")
    return folder / "whole"


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """A test that hangs fails."""

    def late(number: int, frame: Any) -> None:
        raise AssertionError(f"not done within {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under `folder`, with what is in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def is_clear(code: int, err: str, *, expected: int = 2) -> None:
    assert code == expected, err
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert "  got: " in err
    assert "  hint: " in err
    assert "  where: " in err or re.search(r"\S:\d+: ", err), err


def refused(finetune: Terminal, *words: str, code: int = 2) -> str:
    """The message to a command that is refused in a few seconds and leaves every file as it was."""
    before = contents(finetune.folder)
    with within(60):
        got, _, err = finetune(*words)
    is_clear(got, err, expected=code)
    assert contents(finetune.folder) == before
    return err


def stopped(run: Path) -> None:
    """Make a finished run one that was stopped after its training, before it merged."""
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"state": "stopped"}))
    shutil.rmtree(run / "merged", ignore_errors=True)


def checkpoint_step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def weights_of(run: Path, step: int) -> bytes:
    return (run / "checkpoints" / f"step-{step:06d}" / "weights.safetensors").read_bytes()


class Trap:
    """A pickle that makes the folder `sprung` when it is opened."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.sprung),)


# ------------------------------------------------------------------------------------------------------------------- disks

# What runs in a mount namespace of its own: commands in one process, on a real small disk.
ON_A_DISK = """\
import contextlib, io, json, os, subprocess, sys, threading, time
from pathlib import Path

sys.path[:0] = [sys.argv[1]]
root, disk = Path(sys.argv[2]), Path(sys.argv[2], "disk")
os.chdir(root)
import numpy
import finetune.pipeline
import finetune.stages.planning
from finetune import cli
from finetune.errors import UserError
from finetune.files import atomic_file
from finetune.train import checkpoint

finetune.stages.planning.default_planner = None
said = {}


def mount(*options):
    subprocess.run(["mount", *options], check=True)


def command(name, *words):
    sys.argv = ["finetune", *words]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
    left = [str(path.relative_to(root)) for path in disk.rglob("*") if ".finetune-" in path.name or path.name == ".lock"]
    said[name] = {"code": code, "out": out.getvalue(), "err": err.getvalue(), "left": left, "files": os.listdir(disk)}
    for folder in disk.glob("*/checkpoints/*"):
        said[name].setdefault("checkpoints", {})[folder.name] = checkpoint.damage(folder)
    said[name]["state"] = {file.parent.name: json.loads(file.read_text())["state"] for file in disk.glob("*/run.json")}


def fill(leave):
    with open(disk / "filler", "ab", buffering=0) as file:
        with contextlib.suppress(OSError):
            while (room := os.statvfs(disk).f_bavail * 4096 - leave) > 0:
                file.write(bytes(min(room, 1 << 20)))


def fill_once(there, leave):
    def work():
        while not there.exists():
            time.sleep(0.001)
        fill(leave)

    threading.Thread(target=work, daemon=True).start()


def make_room():
    (disk / "filler").unlink()


"""


@pytest.fixture(scope="module")
def on_a_disk(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> dict[str, Any]:
    """What each command came to on a disk of 64 MiB that is full at the start, fills while it trains, while it merges, and is
    read-only at last; skips where nobody may mount one."""
    root = tmp_path_factory.mktemp("disks")
    recipe_in(root, tiny_llama(root / "model", tokenizer_folder, vocab_size=49152))  # 12 MB, which a full disk has no room for
    (root / "disk").mkdir()
    apart = ["unshare", "--user", "--map-root-user", "--mount"]
    try:
        subprocess.run([*apart, "mount", "-t", "tmpfs", "tmpfs", str(root / "disk")], check=True, capture_output=True)
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
                numpy.ones(1 << 22).tofile(path)  # it writes a GGUF, and has words of its own
        except UserError as mistake:
            said["export"] = str(mistake)
        make_room()
        command("room again", "resume", "disk/one")

        fill_once(disk / "two/checkpoints/step-000002/manifest.json", leave=8 << 20)  # for checkpoints and the adapter
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
        print(json.dumps(said))
        """
    words = [*apart, sys.executable, "-c", ON_A_DISK + textwrap.dedent(script), str(REPOSITORY), str(root)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return {"root": root, **json.loads(done.stdout.splitlines()[-1])}


def test_a_full_disk(on_a_disk: dict[str, Any]) -> None:
    said = on_a_disk
    assert said["whole"]["code"] == 0, said["whole"]
    start, trains, still, merges = (said[key] for key in ("at the start", "while it trains", "still full", "while it merges"))
    is_clear(start["code"], start["err"])
    assert "not enough disk space" in start["err"]
    assert "1.0 MiB free" in start["err"]
    assert start["files"] == ["filler"]

    for ended in (trains, still, merges):
        is_clear(ended["code"], ended["err"])
        assert ended["left"] == []
        assert set(ended["checkpoints"].values()) == {None}  # those that are there are whole
    for ended, run in ((trains, "disk/one"), (merges, "disk/two")):
        assert "No space left on device" in ended["err"]
        assert re.findall(r"last complete checkpoint is (step-\d+)", ended["err"])[0] in ended["checkpoints"]
        assert f"finetune resume {run}" in ended["err"]
    assert "not enough disk space" in still["err"]
    assert said["export"].startswith("the disk is full")
    assert still["checkpoints"] == trains["checkpoints"]
    assert "disk/two/merged" in merges["err"]
    assert merges["state"] == {"one": "done", "two": "failed"}

    for name, resumed in (("one", said["room again"]), ("two", said["room for a merge"])):
        assert resumed["code"] == 0, resumed
        assert resumed["state"][name] == "done"
        for file in ("adapter/adapter_model.safetensors", "merged/model.safetensors", f"{LAST}/optimizer.safetensors"):
            assert (said["root"] / name / file).read_bytes() == (said["root"] / "whole" / file).read_bytes(), (name, file)


def test_a_read_only_disk(on_a_disk: dict[str, Any]) -> None:
    """Nothing is begun or gone on with there; what lies there is read."""
    said = on_a_disk
    for name in ("check", "run", "resume", "merge"):
        is_clear(said[name]["code"], said[name]["err"])
        assert "not writable" in said[name]["err"] or "Read-only file system" in said[name]["err"], said[name]["err"]
        assert (sorted(said[name]["files"]), said[name]["left"]) == (["one", "two"], [])
        assert said[name]["state"] == {"one": "stopped", "two": "done"}
    for name in ("show", "eval"):
        assert said[name]["code"] == 0, said[name]


# -------------------------------------------------------------------------------------------------------------------- data


def test_data_that_vanishes_before_a_run_goes_on(finetune: Terminal, recipe: Path, tmp_path: Path) -> None:
    assert finetune("run", str(recipe), "run.dir=r")[0] == 0
    stopped(tmp_path / "r")
    (tmp_path / "rows.jsonl").rename(tmp_path / "elsewhere.jsonl")
    for words in (("resume", "r"), ("check", "r/recipe.yaml")):
        assert "rows.jsonl" in refused(finetune, *words)
    (tmp_path / "elsewhere.jsonl").rename(tmp_path / "rows.jsonl")
    code, _, err = finetune("resume", "r")
    assert code == 0, err


@pytest.mark.parametrize("how", ["removed", "cut off", "written over"])
def test_text_that_changes_while_it_is_read(
    finetune: Terminal, text_recipe: Path, undisturbed: Path, tmp_path: Path, how: str
) -> None:
    """The last step is saved; with the text as it was, the run goes on to the same weights."""
    text = tmp_path / "story.txt"
    whole = text.read_bytes()
    begun = tmp_path / "cut" / "checkpoints" / "step-000002" / "manifest.json"

    def change() -> None:
        while not begun.exists():
            time.sleep(0.001)
        if how == "removed":
            text.unlink()
        else:
            text.write_bytes(whole[:9_500] if how == "cut off" else whole[::-1])

    other = threading.Thread(target=change, daemon=True)
    other.start()
    with within(120):
        code, _, err = finetune("run", str(text_recipe), "run.dir=cut")
    other.join()
    is_clear(code, err)
    assert "story.txt" in err
    assert "finetune resume" in err
    record = json.loads((tmp_path / "cut" / "run.json").read_text())
    assert record["state"] == "failed"
    lines = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
    newest, _ = checkpoint.newest(tmp_path / "cut" / "checkpoints")
    assert newest is not None
    assert checkpoint_step(newest) == json.loads(lines[-1])["step"]
    refused(finetune, "resume", "cut")
    text.write_bytes(whole)
    code, _, err = finetune("resume", "cut")
    assert code == 0, err
    assert weights_of(tmp_path / "cut", 80) == weights_of(undisturbed, 80)


def network_errors() -> list[Exception]:
    """What streaming really raises when the network goes: of requests, httpx2 (huggingface_hub), fsspec, datasets, sockets."""
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


def test_a_network_that_goes_while_a_dataset_streams(
    finetune: Terminal, text_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off again and again, each time in another way: the last step is saved, and the end is that of a run in one piece."""
    import datasets

    (tmp_path / "hub").mkdir()
    rows = [{"text": part} for part in story(12_000).split("\n\n")]
    (tmp_path / "hub" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    to_come: list[Exception] = []
    reached = [0]

    def trained_on() -> bool:
        return any(checkpoint_step(path) > reached[0] for path in (tmp_path / "cut" / "checkpoints").glob("step-*"))

    class Network:
        """A streamed dataset whose connection goes once training has gone on for some steps, while there are errors to come."""

        def __init__(self, dataset: Any) -> None:
            self.dataset, self.state_dict, self.load_state_dict = dataset, dataset.state_dict, dataset.load_state_dict

        def __iter__(self) -> Iterator[Any]:
            for example in self.dataset:
                if to_come and trained_on():
                    raise to_come.pop()
                yield example

    real = datasets.load_dataset_builder

    def load(name: str, **options: Any) -> Any:
        assert name == "somebody/stories"
        builder = real(str(tmp_path / "hub"), data_files="*.jsonl")
        builder.hash, stream = "1" * 40, builder.as_streaming_dataset
        builder.as_streaming_dataset = lambda split: Network(stream(split=split))
        return builder

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    words = ("data.path=null", "data.name=somebody/stories")
    code, _, err = finetune("run", str(text_recipe), *words, "run.dir=whole")
    assert code == 0, err
    for error in network_errors():
        to_come[:] = [error]
        command = ("resume", "cut") if reached[0] else ("run", str(text_recipe), *words, "run.dir=cut")
        with within(120):
            code, _, err = finetune(*command)
        is_clear(code, err)
        assert type(error).__name__ in err
        assert "finetune resume" in err
        newest, _ = checkpoint.newest(tmp_path / "cut" / "checkpoints")
        assert newest is not None
        lines = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
        assert checkpoint_step(newest) == json.loads(lines[-1])["step"] > reached[0]
        reached[0] = checkpoint_step(newest)
    code, _, err = finetune("resume", "cut")
    assert code == 0, err
    assert weights_of(tmp_path / "cut", 80) == weights_of(tmp_path / "whole", 80)


# ------------------------------------------------------------------------------------------------------------------ models


@pytest.fixture
def model(tmp_path: Path, tiny_model: Path) -> Path:
    """A copy that may be spoilt."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def refused_model(finetune: Terminal, recipe: Path, name: Path, *, cheaply: bool = True) -> str:
    """The message of a run with this model; `cheaply`: `finetune check` knows it too."""
    message = refused(finetune, "run", str(recipe), f"model.name={name}", "run.dir=r")
    if cheaply:
        assert refused(finetune, "check", str(recipe), f"model.name={name}") == message
    return message


def test_damaged_weights(finetune: Terminal, recipe: Path, model: Path) -> None:
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    for spoilt in (whole[:-1000], whole[:5], b"", struct.pack("<Q", 2**60) + whole[8:], whole[:8] + b"\0" + whole[9:]):
        weights.write_bytes(spoilt)
        message = refused_model(finetune, recipe, model)
        assert "cannot read this safetensors file" in message
        assert f"{weights}: " in message
        assert f"{len(spoilt)} bytes" in message


def test_shards_that_do_not_belong(finetune: Terminal, recipe: Path, model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    halves = {one: {k: v for k, v in tensors.items() if ".1." not in k}, two: {k: v for k, v in tensors.items() if ".1." in k}}
    odd = "model.layers.1.mlp.up_proj.weight"

    def shard(second: dict[str, torch.Tensor], **places: str) -> None:
        save_file(halves[one], model / one, metadata={"format": "pt"})
        save_file(second, model / two, metadata={"format": "pt"})
        weight_map = {key: name for name, half in halves.items() for key in half} | places
        (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    shard({key: torch.zeros(2, *value.shape) for key, value in halves[two].items()})
    message = refused_model(finetune, recipe, model, cheaply=False)
    assert "the weights do not match config.json" in message
    assert f"in {two} is [2, " in message
    shard({key: value for key, value in halves[two].items() if key != odd})
    assert f"{two} has no {odd}" in refused_model(finetune, recipe, model)
    (model / two).unlink()
    assert two in refused_model(finetune, recipe, model)
    shard(halves[two])
    shutil.move(model / two, model.parent / "elsewhere.safetensors")
    for place in ("../elsewhere.safetensors", str(model.parent / "elsewhere.safetensors")):
        (model / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": dict.fromkeys(halves[one], one) | dict.fromkeys(halves[two], place)})
        )
        message = refused_model(finetune, recipe, model)
        assert "names a file outside its folder" in message
        assert place in message
    for text in ("[1]", "{", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}', "[" * 100_000):
        (model / "model.safetensors.index.json").write_text(text)
        assert "index" in refused_model(finetune, recipe, model)


def test_damaged_headers_of_gguf(finetune: Terminal, recipe: Path, tmp_path: Path) -> None:
    """Absurd counts neither fill the memory nor take time."""
    key = struct.pack("<Q", 1) + b"k" + struct.pack("<I", 9)  # an array named k
    rest = bytes(200)
    cases = {
        "magic": (b"GGML" + struct.pack("<IQQ", 3, 0, 0) + rest, True),
        "short": (b"GGUF" + struct.pack("<I", 3), True),
        "version": (b"GGUF" + struct.pack("<IQQ", 99, 0, 0) + rest, True),
        "tensors": (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0) + rest, True),
        "keys": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60) + rest, True),
        "bytes": (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key + struct.pack("<IQ", 0, 2**60) + rest, False),
        "strings": (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key + struct.pack("<IQ", 8, 2**60) + rest, False),
        "empty": (b"", True),
    }
    for name, (content, cheaply) in cases.items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(content)
        begun = time.monotonic()
        assert str(path) in refused_model(finetune, recipe, path, cheaply=cheaply)
        assert time.monotonic() - begun < 20


def test_tokenizers_that_do_not_belong(
    finetune: Terminal, recipe: Path, model: Path, tmp_path: Path, tokenizer_folder: Path
) -> None:
    tiny_llama(tmp_path / "small", tokenizer_folder, vocab_size=100)
    words = ("run", str(recipe), f"model.name={tmp_path / 'small'}", "run.dir=r")
    for forced in ((), ("--force",)):
        message = refused(finetune, *words, *forced, code=3)
        assert "the model has 100 embeddings: they do not belong together" in message
    (model / "tokenizer.json").write_text('{"version": "1.0"')
    assert "tokenizer.json" in refused_model(finetune, recipe, model, cheaply=False)
    (model / "tokenizer.json").unlink()
    message = refused_model(finetune, recipe, model, cheaply=False)
    assert "cannot read the tokenizer" in message
    (model / "tokenizer_config.json").unlink()
    assert "no tokenizer file" in refused_model(finetune, recipe, model, cheaply=False)


def test_pickles_in_the_place_of_weights(finetune: Terminal, recipe: Path, model: Path, tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    weights = model / "model.safetensors"
    for write in (lambda: weights.write_bytes(pickle.dumps(Trap(sprung))), lambda: torch.save({"a": Trap(sprung)}, weights)):
        write()
        message = refused_model(finetune, recipe, model)
        assert "cannot read this safetensors file" in message
        assert "a pickle" in message
    weights.unlink()
    torch.save({"a": Trap(sprung)}, model / "pytorch_model.bin")
    message = refused_model(finetune, recipe, model)
    assert "weights in pickle files are not loaded" in message
    assert "pytorch_model.bin" in message
    with pytest.raises(pickle.UnpicklingError):  # it is a trap: what opens it without care is caught
        torch.load(model / "pytorch_model.bin")
    pickle.loads(pickle.dumps(Trap(sprung)))
    assert sprung.is_dir()


# -------------------------------------------------------------------------------------------------------------- run folders


@pytest.fixture(scope="module")
def _made(_recipe: Path) -> Path:
    """A finished run."""
    from finetune.pipeline import run
    from finetune.recipe import read_recipe

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finetune.stages.planning.default_planner", None)
        run(read_recipe(_recipe, [f"run.dir={_recipe.parent / 'r'}", "train.max_steps=4"]), "tiny")
    return _recipe.parent / "r"


@pytest.fixture
def made(_made: Path, tmp_path: Path) -> Path:
    """A finished run, to be spoilt."""
    return Path(shutil.copytree(_made, tmp_path / "r"))


def test_damaged_checkpoints(finetune: Terminal, made: Path) -> None:
    """The newest whole one is gone on from, and the damaged one is named; with none left nothing begins anew by itself."""
    whole = weights_of(made, 4)
    stopped(made)
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    (made / "checkpoints" / "step-000004" / "weights.safetensors").write_bytes(flipped)
    code, out, err = finetune("resume", "r")
    assert code == 0, err
    assert "step-000004: weights.safetensors was changed after it was written" in out + err
    assert "resuming after step 2" in out
    assert weights_of(made, 4) == whole
    stopped(made)
    for name in ("step-000002", "step-000004"):
        (made / "checkpoints" / name / "weights.safetensors").write_bytes(b"x")
    message = refused_resume(finetune, made)
    assert "step-000002" in message
    assert "step-000004" in message
    shutil.rmtree(made / "adapter")
    assert "every checkpoint of this run is damaged" in refused(finetune, "eval", "r")


def refused_resume(finetune: Terminal, run: Path) -> str:
    """The message of a `finetune resume` that leaves what was trained as it was; run.json and the report may tell of it."""
    before = contents(run)
    code, _, err = finetune("resume", run.name)
    is_clear(code, err)
    after = contents(run)
    for told in ("run.json", "report.html"):
        before.pop(told, None), after.pop(told, None)
    assert after == before
    return err


def test_checkpoints_that_lead_elsewhere_or_hold_pickles(finetune: Terminal, made: Path, tmp_path: Path) -> None:
    """Their hashes may be right: whoever made them made those too."""
    stopped(made)
    newest, before = made / "checkpoints" / "step-000004", made / "checkpoints" / "step-000002"
    shutil.rmtree(before)
    manifest = json.loads((newest / "manifest.json").read_text())
    optimizer = newest / "optimizer.safetensors"

    def says(**files: Any) -> None:
        (newest / "manifest.json").write_text(json.dumps(manifest | files))

    for outside in ("../../../secret", str(tmp_path / "secret"), "/dev/zero"):
        (tmp_path / "secret").write_text("x")
        says(**{outside: {"bytes": 0 if outside == "/dev/zero" else 1, "sha256": hashlib.sha256(b"x").hexdigest()}})
        with within(30):
            assert outside in refused_resume(finetune, made)
    optimizer.write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    says(**{optimizer.name: {"bytes": optimizer.stat().st_size, "sha256": hashlib.sha256(optimizer.read_bytes()).hexdigest()}})
    assert "safetensors" in refused_resume(finetune, made)
    assert not (tmp_path / "sprung").exists()
    optimizer.unlink()
    (newest / "manifest.json").write_text("{}")  # a list of nothing: nothing of it is damaged
    assert "missing" in refused_resume(finetune, made)


def test_records_that_are_none_or_lead_elsewhere(finetune: Terminal, made: Path, tmp_path: Path) -> None:
    record, newest = json.loads((made / "run.json").read_text()), "checkpoints/step-000004"
    (made / "bytes").write_bytes(b"\xff\xfe\0")
    for text in ("[]", "{}", '"x"', '{"name": "x"', "[" * 100_000, json.dumps(record | {"name": "../../climbed"})):
        (made / "run.json").write_text(text)
        for words in (("show", "r"), ("resume", "r"), ("eval", "r"), ("eval", "r/adapter"), ("eval", f"r/{newest}")):
            assert "cannot read the run's record" in refused(finetune, *words)
    shutil.move(made / "bytes", made / "run.json")
    assert "cannot read the run's record" in refused(finetune, "show", "r")
    unreadable, no_dtype = "cannot read the run's record", "has no valid dtype for its model"
    for model, message in (
        (None, no_dtype),
        (record["model"] | {"dtype": "load"}, no_dtype),
        (record["model"] | {"eos_token_ids": "x"}, unreadable),
        ({"dtype": "float32", "eos_token_ids": [2]}, unreadable),
    ):
        (made / "run.json").write_text(json.dumps(record | {"model": model}))
        assert message in refused(finetune, "eval", "r/adapter")


def test_adapters_that_are_damaged_or_pickles(finetune: Terminal, made: Path, tmp_path: Path) -> None:
    adapter, sprung = made / "adapter", tmp_path / "sprung"
    weights, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    whole, told = weights.read_bytes(), json.loads(config.read_text())
    for spoilt in (whole[:-100], pickle.dumps(Trap(sprung)), b""):
        weights.write_bytes(spoilt)
        for words in (("eval", "r/adapter"), ("merge", "r", "--out", "m")):
            assert "cannot read this safetensors file" in refused(finetune, *words)
    weights.unlink()
    torch.save({"a": Trap(sprung)}, adapter / "adapter_model.bin")
    assert "adapter_model.bin" in refused(finetune, "eval", "r/adapter")
    assert not sprung.exists()

    weights.write_bytes(whole)
    shutil.copytree(adapter, tmp_path / "alone")
    for changed, said in (
        ({"base_model_name_or_path": "../../nowhere"}, "../../nowhere"),
        ({"base_model_name_or_path": ["x"]}, "base model"),
        ({"base_model_name_or_path": str(adapter)}, "contains an adapter"),
        ({"peft_type": "NOTHING"}, "NOTHING"),
    ):
        (tmp_path / "alone" / "adapter_config.json").write_text(json.dumps(told | changed))
        assert said in refused(finetune, "eval", "alone", "--file", str(adapter / "README.md"))


# ----------------------------------------------------------------------------------------------------- recipes and rows


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))

# Over lines, because brackets may be keys until their line ends, and finding out that they are not takes a second.
DEEP = "[\n" * 100_000 + "]" * 100_000


def test_recipes_that_bomb_or_execute(finetune: Terminal, recipe: Path, tmp_path: Path) -> None:
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


def test_rows_that_bomb_or_execute(finetune: Terminal, recipe: Path, tmp_path: Path) -> None:
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


def test_names_that_lead_out(finetune: Terminal, recipe: Path, tmp_path: Path, tiny_model: Path) -> None:
    """A recipe's own name becomes a folder's under runs/, and data.files choose within a dataset."""
    for name in ("..yaml", "...yaml"):
        (tmp_path / name).write_text(recipe.read_text())
        assert "run.dir" in refused(finetune, "run", name)
    (tmp_path / "set").mkdir()
    for kind in ("kind=sft", "kind=pretrain"):
        for pattern in ("../rows.jsonl", str(tmp_path / "rows.jsonl"), "a/../../rows.jsonl"):
            words = (str(recipe), "data.path=null", f"data.name={tmp_path / 'set'}", f"data.files=['{pattern}']", kind)
            words += ("quant.scheme=none", "adapter.kind=none", "data.heldout=4") if kind == "kind=pretrain" else ()
            assert refused(finetune, "run", *words) == refused(finetune, "check", *words)
            assert "matches files outside the dataset" in finetune("check", *words)[2]
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/etc"}))
    assert "contains an adapter" in refused(finetune, "run", str(recipe), f"model.name={tmp_path / 'model'}")
