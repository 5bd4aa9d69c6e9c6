"""Scores of a model: choices by perplexity, free-form answers, and bits per byte of texts."""
