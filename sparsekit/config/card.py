"""The page of a repository that holds configs: README.md, from what the configs themselves say."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sparsekit.config.budget import Budget
from sparsekit.config.costs import explain
from sparsekit.config.facts import COMPARED
from sparsekit.config.hub import HUB
from sparsekit.config.precision import asked_precision
from sparsekit.config.schema import SparseConfig
from sparsekit.config.strict_yaml import dump_yaml
from sparsekit.patterns.fields import AUTO

__all__ = ["card", "is_hub_id"]

LIBRARY = "sparsekit"
TAGS = ("sparse-attention", "long-context")
CHECKS = (
    "task",
    "tokens",
    "samples",
    "dense",
    "sparse",
    "same",
    "kl",
    "verdict",
)  # of a gate, as `calibrate` writes it
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def is_hub_id(name: str) -> bool:
    """Whether a model's name can be that of a repository."""
    return _HUB_ID.fullmatch(name) is not None


def card(
    repo: str,
    configs: Mapping[str, SparseConfig],
    *,
    tokens: int = 32768,
    base_model: str | None = None,
    license: str | None = None,
) -> str:
    """Markdown with front matter: which model the configs fit, how they are used, what each runs, promises and passed.

    Args:
        repo: where they will be, `owner/name`.
        configs: by the file's name; all of one model, which they name with its numbers of layers and heads.
        tokens: the prompt length at which each is explained.
        base_model: the model's repository; default the configs' `model.name`, where that is one.
        license: an identifier of the hub, such as `apache-2.0`; default none.

    Raises:
        SparsekitError: `tokens` out of range.
    """
    from sparsekit import __version__

    facts = next(iter(configs.values())).model
    name = str(facts.name)
    base = base_model or (name if is_hub_id(name) else None)
    said = {"library_name": LIBRARY, "license": license, "base_model": base, "tags": list(TAGS)}
    front = dump_yaml({key: value for key, value in said.items() if value}, "front matter")
    alone = len(configs) == 1
    source = HUB + repo if alone else f"{HUB}{repo}/{next(iter(configs))}"
    # vLLM's layers have no precision but the model's.
    served = all(asked_precision(config.precision) is None for config in configs.values())
    with_vllm = f'With vLLM: `vllm serve {base or "MODEL"} --additional-config \'{{"sparsekit": "{source}"}}\'`.'
    known = {name: getattr(facts, name) for name in ("name", *COMPARED)}
    parts = [
        f"---\n{front}---",
        f"# {repo}",
        f"Sparse attention for the prefill of {_code(base or name)}, as sparsekit runs it (`pip install "
        f"sparsekit-attention`): {'a config' if alone else f'{len(configs)} configs'} of what each layer and head "
        "attends to. Decoding is the model's own. There are no weights here, and no code.",
        "## Use",
        f'With transformers: `sparsekit.apply(model, "{source}")`.',
        *([with_vllm] if served else []),
        *([] if alone else [f"Each file of the list below is `{HUB}{repo}/FILE`."]),
        f"`@COMMIT` behind `{repo}` names one version for good.",
        "## Model",
        "sparsekit refuses a model that differs from these files' own in one of these facts, its name aside.",
        _table(("fact", "value"), ((_code(name), _value(value)) for name, value in known.items() if value is not None)),
        *(part for file, config in configs.items() for part in _of_config(file, config, tokens)),
        f"This page was written by sparsekit {__version__}.",
    ]
    return "\n\n".join(parts) + "\n"


def _of_config(file: str, config: SparseConfig, tokens: int) -> Iterable[str]:
    yield f"## {_code(file)}"
    short = config.dense_below_tokens
    # A page is read anywhere: what `auto` is on this machine, and in which of its files that stands, is not for it.
    yield _fenced(str(explain(_without_auto(config.to_dict()), tokens)), "")
    if short == AUTO:
        yield "Shorter prompts than `sparsekit bench crossover` measured to gain run the model's own attention."
    elif short:
        yield f"Prompts of fewer than {short:,} tokens run the model's own attention."
    yield f"**Budget.** {_of_budget(config.budget)}"
    gate = config.provenance.get("gate")
    yield from _of_gate(gate if isinstance(gate, Mapping) else None)
    rest = {key: value for key, value in config.to_dict().get("provenance", {}).items() if key != "gate"}
    if rest:
        yield f"**Provenance**, as the file says it:\n\n{_fenced(dump_yaml(rest, 'provenance'), 'yaml')}"


def _without_auto(value: Any) -> Any:
    """The fields of a config, but each `dense_below_tokens: auto`."""
    if isinstance(value, Mapping):
        return {key: _without_auto(one) for key, one in value.items() if (key, one) != ("dense_below_tokens", AUTO)}
    return [_without_auto(one) for one in value] if isinstance(value, list) else value


def _of_budget(budget: Budget | None) -> str:
    if budget is None:
        return "The file promises none."
    said = f"Mean KL from dense attention of the tokens that follow a prompt: at most {budget.kl:g} nats a token."
    on = budget.prompts
    if on is None:
        return f"{said} The file does not say on which prompts it was held."
    found = "" if on.kl is None else f", {on.kl:g} found"
    width = "" if on.half_width is None else f" ± {on.half_width:g}"
    lengths = f"{on.tokens[0]:,} to {on.tokens[1]:,} tokens"
    return f"{said} Held on {on.count} prompts of {lengths} ({_code(on.source)}){found}{width}."


def _of_gate(gate: Mapping[str, Any] | None) -> Iterable[str]:
    if gate is None:
        yield "**Gate.** The file has no result of one."
        return
    passed = "Passed" if gate.get("passed") is True else "Not passed" if gate.get("passed") is False else "Not told"
    lost = gate.get("bound_lost_answers")
    bound = f"; at most {lost:.0%} of dense attention's answers may be lost" if isinstance(lost, int | float) else ""
    where = ", ".join(_value(gate[key]) for key in ("device", "dtype", "date") if key in gate)
    yield f"**Gate.** {passed}{bound}{f' ({where})' if where else ''}."
    checks = gate.get("checks")
    rows = [one for one in checks if isinstance(one, Mapping)] if isinstance(checks, Sequence) else []
    columns = [name for name in CHECKS if any(name in row for row in rows)]
    if rows and columns:
        yield _table(columns, ([_value(row.get(name, "")) for name in columns] for row in rows))


# ---- Markdown


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _value(value: Any) -> str:
    """In a table's cell, or in a sentence: as text, on one line."""
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return re.sub(r"([\\`*_{}\[\]<>|~$])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    """Within a line: between more backticks than the text has in a row."""
    fence, space = "`" * (_longest_run(text) + 1), " " if "`" in text else ""
    return f"{fence}{space}{' '.join(text.split())}{space}{fence}"


def _fenced(text: str, language: str) -> str:
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
