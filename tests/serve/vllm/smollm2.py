# ruff: noqa: E402
"""A real model in vLLM on a CPU: SmolLM2-135M, asked for one of four keys. In the environment of `make test-vllm`:

    python tests/serve/vllm/smollm2.py answers OUT.jsonl [COUNT]   over HTTP against sparsekit.apply in transformers
    python tests/serve/vllm/smollm2.py prefix OUT.jsonl [COUNT]    a chat's second turn, its first one cached, or not

Each line of OUT.jsonl is one record: a prompt, or the summary of all.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
sys.path[:0] = [str(ROOT), str(HERE)]
os.environ.update(
    HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1", VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1", TOKENIZERS_PARALLELISM="false",
)  # fmt: skip
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import torch
from http_server import complete, serving

import sparsekit
from sparsekit.lab.provenance import place
from sparsekit.lab.tasks import Sample, prompt_ids, task
from sparsekit.models import load

CONFIG = ROOT / "configs/smollm2-135m/trianglemix.yaml"
EVERYWHERE = {
    "version": 1, "dense_below_tokens": 1024,
    "default": {"name": "triangle", "sink_tokens": 8, "window_tokens": 512, "last_tokens": 128},
}  # fmt: skip
NEEDLE = task("needle4")
STEPS = NEEDLE.max_new_tokens


def recorder(path: str, part: str) -> Callable[..., None]:
    from transformers import __version__ as transformers_version
    from vllm import __version__

    file = Path(path)
    command = f"python tests/serve/vllm/smollm2.py {part} OUT {' '.join(sys.argv[3:])}".rstrip()
    versions = {"vllm": __version__, "transformers": transformers_version}
    where = {**place(torch.device("cpu")), **versions, "command": command}

    def note(**record: Any) -> None:
        line = json.dumps({"part": part, **record, **where})
        print(line[:300], flush=True)
        with file.open("a") as out:
            out.write(line + "\n")

    return note


def until_end(tokens: Sequence[int], tokenizer: Any) -> str:
    """What a greedy answer says: its tokens up to the one that ends it."""
    kept = tokens[: tokens.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in tokens else tokens
    return str(tokenizer.decode(kept, skip_special_tokens=True))


def saved(model: Any, tokenizer: Any) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="smollm2-"))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# ---- over HTTP against transformers


@torch.inference_mode()
def greedy(model: Any, ids: list[int]) -> tuple[list[int], list[torch.Tensor]]:
    """Greedy tokens and the log probabilities (vocabulary,) that each was chosen from."""
    tokens: list[int] = []
    rows: list[torch.Tensor] = []
    cache, step = None, torch.tensor([ids])
    for _ in range(STEPS):
        out = model(step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        rows.append(out.logits[0, -1].double().log_softmax(-1))
        tokens.append(int(rows[-1].argmax()))
        cache, step = out.past_key_values, torch.tensor([tokens[-1:]])
    return tokens, rows


def answers(out: str, count: int) -> None:
    """Prompts of 1K to 6K tokens: all asked of the server, then of transformers."""
    note = recorder(out, "answers")
    model, tokenizer = load("smollm2-135m", dtype="float32")
    lengths = [1100 + round(i * (6144 - 1100) / max(count - 1, 1)) for i in range(count)]
    samples = [NEEDLE.samples(tokenizer, tokens=n, count=1, seed=i)[0] for i, n in enumerate(lengths)]
    prompts = [prompt_ids(tokenizer, sample)[0].tolist() for sample in samples]
    folder = saved(model, tokenizer)
    options = ["--max-model-len", "8192", "--max-num-batched-tokens", "2048"]
    with serving(folder, folder / "server.log", options, str(CONFIG)) as server:
        asked = {"max_tokens": STEPS, "logprobs": 2, "return_tokens_as_token_ids": True, "ignore_eos": True}
        got = [complete(server.url, timeout=1800, prompt=ids, **asked)["choices"][0]["logprobs"] for ids in prompts]
    pairs = []
    with sparsekit.apply(model, CONFIG) as handle:
        for ids, sample, served in zip(prompts, samples, got, strict=True):
            tokens, rows = greedy(model, ids)
            ran = [layer.ran for layer in handle.report().layers]
            theirs = [int(token.removeprefix("token_id:")) for token in served["tokens"]]
            alike = next((i for i, (a, b) in enumerate(zip(tokens, theirs, strict=True)) if a != b), STEPS)
            margins = [float(row.topk(2).values.diff().abs()) for row in rows]
            far = [
                abs(rows[i][tokens[i]].item() - served["token_logprobs"][i]) for i in range(min(alike + 1, STEPS))
                if tokens[i] == theirs[i]
            ]  # fmt: skip
            scores = [NEEDLE.score(until_end(each, tokenizer), sample) for each in (tokens, theirs)]
            pairs.append((alike, scores, max(far, default=0.0), min(margins)))
            note(
                tokens=len(ids), seed=len(pairs) - 1, same_tokens=alike, of=STEPS,
                margin_there=margins[alike] if alike < STEPS else None, least_margin=min(margins),
                largest_difference=pairs[-1][2], score_transformers=scores[0], score_served=scores[1], answer=tokens,
                served=theirs, ran=ran,
            )  # fmt: skip
    found = [sum(scores[i] for _, scores, *_ in pairs) / count for i in range(2)]
    note(
        summary=True, prompts=count, lengths=[len(ids) for ids in prompts],
        token_differences=sum(alike < STEPS for alike, *_ in pairs),
        largest_difference=max(far for *_, far, _ in pairs), least_margin=min(margin for *_, margin in pairs),
        score_transformers=found[0], score_served=found[1],
    )  # fmt: skip


# ---- a warm prefix against a cold one


def second_turn(tokenizer: Any, sample: Sample, first: list[int]) -> tuple[list[int], Sample]:
    """The chat goes on: the first question's true answer, then a question for another of the keys."""
    facts = re.findall(r"magic numbers for (\S+) is: (\d+)\.", sample.prompt)
    key, number = next((key, n) for key, n in facts if n not in sample.answers)
    prefix = f"The special magic number for {key} mentioned in the provided text is"
    question = f"What is the special magic number for {key} mentioned in the provided text?"
    text = f" {sample.answers[0]}.<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{prefix}"
    ids = first + tokenizer(text, add_special_tokens=False).input_ids
    return ids, Sample(prompt=sample.prompt, answers=(number,), answer_prefix=prefix)


def kl(p: Mapping[int, Any], q: Mapping[int, Any]) -> float:
    """KL(p || q) in nats, of vLLM's log probabilities of the whole vocabulary."""
    tokens = sorted(p)
    a, b = (torch.tensor([x[t].logprob for t in tokens], dtype=torch.float64).log_softmax(0) for x in (p, q))
    return float((a.exp() * (a - b)).sum())


def distance(p: Any, q: Any) -> float:
    """Mean KL over the tokens of two greedy answers, as far as what was said before is the same."""
    same = 0
    while same + 1 < len(p.token_ids) and p.token_ids[same] == q.token_ids[same]:
        same += 1
    return sum(kl(p.logprobs[i], q.logprobs[i]) for i in range(same + 1)) / (same + 1)


def prefix(out: str, count: int, tokens: int = 1800) -> None:
    """The second turn of a chat, once beside its cached first turn, once alone; under each config, and dense alone."""
    import gc

    from vllm import LLM, SamplingParams

    note = recorder(out, "prefix")
    model, tokenizer = load("smollm2-135m", dtype="float32")
    folder = saved(model, tokenizer)
    del model
    samples = NEEDLE.samples(tokenizer, tokens=tokens, count=count, seed=0)
    firsts = [prompt_ids(tokenizer, sample)[0].tolist() for sample in samples]
    seconds = [second_turn(tokenizer, sample, ids) for sample, ids in zip(samples, firsts, strict=True)]
    configs = {"trianglemix": str(CONFIG), "everywhere": EVERYWHERE}
    cold: dict[tuple[str, int], Any] = {}
    rows: dict[tuple[str, str], list[dict[str, float]]] = {}
    for exact in (False, True):
        told = {"configs": configs, "default": "trianglemix", "exact_prefix": exact}
        llm = LLM(
            str(folder), dtype="float32", enforce_eager=True, seed=0, max_model_len=4096, max_num_batched_tokens=4096,
            enable_prefix_caching=True, block_size=32, max_logprobs=-1, additional_config={"sparsekit": told},
        )  # fmt: skip

        def ask(ids: list[int], config: str, salt: str, llm: Any = llm, logprobs: int | None = -1) -> Any:
            params = SamplingParams(
                max_tokens=STEPS, temperature=0, detokenize=False, logprobs=logprobs, ignore_eos=True,
                extra_args={"sparsekit": config},
            )  # fmt: skip
            return llm.generate([{"prompt_token_ids": ids, "cache_salt": salt}], params, use_tqdm=False)[0]

        for i, (first, (second, sample)) in enumerate(zip(firsts, seconds, strict=True)):
            if not exact:
                cold["off", i] = ask(second, "off", f"cold {i}").outputs[0]
            for config in configs:
                ask(first, config, f"chat {i}", logprobs=None)
                warm = ask(second, config, f"chat {i}")
                if not exact:
                    cold[config, i] = ask(second, config, f"cold {i}").outputs[0]
                found = {"warm": warm.outputs[0], "cold": cold[config, i], "dense": cold["off", i]}
                scores = {
                    f"score_{name}": NEEDLE.score(until_end(list(one.token_ids), tokenizer), sample)
                    for name, one in found.items()
                }
                row = {
                    "kl_cold_warm": distance(found["cold"], found["warm"]),
                    "kl_dense_cold": distance(found["dense"], found["cold"]),
                    "kl_dense_warm": distance(found["dense"], found["warm"]),
                    "same_answer": float(found["cold"].token_ids == found["warm"].token_ids), **scores,
                }  # fmt: skip
                case = f"exact_prefix {str(exact).lower()}"
                rows.setdefault((config, case), []).append(row)
                note(
                    config=config, exact_prefix=exact, seed=i, first_tokens=len(first), tokens=len(second),
                    cached_tokens=warm.num_cached_tokens, block_tokens=32, **row,
                )  # fmt: skip
        llm.llm_engine.engine_core.shutdown()
        del llm, ask
        gc.collect()
    for (config, case), each in rows.items():
        mean = {name: sum(row[name] for row in each) / len(each) for name in each[0]}
        note(
            summary=True, config=config, exact_prefix=case.endswith("true"), prompts=count,
            largest_kl_cold_warm=max(row["kl_cold_warm"] for row in each), **mean,
        )  # fmt: skip


if __name__ == "__main__":
    what, path, *more = sys.argv[1:]
    {"answers": answers, "prefix": prefix}[what](path, int(more[0]) if more else 24)
