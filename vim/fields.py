"""Fields of dataclasses that hold options: type, range, default and help, and how values are checked against them."""

import math
from collections.abc import Mapping
from copy import copy
from dataclasses import MISSING, Field, field, fields
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

from vim.errors import UserError, closest

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Section = dict[str, Any]  # keyword arguments of a function, mostly of timm's
T = TypeVar("T")
D = TypeVar("D", bound="DataclassInstance")


class Option(NamedTuple):
    """The metadata of a field: help; for numbers the range; for a dict the dataclass of its options."""

    help: str
    at_least: float = -math.inf
    above: float = -math.inf
    at_most: float = math.inf
    below: float = math.inf
    keys: "type[DataclassInstance] | None" = None


def option(default: T, help: str, **details: Any) -> T:
    """A field that a config may leave out, or set to None, for its default; `details` are those of :class:`Option`."""
    return field(default_factory=lambda: copy(default), metadata={"option": Option(help, **details)})


def required(help: str, **details: Any) -> Any:
    """A field that a config must set."""
    return field(metadata={"option": Option(help, **details)})


def read(kind: type[D], section: str, values: Mapping[str, object], source: str = "the config") -> D:
    """Check a section of a config and return it as the dataclass `kind`.

    Args:
        section: the section's name, for error messages.
        values: the options by name; None stands for an option's default.
        source: what the section was read from, for error messages: "the config a.py".

    Raises:
        UserError: an option is unknown, missing, of the wrong type or out of range.
    """
    checked = check(kind, section, values, source)
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in checked.items()})


def check(kind: type["DataclassInstance"], section: str, values: Mapping[str, object], source: str) -> Section:
    """Return the values that are set, checked: without those that are None and stand for the default.

    Raises:
        UserError: an option is unknown, missing, of the wrong type or out of range, or does not fit another.
    """
    known = {one.name: one for one in fields(kind)}
    checked: Section = {}
    for name, value in values.items():
        if name not in known:
            if not getattr(kind, "takes_others", False):
                options = f"{closest(str(name), known)}, only {', '.join(known)}"
                raise UserError(f"{section} has no option {name} in {source} {options}")
            if not _finite(value):
                raise UserError(f"{section}.{name} must be finite in {source}, got {value!r}")
            checked[name] = value
    for name, one in known.items():
        value, keys = values.get(name), one.metadata["option"].keys
        if value is None and one.default_factory is not MISSING:
            continue
        if not _fits(one.type, one.metadata["option"], value):
            quotes = " (put a number in quotes)" if str in _kinds(one) and isinstance(value, int | float) else ""
            raise UserError(f"{section}.{name} must be {describe(one)} in {source}, got {value!r}{quotes}")
        if keys is not None and isinstance(value, dict):
            value = check(keys, f"{section}.{name}", value, source)
        checked[name] = value
    kind(**{name: value for name, value in checked.items() if name in known})  # checks them against one another
    return {name: checked[name] for name in values if name in checked}  # in the order of the config


def describe(one: "Field[object]") -> str:
    """The values that an option takes, in words: "a whole number >= 1"."""
    limits = one.metadata["option"]
    signs = {">=": limits.at_least, ">": limits.above, "<=": limits.at_most, "<": limits.below}
    bounds = " and".join(f" {sign} {bound:g}" for sign, bound in signs.items() if math.isfinite(bound))
    return " or ".join(_describe(kind, bounds) for kind in sorted(_kinds(one), key=lambda kind: kind is not NoneType))


def _describe(kind: Any, bounds: str) -> str:
    parts = get_args(kind)
    if get_origin(kind) is Literal:
        *names, last = map(repr, parts)
        return f"{', '.join(names)} or {last}" if names else last
    if get_origin(kind) is tuple:
        if parts[0] is str:
            return "a list of names"
        numbers = "whole numbers" if parts[0] is int else "numbers"
        return f"a list of {numbers}{bounds}" if parts[1] is Ellipsis else f"two numbers{bounds}, the smaller first"
    if parts[1:] == (float,):
        return f"a dict of numbers{bounds}"
    words = {int: "a whole number", float: "a number", bool: "True or False", str: "a string", NoneType: "None"}
    return words.get(kind, "a dict") + (bounds if kind in (int, float) else "")


def markdown_table(kind: type["DataclassInstance"]) -> str:
    """The options of a section as a table for docs/."""
    lines = ["| option | value | default | |", "|---|---|---|---|"]
    for one in fields(kind):
        lines.append(f"| `{one.name}` | {describe(one)} | {default_of(one)} | {one.metadata['option'].help} |")
    return "\n".join(lines)


def default_of(one: "Field[object]") -> str:
    """An option's default in words."""
    if one.default_factory is MISSING:
        return "required"
    default = one.default_factory()
    return repr(list(default) if isinstance(default, tuple) else default)


def _kinds(one: "Field[object]") -> tuple[Any, ...]:
    """The types of an option, such as float and NoneType."""
    return get_args(one.type) if get_origin(one.type) in (UnionType, Union) else (one.type,)


def _finite(value: object) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _fits(hint: Any, limits: Option, value: Any) -> bool:
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind in (UnionType, Union):
        return any(_fits(part, limits, value) for part in parts)
    if kind is Literal:
        return isinstance(value, str) and value in parts
    if kind is tuple:
        if not isinstance(value, list | tuple) or not all(_fits(parts[0], limits, part) for part in value):
            return False
        return parts[1] is Ellipsis or (len(value) == 2 and value[0] <= value[1])
    if kind is dict and parts[1] is float:
        return isinstance(value, dict) and all(_fits(float, limits, part) for part in value.values())
    if kind is str:
        return isinstance(value, str) and "\0" not in value
    if kind not in (int, float):
        return isinstance(value, kind)
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        return False
    return limits.at_least <= value <= limits.at_most and limits.above < value < limits.below
