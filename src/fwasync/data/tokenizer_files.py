"""Where the tokenizer of a model is on this machine, and what its configuration says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from fwasync.errors import UsageError

__all__ = ("find_tokenizer", "read_configuration")

_NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


def find_tokenizer(name: str) -> Path:
    """The directory of a tokenizer: the one that is named, or a hub name's in the local cache. Nothing is fetched.

    Raises:
        UsageError: There is none; the text says where it was looked for, and what to do.
    """
    path = Path(name)
    if (path / "tokenizer.json").is_file():
        return path
    if path.is_dir():
        raise UsageError(f"{path} has no tokenizer.json")
    if path.is_absolute() or name.startswith("."):
        raise UsageError(f"there is no tokenizer directory {path}")
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, "tokenizer.json")
    except HFValidationError:
        cached = None
    if not isinstance(cached, str):
        raise UsageError(
            f"tokenizer {name!r} is neither a directory ({path.absolute()}) nor in the Hugging Face cache of this "
            f"machine ({constants.HF_HUB_CACHE}); fetch it once: "
            f"hf download {name} tokenizer.json tokenizer_config.json chat_template.jinja"
        )
    return Path(cached).parent


def read_configuration(directory: Path) -> tuple[str, dict[str, str]]:
    """The chat template's source and the named tokens of a tokenizer directory.

    Raises:
        UsageError: They cannot be read, or there is no template.
    """
    path = directory / "tokenizer_config.json"
    try:
        config = cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {})
        source = directory / "chat_template.jinja"
        template: Any = source.read_text(encoding="utf-8") if source.is_file() else config.get("chat_template")
    except (OSError, ValueError) as error:
        raise UsageError(f"the configuration of the tokenizer in {directory} cannot be read: {error}") from error
    if isinstance(template, list):
        entries = cast("list[dict[str, str]]", template)
        template = next((entry["template"] for entry in entries if entry.get("name") == "default"), None)
    if not isinstance(template, str):
        raise UsageError(f"the tokenizer in {directory} has no chat template, so it cannot render chats")
    named = {name: config.get(name) for name in _NAMED_TOKENS}
    texts = {
        name: cast("dict[str, str]", token)["content"] if isinstance(token, dict) else token
        for name, token in named.items()
        if token
    }
    return template, texts
