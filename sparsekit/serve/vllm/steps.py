"""What a model runner knows about a step, and vLLM's attention metadata does not say: where each prompt ends, and which
config its request chose.

Both of vLLM's runners tell it, through hooks on methods of theirs. These are private names: whether they are there is
checked before a model is loaded, and again on the loaded runner.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

from sparsekit.errors import SparsekitError
from sparsekit.patterns.shared import SharedPlans

__all__ = ["Told", "check_hooks", "check_runner", "current", "hook", "hook_runners", "missing"]


@dataclass(frozen=True)
class Told:
    """Of the rows of the step whose metadata is being built."""

    prompt_tokens: Any  # int numpy array, at least one number a row
    extra_args: Callable[[int], Mapping[str, Any] | None]  # of a row's request
    plans: SharedPlans = field(default_factory=SharedPlans)  # of all cache groups' layers, by row and layer


_told: Told | None = None
missing: list[str] = []  # hooks that this vLLM has no place for


def current() -> Told | None:
    """Of the step in hand; None outside of one, as in drafts, captures and dummy steps."""
    return _told


def _tell(told: Told | None) -> None:
    global _told
    _told = told


def hook(cls: type, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a method by `wrap(method)`, once; where there is none, note it as missing."""
    original = cls.__dict__.get(name)
    if original is None:
        missing.append(f"{cls.__module__}.{cls.__qualname__}.{name}")
    elif not hasattr(original, "sparsekit"):
        wrapped = wraps(original)(wrap(original))
        wrapped.sparsekit = True  # type: ignore[attr-defined]
        setattr(cls, name, wrapped)


def hook_runners(loading: Callable[[Any], None], loaded: Callable[[Any], None]) -> None:
    """Have the runners tell their steps, and call `loading` and `loaded` with a runner around `load_model`."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as V1

    def around_load(load: Callable[..., Any]) -> Callable[..., Any]:
        def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
            loading(self)
            result = load(self, *args, **kwargs)
            loaded(self)
            return result

        return load_model

    runners: list[type] = [V1]
    hook(V1, "_build_attention_metadata", _tell_v1)
    hook(V1, "_dummy_run", _tell_nothing)
    try:
        from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    except ImportError:
        pass
    else:
        runners.append(CPUModelRunner)
    try:
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner as V2
    except ImportError:  # vLLM without triton has the first alone
        pass
    else:
        runners.append(V2)
        hook(V2, "add_requests", _note_v2)
        hook(V2, "prepare_inputs", _tell_v2)
        hook(V2, "execute_model", _tell_nothing)
    for cls in runners:
        hook(cls, "load_model", around_load)


def _tell_v1(build: Callable[..., Any]) -> Callable[..., Any]:
    def told(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not getattr(self, "sparsekit_dummy", 0):
            batch, requests = self.input_batch, self.requests
            _tell(Told(batch.num_prompt_tokens, lambda row: _extra_args(requests[batch.req_ids[row]])))
        try:
            return build(self, *args, **kwargs)
        finally:
            _tell(None)

    return told


def _extra_args(request: Any) -> Mapping[str, Any] | None:
    params = request.sampling_params
    return None if params is None else params.extra_args


def _tell_nothing(run: Callable[..., Any]) -> Callable[..., Any]:
    """A dummy step has no prompts; nor has a draft after a step."""

    def untold(self: Any, *args: Any, **kwargs: Any) -> Any:
        dummy = run.__name__ == "_dummy_run"
        self.sparsekit_dummy = getattr(self, "sparsekit_dummy", 0) + dummy
        _tell(None)
        try:
            return run(self, *args, **kwargs)
        finally:
            self.sparsekit_dummy -= dummy
            _tell(None)

    return untold


def _note_v2(add: Callable[..., Any]) -> Callable[..., Any]:
    """The second runner keeps no sampling parameters: note those of its requests."""

    def added(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        noted: dict[str, Any] = self.__dict__.setdefault("sparsekit_extra_args", {})
        result = add(self, scheduler_output, *args, **kwargs)
        known = self.req_states.req_id_to_index
        for request in scheduler_output.scheduled_new_reqs:
            noted[request.req_id] = _extra_args(request)
        if len(noted) > 2 * len(known) + 64:
            self.sparsekit_extra_args = {name: noted[name] for name in known if name in noted}
        return result

    return added


def _tell_v2(prepare: Callable[..., Any]) -> Callable[..., Any]:
    def told(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = prepare(self, *args, **kwargs)
        noted = self.sparsekit_extra_args
        _tell(Told(self.req_states.prompt_len.np[batch.idx_mapping_np], lambda row: noted[batch.req_ids[row]]))
        return batch

    return told


def check_hooks() -> None:
    """Refuse a vLLM in which a hook had no place.

    Raises:
        SparsekitError: the first of them.
    """
    if missing:
        raise SparsekitError(
            f"this vLLM has no {missing[0]}, by which sparsekit learns of its steps: use a tested one."
        )


def check_runner(runner: Any) -> None:
    """Refuse a runner that does not have what the hooks read.

    Raises:
        SparsekitError: a name that is not there.
    """
    second = hasattr(runner, "req_states")
    names = ("req_states.prompt_len.np", "req_states.req_id_to_index") if second else (
        "input_batch.num_prompt_tokens", "input_batch.req_ids", "requests",
    )  # fmt: skip
    for path in names:
        at = runner
        for name in path.split("."):
            if not hasattr(at, name):
                raise SparsekitError(
                    f"{type(runner).__qualname__} has no {path}, by which sparsekit learns where a prompt ends: use a "
                    "tested vLLM."
                )
            at = getattr(at, name)
