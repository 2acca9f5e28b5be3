"""Recipes: whole training runs of readable length, on the public API alone. Read them, copy them, change them."""
