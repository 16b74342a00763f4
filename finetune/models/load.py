"""A trained thing, ready to use: run, adapter, checkpoint, model folder, package, .gguf or hub id → (model, tokenizer)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetune.data.samples import set_template
from finetune.errors import UserError
from finetune.files import MARK
from finetune.memory import free_bytes
from finetune.models.build import BuiltModel, build_model, silently
from finetune.models.config import load_config, load_tokenizer, recipe_tokenizer
from finetune.models.device import pick_device
from finetune.models.precision import DTYPES, default_dtype
from finetune.models.prepare import check_adapter, load_adapter
from finetune.models.source import Source, adapter_base, find_model, source_of
from finetune.models.weights import cast, load_weights
from finetune.recipe import Recipe, read_resolved
from finetune.record import Record, read_record
from finetune.screen import Shown
from finetune.train import checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}


@dataclass
class LoadedModel:
    """`what` says what was loaded; `recipe` and `run` (its folder) where it is of a run; `note` is for the user."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    what: str
    recipe: Recipe | None = None
    run: Path | None = None
    note: str | None = None


def load_model(
    name: str, *, dtype: str = "auto", device: str = "auto", merged: bool = True, progress: Shown | None = None
) -> LoadedModel:
    """Load what `name` means. A run gives its merged model if it has one and `merged`, else its adapter or newest checkpoint.

    Raises:
        UserError: there is nothing to load.
    """
    path, on = Path(name), pick_device(device)
    if (path / MARK).is_file():
        return _load_run(_OfRun(path, dtype, on, progress), merged)
    parent = path.resolve().parent
    if path.name == "merged" and path.is_dir() and (parent / MARK).is_file():
        return _load_run(_OfRun(parent, dtype, on, progress), True)
    if (path / "adapter_config.json").is_file():
        if (parent / MARK).is_file():
            return _OfRun(parent, dtype, on, progress).adapter(path)
        return _load_adapter(path, dtype, on, progress)
    if (path / "state.json").is_file() and (parent.parent / MARK).is_file():
        return _OfRun(parent.parent, dtype, on, progress).checkpoint(path)
    return _load_source(find_model(name, where="MODEL"), dtype, on, progress)


class _OfRun:
    """A run's folder, and its models as the run had them: in its dtype, quantized from that, with its template."""

    def __init__(self, path: Path, dtype: str, device: torch.device, progress: Shown | None) -> None:
        self.path, self.asked, self.device, self.progress = path, dtype, device, progress
        self.recipe: Recipe = read_resolved(path / "recipe.yaml")
        self.record: Record = read_record(path)

    def adapter(self, folder: Path) -> LoadedModel:
        check_adapter(folder)
        compute_dtype = None if self.asked == "auto" else DTYPES[self.asked]
        built, tokenizer = self._build(adapter=folder, compute_dtype=compute_dtype)
        return LoadedModel(built.model, tokenizer, str(folder), self.recipe, self.path)

    def checkpoint(self, folder: Path) -> LoadedModel:
        wrong = checkpoint.damage(folder)
        if wrong is not None:
            raise UserError("the checkpoint is damaged", where=str(folder), got=wrong)
        # Gains of sub-norms are the checkpoint's: any ids do to make them.
        built, tokenizer = self._build(calibration=[torch.arange(16)[None]])
        checkpoint.load_weights(folder, built.model)
        model = built.model if self.asked == "auto" else cast(built.model, DTYPES[self.asked])
        return LoadedModel(model.eval(), tokenizer, str(folder), self.recipe, self.path)

    def _build(self, **options: Any) -> tuple[BuiltModel, PreTrainedTokenizerBase]:
        recipe, source = self.recipe, source_of(self.recipe.model)
        told = self.record.model
        if told is None or told.dtype not in NAMES:
            raise UserError(
                "the run's record does not say how it loaded its model",
                where=str(self.path / MARK),
                got=f"model: {told.dtype if told is not None else None}",
                hint=f"finetune resume {self.path}",
            )
        tokenizer = recipe_tokenizer(recipe, source, self.path)
        built = build_model(
            recipe,
            source,
            load_config(source, tokenizer),
            device=self.device,
            dtype=NAMES[told.dtype],
            eos_token_ids=told.eos_token_ids,
            training=False,
            phase=self._phase,
            **options,
        )
        if not recipe.streams_text:
            set_template(tokenizer, recipe.data.template)
        return built, tokenizer

    @contextmanager
    def _phase(self, name: str) -> Iterator[Shown]:
        with silently(name) as quiet:
            yield self.progress if self.progress is not None and name == "weights" else quiet


def _load_run(run: _OfRun, merged: bool) -> LoadedModel:
    path, device, note = run.path, run.device, None
    folder, adapter = path / "merged", path / "adapter"
    if merged and folder.is_dir():
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        if device.type == "cpu" or not adapter.is_dir() or size < 0.9 * free_bytes(device):
            chats = not run.recipe.streams_text
            loaded = _load_source(find_model(str(folder)), run.asked, device, run.progress, chats=chats)
            loaded.recipe, loaded.run = run.recipe, path
            return loaded
        note = "the merged model is larger than the card's free memory: the adapter on its quantized base it is"
    if adapter.is_dir():
        loaded = run.adapter(adapter)
        loaded.note = note
        return loaded
    newest, damaged = checkpoint.newest(path / "checkpoints")
    if newest is None and damaged:
        hint = "bring one back from a copy, or train again"
        raise UserError("every checkpoint of this run is damaged", where=str(path), got="; ".join(damaged), hint=hint)
    if newest is None:
        raise UserError("this run has made nothing to load yet", where=str(path), hint=f"finetune resume {path}")
    loaded = run.checkpoint(newest)
    if damaged:
        loaded.note = f"damaged checkpoint {'; '.join(damaged)}; this is {newest.name}"
    return loaded


def _load_source(source: Source, dtype: str, device: torch.device, progress: Shown | None, *, chats: bool = True) -> LoadedModel:
    """Asked for auto, a model that was stored in fp32 stays so; another gets what the device is good at.

    chats: it gets a chat template if it has none; a model of plain text goes on with what it is given.
    """
    config = load_config(source)
    stored = torch.float32 if getattr(config, "dtype", None) == torch.float32 else default_dtype(device.type)
    model: Any = load_weights(source, config, dtype=DTYPES.get(dtype, stored), attention="auto", progress=progress)
    tokenizer = load_tokenizer(source)
    note = None
    if chats and not tokenizer.chat_template:
        note = f"{source.name} has no chat template of its own: {set_template(tokenizer, 'auto')}"
    return LoadedModel(model.to(device), tokenizer, source.name, note=note)


def _load_adapter(path: Path, dtype: str, device: torch.device, progress: Shown | None) -> LoadedModel:
    """An adapter outside of a run, on the base that it names."""
    check_adapter(path)
    base = _load_source(find_model(adapter_base(path), where=str(path / "adapter_config.json")), dtype, device, progress)
    tokenizer = base.tokenizer
    if (path / "tokenizer_config.json").is_file():
        tokenizer = load_tokenizer(Source(str(path), str(path)))
    note = "this adapter lies outside its run: its base is opened as it is stored, whatever it was quantized to in training"
    return LoadedModel(load_adapter(base.model, path).to(device).eval(), tokenizer, str(path), note=note)
