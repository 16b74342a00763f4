"""A trained thing, ready to use: run, adapter, checkpoint, model folder, package, .gguf or hub id → (model, tokenizer)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetune import model as models
from finetune.data.samples import set_template
from finetune.errors import Mistake
from finetune.files import MARK, read_run
from finetune.recipe import Recipe, read_recipe
from finetune.train import checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Opened:
    """`what` says in words what was loaded; `recipe` is the run's, where there is one."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    what: str
    recipe: Recipe | None = None


def pick_device(asked: str) -> torch.device:
    """auto, cpu or cuda as a device.

    Raises:
        Mistake: cuda is asked for and torch sees none.
    """
    if asked == "cuda" and not torch.cuda.is_available():
        raise Mistake(
            "there is no CUDA device",
            where="run.device",
            found=f"torch {torch.__version__} sees none",
            do="run.device=auto; or update the driver (CUDA 13.0 needs 580 or newer), see nvidia-smi",
        )
    return torch.device("cuda" if asked == "cuda" or (asked == "auto" and torch.cuda.is_available()) else "cpu")


def open_model(name: str, *, dtype: str = "auto", device: str = "auto", merged: bool = True) -> Opened:
    """Load what `name` means. A run gives its merged model if it has one and `merged`, else its adapter or newest checkpoint.

    Raises:
        Mistake: there is nothing to load.
    """
    path, on = Path(name), pick_device(device)
    if (path / MARK).is_file():
        return _open_run(path, dtype, on, merged)
    if (path / "adapter_config.json").is_file():
        run = path.resolve().parent
        if (run / MARK).is_file():
            return _open_adapter(path, read_recipe(run / "recipe.yaml"), dtype, on)
        return _open_adapter(path, None, dtype, on)
    if (path / "state.json").is_file() and (path.resolve().parent.parent / MARK).is_file():
        return _open_checkpoint(path, read_recipe(path.resolve().parent.parent / "recipe.yaml"), dtype, on)
    return _open_source(models.find(name, where="MODEL"), dtype, on)


def _open_run(path: Path, dtype: str, device: torch.device, merged: bool) -> Opened:
    recipe = read_recipe(path / "recipe.yaml")
    if merged and (path / "merged").is_dir():
        opened = _open_source(models.find(str(path / "merged")), dtype, device)
        opened.recipe = recipe
        return opened
    if (path / "adapter").is_dir():
        return _open_adapter(path / "adapter", recipe, dtype, device)
    newest, _ = checkpoint.newest(path / "checkpoints")
    if newest is None:
        raise Mistake("this run has made nothing to load yet", where=str(path), do=f"finetune resume {path}")
    return _open_checkpoint(newest, recipe, dtype, device)


def _load(source: models.Source, asked: str, device: torch.device) -> tuple[Any, PreTrainedTokenizerBase]:
    """Model and tokenizer. Asked for auto, a model that was stored in fp32 stays so; another gets what the device is good at."""
    config = models.load_config(source)
    stored = getattr(config, "dtype", None)
    dtype = models.DTYPES.get(asked) or (torch.float32 if stored == torch.float32 else models.default_dtype(device.type))
    return models.load_weights(source, config, dtype=dtype, attention="auto"), models.load_tokenizer(source)


def _open_source(source: models.Source, dtype: str, device: torch.device) -> Opened:
    model, tokenizer = _load(source, dtype, device)
    if not tokenizer.chat_template:
        set_template(tokenizer, "auto")
    return Opened(model.to(device), tokenizer, source.name)


def base_of(recipe: Recipe, device: torch.device, dtype: str) -> tuple[Any, PreTrainedTokenizerBase, models.Source]:
    """The model and tokenizer that a run began with, float."""
    source = models.find(recipe.model.name, revision=recipe.model.revision, trust_remote_code=recipe.model.trust_remote_code)
    config = models.load_config(source)
    wanted = models.DTYPES.get(dtype) or models.dtype_of(recipe.model, device.type)
    model = models.load_weights(source, config, dtype=wanted, attention=recipe.model.attention)
    tokenizer = models.load_tokenizer(source)
    set_template(tokenizer, recipe.data.template)
    return model, tokenizer, source


def _open_adapter(path: Path, recipe: Recipe | None, dtype: str, device: torch.device) -> Opened:
    from peft import PeftConfig, PeftModel

    from quant import register_peft

    if recipe is not None:
        model, tokenizer, _ = base_of(recipe, device, dtype)
        if recipe.quant.scheme != "none":
            models.swap_linears(model, recipe.quant, device)
    else:
        base = models.find(models.adapter_base(path), where=str(path / "adapter_config.json"))
        opened = _open_source(base, dtype, device)
        model, tokenizer = opened.model, opened.tokenizer
    if recipe is not None:
        _stop_as_trained(model, path.resolve().parent)
    config = PeftConfig.from_pretrained(str(path))
    register_peft(config)
    try:
        wrapped = PeftModel.from_pretrained(model, str(path), config=config)
    except (RuntimeError, ValueError, OSError) as error:
        raise Mistake("the adapter does not fit its base model", where=str(path), found=str(error).splitlines()[0]) from None
    return Opened(wrapped.to(device).eval(), tokenizer, str(path), recipe)


def _open_checkpoint(path: Path, recipe: Recipe, dtype: str, device: torch.device) -> Opened:
    wrong = checkpoint.damage(path)
    if wrong is not None:
        raise Mistake("the checkpoint is damaged", where=str(path), found=wrong)
    model, tokenizer, source = base_of(recipe, device, dtype)
    targets = (
        models.adapter_targets(recipe.adapter, models.skeleton(source, model.config)) if recipe.adapter.kind == "lora" else []
    )
    prepared = models.prepare(model, quant=recipe.quant, adapter=recipe.adapter, targets=targets, source=source, device=device)
    checkpoint.load_weights(path, prepared.model)
    _stop_as_trained(prepared.model, path.resolve().parent.parent)
    return Opened(prepared.model.eval(), tokenizer, str(path), recipe)


def _stop_as_trained(model: Any, run: Path) -> None:
    models.set_stops(model, read_run(run).get("model", {}).get("stop_ids", []))
