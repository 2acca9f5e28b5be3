"""Checkpoints: the ledger of what was saved, from which a run is resumed."""
