"""Rollouts: groups of completions of a prompt, their rewards and advantages, and the datums made of them."""
