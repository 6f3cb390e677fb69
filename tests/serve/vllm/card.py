# ruff: noqa: E501
"""vLLM with CUDA kernels on one GPU: correctness over each backend with graphs, then stock and sparsekit in turns.

    python tests/serve/vllm/card.py check OUT.jsonl [BACKEND ...]   explicit masks, per-request configs, graphs
    python tests/serve/vllm/card.py time OUT.jsonl [PART ...]       parts: chunked whole decode load load-uniform, in turn
    python tests/serve/vllm/card.py all OUT.jsonl [PART ...]        the checks of all backends while the engines start, then `time`

Each line of OUT.jsonl is one record. Two engines share the GPU, and only one of them computes at any moment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE)]
os.environ.update(
    HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1", VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_USE_FLASHINFER_SAMPLER="0", TOKENIZERS_PARALLELISM="false",
)  # fmt: skip
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

T = "{name: triangle, sink_tokens: 8, window_tokens: 64, last_tokens: 32}"
A = "{name: a_shape, sink_tokens: 100, window_tokens: 40}"
HEAD = "version: 1\nmin_queries: 16\n"
CHECKED = {
    "dense": HEAD + "default: dense\ndense_impl: kernel\n",
    "triangle": HEAD + f"default: {T}\n",
    "a_shape": HEAD + f"default: {A}\n",
    "heads": HEAD + f"default: dense\nheads: {{'0': {{'0-4': {T}}}, '1': {{'3-7': {A}}}}}\n",
}
TRIANGLE = "{name: triangle, sink_tokens: 8, window_tokens: 512, last_tokens: 128}"
BELOW = {
    "trianglemix": "dense",
    "block_topk": "{name: block_topk, top_k: 100, block_tokens: 64}",
    "vertical_slash": "{name: vertical_slash, vertical_tokens: 1000, slash_tokens: 6096}",
}
TIMED = {
    name: f"version: 1\ndense_below_tokens: 4096\ndefault: {below}\nlayers: {{'16-31': {TRIANGLE}}}\n"
    for name, below in BELOW.items()
}
LLAMA_8B = dict(  # noqa: C408
    architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=4096, intermediate_size=14336,
    num_hidden_layers=int(os.environ.get("CARD_LAYERS", 32)), num_attention_heads=32, num_key_value_heads=8, head_dim=128,
    vocab_size=128256, max_position_embeddings=262144, rms_norm_eps=1e-5, rope_theta=500000.0,
    tie_word_embeddings=False, torch_dtype="bfloat16", hidden_act="silu", bos_token_id=1, eos_token_id=2,
    attention_bias=False, mlp_bias=False,
)  # fmt: skip
if os.environ.get("CARD_TINY"):  # the script itself, tried on a CPU
    LLAMA_8B |= dict(  # noqa: C408
        hidden_size=64, intermediate_size=64, head_dim=32, num_attention_heads=2, num_key_value_heads=1,
                     vocab_size=1000, torch_dtype="float32")  # fmt: skip
LONGEST = int(os.environ.get("CARD_TOKENS", 131072))
CHUNK = 8192


def note(path: str, **record: Any) -> None:
    line = json.dumps(record)
    print(line, flush=True)
    with open(path, "a") as file:
        file.write(line + "\n")


# ---- correctness


def check(out: str, backend: str) -> None:
    """One engine, all configs in one batch of chunks of 512 beside decodes, graphs on; against float32 masks."""
    import torch
    from tiny_llama import Reference, prompt, save_tiny_llama
    from vllm import LLM, SamplingParams

    folder = save_tiny_llama(Path(tempfile.mkdtemp()))
    llm = LLM(
        str(folder), skip_tokenizer_init=True, dtype="bfloat16", seed=0, max_model_len=8192, max_num_batched_tokens=512,
        enable_prefix_caching=False, gpu_memory_utilization=0.05, kv_cache_memory_bytes=1_000_000_000, max_num_seqs=64,
        attention_config={"backend": backend}, additional_config={"sparsekit": {"configs": CHECKED, "default": "triangle"}},
    )  # fmt: skip
    names = [*CHECKED, "off"]
    asked = [(prompt(n, seed=i), name) for name in names for i, n in enumerate((300, 1500, 40, 777, 5, 5000))]
    params = [
        SamplingParams(max_tokens=6, temperature=0, detokenize=False, logprobs=20, ignore_eos=True,
                       extra_args={"sparsekit": name})
        for _, name in asked
    ]  # fmt: skip
    outputs = llm.generate([{"prompt_token_ids": ids} for ids, _ in asked], params, use_tqdm=False)
    report = llm.collective_rpc("sparsekit_report")[0]
    reference = Reference(folder)
    reference.to("cuda")
    for name in names:
        far: dict[str, list[float]] = {"its mask": [], "causal": []}
        for (ids, asked_name), output in zip(asked, outputs, strict=True):
            if asked_name != name:
                continue
            for against, config in (("its mask", CHECKED.get(name) if len(ids) >= 16 else None), ("causal", None)):
                tokens = list(output.outputs[0].token_ids)
                want = reference.log_probabilities([*ids, *tokens[:-1]], len(ids), config)
                far[against] += [
                    abs(want[step, int(token)].item() - one.logprob)
                    for step, best in enumerate(output.outputs[0].logprobs)
                    for token, one in best.items()
                ]
        note(out, part="check", backend=backend, config=name, runner=report["runner"], told=report["backend"],
             **{f"{stat} from {k}": round(v, 4) for k, x in far.items() for stat, v in (("mean", sum(x) / len(x)), ("max", max(x)))})  # fmt: skip
    ran = {
        name: {"chunks": {i: x["chunks"] for i, x in config["layers"].items()}, "fallbacks": config["fallbacks"]}
        for name, config in report["configs"].items()
    }
    note(out, part="check", backend=backend, configs=ran, memory=torch.cuda.max_memory_allocated())


# ---- speed: an engine that does as it is told, line by line


def engine(kind: str) -> None:
    import torch

    if kind == "stock":
        os.environ["VLLM_PLUGINS"] = ""  # the plugin is not even loaded
    from vllm import LLM, SamplingParams

    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    extra = {} if kind == "stock" else {
        "additional_config": {"sparsekit": {"configs": TIMED, "default": "trianglemix"}}
    }  # fmt: skip
    begun = time.perf_counter()
    llm = LLM(
        str(folder), load_format="dummy", skip_tokenizer_init=True, dtype=LLAMA_8B["torch_dtype"], seed=0, max_model_len=LONGEST + 512,
        max_num_batched_tokens=LONGEST, enable_prefix_caching=False, max_num_seqs=32, disable_log_stats=True,
        gpu_memory_utilization=0.2, kv_cache_memory_bytes=int(os.environ.get("CARD_KV_BYTES", 36_000_000_000)),
        **({
            "attention_config": {"backend": "FLASH_ATTN"},
            "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32]},
        } if torch.cuda.is_available() else {"enforce_eager": True}), **extra,
    )  # fmt: skip
    core = llm.llm_engine
    scheduler = core.engine_core.engine_core.scheduler

    def prompt(tokens: int, seed: int) -> list[int]:
        return torch.randint(
            3, LLAMA_8B["vocab_size"] - 10, (tokens,), generator=torch.Generator().manual_seed(seed)
        ).tolist()

    def params(tokens: int, config: str | None) -> Any:
        named = {"sparsekit": config} if config and kind != "stock" else None
        return SamplingParams(max_tokens=tokens, temperature=0, detokenize=False, ignore_eos=True, extra_args=named)

    def first_token(tokens: int, seed: int, config: str | None) -> dict[str, Any]:
        ids = prompt(tokens, seed)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        llm.generate([{"prompt_token_ids": ids}], params(1, config), use_tqdm=False)
        seconds = time.perf_counter() - start
        return {
            "seconds": seconds,
            **({"peak": torch.cuda.max_memory_allocated()} if torch.cuda.is_available() else {}),
        }

    def load(requests: list[list[int]], clients: int, out_tokens: int, config: str | None) -> dict[str, Any]:
        """A closed loop of clients; times of each request's tokens, as the engine gives them."""
        waiting = [(str(i), prompt(n, seed)) for i, (n, seed) in enumerate(requests)]
        begun: dict[str, float] = {}
        times: dict[str, list[float]] = {}
        counts: dict[str, int] = {}
        start = time.perf_counter()
        while waiting or len(times) > sum(counts.get(r, 0) >= out_tokens for r in times):
            while waiting and sum(counts.get(r, 0) < out_tokens for r in begun) < clients:
                name, ids = waiting.pop(0)
                begun[name], times[name] = time.perf_counter(), []
                core.add_request(name, {"prompt_token_ids": ids}, params(out_tokens, config))
            for output in core.step():
                done = len(output.outputs[0].token_ids)
                if done > counts.get(output.request_id, 0):
                    times[output.request_id].append(time.perf_counter())
                    counts[output.request_id] = done
        wall = time.perf_counter() - start
        firsts = sorted(t[0] - begun[r] for r, t in times.items())
        gaps = sorted(b - a for t in times.values() for a, b in pairwise(t))

        def at(values: list[float], share: float) -> float | None:
            return values[min(int(len(values) * share), len(values) - 1)] if values else None

        return {
            "seconds": wall, "requests": len(requests), "requests_per_second": len(requests) / wall,
            "tokens": sum(n for n, _ in requests), "first_p50": at(firsts, 0.5), "first_p99": at(firsts, 0.99),
            "gap_p50": at(gaps, 0.5), "gap_p99": at(gaps, 0.99), "gaps": len(gaps),
        }  # fmt: skip

    def set_chunk(tokens: int) -> dict[str, Any]:
        scheduler.max_num_scheduled_tokens = tokens
        return {}

    def report() -> Any:
        return None if kind == "stock" else llm.collective_rpc("sparsekit_report")[0]

    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    print("READY", json.dumps({"kind": kind, "seconds": time.perf_counter() - begun, "runner": type(runner).__module__,
                               "kv_tokens": scheduler.kv_cache_config.num_blocks * 16}), flush=True)  # fmt: skip
    calls = {"first_token": first_token, "load": load, "set_chunk": set_chunk, "report": report}
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            print("DONE", json.dumps(calls[name](**arguments)), flush=True)
        except Exception as error:  # the parent notes it, and goes on with the other parts
            print("DONE", json.dumps({"error": repr(error)[:1000]}), flush=True)


class Engine:
    def __init__(self, kind: str) -> None:
        self.kind = kind
        log = Path(os.environ.get("OUT", "/tmp"), f"engine-{kind}.log").open("w")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, __file__, "engine", kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )

    def wait(self, word: str) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(word + " "):
                return json.loads(line[len(word) + 1 :])
        raise SystemExit(f"the {self.kind} engine ended: see engine-{self.kind}.log")

    def __call__(self, name: str, **arguments: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([name, arguments]) + "\n")
        self.process.stdin.flush()
        return self.wait("DONE")


def bounds(stock: Engine, mix: list[int]) -> dict[str, float]:
    """The most that a mix of prompts can gain in requests a second, if half of attention, or all of it, cost nothing.

    Stock's time to a first token is a*n + b*n**2, from two lengths. Decoding, which neither changes, is not counted.
    """
    n, m = LONGEST // 16, LONGEST // 2
    for tokens in (n, m):
        stock("set_chunk", tokens=CHUNK)
        stock("first_token", tokens=tokens, seed=0, config=None)
    at_n, at_m = (stock("first_token", tokens=tokens, seed=1, config=None)["seconds"] for tokens in (n, m))
    b = (at_m / m - at_n / n) / (m - n)
    a = at_n / n - b * n
    linear, attention = sum(a * tokens for tokens in mix), sum(b * tokens**2 for tokens in mix)
    both = linear + attention
    return {"prefill_seconds": both, "bound_half": both / (linear + attention / 2), "bound_all": both / linear}


def timed(out: str, parts: list[str], checks: list[subprocess.Popen[bytes]]) -> None:
    import random

    engines = {kind: Engine(kind) for kind in ("stock", "sparsekit")}
    for engine in engines.values():
        note(out, part="start", **engine.wait("READY"))
    for one in checks:  # nothing else computes while engines are timed
        one.wait(280)
    stock, ours = engines["stock"], engines["sparsekit"]
    arms = [(stock, None), (ours, "trianglemix")]
    lengths = [int(n) for n in os.environ.get("CARD_LENGTHS", "131072,32768,8192,4096").split(",") if int(n) <= LONGEST]

    def in_turns(part: str, chunk: int, arms: list[Any], tokens: int, rounds: int) -> None:
        for engine, _ in arms:
            engine("set_chunk", tokens=chunk)
        for turn in range(rounds):
            for engine, config in arms if turn % 2 == 0 else arms[::-1]:
                got = engine("first_token", tokens=tokens, seed=turn, config=config)
                note(out, part=part, chunk=chunk, tokens=tokens, turn=turn, engine=engine.kind, config=config, **got)

    def loaded(part: str, spread: str, turn: int) -> None:
        pick = random.Random(1)
        drawn = [pick.random() for _ in range(32 if spread == "log-uniform" else 24)]
        sizes = [2048 * 32**x if spread == "log-uniform" else 2048 + x * (65536 - 2048) for x in drawn]
        mix = [[min(int(n), LONGEST // 2), i] for i, n in enumerate(sizes)]
        if turn == 0:
            note(out, part=part, spread=spread, requests=len(mix), **bounds(stock, [n for n, _ in mix]))
        loads = [*arms, (ours, "block_topk")]
        for engine, config in loads if turn % 2 == 0 else loads[::-1]:
            engine("set_chunk", tokens=CHUNK)
            got = engine("load", requests=mix, clients=16, out_tokens=128, config=config)
            note(out, part=part, spread=spread, turn=turn, engine=engine.kind, config=config, **got)

    for i, part in enumerate(parts):
        if part == "chunked":
            for tokens in lengths:
                rounds = 2 if tokens > 40000 else 5
                in_turns(part, CHUNK, [*arms, (ours, "off")] if tokens == 8192 else arms, tokens, rounds)
        elif part == "whole":
            for tokens in lengths[:2]:
                dynamic = [(ours, "block_topk"), (ours, "vertical_slash")]
                in_turns(part, LONGEST, [*arms, *dynamic], tokens, 2 if tokens > 40000 else 4)
        elif part == "decode":
            for turn in range(2):
                for engine, config in arms if turn % 2 == 0 else arms[::-1]:
                    engine("set_chunk", tokens=CHUNK)
                    got = engine(
                        "load", requests=[[2048, i] for i in range(16)], clients=16, out_tokens=256, config=config
                    )
                    note(out, part=part, turn=turn, engine=engine.kind, config=config, **got)
        else:
            loaded(part, {"load": "log-uniform", "load-uniform": "uniform"}[part], parts[:i].count(part))
    note(out, part="report", report=ours("report"))
    for one in engines.values():
        one.process.stdin.close()  # type: ignore[union-attr]
        one.process.wait(60)


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "engine":
        engine(rest[0])
    elif what == "check" and len(rest) == 2:
        check(*rest)
    else:
        backends = (
            rest[1:] if what == "check" else ["FLASH_ATTN", "TRITON_ATTN", "FLEX_ATTENTION"] if what == "all" else []
        )
        checks = []
        for backend in backends:
            with open(f"{rest[0]}.{backend}.log", "w") as log:
                checks.append(subprocess.Popen([sys.executable, __file__, "check", rest[0], backend], stderr=log))
        if what != "check":
            timed(rest[0], rest[1:] or ["chunked", "whole", "decode", "load", "load-uniform"], checks)
        sys.exit(max((one.wait(280) for one in checks), default=0))
