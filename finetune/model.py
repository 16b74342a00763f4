"""Where weights come from, and how a model is made ready: source → config → skeleton → weights → swap → adapters.

The skeleton is the model on `meta`, from its config alone: it tells parameters, linear layers and bytes before anything is
downloaded or loaded.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetune.data.preflight import Limits
from finetune.data.rows import PACKAGE, package_files
from finetune.errors import Mistake, nearest
from finetune.recipe import Adapter, Model, Quant
from finetune.screen import Shown, relayed_bars
from quant.linear import PackedLinear
from quant.swap import DEFAULT_KEEP, SwapReport, as_linear, linear_like, reasons_to_leave, swap

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

FAULTS = (NameError, AttributeError, AssertionError)  # ours, never to be told as a damaged model
AGAIN = "fetch or save it again: a file in it is damaged or missing"


@dataclass(frozen=True)
class Source:
    """A model's place: `folder` is a local folder or a hub id; `gguf` the file in it, if it is one.

    `scratch`: there is no place; the model begins with random weights of this configuration.
    """

    name: str
    folder: str
    gguf: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    scratch: dict[str, Any] | None = None

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
        Mistake: as `find`.
    """
    if model.config is not None:
        return Source(f"from scratch ({model.config['model_type']})", "", scratch=model.config)
    assert model.name is not None
    return find(model.name, revision=model.revision, trust_remote_code=model.trust_remote_code)


def find(name: str, *, revision: str | None = None, trust_remote_code: bool = False, where: str = "model.name") -> Source:
    """The place that a name means.

    Raises:
        Mistake: a file, folder or package that is not there or holds no model. (A hub id is asked later, when it is used.)
    """
    if revision is not None and (name.startswith(PACKAGE) or name.endswith(".gguf") or Path(name).expanduser().is_dir()):
        raise Mistake(
            "a revision is for models of the hub", where="model.revision", found=f"{revision} of {name}", do="remove it"
        )
    if name.startswith(PACKAGE):
        files = [path for file, path in package_files(name, where).items() if file.endswith(".gguf")]
        if len(files) != 1:
            raise Mistake("this package does not carry exactly one .gguf file", where=where, found=f"{name}: {len(files)} files")
        return Source(name, str(files[0].parent), files[0].name)
    path = Path(name).expanduser()
    if name.endswith(".gguf"):
        if not path.is_file():
            raise Mistake("there is no such model file", where=where, found=name, do="give the path of a .gguf file")
        _check_gguf(path, where)
        return Source(name, str(path.parent), path.name)
    if path.is_dir():
        if (path / "adapter_config.json").is_file():  # transformers would load it too, and whatever base it names
            do = f"merge it first: finetune merge {path} --out DIR"
            raise Mistake("this folder holds an adapter", where=where, found=str(path / "adapter_config.json"), do=do)
        if not (path / "config.json").is_file():
            raise Mistake(
                "this folder holds no model",
                where=where,
                found=f"{path} has no config.json",
                do="give the folder that has one",
            )
        return Source(name, str(path), trust_remote_code=trust_remote_code)
    if path.is_file():
        raise Mistake("this is a file, and no model", where=where, found=name, do="give a model folder, a .gguf file or a hub id")
    beside_runs = any(path.parent.glob("*/run.json")) if "/" in name else False
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or beside_runs:
        near = nearest(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else None
        raise Mistake(
            "there is no such model folder",
            where=where,
            found=name,
            do=f"did you mean {path.parent / near}?" if near else "give a model folder, a .gguf file or a hub id",
        )
    return Source(name, name, revision=revision, trust_remote_code=trust_remote_code)


def _check_gguf(path: Path, where: str) -> None:
    """Raise Mistake when the beginning of a GGUF is none: what it counts must at least fit into the file."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(24)
    if head[:4] != b"GGUF":
        raise Mistake("this file is no GGUF", where=where, found=f"{path} begins with {head[:4]!r}", do="give a .gguf file")
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
        raise Mistake("the header of this GGUF is damaged", where=where, found=f"{path}: {wrong}", do="fetch the file again")


PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def check_files(source: Source, where: str = "model.name") -> None:
    """Look at the names and headers of a local model's weights, which takes no time: all are in its folder, whole, and belong
    together. A folder without any weights is not refused: a plan needs none.

    Raises:
        Mistake: a file is damaged, is missing, lies elsewhere, belongs to another model, or is a pickle.
    """
    folder = Path(source.folder)
    if source.scratch is not None or source.gguf is not None or not folder.is_dir():
        return
    if (folder / "model.safetensors").is_file():
        shapes_in(folder / "model.safetensors", where)
        return
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        if pickles and not any(folder.glob("*.safetensors")):
            found = f"{folder / pickles[0]}, which can run any code"
            do = "give its safetensors: huggingface.co/spaces/safetensors/convert makes them"
            raise Mistake("the weights of this model cannot be read: pickles are not opened", where=where, found=found, do=do)
        return
    try:
        place = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(place.values()))
        outside = next((name for name in names if Path(name).is_absolute() or ".." in Path(name).parts), None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        found = f"{type(error).__name__}: {error}"
        raise Mistake("the index of this model's weights cannot be read", where=str(index), found=found, do=AGAIN) from None
    if outside is not None:
        do = "put the file into the model's folder, or fetch the model again"
        raise Mistake("the index of this model's weights leads out of its folder", where=str(index), found=outside, do=do)
    held: set[str] = set()
    for name in names:
        if not (folder / name).is_file():
            raise Mistake("a file of this model is missing", where=str(folder), found=name, do=AGAIN)
        held |= shapes_in(folder / name, where).keys()
    if lost := [name for name in place if name not in held]:
        found = f"{place[lost[0]]} has no {lost[0]}" + (f", nor {len(lost) - 1} others" if len(lost) > 1 else "")
        raise Mistake("a file of this model does not belong to it", where=str(index), found=found, do=AGAIN)


def shapes_in(path: Path, where: str = "model.name") -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a safetensors file, by its header.

    Raises:
        Mistake: it is damaged, or none.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # it is no dict
    except (SafetensorError, OSError) as error:
        found = f"{path}: {error}"
        if isinstance(error, SafetensorError):
            with open(path, "rb") as raw:
                begin = raw.read(2)
            found += f"; {path.stat().st_size} bytes"
            found += ", which are a pickle" if begin == b"PK" or begin in {bytes([0x80, n]) for n in range(2, 6)} else ""
        raise Mistake("this safetensors file cannot be read", where=where, found=found, do=AGAIN) from None


def find_tokenizer(name: str, *, where: str = "tokenizer.name") -> Source:
    """The place of a tokenizer: a model's, or a folder that holds nothing else.

    Raises:
        Mistake: as `find`.
    """
    path = Path(name).expanduser()
    return Source(name, str(path)) if (path / "tokenizer.json").is_file() else find(name, where=where)


def _unavailable(source: Source, error: Exception) -> Mistake:
    if "trust_remote_code" in str(error):
        do = "read that code; if you trust it: model.trust_remote_code=true"
        return Mistake("this model brings Python code of its own", where="model.trust_remote_code", found=source.name, do=do)
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if source.local:
        return Mistake(
            "the model cannot be read",
            where=source.folder if source.gguf is None else str(Path(source.folder) / source.gguf),
            found=reason,
            do=AGAIN,
        )
    return Mistake(
        "unknown model, or the hub cannot be reached",
        where="model.name",
        found=f"{source.name}: {reason}",
        do="check the name on huggingface.co, the network, and `hf auth login`; or give a local folder",
    )


def load_config(source: Source, tokenizer: PreTrainedTokenizerBase | None = None) -> PretrainedConfig:
    """The model's configuration; from scratch its vocabulary and end token are those of `tokenizer`, unless it says others.

    Raises:
        Mistake: it cannot be read, or a key of model.config is none of that configuration class.
    """
    from transformers import AutoConfig

    if source.scratch is not None:
        return new_config(source.scratch, tokenizer)
    try:
        return AutoConfig.from_pretrained(source.folder, **source.options)
    except FAULTS:
        raise
    except Exception as error:  # transformers raises many kinds for one cause: this is no readable model
        raise _unavailable(source, error) from None


def new_config(
    given: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None = None, *, where: str = "model.config"
) -> PretrainedConfig:
    """The configuration of model.config. transformers takes any key into one, a misspelt one too: here it is an error.

    where: the place of `given`, for messages.

    Raises:
        Mistake: no such model_type or key, or values that do not go together.
    """
    import dataclasses

    from transformers import CONFIG_MAPPING

    keys = dict(given)
    kind = keys.pop("model_type")
    if kind not in CONFIG_MAPPING:
        near = nearest(kind, list(CONFIG_MAPPING.keys()))
        raise Mistake(
            "transformers knows no such model_type",
            where=f"{where}.model_type",
            found=kind,
            do=f"did you mean {near}?" if near else "such as bitnet, llama, gpt2",
        )
    configuration = CONFIG_MAPPING[kind]
    known = {field.name for field in dataclasses.fields(configuration)} | set(configuration.attribute_map)
    if unknown := sorted(keys.keys() - known):
        near = nearest(unknown[0], sorted(known))
        raise Mistake(
            f"{configuration.__name__} has no key of this name",
            where=f"{where}.{unknown[0]}",
            found=repr(keys[unknown[0]]),
            do=f"did you mean {near}?" if near else "see this class in the documentation of transformers",
        )
    if tokenizer is not None:
        ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
        keys = {"vocab_size": len(tokenizer), **ends, "pad_token_id": None, **keys}
    try:
        return configuration(**keys)
    except Exception as error:  # validators of transformers raise many kinds; each means: these values do not go together
        said = str(error).strip().splitlines()[0]
        raise Mistake(f"{configuration.__name__} refuses these values", where=where, found=said) from None


def limits(config: PretrainedConfig) -> Limits:
    """How many positions and token ids the model has. Rotary positions have no end, learnt ones (GPT-2) have."""
    text = config.get_text_config()
    return Limits(getattr(text, "max_position_embeddings", None), getattr(text, "vocab_size", None))


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source.folder, **source.options)
    except FAULTS:
        raise
    except Exception as error:
        if source.local and source.gguf is None and "trust_remote_code" not in str(error):
            files = [path.name for path in Path(source.folder).iterdir() if "token" in path.name or "vocab" in path.name]
            found = f"{', '.join(sorted(files)) or 'no file of one'}: {(str(error).strip().splitlines() or [''])[0]}"
            do = "put there the tokenizer.json and tokenizer_config.json that came with the model"
            raise Mistake("the tokenizer cannot be read", where=source.folder, found=found, do=do) from None
        raise _unavailable(source, error) from None


def stop_ids(source: Source, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens at which the model stops when it generates: the tokenizer's end token and those of its generation config."""
    ids: set[int] = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    if source.gguf is None and source.scratch is None:
        from transformers import GenerationConfig

        try:
            eos = GenerationConfig.from_pretrained(source.folder, revision=source.revision or "main").eos_token_id
        except OSError:  # many models have none
            eos = None
        ids |= set(eos) if isinstance(eos, list) else set() if eos is None else {eos}
    return frozenset(ids)


def set_stops(model: Any, ids: Iterable[int]) -> None:
    """Make the model stop at these tokens when it generates, and every folder that is saved of it too."""
    stops = sorted(ids)
    if stops and model.generation_config is not None:
        model.generation_config.eos_token_id = stops if len(stops) > 1 else stops[0]


def cast(model: Any, dtype: torch.dtype) -> Any:
    """`model` with its float parameters in `dtype`. Buffers stay: rotary frequencies in bf16 would put tokens elsewhere."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.dtype = dtype
    return model


# --------------------------------------------------------------------------------------------------------------- skeleton


@dataclass(frozen=True)
class Skeleton:
    """What a config tells. `linears`: path → (out, in) of every linear; `left`: path → why it gets neither codes nor adapters."""

    architecture: str
    parameters: int
    linears: dict[str, tuple[int, int]]
    left: dict[str, str]


def skeleton(source: Source, config: PretrainedConfig) -> Skeleton:
    """The model without weights.

    Raises:
        Mistake: transformers knows no causal language model of this config.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=source.trust_remote_code)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise Mistake(
            "this is no causal language model that transformers can build",
            where="model.name",
            found=f"{source.name} ({config.model_type}): {str(error).splitlines()[0][:200]}",
        ) from None
    linears = {path: _shape(module) for path, module in linear_like(model).items()}
    parameters = sum(p.numel() for p in model.parameters())
    return Skeleton(type(model).__name__, parameters, linears, reasons_to_leave(model, DEFAULT_KEEP))


def _shape(module: torch.nn.Module) -> tuple[int, int]:
    linear = as_linear(module)
    return linear.out_features, linear.in_features


def adapter_targets(adapter: Adapter, bones: Skeleton) -> list[str]:
    """Full paths of the modules that get adapters.

    Raises:
        Mistake: a target matches no module, or only such as cannot carry an adapter; names those that exist.
    """
    able = [name for name in bones.linears if name not in bones.left]
    if adapter.targets == "all-linear":
        return able
    chosen: set[str] = set()
    leaves = sorted({name.rpartition(".")[2] for name in able})
    for target in adapter.targets:
        matched = {name for name in bones.linears if name == target or name.endswith("." + target)}
        unable = next((name for name in matched if name in bones.left), None)
        near = nearest(target, leaves)
        if not matched or unable:
            raise Mistake(
                f"this adapter target cannot be wrapped: {bones.left[unable]}"
                if unable
                else "this adapter target matches no module",
                where="adapter.targets",
                found=unable or target,
                do=(f"did you mean {near}? " if near and not unable else "")
                + f"this {bones.architecture} has: {', '.join(leaves)}",
            )
        chosen |= matched
    return [name for name in able if name in chosen]


def adapter_parameters(adapter: Adapter, bones: Skeleton, targets: list[str]) -> int:
    """Trainable parameters of the adapters: A (r, in), B (out, r), and DoRA's magnitude (out)."""
    shapes = [bones.linears[target] for target in targets]
    return sum(adapter.rank * (rows + columns) + (rows if adapter.dora else 0) for rows, columns in shapes)


# ---------------------------------------------------------------------------------------------------------------- weights


def load_weights(
    source: Source,
    config: PretrainedConfig,
    *,
    dtype: torch.dtype,
    attention: str,
    quant: Quant | None = None,
    frozen: bool = True,
    seed: int = 0,
    put: Callable[[torch.Tensor], torch.Tensor] | None = None,
    progress: Shown | None = None,
) -> PreTrainedModel:
    """The model on the CPU, in `dtype`, in eval mode. `progress` shows the download and the reading; `seed` is that of a model
    from scratch; `frozen`: the base carries adapters, or nothing is trained.

    Linears are packed as `quant` says while they are read, so that a 7B never lies in memory in floats (a GGUF is packed
    afterwards, by `prepare`), and with `put`, which takes each packed tensor elsewhere, not in codes either. A checkpoint that is
    packed already, as bitsandbytes or bitnet, is read as it is.

    Raises:
        Mistake: the weights are missing, damaged, not all that the architecture needs, cannot be packed, or are packed
            otherwise than `quant` says.
    """
    from transformers import AutoModelForCausalLM

    from quant.pretrained import PackedNF4Config, PackingError

    check_files(source, source.folder)
    chosen = {} if attention == "auto" else {"attn_implementation": attention}
    if source.scratch is not None:
        torch.manual_seed(seed)
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, **chosen).eval()
            with torch.no_grad():
                model(input_ids=torch.zeros((1, 2), dtype=torch.int64), use_cache=False)
            return model
        except RuntimeError as error:
            found = str(error).strip().splitlines()[0]
            raise Mistake("a model of this configuration cannot run", where="model.config", found=found) from None
        except (ImportError, ValueError) as error:
            found = str(error).strip().splitlines()[0]
            raise Mistake("this model has no such attention", where="model.attention", found=found) from None
    options = dict(source.options) | chosen
    if source.gguf is not None:
        from transformers import GgufConfig

        options["quantization_config"] = GgufConfig(dequantize=True)  # else the weights stay packed and cannot be saved
    else:
        options |= {"config": config, "use_safetensors": True}
        if getattr(config, "quantization_config", None):
            options["config"] = as_packed(source, config, quant, frozen=frozen)
        elif quant is not None and quant.scheme == "nf4":
            options["quantization_config"] = PackedNF4Config(keep=(*DEFAULT_KEEP, *quant.keep), double=quant.double, put=put)
    try:
        with relayed_bars(progress) as tqdm_class:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source.folder, dtype=dtype, output_loading_info=True, tqdm_class=tqdm_class, **options
            )
    except ImportError as error:
        raise Mistake(
            "a package for this model is missing", where="model.attention", found=str(error).strip().splitlines()[0]
        ) from None
    except PackingError as error:
        if "the checkpoint has no" in str(error):
            raise _incomplete(source, str(error)) from None
        raise Mistake("the base cannot be quantized", where="quant", found=str(error)) from None
    except FAULTS:
        raise
    except Exception as error:
        if "attn_implementation" in str(error):
            raise Mistake(
                "this model has no such attention", where="model.attention", found=attention, do="model.attention=auto"
            ) from None
        if "ignore_mismatched_sizes" in str(error) and (misfit := _misfit(source, config)) is not None:
            raise Mistake("the weights are of another model", where=source.folder, found=misfit, do=AGAIN) from None
        raise _unavailable(source, error) from None
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise _incomplete(source, f"{len(missing)}, such as {missing[0]}")
    model.eval()
    return model


def _misfit(source: Source, config: PretrainedConfig) -> str | None:
    """The first tensor in a local model's files that has not the shape which its config gives it."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        wanted = AutoModelForCausalLM.from_config(config, trust_remote_code=source.trust_remote_code).state_dict()
    for path in sorted(Path(source.folder).glob("*.safetensors")):
        for name, shape in shapes_in(path).items():
            if name in wanted and shape != tuple(wanted[name].shape):
                return f"{name} in {path.name} is {list(shape)}; config.json makes it {list(wanted[name].shape)}"
    return None


def _incomplete(source: Source, found: str) -> Mistake:
    return Mistake(
        "weights are missing: these would stay random", where=source.folder, found=found, do="fetch or save the model again"
    )


def check_scheme(source: Source, config: PretrainedConfig, quant: Quant, *, frozen: bool, twin: bool = False) -> None:
    """Raise Mistake when what the run asks for cannot be had from this checkpoint: before anything is read or trained."""
    if getattr(config, "quantization_config", None):
        stored = as_packed(source, config, quant, frozen=frozen).quantization_config["stored"]
        if twin or quant.sub_norms:
            raise Mistake(
                "this model is ternary already: it has no float twin, and its layout stays",
                where="twin" if twin else "quant.sub_norms",
                found=source.name,
                do="leave it out",
            )
        if frozen and stored.get("use_rms_norm"):
            raise Mistake(
                "adapters cannot go on linears that normalize their input themselves",
                where="adapter.kind",
                found=f"{source.name}: use_rms_norm",
                do="a model with sub-norms (model_type bitnet) takes them",
            )
    elif quant.scheme == "ternary" and frozen:
        raise Mistake(
            "adapters on a ternary base need a model that was trained to be ternary; rounding this one would destroy it",
            where="quant.scheme",
            found=f"ternary, and {source.name} is in floats",
            do="quant.scheme=nf4; or train its weights: adapter.kind=none, quant.warmup=0.5, quant.sub_norms=true",
        )


def as_packed(source: Source, config: PretrainedConfig, quant: Quant | None, *, frozen: bool = True) -> PretrainedConfig:
    """The config that reads a checkpoint which is packed already. quant: what a run asks for, None where anything will do."""
    from quant.pretrained import PackingError, packed_config

    try:
        packed = packed_config(config)
    except PackingError as error:
        raise Mistake(
            "this model is quantized in a way that cannot be read", where="model.name", found=f"{source.name}: {error}"
        ) from None
    found = str(packed.quantization_config["quant_method"]).removeprefix("packed_")
    if quant is not None and quant.scheme != found:
        raise Mistake(
            "this model is quantized already, and quantizing twice destroys it",
            where="model.name",
            found=f"{source.name}: {found}",
            do=f"quant.scheme={found} trains adapters on it as it is",
        )
    masters = packed.quantization_config["stored"].get("quantization_mode") == "online"
    if quant is not None and found == "ternary" and masters == frozen:
        raise Mistake(
            "this model holds float master weights of ternary layers, which are trained, not adapted"
            if masters
            else "this model is ternary already: its master weights are gone, and a second quantization would shrink its scales",
            where="model.name",
            found=source.name,
            do=f"adapter.kind=none; or pack it first: finetune export {source.name} --to bitnet --out DIR"
            if masters
            else "adapter.kind=lora trains adapters on it; to train its weights, give a checkpoint that has them "
            "(finetune export RUN --to bitnet-online)",
        )
    if quant is not None and quant.keep:
        raise Mistake(
            "this model is packed already, so nothing more can be kept in floats", where="quant.keep", found=source.name
        )
    return packed


def parameters_of(model: Any) -> int:
    """Parameters of the model that packed linears stand for."""
    packed = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, PackedLinear))
    return packed + sum(p.numel() for p in model.parameters() if p.is_floating_point())


@dataclass
class Prepared:
    """A model ready to train, and what was done to it. `swap`: of what is frozen or trained in codes, None in floats."""

    model: Any  # PreTrainedModel or PeftModel
    swap: SwapReport | None
    adapters: int
    parameters: int
    trainable: int


def prepare(
    model: Any,
    *,
    quant: Quant,
    adapter: Adapter,
    targets: list[str],
    source: Source,
    device: torch.device,
    checkpointing: bool = False,
    seed: int = 0,
    move: Callable[[Any], object] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Prepared:
    """Pack what was not packed while it was read, move the model, attach adapters (or free all weights), set checkpointing.

    Without adapters a scheme's linears train their master weights. `move` puts a model that `device` cannot hold there, in its
    own way, when all is in place.
    """
    parameters = parameters_of(model)
    report = packed(model, quant, progress) if adapter.kind == "lora" else _trainable(model, quant, progress)
    if move is None:
        model.to(device)
    model.config.use_cache = False
    wrapped = model
    if adapter.kind == "lora":
        wrapped = attach(model, adapter, targets, source, seed)
    else:
        model.requires_grad_(True)
        if any(getattr(module, "rms_norm", None) is not None for module in model.modules()):
            fix_norms(model)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if move is not None:
        move(wrapped)
    trainable = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    return Prepared(wrapped, report, len(targets), parameters, trainable)


def packed(model: Any, quant: Quant, progress: Callable[[int, int], None] | None = None) -> SwapReport | None:
    """What was packed of the base, None where it is in floats; what was not packed while it was read is packed now.

    Raises:
        Mistake: a keep pattern matches nothing, nothing can be packed, or weights are not finite.
    """
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None and getattr(quantizer, "report", None) is not None:
        return quantizer.report
    if quant.scheme == "none":
        return None
    options: dict[str, Any] = {"double": quant.double} if quant.scheme == "nf4" else {}
    try:
        return swap(model, scheme=quant.scheme, keep=(*DEFAULT_KEEP, *quant.keep), progress=progress, **options)
    except ValueError as error:
        raise Mistake("the base cannot be quantized", where="quant", found=str(error)) from None


def _trainable(model: Any, quant: Quant, progress: Callable[[int, int], None] | None = None) -> SwapReport | None:
    """What of the model trains master weights in a scheme, None where all of it is in floats.

    Raises:
        Mistake: a keep pattern matches nothing, a shape does not fit the format, or weights are ternary already.
    """
    if quant.scheme == "none":
        return None
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:  # read from a checkpoint of master weights
        return quantizer.report
    if quant.rms_norm and any(name.endswith("_sub_norm") for name, _ in model.named_modules()):
        found = f"rms_norm, and {type(model).__name__} has sub-norms of its own"
        raise Mistake(
            "these are two layouts of one idea", where="quant.rms_norm", found=found, do="model_type: llama, or rms_norm off"
        )
    eps = getattr(model.config, "rms_norm_eps", 1e-6)
    options: dict[str, Any] = {"norm_eps": eps} if quant.rms_norm else {}
    try:
        return swap(model, scheme=quant.scheme, trainable=True, keep=(*DEFAULT_KEEP, *quant.keep), progress=progress, **options)
    except ValueError as error:
        raise Mistake("this model cannot be trained in ternary", where="quant", found=str(error)) from None


def fix_norms(model: Any) -> None:
    """Fix the norms before linears that normalize by themselves at one, untrained: RMSNorm of RMSNorm(x) is RMSNorm(x) but for ε.

    So the layout of BitNet's training tips, which removes them, keeps the shape of the architecture that plain transformers
    loads. The last norm, before the head, stays.

    Raises:
        Mistake: the blocks have other norms than Llama's two.
    """
    layers: Any = next((m for m in model.get_decoder().children() if isinstance(m, torch.nn.ModuleList)), [])
    for layer in layers:
        norms: dict[str, Any] = {n: child for n, child in layer.named_children() if "norm" in type(child).__name__.lower()}
        if norms.keys() != {"input_layernorm", "post_attention_layernorm"}:
            found = f"{type(layer).__name__} with {', '.join(norms) or 'no norm'}"
            raise Mistake("it is not known which norms of these blocks stand before linears", where="quant.rms_norm", found=found)
        for norm in norms.values():
            torch.nn.init.ones_(norm.weight)
            norm.requires_grad_(False)


def attach(model: PreTrainedModel, adapter: Adapter, targets: list[str], source: Source, seed: int) -> Any:
    """Fresh LoRA adapters on `targets`; those wrapped are those asked for."""
    from peft import LoraConfig, get_peft_model

    from quant import assert_wrapped, register_peft

    suffixes = sorted({target.rpartition(".")[2] for target in targets})
    named = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in suffixes}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=suffixes if named == set(targets) else targets,  # short in adapter_config.json where that says it all
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
    )
    register_peft(config)
    torch.manual_seed(seed)
    wrapped = get_peft_model(model, config)
    config.base_model_name_or_path = source.name
    assert_wrapped(wrapped, targets)
    return wrapped


def save_adapter(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """PEFT's own files; `folder` is complete or absent."""
    from finetune.files import atomic_folder

    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary, save_embedding_layers=False)
        tokenizer.save_pretrained(temporary)  # with the template that it was trained with


def adapter_base(folder: Path) -> str:
    """The base model that an adapter folder names."""
    path = folder / "adapter_config.json"
    try:
        name = dict(json.loads(path.read_text(encoding="utf-8"))).get("base_model_name_or_path")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise Mistake("the adapter cannot be read", where=str(path), found=str(error), do=AGAIN) from None
    if not isinstance(name, str) or not name:
        found = f"base_model_name_or_path: {str(name)[:80]!r}"
        do = "write the base model's hub id or folder there"
        raise Mistake("the adapter does not name its base model", where=str(path), found=found, do=do)
    return name
