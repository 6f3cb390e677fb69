"""Inputs that once gave silent wrongs, refusals or tracebacks, each with what it gives: `python tests/faults.py`.

One row a class: what it is, what the input gave before, what it gives, and the test that holds the whole class.
The exit code is 1 unless all are right.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import resource
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from soon import soon

import sparsekit
from sparsekit import Geometry, SparsekitError
from sparsekit.models import tiny
from sparsekit.patterns import StaticPattern, base

TRI: dict[str, Any] = {"default": {"name": "triangle", "sink_tokens": 4, "window_tokens": 40, "last_tokens": 20}}
RANDOM = torch.Generator().manual_seed(0)
IDS = torch.randint(3, 97, (1, 400), generator=RANDOM)


@dataclass(frozen=True)
class Fault:
    number: int
    what: str
    was: str
    test: str
    run: Callable[[], str]


FAULTS: list[Fault] = []


def fault(number: int, what: str, was: str, test: str) -> Callable[[Callable[[], str]], Callable[[], str]]:
    def add(run: Callable[[], str]) -> Callable[[], str]:
        FAULTS.append(Fault(number, what, was, test, run))
        return run

    return add


def llama(**fields: Any) -> Any:
    sizes = {"vocab_size": 97, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return tiny(
        "llama",
        **{**sizes, "num_hidden_layers": 3, "max_position_embeddings": 4096, "initializer_range": 0.1, **fields},
    )


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS, **kwargs: Any) -> Tensor:
    out: Tensor = model(ids, **kwargs).logits
    return out


def ran(handle: Any) -> str:
    return ",".join(layer.ran for layer in handle.report().layers)


def difference(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().max())


def refused(act: Callable[[], Any], *words: str) -> str:
    """The one line that a call is refused with; it names `words`."""
    try:
        act()
    except SparsekitError as error:
        line = str(error)
        assert "\n" not in line.strip(), line
        for word in words:
            assert word in line, f"{word!r} is not in {line!r}"
        assert len(line) < 600, f"{len(line)} characters"
        return "refused: " + line
    raise AssertionError("not refused")


def child(code: str, megabytes: int = 0, seconds: float = 60) -> subprocess.CompletedProcess[str]:
    def limit() -> None:
        if megabytes:
            resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))

    env = {**os.environ, "PYTHONPATH": str(Path(sparsekit.__file__).parents[1])}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds, preexec_fn=limit, env=env)


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@fault(
    1,
    "two spellings of one key",
    "dense everywhere, in silence",
    "config/test_config.py::test_no_rule_is_lost_to_the_spelling_of_its_key",
)
def _() -> str:
    text = '{version: 1, model: {num_layers: 3, num_heads: 2}, layers: {0: triangle, "0": dense}}'
    return refused(lambda: sparsekit.load(text), "0")


@fault(2, "a row that keeps nothing", "1e31: memory that nobody wrote", "plan/test_plans_are_checked.py")
def _() -> str:
    class EveryOther(StaticPattern):
        name: Literal["every_other"] = "every_other"

        def keep(self, q_pos: Tensor, k_pos: Tensor, span: Any) -> Tensor:
            return (k_pos <= q_pos) & ((q_pos // 128) % 2 == 0)

    q = torch.randn(1, 2, 400, 16)
    try:
        return refused(lambda: sparsekit.attention(q, q, q, EveryOther()), "every_other")
    finally:
        del base._REGISTRY["every_other"]


@fault(
    3,
    "two handles on one set of modules",
    "the first active, empty report, model dense",
    "patch/test_contexts.py::test_the_modules_count_and_not_the_object_that_holds_them",
)
def _() -> str:
    model = llama()
    first = sparsekit.apply(model, TRI)
    sparse = logits(model)
    try:
        second = sparsekit.apply(model.model, TRI)
    except SparsekitError as error:
        assert difference(logits(model), sparse) == 0
        return f"refused: {error}"
    second.remove()
    if first.active:
        assert difference(logits(model), sparse) == 0 and ran(first) == "sparse,sparse,sparse", ran(first)
        return "the first goes on, sparse"
    model(IDS)
    return "the first was replaced, and says inactive"


@fault(
    4,
    "prompt(tokens=n) with right padding",
    "differences of 0.13 to 0.23",
    "patch/test_masks.py::test_padding_on_the_right",
)
def _() -> str:
    model = llama()
    ids, mask = IDS.repeat(2, 1), torch.ones(2, 400, dtype=torch.long)
    ids[1, 330:], mask[1, 330:] = 0, 0
    with sparsekit.apply(model, TRI) as handle:
        alone = logits(model, IDS[:, :330])
        with handle.prompt(tokens=400):
            got = logits(model, ids, attention_mask=mask)[1:, :330]
    assert difference(got, alone) < 1e-4, difference(got, alone)
    return f"difference {difference(got, alone):.0e}"


@fault(5, "a measurement is reused for other weights", "the old model's figures", "lab/test_provenance.py")
def _() -> str:
    from sparsekit.lab.provenance import content_of_model

    model = llama()
    before = content_of_model(model)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[2:-2] += 1
    assert content_of_model(model) != before
    return "another key"


@fault(6, "scale <= 0, soft-cap of 0, NaN", "NaN, or uniform attention", "call/test_softmax.py")
def _() -> str:
    q = torch.randn(1, 2, 100, 16)
    says = ""
    for options in (
        {"scale": 0.0},
        {"scale": -1.0},
        {"scale": float("nan")},
        {"softcap": -1.0},
        {"softcap": float("nan")},
    ):
        name = next(iter(options))
        says = refused(lambda options=options: sparsekit.attention(q, q, q, "triangle", **options), name)
    try:
        off = sparsekit.attention(q, q, q, "triangle", softcap=0.0)
    except SparsekitError as error:
        return f"{says}; softcap 0: {error}"
    assert torch.equal(off, sparsekit.attention(q, q, q, "triangle"))
    return f"{says}; softcap 0 is off"


@fault(7, "a wrong hint is never told", "dense, or decoding sparse", "patch/test_masks.py")
def _() -> str:
    model = llama()
    with sparsekit.apply(model, TRI) as handle:
        for tokens in (0, -5, True, 1.5):
            with contextlib.ExitStack() as stack:
                says = refused(lambda tokens=tokens: stack.enter_context(handle.prompt(tokens=tokens)), "tokens")

        def contradicted() -> None:
            with handle.prompt(tokens=100):
                logits(model)

        says = refused(contradicted, "100")
        plain = model.generate(IDS, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
        try:
            with handle.prompt(tokens=4096):
                hinted = model.generate(
                    IDS, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
                )
        except SparsekitError as error:
            return f"{says}; 4096: {error}"
    assert max(difference(a, b) for a, b in zip(plain.logits[1:], hinted.logits[1:], strict=True)) < 1.0
    return says


@fault(
    8,
    "apply or remove while a forward runs",
    "layers of two configs",
    "patch/test_contexts.py::test_no_change_between_the_layers_of_a_running_forward",
)
def _() -> str:
    model = llama(num_hidden_layers=6)
    handle = sparsekit.apply(model, TRI)
    sparse = logits(model)
    handle.remove()
    dense = logits(model)
    wrong: list[str] = []
    errors: list[str] = []
    stop = threading.Event()

    def forwards() -> None:
        while not stop.is_set():
            try:
                out = logits(model)
            except SparsekitError as error:
                errors.append(str(error))
                continue
            except Exception as error:
                wrong.append(repr(error))
                continue
            if min(difference(out, sparse), difference(out, dense)) > 1e-4:
                wrong.append("layers of two configs")

    thread = threading.Thread(target=forwards)
    thread.start()
    end = time.monotonic() + 1
    while time.monotonic() < end:
        try:
            with sparsekit.apply(model, TRI):
                time.sleep(0.003)
        except SparsekitError as error:  # noqa: PERF203
            errors.append(str(error))
    stop.set()
    thread.join()
    assert not wrong, f"{len(wrong)} forwards went wrong: {wrong[0]}"
    return f"no forward mixed; {len(errors)} refused" + (f": {errors[0]}" if errors else "")


@fault(
    9,
    "unknown arguments of attention",
    "sparse without a word",
    "patch/test_masks.py::test_unknown_arguments_are_refused_by_name",
)
def _() -> str:
    model = llama()
    with sparsekit.apply(model, TRI):
        return refused(lambda: logits(model, attn_bias=torch.zeros(1, 1, 400, 400)), "attn_bias")


@fault(10, "modules that serve several layers", "-1 wraps to the last layer", "patch/test_all_types.py")
def _() -> str:
    from transformers import AutoModelForCausalLM, Zamba2Config

    kinds = ["mamba", "hybrid", "mamba", "hybrid", "mamba", "mamba"]
    config = Zamba2Config(
        num_hidden_layers=6, layers_block_type=kinds, hidden_size=64, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=97, mamba_d_state=16, n_mamba_heads=8, mamba_expand=2, mamba_headdim=16, intermediate_size=64,
        attention_hidden_size=128, attention_head_dim=32, num_mem_blocks=1, use_shared_attention_adapter=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    dense = logits(model)
    rules = {"layers": {"1": TRI["default"], "3": TRI["default"]}, "default": "dense"}
    try:
        with sparsekit.apply(model, rules) as handle:
            assert difference(logits(model), dense) > 1e-6
            said = ran(handle)
    except SparsekitError as error:
        assert torch.equal(logits(model), dense)
        return f"refused: {error}"
    assert said.count("sparse") == 2, said
    return said


@fault(11, "a layer's kind from a field's presence", "all layers sliding; rules refused", "patch/test_hub_configs.py")
def _() -> str:
    sizes = {"hidden_size": 192, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 97}
    model = tiny("phi3", sliding_window=262144, max_position_embeddings=131072, num_hidden_layers=2, **sizes)
    with sparsekit.apply(model, TRI) as handle:
        logits(model)
        assert ran(handle) == "sparse,sparse", ran(handle)
    return "sparse,sparse"


@fault(12, "a mask judged by how it was composed", "never sparse", "patch/test_masks.py")
def _() -> str:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {
        "vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 2, "head_dim": 32,
        "num_key_value_heads": 1, "intermediate_size": 64, "sliding_window": 32, "max_position_embeddings": 4096,
    }  # fmt: skip
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(text_config=text, vision_config=vision, image_token_index=299, mm_tokens_per_image=1)
    model = Gemma3ForConditionalGeneration(config).eval()
    with sparsekit.apply(model, TRI) as handle:
        logits(model, token_type_ids=torch.zeros_like(IDS))
        assert "sparse" in ran(handle), ran(handle)
        return ran(handle)


@fault(13, "copies of modules", "dense, 'not run', no warning", "patch/test_contexts.py::test_deep_copies_are_refused")
def _() -> str:
    model = llama()
    dense = logits(model)
    with sparsekit.apply(model, TRI):
        sparse = logits(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            copy = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
        try:
            got = logits(copy)
        except SparsekitError as error:
            return f"refused: {error}"
        near = difference(got, sparse) < difference(got, dense)
        assert near, "dense in silence"
        return "sparse, as the model"


class Logits(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.model(ids, use_cache=False).logits
        return out


@fault(14, "torch.jit.trace", "the dense path, for good", "patch/test_contexts.py::test_jit_trace_is_refused")
def _() -> str:
    model = llama()
    with sparsekit.apply(model, TRI), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return refused(lambda: torch.jit.trace(Logits(model), IDS), "torch.export")


@fault(
    15, "continuous batching", "the handle does not notice", "patch/test_calls.py::test_continuous_batching_is_refused"
)
def _() -> str:
    model = llama()
    with sparsekit.apply(model, TRI) as handle:
        name = model.config._attn_implementation
        try:
            model.set_attn_implementation("paged|sdpa" if not name.startswith("paged") else name)
            out = logits(model)
        except (SparsekitError, ValueError, KeyError) as error:
            return f"refused: {str(error)[:160]}"
        said = handle.report()
        assert said.warning, "not noticed"
        return f"noticed: {said.warning} ({out.shape[1]} tokens)"


@fault(16, "a verdict over an empty set", "'Needs no sink tokens'", "lab/test_empty.py")
def _() -> str:
    from sparsekit.lab.calibrate.sinks import inspect_model
    from sparsekit.models import load

    model, tokenizer = load("smollm2-135m", dtype=torch.float32)
    del model.model.layers[4:]
    model.config.num_hidden_layers = 4
    model.config.layer_types = ["sliding_attention"] * 4
    model.config.sliding_window = 64
    try:
        found = inspect_model(model, tokenizer, tokens=300, samples=1)
    except SparsekitError as error:
        return f"refused: {error}"
    assert "no sink" not in str(found).lower(), str(found)[:200]
    return str(found)[:120]


@fault(17, "autocast", "refused, or died inside", "patch/test_contexts.py")
def _() -> str:
    from sparsekit.patterns import pattern_names

    model = llama()
    names = [name for name in pattern_names() if name != "union"]
    worst = 0.0
    with torch.autocast("cpu", torch.bfloat16):
        dense = logits(model)
        for name in names:
            for cache in (False, True):
                with sparsekit.apply(model, {"default": name, "min_queries": 2}):
                    got = logits(model, use_cache=cache)
                    assert got.isfinite().all()
                    if name == "dense":
                        worst = difference(got, dense)
    return f"{len(names)} patterns run; dense is within {worst:.0e} of the model"


@fault(18, "default dtype and device", "xattention and s2o broken", "call/test_defaults.py")
def _() -> str:
    from sparsekit.patterns import pattern_names

    q = torch.randn(1, 2, 700, 32)
    for name in pattern_names():
        if name == "union":
            continue
        expected = sparsekit.attention(q, q, q, name)
        torch.set_default_dtype(torch.bfloat16)
        try:
            assert torch.equal(sparsekit.attention(q, q, q, name), expected), name
        finally:
            torch.set_default_dtype(torch.float32)
        with torch.device("meta"):
            assert torch.equal(sparsekit.attention(q, q, q, name), expected), name
    return "the same, bit for bit"


@fault(19, "decoders of encoder-decoder families", "IndexError, half patched", "patch/test_hub_configs.py")
def _() -> str:
    from transformers import BartConfig, BartForCausalLM

    config = BartConfig(
        encoder_layers=2, decoder_layers=4, d_model=64, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=97, max_position_embeddings=512, is_encoder_decoder=False,
    )  # fmt: skip
    model = BartForCausalLM(config).eval()
    dense = logits(model, use_cache=False)
    try:
        with sparsekit.apply(model, TRI) as handle:
            assert difference(logits(model, use_cache=False), dense) > 1e-7
            said = ran(handle)
    except SparsekitError as error:
        assert torch.equal(logits(model, use_cache=False), dense)
        return f"refused: {error}"
    assert said.count("sparse") == 4, said
    assert torch.equal(logits(model, use_cache=False), dense)
    return said


@fault(
    20,
    "a pickled patched model",
    "does not come back",
    "patch/test_contexts.py::test_a_pickle_comes_back_as_the_model_itself",
)
def _() -> str:
    model = llama()
    dense = logits(model)
    with folder() as here, sparsekit.apply(model, TRI):
        (here / "model.pickle").write_bytes(pickle.dumps(model))
        torch.save(dense, here / "dense.pt")
        code = f"""
import pickle, torch
from pathlib import Path
here = Path({str(here)!r})
model = pickle.loads((here / "model.pickle").read_bytes())
with torch.no_grad():
    out = model(torch.tensor({IDS.tolist()})).logits
print(float((out - torch.load(here / "dense.pt")).abs().max()), model.config._attn_implementation)
"""
        done = child(code)
    assert done.returncode == 0, done.stderr[-300:]
    return f"back in a fresh process, the model itself: difference {done.stdout.strip()}"


@fault(21, "one broken plugin", "every command ends in its traceback", "patterns/test_plugins.py")
def _() -> str:
    with folder() as here:
        info = here / "broken_plugin-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-plugin\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[sparsekit.patterns]\nbad = broken_plugin_module:Pattern\n")
        (here / "broken_plugin_module.py").write_text("raise RuntimeError('no such library')\n")
        command = "from sparsekit.cli import main\nsys.argv = ['sparsekit', 'patterns']\nmain()"
        done = child(f"import sys\nsys.path.insert(0, {str(here)!r})\n{command}")
    assert "triangle" in done.stdout and "Traceback" not in done.stderr, done.stderr[-300:]
    assert "broken" in done.stderr, done.stderr
    return "goes on: " + done.stderr.strip().splitlines()[0][:140]


@fault(
    22,
    "dump destroys the good file",
    "an empty file on a full disk",
    "test_errors.py::test_a_file_is_written_whole_or_not_at_all",
)
def _() -> str:
    with folder() as here:
        path = here / "good.yaml"
        config = sparsekit.load({"default": "triangle"})
        config.dump(path)
        good = path.read_text()
        code = (
            "import resource, signal, sparsekit\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            f"c = sparsekit.load({{'default': 'dense', 'layers': {{str(i): 'triangle' for i in range(0, 400, 2)}}}})\n"
            f"resource.setrlimit(resource.RLIMIT_FSIZE, (16, 16))\nc.dump({str(path)!r})"
        )
        done = child(code)
        assert done.returncode != 0
        assert path.read_text() == good, "the good file is gone"
        assert [p.name for p in here.iterdir()] == ["good.yaml"], list(here.iterdir())
    return "the good file stays: " + done.stderr.strip().splitlines()[-1][:120]


@fault(23, "explain promises what apply refuses", "'0.011 of the dense time'", "patch/test_all_types.py")
def _() -> str:
    from transformers import DeepseekV3Config

    from sparsekit.models import facts

    config = DeepseekV3Config(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, hidden_size=64)
    with folder() as here:
        config.save_pretrained(here)
        return refused(lambda: sparsekit.explain(TRI, 8192, facts(str(here))), "")


@fault(24, "config fields that are a list", "pydantic traceback", "patch/test_hub_configs.py")
def _() -> str:
    from transformers import Gemma3nTextConfig

    from sparsekit.models import facts

    config = Gemma3nTextConfig(num_hidden_layers=4, intermediate_size=[64, 64, 128, 128], num_kv_shared_layers=0,
                               layer_types=["sliding_attention", "full_attention"] * 2)  # fmt: skip
    with folder() as here:
        config.save_pretrained(here)
        try:
            found = facts(str(here))
            sparsekit.explain(TRI, 8192, found)
        except SparsekitError as error:
            return f"refused: {error}"
    return f"read: intermediate_size {found.intermediate_size}"


@fault(25, "small input, huge work", "8 GB", "config/test_fuzz.py")
def _() -> str:
    long = "x" * 3_000_000
    soon(lambda: refused(lambda: sparsekit.load({"default": long})), 2)
    wide = '{version: 1, layers: {"0-300000000": triangle}}'
    return soon(lambda: refused(lambda: sparsekit.load(wide).resolve(), "300000000"), 2)


@fault(
    26,
    "caches without a budget",
    "70 MB a call, for life",
    "call/test_caches.py::test_memory_is_flat_over_batches_of_changing_lengths",
)
def _() -> str:
    q = torch.randn(4, 1, 4096, 16)
    sizes = []
    for i in range(24):
        sparsekit.attention(q[:, :, : 4096 - i], q[:, :, : 4096 - i], q[:, :, : 4096 - i], "triangle",
                            geometry=Geometry.of(4096 - i, batch=4, kv_start=[0, i, 2 * i, 3]))  # fmt: skip
        sizes.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
    sparsekit.clear_caches()  # type: ignore[attr-defined]
    assert sizes[-1] - sizes[3] < 100, sizes
    return f"{sizes[-1] - sizes[3]} MB more from the 3rd to the 24th call; clear_caches()"


@fault(27, "raw errors", "tracebacks", "config/test_fuzz.py")
def _() -> str:
    q, k = torch.randn(1, 4, 300, 32), torch.randn(1, 3, 300, 32)
    for name in ("xattention", "block_topk", "vertical_slash", "flexprefill", "s2o"):
        refused(lambda name=name: sparsekit.attention(q, k, k, name))
        refused(lambda name=name: sparsekit.attention(q, q, q, name, sink_logits=torch.zeros(3)), "sink_logits")
        refused(lambda name=name: sparsekit.attention(q[:, :, :0], q[:, :, :0], q[:, :, :0], name))
    refused(lambda: Geometry.of(1.5), "1.5")  # type: ignore[arg-type]
    refused(lambda: sparsekit.load({"default": {"name": "triangle", "sink_tokens": 10**30}}), "sink_tokens")
    refused(lambda: sparsekit.load("[" * 5000 + "]" * 5000))
    with folder() as here:
        refused(lambda: sparsekit.load(here), str(here)[:20])
    model = llama()
    return refused(lambda: sparsekit.apply(torch.nn.DataParallel(model), TRI), "DataParallel")  # type: ignore[arg-type]


@fault(28, "a file that is something else", "converts as thresholds", "config/test_convert.py")
def _() -> str:
    from sparsekit.config.convert import convert_xattention

    with folder() as here:
        path = here / "full_attention_heads.tsv"
        table = torch.rand(32, 8, generator=torch.Generator().manual_seed(1)).tolist()
        path.write_text("\n".join("\t".join(f"{x:.18e}" for x in row) for row in table))
        model = {"num_layers": 32, "num_heads": 32}
        (here / "config.json").write_text(json.dumps({"model_type": "llama", **model}))
        return refused(lambda: convert_xattention(path))


def main() -> int:
    wrong = 0
    only = set(map(int, sys.argv[1:]))
    for one in FAULTS:
        if only and one.number not in only:
            continue
        try:
            now, right = one.run(), True
        except Exception as error:
            now, right = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}", False
        wrong += not right
        verdict = "right" if right else "WRONG"
        print(
            f"{one.number:>2} {verdict} | {one.what} | was: {one.was} | is: {now[:200]} | tests/{one.test}", flush=True
        )
    print(f"{len(only or FAULTS)} classes, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
