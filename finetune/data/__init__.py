"""From files to batches: sources → rows → samples (tokens and labels) → packed batches; and the preflight of labels."""
