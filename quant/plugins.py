"""PEFT on packed layers: LoRA, rsLoRA and DoRA over packed linears of every scheme.

The layer is registered with PEFT through `LoraConfig._register_custom_module`: private, pinned by a test, and not saved with
the adapter, so it must be registered again for loading (`load_peft` does). PEFT silently drops targets that do not match;
check with `assert_wrapped`.

Merging never requantizes: the packed base is kept and a float `nn.Linear` replaces it, so unmerging restores
the same bits. A merged layer does not quantize its input, so on a ternary base, which does,
merging removes that rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners import lora
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from quant.linear import FakeQuantLinear, PackedLinear
from quant.swap import DEFAULT_KEEP, linear_like, plain_path, reasons_to_leave

INITS = (True, False, "gaussian", "orthogonal")  # the others read the base weight as floats


class PackedDora(DoraLinearVariant):
    """DoRA (arXiv 2402.09353, section 4): m · (W + ΔW) / ‖W + ΔW‖ by row, the norm held constant (section 4.3).

    PEFT's own variant would read the uint8 codes as the weight, and with dropout save W in floats for the backward pass.
    """

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        dora = DoraLinearLayer(fan_in_fan_out=False)
        dora.update_layer(
            base_layer=module.packed.to_linear(torch.float32),
            lora_A=module.lora_A[adapter_name].weight,
            lora_B=module.lora_B[adapter_name].weight,
            scaling=module.scaling[adapter_name],
        )
        module.lora_magnitude_vector[adapter_name] = dora

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """x (…, in) and the layer's result so far (…, out) → result (…, out)."""
        dropout = module.lora_dropout[active_adapter]
        if module.training and not isinstance(dropout, nn.Identity):
            x = dropout(x)
            base = module.packed(x)
        else:
            base = result
        if module.packed.bias is not None:
            base = base - module.packed.bias
        delta = module.lora_B[active_adapter](module.lora_A[active_adapter](x)) * module.scaling[active_adapter]
        scale = module.dora_scale(active_adapter).to(x.dtype)
        return result + (scale - 1) * base + scale * delta


class PackedLora(lora.Linear):
    """PEFT's LoRA layer over a packed linear. While merged, `base_layer` is a float nn.Linear in the packed layer's dtype.

    Raises ValueError for initializations and variants that would read the packed codes as weights, and for a
    layer with its own norm.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, r: int = 0, lora_alpha: int = 1, **kwargs: Any
    ) -> None:
        nn.Module.__init__(self)
        lora.LoraLayer.__init__(self, base_layer, **kwargs)
        self.fan_in_fan_out = False  # a packed layer is always (out, in)
        self.is_target_conv_1d_layer = False
        self._active_adapter = adapter_name
        self._unmerged: tuple[PackedLinear, ...] = ()  # the packed layer while merged; a tuple hides it from the module tree
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    @property
    def packed(self) -> PackedLinear:
        layer = self._unmerged[0] if self._unmerged else self.get_base_layer()
        assert isinstance(layer, PackedLinear)
        return layer

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, PackedLinear)
        return module.in_features, module.out_features

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        return {(): None, ("use_dora",): PackedDora}

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        if config.init_lora_weights not in INITS:
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r} needs a float base weight; on a packed layer use one of "
                f"{', '.join(map(repr, INITS))}"
            )
        if self.packed.rms_norm is not None:
            raise ValueError("this layer normalizes its input (rms_norm), and an adapter would get the input before the norm")
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def _delta(self, adapter: str) -> Tensor:
        """ΔW of `adapter` (out, in), fp32 even under autocast, without a gradient."""
        up, down = cast(Tensor, self.lora_B[adapter].weight), cast(Tensor, self.lora_A[adapter].weight)
        with torch.no_grad(), torch.autocast(up.device.type, enabled=False):
            return up.float() @ down.float() * self.scaling[adapter]

    def dora_scale(self, adapter: str) -> Tensor:
        """m / ‖W + ΔW‖ by row (out,), fp32; differentiable only in the magnitude m."""
        norm = torch.linalg.norm(self.packed.dequantize(torch.float32) + self._delta(adapter), dim=1)
        return cast(Tensor, self.lora_magnitude_vector[adapter].weight) / norm

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Replace the packed layer by W + ΔW in floats: summed in fp32, rounded once to its dtype.

        Raises ValueError if the result is not finite, or for a DoRA adapter together with another one.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.lora_A]
        if not names:
            return
        packed = self.packed
        linear = packed.to_linear(torch.float32)
        names = [*self.merged_adapters, *names]  # always from the packed weight, so that nothing is rounded twice
        if len(names) > 1 and any(name in self.lora_variant for name in names):
            raise ValueError(f"cannot merge a DoRA adapter together with another one: {', '.join(names)}")
        for name in names:
            scale = self.dora_scale(name).detach()[:, None] if name in self.lora_variant else None
            linear.weight += self._delta(name)
            if scale is not None:
                linear.weight *= scale
            if self.lora_bias[name]:
                addition = cast(Tensor, self.lora_B[name].bias).detach().float() * self.scaling[name]
                linear.bias = nn.Parameter(addition if linear.bias is None else linear.bias + addition, False)
        vars(linear.weight).pop("quantized", None)  # no longer dequantized codes
        if not bool(linear.weight.isfinite().all()):
            raise ValueError(f"the merged weight is not finite: is adapter {', '.join(names)} broken?")
        self._unmerged = (packed,)
        self.base_layer = linear.to(packed.dtype)
        self.merged_adapters = names

    def unmerge(self) -> None:
        """Restore the packed layer, bit for bit, on the device and in the dtype of the merged one."""
        if self._unmerged:
            weight = cast(Tensor, self.base_layer.weight)
            self.base_layer = self._unmerged[0].to(weight.device, weight.dtype)
        self._unmerged, self.merged_adapters = (), []


def _refuse_trained(target: nn.Module, adapter_name: str, *, target_name: str = "", **kwargs: Any) -> NoReturn:
    """Raise instead of creating PEFT's own layer, which would merge into a master weight that is then quantized."""
    where = target_name or type(target).__name__
    raise ValueError(f"{where} has a master weight, and adapters need packed linears: call quant.pack(model) first")


def register_peft(config: LoraConfig) -> None:
    """Make PEFT wrap packed linears that `config` targets; call it before `get_peft_model` and before every load.

    PEFT then raises ValueError for fake-quantized linears.
    """
    mapping: dict[Any, Any] = {PackedLinear: PackedLora, FakeQuantLinear: _refuse_trained}
    config._register_custom_module(mapping)  # matched by isinstance: it covers every scheme


def load_peft(model: nn.Module, path: str | Path, *, is_trainable: bool = False) -> PeftModel:
    """`PeftModel.from_pretrained` for a LoRA adapter over a swapped `model`, with `register_peft`, which PEFT does not save."""
    config = LoraConfig.from_pretrained(str(path))
    register_peft(config)
    return PeftModel.from_pretrained(model, str(path), config=config, is_trainable=is_trainable)


def linear_targets(model: nn.Module, keep: Sequence[str] = DEFAULT_KEEP) -> list[str]:
    """`target_modules` for "all linears": the dotted paths of every packed layer and of the plain linears.

    Without those that `swap` with the same `keep` skips: the head, routers, layers whose module is
    never called. Call it before `get_peft_model`; PEFT's own `all-linear` does not find packed layers.
    """
    if trained := [name for name, module in model.named_modules() if isinstance(module, FakeQuantLinear)]:
        raise ValueError(f"{trained[0]} has a master weight, and adapters need packed linears: call quant.pack(model) first")
    left = reasons_to_leave(model, keep)
    packed = [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]
    return sorted({*packed, *(name for name in linear_like(model) if name not in left)})


def assert_wrapped(model: nn.Module, expected: Iterable[str]) -> None:
    """Raise RuntimeError, naming the difference, unless the modules with adapters are exactly `expected` (paths)."""
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    wrapped, expected_paths = {plain_path(name) for name, _ in layers}, {plain_path(path) for path in expected}
    if wrapped != expected_paths:
        missing, surplus = sorted(expected_paths - wrapped), sorted(wrapped - expected_paths)
        raise RuntimeError(
            f"adapters are on {len(wrapped)} modules, expected {len(expected_paths)}; "
            f"without adapter: {', '.join(missing) or 'none'}; unexpected: {', '.join(surplus) or 'none'}"
        )
