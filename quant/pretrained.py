"""Packed linears in transformers: packed while loading, and saved and read in the standard formats.

    float checkpoint     ── from_pretrained(…, quantization_config=PackedNF4Config()) ──→  packed, one tensor at a time
    packed checkpoint    ── load(folder) ──────────────────────────────────────────────→  packed, or trained (online bitnet)
    packed or swapped    ── attach_quantizer(model).save_pretrained(folder) ───────────→  packed checkpoint

There is no file format of our own. NF4 is written as bitsandbytes serializes it and ternary as Hugging Face `bitnet`, so
plain transformers loads the folder with `from_pretrained`, without this package. Reading is the inverse, into layers
that support training on top (bitsandbytes' Linear4bit does not, on CPUs with AVX512-BF16) and keep every scale in fp32.

    NF4        X.weight uint8 (n, 1) · X.weight.absmax · X.weight.quant_map · X.weight.quant_state.bitsandbytes__nf4 (JSON as
               bytes), and X.weight.nested_absmax · X.weight.nested_quant_map where the scales are quantized again
    ternary    X.weight uint8 (out/4, in) · X.weight_scale (1,): 1 / mean|W| with `bitlinear`, which divides by it, and
               mean|W| with `autobitlinear`, which multiplies; in mode `online` X.weight is the float master weight; with
               `use_rms_norm` X.rms_norm.weight (in,), a float

It uses transformers' quantizer interface: `register_quantizer`, transformers ≥ 5.17. Packing
materializes one tensor at a time (of a mixture, one projection of a layer's experts), so memory peaks near the
packed size: 3.7 GB (RssAnon) for a Llama of 6.7 B parameters.
"""

from __future__ import annotations

import copy
import json
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import BitNetQuantConfig, BitsAndBytesConfig, QuantizationConfigMixin

from quant import nf4, ternary
from quant.experts import QuantizedExperts, looks_fused, projections
from quant.linear import BitLinear, FakeNF4Linear, FakeQuantLinear, NF4Linear, PackedBitLinear, PackedLinear
from quant.swap import DEFAULT_KEEP, SwapReport, as_linear, linear_like, multiplying, swap

Model = TypeVar("Model", bound=PreTrainedModel)


class PackingError(ValueError):
    """A model that cannot be packed, or a packed checkpoint that cannot be read, with the reason for each layer."""


class MissingTensors(PackingError):
    """The checkpoint lacks tensors of the model, which would stay random."""


# Allowed difference of a stored table of levels from ours: torch builds round linspace differently in the last bit.
MAP_ERROR = 1e-6
RMS_NORM_EPS = 1e-6  # default of BitNetQuantConfig, if config.json has none

HUB_OPTIONS = ("cache_dir", "local_files_only", "revision", "subfolder", "token", "trust_remote_code")


# ----------------------------------------------------------------------------------------------------------------- configs


@dataclass
class PackedConfig(QuantizationConfigMixin):
    """keep: as in `quant.swap`. stored: the quantization config of the standard format for config.json.

    put: moves each tensor packed while loading to its storage, for example a mapped file, and returns the result.
    """

    keep: Sequence[str] = DEFAULT_KEEP
    stored: dict[str, Any] | None = None
    put: Callable[[Tensor], Tensor] | None = None
    quant_method: Any = ""

    def to_dict(self) -> dict[str, Any]:
        """The entry in config.json: the standard format once a model is packed."""
        if self.stored is not None:
            return copy.deepcopy(self.stored)
        return {name: value for name, value in copy.deepcopy(self.__dict__).items() if name not in ("stored", "put")}


@register_quantization_config("packed_nf4")
@dataclass(repr=False)
class PackedNF4Config(PackedConfig):
    """`quantization_config` for from_pretrained: pack a float checkpoint into NF4Linear while it is read."""

    double: bool = True
    quant_method: Any = field(default="packed_nf4")


@register_quantization_config("packed_ternary")
@dataclass(repr=False)
class PackedTernaryConfig(PackedConfig):
    """The same into PackedBitLinear: only for weights that were trained for it; others lose their function."""

    quant_method: Any = field(default="packed_ternary")


def packed_config(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of a packed checkpoint's config that makes `from_pretrained(…, config=…)` read it into the layers of this package.

    Raises PackingError for a checkpoint that is not quantized, or quantized to a format that these layers do not support.
    """
    stored = getattr(config, "quantization_config", None)
    stored = stored or getattr(config.get_text_config(decoder=True), "quantization_config", None)
    if stored is None:
        raise PackingError("this checkpoint is not quantized; from_pretrained(…, quantization_config=PackedNF4Config()) packs it")
    stored = copy.deepcopy(stored) if isinstance(stored, dict) else stored.to_dict()
    method = stored.get("quant_method")
    method = getattr(method, "value", method)
    if method is None and (stored.get("load_in_4bit") or stored.get("load_in_8bit")):
        method = "bitsandbytes"  # its first configs
    elif method is None:
        raise PackingError("this checkpoint's quantization_config has no quant_method, so its format is unknown")
    if method == "bitsandbytes":
        quant_type = stored.get("bnb_4bit_quant_type", "fp4") if stored.get("load_in_4bit") else "int8"
        if quant_type != "nf4":
            raise PackingError(f"this checkpoint is quantized to bitsandbytes {quant_type}; only nf4 can be read")
        ours = "packed_nf4"
    elif method == "bitnet":
        ours = "packed_ternary"
    else:
        raise PackingError(f"this checkpoint is quantized as {method!r}; only bitsandbytes nf4 and bitnet are supported")
    config = copy.deepcopy(config)
    config.quantization_config = {"quant_method": ours, "stored": stored}
    return config


# ---------------------------------------------------------------------------------------------------------------- loading


def load(name: str | Path, *, dtype: torch.dtype | str = "auto", device_map: Any = None, **options: Any) -> PreTrainedModel:
    """The causal language model of a packed checkpoint (folder or hub id), with the layers of this package.

    bitsandbytes NF4 becomes NF4Linear, `bitnet` PackedBitLinear, or BitLinear (trainable) in mode `online`. options: those
    of from_pretrained. `model.hf_quantizer.report` is the SwapReport, `model.save_pretrained` writes the same format.

    Raises PackingError, naming layers, for unsupported formats and missing tensors.
    """
    if (str(name).startswith((".", "/", "~")) or isinstance(name, Path)) and not Path(name).expanduser().is_dir():
        raise FileNotFoundError(f"folder not found: {name}")
    config = AutoConfig.from_pretrained(name, **{key: options[key] for key in HUB_OPTIONS if key in options})
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, config=packed_config(config), dtype=dtype, device_map=device_map, output_loading_info=True, **options
        )
    except SafetensorError as error:
        raise PackingError(f"a weight file of {name} is damaged or truncated: {error}; download or save it again") from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise MissingTensors(f"{len(missing)} tensors are missing in the checkpoint and would stay random: {_some(missing)}")
    return model


class _Pack(ConversionOps):
    """Float weights of layers to be packed → their packed parts; other tensors unchanged."""

    def __init__(self, quantizer: PackedQuantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """{parameter: tensor, or [tensor]} → {parameter: tensor}; fused experts are inserted into the model directly."""
        model, out = kwargs["model"], dict[str, Any]()
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            layer = self.quantizer.layer_of(model, name)
            if self.quantizer.is_fused(name):
                if self.quantizer.fill(model, name, weight):
                    kwargs["missing_keys"].discard(name)
            elif isinstance(layer, PackedLinear):
                out |= self.quantizer.packed(name.removesuffix(".weight"), layer, weight)
            else:
                out[name] = weight
        return out


class _Unpack(ConversionOps):
    """A layer's tensors in the checkpoint → its packed parts; the weights of other layers unchanged."""

    def __init__(self, quantizer: PackedQuantizer) -> None:
        self.quantizer = quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> _Unpack:
        return self  # transformers copies the operation for each tensor; all must report to one quantizer

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """{"weight": …, "weight.absmax": …} of one parameter, `full_layer_name` → {parameter: tensor}."""
        name: str = kwargs["full_layer_name"]
        path = name.removesuffix(".weight")
        tensors = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
        layer = self.quantizer.layer_of(kwargs["model"], name)
        if isinstance(layer, PackedLinear):
            return self.quantizer.unpacked(path, layer, tensors)
        if tensors.keys() != {"weight"}:
            self.quantizer.failures[path] = "it is packed in the checkpoint, but listed as kept in floats in config.json"
            return {}
        return {name: tensors["weight"]}


# -------------------------------------------------------------------------------------------------------------- quantizers


class PackedQuantizer(HfQuantizer):
    """The quantizer that transformers calls while it loads and saves; base of the two formats.

    report: the layers that were packed, and why others were not. failures: {layer: why it could not be packed or read};
    transformers would swallow an exception on the way, so they are raised together at the end. transposed: layers that are
    Conv1D in the architecture. mixtures, awaited: experts not inserted yet, and the fused tensors that they still need.
    """

    quantization_config: Any

    def __init__(self, quantization_config: PackedConfig, **kwargs: Any) -> None:
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        self.report: SwapReport | None = None
        self.failures: dict[str, str] = {}
        self.incomplete = False
        self.transposed: frozenset[str] = frozenset()
        self.mixtures: dict[str, QuantizedExperts] = {}
        self.awaited: dict[str, set[str]] = {}

    # properties of a format

    @property
    @abstractmethod
    def linear(self) -> type[PackedLinear] | type[FakeQuantLinear]:
        """The class of a quantized layer."""

    @property
    @abstractmethod
    def options(self) -> dict[str, Any]:
        """Arguments of that class."""

    @abstractmethod
    def skipped(self) -> list[str] | None:
        """The stored config's list of layers that are kept in floats."""

    @abstractmethod
    def takes(self, module: nn.Module) -> bool:
        """Whether the format's own program would quantize this module."""

    @abstractmethod
    def describe(self, model: nn.Module, left: list[str]) -> QuantizationConfigMixin:
        """The standard config of a model in which all linears but `left` are quantized; ValueError if it has none."""

    @abstractmethod
    def read(self, layer: PackedLinear, tensors: Mapping[str, Tensor]) -> Any:
        """Stored tensors → the scheme's tensor; ValueError for missing or unsuitable tensors."""

    @abstractmethod
    def write(self, layer: PackedLinear) -> dict[str, Tensor]:
        """The inverse: {name after the layer's path: tensor}."""

    # loading

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        device_map = kwargs.get("device_map")
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise PackingError("packed layers cannot be offloaded to disk: remove it from device_map")

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        """Replace linears on `meta`: by the rule of `swap`, or those that the checkpoint's config says are quantized."""
        self.transposed = frozenset(path for path, module in linear_like(model).items() if isinstance(module, Conv1D))
        with _tied(model):
            try:
                if self.pre_quantized:
                    self.report = self._replace(model)
                else:
                    self._swap(model)
            except ValueError as error:
                raise PackingError(str(error)) from error

    def _swap(self, model: nn.Module) -> None:
        """Swap the meta model; fused experts stay for transformers' lookup of parameters until their tensors are loaded."""
        fused = {path: module for path, module in model.named_modules() if looks_fused(module)}
        self.report = swap(model, scheme=self.linear.quantized, keep=self.quantization_config.keep, **self.options)
        for path, module in fused.items():
            mixture = model.get_submodule(path)
            if isinstance(mixture, QuantizedExperts):
                names = projections(module)
                self.mixtures[path] = mixture
                self.awaited[path] = {
                    n for n, p in module._parameters.items() if p is not None and n.removesuffix("_bias") in names
                }
                model.set_submodule(path, module)

    def _replace(self, model: PreTrainedModel) -> SwapReport:
        bytes_before, total = model.get_memory_footprint(), sum(p.numel() for p in model.parameters())
        skip = self.get_modules_to_not_convert(model, self.skipped(), list(model._keep_in_fp32_modules or ()))
        swapped, left, weights = [], {}, 0
        for path, module in multiplying(model).items():
            if not self.takes(module) or not should_convert_module(path, skip):
                left[path] = "kept by the checkpoint"
                continue
            try:
                layer = self.linear.from_linear(as_linear(module), **self.options)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
            model.set_submodule(path, layer)
            swapped.append(path)
            weights += layer.in_features * layer.out_features
        if not swapped:
            raise ValueError(f"the checkpoint's config excludes all linears of {type(model).__name__}")
        share, scheme = weights / total, self.linear.quantized
        return SwapReport(scheme, self.is_qat_trainable, tuple(swapped), left, share, bytes_before, model.get_memory_footprint())

    def layer_of(self, model: nn.Module, name: str) -> nn.Module | None:
        """The quantized layer that owns the parameter `name`, if that is its `weight`."""
        path, _, leaf = name.rpartition(".")
        layer = model.get_submodule(path) if leaf == "weight" else None
        return layer if isinstance(layer, self.linear) else None

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        return self.is_fused(param_name) or isinstance(self.layer_of(model, param_name), PackedLinear)

    def is_fused(self, name: str) -> bool:
        """Whether the parameter `name` holds the fused weights of all experts of a mixture."""
        path, _, leaf = name.rpartition(".")
        return leaf in self.awaited.get(path, ())

    def get_quantize_ops(self) -> ConversionOps:
        return _Pack(self)

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        return {"deserialize": _Unpack} if issubclass(self.linear, PackedLinear) else {}

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """The dtype to cast to: `dtype` for float parameters, None for codes and scales, which are uint8."""
        name = param.get_dtype() if hasattr(param, "get_dtype") else None
        is_float = name.startswith(("F", "BF")) if name is not None else param.is_floating_point()
        return dtype if is_float and dtype is not None and dtype.is_floating_point else None

    def packed(self, path: str, layer: PackedLinear, weight: Tensor) -> dict[str, Tensor]:
        """A float weight (out, in), of a Conv1D (in, out) → {parameter: tensor}, empty on failure."""
        if self.failures:
            return {}
        weight = weight.t().contiguous() if path in self.transposed else weight
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        try:
            if weight.shape != layer.shape:
                raise ValueError(f"it has shape {tuple(weight.shape)} in the checkpoint, {tuple(layer.shape)} in the model")
            packed_layer = type(layer).from_linear(linear, **self.options)
        except ValueError as error:
            self.failures[path] = str(error)
            return {}
        if (put := self.quantization_config.put) is not None:
            for name in packed_layer.names:
                setattr(packed_layer, name, nn.Parameter(put(getattr(packed_layer, name).data), requires_grad=False))
        return {f"{path}.{name}": part for name, part in zip(packed_layer.names, packed_layer.parts, strict=True)}

    def fill(self, model: nn.Module, name: str, fused: Tensor) -> bool:
        """Fill fused weights (experts, out, in), or biases, into the mixture; the last tensor inserts it into the model."""
        path, _, leaf = name.rpartition(".")
        mixture, original = self.mixtures[path], model.get_submodule(path)
        if fused.shape != (shape := getattr(original, leaf).shape):
            self.failures[name] = f"it has shape {tuple(fused.shape)} in the checkpoint, {tuple(shape)} in the model"
            return False
        for index, layer in enumerate(getattr(mixture, leaf.removesuffix("_bias"))):
            part = fused[index]
            if leaf.endswith("_bias"):
                parts: dict[str, Tensor] = {"bias": nn.Parameter(part.clone(), requires_grad=False)}
            else:
                part = part.t().contiguous() if original.is_transposed else part
                parts = self.packed(f"{name}.{index}", layer, part)
            for key, parameter in parts.items():
                parameter._is_hf_initialized = True  # type: ignore[attr-defined]
                setattr(layer, key.rpartition(".")[2], parameter)
        self.awaited[path].remove(leaf)
        if not self.awaited[path] and not self.failures:
            model.set_submodule(path, mixture)
            del self.mixtures[path], self.awaited[path]
        return True

    def unpacked(self, path: str, layer: PackedLinear, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Stored tensors → {parameter: tensor}, empty on failure."""
        try:
            parts = dict(zip(layer.names, self.read(layer, tensors).parts(), strict=True))
            for name, part in parts.items():
                if part.shape != (shape := getattr(layer, name).shape):
                    raise ValueError(f"its {name} has shape {tuple(part.shape)}, not {tuple(shape)}: is the file truncated?")
        except ValueError as error:
            self.failures[path] = str(error)
            self.incomplete |= isinstance(error, MissingTensors)
            return {}
        return {f"{path}.{name}": part for name, part in parts.items()}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        model._weight_conversions = [c for c in model._weight_conversions if not _is_ours(c)]  # they have no inverse
        lost = {path: f"the checkpoint has no {', '.join(sorted(names))} for it" for path, names in self.awaited.items()}
        failures = dict(self.failures or lost)
        for path, layer in model.named_modules(remove_duplicate=False):
            if isinstance(layer, PackedLinear):
                layer.requires_grad_(False)  # transformers makes every loaded float trainable, the bias too
            if isinstance(layer, self.linear) and not self.failures:
                random = [name for name, p in layer.named_parameters() if not getattr(p, "_is_hf_initialized", False)]
                if not self.pre_quantized and isinstance(layer, PackedLinear):  # in a float checkpoint all of them are one weight
                    random = sorted({"weight" if name in layer.names else name for name in random})
                if random:
                    failures[path] = f"the checkpoint has no {', '.join(random)} for it"
        if failures:
            failed = MissingTensors if self.incomplete or not self.failures else PackingError
            raise failed(_some([f"{path}: {reason}" for path, reason in failures.items()]))
        with suppress(ValueError):  # a model that no format can express still works; saving it raises the error
            self.refresh(model)
        return model

    # saving

    def refresh(self, model: Any) -> None:
        """Update the config to the current model. Raises ValueError for a model that the format cannot express."""
        if masters := [path for path, module in model.named_modules() if isinstance(module, FakeNF4Linear)]:
            raise PackingError(f"no standard format stores the NF4 master weight of {masters[0]}: call quant.pack(model) first")
        layers = {path: module for path, module in model.named_modules() if isinstance(module, self.linear)}
        foreign = [p for p, m in model.named_modules() if isinstance(getattr(m, "quantized", None), str) and p not in layers]
        if foreign and not layers:
            raise ValueError(f"{foreign[0]} has another format than this model's config says: call attach_quantizer(model)")
        if not layers:
            raise ValueError(
                "this model has no quantized layers, but its config says so: call quant.to_float(model) before saving it as a "
                "float model"
            )
        if mixtures := [path for path, module in model.named_modules() if isinstance(module, QuantizedExperts)]:
            raise PackingError(
                f"no standard format can store quantized experts ({mixtures[0]}): this model cannot be saved packed. Save the "
                "adapter, the state dict, or a float model after quant.to_float(model)"
            )
        if turned := [path for path, m in model.named_modules() if path in self.transposed and type(m) is nn.Linear]:
            raise ValueError(f"{turned[0]} was a Conv1D and is merged: save a float model, after quant.to_float(model)")
        if wrapped := [path for path in layers if path.endswith(".base_layer")]:
            raise ValueError(f"{wrapped[0]} has an adapter: save the adapter, or merge or unload it first")
        if foreign:
            raise ValueError(
                f"a checkpoint can have one format of quantized layers, and {foreign[0]} has another: it cannot be saved"
            )
        left = [path for path in linear_like(model) if path not in layers]
        skip = self.get_modules_to_not_convert(model, left, list(model._keep_in_fp32_modules or ()))
        if lost := [path for path in layers if not should_convert_module(path, skip)]:
            raise ValueError(f"{lost[0]} is quantized, but a float layer has a name with the same ending: it cannot be saved")
        stored = self.describe(model, left)
        self.quantization_config.stored = json.loads(stored.to_json_string(use_diff=False))
        model.config.quantization_config = self.quantization_config

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        self.refresh(model)
        if not issubclass(self.linear, PackedLinear):
            return None, {}
        state = model.state_dict()
        for path, layer in model.named_modules(remove_duplicate=False):
            if isinstance(layer, PackedLinear):
                for name in layer.names:
                    del state[f"{path}.{name}"]
                state |= {f"{path}.{name}": tensor for name, tensor in self.write(layer).items()}
        return state, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return issubclass(self.linear, FakeQuantLinear)


@register_quantizer("packed_nf4")
class NF4Quantizer(PackedQuantizer):
    """NF4 as bitsandbytes 0.50 serializes it (`QuantState.as_dict(packed=True)`): blocks of 64, codes as uint8."""

    STATE = "weight.quant_state.bitsandbytes__nf4"
    MAP, NESTED_MAP = "weight.quant_map", "weight.nested_quant_map"
    serialized_names: dict[str, list[str]] = {  # noqa: RUF012
        "weight": ["weight", "weight.absmax", MAP, "weight.nested_absmax", NESTED_MAP, STATE, STATE.replace("nf4", "fp4")]
    }

    def __init__(self, quantization_config: PackedNF4Config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if self.pre_quantized and self.quantization_config.stored is not None:
            self.quantization_config.double = bool(self.quantization_config.stored.get("bnb_4bit_use_double_quant", False))

    @property
    def linear(self) -> type[PackedLinear]:
        return NF4Linear

    @property
    def options(self) -> dict[str, Any]:
        return {"double": self.quantization_config.double}

    def skipped(self) -> list[str] | None:
        return self.quantization_config.stored.get("llm_int8_skip_modules")

    def takes(self, module: nn.Module) -> bool:
        return type(module) is nn.Linear or isinstance(module, Conv1D)

    def describe(self, model: Any, left: list[str]) -> QuantizationConfigMixin:
        doubles = {layer.double_quantized for layer in model.modules() if isinstance(layer, NF4Linear)}
        if len(doubles) > 1:
            raise ValueError("some layers are double-quantized and some are not: bitsandbytes has one setting for all")
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=doubles.pop(),
            bnb_4bit_compute_dtype=model.dtype,
            llm_int8_skip_modules=left,
        )

    def read(self, layer: PackedLinear, tensors: Mapping[str, Tensor]) -> nf4.NF4Tensor:
        if self.STATE.replace("nf4", "fp4") in tensors:
            raise ValueError("it is stored in fp4; only nf4 is supported")
        double = self.quantization_config.double
        names = ("weight", "weight.absmax", self.MAP, self.STATE)
        _require(tensors, names + (("weight.nested_absmax", self.NESTED_MAP) if double else ()))
        state = json.loads(bytes(tensors[self.STATE].cpu().tolist()))
        wanted = {"quant_type": "nf4", "blocksize": nf4.BLOCK, "shape": list(layer.shape)}
        wanted |= {"nested_blocksize": nf4.NESTED_BLOCK} if double else {}
        for key, value in wanted.items():
            if state.get(key) != value:
                raise ValueError(f"its {key} is {state.get(key)}; only {value} is supported")
        for name, levels in ((self.MAP, nf4.LEVELS), (self.NESTED_MAP, nf4.DYNAMIC_LEVELS)):
            if name in tensors:
                stored, ours = tensors[name].cpu().float(), torch.tensor(levels, dtype=torch.float32)
                if stored.shape != ours.shape or (stored - ours).abs().max() > MAP_ERROR:
                    raise ValueError(f"its {name.removeprefix('weight.')} has other levels than NF4")
        codes, absmax = tensors["weight"].view(torch.uint8).view(-1, 1), tensors["weight.absmax"]
        if absmax.dtype != (torch.uint8 if double else torch.float32):
            raise ValueError(f"its absmax is {absmax.dtype}: is bnb_4bit_use_double_quant in config.json wrong?")
        if not double:
            return nf4.NF4Tensor(codes, absmax, None, None, layer.shape)
        _require(state, ["nested_offset"])
        offset = torch.tensor(state["nested_offset"], dtype=torch.float32, device=codes.device)
        return nf4.NF4Tensor(codes, absmax, tensors["weight.nested_absmax"].float(), offset, layer.shape)

    def write(self, layer: PackedLinear) -> dict[str, Tensor]:
        packed: nf4.NF4Tensor = layer.packed
        dtype = str(layer.dtype).removeprefix("torch.")
        state: dict[str, Any] = {"quant_type": "nf4", "blocksize": packed.block, "dtype": dtype, "shape": list(layer.shape)}
        out = {"weight": packed.codes, "weight.absmax": packed.absmax, self.MAP: torch.tensor(nf4.LEVELS, dtype=torch.float32)}
        if packed.nested_absmax is not None and packed.offset is not None:
            out |= {
                "weight.nested_absmax": packed.nested_absmax,
                self.NESTED_MAP: torch.tensor(nf4.DYNAMIC_LEVELS, dtype=torch.float32),
            }
            state |= {
                "nested_blocksize": nf4.NESTED_BLOCK,
                "nested_dtype": "float32",
                "nested_offset": packed.offset.item(),
            }
        out[self.STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        return {name: tensor.detach() for name, tensor in out.items()}


@register_quantizer("packed_ternary")
class TernaryQuantizer(PackedQuantizer):
    """Hugging Face `bitnet`. Written as `bitlinear`; a model with master weights as `autobitlinear`, online."""

    serialized_names: dict[str, list[str]] = {"weight": ["weight", "weight_scale"]}  # noqa: RUF012

    @property
    def linear(self) -> type[PackedLinear] | type[FakeQuantLinear]:
        return BitLinear if (self.quantization_config.stored or {}).get("quantization_mode") == "online" else PackedBitLinear

    @property
    def options(self) -> dict[str, Any]:
        stored = self.quantization_config.stored or {}
        return {"norm_eps": stored.get("rms_norm_eps", RMS_NORM_EPS)} if stored.get("use_rms_norm") else {}

    def skipped(self) -> list[str] | None:
        return self.quantization_config.stored.get("modules_to_not_convert")

    def takes(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear)

    def describe(self, model: nn.Module, left: list[str]) -> QuantizationConfigMixin:
        if converted := self.transposed - set(left):
            raise ValueError(f"bitnet does not support Conv1D, and {sorted(converted)[0]} was one: it cannot be saved as bitnet")
        layer_norms: list[Any] = [layer.rms_norm for layer in model.modules() if isinstance(layer, BitLinear | PackedBitLinear)]
        norms = {None if norm is None else norm.eps or 0.0 for norm in layer_norms}
        if len(norms) > 1:
            raise ValueError("layers differ in the eps of their RMSNorm, or only some have one: bitnet has one setting for all")
        norm: dict[str, Any] = {} if norms == {None} else {"use_rms_norm": True, "rms_norm_eps": norms.pop()}
        if self.is_qat_trainable:
            return BitNetQuantConfig(left, linear_class="autobitlinear", quantization_mode="online", **norm)
        return BitNetQuantConfig(left, linear_class="bitlinear", quantization_mode="offline", **norm)

    def refresh(self, model: Any) -> None:
        classes = {type(module) for module in model.modules() if isinstance(module, BitLinear | PackedBitLinear)}
        if classes == {PackedBitLinear if self.is_qat_trainable else BitLinear}:  # `pack` was called since
            mode = "offline" if self.is_qat_trainable else "online"
            self.quantization_config.stored = (self.quantization_config.stored or {}) | {"quantization_mode": mode}
        super().refresh(model)

    def read(self, layer: PackedLinear, tensors: Mapping[str, Tensor]) -> ternary.TernaryTensor:
        _require(tensors, ("weight", "weight_scale"))
        codes, scale = tensors["weight"], tensors["weight_scale"].float()
        if scale.numel() != 1 or not bool((scale > 0) & scale.isfinite()):
            raise ValueError("its weight_scale is not one positive number")
        if codes.shape == layer.shape:  # as plain transformers saves an `autobitlinear` model that it loaded
            if not bool(((codes == 0) | (codes.abs() == 1)).all()):
                raise ValueError("its weights are neither packed nor −1, 0 and 1")
            codes = ternary.pack(codes.to(torch.int8))
        if codes.dtype != torch.uint8:
            raise ValueError(f"its packed weight is {codes.dtype}, not uint8")
        if self.quantization_config.stored.get("linear_class", "bitlinear") == "autobitlinear":
            scale = 1 / scale  # so 1 / scale is the stored number up to the last bit of fp32
        return ternary.TernaryTensor(codes, scale.view(()), layer.shape)

    def write(self, layer: PackedLinear) -> dict[str, Tensor]:
        packed: ternary.TernaryTensor = layer.packed
        return {"weight": packed.codes.detach(), "weight_scale": packed.scale.detach().view(1)}


# ----------------------------------------------------------------------------------------------------------------- saving


def attach_quantizer(model: Model) -> Model:
    """Make `model.save_pretrained` write the standard format of its quantized layers; returns `model`.

    `quant.swap` does it too, and a model that was packed or read by `from_pretrained` or `load` has its quantizer
    already: this is for layers that were replaced by hand, and raises errors of saving early.
    NF4Linear → bitsandbytes, PackedBitLinear → bitnet, BitLinear → bitnet online (float weights). Undone by
    `model.hf_quantizer.remove_quantization_config(model)`.

    Raises ValueError for a model without such layers, and for one that the format cannot express.
    """
    classes = {type(module) for module in model.modules() if isinstance(getattr(module, "quantized", None), str)}
    if not classes:
        raise ValueError("this model has no quantized layers: call quant.swap first")
    quantizer = quantizer_for(model)
    quantizer.refresh(model)
    cast(Any, model).hf_quantizer = quantizer
    return model


def quantizer_for(model: PreTrainedModel) -> PackedQuantizer:
    """The quantizer that saves the quantized layers of `model`; it raises when saving a model that it cannot express."""
    quantizer: PackedQuantizer = NF4Quantizer(PackedNF4Config(), pre_quantized=False)
    if any(isinstance(module, BitLinear | PackedBitLinear) for module in model.modules()):
        quantizer = TernaryQuantizer(PackedTernaryConfig(), pre_quantized=False)
    with torch.device("meta"):
        plain = type(model)(model.config)
    quantizer.transposed = frozenset(path for path, module in plain.named_modules() if isinstance(module, Conv1D))
    return quantizer


@contextmanager
def _tied(model: PreTrainedModel) -> Iterator[None]:
    """Tie shared weights of the meta model inside the block, as after loading; from_pretrained needs them untied until then."""
    before: list[tuple[nn.Module, str, Any]] = []
    for target, source in model.all_tied_weights_keys.items():
        path, _, name = target.rpartition(".")
        module = model.get_submodule(path)
        before.append((module, name, getattr(module, name)))
        setattr(module, name, model.get_parameter(source))
    try:
        yield
    finally:
        for module, name, parameter in before:
            setattr(module, name, parameter)


def _is_ours(conversion: Any) -> bool:
    return isinstance(conversion, WeightConverter) and any(isinstance(op, _Unpack) for op in conversion.operations)


def _require(tensors: Mapping[str, Any], names: Iterable[str]) -> None:
    if missing := [name for name in names if name not in tensors]:
        raise MissingTensors(f"the checkpoint has no {', '.join(missing)} for it")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
