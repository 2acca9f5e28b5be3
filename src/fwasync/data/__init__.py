"""Data: chats from JSONL files, their tokens and weights, and the datums made of them.

Everything here is pure or reads a local file; nothing talks to a service.
"""
