"""sparsekit in vLLM: a prompt's long chunks by sparsekit, everything else by the backend that vLLM chose.

`register` is vLLM's plugin; `vllm serve MODEL --additional-config '{"sparsekit": CONFIG}'` is all that a user says.
"""

from __future__ import annotations

from typing import Any

__all__ = ["register"]


def register() -> None:
    """The `vllm.general_plugins` entry point: runs in every process of an engine, before any model.

    It puts hooks around a few methods. Without a config they do nothing, and vLLM's own backends run.
    """
    from vllm.v1.worker.worker_base import WorkerBase

    from sparsekit.serve.vllm.meter import METER
    from sparsekit.serve.vllm.requests import hook_requests
    from sparsekit.serve.vllm.steps import hook_runners

    hook_requests()
    hook_runners(_loading, _loaded)
    WorkerBase.sparsekit_report = lambda self: METER.report()  # for collective_rpc


def _loading(runner: Any) -> None:
    """Before the model is built: put sparsekit's backends in place of the stock ones, or those back."""
    from vllm.v1.attention import selector
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from sparsekit.serve.vllm.backend import use
    from sparsekit.serve.vllm.requests import checked_settings
    from sparsekit.serve.vllm.settings import WRAPPED

    settings = checked_settings(runner.vllm_config)
    use(settings)
    for name in WRAPPED:
        member = AttentionBackendEnum[name]
        if settings is not None:
            register_backend(member, f"{__name__}.{name.lower()}.Backend")
        elif member.get_path(False).startswith(__name__):
            member.clear_override()
    selector._cached_get_attn_backend.cache_clear()


def _loaded(runner: Any) -> None:
    """After it: every layer that the config makes sparse is checked to be sparsekit's, and gets its patterns."""
    from sparsekit.serve.vllm.backend import serving

    settings = serving()
    if settings is None:
        return
    from vllm.distributed import get_tensor_model_parallel_rank
    from vllm.logger import init_logger

    from sparsekit.serve.vllm.layers import bind, rank_of
    from sparsekit.serve.vllm.meter import METER
    from sparsekit.serve.vllm.steps import check_runner

    check_runner(runner)
    rank = rank_of(runner.vllm_config.parallel_config)
    lines = bind(runner.model, runner.vllm_config, settings, rank, get_tensor_model_parallel_rank())
    METER.about["runner"] = f"{type(runner).__module__}.{type(runner).__qualname__}"
    METER.publish(rank)
    if get_tensor_model_parallel_rank() == 0:
        for line in lines:
            init_logger("vllm.sparsekit").info("%s", line)
