"""The command `vim-zoo`: the programs of this folder, which is installed as the package `vim_zoo`.

It is no part of `vim`, which imports PyTorch: `vim-zoo --help` answers at once.
"""

import ast
import runpy
import shutil
import sys
import textwrap
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path

# the commands and their files
TOOLS = {
    "train": "train",
    "test": "test",
    "test-video": "test_video",
    "predict": "predict",
    "explain": "explain",
    "features": "features",
    "forecast": "forecast",
    "convert": "convert",
    "export": "export",
    "info": "model_info",
    "benchmark": "benchmark",
    "demo": "demo",
    "configs": "configs",
}
# those that run the programs of others, with their own errors and signals
RUNNERS = {
    "run": ("vim.runner", "Run a program that takes timm's models, such as timm's own scripts, with those of vim."),
    "compat": ("vim.compat.runner", "Run a program of a published Mamba repository: the same as vim-compat."),
}


def main() -> None:
    """Run the command that the first word names, or describe all."""
    name, *words = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        sys.stdout.write(overview())
    elif name == "--version":
        from vim.command_line import version

        sys.stdout.write(f"{version()}\n")
    elif name in TOOLS:
        sys.argv = [f"vim-zoo {name}", *words]
        runpy.run_module(f"{__name__}.{TOOLS[name]}", run_name="__main__")
    elif name in RUNNERS:
        sys.argv = [f"vim-zoo {name}", *words]
        import_module(RUNNERS[name][0]).main()
    else:
        near = ", ".join(get_close_matches(name, [*TOOLS, *RUNNERS])) or "none"
        sys.stderr.write(f"error: no such command: {name!r} (the closest: {near}); see vim-zoo --help\n")
        sys.exit(2)


def overview() -> str:
    """The commands, each with the first line of its file's docstring."""
    about = {name: _first_line(Path(__file__).with_name(f"{file}.py")) for name, file in TOOLS.items()}
    about |= {name: line for name, (_, line) in RUNNERS.items()}
    width = shutil.get_terminal_size().columns
    indent = " " * 14
    lines = [
        textwrap.fill(line, width, initial_indent=f"  {name:<12}", subsequent_indent=indent)
        for name, line in about.items()
    ]
    head = "usage: vim-zoo COMMAND [ARGS]\n\nTrain, use and measure vision Mamba models.\n\ncommands:"
    foot = "`vim-zoo COMMAND --help` has examples, `vim-zoo --version` the versions and the backends of the kernels."
    return "\n".join([head, *lines, "", textwrap.fill(foot, width), ""])


def _first_line(file: Path) -> str:
    return (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n")[0]
