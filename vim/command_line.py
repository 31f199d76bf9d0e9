"""What the command lines of all programs share: the parser, its examples, and the version."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from vim._version import __version__
from vim.errors import UserError, closest
from vim.kernels import available_backends


class Parser(argparse.ArgumentParser):
    """A parser with `--version`, whose mistakes are UserErrors.

    A description that ends with a section "Examples:" has it moved behind the options.
    """

    def __init__(self, *, description: str | None = None, **options: Any) -> None:
        about, heading, examples = (description or "").partition("Examples:\n")
        options = {"prog": _program(), "formatter_class": argparse.RawDescriptionHelpFormatter, **options}
        super().__init__(description=about, epilog=heading.lower() + examples, **options)
        self.add_argument("--version", action=_Version, help="print the versions and the backends, and exit")
        self.register("type", Path, _path)
        self.register("type", int, _whole_number)

    def error(self, message: str) -> NoReturn:
        """Raise a UserError in place of writing the usage; for an unknown option it names the closest."""
        unknown = message.partition("unrecognized arguments: ")[2].partition(" ")[0].partition("=")[0]
        if unknown.startswith("-"):
            message += f" {closest(unknown, [name for action in self._actions for name in action.option_strings])}"
        raise UserError(f"{message}; see {self.prog} --help")


def _path(word: str) -> Path:
    if not word or "\0" in word:
        raise argparse.ArgumentTypeError(f"expected a path, got {word!r}")
    return Path(word)


def _whole_number(word: str) -> int:
    try:
        return int(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {word!r}") from None


class _Version(argparse.Action):
    """Print :func:`version`, and exit."""

    def __init__(self, option_strings: Sequence[str], dest: str, **rest: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, **rest)

    def __call__(self, parser: argparse.ArgumentParser, *rest: object) -> None:
        sys.stdout.write(f"{version()}\n")
        parser.exit()


def version() -> str:
    """The versions of the package and of PyTorch, and the backends that this machine has."""
    return f"vim-zoo {__version__}, PyTorch {torch.__version__}, backends {', '.join(available_backends())}"


def sibling(command: str, *words: str) -> str:
    """A line for a shell that runs another command as this one was run: `vim-zoo test`, or `python tools/test.py`."""
    by_name = sys.argv[0].startswith("vim-zoo ")
    program = ["vim-zoo", command] if by_name else ["python", f"tools/{command.replace('-', '_')}.py"]
    return shlex.join([*program, *words])


def _program() -> str:
    """What this program was started with: `vim-zoo test`, `vim-compat`, or `python tools/test.py`."""
    started = sys.argv[0]
    return f"python {started}" if started.endswith(".py") else Path(started).name
