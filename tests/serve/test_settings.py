"""What a server may be told, what it refuses at start, and what a request may choose: one line each, without vLLM."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from crossovers import HERE, own, row

from sparsekit import SparsekitError, load
from sparsekit.config import ModelFacts
from sparsekit.config.settle import Machine, fingerprint
from sparsekit.serve.vllm import requests, settings, steps
from sparsekit.serve.vllm.settings import Settings, machine_of, settings_of

TRIANGLE = "version: 1\ndense_below_tokens: 1000\ndefault: {name: triangle, last_tokens: 100}\n"
TOPK = "version: 1\ndefault: block_topk\n"
FACTS = ModelFacts(num_layers=4, num_heads=8, name="tiny")


def _line(error: pytest.ExceptionInfo[SparsekitError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_one_config_is_the_default() -> None:
    for source in (TRIANGLE, {"version": 1, "default": "triangle"}, {"config": TRIANGLE, "exact_prefix": True}):
        found = settings_of(source, FACTS)
        assert found.names == ("off", "default")
        chosen = found.choose(None)
        assert chosen is not None
        assert chosen.name == "default"
        assert found.choose({"sparsekit": "off"}) is None
        assert found.choose({"other": 1}) is chosen


def test_a_request_chooses_out_of_several() -> None:
    found = settings_of({"configs": {"a": TRIANGLE, "b": TOPK}, "default": "off"}, FACTS)
    assert found.choose(None) is None
    chosen = found.choose({"sparsekit": "b"})
    assert chosen is not None
    assert chosen.name == "b"
    for wrong in ("aa", 3, None, ["a"]):
        with pytest.raises(SparsekitError, match="this server has off, a, b") as error:
            found.choose({"sparsekit": wrong})
        _line(error)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ({"confg": TRIANGLE}, "sparsekit: unknown field 'confg'; allowed: config, configs, default, exact_prefix"),
        ({"config": TRIANGLE, "configs": {}}, "one of `config` and `configs` is needed, not both"),
        ({"exact_prefix": True}, "one of `config` and `configs` is needed"),
        ({"config": TRIANGLE, "default": "x"}, "sparsekit.default goes with `configs`"),
        ({"config": TRIANGLE, "exact_prefix": "yes"}, "sparsekit.exact_prefix = 'yes': true or false"),
        ({"configs": {}, "default": "off"}, "a mapping of names to configs, one at least"),
        ({"configs": {"off": TRIANGLE}, "default": "off"}, "'off' is vLLM alone"),
        ({"configs": {"a": TRIANGLE}, "default": "aa"}, "sparsekit.default = 'aa': one of a, off. Did you mean 'a'?"),
        ({"configs": {"a": TRIANGLE}, "default": None}, "sparsekit.default = None"),
        ({"configs": {"a": TRIANGLE, "b": TRIANGLE}}, "sparsekit.default is missing: one of a, b, off"),
        (
            {"configs": {"a": "default: triangel\n"}, "default": "a"},
            "sparsekit.configs.a: config: default: unknown pat",
        ),
        ({"config": TOPK, "exact_prefix": True}, "'default' has patterns whose choice depends on later rows"),
        ("no/such/file.yaml", "sparsekit: "),
        (7, "sparsekit: config 7"),
        ("version: 1\nmodel: {num_layers: 32}\ndefault: triangle\n", "for a model with num_layers = 32"),
        ('version: 1\nlayers: {"9": triangle}\n', "layer 9 of a model with 4 layers"),
    ],
)
def test_what_a_server_was_told_wrong(source: Any, says: str) -> None:
    with pytest.raises(SparsekitError) as error:
        settings_of(source, FACTS)
    assert says in _line(error)


def test_a_precision_is_refused() -> None:
    sparse = {"version": 1, "layers": {"2-3": "triangle"}}
    settings_of({**sparse, "precision": "model"}, FACTS)
    for precision in ("fp8", {"3": "fp8"}):
        with pytest.raises(SparsekitError, match=r"^sparsekit: precision = .*fp8.*: vLLM's layers run in the model's"):
            settings_of({**sparse, "precision": precision}, FACTS)
    with pytest.raises(SparsekitError, match=r"^sparsekit\.configs\.a: precision = 'fp8'"):
        settings_of({"configs": {"a": {**sparse, "precision": "fp8"}}}, FACTS)


def test_pages_of_different_configs_have_different_salts() -> None:
    told = {"a": TRIANGLE, "same": TRIANGLE, "b": TRIANGLE.replace("100}", "101}")}
    found = settings_of({"configs": told, "default": "a"}, FACTS)
    salts = {name: found.salt(served, 5000, None) for name, served in found.configs.items()}
    assert salts["a"] == salts["same"] != salts["b"]
    assert found.salt(None, 5000, None) is None
    assert found.salt(None, 5000, "mine") == "mine"
    assert found.salt(found.configs["a"], 5000, "mine") == f"{salts['a']}-mine"
    assert found.salt(found.configs["a"], 10, None) == salts["a"]
    exact = settings_of({"config": TRIANGLE, "exact_prefix": True}, FACTS)
    assert exact.salt(exact.choose(None), 999, None) is None  # dense for its length: pages as vLLM's
    assert exact.salt(exact.choose(None), 1000, None) == salts["a"]


def test_the_tail_of_a_config_is_that_of_its_widest_pattern() -> None:
    text = 'version: 1\ndefault: {name: triangle, last_tokens: 7}\nlayers: {"2": {name: triangle, last_tokens: 90}}\n'
    chosen = settings_of(text, FACTS).choose(None)
    assert chosen is not None
    assert chosen.tail == 90


def _server(**changes: Any) -> Any:
    model = SimpleNamespace(
        model="tiny", dtype="torch.bfloat16", use_mla=False, is_encoder_decoder=False, is_mm_prefix_lm=False,
        rswa_window=None, hf_text_config=SimpleNamespace(num_hidden_layers=4, num_attention_heads=8),
        get_total_num_kv_heads=lambda: 2, get_head_size=lambda: 64, get_hidden_size=lambda: 512,
    )  # fmt: skip
    parallel = SimpleNamespace(decode_context_parallel_size=1, prefill_context_parallel_size=1, enable_dbo=False)
    cache = SimpleNamespace(cache_dtype="auto", kv_sharing_fast_prefill=False)
    server = SimpleNamespace(
        model_config=model, parallel_config=parallel, cache_config=cache, kv_transfer_config=None,
        additional_config={"sparsekit": TRIANGLE},
    )  # fmt: skip
    for name, value in changes.items():
        owner = next(x for x in (model, parallel, cache, server) if hasattr(x, name))
        setattr(owner, name, value)
    return server


def _transfer(name: str, module: str | None = None, **extra: Any) -> Any:
    return SimpleNamespace(kv_connector=name, kv_connector_module_path=module, kv_connector_extra_config=extra)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for the package, of a release that was tested; the hooks are in place."""
    package = SimpleNamespace(__version_tuple__=(0, 32, 0))
    monkeypatch.setitem(sys.modules, "vllm", package)  # type: ignore[arg-type]
    monkeypatch.setattr(steps, "missing", [])
    return package


def test_a_plain_server_is_served(vllm: Any) -> None:
    found = requests.checked_settings(_server())
    assert isinstance(found, Settings)
    for cache in ("bfloat16", "fp8"):
        assert requests.checked_settings(_server(cache_dtype=cache)) is not None


def test_a_server_that_was_told_nothing_is_left_alone(vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm.__version_tuple__ = (0, 99, 0)
    server = _server(use_mla=True)
    for extra in ({}, {"other": 1}, None):
        server.additional_config = extra
        assert requests.checked_settings(server) is None
    for wrong in ("sparskit", "SparseKit", "sparse_kit"):
        server.additional_config = {"other": 1, wrong: TRIANGLE}
        with pytest.raises(SparsekitError, match=f"additional_config: unknown field '{wrong}'"):
            requests.checked_settings(server)
    server.additional_config = {"sparse_kv": 1, "sparse_config": {}, "spark": 1}  # of other plugins
    assert requests.checked_settings(server) is None
    server.additional_config = {}
    monkeypatch.setenv("SPARSEKIT_CONFIG", TRIANGLE)
    with pytest.raises(SparsekitError):
        requests.checked_settings(server)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"use_mla": True}, "MLA"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"is_mm_prefix_lm": True}, "images attend in both directions"),
        ({"rswa_window": 128}, "R-SWA"),
        ({"decode_context_parallel_size": 2}, "--decode-context-parallel-size"),
        ({"prefill_context_parallel_size": 2}, "--prefill-context-parallel-size"),
        ({"enable_dbo": True}, "--enable-dbo"),
        (
            {"cache_dtype": "fp8_e5m2"},
            "--kv-cache-dtype fp8_e5m2: such keys are not read; use auto, fp8, fp8_e4m3 or bf",
        ),
        ({"kv_sharing_fast_prefill": True}, "--kv-sharing-fast-prefill"),
        ({"kv_transfer_config": _transfer("ExampleConnector")}, "--kv-transfer-config ExampleConnector"),
        ({"kv_transfer_config": _transfer("NixlConnector", "mine.nixl")}, "--kv-transfer-config NixlConnector"),
        (
            {
                "kv_transfer_config": _transfer(
                    "MultiConnector",
                    connectors=[{"kv_connector": "NixlConnector"}, {"kv_connector": "LMCacheConnectorV1"}],
                )
            },
            "--kv-transfer-config LMCacheConnectorV1: it is not known to tell pages of different configs apart",
        ),
    ],
)
def test_options_that_are_refused(vllm: Any, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(SparsekitError) as error:
        requests.checked_settings(_server(**changes))
    assert says in _line(error)


def test_8_bits_are_not_read_on_rocm() -> None:
    """vLLM's `fp8` on AMD's gfx942 is e4m3fnuz, whose bytes are half of what e4m3fn's are."""
    says = "from sparsekit.serve.vllm.settings import CACHES, E4M3; print(len(E4M3), CACHES)"
    ran = subprocess.run(
        [sys.executable, "-c", f"import torch; torch.version.hip = '7.0'; {says}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert ran.stdout == "0 auto\n"


def test_connectors_that_keep_configs_apart_are_served(vllm: Any) -> None:
    several = _transfer("MultiConnector", connectors=[{"kv_connector": name} for name in settings.SALTED])
    for transfer in (several, *map(_transfer, settings.SALTED)):
        server = _server(kv_transfer_config=transfer)
        assert requests.checked_settings(server) is not None
        server.additional_config = {"sparsekit": {"config": TRIANGLE, "exact_prefix": True}}
        with pytest.raises(SparsekitError, match="exact_prefix with --kv-transfer-config") as error:
            requests.checked_settings(server)
        _line(error)


def test_batch_invariance_is_refused(vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(SparsekitError, match="VLLM_BATCH_INVARIANT"):
        requests.checked_settings(_server())


@pytest.mark.parametrize("version", [(0, 25, 1), (0, 34, 0), (1, 0, 0)])
def test_releases_outside_the_tested_ones_are_refused(
    vllm: Any, version: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm.__version_tuple__ = version
    with pytest.raises(SparsekitError, match=r"sparsekit was tested with 0\.26 to 0\.33") as error:
        requests.checked_settings(_server())
    assert settings.ANY_VERSION in _line(error)
    monkeypatch.setenv(settings.ANY_VERSION, "1")
    assert requests.checked_settings(_server()) is not None


def test_a_hook_without_a_place_is_refused(vllm: Any) -> None:
    class Runner:
        pass

    steps.hook(Runner, "prepare_inputs", lambda method: method)
    with pytest.raises(SparsekitError, match=r"this vLLM has no .*Runner\.prepare_inputs"):
        requests.checked_settings(_server())


def test_a_hook_is_put_once() -> None:
    class Runner:
        def step(self) -> int:
            return 1

    for _ in range(2):
        steps.hook(Runner, "step", lambda method: lambda self: method(self) + 1)
    assert Runner().step() == 2


def test_a_loaded_runner_has_what_the_hooks_read() -> None:
    class Runner:
        input_batch = SimpleNamespace(num_prompt_tokens=[], req_ids=[])

    with pytest.raises(SparsekitError, match=r"Runner has no requests, by which sparsekit learns"):
        steps.check_runner(Runner())
    Runner.requests = {}  # type: ignore[attr-defined]
    steps.check_runner(Runner())
    second = SimpleNamespace(req_states=SimpleNamespace(prompt_len=SimpleNamespace(), req_id_to_index={}))
    with pytest.raises(SparsekitError, match=r"no req_states\.prompt_len\.np"):
        steps.check_runner(second)


def test_auto_is_settled_when_the_server_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = FACTS.model_copy(update={"num_key_heads": 2, "head_dim": 16})
    known = load(TRIANGLE)
    auto = known.model_copy(update={"dense_below_tokens": "auto"}).dump()
    place = HERE._replace(device="NVIDIA H200", heads=facts.num_heads or 0, dtype="bfloat16")
    own(tmp_path, monkeypatch, row(fingerprint(known.resolve(facts), facts), False, True, place=place))
    [served] = settings_of(auto, facts, lambda: Machine("NVIDIA H200", "bfloat16")).configs.values()
    assert served.why_dense(100, 199) == "the prompt is below dense_below_tokens" and not served.why_dense(100, 200)
    assert (
        served.resolved.settled
        and served.digest == settings_of(TRIANGLE.replace("1000", "200"), facts).configs["default"].digest
    )
    for machine, said in ((Machine("NVIDIA H200", "bfloat16", 2), "2 processes share"), (None, "an unknown device")):
        with pytest.raises(SparsekitError, match=rf"^sparsekit: dense_below_tokens = 'auto': .*{said}"):
            settings_of(auto, facts) if machine is None else settings_of(auto, facts, lambda m=machine: m)
    with pytest.raises(SparsekitError, match=r"^sparsekit.configs.a: dense_below_tokens = 'auto'"):
        settings_of({"configs": {"a": auto, "b": TRIANGLE}, "default": "b"}, facts)


def test_the_machine_is_what_vllm_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its platform, which starts no CUDA."""
    platforms: Any = ModuleType("vllm.platforms")
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    given = SimpleNamespace(
        model_config=SimpleNamespace(dtype=torch.bfloat16), parallel_config=SimpleNamespace(tensor_parallel_size=4)
    )
    for cpu, device in ((False, "NVIDIA H200"), (True, HERE.device)):
        platforms.current_platform = SimpleNamespace(is_cpu=lambda cpu=cpu: cpu, get_device_name=lambda: "NVIDIA H200")
        assert machine_of(given) == Machine(device, "bfloat16", 4)
