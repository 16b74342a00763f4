"""Checkpoints: all that a run needs to resume bit for bit. safetensors and JSON; a checkpoint is complete or absent.

    checkpoints/step-000100/
        weights.safetensors     every trained parameter, by its name in the model
        optimizer.safetensors   PARAMETER/STATE, such as …lora_A.default.weight/exp_avg
        rng.safetensors         generators of torch (cpu, cuda:N; rank1/cpu of another process) and numpy
        state.json              format, step, epoch, position, cursor, token counts, python's generator, the optimizer's
                                scalars, bytes of metrics.jsonl that belong to it
        manifest.json           {file: {bytes, sha256}} of the others

The folder is written under a temporary name, synced and renamed; the hashes detect later damage. Format 1 is final: a
later format must read it.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import threading
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from finetune.errors import UserError
from finetune.files import atomic_folder, plain, remove_folder, sha256, sync_file, write_json
from finetune.memory import free_bytes
from finetune.processes import is_main_process, rank
from finetune.train import parallel

FORMAT = 2
FILES = {"weights.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"}
PREFIX = "step-"


@dataclass
class Progress:
    """The position of a run. `epoch` and `position` name the next micro-batch; token counts are of all steps so far.

    `cursor`: its position in the stream, for a task that streams micro-batches (JSON). `bad`: (epoch, position) of micro-batches
    that are skipped, because the run was rolled back from a bad step with them. `wrong`: number of bad steps. `split`: parts
    into which each micro-batch is split after memory ran out. `recent`: losses of the last steps, against which a spike
    is measured. `best`: {step, loss} of the lowest held-out loss, with `train.save_best`.
    """

    step: int = 0
    epoch: int = 0
    position: int = 0
    tokens: int = 0
    supervised: int = 0
    cursor: Any = None
    bad: list[list[int]] = field(default_factory=list)
    wrong: int = 0
    split: int = 1
    recent: list[float] = field(default_factory=list)
    best: dict[str, Any] | None = None


def trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that training changes, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def generators() -> dict[str, torch.Tensor]:
    """The states of torch's generators that this process draws from."""
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors[f"cuda:{torch.cuda.current_device()}"] = torch.cuda.get_rng_state()
    return tensors


def set_generators(states: dict[str, torch.Tensor]) -> None:
    """Restore the states that `generators` returned."""
    torch.set_rng_state(states["cpu"])
    cuda = [state for name, state in states.items() if name.startswith("cuda:")]
    if cuda and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda[0])


def _rng_tensors() -> dict[str, torch.Tensor]:
    """Generator states: of the first process by their names, of the others as rank1/cpu, rank1/cuda:1."""
    tensors: dict[str, torch.Tensor] = {}
    for who, states in enumerate(parallel.all_gather_object({name: state.tolist() for name, state in generators().items()})):
        for name, state in states.items():
            tensors[f"rank{who}/{name}" if who else name] = torch.tensor(state, dtype=torch.uint8)
    tensors["numpy"] = torch.from_numpy(np.asarray(np.random.get_state(legacy=False)["state"]["key"], dtype=np.int64))
    return tensors


def _rng_scalars() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    return {
        "python": [version, list(words), gauss],
        "numpy": {
            "pos": int(numpy["state"]["pos"]),
            "has_gauss": int(numpy["has_gauss"]),
            "gauss": float(numpy["gauss"]),
        },
    }


def _restore_rng(tensors: dict[str, torch.Tensor], scalars: dict[str, Any]) -> None:
    """Restore the generators; a process that the checkpoint does not know is seeded from the first process's state."""
    prefix = f"rank{rank()}/" if rank() else ""
    own = {name.removeprefix(prefix): state for name, state in tensors.items() if name.startswith(prefix)}
    if "cpu" in own:
        set_generators(own)
    else:
        torch.manual_seed(int.from_bytes(hashlib.sha256(tensors["cpu"].numpy().tobytes() + bytes([rank()])).digest()[:7]))
    version, words, gauss = scalars["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": tensors["numpy"].numpy().astype(np.uint32), "pos": scalars["numpy"]["pos"]},
            "has_gauss": scalars["numpy"]["has_gauss"],
            "gauss": scalars["numpy"]["gauss"],
        }
    )


@dataclass
class Snapshot:
    """A checkpoint's content at one moment; training may continue while it is written."""

    step: int
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    rng: dict[str, torch.Tensor]
    state: dict[str, Any]


def snapshot(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, *, metrics_bytes: int, copy: bool
) -> Snapshot | None:
    """The content of a checkpoint, in CPU memory. All processes call it; None where another process has the result.

    Without `copy`, tensors that are in CPU memory already are not copied: they must not change until all is written.
    """
    rng = _rng_tensors()
    if not is_main_process() and not parallel.is_sharded(model):
        return None
    parameters = trained(model)
    state = optimizer.state_dict()
    names = _names_in_optimizer(optimizer, parameters)
    storages: set[int] = set()

    def to_cpu(tensor: torch.Tensor) -> torch.Tensor:
        full = parallel.full_tensor(tensor).contiguous()
        shared = full.untyped_storage().data_ptr() in storages  # bitsandbytes' parameters share maps; safetensors refuses that
        if full.data_ptr() == tensor.data_ptr() and (copy or shared):
            full = full.clone()
        storages.add(full.untyped_storage().data_ptr())
        return full

    weights = {name: to_cpu(parameter.detach()) for name, parameter in parameters.items()}
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index, values in state["state"].items():
        # bitsandbytes hides its maps in a dict of their own from FSDP; its load_state_dict takes them bare as well.
        flat = {k: v for key, value in values.items() for k, v in (value.items() if isinstance(value, dict) else [(key, value)])}
        for key, value in flat.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{names[index]}/{key}"] = to_cpu(value.detach())
            else:
                scalars.setdefault(names[index], {})[key] = value
    content = {
        "format": FORMAT,
        **asdict(progress),
        "metrics_bytes": metrics_bytes,
        "optimizer": scalars,
        "rng": _rng_scalars(),
    }
    return Snapshot(progress.step, weights, tensors, rng, content) if is_main_process() else None


def write(folder: Path, taken: Snapshot, *, keep: int) -> Path:
    """Write checkpoints/step-N under `folder`, and keep only the newest `keep` and the best. Returns the checkpoint's folder.

    Raises:
        UserError: the disk is full or not writable; older checkpoints are kept.
    """
    path, metrics = folder / f"{PREFIX}{taken.step:06d}", folder.parent / "metrics.jsonl"
    if metrics.exists():
        sync_file(metrics)  # what belongs to the checkpoint must be there when it is
    with atomic_folder(path) as temporary:
        save_file(taken.weights, temporary / "weights.safetensors")
        save_file(taken.optimizer, temporary / "optimizer.safetensors")
        save_file(taken.rng, temporary / "rng.safetensors")
        write_json(temporary / "state.json", taken.state)
        write_json(
            temporary / "manifest.json",
            {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in sorted(temporary.iterdir())},
        )
    # Later ones belong to a run that was rolled back or resumed from an older step; they must not push this one out.
    current = [old for old in checkpoints(folder) if step_of(old) <= taken.step]
    best = taken.state["best"] and taken.state["best"]["step"]
    for gone in {*checkpoints(folder)} - {*current[-keep:]}:
        if step_of(gone) != best:
            remove_folder(gone)
    return path


class Saver:
    """Writes checkpoints in the background: what changes is copied at once, and a thread writes and hashes the copy.

    If the copy would take more than half of the free memory, the checkpoint is written at once, and training waits.
    waited: seconds that training waited. A write error is raised by the next call.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep, self.waited = folder, keep, 0.0
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, *, metrics_bytes: int) -> None:
        started = time.monotonic()
        self.wait()
        # On the CPU a copy doubles the memory of what is saved; from a GPU it needs host memory in any case.
        size = sum(p.nbytes for p in trained(model).values()) * 3
        copy = 2 * size < free_bytes()
        taken = snapshot(model, optimizer, progress, metrics_bytes=metrics_bytes, copy=copy)
        if taken is not None:
            if copy:
                # A daemon: a second Ctrl-C does not wait for it; a half-written checkpoint is ignored and swept away.
                self._thread = threading.Thread(target=self._write, args=(taken,), name="checkpoint", daemon=True)
                self._thread.start()
            else:
                self._write(taken)
                self._raise()
        self.waited += time.monotonic() - started

    def _write(self, taken: Snapshot) -> None:
        try:
            write(self.folder, taken, keep=self.keep)
        except BaseException as error:  # raised in the training thread
            self._error = error

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def check(self) -> None:
        """Raise the error of the last write, if that has finished already."""
        if self._thread is None or not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Block until the current write has finished."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._raise()


def step_of(path: Path) -> int:
    """The step of a checkpoint's folder; -1 for any other name."""
    number = path.name.removeprefix(PREFIX)
    return int(number) if number.isdecimal() else -1


def _names_in_optimizer(optimizer: torch.optim.Optimizer, parameters: dict[str, torch.nn.Parameter]) -> list[str]:
    """Parameter names in the order by which the optimizer's state_dict counts them."""
    by_id = {id(parameter): name for name, parameter in parameters.items()}
    return [by_id[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints under `folder`, oldest first."""
    complete = [path for path in folder.glob(f"{PREFIX}*") if step_of(path) >= 0 and (path / "manifest.json").exists()]
    return sorted(complete, key=step_of)


def sweep(folder: Path) -> None:
    """Remove half-written and half-deleted checkpoints that a killed run left under `folder`."""
    for remnant in folder.glob(f".{PREFIX}*.finetune-*"):
        shutil.rmtree(remnant, ignore_errors=True)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if unlisted := FILES - manifest.keys():
            return f"{min(unlisted)} is missing in manifest.json"
        for name, expected in manifest.items():
            if not plain(name):
                return f"manifest.json names a file outside the folder: {name}"
            file = path / name
            if not file.exists():
                return f"{name} is missing"
            if file.stat().st_size != expected["bytes"]:
                return f"{name} has {file.stat().st_size} bytes instead of {expected['bytes']}"
            if sha256(file) != expected["sha256"]:
                return f"{name} was changed after it was written (its SHA-256 differs)"
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt"):
                    pass
    except SafetensorError as error:
        return f"{name} is not a safetensors file: {error}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"cannot read manifest.json: {error}"
    return None


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint under `folder`, and what is wrong with each newer one."""
    notes: list[str] = []
    for path in reversed(checkpoints(folder)):
        wrong = damage(path)
        if wrong is None:
            return path, notes
        notes.append(f"{path.name}: {wrong}")
    return None, notes


def load_weights(path: Path, model: torch.nn.Module) -> None:
    """Load a checkpoint's trained parameters into `model`, bit for bit.

    Raises:
        UserError: names, shapes or dtypes are not those of this model's trained parameters.
    """
    weights = load_file(path / "weights.safetensors")
    parameters = trained(model)
    if weights.keys() != parameters.keys():
        only = sorted(weights.keys() ^ parameters.keys())
        raise UserError(
            "the checkpoint belongs to a different model",
            where=str(path),
            got=f"{len(only)} parameters differ, such as {only[0]}",
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != weights[name].shape or parameter.dtype != weights[name].dtype:
                raise UserError(
                    "the checkpoint belongs to a different model",
                    where=f"{path}: {name}",
                    got=f"{tuple(weights[name].shape)} {weights[name].dtype}",
                    hint=f"the model has {tuple(parameter.shape)} {parameter.dtype} there",
                )
            parallel.put(parameter, weights[name])


def load(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Progress, int]:
    """Restore model, optimizer and generators from a checkpoint; returns (progress, bytes of metrics.jsonl that belong to it)."""
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if state["format"] > FORMAT:
        raise UserError("the checkpoint was written by a newer version", where=str(path), got=f"format {state['format']}")
    load_weights(path, model)
    parameters = trained(model)
    names = _names_in_optimizer(optimizer, parameters)
    index = {name: number for number, name in enumerate(names)}
    loaded: dict[int, dict[str, Any]] = {}
    for name, tensor in load_file(path / "optimizer.safetensors").items():
        parameter, _, key = name.rpartition("/")
        laid_out = parallel.like(parameters[parameter], tensor) if tensor.shape == parameters[parameter].shape else tensor
        loaded.setdefault(index[parameter], {})[key] = laid_out
    for parameter, values in state["optimizer"].items():
        loaded.setdefault(index[parameter], {}).update(values)
    optimizer.load_state_dict({"state": loaded, "param_groups": optimizer.state_dict()["param_groups"]})
    _restore_rng(load_file(path / "rng.safetensors"), state["rng"])
    state.setdefault("cursor", state.get("place"))  # its name in format 1
    return Progress(**{f.name: state[f.name] for f in fields(Progress) if f.name in state}), state["metrics_bytes"]
