"""Other projects' settings: tables say which of their methods is which pattern here, and why the others are none."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from sparsekit.config.facts import ModelFacts
from sparsekit.config.schema import SparseConfig, load
from sparsekit.errors import SparsekitError, shown
from sparsekit.errors import nearest as nearest_name
from sparsekit.patterns import Pattern, parse_pattern, pattern_class

__all__ = [
    "Method",
    "Option",
    "checked_fields",
    "is_number",
    "method_of",
    "method_rows",
    "pattern_of",
    "refusal",
    "write_config",
]

LARGEST = 2**31 - 1


class Option(NamedTuple):
    """An option of a method that is a parameter of a pattern.

    Attributes:
        parameter: of the pattern.
        default: what a file means that leaves the option out.
        written: how the parameter follows from the option, where it is not the same number.
        turn: the same as a function.
    """

    parameter: str
    default: float | None
    written: str = ""
    turn: Callable[[Any], Any] = lambda value: value


@dataclass(frozen=True)
class Method:
    """A method of another project: the pattern that it is, or the reason why it is none.

    Attributes:
        pattern: whose parameters the options are; nothing: no pattern's.
        options: what becomes a parameter.
        only: option -> the one value that has a counterpart here, the default there, and why no other has.
        idle: options that do not change which pairs are kept.
        differs: how its selection is another one than the pattern's, or what it does; nothing: the same pairs are kept.
        nearest: the pattern to look at, where there is no `pattern`.
    """

    pattern: str = ""
    options: Mapping[str, Option] = field(default_factory=dict)
    only: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    idle: tuple[str, ...] = ()
    differs: str = ""
    nearest: str = ""


def checked_fields(value: Any, known: Collection[str], where: str) -> dict[str, Any]:
    """The mapping that a file has somewhere, nothing being an empty one.

    Raises:
        SparsekitError: no mapping, or a field that is not `known`; it begins with `where`.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise SparsekitError(f"{where}: {shown(value)}: want a mapping with {', '.join(known)}.")
    for name, given in value.items():
        if name not in known:
            raise SparsekitError(
                f"{where}: unknown field {shown(name)} = {shown(given)}; "
                f"allowed: {', '.join(known) or 'none'}.{nearest_name(name, known)}"
            )
    return dict(value)


def method_of(name: Any, methods: Mapping[str, Method], where: str) -> Method:
    """The method of that name.

    Raises:
        SparsekitError: there is none; it begins with `where`.
    """
    if not isinstance(name, str) or name not in methods:
        near = nearest_name(name, methods)
        raise SparsekitError(f"{where}: unknown method {shown(name)}; one of {', '.join(methods)}.{near}")
    return methods[name]


def refusal(name: str, method: Method, where: str) -> str:
    """Why a method is no pattern."""
    return f"{where}: {name} {method.differs}, which no pattern of sparsekit does; nearest: {method.nearest}."


def pattern_of(
    name: Any, options: Any, methods: Mapping[str, Method], where: str, *, nearest: bool = False
) -> tuple[Pattern, list[str]]:
    """The pattern of a method with these options, and the options that were left out because they change nothing.

    A pattern that has a crossover length is written without it: the other project has none.

    Args:
        nearest: where the selection differs, the pattern that is nearest to it.

    Raises:
        SparsekitError: an unknown method or option, a value without a counterpart, or a method that selects otherwise.
    """
    method, at = method_of(name, methods, where), f"{where}: {name}"
    if not method.pattern:
        raise SparsekitError(refusal(name, method, where))
    given = checked_fields(options, [*{**method.options, **method.only}, *method.idle], at)
    for option, (value, why) in method.only.items():
        if given.get(option, value) != value or isinstance(given.get(option), bool) != isinstance(value, bool):
            raise SparsekitError(f"{at}: {option} = {shown(given[option])}: {why}.")
    parameters: dict[str, Any] = {"name": method.pattern}
    if "dense_below_tokens" in pattern_class(method.pattern).model_fields:
        parameters["dense_below_tokens"] = 0
    for option, (parameter, default, _, turn) in method.options.items():
        value = given.get(option, default)
        if value is None and default is None:
            continue
        if not is_number(value):
            raise SparsekitError(f"{at}: {option} = {shown(value)}: it should be a number.")
        parameters[parameter] = turn(value)
    pattern = parse_pattern(parameters, at)
    if method.differs and not nearest:
        raise SparsekitError(
            f"{at} {method.differs}: another selection than that of sparsekit's {method.pattern}. Nearest: "
            f"{_flow(parameters)}; --nearest writes it."
        )
    return pattern, [option for option in given if option in method.idle]


def is_number(value: Any) -> bool:
    """Whether a value is a number that a parameter may be; no truth value, and nothing beyond 32 bits."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST


def _flow(parameters: Mapping[str, Any]) -> str:
    return f"{{{', '.join(f'{key}: {value}' for key, value in parameters.items())}}}"


def write_config(
    rules: Mapping[str, Any],
    source: Mapping[str, Any],
    path: str | Path,
    output: str | Path | None,
    model: ModelFacts | None,
    name: str | None = None,
) -> SparseConfig:
    """The config with these rules and this provenance, checked against a model and written where that is asked for.

    Args:
        path: the file that was read.
        name: the model's, a label, where no model is given.
    """
    facts: dict[str, Any] = {} if name is None else {"name": name}
    if model is not None:
        facts |= model.identity()
    config = load(
        {
            "version": 1,
            **({"model": facts} if facts else {}),
            **rules,
            "provenance": {"converted_from": Path(path).name, **source},
        }
    )
    if model is not None:
        config.resolve(model)
    if output is not None:
        config.dump(output)
    return config


def method_rows(methods: Mapping[str, Method]) -> list[tuple[str, str, str]]:
    """(methods, what they become, how they differ or what they do) in Markdown; those that are alike in one row."""
    alike: dict[int, list[str]] = {}
    for name, method in methods.items():
        alike.setdefault(id(method), []).append(f"`{name}`")
    rows = []
    for names in alike.values():
        method = methods[names[0].strip("`")]
        rows.append((", ".join(names), _becomes(method), _differs(method)))
    return rows


def _becomes(method: Method) -> str:
    if not method.pattern:
        return f"refused; nearest: {method.nearest}"
    parameters = []
    for name, (parameter, _, written, _) in method.options.items():
        parameters.append(f"`{parameter}`" if name == parameter else f"`{parameter}` = `{written or name}`")
    said = f"`{method.pattern}`{' with ' if parameters else ''}{', '.join(parameters)}"
    return f"`--nearest`: {said}" if method.differs else said


def _differs(method: Method) -> str:
    reasons: dict[str, list[str]] = {}
    for option, (value, why) in method.only.items():
        reasons.setdefault(why, []).append(f"`{option}`" if value is None else f"`{option}` other than {value}")
    parts = [method.differs or "the same pairs"]
    parts += [f"refused: {', '.join(named)}: {why}" for why, named in reasons.items()]
    return "; ".join(parts)
