"""Finding a model by name: local folder, .gguf file, package or hub id. Files are checked, not loaded."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data.rows import PACKAGE, package_files
from finetune.errors import UserError, nearest
from finetune.recipe import Model

FAULTS = (NameError, AttributeError, AssertionError)  # bugs of this program, not to be reported as a damaged model

AGAIN = "download or save it again: a file is damaged or missing"

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Source:
    """Source of a model. folder: a local folder or a hub id; gguf: the .gguf file in it, if any.

    init_config: the config of a model that starts from random weights, without a folder.
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
        """Arguments for from_pretrained."""
        options: dict[str, Any] = {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
        return options | ({"gguf_file": self.gguf} if self.gguf else {})


def source_of(model: Model) -> Source:
    """The source of a recipe's model section.

    Raises:
        UserError: as `find_model`.
    """
    if model.config is not None:
        return Source(f"from scratch ({model.config['model_type']})", "", init_config=model.config)
    assert model.name is not None
    return find_model(model.name, revision=model.revision, trust_remote_code=model.trust_remote_code)


def find_model(name: str, *, revision: str | None = None, trust_remote_code: bool = False, where: str = "model.name") -> Source:
    """The source of a model's name. A hub id is not looked up until it is used.

    Raises:
        UserError: a file, folder or package does not exist or contains no model.
    """
    if revision is not None and (name.startswith(PACKAGE) or name.endswith(".gguf") or Path(name).expanduser().is_dir()):
        raise UserError(
            "model.revision is only for hub models", where="model.revision", got=f"{revision} of {name}", hint="remove it"
        )
    if name.startswith(PACKAGE):
        files = [path for file, path in package_files(name, where).items() if file.endswith(".gguf")]
        if len(files) != 1:
            raise UserError(
                "this package does not contain exactly one .gguf file", where=where, got=f"{name}: {len(files)} files"
            )
        return Source(name, str(files[0].parent), files[0].name)
    path = Path(name).expanduser()
    if name.endswith(".gguf"):
        if not path.is_file():
            raise UserError("no such model file", where=where, got=name, hint="give the path of a .gguf file")
        _check_gguf(path, where)
        return Source(name, str(path.parent), path.name)
    if path.is_dir():
        if (path / "adapter_config.json").is_file():  # transformers would load it with any base that it names
            hint = f"merge it first: finetune merge {path} --out DIR"
            raise UserError(
                "this folder contains an adapter, not a model", where=where, got=str(path / "adapter_config.json"), hint=hint
            )
        if not (path / "config.json").is_file():
            raise UserError(
                "not a model folder",
                where=where,
                got=f"{path} has no config.json",
                hint="give the folder with config.json",
            )
        return Source(name, str(path), trust_remote_code=trust_remote_code)
    if path.is_file():
        raise UserError(
            "not a model: this is a single file", where=where, got=name, hint="give a model folder, a .gguf file or a hub id"
        )
    beside_runs = any(path.parent.glob("*/run.json")) if "/" in name else False
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or beside_runs:
        near = nearest(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else None
        raise UserError(
            "no such model folder",
            where=where,
            got=name,
            hint=f"did you mean {path.parent / near}?" if near else "give a model folder, a .gguf file or a hub id",
        )
    return Source(name, name, revision=revision, trust_remote_code=trust_remote_code)


def _check_gguf(path: Path, where: str) -> None:
    """Raise UserError if the header of a GGUF file is invalid, or announces more than fits into the file."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(24)
    if head[:4] != b"GGUF":
        raise UserError("not a GGUF file", where=where, got=f"{path} starts with {head[:4]!r}", hint="give a .gguf file")
    problem = None
    if len(head) < 24:
        problem = f"it ends after {size} bytes"
    else:
        version, tensors, keys = struct.unpack("<IQQ", head[4:])
        if version not in (2, 3):
            problem = f"version {version}; versions 2 and 3 are supported"
        elif 24 + 32 * tensors + 13 * keys > size:  # minimum sizes: empty names, one dimension, one byte
            problem = f"{tensors} tensors and {keys} keys in {size} bytes"
    if problem is not None:
        raise UserError("damaged GGUF header", where=where, got=f"{path}: {problem}", hint="download the file again")


def check_files(source: Source, where: str = "model.name") -> None:
    """Check the names and headers of a local model's weight files. A folder without weights passes, because plans need none.

    Raises:
        UserError: a file is damaged, missing, outside the folder, of another model, or a pickle.
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
            got = f"{folder / pickles[0]}, which can execute any code"
            hint = "convert it to safetensors: huggingface.co/spaces/safetensors/convert"
            raise UserError("weights in pickle files are not loaded", where=where, got=got, hint=hint)
        return
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
        outside = next((name for name in names if Path(name).is_absolute() or ".." in Path(name).parts), None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        got = f"{type(error).__name__}: {error}"
        raise UserError("cannot read the index of this model's weights", where=str(index), got=got, hint=AGAIN) from None
    if outside is not None:
        hint = "put the file into the model's folder, or download the model again"
        raise UserError(
            "the index of this model's weights names a file outside its folder", where=str(index), got=outside, hint=hint
        )
    stored: set[str] = set()
    for name in names:
        if not (folder / name).is_file():
            raise UserError("a file of this model is missing", where=str(folder), got=name, hint=AGAIN)
        stored |= shapes_in(folder / name, where).keys()
    if missing := [name for name in weight_map if name not in stored]:
        got = f"{weight_map[missing[0]]} has no {missing[0]}" + (f", nor {len(missing) - 1} others" if len(missing) > 1 else "")
        raise UserError("a weight file of this model does not match its index", where=str(index), got=got, hint=AGAIN)


def shapes_in(path: Path, where: str = "model.name") -> dict[str, tuple[int, ...]]:
    """{name: shape} of the tensors in a safetensors file, from its header.

    Raises:
        UserError: it is damaged, or not a safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # not a dict
    except (SafetensorError, OSError) as error:
        got = f"{path}: {error}"
        if isinstance(error, SafetensorError):
            with open(path, "rb") as raw:
                magic = raw.read(2)
            got += f"; {path.stat().st_size} bytes"
            got += ", a pickle" if magic == b"PK" or magic in {bytes([0x80, n]) for n in range(2, 6)} else ""
        raise UserError("cannot read this safetensors file", where=where, got=got, hint=AGAIN) from None


def find_tokenizer(name: str, *, where: str = "tokenizer.name") -> Source:
    """The source of a tokenizer: a model, or a folder with only a tokenizer.

    Raises:
        UserError: as `find_model`.
    """
    path = Path(name).expanduser()
    return Source(name, str(path)) if (path / "tokenizer.json").is_file() else find_model(name, where=where)


def unavailable(source: Source, error: Exception) -> UserError:
    """The UserError for a model or tokenizer that transformers failed to load with `error`."""
    if "trust_remote_code" in str(error):
        hint = "read its code; if you trust it, set model.trust_remote_code=true"
        return UserError("this model needs its own Python code", where="model.trust_remote_code", got=source.name, hint=hint)
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if source.local:
        return UserError(
            "cannot read the model",
            where=source.folder if source.gguf is None else str(Path(source.folder) / source.gguf),
            got=reason,
            hint=AGAIN,
        )
    return UserError(
        "unknown model, or the hub is not reachable",
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
        raise UserError("cannot read the adapter", where=str(path), got=str(error), hint=AGAIN) from None
    if not isinstance(name, str) or not name:
        got = f"base_model_name_or_path: {str(name)[:80]!r}"
        hint = "set it to the base model's hub id or folder"
        raise UserError("the adapter does not name its base model", where=str(path), got=got, hint=hint)
    return name
