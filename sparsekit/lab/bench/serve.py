"""`sparsekit bench serve`: two vLLM servers that are running, stock and with sparsekit, asked in turns over HTTP.

It needs nothing but their addresses: no vLLM here. First that both answer alike where nothing is sparse; then time to
the first token by length, decoding alone, and a mixed load of clients that wait for their answers.
"""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from statistics import median
from typing import Annotated, Any, NamedTuple

import torch
import typer

from sparsekit.errors import SparsekitError, shown
from sparsekit.lab.bench.timing import Record, spread
from sparsekit.lab.options import Lengths, Rows, numbers_of
from sparsekit.lab.provenance import place

__all__ = ["bench_serve", "command"]

SHORT = 200  # tokens of the prompt on which both servers are to agree
TIMEOUT = 1800.0  # of an answer, seconds


class Server(NamedTuple):
    """One of the two, and what a request to it says."""

    name: str
    url: str
    model: str
    choice: str | None  # of the server's configs


class Answer(NamedTuple):
    """When tokens of one request came: seconds from its sending; and what they said."""

    times: list[float]
    text: str


def bench_serve(
    stock: str,
    sparse: str,
    *,
    config: str | None = None,
    lengths: Sequence[int] = (8192, 32768),
    rounds: int = 3,
    clients: int = 16,
    requests: int = 32,
    load_tokens: tuple[int, int] = (2048, 65536),
    new_tokens: int = 128,
    out: Path | str | None = None,
    show: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Rows of `first token`, `decode` and `load`, one for each server and length, with ratios to stock.

    Prompts are random token ids, the same for both, new in every round: no prefix cache answers for them. Servers on
    one machine take turns; each has the machine alone while it is asked.

    Args:
        stock, sparse: addresses, `http://host:port`.
        config: the request's choice at the second server; default the server's default.
        lengths: of prompts whose first token is timed.
        clients, requests, load_tokens, new_tokens: the mixed load: so many clients, prompts of lengths drawn evenly on
            a logarithmic scale, tokens of an answer. 0 requests leave it out.

    Raises:
        SparsekitError: a server that does not answer, or another answer on a short prompt than stock's.
    """
    if not lengths or min(lengths) < 1 or min(rounds, clients, new_tokens) < 1 or requests < 0:
        raise SparsekitError("lengths, rounds, clients and new_tokens are 1 at least, requests 0 at least.")
    servers = [Server("stock", stock, _model(stock), None), Server("sparsekit", sparse, _model(sparse), config)]
    _check_alike(servers)
    facts = {"case": "serve", "model": servers[1].model, "rounds": rounds}
    with Record(out, place(torch.device("cpu"))) as record:

        def add(**row: Any) -> None:
            record.add({**facts, **row})
            if show is not None:
                show(_line(row))

        for tokens in lengths:
            times: dict[str, list[float]] = {server.name: [] for server in servers}
            for turn in range(rounds + 1):
                for server in servers if turn % 2 else servers[::-1]:
                    first = _ask(server, _prompt(tokens, turn), 1).times[0] * 1e3
                    times[server.name] += [first] * (turn > 0)
            for name, all_ms in times.items():
                ms = spread(all_ms)
                add(
                    kind="first token",
                    server=name,
                    tokens=tokens,
                    **ms,
                    faster=_ratio(median(times["stock"]), ms["ms"]),
                )
        if requests:
            prompts = {"decode": [128] * clients, "load": _mix(requests, *load_tokens)}
            for kind, sizes in prompts.items():
                base: dict[str, Any] = {}
                for server in servers:
                    row = _load(server, sizes, clients, new_tokens)
                    base = base or row
                    faster = _ratio(row["requests_per_second"], base["requests_per_second"])
                    add(kind=kind, server=server.name, clients=clients, new_tokens=new_tokens, **row, faster=faster)
    return record.rows


def _mix(requests: int, least: int, most: int) -> list[int]:
    pick = Random(0)
    return [round(least * (most / least) ** pick.random()) for _ in range(requests)]


def _ratio(a: float, b: float) -> float:
    return round(a / b, 4)


def _prompt(tokens: int, seed: int) -> list[int]:
    pick = Random(f"{tokens} {seed}")
    return [pick.randrange(10, 900) for _ in range(tokens)]


def _open(url: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace")
        raise SparsekitError(f"{url}: {error.code} {shown(said)}") from None
    except (OSError, ValueError) as error:
        raise SparsekitError(f"{url}: {getattr(error, 'reason', error)}; is the server up?") from None


def _model(url: str) -> str:
    with _open(f"{url}/v1/models") as answer:
        return str(json.load(answer)["data"][0]["id"])


def _ask(server: Server, ids: list[int], new_tokens: int) -> Answer:
    """One answer, streamed."""
    body = {
        "model": server.model, "prompt": ids, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True,
        "stream": True, **({} if server.choice is None else {"vllm_xargs": {"sparsekit": server.choice}}),
    }  # fmt: skip
    begun, times, text = time.perf_counter(), [], ""
    with _open(f"{server.url}/v1/completions", body) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                choice = json.loads(line[6:])["choices"][0]
                times.append(time.perf_counter() - begun)
                text += choice["text"]
    if not times:
        raise SparsekitError(f"{server.url}: no token came for a prompt of {len(ids)} tokens.")
    return Answer(times, text)


def _check_alike(servers: Sequence[Server]) -> None:
    """Both say the same on a prompt that is too short to run sparse, twice each."""
    said = {server.name: {_ask(server, _prompt(SHORT, 0), 8).text for _ in range(2)} for server in servers}
    if said["stock"] != said["sparsekit"]:
        raise SparsekitError(
            f"on a short prompt the servers say {shown(said)}: they do not serve the same model in the same way."
        )


def _load(server: Server, sizes: Sequence[int], clients: int, new_tokens: int) -> dict[str, Any]:
    """A closed loop: each client sends its next prompt when its last answer is whole."""
    waiting, lock, answers = list(enumerate(sizes)), threading.Lock(), list[Answer]()
    failed: list[Exception] = []

    def client() -> None:
        while not failed:
            with lock:
                if not waiting:
                    return
                seed, tokens = waiting.pop(0)
            try:
                answer = _ask(server, _prompt(tokens, 1000 + seed), new_tokens)
            except Exception as error:  # told where the loop is waited for
                failed.append(error)
                return
            with lock:
                answers.append(answer)

    threads = [threading.Thread(target=client, daemon=True) for _ in range(min(clients, len(sizes)))]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    seconds = time.perf_counter() - begun
    firsts = sorted(answer.times[0] * 1e3 for answer in answers)
    gaps = sorted((b - a) * 1e3 for x in answers for a, b in zip(x.times[:-1], x.times[1:], strict=True)) or [0.0]
    return {
        "requests": len(sizes), "tokens": sum(sizes), "seconds": round(seconds, 3),
        "requests_per_second": round(len(sizes) / seconds, 4), "first_ms_p50": round(_at(firsts, 0.5), 3),
        "first_ms_p99": round(_at(firsts, 0.99), 3), "gap_ms_p50": round(_at(gaps, 0.5), 3),
        "gap_ms_p99": round(_at(gaps, 0.99), 3),
    }  # fmt: skip


def _at(values: Sequence[float], share: float) -> float:
    return values[min(int(len(values) * share), len(values) - 1)]


def _line(row: dict[str, Any]) -> str:
    if row["kind"] == "first token":
        return f"{row['tokens']:>9,} tokens  {row['ms']:10.1f} ms  {row['faster']:.3f} x  {row['server']}"
    return (
        f"{row['kind']:>16}  {row['requests_per_second']:8.3f} requests/s  {row['faster']:.3f} x  gap p50 "
        f"{row['gap_ms_p50']:.1f} ms, p99 {row['gap_ms_p99']:.1f} ms  {row['server']}"
    )


def command(
    stock: Annotated[str, typer.Argument(help="Address of vLLM as it is, http://host:port.")],
    sparse: Annotated[str, typer.Argument(help="Address of vLLM with sparsekit.")],
    config: Annotated[str | None, typer.Option(help="Of the second server's configs; default its default.")] = None,
    tokens: Lengths = "8192,32768",
    rounds: Annotated[int, typer.Option(min=1, help="Timed readings of each length.")] = 3,
    clients: Annotated[int, typer.Option(min=1, help="Of the mixed load.")] = 16,
    requests: Annotated[int, typer.Option(min=0, help="Of the mixed load; 0: none.")] = 32,
    load_tokens: Annotated[str, typer.Option(help="Shortest and longest prompt of the mixed load.")] = "2048,65536",
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer in the mixed load.")] = 128,
    output: Rows = None,
) -> None:
    """Time to the first token, decoding and a mixed load: vLLM with sparsekit against vLLM, in turns over HTTP."""
    ends = numbers_of(load_tokens, "--load-tokens")
    if len(ends) != 2 or ends[0] > ends[1] or ends[0] < 1:
        raise SparsekitError(f"--load-tokens {shown(load_tokens)}: the shortest and the longest, such as 2048,65536.")
    bench_serve(
        stock, sparse, config=config, lengths=numbers_of(tokens, "--tokens"), rounds=rounds, clients=clients,
        requests=requests, load_tokens=(ends[0], ends[1]), new_tokens=new_tokens, out=output, show=typer.echo,
    )  # fmt: skip
