"""Loading a model's weights as floats or packed, and casting them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetune.errors import UserError
from finetune.models.config import as_packed
from finetune.models.gguf import forget_parsed, parsed_once
from finetune.models.source import AGAIN, FAULTS, Source, check_files, shapes_in, unavailable
from finetune.recipe import Quant
from finetune.screen import Shown, relayed_bars
from quant.linear import PackedLinear
from quant.swap import DEFAULT_KEEP

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


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
    """Load the model on the CPU, in `dtype`, in eval mode.

    Linears are packed as `quant` says while they are loaded, so that a 7B model is never in memory in floats (a GGUF is packed
    afterwards, by `build_model`). A checkpoint that is already packed (bitsandbytes, bitnet) is loaded as it is.

    frozen: adapters are trained on the base, or nothing is. seed: of a model from scratch. put: moves each packed tensor
    elsewhere at once. progress: of download and loading.

    Raises:
        UserError: the weights are missing, incomplete or damaged, cannot be packed, or are packed in another format than `quant`.
    """
    from transformers import AutoModelForCausalLM

    from quant.pretrained import MissingTensors, PackedNF4Config, PackingError

    check_files(source, source.folder)
    chosen = {} if attention == "auto" else {"attn_implementation": attention}
    if source.init_config is not None:
        return _random_weights(config, dtype=dtype, seed=seed, **chosen)
    options = dict(source.options) | chosen
    if source.gguf is not None:
        from transformers import GgufConfig

        options["quantization_config"] = GgufConfig(dequantize=True)  # otherwise the weights stay packed and cannot be saved
    else:
        options |= {"config": config, "use_safetensors": True}
        if getattr(config, "quantization_config", None):
            options["config"] = as_packed(source, config, quant, frozen=frozen)
        elif quant is not None and quant.scheme == "nf4":
            options["quantization_config"] = PackedNF4Config(keep=(*DEFAULT_KEEP, *quant.keep), double=quant.double, put=put)
    try:
        with relayed_bars(progress) as tqdm_class, parsed_once(source):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source.folder, dtype=dtype, output_loading_info=True, tqdm_class=tqdm_class, **options
            )
    except MissingTensors as error:
        raise _incomplete(source, str(error)) from None
    except PackingError as error:
        raise UserError("the base cannot be quantized", where="quant", got=str(error)) from None
    except FAULTS:
        raise
    except Exception as error:  # transformers raises many exception types for an unreadable model
        raise _unreadable(source, config, attention, error) from None
    finally:
        forget_parsed()
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise _incomplete(source, f"{len(missing)}, such as {missing[0]}")
    model.eval()
    return model


def _random_weights(config: PretrainedConfig, *, dtype: torch.dtype, seed: int, **chosen: str) -> PreTrainedModel:
    """A model from scratch, checked by one forward pass."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **chosen).eval()
        with torch.no_grad():
            model(input_ids=torch.zeros((1, 2), dtype=torch.int64), use_cache=False)
        return model
    except RuntimeError as error:
        got = str(error).strip().splitlines()[0]
        raise UserError("a model with this config fails in its forward pass", where="model.config", got=got) from None
    except (ImportError, ValueError) as error:
        got = str(error).strip().splitlines()[0]
        raise UserError("this model does not support this attention implementation", where="model.attention", got=got) from None


def _unreadable(source: Source, config: PretrainedConfig, attention: str, error: Exception) -> UserError:
    """The UserError for an error of from_pretrained."""
    if isinstance(error, ImportError):
        got = str(error).strip().splitlines()[0]
        return UserError("a package for this model is missing", where="model.attention", got=got)
    if "attn_implementation" in str(error):
        return UserError(
            "this model does not support this attention implementation",
            where="model.attention",
            got=attention,
            hint="model.attention=auto",
        )
    if "ignore_mismatched_sizes" in str(error) and (misfit := _misfit(source, config)) is not None:
        return UserError("the weights do not match config.json", where=source.folder, got=misfit, hint=AGAIN)
    return unavailable(source, error)


def _misfit(source: Source, config: PretrainedConfig) -> str | None:
    """The first tensor in a local model's files whose shape differs from its config's, in words."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        wanted = AutoModelForCausalLM.from_config(config, trust_remote_code=source.trust_remote_code).state_dict()
    for path in sorted(Path(source.folder).glob("*.safetensors")):
        for name, shape in shapes_in(path).items():
            if name in wanted and shape != tuple(wanted[name].shape):
                return f"{name} in {path.name} is {list(shape)}, but config.json needs {list(wanted[name].shape)}"
    return None


def _incomplete(source: Source, missing: str) -> UserError:
    return UserError(
        "weights are missing, and would stay random", where=source.folder, got=missing, hint="download or save the model again"
    )


def cast(model: Any, dtype: torch.dtype) -> Any:
    """Cast the float parameters of `model` to `dtype`, but not its buffers: rotary frequencies in bf16 would shift positions."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.dtype = dtype
    return model


def parameters_of(model: Any) -> int:
    """Number of parameters, including those in packed linears."""
    packed = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, PackedLinear))
    return packed + sum(p.numel() for p in model.parameters() if p.is_floating_point())
