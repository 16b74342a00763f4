"""Where a model comes from: a name or config → folder, .gguf file or hub id. Its files are looked at, not loaded."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data.rows import PACKAGE, package_files
from finetune.errors import UserError, nearest
from finetune.recipe import Model

FAULTS = (NameError, AttributeError, AssertionError)  # ours, never to be told as a damaged model

AGAIN = "fetch or save it again: a file in it is damaged or missing"

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Source:
    """A model's place: `folder` is a local folder or a hub id; `gguf` the file in it, if it is one.

    `init_config`: there is no such place; the model begins with random weights of this configuration.
    """

    name: str
    folder: str
    gguf: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    init_config: dict[str, Any] | None = None

    @property
    def local(self) -> bool:
        return Path(self.folder).is_dir()

    @property
    def options(self) -> dict[str, Any]:
        """Arguments for every from_pretrained."""
        options: dict[str, Any] = {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
        return options | ({"gguf_file": self.gguf} if self.gguf else {})


def source_of(model: Model) -> Source:
    """The place that a recipe's model section means.

    Raises:
        UserError: as `find_model`.
    """
    if model.config is not None:
        return Source(f"from scratch ({model.config['model_type']})", "", init_config=model.config)
    assert model.name is not None
    return find_model(model.name, revision=model.revision, trust_remote_code=model.trust_remote_code)


def find_model(name: str, *, revision: str | None = None, trust_remote_code: bool = False, where: str = "model.name") -> Source:
    """The place that a name means.

    Raises:
        UserError: a file, folder or package that is not there or holds no model. (A hub id is asked later, when it is used.)
    """
    if revision is not None and (name.startswith(PACKAGE) or name.endswith(".gguf") or Path(name).expanduser().is_dir()):
        raise UserError(
            "a revision is for models of the hub", where="model.revision", got=f"{revision} of {name}", hint="remove it"
        )
    if name.startswith(PACKAGE):
        files = [path for file, path in package_files(name, where).items() if file.endswith(".gguf")]
        if len(files) != 1:
            raise UserError("this package does not carry exactly one .gguf file", where=where, got=f"{name}: {len(files)} files")
        return Source(name, str(files[0].parent), files[0].name)
    path = Path(name).expanduser()
    if name.endswith(".gguf"):
        if not path.is_file():
            raise UserError("there is no such model file", where=where, got=name, hint="give the path of a .gguf file")
        _check_gguf(path, where)
        return Source(name, str(path.parent), path.name)
    if path.is_dir():
        if (path / "adapter_config.json").is_file():  # transformers would load it too, and whatever base it names
            hint = f"merge it first: finetune merge {path} --out DIR"
            raise UserError("this folder holds an adapter", where=where, got=str(path / "adapter_config.json"), hint=hint)
        if not (path / "config.json").is_file():
            raise UserError(
                "this folder holds no model",
                where=where,
                got=f"{path} has no config.json",
                hint="give the folder that has one",
            )
        return Source(name, str(path), trust_remote_code=trust_remote_code)
    if path.is_file():
        raise UserError(
            "this is a file, and no model", where=where, got=name, hint="give a model folder, a .gguf file or a hub id"
        )
    beside_runs = any(path.parent.glob("*/run.json")) if "/" in name else False
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or beside_runs:
        near = nearest(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else None
        raise UserError(
            "there is no such model folder",
            where=where,
            got=name,
            hint=f"did you mean {path.parent / near}?" if near else "give a model folder, a .gguf file or a hub id",
        )
    return Source(name, name, revision=revision, trust_remote_code=trust_remote_code)


def _check_gguf(path: Path, where: str) -> None:
    """Raise UserError when the beginning of a GGUF is none: what it counts must at least fit into the file."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(24)
    if head[:4] != b"GGUF":
        raise UserError("this file is no GGUF", where=where, got=f"{path} begins with {head[:4]!r}", hint="give a .gguf file")
    wrong = None
    if len(head) < 24:
        wrong = f"it ends after {size} bytes"
    else:
        version, tensors, keys = struct.unpack("<IQQ", head[4:])
        if version not in (2, 3):
            wrong = f"version {version}; 2 and 3 can be read"
        elif 24 + 32 * tensors + 13 * keys > size:  # the least that each takes: empty names, one dimension, one byte
            wrong = f"{tensors} tensors and {keys} keys in {size} bytes"
    if wrong is not None:
        raise UserError("the header of this GGUF is damaged", where=where, got=f"{path}: {wrong}", hint="fetch the file again")


def check_files(source: Source, where: str = "model.name") -> None:
    """Look at the names and headers of a local model's weights, which takes no time: all are in its folder, whole, and belong
    together. A folder without any weights is not refused: a plan needs none.

    Raises:
        UserError: a file is damaged, is missing, lies elsewhere, belongs to another model, or is a pickle.
    """
    folder = Path(source.folder)
    if source.init_config is not None or source.gguf is not None or not folder.is_dir():
        return
    if (folder / "model.safetensors").is_file():
        shapes_in(folder / "model.safetensors", where)
        return
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        if pickles and not any(folder.glob("*.safetensors")):
            got = f"{folder / pickles[0]}, which can run any code"
            hint = "give its safetensors: huggingface.co/spaces/safetensors/convert makes them"
            raise UserError("the weights of this model cannot be read: pickles are not opened", where=where, got=got, hint=hint)
        return
    try:
        place = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(place.values()))
        outside = next((name for name in names if Path(name).is_absolute() or ".." in Path(name).parts), None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        got = f"{type(error).__name__}: {error}"
        raise UserError("the index of this model's weights cannot be read", where=str(index), got=got, hint=AGAIN) from None
    if outside is not None:
        hint = "put the file into the model's folder, or fetch the model again"
        raise UserError("the index of this model's weights leads out of its folder", where=str(index), got=outside, hint=hint)
    held: set[str] = set()
    for name in names:
        if not (folder / name).is_file():
            raise UserError("a file of this model is missing", where=str(folder), got=name, hint=AGAIN)
        held |= shapes_in(folder / name, where).keys()
    if lost := [name for name in place if name not in held]:
        got = f"{place[lost[0]]} has no {lost[0]}" + (f", nor {len(lost) - 1} others" if len(lost) > 1 else "")
        raise UserError("a file of this model does not belong to it", where=str(index), got=got, hint=AGAIN)


def shapes_in(path: Path, where: str = "model.name") -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a safetensors file, by its header.

    Raises:
        UserError: it is damaged, or none.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # it is no dict
    except (SafetensorError, OSError) as error:
        got = f"{path}: {error}"
        if isinstance(error, SafetensorError):
            with open(path, "rb") as raw:
                begin = raw.read(2)
            got += f"; {path.stat().st_size} bytes"
            got += ", which are a pickle" if begin == b"PK" or begin in {bytes([0x80, n]) for n in range(2, 6)} else ""
        raise UserError("this safetensors file cannot be read", where=where, got=got, hint=AGAIN) from None


def find_tokenizer(name: str, *, where: str = "tokenizer.name") -> Source:
    """The place of a tokenizer: a model's, or a folder that holds nothing else.

    Raises:
        UserError: as `find_model`.
    """
    path = Path(name).expanduser()
    return Source(name, str(path)) if (path / "tokenizer.json").is_file() else find_model(name, where=where)


def unavailable(source: Source, error: Exception) -> UserError:
    if "trust_remote_code" in str(error):
        hint = "read that code; if you trust it: model.trust_remote_code=true"
        return UserError("this model brings Python code of its own", where="model.trust_remote_code", got=source.name, hint=hint)
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if source.local:
        return UserError(
            "the model cannot be read",
            where=source.folder if source.gguf is None else str(Path(source.folder) / source.gguf),
            got=reason,
            hint=AGAIN,
        )
    return UserError(
        "unknown model, or the hub cannot be reached",
        where="model.name",
        got=f"{source.name}: {reason}",
        hint="check the name on huggingface.co, the network, and `hf auth login`; or give a local folder",
    )


def adapter_base(folder: Path) -> str:
    """The base model that an adapter folder names."""
    path = folder / "adapter_config.json"
    try:
        name = dict(json.loads(path.read_text(encoding="utf-8"))).get("base_model_name_or_path")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError("the adapter cannot be read", where=str(path), got=str(error), hint=AGAIN) from None
    if not isinstance(name, str) or not name:
        got = f"base_model_name_or_path: {str(name)[:80]!r}"
        hint = "write the base model's hub id or folder there"
        raise UserError("the adapter does not name its base model", where=str(path), got=got, hint=hint)
    return name
