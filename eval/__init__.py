"""Scores a (model, tokenizer): loss and perplexity, harness tasks, generation. Knows no recipes and no runs."""
