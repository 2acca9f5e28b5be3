"""Blocking twins of the async clients, for scripts and recipes without an event loop."""
