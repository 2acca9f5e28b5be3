"""The configuration on disk: secrets masked, and nothing in a config stops a run."""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fwasync.errors import UsageError
from fwasync.tracking.run import open_run
from fwasync.tracking.settings import config_json, is_secret


class Kind(enum.Enum):
    BOTH = "both"


class Model(pydantic.BaseModel):
    api_key: str = "fw_1"
    rank: int = 8


@dataclass
class Deploy:
    token: str = "hf_2"
    path: Path = Path("a/b")
    kind: Kind = Kind.BOTH
    inner: list[Any] = field(default_factory=lambda: [Model(), {"password": "3"}])


class Holder:
    def __repr__(self) -> str:
        return "Holder(secret=4)"


def a_reward(text: str) -> float:
    return float(len(text))


def plain(config: dict[str, Any]) -> Any:
    return json.loads(config_json(config))


def test_secrets_are_masked_at_every_depth() -> None:
    text = config_json({"deploy": Deploy(), "wandb": [{"WANDB_API_KEY": "5", "X-Api-Key": "6"}], "holder": Holder()})
    assert not {"fw_1", "hf_2", "3", "4", "5", "6"} & {word.strip('",') for word in text.split()}
    assert "secret=4" not in text
    parsed = json.loads(text)
    assert parsed["deploy"] == {
        "token": "***",
        "path": "a/b",
        "kind": "both",
        "inner": [{"api_key": "***", "rank": 8}, {"password": "***"}],
    }
    assert parsed["wandb"] == [{"WANDB_API_KEY": "***", "X-Api-Key": "***"}]


@pytest.mark.parametrize(
    "key", ["api_key", "Token", "hf_token", "client_secret", "apiKey", "authorization", "x-api-key"]
)
def test_names_of_secrets(key: str) -> None:
    assert is_secret(key)


@pytest.mark.parametrize("key", ["max_tokens", "tokens_per_s", "tokenizer", "secretary", "passwords_file"])
def test_names_that_are_no_secrets(key: str) -> None:
    assert not is_secret(key)


def test_an_absent_secret_is_told() -> None:
    assert plain({"api_key": None, "token": ""}) == {"api_key": None, "token": ""}


def test_what_json_cannot_express_is_named() -> None:
    assert plain(
        {
            "reward": a_reward,
            "type": Holder,
            "holder": Holder(),
            "day": date(2024, 2, 29),
            "nan": float("nan"),
            "float32": np.float32(0.5),
            "int64": np.int64(3),
            "array": np.zeros(2),
            "tuple": (1, True),
            7: b"bytes",
        }
    ) == {
        "reward": "a_reward",
        "type": "Holder",
        "holder": "<Holder>",
        "day": "2024-02-29",
        "nan": None,
        "float32": 0.5,
        "int64": 3,
        "array": "<ndarray>",
        "tuple": [1, True],
        "7": "<bytes>",
    }


def test_a_config_in_itself_is_refused_and_one_twice_is_not() -> None:
    shared = {"a": 1}
    assert plain({"x": shared, "y": shared}) == {"x": {"a": 1}, "y": {"a": 1}}
    loop: dict[str, Any] = {}
    loop["loop"] = [loop]
    with pytest.raises(UsageError, match="contains itself"):
        config_json(loop)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner),
        max_leaves=20,
    )
)
def test_anything_becomes_json(value: Any) -> None:
    json.loads(config_json({"value": value}), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


async def test_it_is_written(tmp_path: Path) -> None:
    async with open_run(tmp_path / "run", config={"lr": 1e-4, "api_key": "fw_1", "reward": a_reward}) as run:
        written = json.loads((run.log_path / "config.json").read_text())
    assert written == {"lr": 1e-4, "api_key": "***", "reward": "a_reward"}


def test_what_a_url_may_hide_is_masked() -> None:
    told = plain(
        {
            "dataset": "https://bucket/rows.jsonl?X-Amz-Signature=5#top",
            "extra_args": ["--mirror=http://me:6@host:80/a", "what? no url"],
            "plain": "https://host/a@b",
        }
    )
    assert told == {
        "dataset": "https://bucket/rows.jsonl?***#top",
        "extra_args": ["--mirror=http://***@host:80/a", "what? no url"],
        "plain": "https://host/a@b",
    }
