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
    parent = path.resolve().parent
    if (path / "adapter_config.json").is_file():
        return _open_adapter(path, _Run(parent) if (parent / MARK).is_file() else None, dtype, on)
    if (path / "state.json").is_file() and (parent.parent / MARK).is_file():
        return _open_checkpoint(path, _Run(parent.parent), dtype, on)
    return _open_source(models.find(name, where="MODEL"), dtype, on)


class _Run:
    """A run's folder, and the base model as the run had it: in its dtype, quantized from that, with its template."""

    def __init__(self, path: Path) -> None:
        self.path, self.recipe, self.record = path, read_recipe(path / "recipe.yaml"), read_run(path)

    def base(self) -> tuple[Any, PreTrainedTokenizerBase, models.Source]:
        """(float model on the CPU, tokenizer, source)."""
        recipe = self.recipe
        source = models.find(recipe.model.name, revision=recipe.model.revision, trust_remote_code=recipe.model.trust_remote_code)
        dtype = getattr(torch, self.record["model"]["dtype"])
        model = models.load_weights(source, models.load_config(source), dtype=dtype, attention=recipe.model.attention)
        tokenizer = models.load_tokenizer(source)
        set_template(tokenizer, recipe.data.template)
        models.set_stops(model, self.record["model"]["stop_ids"])
        return model, tokenizer, source


def _open_run(path: Path, dtype: str, device: torch.device, merged: bool) -> Opened:
    run = _Run(path)
    if merged and (path / "merged").is_dir():
        opened = _open_source(models.find(str(path / "merged")), dtype, device)
        opened.recipe = run.recipe
        return opened
    if (path / "adapter").is_dir():
        return _open_adapter(path / "adapter", run, dtype, device)
    newest, _ = checkpoint.newest(path / "checkpoints")
    if newest is None:
        raise Mistake("this run has made nothing to load yet", where=str(path), do=f"finetune resume {path}")
    return _open_checkpoint(newest, run, dtype, device)


def _open_source(source: models.Source, dtype: str, device: torch.device) -> Opened:
    """Asked for auto, a model that was stored in fp32 stays so; another gets what the device is good at."""
    config = models.load_config(source)
    stored = torch.float32 if getattr(config, "dtype", None) == torch.float32 else models.default_dtype(device.type)
    model: Any = models.load_weights(source, config, dtype=models.DTYPES.get(dtype, stored), attention="auto")
    tokenizer = models.load_tokenizer(source)
    if not tokenizer.chat_template:
        set_template(tokenizer, "auto")
    return Opened(model.to(device), tokenizer, source.name)


def _in(dtype: str, model: Any) -> Any:
    """`model` computing in `dtype`; auto leaves it. Codes and scales of packed linears stay as they are."""
    return model if dtype == "auto" else model.to(models.DTYPES[dtype])


def _open_adapter(path: Path, run: _Run | None, dtype: str, device: torch.device) -> Opened:
    from peft import PeftConfig, PeftModel

    from quant import register_peft

    if run is not None:
        model, tokenizer, _ = run.base()
        if run.recipe.quant.scheme != "none":
            models.swap_linears(model, run.recipe.quant, device)
        _in(dtype, model)
    else:
        opened = _open_source(models.find(models.adapter_base(path), where=str(path / "adapter_config.json")), dtype, device)
        model, tokenizer = opened.model, opened.tokenizer
    config = PeftConfig.from_pretrained(str(path))
    register_peft(config)
    try:
        wrapped = PeftModel.from_pretrained(model, str(path), config=config)
    except (RuntimeError, ValueError, OSError) as error:
        raise Mistake("the adapter does not fit its base model", where=str(path), found=str(error).splitlines()[0]) from None
    return Opened(wrapped.to(device).eval(), tokenizer, str(path), run.recipe if run is not None else None)


def _open_checkpoint(path: Path, run: _Run, dtype: str, device: torch.device) -> Opened:
    wrong = checkpoint.damage(path)
    if wrong is not None:
        raise Mistake("the checkpoint is damaged", where=str(path), found=wrong)
    model, tokenizer, source = run.base()
    recipe = run.recipe
    lora = recipe.adapter.kind == "lora"
    targets = models.adapter_targets(recipe.adapter, models.skeleton(source, model.config)) if lora else []
    prepared = models.prepare(model, quant=recipe.quant, adapter=recipe.adapter, targets=targets, source=source, device=device)
    checkpoint.load_weights(path, prepared.model)
    return Opened(_in(dtype, prepared.model).eval(), tokenizer, str(path), recipe)
