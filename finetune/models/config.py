"""What a model says of itself before its weights are read: configuration, tokenizer, the tokens at which it stops."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.data.preflight import Limits
from finetune.errors import UserError, nearest
from finetune.files import TOKENIZER
from finetune.models.source import FAULTS, Source, find_tokenizer, unavailable
from finetune.recipe import Quant, Recipe
from finetune.screen import Shown

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from finetune.data.stream import Source as TextSource


def load_config(source: Source, tokenizer: PreTrainedTokenizerBase | None = None) -> PretrainedConfig:
    """The model's configuration; from scratch its vocabulary and end token are those of `tokenizer`, unless it says others.

    Raises:
        UserError: it cannot be read, or a key of model.config is none of that configuration class.
    """
    from transformers import AutoConfig

    if source.init_config is not None:
        return new_config(source.init_config, tokenizer)
    try:
        return AutoConfig.from_pretrained(source.folder, **source.options)
    except FAULTS:
        raise
    except Exception as error:  # transformers raises many kinds for one cause: this is no readable model
        raise unavailable(source, error) from None


def new_config(
    given: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None = None, *, where: str = "model.config"
) -> PretrainedConfig:
    """The configuration of model.config. transformers takes any key into one, a misspelt one too: here it is an error.

    where: the place of `given`, for messages.

    Raises:
        UserError: no such model_type or key, or values that do not go together.
    """
    import dataclasses

    from transformers import CONFIG_MAPPING

    keys = dict(given)
    kind = keys.pop("model_type")
    if kind not in CONFIG_MAPPING:
        near = nearest(kind, list(CONFIG_MAPPING.keys()))
        raise UserError(
            "transformers knows no such model_type",
            where=f"{where}.model_type",
            got=kind,
            hint=f"did you mean {near}?" if near else "such as bitnet, llama, gpt2",
        )
    configuration = CONFIG_MAPPING[kind]
    known = {field.name for field in dataclasses.fields(configuration)} | set(configuration.attribute_map)
    if unknown := sorted(keys.keys() - known):
        near = nearest(unknown[0], sorted(known))
        raise UserError(
            f"{configuration.__name__} has no key of this name",
            where=f"{where}.{unknown[0]}",
            got=repr(keys[unknown[0]]),
            hint=f"did you mean {near}?" if near else "see this class in the documentation of transformers",
        )
    if tokenizer is not None:
        ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
        keys = {"vocab_size": len(tokenizer), **ends, "pad_token_id": None, **keys}
    try:
        return configuration(**keys)
    except Exception as error:  # validators of transformers raise many kinds; each means: these values do not go together
        said = str(error).strip().splitlines()[0]
        raise UserError(f"{configuration.__name__} refuses these values", where=where, got=said) from None


def limits(config: PretrainedConfig) -> Limits:
    """How many positions and token ids the model has. Rotary positions have no end, learnt ones (GPT-2) have."""
    text = config.get_text_config()
    return Limits(getattr(text, "max_position_embeddings", None), getattr(text, "vocab_size", None))


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source.folder, **source.options)
    except FAULTS:
        raise
    except Exception as error:
        if source.local and source.gguf is None and "trust_remote_code" not in str(error):
            files = [path.name for path in Path(source.folder).iterdir() if "token" in path.name or "vocab" in path.name]
            got = f"{', '.join(sorted(files)) or 'no file of one'}: {(str(error).strip().splitlines() or [''])[0]}"
            hint = "put there the tokenizer.json and tokenizer_config.json that came with the model"
            raise UserError("the tokenizer cannot be read", where=source.folder, got=got, hint=hint) from None
        raise unavailable(source, error) from None


def recipe_tokenizer(
    recipe: Recipe, source: Source, run: Path, stream: TextSource | None = None, progress: Shown | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a recipe: the model's own, or for a model from scratch the one that it names, or one trained on its text.

    run: the run's folder, which has the one that it trained. stream: the recipe's text, where one may have to be trained.

    Raises:
        UserError: it is not there, or the text does not give such a vocabulary.
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
        raise UserError("this run's tokenizer is gone", where=str(own), got="no tokenizer.json")

    def read(done: int) -> None:
        if progress is not None:
            progress(done, MAX_BYTES, "bytes read at most, to learn tokens")

    return train_tokenizer(tokenizer_texts(stream), recipe.tokenizer.train, progress=read)


def eos_token_ids(source: Source, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens at which the model stops when it generates: the tokenizer's end token and those of its generation config."""
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
    """Make the model stop at these tokens when it generates, and every folder that is saved of it too."""
    tokens = sorted(ids)
    if tokens and model.generation_config is not None:
        model.generation_config.eos_token_id = tokens if len(tokens) > 1 else tokens[0]


def check_scheme(source: Source, config: PretrainedConfig, quant: Quant, *, frozen: bool, twin: bool = False) -> None:
    """Raise UserError when what the run asks for cannot be had from this checkpoint: before anything is read or trained."""
    if getattr(config, "quantization_config", None):
        stored = as_packed(source, config, quant, frozen=frozen).quantization_config["stored"]
        if twin or quant.sub_norms:
            raise UserError(
                "this model is ternary already: it has no float twin, and its layout stays",
                where="twin" if twin else "quant.sub_norms",
                got=source.name,
                hint="leave it out",
            )
        if frozen and stored.get("use_rms_norm"):
            raise UserError(
                "adapters cannot go on linears that normalize their input themselves",
                where="adapter.kind",
                got=f"{source.name}: use_rms_norm",
                hint="a model with sub-norms (model_type bitnet) takes them",
            )
    elif quant.scheme == "ternary" and frozen:
        raise UserError(
            "adapters on a ternary base need a model that was trained to be ternary; rounding this one would destroy it",
            where="quant.scheme",
            got=f"ternary, and {source.name} is in floats",
            hint="quant.scheme=nf4; or train its weights: adapter.kind=none, quant.warmup=0.5, quant.sub_norms=true",
        )


def as_packed(source: Source, config: PretrainedConfig, quant: Quant | None, *, frozen: bool = True) -> PretrainedConfig:
    """The config that reads a checkpoint which is packed already. quant: what a run asks for, None where anything will do."""
    from quant.pretrained import PackingError, packed_config

    try:
        packed = packed_config(config)
    except PackingError as error:
        raise UserError(
            "this model is quantized in a way that cannot be read", where="model.name", got=f"{source.name}: {error}"
        ) from None
    got = str(packed.quantization_config["quant_method"]).removeprefix("packed_")
    if quant is not None and quant.scheme != got:
        raise UserError(
            "this model is quantized already, and quantizing twice destroys it",
            where="model.name",
            got=f"{source.name}: {got}",
            hint=f"quant.scheme={got} trains adapters on it as it is",
        )
    masters = packed.quantization_config["stored"].get("quantization_mode") == "online"
    if quant is not None and got == "ternary" and masters == frozen:
        raise UserError(
            "this model holds float master weights of ternary layers, which are trained, not adapted"
            if masters
            else "this model is ternary already: its master weights are gone, and a second quantization would shrink its scales",
            where="model.name",
            got=source.name,
            hint=f"adapter.kind=none; or pack it first: finetune export {source.name} --to bitnet --out DIR"
            if masters
            else "adapter.kind=lora trains adapters on it; to train its weights, give a checkpoint that has them "
            "(finetune export RUN --to bitnet-online)",
        )
    if quant is not None and quant.keep:
        raise UserError(
            "this model is packed already, so nothing more can be kept in floats", where="quant.keep", got=source.name
        )
    return packed
