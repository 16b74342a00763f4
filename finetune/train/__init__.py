"""Training: one loop, and a short file for each kind that gives it batches and a loss."""
