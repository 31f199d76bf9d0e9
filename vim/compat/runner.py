"""Run a program of a published Mamba repository on vim's kernels, without its CUDA extensions.

Examples:
    vim-compat train.py --their-options
    vim-compat --cpu-shims -m pytest tests
"""

import argparse

from vim.command_line import Parser
from vim.runner import launch

from .finder import install


def main() -> None:
    """Serve the names and run the program, with its own errors and exit status."""
    launch(parser(), _install)


def parser() -> Parser:
    """The parser of the options that go before the program."""
    built = Parser(
        usage="%(prog)s [--cpu-shims] [--prefer-ours] [--alias FORK=NAME] (SCRIPT | -m MODULE) ARGS",
        description=__doc__,
    )
    built.add_argument("--cpu-shims", action="store_true", help="run code that asks for a GPU on the CPU")
    built.add_argument("--prefer-ours", action="store_true", help="serve the names although the real ones are there")
    built.add_argument("--alias", action="append", default=[], type=_alias, metavar="FORK=NAME", help="a renamed fork")
    return built


def _install(options: argparse.Namespace) -> None:
    install(prefer="ours" if options.prefer_ours else None, alias=dict(options.alias), cpu_shims=options.cpu_shims)


def _alias(text: str) -> tuple[str, str]:
    fork, equals, name = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected FORK=NAME, got {text!r}")
    return fork, name
