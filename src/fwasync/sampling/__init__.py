"""Sampling: completions from a snapshot or a base model, many at a time."""
