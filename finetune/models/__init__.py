"""Models between a recipe and a training."""
