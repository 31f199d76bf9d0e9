"""Processes that a program starts with `spawn` or `forkserver`: they serve the same names."""

from collections.abc import Callable
from multiprocessing import spawn

_original = spawn.get_preparation_data


class _Call:
    """Calls a function where it is unpickled."""

    def __init__(self, function: Callable[..., None], *args: object) -> None:
        self.reduced = function, args

    def __reduce__(self) -> tuple[Callable[..., None], tuple[object, ...]]:
        return self.reduced


def inherit(function: Callable[..., None], *args: object) -> None:
    """Have every such process call a function before it imports the program."""

    def get_preparation_data(name: str) -> dict[str, object]:
        return {**_original(name), "vim.compat": _Call(function, *args)}

    spawn.get_preparation_data = get_preparation_data


def disinherit() -> None:
    """Undo :func:`inherit`."""
    spawn.get_preparation_data = _original
