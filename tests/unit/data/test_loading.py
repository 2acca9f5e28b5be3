"""Files from URLs, through real sockets: read as if they were here, and gone afterwards."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import anyio.to_thread
import pytest

from fwasync.data.chat import ChatTokenizer
from fwasync.data.loading import open_lines, source_name
from fwasync.data.prompts import load_prompts
from fwasync.errors import DatasetError, NotFoundError
from fwasync.local.tokenizer import save_tokenizer
from fwasync.recipes import rl

ROWS = [{"messages": [{"role": "user", "content": text}], "ground_truth": text} for text in ("a", "é")]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        body = {"/rows.jsonl": "".join(f"{json.dumps(row)}\n" for row in ROWS), "/bad.jsonl": "{}\n"}.get(path)
        self.send_response(404 if body is None else 200)
        self.end_headers()
        self.wfile.write((body or "").encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


async def test_a_url_is_read_like_a_file(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    rows = await load_prompts(f"{url}/rows.jsonl?token=secret")
    assert [(row.line, row.ground_truth) for row in rows] == [(1, "a"), (2, "é")]
    with pytest.raises(DatasetError) as caught:
        await load_prompts(f"{url}/bad.jsonl?token=secret")
    assert str(caught.value).startswith(f"{url}/bad.jsonl has 1 faulty row:")
    with pytest.raises(NotFoundError):
        await load_prompts(f"{url}/none")
    assert os.listdir(tmp_path) == []  # noqa: PTH208


async def test_a_path_is_taken_as_it_is(tmp_path: Path) -> None:
    for source in (tmp_path / "x.jsonl", str(tmp_path / "x.jsonl")):
        async with open_lines(source) as lines:
            assert lines.path == tmp_path / "x.jsonl"
            assert lines.name == str(tmp_path / "x.jsonl")


def test_a_source_has_a_name_without_secrets() -> None:
    assert source_name("https://host/rows.jsonl?sig=secret#top") == "https://host/rows.jsonl"
    assert source_name("what?.jsonl") == "what?.jsonl"
    assert source_name(Path("rows.jsonl")) == "rows.jsonl"


async def test_a_signed_url_is_not_told(url: str, tmp_path: Path) -> None:
    tokenizer = await anyio.to_thread.run_sync(lambda: (save_tokenizer(tmp_path), ChatTokenizer.load(tmp_path))[1])
    config = rl.Config(
        log_path=tmp_path / "run",
        dataset=f"{url}/rows.jsonl?token=secret",
        reward="fwasync.recipes.rewards:answer_digits",
    )
    told = await rl.dry_run(config, tokenizer=tokenizer, max_seq_len=64)
    assert f"{url}/rows.jsonl: 2 rows" in told
    with pytest.raises(DatasetError) as caught:
        await rl.dry_run(config, tokenizer=tokenizer, max_seq_len=2)
    assert "secret" not in f"{told}{caught.value}"
