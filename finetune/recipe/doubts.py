"""What a recipe may say and hardly anyone means: told before training, and not refused."""

from __future__ import annotations

from finetune.recipe.schema import Recipe

# Method → (lowest, highest) peak rate of Adam that is told of, and the usual ones in words: those of the shipped recipes and of
# their sources, with a wide margin (QLoRA, arXiv 2305.14314, trains adapters at 1e-4 and 2e-4).
ADAPTERS, TRAINED, SCRATCH = "adapters", "all weights of a trained model", "a model from scratch"
RATES = {
    ADAPTERS: (1e-6, 1e-2, "1e-5 to 1e-3"),
    TRAINED: (1e-7, 1e-3, "1e-6 to 1e-4"),
    SCRATCH: (1e-6, 2e-2, "1e-4 to 3e-3"),
}


def doubts(recipe: Recipe, *, is_float: bool) -> list[str]:
    """Sentences for the user. is_float: whether the base is stored in floats, and not ternary already."""
    from_scratch, rate = recipe.model.name is None, recipe.train.lr
    method = ADAPTERS if recipe.base_frozen else SCRATCH if from_scratch or recipe.trains_quantized else TRAINED
    lowest, highest, usual = RATES[method]
    lines = []
    if rate > highest:
        lines.append(f"train.lr={rate:g} is far above the rates of {method} ({usual}): it will probably destroy the model")
    if rate < lowest:
        lines.append(f"train.lr={rate:g} is far below the rates of {method} ({usual}): it will hardly change the model")
    if recipe.trains_quantized and not from_scratch and is_float and not recipe.quant.warmup and recipe.distill.teacher is None:
        lines.append(
            "rounding a trained float model to ternary at once loses nearly all that it knows, and needs long training: blend it "
            "over the first steps (quant.warmup=0.2), and learn from the float model (distill.teacher=MODEL)"
        )
    return lines
