"""Rollouts: sampled in groups and rewarded, step by step (`groups`) or while the trainer works (`scheduler`)."""
