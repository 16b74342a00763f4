"""Loading a model for inference: run, adapter, checkpoint, model folder, package, .gguf or hub id → (model, tokenizer)."""

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
    """A loaded model. what: its name; recipe, run: recipe and folder of its run, if it has one; note: for the user."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    what: str
    recipe: Recipe | None = None
    run: Path | None = None
    note: str | None = None


def load_model(
    name: str, *, dtype: str = "auto", device: str = "auto", merged: bool = True, progress: Shown | None = None
) -> LoadedModel:
    """Load a model by name. Of a run the merged model (if `merged` and it exists), else the adapter or the newest checkpoint.

    Raises:
        UserError: nothing to load there.
    """
    path, target = Path(name), pick_device(device)
    if (path / MARK).is_file():
        return _load_run(_RunModels(path, dtype, target, progress), merged)
    parent = path.resolve().parent
    if path.name == "merged" and path.is_dir() and (parent / MARK).is_file():
        return _load_run(_RunModels(parent, dtype, target, progress), True)
    if (path / "adapter_config.json").is_file():
        if (parent / MARK).is_file():
            return _RunModels(parent, dtype, target, progress).adapter(path)
        return _load_adapter(path, dtype, target, progress)
    if (path / "state.json").is_file() and (parent.parent / MARK).is_file():
        return _RunModels(parent.parent, dtype, target, progress).checkpoint(path)
    return _load_source(find_model(name, where="MODEL"), dtype, target, progress)


class _RunModels:
    """Loads models of a run folder as the run had them: same dtype, quantization and chat template."""

    def __init__(self, path: Path, dtype: str, device: torch.device, progress: Shown | None) -> None:
        self.path, self.dtype, self.device, self.progress = path, dtype, device, progress
        self.recipe: Recipe = read_resolved(path / "recipe.yaml")
        self.record: Record = read_record(path)

    def adapter(self, folder: Path) -> LoadedModel:
        check_adapter(folder)
        compute_dtype = None if self.dtype == "auto" else DTYPES[self.dtype]
        built, tokenizer = self._build(adapter=folder, compute_dtype=compute_dtype)
        return LoadedModel(built.model, tokenizer, str(folder), self.recipe, self.path)

    def checkpoint(self, folder: Path) -> LoadedModel:
        damage = checkpoint.damage(folder)
        if damage is not None:
            raise UserError("the checkpoint is damaged", where=str(folder), got=damage)
        # The checkpoint has the gains of sub-norms, so any ids do for calibration.
        built, tokenizer = self._build(calibration=[torch.arange(16)[None]])
        checkpoint.load_weights(folder, built.model)
        model = built.model if self.dtype == "auto" else cast(built.model, DTYPES[self.dtype])
        return LoadedModel(model.eval(), tokenizer, str(folder), self.recipe, self.path)

    def _build(self, **options: Any) -> tuple[BuiltModel, PreTrainedTokenizerBase]:
        recipe, source = self.recipe, source_of(self.recipe.model)
        model_record = self.record.model
        if model_record is None or model_record.dtype not in NAMES:
            raise UserError(
                "the run's record has no valid dtype for its model",
                where=str(self.path / MARK),
                got=f"model: {model_record.dtype if model_record is not None else None}",
                hint=f"finetune resume {self.path}",
            )
        tokenizer = recipe_tokenizer(recipe, source, self.path)
        built = build_model(
            recipe,
            source,
            load_config(source, tokenizer),
            device=self.device,
            dtype=NAMES[model_record.dtype],
            eos_token_ids=model_record.eos_token_ids,
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


def _load_run(run: _RunModels, merged: bool) -> LoadedModel:
    path, device, note = run.path, run.device, None
    folder, adapter = path / "merged", path / "adapter"
    if merged and folder.is_dir():
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        if device.type == "cpu" or not adapter.is_dir() or size < 0.9 * free_bytes(device):
            chats = not run.recipe.streams_text
            loaded = _load_source(find_model(str(folder)), run.dtype, device, run.progress, chats=chats)
            loaded.recipe, loaded.run = run.recipe, path
            return loaded
        note = "the merged model does not fit into free GPU memory: using the adapter on its quantized base"
    if adapter.is_dir():
        loaded = run.adapter(adapter)
        loaded.note = note
        return loaded
    newest, damaged = checkpoint.newest(path / "checkpoints")
    if newest is None and damaged:
        hint = "restore one from a copy, or train again"
        raise UserError("every checkpoint of this run is damaged", where=str(path), got="; ".join(damaged), hint=hint)
    if newest is None:
        raise UserError("this run has no model to load yet", where=str(path), hint=f"finetune resume {path}")
    loaded = run.checkpoint(newest)
    if damaged:
        loaded.note = f"damaged checkpoint {'; '.join(damaged)}; using {newest.name}"
    return loaded


def _load_source(source: Source, dtype: str, device: torch.device, progress: Shown | None, *, chats: bool = True) -> LoadedModel:
    """Load a model that is not part of a run. dtype auto: fp32 if it is stored so, else the device's default.

    chats: set a chat template if it has none; False for a model of plain text.
    """
    config = load_config(source)
    stored = torch.float32 if getattr(config, "dtype", None) == torch.float32 else default_dtype(device.type)
    tokenizer = load_tokenizer(source)
    model: Any = load_weights(source, config, dtype=DTYPES.get(dtype, stored), attention="auto", progress=progress)
    note = None
    if chats and not tokenizer.chat_template:
        note = f"{source.name} has no chat template: using {set_template(tokenizer, 'auto')}"
    return LoadedModel(model.to(device), tokenizer, source.name, note=note)


def _load_adapter(path: Path, dtype: str, device: torch.device, progress: Shown | None) -> LoadedModel:
    """Load an adapter outside of a run, on the base that it names."""
    check_adapter(path)
    base = _load_source(find_model(adapter_base(path), where=str(path / "adapter_config.json")), dtype, device, progress)
    tokenizer = base.tokenizer
    if (path / "tokenizer_config.json").is_file():
        tokenizer = load_tokenizer(Source(str(path), str(path)))
    note = "this adapter is outside its run folder: its base is loaded as stored, not quantized as in training"
    return LoadedModel(load_adapter(base.model, path).to(device).eval(), tokenizer, str(path), note=note)
