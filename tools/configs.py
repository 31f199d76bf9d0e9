"""List the configs that the package brings, or describe one and its rows.

Examples:
    vim-zoo configs
    vim-zoo configs vim/in1k.py
"""

import argparse
from pathlib import Path

from vim.command_line import Parser
from vim.engine.config_files import config_names, read_about
from vim.errors import run


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("config", type=Path, nargs="?", help="(default: list all)")
    return parser.parse_args()


def show_all() -> None:
    """Print each config's name, with :ROW behind a table's, and the first line of its docstring."""
    found = {name: read_about(Path(name)) for name in config_names()}
    lines = {f"{name}:ROW" if about.is_table else name: about.text.splitlines()[0] for name, about in found.items()}
    for name, line in lines.items():
        print(f"{name:<{max(map(len, lines))}}  {line}")


def show(config: Path) -> None:
    """Print a config's docstring, and how to name each of its rows."""
    from vim.engine.config import row_names

    rows = row_names(config)
    print(read_about(config).text)
    if rows:
        print("", "Rows:", *(f"  {config}:{row}" for row in rows), sep="\n")


def main() -> None:
    arguments = parse()
    if arguments.config:
        show(arguments.config)
    else:
        show_all()


if __name__ == "__main__":
    run(main)
