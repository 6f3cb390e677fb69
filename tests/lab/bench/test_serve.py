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
from sparsekit.lab.bench import serve
from sparsekit.lab.bench.serve import bench_serve
from sparsekit.lab.bench.serve_client import server_at

CONFIGS = ("off", "mix", "all")


class _Server(ThreadingHTTPServer):
    """Answers with as many tokens as asked for, after a time that grows with what its prefix cache lacks of the prompt.

    configs: what its sparsekit has; None: a server without. early: it refuses other ones before it begins to answer.
    """

    def __init__(self, seconds_per_token: float, configs: tuple[str, ...] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.seconds_per_token, self.configs = seconds_per_token, configs
        self.word, self.limit, self.early, self.salted, self.tells = "a", 65536 + 4, True, True, False
        self.asked: list[Any] = []
        self.cache: set[tuple[Any, ...]] = set()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def prompts(self, tokens: int) -> list[list[int]]:
        return [body["prompt"] for body in self.asked if len(body["prompt"]) == tokens]


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        self._start()
        self.wfile.write(json.dumps({"data": [{"id": "stand-in", "max_model_len": self.server.limit}]}).encode())

    def do_POST(self) -> None:
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        choice = body.get("vllm_xargs", {}).get("sparsekit")
        if server.configs is not None and choice is not None and choice not in server.configs:
            said = {
                "error": {"message": f"sparsekit={choice!r}: this server has {', '.join(server.configs)}." + "!" * 200}
            }
            self._start(400 if server.early else 200)
            self.wfile.write(json.dumps(said).encode() if server.early else f"data: {json.dumps(said)}\n\n".encode())
            return
        server.asked.append(body)
        self._start()
        page = (body.get("cache_salt") if server.salted else None, *body["prompt"][:16])
        cached = len(body["prompt"]) if page in server.cache else 0
        server.cache.add(page)
        time.sleep((len(body["prompt"]) - cached) * server.seconds_per_token)
        for _ in range(body["max_tokens"]):
            self._tell(choices=[{"text": server.word}])
        if body.get("stream_options", {}).get("include_usage"):
            details = {"prompt_tokens_details": {"cached_tokens": cached}} if server.tells else {}
            self._tell(choices=[], usage={"prompt_tokens": len(body["prompt"]), **details})
        self.wfile.write(b"data: [DONE]\n\n")

    def _tell(self, **event: Any) -> None:
        self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")

    def _start(self, status: int = 200) -> None:
        self.send_response(status)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def servers() -> Iterator[tuple[_Server, _Server]]:
    both = _Server(2e-4), _Server(1e-4, CONFIGS)
    yield both
    for server in both:
        server.shutdown()
        server.server_close()


def _bench(servers: tuple[_Server, _Server], **more: Any) -> list[dict[str, Any]]:
    return bench_serve(servers[0].url, servers[1].url, **{"lengths": [1000], "rounds": 2, "requests": 0, **more})


def test_rows_and_file(servers: tuple[_Server, _Server], tmp_path: Path) -> None:
    lines: list[str] = []
    stock, sparse = servers
    rows = _bench(
        servers, config="mix", clients=3, requests=5, load_tokens=(100, 400), new_tokens=4,
        out=tmp_path / "rows.jsonl", show=lines.append,
    )  # fmt: skip
    assert rows == [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["kind"], row["server"], row["config"]) for row in rows] == [
        (kind, *name) for kind in ("first token", "decode", "load") for name in (("stock", None), ("sparsekit", "mix"))
    ]
    first = {row["server"]: row for row in rows if row["kind"] == "first token"}
    assert first["stock"]["ms"] >= 200
    assert first["sparsekit"]["faster"] > 1.2
    load = {row["server"]: row for row in rows if row["kind"] == "load"}
    assert load["stock"]["tokens"] == load["sparsekit"]["tokens"]
    assert load["stock"]["requests"] == 5
    assert sorted(stock.prompts(1000)) == sorted(sparse.prompts(1000))
    assert len({tuple(ids) for ids in stock.prompts(1000)}) == 3  # new in every round
    assert all("vllm_xargs" not in body for body in stock.asked if len(body["prompt"]) > 1)
    assert all(body["vllm_xargs"] == {"sparsekit": "mix"} for body in sparse.asked)
    assert [line.split(";")[0] for line in lines if "above 1 is faster" in line] == [
        "time to the first token, median (p20-p80) of 2", "3 clients, 4 tokens an answer",
    ]  # fmt: skip
    mine = first["sparsekit"]
    spread = f"({mine['ms_p20']:.1f}-{mine['ms_p80']:.1f})"
    assert lines[2] == (
        f"     1,000 tokens  {mine['ms']:10.1f} ms {spread}  {mine['faster']:.3f} x  sparsekit, config mix"
    )


def test_a_second_run_is_not_answered_by_the_first_ones_cache(servers: tuple[_Server, _Server]) -> None:
    """By new tokens where prompts begin, also where a cache knows no salt; what comes behind them is the same."""
    servers[0].salted = False
    runs = [_bench(servers)[0] for _ in range(2)]
    assert all(row["ms"] >= 200 for row in runs)
    before, after = servers[0].prompts(1000)[:3], servers[0].prompts(1000)[3:]
    assert all(a[:8] != b[:8] and a[8:] == b[8:] for a, b in zip(before, after, strict=True))


def test_a_prompt_that_a_cache_had_is_no_reading(
    servers: tuple[_Server, _Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve._Prompts, "__call__", lambda self, use, tokens, seed: [tokens + seed] * tokens)
    servers[0].salted, servers[0].tells = False, True
    _bench(servers)
    with pytest.raises(SparsekitError, match=r"1,000 of a prompt's 1,000 tokens came from a cache"):
        _bench(servers)


def test_no_prompt_of_a_run_is_asked_twice(servers: tuple[_Server, _Server]) -> None:
    """Lengths of one kind of reading may be those of another, and of itself."""
    for server in servers:
        server.tells = True  # a reading from the cache is an error
    same = {"requests": 2, "load_tokens": (serve.DECODED, serve.DECODED), "new_tokens": 2, "clients": 2}
    rows = _bench(servers, lengths=[serve.SHORT, serve.DECODED, serve.DECODED], rounds=1, **same)
    assert [row["tokens"] for row in rows if row["server"] == "stock"][:2] == [serve.SHORT, serve.DECODED]


def test_stock_is_not_timed_against_itself(servers: tuple[_Server, _Server]) -> None:
    with pytest.raises(SparsekitError, match="--config off: that is stock vLLM"):
        _bench(servers, config="off")


def test_one_server_is_both(servers: tuple[_Server, _Server]) -> None:
    """Asked for `off` and for a config in turns; no page of one request serves the other."""
    sparse = servers[1]
    rows = bench_serve(sparse.url, sparse.url, config="mix", lengths=[1000], rounds=1, requests=0)
    assert [row["config"] for row in rows] == ["off", "mix"]
    assert all(row["ms"] >= 100 for row in rows)


def test_servers_that_do_not_run_sparsekit_are_not_timed(servers: tuple[_Server, _Server]) -> None:
    with pytest.raises(SparsekitError, match="has no sparsekit: it ignores a request's config"):
        bench_serve(servers[1].url, servers[0].url, lengths=[100])


@pytest.mark.parametrize("early", [True, False])
def test_a_config_that_the_server_lacks(servers: tuple[_Server, _Server], early: bool) -> None:
    """Under 400, or in a stream that began with 200; the server's words are not cut."""
    servers[1].early = early
    with pytest.raises(SparsekitError, match=r"sparsekit='fast': this server has off, mix, all\.!{200}$"):
        _bench(servers, config="fast")


def test_what_the_servers_have_no_room_for(servers: tuple[_Server, _Server]) -> None:
    """Said before anything is timed; the load's own default is cut to what fits."""
    servers[0].limit = 1000
    for options, said in (
        ({"lengths": [100, 1000]}, "--tokens 1000: a prompt of 1,000 tokens and an answer's first token need more "),
        ({"lengths": [100], "requests": 1, "new_tokens": 4, "load_tokens": (10, 997)},
         "--load-tokens 10,997: a prompt of 997 tokens and an answer of 4 tokens need more than "),
        ({"lengths": [100], "requests": 1, "new_tokens": 900}, "--new-tokens 900: a prompt of 128 tokens and "),
    ):  # fmt: skip
        with pytest.raises(SparsekitError) as error:
            _bench(servers, **options)
        assert str(error.value).startswith(said)
        assert str(error.value).endswith(f"the 1,000 positions of {servers[0].url} (--max-model-len).")
    assert not servers[0].prompts(100)
    lines: list[str] = []
    rows = _bench(servers, lengths=[100], rounds=1, requests=2, clients=2, new_tokens=4, show=lines.append)
    assert "--load-tokens 996,996: longer prompts do not fit the servers' --max-model-len" in lines
    assert rows[-1]["tokens"] == 2 * 996
    assert serve._load_tokens([server_at(servers[1].url, "sparsekit")], None, 4, lines.append) == (2048, 65536)


def test_times_that_do_not_tell_which_is_faster() -> None:
    slow, fast = [10.0, 11.0, 12.0], [5.0, 6.0, 7.0]
    assert serve._untold(slow, fast) == serve._untold(fast, slow) == ""
    assert serve._untold(slow, [11.0, 12.0, 13.0]) == "these p20-p80 overlap"
    assert serve._untold([10.0], [5.0]) == "one round has no spread"


def test_how_far_it_is_goes_to_stderr(servers: tuple[_Server, _Server]) -> None:
    found = CliRunner().invoke(
        app, ["bench", "serve", servers[0].url, servers[1].url, "-n", "1000", "--rounds", "1", "--requests", "0"]
    )
    assert found.stderr.startswith("1,000 tokens: a reading of each server that does not count, then 1\n")
    assert "sparsekit, its default config" in found.stdout and "does not count" not in found.stdout


def test_servers_that_say_different_things_are_not_timed(servers: tuple[_Server, _Server]) -> None:
    servers[1].word = "b"
    with pytest.raises(SparsekitError, match="they do not serve the same model"):
        _bench(servers)


def test_a_server_that_is_not_there() -> None:
    found = CliRunner().invoke(app, ["bench", "serve", "http://127.0.0.1:9", "http://127.0.0.1:9"])
    assert found.exit_code != 0
    assert "is the server up?" in found.stderr
    assert found.stderr.count("\n") == 1
    found = CliRunner().invoke(app, ["bench", "serve", "http://a", "http://b", "--load-tokens", "5"])
    assert "--load-tokens '5': the shortest and the longest" in found.stderr
    found = CliRunner().invoke(app, ["bench", "serve", "localhost:8000", "http://b"])
    assert found.stderr == "error: 'localhost:8000': want the address of a server, such as http://127.0.0.1:8000.\n"


def test_a_server_of_another_kind(servers: tuple[_Server, _Server], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Handler, "do_GET", lambda self: (self._start(), self.wfile.write(b"<html>")))
    with pytest.raises(SparsekitError, match=r"/v1/models: that is no answer of vLLM's: JSONDecodeError"):
        _bench(servers)
