"""What the API server and the scheduler do for sparsekit: refuse at start and by request, and keep caches apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sparsekit.errors import SparsekitError
from sparsekit.serve.vllm.meter import expose
from sparsekit.serve.vllm.settings import (
    KEY,
    Served,
    Settings,
    check_spelling,
    facts_of,
    machine_of,
    refuse,
    settings_of,
    source_of,
)
from sparsekit.serve.vllm.steps import check_hooks, hook

__all__ = ["checked_settings", "hook_requests"]


def checked_settings(vllm_config: Any) -> Settings | None:
    """The settings of a server, or None where it has none.

    Raises:
        SparsekitError: a server that sparsekit cannot serve.
    """
    source = source_of(vllm_config)
    if source is None:
        return None
    refuse(vllm_config)
    check_hooks()
    settings = settings_of(source, facts_of(vllm_config), lambda: machine_of(vllm_config))
    if settings.exact_prefix and vllm_config.kv_transfer_config is not None:
        raise SparsekitError(
            f"{KEY}.exact_prefix with --kv-transfer-config: it keeps pages out of vLLM's own cache, not out of a "
            "connector's. Leave one of them out."
        )
    return settings


def hook_requests() -> None:
    """Around what takes and processes requests, in the API server, and the scheduler, in the engine's process."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor

    hook(AsyncLLM, "generate", _check_choice)
    hook(InputProcessor, "__init__", _check_at_start)
    hook(InputProcessor, "process_inputs", _check_request)
    hook(Scheduler, "__init__", _cap_cache)


def _check_at_start(init: Callable[..., Any]) -> Callable[..., Any]:
    def started(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        self.sparsekit = checked_settings(vllm_config)
        init(self, vllm_config, *args, **kwargs)
        if self.sparsekit is not None:
            expose()

    return started


def _check_choice(generate: Callable[..., Any]) -> Callable[..., Any]:
    """A choice that there is not is refused when a request comes: the status of a streamed answer is sent before the
    request is processed."""

    def begun(self: Any, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        _served(self.input_processor.sparsekit, sampling_params)
        return generate(self, prompt, sampling_params, *args, **kwargs)

    return begun


def _served(settings: Settings | None, params: Any) -> Served | None:
    """What a request's parameters choose."""
    if settings is None:
        return None
    try:
        given = None if params is None else params.extra_args
        check_spelling(given, "a request's extra arguments")
        return settings.choose(given)
    except SparsekitError as error:
        from vllm.exceptions import VLLMValidationError  # which the HTTP server answers with a 400

        raise VLLMValidationError(str(error)) from None


def _check_request(process: Callable[..., Any]) -> Callable[..., Any]:
    """A request's config is one that there is, and its pages are told apart by it."""

    def processed(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = process(self, *args, **kwargs)
        settings: Settings | None = self.sparsekit
        if settings is not None:
            served = _served(settings, request.sampling_params)
            request.cache_salt = settings.salt(served, _prompt_tokens(request), request.cache_salt)
        return request

    return processed


def _prompt_tokens(request: Any) -> int:
    held = request.prompt_token_ids if request.prompt_token_ids is not None else request.prompt_embeds
    return 0 if held is None else len(held)


def _cap_cache(init: Callable[..., Any]) -> Callable[..., Any]:
    """Under `exact_prefix`, pages with a prompt's dense last rows, and those behind them, are not offered to others."""

    def started(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        init(self, vllm_config, *args, **kwargs)
        settings = checked_settings(vllm_config)
        if settings is None or not settings.exact_prefix:
            return
        coordinator = self.kv_cache_manager.coordinator
        cache = coordinator.cache_blocks

        def capped(request: Any, num_computed_tokens: int, *more: Any, **named: Any) -> Any:
            params = request.sampling_params
            served = settings.choose(None if params is None else params.extra_args)
            prompt = request.num_prompt_tokens
            if served is not None and prompt >= served.config.dense_below:
                num_computed_tokens = min(num_computed_tokens, max(prompt - (served.tail or 0), 0))
            return cache(request, num_computed_tokens, *more, **named)

        coordinator.cache_blocks = capped

    return started
