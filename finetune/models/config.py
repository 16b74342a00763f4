"""A model's configuration, tokenizer and end tokens, read without its weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.data.preflight import Limits
from finetune.errors import UserError, nearest
from finetune.files import TOKENIZER
from finetune.models.gguf import parsed_once
from finetune.models.source import FAULTS, Source, find_tokenizer, unavailable
from finetune.recipe import Quant, Recipe
from finetune.screen import Shown

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from finetune.data.stream import Source as TextSource


def load_config(source: Source, tokenizer: PreTrainedTokenizerBase | None = None) -> PretrainedConfig:
    """Read the model's configuration; from scratch it takes vocabulary and end token from `tokenizer`, unless they are given.

    Raises:
        UserError: it cannot be read, or model.config has an unknown key.
    """
    from transformers import AutoConfig

    if source.init_config is not None:
        return new_config(source.init_config, tokenizer)
    try:
        with parsed_once(source):
            return AutoConfig.from_pretrained(source.folder, **source.options)
    except FAULTS:
        raise
    except Exception as error:  # transformers raises many exception types for an unreadable model
        raise unavailable(source, error) from None


def new_config(
    given: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None = None, *, where: str = "model.config"
) -> PretrainedConfig:
    """The configuration of model.config. Unlike in transformers an unknown key is an error.

    where: the location of `given`, for messages.

    Raises:
        UserError: unknown model_type or key, or inconsistent values.
    """
    import dataclasses

    from transformers import CONFIG_MAPPING

    keys = dict(given)
    model_type = keys.pop("model_type")
    if model_type not in CONFIG_MAPPING:
        near = nearest(model_type, list(CONFIG_MAPPING.keys()))
        raise UserError(
            "unknown model_type",
            where=f"{where}.model_type",
            got=model_type,
            hint=f"did you mean {near}?" if near else "for example bitnet, llama or gpt2",
        )
    configuration = CONFIG_MAPPING[model_type]
    known = {field.name for field in dataclasses.fields(configuration)} | set(configuration.attribute_map)
    if unknown := sorted(keys.keys() - known):
        near = nearest(unknown[0], sorted(known))
        raise UserError(
            f"{configuration.__name__} has no such key",
            where=f"{where}.{unknown[0]}",
            got=repr(keys[unknown[0]]),
            hint=f"did you mean {near}?" if near else "see this class in the transformers documentation",
        )
    if tokenizer is not None:
        special = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
        keys = {"vocab_size": len(tokenizer), **special, "pad_token_id": None, **keys}
    try:
        return configuration(**keys)
    except Exception as error:  # validators of transformers raise many exception types for inconsistent values
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{configuration.__name__} refuses these values", where=where, got=reason) from None


def limits(config: PretrainedConfig) -> Limits:
    """Numbers of positions and token ids of the model, None where unlimited or unknown."""
    from eval.positions import positions_of

    return Limits(positions_of(config), getattr(config.get_text_config(), "vocab_size", None))


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model or tokenizer folder.

    Raises:
        UserError: it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        with parsed_once(source):
            return AutoTokenizer.from_pretrained(source.folder, **source.options)
    except FAULTS:
        raise
    except Exception as error:
        if source.local and source.gguf is None and "trust_remote_code" not in str(error):
            files = [path.name for path in Path(source.folder).iterdir() if "token" in path.name or "vocab" in path.name]
            got = f"{', '.join(sorted(files)) or 'no tokenizer file'}: {(str(error).strip().splitlines() or [''])[0]}"
            hint = "put the model's tokenizer.json and tokenizer_config.json there"
            raise UserError("cannot read the tokenizer", where=source.folder, got=got, hint=hint) from None
        raise unavailable(source, error) from None


def recipe_tokenizer(
    recipe: Recipe, source: Source, run: Path, stream: TextSource | None = None, progress: Shown | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a recipe: the model's own; for a model from scratch the named one, or one trained on the recipe's text.

    run: the run folder, for a tokenizer that the run has trained. stream: the text to train one on.

    Raises:
        UserError: it does not exist, or the text is too small for the vocabulary.
    """
    from finetune.data.tokenizer import MAX_BYTES, tokenizer_texts, train_tokenizer

    if recipe.model.config is None:
        return load_tokenizer(source)
    if recipe.tokenizer.name is not None:
        return load_tokenizer(find_tokenizer(recipe.tokenizer.name))
    own = run / TOKENIZER
    if (own / "tokenizer.json").is_file():
        return load_tokenizer(Source(str(own), str(own)))
    if stream is None:
        raise UserError("this run's tokenizer is missing", where=str(own), got="no tokenizer.json")

    def read(done: int) -> None:
        if progress is not None:
            progress(done, MAX_BYTES, "bytes at most, to train the tokenizer")

    return train_tokenizer(tokenizer_texts(stream), recipe.tokenizer.train, progress=read)


def eos_token_ids(source: Source, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """End tokens of generation: the tokenizer's, and those of the model's generation config."""
    ids: set[int] = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    if source.gguf is None and source.init_config is None:
        from transformers import GenerationConfig

        try:
            eos = GenerationConfig.from_pretrained(source.folder, revision=source.revision or "main").eos_token_id
        except OSError:  # many models have none
            eos = None
        ids |= set(eos) if isinstance(eos, list) else set() if eos is None else {eos}
    return frozenset(ids)


def set_eos_token_ids(model: Any, ids: Iterable[int]) -> None:
    """Set the end tokens in the model's generation config, which is saved with it."""
    tokens = sorted(ids)
    if tokens and model.generation_config is not None:
        model.generation_config.eos_token_id = tokens if len(tokens) > 1 else tokens[0]


def check_scheme(source: Source, config: PretrainedConfig, quant: Quant, *, frozen: bool, twin: bool = False) -> None:
    """Raise UserError if this checkpoint does not support the recipe's quantization, before any weight is read."""
    if getattr(config, "quantization_config", None):
        stored = as_packed(source, config, quant, frozen=frozen).quantization_config["stored"]
        if twin or quant.sub_norms:
            raise UserError(
                "this model is already ternary: it cannot have a float twin or another layout",
                where="twin" if twin else "quant.sub_norms",
                got=source.name,
                hint="leave it out",
            )
        if frozen and stored.get("use_rms_norm"):
            raise UserError(
                "adapters do not work on linears with a norm inside",
                where="adapter.kind",
                got=f"{source.name}: use_rms_norm",
                hint="use a model with sub-norms (model_type bitnet)",
            )
    elif quant.scheme == "ternary" and frozen:
        raise UserError(
            "adapters on a ternary base need a model that was trained in ternary; rounding a float model would destroy it",
            where="quant.scheme",
            got=f"ternary, but {source.name} is in floats",
            hint="quant.scheme=nf4; or train its weights: adapter.kind=none, quant.warmup=0.5, quant.sub_norms=true",
        )


def as_packed(source: Source, config: PretrainedConfig, quant: Quant | None, *, frozen: bool = True) -> PretrainedConfig:
    """The config for reading a checkpoint that is already packed.

    quant: the recipe's, which must match; None accepts any.

    Raises:
        UserError: the checkpoint's format is not supported, or is not the recipe's.
    """
    from quant.pretrained import PackingError, packed_config

    try:
        packed = packed_config(config)
    except PackingError as error:
        raise UserError(
            "the model's quantization format is not supported", where="model.name", got=f"{source.name}: {error}"
        ) from None
    got = str(packed.quantization_config["quant_method"]).removeprefix("packed_")
    if quant is not None and quant.scheme != got:
        raise UserError(
            "this model is already quantized; quantizing it twice would destroy it",
            where="model.name",
            got=f"{source.name}: {got}",
            hint=f"quant.scheme={got} trains adapters on it",
        )
    masters = packed.quantization_config["stored"].get("quantization_mode") == "online"
    if quant is not None and got == "ternary" and masters == frozen:
        raise UserError(
            "this model has float master weights of ternary layers: train them, or pack them for adapters"
            if masters
            else "this model is already ternary, without master weights to train",
            where="model.name",
            got=source.name,
            hint=f"adapter.kind=none; or pack it first: finetune export {source.name} --to bitnet --out DIR"
            if masters
            else "adapter.kind=lora trains adapters on it; to train its weights, give a checkpoint with master weights "
            "(finetune export RUN --to bitnet-online)",
        )
    if quant is not None and quant.keep:
        raise UserError("quant.keep has no effect: this model is already packed", where="quant.keep", got=source.name)
    return packed
