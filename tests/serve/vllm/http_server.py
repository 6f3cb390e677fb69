"""A real HTTP server of vLLM on a CPU, started as a user would start it, and how to ask it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from sparsekit.serve.vllm.meter import FOLDER


class Server(NamedTuple):
    url: str
    process: subprocess.Popen[bytes]  # leads a group of its own, with all that it starts
    log: Path


@contextmanager
def serving(model: Path, log: Path, options: Sequence[str], sparsekit: Any = None) -> Iterator[Server]:
    """A server that answers, as model `m`; nothing of it is left afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if sparsekit is not None:
        options = [*options, "--additional-config", json.dumps({"sparsekit": sparsekit})]
    environment = {
        **os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO", "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
        FOLDER: "/the/folder/of/another/server",
    }  # fmt: skip
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port),
        "--served-model-name", "m", "--dtype", "float32", "--enforce-eager", *options,
    ]  # fmt: skip
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        url, until = f"http://127.0.0.1:{port}", time.monotonic() + 400
        while True:
            assert process.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        yield Server(url, process, log)
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, number)
            process.wait(30)


def complete(url: str, *, timeout: float = 300, **body: Any) -> Any:
    """An answer of /v1/completions, greedy."""
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps({"model": "m", "temperature": 0, **body}).encode(),
        {"Content-Type": "application/json"},
    )  # fmt: skip
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return json.load(answer)
