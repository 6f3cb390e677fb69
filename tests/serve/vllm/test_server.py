"""Several processes: two ranks, and a real HTTP server with a real model."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine import CONFIGS, HEAD, ROUNDING, A, T, generate
from tiny_llama import Reference, largest_difference, prompt

ROOT = Path(__file__).parents[3]
CONFIG = ROOT / "configs/smollm2-135m/trianglemix.yaml"


def test_two_ranks_have_their_heads(
    start: Callable[..., Any], reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rules by head under tensor parallelism: each rank runs those of its heads, found through the entry point."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    crossing = HEAD + f"default: dense\nheads: {{'0': {{'0-4': {T}, '5-7': {A}}}, '1': {{'3-7': {T}}}}}\n"
    llm = start(
        {"configs": {"heads": crossing, "triangle": CONFIGS["triangle"]}, "default": "heads"},
        tensor_parallel_size=2, distributed_executor_backend="mp",
    )  # fmt: skip
    prompts = [prompt(n, seed=n) for n in (700, 1100)]
    for name, config in (("heads", crossing), ("triangle", CONFIGS["triangle"])):
        for ids, output in zip(prompts, generate(llm, prompts, [name] * 2), strict=True):
            assert largest_difference(reference, config, ids, output.outputs[0]) < ROUNDING
    ranks = llm.collective_rpc("sparsekit_report")
    assert [said["rank"] for said in ranks] == [0, 1]
    assert all(said["layers"]["0"]["chunks"] > 0 for said in ranks)
    assert "heads 4: triangle" in ranks[1]["layers"]["0"]["patterns"]


# ---- HTTP


@pytest.fixture(scope="module")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sparsekit.models import load

    folder = tmp_path_factory.mktemp("smollm2")
    model, tokenizer = load("smollm2-135m", dtype="float32")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(smollm: Path) -> Iterator[str]:
    """The address of a server that was started as a user would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"sparsekit": {"configs": {"trianglemix": str(CONFIG)}, "default": "trianglemix"}}
    log = smollm / "server.log"
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    with log.open("w") as out:
        process = subprocess.Popen(
            [
                sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(smollm), "--port", str(port),
                "--served-model-name", "m", "--dtype", "float32", "--enforce-eager", "--max-model-len", "8192",
                "--max-num-batched-tokens", "1024", "--additional-config", json.dumps(settings),
            ],
            stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
        )  # fmt: skip
        address, until = f"http://127.0.0.1:{port}", time.monotonic() + 400
        try:
            while True:
                assert process.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
                try:
                    urllib.request.urlopen(f"{address}/health", timeout=5)
                    break
                except OSError:
                    time.sleep(0.5)
            yield address
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def _complete(address: str, **body: Any) -> Any:
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps({"model": "m", "temperature": 0, **body}).encode(),
        {"Content-Type": "application/json"},
    )  # fmt: skip
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


def _text(sentences: int, key: int) -> str:
    filler = [f"On day {i} the caravan walked {i * 7 % 40 + 3} miles and rested by a well." for i in range(sentences)]
    filler.insert(sentences // 3, f"The pass key is {key}. Remember it.")
    return " ".join(filler) + " What is the pass key? The pass key is"


def test_a_served_model_says_what_apply_says(server: str, smollm: Path) -> None:
    """The same greedy tokens as transformers under the same config, and other ones' log probabilities."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import sparsekit

    model = AutoModelForCausalLM.from_pretrained(smollm, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    for sentences, key in ((60, 71432), (90, 90281)):
        ids = tokenizer(_text(sentences, key)).input_ids
        assert len(ids) > 1000
        got = _complete(server, prompt=ids, max_tokens=8, logprobs=1, return_tokens_as_token_ids=True)["choices"][0]
        with sparsekit.apply(model, CONFIG), torch.inference_mode():
            want = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :].tolist()
        assert [int(x.removeprefix("token_id:")) for x in got["logprobs"]["tokens"]] == want
        dense = _complete(server, prompt=ids, max_tokens=8, logprobs=1, vllm_xargs={"sparsekit": "off"})["choices"][0]
        assert dense["logprobs"]["token_logprobs"] != got["logprobs"]["token_logprobs"]  # the sparse layers did run


def test_unknown_names_are_a_400(server: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as error:
        _complete(server, prompt="Hello", max_tokens=1, vllm_xargs={"sparsekit": "trianglemx"})
    assert error.value.code == 400
    said = json.load(error.value)["error"]["message"]
    assert said == "sparsekit='trianglemx': this server has off, trianglemix. Did you mean 'trianglemix'?"


def test_metrics_stand_beside_vllms(server: str, smollm: Path) -> None:
    _complete(server, prompt=list(range(100, 1700)), max_tokens=1)
    until = time.monotonic() + 20
    while True:
        with urllib.request.urlopen(f"{server}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        ours = {line.split(" ")[0]: float(line.split(" ")[-1]) for line in lines if line.startswith("sparsekit:")}
        if ours or time.monotonic() > until:
            break
        time.sleep(0.5)
    assert any(line.startswith("vllm:") for line in lines)
    chunks = [value for name, value in ours.items() if name.startswith('sparsekit:chunks_total{layer="29"')]
    assert chunks and chunks[0] >= 1, ours
    density = [value for name, value in ours.items() if name.startswith('sparsekit:density{layer="29"')]
    assert density and 0 < density[0] < 1
    started = [line for line in (smollm / "server.log").read_text().splitlines() if "sparsekit 0" in line]
    assert "over CPU_ATTN, config 'trianglemix': layers 0-20: vLLM (dense); layers 21-29: triangle(" in started[0]
