"""Run a program that takes timm's models, such as timm's own scripts, with those of this package.

Examples:
    vim-zoo run validate.py PATH --model vim_tiny --pretrained
    vim-zoo run -m pytest test_models.py
"""

import argparse
import runpy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from vim.command_line import Parser
from vim.errors import UserError, no_such


@dataclass(frozen=True)
class Program:
    """A program and its arguments; the name is a module's or a path."""

    name: str
    args: list[str]
    is_module: bool

    def check(self) -> None:
        """Raise UserError where there is no such script."""
        path = Path(self.name)
        if self.is_module:
            return
        if not path.exists():
            raise no_such("script", path)
        if path.is_dir() and not (path / "__main__.py").exists():
            expected = "expected a script, or -m and the name of a module"
            raise UserError(f"{path} is a folder without a __main__.py: {expected}")

    def enter(self) -> None:
        """Make the arguments and the path the program's; raise UserError where Python finds no such module."""
        sys.argv = [self.name, *self.args]
        if self.is_module:
            sys.path.insert(0, str(Path.cwd()))
            _check_module(self.name)
        elif not Path(self.name).is_dir():  # a folder comes onto the path itself
            sys.path.insert(0, str(Path(self.name).resolve().parent))

    def run(self) -> None:
        """Run the program, with its own errors and exit status."""
        if self.is_module:
            runpy.run_module(self.name, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(self.name, run_name="__main__")


def main() -> None:
    """Run a program with the models registered, which importing this package did."""
    launch(parser(), lambda options: None)


def parser() -> Parser:
    """The parser of `vim-zoo run`, which has no options of its own."""
    return Parser(usage="%(prog)s (SCRIPT | -m MODULE) ARGS", description=__doc__)


def launch(parser: Parser, prepare: Callable[[argparse.Namespace], None]) -> None:
    """Run the program of the command line, after `prepare` with the parser's options; a mistake before it is a line.

    This package is imported before the program's folder, which may hold another `vim`, comes onto the path.
    """
    try:
        options, program = split(parser, sys.argv[1:])
        program.check()
        prepare(options)
        program.enter()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    program.run()


def split(parser: Parser, words: Sequence[str]) -> tuple[argparse.Namespace, Program]:
    """Split a command line into the parser's options and the program, whose options are its own.

    Raises:
        UserError: an option does not exist, or there is no program.
    """
    takes_value = {name for action in parser._actions if action.nargs is None for name in action.option_strings}
    start = 0  # of the program
    while start < len(words) and words[start].startswith("-") and words[start] != "-m":
        start += 2 if words[start] in takes_value else 1
    options = parser.parse_args(words[:start])
    is_module = words[start : start + 1] == ["-m"]
    program = list(words[start + is_module :])
    if not program:
        raise UserError(f"no program: expected {parser.prog} SCRIPT ARGS, or {parser.prog} -m MODULE ARGS")
    return options, Program(program[0], program[1:], is_module)


def _check_module(name: str) -> None:
    """Raise UserError where Python has no such module to run; packages around it are imported."""
    try:
        spec = find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            name = f"{name}.__main__"
            spec = find_spec(name)
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):  # another one, which a package around it imports
            raise
        spec = None
    if spec is None:
        raise UserError(f"no such module: {name}; expected the name of a module that Python finds from {Path.cwd()}")
