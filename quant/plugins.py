"""PEFT on packed layers: LoRA, rsLoRA and DoRA over packed linears of every scheme.

PEFT learns of the layer through `LoraConfig._register_custom_module`: private, pinned by a test, and not saved with the
adapter, so whoever loads one registers again (`load_peft` does). PEFT itself drops targets without a word; compare with
`assert_wrapped`.

Merging never requantizes: the packed base is put aside and a float `nn.Linear` takes its place, so unmerging gives back
the very same bits. A merged layer multiplies with the input as it is, so on a ternary base, which quantizes it to int8,
merging takes that rounding out.
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

INITS = (True, False, "gaussian", "orthogonal")  # the others read the base weight as if it were floats


class PackedDora(DoraLinearVariant):
    """DoRA (arXiv 2402.09353, section 4): m · (W + ΔW) / ‖W + ΔW‖ by row, the norm held constant (section 4.3).

    PEFT's own variant takes the uint8 codes for the weight, and with dropout keeps W in floats for the backward pass.
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

    Raises ValueError for what would read the packed codes as weights, other initializations and other variants, and for a
    layer with a norm of its own.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, r: int = 0, lora_alpha: int = 1, **kwargs: Any
    ) -> None:
        nn.Module.__init__(self)
        lora.LoraLayer.__init__(self, base_layer, **kwargs)
        self.fan_in_fan_out = False  # a packed layer is (out, in), whatever it was made from
        self.is_target_conv_1d_layer = False
        self._active_adapter = adapter_name
        self._aside: tuple[PackedLinear, ...] = ()  # the packed layer while merged; a tuple hides it from the module tree
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    @property
    def packed(self) -> PackedLinear:
        layer = self._aside[0] if self._aside else self.get_base_layer()
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
            raise ValueError("this layer normalizes its input itself (rms_norm), and an adapter would see it as it was before")
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def _delta(self, adapter: str) -> Tensor:
        """ΔW of `adapter` (out, in), fp32 even under autocast, without a gradient."""
        up, down = cast(Tensor, self.lora_B[adapter].weight), cast(Tensor, self.lora_A[adapter].weight)
        with torch.no_grad(), torch.autocast(up.device.type, enabled=False):
            return up.float() @ down.float() * self.scaling[adapter]

    def dora_scale(self, adapter: str) -> Tensor:
        """m / ‖W + ΔW‖ by row (out,), fp32; differentiable in the magnitude m alone."""
        norm = torch.linalg.norm(self.packed.dequantize(torch.float32) + self._delta(adapter), dim=1)
        return cast(Tensor, self.lora_magnitude_vector[adapter].weight) / norm

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put W + ΔW in floats in the place of the packed layer: summed in fp32, rounded once to its dtype.

        Raises ValueError when the result is not finite, or for a DoRA adapter together with another one.
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
        vars(linear.weight).pop("quantized", None)  # the mark of dequantized codes, which this is no longer
        if not bool(linear.weight.isfinite().all()):
            raise ValueError(f"the merged weight is not finite: adapter {', '.join(names)} seems to be broken")
        self._aside = (packed,)
        self.base_layer = linear.to(packed.dtype)
        self.merged_adapters = names

    def unmerge(self) -> None:
        """Put the packed layer back, bit for bit, in the device and dtype that the merged one has been moved to."""
        if self._aside:
            weight = cast(Tensor, self.base_layer.weight)
            self.base_layer = self._aside[0].to(weight.device, weight.dtype)
        self._aside, self.merged_adapters = (), []


def _refuse_trained(target: nn.Module, adapter_name: str, *, target_name: str = "", **kwargs: Any) -> NoReturn:
    """In the place of PEFT's own layer, which would merge into the master weight behind autograd's back, to be quantized."""
    where = target_name or type(target).__name__
    raise ValueError(f"{where} is still being trained, and adapters go on packed linears: quant.pack(model) first")


def register_peft(config: LoraConfig) -> None:
    """Make PEFT wrap packed linears where `config` targets them; before `get_peft_model` and before every load.

    PEFT then raises ValueError for fake-quantized linears.
    """
    mapping: dict[Any, Any] = {PackedLinear: PackedLora, FakeQuantLinear: _refuse_trained}
    config._register_custom_module(mapping)  # matched by isinstance: it covers every scheme


def load_peft(model: nn.Module, path: str | Path, *, is_trainable: bool = False) -> PeftModel:
    """`PeftModel.from_pretrained` of a LoRA adapter over a swapped `model`: PEFT does not save the registration."""
    config = LoraConfig.from_pretrained(str(path))
    register_peft(config)
    return PeftModel.from_pretrained(model, str(path), config=config, is_trainable=is_trainable)


def linear_targets(model: nn.Module, keep: Sequence[str] = DEFAULT_KEEP) -> list[str]:
    """`target_modules` for "all linears": the dotted paths of every packed layer and of the plain linears.

    Left out are those that `swap` with the same `keep` leaves for a reason: the head, routers, layers whose module is
    never called. Call it before `get_peft_model`; PEFT's own `all-linear` does not find packed layers.
    """
    if trained := [name for name, module in model.named_modules() if isinstance(module, FakeQuantLinear)]:
        raise ValueError(f"{trained[0]} trains a master weight; adapters go on packed linears: quant.pack(model) first")
    left = reasons_to_leave(model, keep)
    packed = [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]
    return sorted({*packed, *(name for name in linear_like(model) if name not in left)})


def assert_wrapped(model: nn.Module, expected: Iterable[str]) -> None:
    """Raise RuntimeError, naming the difference, unless the modules with adapters are exactly `expected` (paths)."""
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    wrapped, asked = {plain_path(name) for name, _ in layers}, {plain_path(path) for path in expected}
    if wrapped != asked:
        missing, surplus = sorted(asked - wrapped), sorted(wrapped - asked)
        raise RuntimeError(
            f"adapters were put on {len(wrapped)} modules, {len(asked)} were asked for; "
            f"without adapter: {', '.join(missing) or 'none'}; not asked for: {', '.join(surplus) or 'none'}"
        )
