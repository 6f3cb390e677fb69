"""The accuracy contract: a config is held to its budget on one's own prompts, and layers that exceed it run dense.

What is measured is KL from dense attention of the tokens that follow a prompt. Dense attention says which tokens those
are, by greedy decoding; the config's prefill then has to give the same distributions at each of them. Decoding is dense
in both, so a config is judged by the keys and values that its prefill leaves, as in use.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsekit.config import MeasuredOn, ResolvedConfig, SparseConfig, give_back, load
from sparsekit.errors import SparsekitError
from sparsekit.kernels.choose import FAMILIES
from sparsekit.patch.check_report import CheckReport, Divergence
from sparsekit.patch.divergence import divergence, end_of_prompt, greedy, logprobs, read_truth
from sparsekit.patch.giving_back import give_back_until
from sparsekit.patch.handle import Handle, left_alone, put_on
from sparsekit.patch.model import check_positions, facts_of
from sparsekit.patch.user_prompts import UserPrompt, prompts_of
from sparsekit.patterns import DynamicPattern
from sparsekit.patterns.fields import AUTO

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BLAMED_PROMPTS = 4  # those that diverge most, by which layers are blamed
NEXT_TOKENS = 16


def apply(
    model: PreTrainedModel,
    cfg: SparseConfig | Mapping[str, Any] | str | Path,
    *,
    check: Sequence[Any] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Handle:
    """Run the prefill of `model` as `cfg` says, from now on; decoding stays the model's own.

    Args:
        model: any Hugging Face model whose attention goes through transformers' AttentionInterface.
        cfg: a path to a YAML file, YAML text, a mapping, or a SparseConfig.
        check: prompts of your own, to which the config's `budget` is held first (see `sparsekit.check`): layers that
            exceed it run dense. A warning names them, and so does `report()`; `handle.check` has the figures.
        tokenizer: for `check`, of prompts that are texts or chats.

    Returns:
        A handle: `report()`, `pause()`, `prompt(tokens=)`, `remove()`; also a context manager that removes at its end.
        Applying to layers that are already patched replaces, whichever model object holds them.

    Raises:
        SparsekitError: a config that is wrong or is for another model, or has a `precision` that cannot run there; a
        model outside the interface, or one that runs a forward just now; prompts that cannot be checked. After any
        exception the model is as it was.
    """
    if check is None:
        return put_on(model, cfg)
    found = _check(model, load(cfg), check, tokenizer, NEXT_TOKENS, lambda steps, what: None)
    if found.held is False:
        if not found.kept:
            raise SparsekitError(found.verdict())
        warnings.warn(f"sparsekit.apply(check=): {found.verdict()}", RuntimeWarning, stacklevel=2)
    return put_on(model, found.config, {layer: found.why(layer) for layer in found.given_back}, found)


def check(
    model: PreTrainedModel,
    cfg: SparseConfig | Mapping[str, Any] | str | Path,
    prompts: Sequence[Any],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    next_tokens: int = NEXT_TOKENS,
    step: Callable[[int, str], object] = lambda steps, what: None,
) -> CheckReport:
    """Hold a config to its budget on your own prompts; the model is then as it was.

    KL(dense || config) of the tokens that follow each prompt: those that dense attention decodes greedily. Where its
    mean exceeds the budget, each sparse layer is measured alone, and layers go back to dense attention, the greatest
    KL first, until it holds. Without a budget it is reported, and nothing runs dense.

    Args:
        model: as for `apply`, in eval mode. It must not be used elsewhere meanwhile.
        cfg: as for `apply`; its `budget` is what it is held to.
        prompts: a list; each a text, token ids (a list or a tensor of one row), or a list of chat messages.
        tokenizer: of prompts that are texts or chats.
        next_tokens: tokens after each prompt, at most; fewer where the model ends its text.
        step: told of each prompt that was read, and of what for.

    Raises:
        SparsekitError: a prompt that is too short to run sparse, or too long for the model, by its name; as `apply`.
    """
    return _check(model, load(cfg), prompts, tokenizer, next_tokens, step)


def _check(
    model: PreTrainedModel,
    config: SparseConfig,
    prompts: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    next_tokens: int,
    step: Callable[[int, str], object],
) -> CheckReport:
    if isinstance(next_tokens, bool) or not isinstance(next_tokens, int) or next_tokens < 1:
        raise SparsekitError(f"next_tokens = {next_tokens!r}: a whole number of at least 1 is needed.")
    with left_alone(model), torch.inference_mode():
        with put_on(model, config) as handle:
            sparse = [
                layer.patterns.layer for layer in handle._applied.layers if not (layer.own or layer.patterns.exact)
            ]
            embeddings: Any = model.get_input_embeddings()
            if config.dense_below_tokens == AUTO:  # with layers given back it is another config, of which no table is
                config = config.model_copy(update={"dense_below_tokens": handle.resolved.config.dense_below})
            read = prompts_of(prompts, tokenizer, int(embeddings.weight.shape[0]))
            _check_prompts(model, handle.resolved, sparse, read, next_tokens)
            measured = _Measured(model, config, read, sparse, step)
            measured.read_dense(handle, next_tokens)
        return replace(measured.report(next_tokens), settled=handle.resolved.settled)


def _check_prompts(
    model: PreTrainedModel, resolved: ResolvedConfig, sparse: Sequence[int], prompts: Sequence[UserPrompt], after: int
) -> None:
    """Refuse what would say nothing: no layer to check, dropout, prompts that run dense or leave the positions."""
    if not sparse:
        raise SparsekitError("the config runs no layer of this model sparse or in FP8, so there is nothing to check.")
    if model.training:
        raise SparsekitError("the model is in training mode, where dropout changes its answers: model.eval() first.")
    config = resolved.config
    patterns = {pattern for layer in sparse for pattern in resolved.layers[layer].patterns if pattern.name != "dense"}
    least = {
        pattern: pattern.dense_below(model.device) if isinstance(pattern, DynamicPattern) else 0 for pattern in patterns
    }
    needs = [(config.min_queries, "min_queries"), (config.dense_below, "dense_below_tokens")]
    if least and all(resolved.layers[layer].impl is None for layer in sparse):
        first = min(patterns, key=lambda pattern: (least[pattern], str(pattern)))
        needs.append((least[first], f"{first.name} runs dense below that on {model.device.type}"))
    needed, why = max(needs)
    short = [prompt for prompt in prompts if len(prompt.ids) < needed]
    if short:
        named = ", ".join(f"{prompt.name} ({len(prompt.ids)} tokens)" for prompt in short[:8])
        more = f" and {len(short) - 8} more" if len(short) > 8 else ""
        raise SparsekitError(
            f"too short to run sparse: {named}{more}; this config needs at least {needed} tokens ({why})."
        )
    for prompt in prompts:
        total = len(prompt.ids) + after
        check_positions(model, total, f"{prompt.name}: {len(prompt.ids)} tokens and the {after} that follow")


class _Measured:
    """KL from dense of a config's variants on each prompt, each measured once; a variant is what it gives back.

    Attributes:
        truths: of each prompt, the tokens that dense attention decodes, int64 (1, A).
        dense: of each prompt, dense attention's logits at these tokens, (1, A, vocabulary), on the CPU.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: SparseConfig,
        prompts: Sequence[UserPrompt],
        sparse: Sequence[int],
        step: Callable[[int, str], object],
    ) -> None:
        self.model, self.config, self.prompts, self.sparse, self.step = model, config, prompts, sparse, step
        self.truths: list[Tensor] = []
        self.dense: list[Tensor] = []
        self._kl: dict[tuple[frozenset[int], int], float] = {}

    def read_dense(self, handle: Handle, next_tokens: int) -> None:
        """What dense attention says after each prompt."""
        with handle.pause():
            for i, prompt in enumerate(self.prompts):
                tokens = greedy(self.model, *self._prefill(i), next_tokens, lambda _: False)
                self.truths.append(torch.tensor([tokens], dtype=torch.int64, device=self.model.device))
                self.dense.append(self._read(i, nullcontext()))  # as the config is read, in one step and not in many
                self.step(1, f"dense: {prompt.name}")

    def report(self, next_tokens: int) -> CheckReport:
        before = Divergence(tuple(self.kl((), i) for i in range(len(self.prompts))))
        budget, after = self.config.budget, before
        alone: dict[int, float] = {}
        back: list[int] = []
        if budget is not None and before.mean > budget.kl:
            worst = sorted(range(len(self.prompts)), key=lambda i: -before.kl[i])
            for layer in self.sparse:
                others = [other for other in self.sparse if other != layer]
                alone[layer] = mean(self.kl(others, i) for i in worst[:BLAMED_PROMPTS])
            ranked = sorted(self.sparse, key=lambda layer: -alone[layer])
            back, _ = give_back_until(ranked, lambda tried: (self._holds(tried, worst, budget.kl),), few=1)
            after = Divergence(tuple(self.kl(back, i) for i in range(len(self.prompts))))
        config = self._given_back(back)
        lengths = tuple(len(prompt.ids) for prompt in self.prompts)
        if budget is not None:
            measured = MeasuredOn(
                source=", ".join(dict.fromkeys(prompt.source for prompt in self.prompts)),
                count=len(self.prompts),
                tokens=(min(lengths), max(lengths)),
                next_tokens=next_tokens,
                kl=_short(after.mean),
                half_width=None if after.half_width is None else _short(after.half_width),
            )
            said = {"kl": budget.kl, "prompts": measured.model_dump(mode="json", exclude_none=True)}
            config = load({**config.to_dict(), "budget": said})
        names = tuple(prompt.name for prompt in self.prompts)
        return CheckReport(config, names, lengths, next_tokens, before, after, alone, tuple(back))

    def kl(self, back: Sequence[int], i: int) -> float:
        """Of prompt i, with these layers dense."""
        key = frozenset(back), i
        if key not in self._kl:
            with put_on(self.model, self._given_back(sorted(back))) as handle:
                got = self._read(i, handle.pause())
                if not back:
                    self._check_sparse(handle, i)
            kl = divergence(logprobs(self.dense[i]), logprobs(got))
            if not math.isfinite(kl):
                name = self.prompts[i].name
                raise SparsekitError(
                    f"{name}: KL from dense is {kl}: the model's logits are not finite in {self.model.dtype}."
                )
            self._kl[key] = max(kl, 0.0)  # rounding may take it below
            self.step(1, f"{len(back)} layers dense: {self.prompts[i].name}" if back else self.prompts[i].name)
        return self._kl[key]

    def _given_back(self, back: Sequence[int]) -> SparseConfig:
        return give_back(self.config, back, facts=facts_of(self.model))

    def _holds(self, back: Sequence[int], order: Sequence[int], budget: float) -> bool:
        """Whether the mean is within the budget; prompts are read until their sum exceeds what all may add up to."""
        found: list[float] = []
        for i in order:
            found.append(self.kl(back, i))
            if sum(found) / len(order) > budget * (1 + 1e-9):  # a sum's rounding decides nothing
                return False
        return Divergence(tuple(found)).mean <= budget

    def _prefill(self, i: int) -> tuple[Tensor, Any]:
        """Of prompt i, as the model runs now: logits (1, vocabulary) of the next token, and the cache."""
        ids = torch.tensor([self.prompts[i].ids], dtype=torch.int64, device=self.model.device)
        return end_of_prompt(self.model, self.model(ids, use_cache=True, logits_to_keep=1))

    def _read(self, i: int, paused: AbstractContextManager[None]) -> Tensor:
        """Logits at the tokens that follow prompt i: its prefill as the model runs now, then paused."""
        first, cache = self._prefill(i)
        with paused:
            return read_truth(self.model, first, cache, self.truths[i]).cpu()

    def _check_sparse(self, handle: Handle, i: int) -> None:
        rows = [row for row in handle.report().layers if row.layer in self.sparse]
        if not any(row.sparse or row.impl in FAMILIES["fp8"] for row in rows):
            prompt = self.prompts[i]
            raise SparsekitError(
                f"{prompt.name} ({len(prompt.ids)} tokens) is too short to run sparse: {rows[0].pattern} in layer "
                f"{rows[0].layer}: {rows[0].why}; give a longer one, or smaller patterns."
            )


def _short(number: float) -> float:
    """Of four digits, as a file says it."""
    return float(f"{number:.4g}")
