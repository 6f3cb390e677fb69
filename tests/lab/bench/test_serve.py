"""bench serve: two servers in turns, against stand-ins that speak vLLM's HTTP."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sparsekit import SparsekitError
from sparsekit.cli import app
from sparsekit.lab.bench.serve import bench_serve


class _Server(ThreadingHTTPServer):
    """Answers with as many tokens as asked for, after a time that grows with the prompt."""

    def __init__(self, seconds_per_token: float, word: str = "a") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.seconds_per_token, self.word = seconds_per_token, word
        self.asked: list[Any] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        self._start()
        self.wfile.write(json.dumps({"data": [{"id": "stand-in"}]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        self._start()
        time.sleep(len(body["prompt"]) * self.server.seconds_per_token)
        for _ in range(body["max_tokens"]):
            self.wfile.write(b"data: " + json.dumps({"choices": [{"text": self.server.word}]}).encode() + b"\n\n")
        self.wfile.write(b"data: [DONE]\n\n")

    def _start(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def servers() -> Iterator[tuple[_Server, _Server]]:
    both = _Server(2e-4), _Server(1e-4)
    yield both
    for server in both:
        server.shutdown()
        server.server_close()


def test_rows_and_file(servers: tuple[_Server, _Server], tmp_path: Path) -> None:
    lines: list[str] = []
    stock, sparse = servers
    rows = bench_serve(
        stock.url, sparse.url, config="mix", lengths=[1000], rounds=2, clients=3, requests=5, load_tokens=(100, 400),
        new_tokens=4, out=tmp_path / "rows.jsonl", show=lines.append,
    )  # fmt: skip
    assert rows == [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["kind"], row["server"]) for row in rows] == [
        (kind, name) for kind in ("first token", "decode", "load") for name in ("stock", "sparsekit")
    ]
    assert len(lines) == 6
    first = {row["server"]: row for row in rows if row["kind"] == "first token"}
    assert first["stock"]["ms"] >= 200
    assert first["sparsekit"]["faster"] > 1.2
    load = {row["server"]: row for row in rows if row["kind"] == "load"}
    assert load["stock"]["tokens"] == load["sparsekit"]["tokens"]
    assert load["stock"]["requests"] == 5
    prompts = [[body["prompt"] for body in server.asked if len(body["prompt"]) == 1000] for server in servers]
    assert sorted(prompts[0]) == sorted(prompts[1])
    assert len({tuple(ids) for ids in prompts[0]}) == 3  # new in every round
    assert all("vllm_xargs" not in body for body in stock.asked)
    assert all(body["vllm_xargs"] == {"sparsekit": "mix"} for body in sparse.asked)


def test_servers_that_say_different_things_are_not_timed(servers: tuple[_Server, _Server]) -> None:
    servers[1].word = "b"
    with pytest.raises(SparsekitError, match="they do not serve the same model"):
        bench_serve(servers[0].url, servers[1].url, lengths=[100])


def test_a_server_that_is_not_there() -> None:
    found = CliRunner().invoke(app, ["bench", "serve", "http://127.0.0.1:9", "http://127.0.0.1:9"])
    assert found.exit_code != 0
    assert "is the server up?" in found.stderr
    assert found.stderr.count("\n") == 1
    found = CliRunner().invoke(app, ["bench", "serve", "http://a", "http://b", "--load-tokens", "5"])
    assert "--load-tokens '5': the shortest and the longest" in found.stderr
