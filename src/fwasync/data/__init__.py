"""Data: chats from JSONL files, their tokens and weights, and the datums made of them.

Everything here is pure, or reads a file or URL of data; nothing talks to a trainer service.
"""
