"""A client of vLLM's HTTP server for `sparsekit bench serve`: what a server is, and when the tokens of an answer come.

Whatever a server says in place of an answer ends in one line: an HTTP error, an error in a stream that began, a stream
that breaks off, JSON of another kind of server.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from typing import Any, NamedTuple

from sparsekit.errors import SparsekitError, shown
from sparsekit.serve.vllm.settings import KEY

__all__ = ["Answer", "Server", "ask", "has_sparsekit", "server_at"]

TIMEOUT = 1800.0  # of an answer, seconds


class Server(NamedTuple):
    """One of the two, and what a request to it says.

    Attributes:
        limit: positions that a prompt and its answer have together; None where the server does not tell.
        choice: of the server's configs, or `off`; None: its default, or a server without sparsekit.
        salt: keeps pages of its prefix cache apart from those of other runs, and of the other one where both are one.
    """

    name: str
    url: str
    model: str
    limit: int | None
    choice: str | None
    salt: str = ""


class Answer(NamedTuple):
    """When tokens of one request came: seconds from its sending; what they said; and how many of the prompt's tokens a
    prefix cache had, which servers tell that were started with `--enable-prompt-tokens-details`."""

    times: list[float]
    text: str
    cached: int | None


def server_at(url: str, name: str, choice: str | None = None) -> Server:
    """The server of an address.

    Raises:
        SparsekitError: there is none.
    """
    url = url.rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise SparsekitError(f"{shown(url)}: want the address of a server, such as http://127.0.0.1:8000.")
    with _answered(f"{url}/v1/models") as answer:
        model = json.load(answer)["data"][0]
        return Server(name, url, str(model["id"]), model.get("max_model_len"), choice)


def has_sparsekit(server: Server) -> bool:
    """Whether a server minds a config that there is not; one without sparsekit ignores it."""
    try:
        ask(server._replace(choice=""), [10], 1)
    except SparsekitError as error:
        if f"{KEY}=''" in str(error):
            return True
        raise
    return False


def ask(server: Server, ids: Sequence[int], new_tokens: int) -> Answer:
    """One answer, streamed.

    Raises:
        SparsekitError: what the server says in place of it.
    """
    body = {
        "model": server.model, "prompt": list(ids), "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True,
        "stream": True, "stream_options": {"include_usage": True},
        **({"cache_salt": server.salt} if server.salt else {}),
        **({} if server.choice is None else {"vllm_xargs": {KEY: server.choice}}),
    }  # fmt: skip
    url, times, text, cached = f"{server.url}/v1/completions", list[float](), "", None
    begun = time.perf_counter()
    with _answered(url, body) as answer:
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            came, event = time.perf_counter() - begun, json.loads(line[6:])
            if "error" in event:  # vLLM sends the status of a stream before it looks at the request
                raise SparsekitError(f"{url}: {_said(line[6:])}")
            for choice in event["choices"]:
                times.append(came)
                text += choice["text"]
            cached = ((event.get("usage") or {}).get("prompt_tokens_details") or {}).get("cached_tokens", cached)
    if not times:
        raise SparsekitError(f"{url}: no token came for a prompt of {len(ids):,} tokens.")
    return Answer(times, text, cached)


@contextmanager
def _answered(url: str, body: Any = None) -> Iterator[Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            yield answer
    except SparsekitError:
        raise
    except urllib.error.HTTPError as error:
        raise SparsekitError(f"{url}: {error.code} {_said(error.read())}") from None
    except (OSError, HTTPException) as error:
        raise SparsekitError(f"{url}: {getattr(error, 'reason', error) or error!r}; is the server up?") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise SparsekitError(f"{url}: that is no answer of vLLM's: {error!r}.") from None


def _said(body: bytes) -> str:
    """The message of an error's JSON, whole; of anything else its beginning."""
    text = body.decode(errors="replace")
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return shown(text)
