"""A real HTTP server with a real model, started and asked as a user would."""

from __future__ import annotations

import json
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from http_server import Server, complete, serving

from sparsekit.serve.vllm.meter import FOLDER

ROOT = Path(__file__).parents[3]
CONFIG = ROOT / "configs/smollm2-135m/trianglemix.yaml"


@pytest.fixture(scope="module")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sparsekit.models import load

    folder = tmp_path_factory.mktemp("smollm2")
    model, tokenizer = load("smollm2-135m", dtype="float32")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


OPTIONS = ("--max-model-len", "8192", "--max-num-batched-tokens", "1024")


@pytest.fixture(scope="module")
def server(smollm: Path) -> Iterator[Server]:
    settings = {"configs": {"trianglemix": str(CONFIG)}, "default": "trianglemix"}
    with serving(smollm, smollm / "server.log", OPTIONS, settings) as started:
        yield started


def _text(sentences: int, key: int) -> str:
    filler = [f"On day {i} the caravan walked {i * 7 % 40 + 3} miles and rested by a well." for i in range(sentences)]
    filler.insert(sentences // 3, f"The pass key is {key}. Remember it.")
    return " ".join(filler) + " What is the pass key? The pass key is"


def test_a_served_model_says_what_apply_says(server: Server, smollm: Path) -> None:
    """The same greedy tokens as transformers under the same config, and other ones' log probabilities."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import sparsekit

    model = AutoModelForCausalLM.from_pretrained(smollm, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    for sentences, key in ((60, 71432), (90, 90281)):
        ids = tokenizer(_text(sentences, key)).input_ids
        assert len(ids) > 1000
        got = complete(server.url, prompt=ids, max_tokens=8, logprobs=1, return_tokens_as_token_ids=True)["choices"][0]
        with sparsekit.apply(model, CONFIG), torch.inference_mode():
            want = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :].tolist()
        assert [int(x.removeprefix("token_id:")) for x in got["logprobs"]["tokens"]] == want
        dense = complete(server.url, prompt=ids, max_tokens=8, logprobs=1, vllm_xargs={"sparsekit": "off"})["choices"][
            0
        ]
        assert dense["logprobs"]["token_logprobs"] != got["logprobs"]["token_logprobs"]  # the sparse layers did run


@pytest.mark.parametrize("stream", [False, True])
def test_unknown_names_are_a_400(server: Server, stream: bool) -> None:
    """Also where the answer is to be streamed, whose status vLLM sends before it processes the request."""
    with pytest.raises(urllib.error.HTTPError) as error:
        complete(server.url, prompt="Hello", max_tokens=1, stream=stream, vllm_xargs={"sparsekit": "trianglemx"})
    assert error.value.code == 400
    said = json.load(error.value)["error"]["message"]
    assert said == "sparsekit='trianglemx': this server has off, trianglemix. Did you mean 'trianglemix'?"


def test_metrics_stand_beside_vllms(server: Server) -> None:
    complete(server.url, prompt=list(range(100, 1700)), max_tokens=1)
    until = time.monotonic() + 20
    while True:
        with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        ours = {line.split(" ")[0]: float(line.split(" ")[-1]) for line in lines if line.startswith("sparsekit:")}
        if ours or time.monotonic() > until:
            break
        time.sleep(0.5)
    assert any(line.startswith("vllm:") for line in lines)
    last = '{config="trianglemix",layer="29"'
    chunks = [value for name, value in ours.items() if name.startswith(f"sparsekit:chunks_total{last}")]
    assert chunks and chunks[0] >= 1, ours
    density = [value for name, value in ours.items() if name.startswith(f"sparsekit:density{last}")]
    assert density and 0 < density[0] < 1
    started = [line for line in server.log.read_text().splitlines() if "sparsekit 0" in line]
    assert "over CPU_ATTN, config 'trianglemix': layers 0-20: vLLM (dense); layers 21-29: triangle(" in started[0]


def _killed(server: Server) -> dict[str, Any]:
    """What a server says and leaves when a worker is killed while it answers."""
    said: list[str] = []

    def ask() -> None:
        try:
            complete(server.url, prompt=list(range(100, 1700)), max_tokens=4000, ignore_eos=True)
            said.append("answered")
        except OSError:
            said.append("failed")

    processes = psutil.Process(server.process.pid).children(recursive=True)
    worker = next(each for each in processes if any("VLLM::Worker" in part for part in each.cmdline()))
    folder = worker.environ().get(FOLDER)
    asking = threading.Thread(target=ask)
    asking.start()
    time.sleep(3)
    worker.send_signal(signal.SIGKILL)
    asking.join(120)
    code = server.process.wait(120)
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert folder is None or not Path(folder).exists()
    return {"request": said, "exit": code, "left": [each.name() for each in alive]}


def test_a_killed_worker_ends_the_server_as_it_ends_vllm(server: Server, smollm: Path) -> None:
    """The last test here: it ends the server."""
    ours = _killed(server)
    with serving(smollm, smollm / "stock.log", OPTIONS) as stock:
        assert ours == _killed(stock)
    assert ours["request"] == ["failed"]
    assert ours["left"] == []
