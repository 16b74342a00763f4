"""Checkpoints: all that a run needs to go on as if it had never stopped. safetensors and JSON, complete or absent.

    checkpoints/step-000100/
        weights.safetensors     every trained parameter, by its name in the model
        optimizer.safetensors   PARAMETER/STATE, such as …lora_A.default.weight/exp_avg
        rng.safetensors         generators of torch (cpu, cuda:N) and numpy
        state.json              format, step, epoch, position, place, token counts, python's generator, the optimizer's
                                scalars, bytes of metrics.jsonl that belong to it
        manifest.json           {file: {bytes, sha256}} of the others

The folder is written beside its place, synced and renamed; the hashes find damage that a disk did later. Format 1 is final: a
later format must read it.
"""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from finetune.errors import Mistake
from finetune.files import atomic_folder, sha256, write_json

FORMAT = 1
PREFIX = "step-"


@dataclass
class Progress:
    """Where a run stands. `epoch` and `position` name the next micro-batch; token counts are of all steps so far.

    `place`: where it is found, for a kind whose micro-batches are a stream (JSON). `bad`: (epoch, position) of micro-batches
    that are left out, because the step with them went wrong when the weights had taken it already.
    """

    step: int = 0
    epoch: int = 0
    position: int = 0
    tokens: int = 0
    supervised: int = 0
    place: Any = None
    bad: list[list[int]] = field(default_factory=list)


def trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that training changes, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _rng_tensors() -> dict[str, torch.Tensor]:
    tensors = {"cpu": torch.get_rng_state()}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        tensors[f"cuda:{index}"] = torch.cuda.get_rng_state(index)
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
    torch.set_rng_state(tensors["cpu"])
    for name, state in tensors.items():
        if name.startswith("cuda:") and torch.cuda.is_available() and int(name[5:]) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, int(name[5:]))
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


def save(
    folder: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    *,
    metrics_bytes: int,
    keep: int,
) -> Path:
    """Write checkpoints/step-N under `folder` and remove all but the newest `keep`. Returns the checkpoint's folder."""
    parameters = trained(model)
    state = optimizer.state_dict()
    names = _names_in_optimizer(optimizer, parameters)
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index, values in state["state"].items():
        # bitsandbytes hides its maps in a dict of their own from FSDP; its load_state_dict takes them bare as well.
        flat = {k: v for key, value in values.items() for k, v in (value.items() if isinstance(value, dict) else [(key, value)])}
        for key, value in flat.items():
            if isinstance(value, torch.Tensor):
                # A copy: bitsandbytes' parameters share their maps, and safetensors refuses shared storage.
                tensors[f"{names[index]}/{key}"] = value.detach().cpu().clone()
            else:
                scalars.setdefault(names[index], {})[key] = value
    path = folder / f"{PREFIX}{progress.step:06d}"
    with atomic_folder(path) as temporary:
        save_file({name: p.detach().cpu().contiguous() for name, p in parameters.items()}, temporary / "weights.safetensors")
        save_file(tensors, temporary / "optimizer.safetensors")
        save_file(_rng_tensors(), temporary / "rng.safetensors")
        write_json(
            temporary / "state.json",
            {
                "format": FORMAT,
                **asdict(progress),
                "metrics_bytes": metrics_bytes,
                "optimizer": scalars,
                "rng": _rng_scalars(),
            },
        )
        write_json(
            temporary / "manifest.json",
            {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in sorted(temporary.iterdir())},
        )
    # Later ones are of a course that was left (a resumed run went back behind them); they must not push this one out.
    standing = [old for old in checkpoints(folder) if old.name <= path.name]
    for gone in {*checkpoints(folder)} - {*standing[-keep:]}:
        shutil.rmtree(gone)
    return path


def _names_in_optimizer(optimizer: torch.optim.Optimizer, parameters: dict[str, torch.nn.Parameter]) -> list[str]:
    """Parameter names in the order by which the optimizer's state_dict counts them."""
    by_id = {id(parameter): name for name, parameter in parameters.items()}
    return [by_id[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints under `folder`, oldest first."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if (path / "manifest.json").exists())


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        for name, facts in manifest.items():
            file = path / name
            if not file.exists():
                return f"{name} is missing"
            if file.stat().st_size != facts["bytes"]:
                return f"{name} has {file.stat().st_size} bytes instead of {facts['bytes']}"
            if sha256(file) != facts["sha256"]:
                return f"{name} is not what was written (its SHA-256 differs)"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json cannot be read: {error}"
    return None


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint under `folder`, and what was wrong with those that are newer."""
    notes: list[str] = []
    for path in reversed(checkpoints(folder)):
        wrong = damage(path)
        if wrong is None:
            return path, notes
        notes.append(f"{path.name}: {wrong}")
    return None, notes


def load_weights(path: Path, model: torch.nn.Module) -> None:
    """Put a checkpoint's trained parameters into `model`, bit for bit.

    Raises:
        Mistake: they are not those that this model trains.
    """
    weights = load_file(path / "weights.safetensors")
    parameters = trained(model)
    if weights.keys() != parameters.keys():
        only = sorted(weights.keys() ^ parameters.keys())
        raise Mistake(
            "the checkpoint is of another model",
            where=str(path),
            found=f"{len(only)} parameters differ, such as {only[0]}",
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != weights[name].shape or parameter.dtype != weights[name].dtype:
                raise Mistake(
                    "the checkpoint is of another model",
                    where=f"{path}: {name}",
                    found=f"{tuple(weights[name].shape)} {weights[name].dtype}",
                    do=f"the model has {tuple(parameter.shape)} {parameter.dtype} there",
                )
            parameter.copy_(weights[name])


def load(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Progress, int]:
    """Put everything back as it was at the checkpoint; returns (progress, bytes of metrics.jsonl that belong to it)."""
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if state["format"] > FORMAT:
        raise Mistake("the checkpoint was written by a newer version", where=str(path), found=f"format {state['format']}")
    load_weights(path, model)
    names = _names_in_optimizer(optimizer, trained(model))
    index = {name: number for number, name in enumerate(names)}
    loaded: dict[int, dict[str, Any]] = {}
    for name, tensor in load_file(path / "optimizer.safetensors").items():
        parameter, _, key = name.rpartition("/")
        loaded.setdefault(index[parameter], {})[key] = tensor
    for parameter, values in state["optimizer"].items():
        loaded.setdefault(index[parameter], {}).update(values)
    optimizer.load_state_dict({"state": loaded, "param_groups": optimizer.state_dict()["param_groups"]})
    _restore_rng(load_file(path / "rng.safetensors"), state["rng"])
    return Progress(**{f.name: state[f.name] for f in fields(Progress) if f.name in state}), state["metrics_bytes"]
