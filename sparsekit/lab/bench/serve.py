"""`sparsekit bench serve`: two vLLM servers that are running, stock and with sparsekit, asked in turns over HTTP.

It needs nothing but their addresses: no vLLM here. First that the second runs sparsekit, that both take what will be
asked, and that they answer alike where nothing is sparse; then time to the first token by length, decoding alone, and a
mixed load of clients that wait for their answers.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from statistics import median
from typing import Annotated, Any

import torch
import typer

from sparsekit.errors import SparsekitError, shown
from sparsekit.lab.bench.serve_client import Answer, Server, ask, has_sparsekit, server_at
from sparsekit.lab.bench.timing import Record, spread
from sparsekit.lab.options import Lengths, Rows, numbers_of
from sparsekit.lab.progress import Bar, progress
from sparsekit.lab.provenance import place
from sparsekit.serve.vllm.settings import OFF

__all__ = ["bench_serve", "command"]

SHORT = 200  # tokens of the prompt on which both servers are to agree
SAID = 8  # tokens of their answers to it
DECODED = 128  # tokens of a prompt whose answer is timed: short, so that decoding is nearly all
LOAD = (2048, 65536)  # tokens of the mixed load's prompts, unless the server takes fewer
NONCE = 8  # tokens
IDS = range(10, 900)  # of prompts: in any vocabulary, and nothing special


def bench_serve(
    stock: str,
    sparse: str,
    *,
    config: str | None = None,
    lengths: Sequence[int] = (8192, 32768),
    rounds: int = 3,
    clients: int = 16,
    requests: int = 32,
    load_tokens: tuple[int, int] | None = None,
    new_tokens: int = 128,
    out: Path | str | None = None,
    show: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Rows of `first token`, `decode` and `load`, one for each server and length, with ratios to stock.

    Prompts are random token ids, the same for both, new in every round. They begin with a few that are new in every
    run: no prefix cache answers for them. Servers on one machine take turns; each has the machine alone while it is
    asked. One server with sparsekit may be both: as the first it is asked for `off`.

    Args:
        stock, sparse: addresses, `http://host:port`.
        config: the request's choice at the second server; default the server's default.
        lengths: of prompts whose first token is timed.
        clients, requests, load_tokens, new_tokens: the mixed load: so many clients, prompts of lengths drawn evenly on
            a logarithmic scale (default 2,048 to 65,536 tokens, as far as the servers take them), tokens of an answer.
            0 requests leave it out.
        show: is given lines to print; with it, progress goes to stderr.

    Raises:
        SparsekitError: a server that does not answer, that is too short for a prompt, or has no sparsekit where it
            should; another answer on a short prompt than stock's; a prompt that came from a cache after all.
    """
    if not lengths or min(lengths) < 1 or min(rounds, clients, new_tokens) < 1 or requests < 0:
        raise SparsekitError("lengths, rounds, clients and new_tokens are 1 at least, requests 0 at least.")
    prompts, say = _Prompts(), show or (lambda _: None)
    servers = _servers(stock, sparse, config, prompts)
    _check_alike(servers, prompts)
    lengths = list(dict.fromkeys(lengths))
    for tokens in lengths:
        _check_room(servers, f"--tokens {tokens}", tokens, 1)
    sizes = {}
    if requests:
        sizes["decode"] = [DECODED] * clients
        sizes["load"] = _mix(requests, *_load_tokens(servers, load_tokens, new_tokens, say))
    facts, quiet = {"case": "serve", "model": servers[1].model, "rounds": rounds}, show is None
    with Record(out, place(torch.device("cpu"))) as record:

        def add(server: Server, **row: Any) -> None:
            record.add({**facts, "server": server.name, "config": server.choice, **row})
            say(_line(record.rows[-1]))

        say(
            f"time to the first token, median (p20-p80) of {rounds}; x: stock's time through this one's, "
            "above 1 is faster"
        )
        for tokens in lengths:
            found = _first_tokens(servers, prompts, tokens, rounds, quiet)
            for server, all_ms in zip(servers, found, strict=True):
                ms = spread(all_ms)
                add(server, kind="first token", tokens=tokens, **ms, faster=_ratio(median(found[0]), ms["ms"]))
            if why := _untold(*found):
                say(f"{'':>17}  {why}: more --rounds may tell them apart")
        if requests:
            say(
                f"{clients} clients, {new_tokens} tokens an answer; x: this one's rate through stock's, "
                "above 1 is faster"
            )
        for kind, all_tokens in sizes.items():
            base: dict[str, Any] = {}
            for server in servers:
                with progress(f"{kind}, {server.name}", len(all_tokens), quiet=quiet) as bar:
                    row = _load(server, prompts, kind, all_tokens, clients, new_tokens, bar)
                base = base or row
                faster = _ratio(row["requests_per_second"], base["requests_per_second"])
                add(server, kind=kind, clients=clients, new_tokens=new_tokens, **row, faster=faster)
    return record.rows


# ---- what is asked, and of whom


class _Prompts:
    """Prompts by use, length and seed: the same in every run, but for a few tokens at their beginning."""

    def __init__(self) -> None:
        self.run = secrets.token_hex(8)

    def __call__(self, use: str, tokens: int, seed: int) -> list[int]:
        nonce, ids = Random(f"{self.run} {use} {tokens} {seed}"), Random(f"{use} {tokens} {seed}")
        return [*nonce.choices(IDS, k=NONCE), *ids.choices(IDS, k=tokens)][:tokens]


def _servers(stock: str, sparse: str, config: str | None, prompts: _Prompts) -> list[Server]:
    if config == OFF:
        raise SparsekitError(f"--config {OFF}: that is stock vLLM, which would be timed against itself; name a config.")
    first, second = server_at(stock, "stock"), server_at(sparse, "sparsekit", config)
    if has_sparsekit(first):
        first = first._replace(choice=OFF)
    if not has_sparsekit(second):
        raise SparsekitError(
            f"{second.url} has no sparsekit: it ignores a request's config. The second server is one that was started "
            "with --additional-config '{\"sparsekit\": CONFIG}'."
        )
    return [server._replace(salt=f"{prompts.run}-{server.name}") for server in (first, second)]


def _check_room(servers: Sequence[Server], option: str, tokens: int, new_tokens: int) -> None:
    """That a prompt and its answer fit, by what the servers say of themselves."""
    for server in servers:
        if server.limit is not None and tokens + new_tokens > server.limit:
            answer = "an answer's first token" if new_tokens == 1 else f"an answer of {new_tokens:,} tokens"
            raise SparsekitError(
                f"{option}: a prompt of {tokens:,} tokens and {answer} need more than the {server.limit:,} "
                f"positions of {server.url} (--max-model-len)."
            )


def _load_tokens(
    servers: Sequence[Server], asked: tuple[int, int] | None, new_tokens: int, say: Callable[[str], None]
) -> tuple[int, int]:
    """The shortest and the longest prompt of the mixed load."""
    _check_room(servers, f"--new-tokens {new_tokens}", DECODED, new_tokens)
    if asked is not None:
        _check_room(servers, f"--load-tokens {asked[0]},{asked[1]}", asked[1], new_tokens)
        return asked
    least, most = (min([size, *(x.limit - new_tokens for x in servers if x.limit is not None)]) for size in LOAD)
    if most < LOAD[1]:
        say(f"--load-tokens {least},{most}: longer prompts do not fit the servers' --max-model-len")
    return least, most


def _mix(requests: int, least: int, most: int) -> list[int]:
    pick = Random(0)
    return [round(least * (most / least) ** pick.random()) for _ in range(requests)]


def _check_alike(servers: Sequence[Server], prompts: _Prompts) -> None:
    """Both say the same on a prompt that is too short to run sparse, twice each."""
    tokens = min([SHORT, *(server.limit - SAID for server in servers if server.limit is not None)])
    said = {server.name: {ask(server, prompts("alike", tokens, 0), SAID).text for _ in range(2)} for server in servers}
    if said["stock"] != said["sparsekit"]:
        raise SparsekitError(
            f"on a short prompt the servers say {shown(said)}: they do not serve the same model in the same way."
        )


# ---- times


def _timed(server: Server, ids: Sequence[int], new_tokens: int) -> Answer:
    answer = ask(server, ids, new_tokens)
    if answer.cached:
        raise SparsekitError(
            f"{server.url}: {answer.cached:,} of a prompt's {len(ids):,} tokens came from a cache, so that its time is "
            "not the prompt's; start the server with --no-enable-prefix-caching and without a KV connector."
        )
    return answer


def _first_tokens(
    servers: Sequence[Server], prompts: _Prompts, tokens: int, rounds: int, quiet: bool
) -> list[list[float]]:
    """Milliseconds of each server, which take turns; after a reading of each that does not count."""
    times: list[list[float]] = [[] for _ in servers]
    with progress(f"{tokens:,} tokens", len(servers) * (rounds + 1), quiet=quiet) as bar:
        bar.says(f"{tokens:,} tokens: a reading of each server that does not count, then {rounds}")
        for turn in range(rounds + 1):
            for server, all_ms in list(zip(servers, times, strict=True))[:: 1 if turn % 2 else -1]:
                first = _timed(server, prompts("first token", tokens, turn), 1).times[0] * 1e3
                all_ms += [first] * (turn > 0)
                bar(1)
    return times


def _untold(stock: Sequence[float], sparse: Sequence[float]) -> str:
    """Why times do not tell which server is faster, or nothing."""
    if len(stock) < 2:
        return "one round has no spread"
    (low, high), (other_low, other_high) = ((x["ms_p20"], x["ms_p80"]) for x in (spread(stock), spread(sparse)))
    return "these p20-p80 overlap" if low <= other_high and other_low <= high else ""


def _load(
    server: Server, prompts: _Prompts, kind: str, sizes: Sequence[int], clients: int, new_tokens: int, bar: Bar
) -> dict[str, Any]:
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
                answer = _timed(server, prompts(kind, tokens, seed), new_tokens)
            except Exception as error:  # told where the loop is waited for
                failed.append(error)
                return
            with lock:
                answers.append(answer)
                bar(1)

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


def _ratio(a: float, b: float) -> float:
    return round(a / b, 4)


def _at(values: Sequence[float], share: float) -> float:
    return values[min(int(len(values) * share), len(values) - 1)]


# ---- words


def _line(row: dict[str, Any]) -> str:
    default = ", its default config" if row["server"] == "sparsekit" else ""
    name = row["server"] + (f", config {row['config']}" if row["config"] else default)
    if row["kind"] == "first token":
        return (
            f"{row['tokens']:>10,} tokens  {row['ms']:10.1f} ms ({row['ms_p20']:.1f}-{row['ms_p80']:.1f})  "
            f"{row['faster']:.3f} x  {name}"
        )
    return (
        f"{row['kind']:>17}  {row['requests_per_second']:8.3f} requests/s  {row['faster']:.3f} x  gap p50 "
        f"{row['gap_ms_p50']:.1f} ms, p99 {row['gap_ms_p99']:.1f} ms  {name}"
    )


def command(
    stock: Annotated[str, typer.Argument(help="Address of vLLM as it is, http://host:port.")],
    sparse: Annotated[str, typer.Argument(help="Address of vLLM with sparsekit.")],
    config: Annotated[str | None, typer.Option(help="Of the second server's configs; default its default.")] = None,
    tokens: Lengths = "8192,32768",
    rounds: Annotated[int, typer.Option(min=1, help="Timed readings of each length.")] = 3,
    clients: Annotated[int, typer.Option(min=1, help="Of the mixed load.")] = 16,
    requests: Annotated[int, typer.Option(min=0, help="Of the mixed load; 0: none.")] = 32,
    load_tokens: Annotated[
        str | None,
        typer.Option(help="Shortest and longest prompt of the mixed load; default 2048,65536, as far as they fit."),
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer in the mixed load.")] = 128,
    output: Rows = None,
) -> None:
    """Time to the first token, decoding and a mixed load: vLLM with sparsekit against vLLM, in turns over HTTP."""
    ends = None if load_tokens is None else numbers_of(load_tokens, "--load-tokens")
    if ends is not None and (len(ends) != 2 or ends[0] > ends[1] or ends[0] < 1):
        raise SparsekitError(f"--load-tokens {shown(load_tokens)}: the shortest and the longest, such as 2048,65536.")
    bench_serve(
        stock, sparse, config=config, lengths=numbers_of(tokens, "--tokens"), rounds=rounds, clients=clients,
        requests=requests, load_tokens=None if ends is None else (ends[0], ends[1]), new_tokens=new_tokens, out=output,
        show=typer.echo,
    )  # fmt: skip
