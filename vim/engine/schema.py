"""What a checkpoint of a run may hold: every entry with its type and range, checked before anything is built from it.

A file of a kilobyte can stand for gigabytes: by a number that is a model's depth, or by lists that hold one another. So
every number, every string and the number of all values is bounded.
"""

import math
import typing
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, NamedTuple, NotRequired, TypedDict, get_args, get_origin

from torch import Tensor

from vim.errors import UserError

MOST_VALUES = 1_000_000  # in a checkpoint, without the numbers in its tensors
MOST_LEVELS = 5  # of lists and dicts in one another, in a plain value


class Limits(NamedTuple):
    """The smallest and the greatest number, or length of a string."""

    least: float = -math.inf
    most: float = math.inf


class Plain:
    """None, a bool, a number, a string; or a list, a tuple or a dict of such values."""


class Stored:
    """A tensor, or a plain value."""


Text = Annotated[str, Limits(0, 4096)]
Whole = Annotated[int, Limits(-(10**15), 10**15)]
Count = Annotated[int, Limits(0, 10**15)]
Number = Annotated[float, Limits(-1e30, 1e30)]
Entries = dict[str, Plain]
Tensors = dict[str, Tensor]


class Meta(TypedDict):
    """What a model is, and how its inputs are prepared."""

    model: Entries
    # of a classifier
    classes: NotRequired[list[Text]]
    eval_transform: NotRequired[Entries]
    # of one whose images may have several labels
    task: NotRequired[Text]
    thresholds: NotRequired[list[Annotated[float, Limits(0, 1)]]]
    # of a forecaster
    data: NotRequired[Entries]
    columns: NotRequired[list[Text]]
    mean: NotRequired[Tensor]
    std: NotRequired[Tensor]
    static: NotRequired[Tensor | None]
    seconds: NotRequired[Annotated[float, Limits(0, 1e12)] | None]


class Position(TypedDict):
    """The fields of :class:`vim.engine.resuming.Position`."""

    epoch: Annotated[int, Limits(0, 10**7)]
    update: Count
    losses: Number
    aux: NotRequired[Number]  # saves of version 0.2 have none
    counted: Count
    skipped: Count


class Optimizer(TypedDict):
    """What `torch.distributed.checkpoint.state_dict` makes of an optimizer: the state of each parameter, by name."""

    state: dict[str, dict[str, Stored]]
    param_groups: list[dict[str, Stored]]


class Training(TypedDict):
    """What resuming takes; see :class:`vim.engine.loop.Loop`."""

    model: Tensors
    student: bool
    optimizer: Optimizer
    scaler: dict[str, Number]
    rows: list[dict[str, Number]]
    position: Position
    identity: Entries
    order: Entries
    notes: dict[str, list[Text]]


class Run(TypedDict):
    """A checkpoint of :class:`vim.engine.loop.Loop`, or its `model` and `meta` alone."""

    model: Tensors
    meta: Meta
    training: NotRequired[Training]


def check(value: object, kind: Any, name: str, source: str | Path) -> None:
    """Check a value against a type of this file.

    Args:
        name: what the value is called in an error, such as "meta"; empty for a whole file.
        source: the file that holds it.

    Raises:
        UserError: names the first value that is missing, unknown, of another type or out of range.
    """
    try:
        _check(value, kind, name, count())
    except ValueError as error:
        raise UserError(f"{source} is no sound checkpoint: {error}") from None


def brief(value: object) -> str:
    """A value of a file in a few words, however large or deep it is."""
    if isinstance(value, str):
        return repr(value[:60])
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, int | float | NoneType):
        return repr(value)
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    return f"a {type(value).__name__}"


def _check(value: Any, kind: Any, name: str, values: Iterator[int], levels: int = MOST_LEVELS) -> None:
    """Raise ValueError for a value that does not fit; `values` counts all, `levels` are left of a plain value."""
    if next(values) >= MOST_VALUES:
        raise ValueError(f"it holds more than {MOST_VALUES} values")
    limits = Limits()
    if get_origin(kind) is NotRequired:
        (kind,) = get_args(kind)
    if NoneType in get_args(kind):
        if value is None:
            return
        kind = get_args(kind)[0]
    if get_origin(kind) is Annotated:
        kind, limits = get_args(kind)
    if typing.is_typeddict(kind):
        _check_record(value, kind, name, values)
    elif kind in (Plain, Stored):
        _check_plain(value, kind, name, values, levels)
    elif get_origin(kind) in (dict, list):
        _check_all(value, get_origin(kind), get_args(kind)[-1], name, values, levels)
    elif not _fits(value, kind, limits):
        bounds = f" from {limits.least:g} to {limits.most:g}" if kind in (int, float) else ""
        words = {int: "a whole number", float: "a number", bool: "True or False", Tensor: "a tensor"}
        wanted = words.get(kind, f"a string of at most {limits.most} characters") + bounds
        raise ValueError(f"{name} must be {wanted}, got {brief(value)}")


def _fits(value: Any, kind: type, limits: Limits) -> bool:
    if kind is str:
        return isinstance(value, str) and len(value) <= limits.most
    if kind in (int, float):
        number = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
        return number and limits.least <= value <= limits.most  # nan is not
    return isinstance(value, kind)


def _check_record(value: Any, kind: Any, name: str, values: Iterator[int]) -> None:
    """Check a dict whose keys are known."""
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a dict, got {brief(value)}")
    hints = typing.get_type_hints(kind, include_extras=True)
    for key in hints:
        if key not in value and key in kind.__required_keys__:
            raise ValueError(f"{name or 'it'} lacks {key}")
    for key, part in value.items():
        if key not in hints:
            raise ValueError(f"{name or 'it'} has an entry {brief(key)}, and only {', '.join(hints)} are known")
        _check(part, hints[key], f"{name}.{key}" if name else key, values)


def _check_plain(value: Any, kind: Any, name: str, values: Iterator[int], levels: int) -> None:
    if isinstance(value, dict | list | tuple):
        if levels == 0:
            raise ValueError(f"{name} is within more than {MOST_LEVELS} lists")
        container = dict if isinstance(value, dict) else list
        _check_all(value, container, kind, name, values, levels - 1)
    elif isinstance(value, str | int | float) and not isinstance(value, bool):
        _check(value, Text if isinstance(value, str) else Whole if isinstance(value, int) else Number, name, values)
    elif not (isinstance(value, bool | NoneType) or (kind is Stored and isinstance(value, Tensor))):
        raise ValueError(f"{name} must be a plain value, got {brief(value)}")


def _check_all(value: Any, container: type, kind: Any, name: str, values: Iterator[int], levels: int) -> None:
    """Check a list, or a dict with any names as its keys."""
    if not isinstance(value, dict if container is dict else list | tuple):
        raise ValueError(f"{name} must be a {container.__name__}, got {brief(value)}")
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(value, dict):
            _check(key, Text, f"a name in {name}", values)
        _check(part, kind, f"{name}[{brief(key)}]", values, levels)
