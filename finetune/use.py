"""A trained thing, ready to use: run, adapter, checkpoint, model folder, package, .gguf or hub id → (model, tokenizer)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetune import model as models
from finetune.data.samples import set_template
from finetune.errors import Mistake
from finetune.files import MARK, TOKENIZER, read_run
from finetune.models.precision import DTYPES, default_dtype
from finetune.recipe import Recipe, read_recipe
from finetune.screen import Shown
from finetune.train import checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from finetune.data.stream import Source


@dataclass
class Opened:
    """`what` says what was loaded; `recipe` and `run` (its folder) where it is of a run; `note` is for the user."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    what: str
    recipe: Recipe | None = None
    run: Path | None = None
    note: str | None = None


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


def tokenizer_of(
    recipe: Recipe, source: models.Source, run: Path, stream: Source | None = None, progress: Shown | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a recipe: the model's own, or for a model from scratch the one that it names, or one trained on its text.

    run: the run's folder, which has the one that it trained. stream: the recipe's text, where one may have to be trained.

    Raises:
        Mistake: it is not there, or the text does not give such a vocabulary.
    """
    from finetune.data.tokenizer import MAX_BYTES, tokenizer_texts, train_tokenizer

    if recipe.model.config is None:
        return models.load_tokenizer(source)
    if recipe.tokenizer.name is not None:
        return models.load_tokenizer(models.find_tokenizer(recipe.tokenizer.name))
    own = run / TOKENIZER
    if (own / "tokenizer.json").is_file():
        return models.load_tokenizer(models.Source(str(own), str(own)))
    if stream is None:
        raise Mistake("this run's tokenizer is gone", where=str(own), found="no tokenizer.json")

    def read(done: int) -> None:
        if progress is not None:
            progress(done, MAX_BYTES, "bytes read at most, to learn tokens")

    return train_tokenizer(tokenizer_texts(stream), recipe.tokenizer.train, progress=read)


def open_model(
    name: str, *, dtype: str = "auto", device: str = "auto", merged: bool = True, progress: Shown | None = None
) -> Opened:
    """Load what `name` means. A run gives its merged model if it has one and `merged`, else its adapter or newest checkpoint.

    Raises:
        Mistake: there is nothing to load.
    """
    path, on = Path(name), pick_device(device)
    if (path / MARK).is_file():
        return _open_run(path, dtype, on, merged, progress)
    parent = path.resolve().parent
    if path.name == "merged" and path.is_dir() and (parent / MARK).is_file():
        return _open_run(parent, dtype, on, True, progress)
    if (path / "adapter_config.json").is_file():
        return _open_adapter(path, _Run(parent, progress) if (parent / MARK).is_file() else None, dtype, on, progress)
    if (path / "state.json").is_file() and (parent.parent / MARK).is_file():
        return _open_checkpoint(path, _Run(parent.parent, progress), dtype, on)
    return _open_source(models.find(name, where="MODEL"), dtype, on, progress)


class _Run:
    """A run's folder, and the base model as the run had it: in its dtype, quantized from that, with its template."""

    def __init__(self, path: Path, progress: Shown | None) -> None:
        self.path, self.recipe, self.record = path, read_recipe(path / "recipe.yaml"), read_run(path)
        self.progress = progress

    def base(self) -> tuple[Any, PreTrainedTokenizerBase, models.Source]:
        """(model on the CPU, packed if it is not a GGUF; tokenizer; source)."""
        recipe = self.recipe
        source = models.source_of(recipe.model)
        dtype, stops = self._told()
        tokenizer = tokenizer_of(recipe, source, self.path)
        model = models.load_weights(
            source,
            models.load_config(source, tokenizer),
            dtype=dtype,
            attention=recipe.model.attention,
            quant=recipe.quant,
            frozen=recipe.adapter.kind == "lora",
            seed=recipe.run.seed,
            progress=self.progress,
        )
        if recipe.kind == "sft":
            set_template(tokenizer, recipe.data.template)
        models.set_stops(model, stops)
        return model, tokenizer, source

    def _told(self) -> tuple[torch.dtype, list[int]]:
        """The base's dtype and the tokens at which the model stops, which the run has written down when it had loaded it."""
        said = self.record.get("model")
        known = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
        try:
            return known[said["dtype"]], [int(token) for token in said["stop_ids"]]  # type: ignore[index]
        except (KeyError, TypeError, ValueError):
            raise Mistake(
                "the run's record does not say how it loaded its model",
                where=str(self.path / MARK),
                found=f"model: {str(said)[:80]}",
                do=f"finetune resume {self.path}",
            ) from None


def _open_run(path: Path, dtype: str, device: torch.device, merged: bool, progress: Shown | None) -> Opened:
    run, folder = _Run(path, progress), path / "merged"
    note = None
    if merged and folder.is_dir():
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        if device.type == "cpu" or not (path / "adapter").is_dir() or size < 0.9 * torch.cuda.mem_get_info(device)[0]:
            opened = _open_source(models.find(str(folder)), dtype, device, progress, chats=run.recipe.kind == "sft")
            opened.recipe, opened.run = run.recipe, path
            return opened
        note = "the merged model is larger than the card's free memory: the adapter on its quantized base it is"
    if (path / "adapter").is_dir():
        opened = _open_adapter(path / "adapter", run, dtype, device, progress)
        opened.note = note
        return opened
    newest, damaged = checkpoint.newest(path / "checkpoints")
    if newest is None and damaged:
        do = "bring one back from a copy, or train again"
        raise Mistake("every checkpoint of this run is damaged", where=str(path), found="; ".join(damaged), do=do)
    if newest is None:
        raise Mistake("this run has made nothing to load yet", where=str(path), do=f"finetune resume {path}")
    opened = _open_checkpoint(newest, run, dtype, device)
    if damaged:
        opened.note = f"damaged checkpoint {'; '.join(damaged)}; this is {newest.name}"
    return opened


def _open_source(
    source: models.Source, dtype: str, device: torch.device, progress: Shown | None, *, chats: bool = True
) -> Opened:
    """Asked for auto, a model that was stored in fp32 stays so; another gets what the device is good at.

    chats: it gets a chat template if it has none; a model of plain text goes on with what it is given.
    """
    config = models.load_config(source)
    stored = torch.float32 if getattr(config, "dtype", None) == torch.float32 else default_dtype(device.type)
    model: Any = models.load_weights(source, config, dtype=DTYPES.get(dtype, stored), attention="auto", progress=progress)
    tokenizer = models.load_tokenizer(source)
    note = None
    if chats and not tokenizer.chat_template:
        note = f"{source.name} has no chat template of its own: {set_template(tokenizer, 'auto')}"
    return Opened(model.to(device), tokenizer, source.name, note=note)


def _in(dtype: str, model: Any) -> Any:
    """`model` computing in `dtype`; auto leaves it. Codes and scales of packed linears stay as they are."""
    return model if dtype == "auto" else models.cast(model, DTYPES[dtype])


def _open_adapter(path: Path, run: _Run | None, dtype: str, device: torch.device, progress: Shown | None) -> Opened:
    from peft import PeftConfig, PeftModel

    from quant import register_peft

    weights = path / "adapter_model.safetensors"
    if not weights.is_file():  # peft would take adapter_model.bin, a pickle
        found = ", ".join(sorted(file.name for file in path.glob("adapter_model*"))) or "no weights"
        do = "save it as safetensors, which is what PEFT does by itself"
        raise Mistake("an adapter is read from adapter_model.safetensors alone", where=str(path), found=found, do=do)
    models.shapes_in(weights, str(path))
    if run is not None:
        model, tokenizer, _ = run.base()
        models.packed(model, run.recipe.quant)
        _in(dtype, model)
    else:
        base = models.find(models.adapter_base(path), where=str(path / "adapter_config.json"))
        opened = _open_source(base, dtype, device, progress)
        model, tokenizer = opened.model, opened.tokenizer
        if (path / "tokenizer_config.json").is_file():
            tokenizer = models.load_tokenizer(models.Source(str(path), str(path)))
    try:
        config = PeftConfig.from_pretrained(str(path))
    except (KeyError, TypeError, ValueError, OSError) as error:
        found = f"{type(error).__name__}: {error}"
        do = "fetch the adapter again, or update peft"
        raise Mistake(
            "the adapter's config cannot be read", where=str(path / "adapter_config.json"), found=found, do=do
        ) from None
    register_peft(config)
    try:
        wrapped = PeftModel.from_pretrained(model, str(path), config=config)
    except (RuntimeError, ValueError, OSError) as error:
        raise Mistake("the adapter does not fit its base model", where=str(path), found=str(error).splitlines()[0]) from None
    wrapped.to(device).eval()
    if run is None:
        note = "this adapter lies outside its run: its base is opened as it is stored, whatever it was quantized to in training"
        return Opened(wrapped, tokenizer, str(path), note=note)
    return Opened(wrapped, tokenizer, str(path), run.recipe, run.path)


def _open_checkpoint(path: Path, run: _Run, dtype: str, device: torch.device) -> Opened:
    wrong = checkpoint.damage(path)
    if wrong is not None:
        raise Mistake("the checkpoint is damaged", where=str(path), found=wrong)
    model, tokenizer, source = run.base()
    recipe = run.recipe
    if recipe.quant.sub_norms:
        from finetune.convert import insert_sub_norms

        model = insert_sub_norms(model, [torch.arange(16)[None]])  # the gains are the checkpoint's
    lora = recipe.adapter.kind == "lora"
    targets = models.adapter_targets(recipe.adapter, models.skeleton(source, model.config)) if lora else []
    prepared = models.prepare(model, quant=recipe.quant, adapter=recipe.adapter, targets=targets, source=source, device=device)
    checkpoint.load_weights(path, prepared.model)
    return Opened(_in(dtype, prepared.model).eval(), tokenizer, str(path), recipe, run.path)
