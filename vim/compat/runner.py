"""`vim-compat SCRIPT ARGS` and `vim-compat -m MODULE ARGS`: run a program with the published names served.

It is a console script, and no `python -m`: it has imported this package before the program's folder, which may hold
another `vim`, comes onto the path.
"""

import argparse
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

from vim.errors import Parser, UserError, no_such

from .finder import install


def main() -> None:
    """Serve the names and run the program, with its own errors and exit status."""
    try:
        program, args, is_module = _prepare(sys.argv[1:])
        sys.argv = [program, *args]
        if is_module:
            sys.path.insert(0, str(Path.cwd()))
            _check_module(program)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    if is_module:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        if not Path(program).is_dir():  # a folder comes onto the path itself
            sys.path.insert(0, str(Path(program).resolve().parent))
        runpy.run_path(program, run_name="__main__")


def _prepare(argv: list[str]) -> tuple[str, list[str], bool]:
    """Serve the names as the options say; return the program, its arguments, and whether it is a module."""
    start = 0  # of the program, whose options are its own
    while start < len(argv) and argv[start].startswith("-") and argv[start] != "-m":
        start += 2 if argv[start] == "--alias" else 1
    options = _parse(argv[:start])
    program = argv[start:]
    is_module = program[:1] == ["-m"]
    program = program[1:] if is_module else program
    if not program:
        raise UserError("no program: expected vim-compat SCRIPT ARGS, or vim-compat -m MODULE ARGS")
    if not is_module:
        _check_script(Path(program[0]))
    install(prefer="ours" if options.prefer_ours else None, alias=dict(options.alias), cpu_shims=options.cpu_shims)
    return program[0], program[1:], is_module


def _check_script(path: Path) -> None:
    if not path.exists():
        raise no_such("script", path)
    if path.is_dir() and not (path / "__main__.py").exists():
        raise UserError(f"{path} is a folder without a __main__.py: expected a script, or -m and the name of a module")


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


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="vim-compat",
        usage="vim-compat [--cpu-shims] [--prefer-ours] [--alias FORK=NAME] (SCRIPT | -m MODULE) ARGS",
        description="Run a program of a published Mamba repository on vim's kernels, without its CUDA extensions.",
    )
    parser.add_argument("--cpu-shims", action="store_true", help="run code that asks for a GPU on the CPU")
    parser.add_argument("--prefer-ours", action="store_true", help="serve the names although the real ones are there")
    parser.add_argument("--alias", action="append", default=[], type=_alias, metavar="FORK=NAME", help="a renamed fork")
    return parser.parse_args(argv)


def _alias(text: str) -> tuple[str, str]:
    fork, equals, name = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected FORK=NAME, got {text!r}")
    return fork, name
