"""Read config files and command-line options as recipes, and write them."""

import argparse
import pprint
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields, is_dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, TypeVar

from vim.command_line import sibling
from vim.engine.config_files import find_config
from vim.engine.files import write_text
from vim.errors import UserError, check_installed, closest, describe
from vim.fields import Section, check, read
from vim.options import CHECKED, ImageRecipe, Recipe, SeriesRecipe, help_text

check_installed("accelerate", "matplotlib", "mmengine", "rich", purpose="training or evaluation")
from mmengine.config import Config, DictAction  # noqa: E402

R = TypeVar("R", bound=Recipe)
SECTIONS = [section.name for section in fields(ImageRecipe)]
OWN = "; a variable of the file's own has a name that begins with _"


class OptionsAction(DictAction):
    """Parse the words KEY=VALUE as mmengine does."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Raise UserError for a word that is not KEY=VALUE."""
        for word in values or ():
            if "=" not in word:
                raise UserError(f"--cfg-options takes KEY=VALUE, got {word!r}: other arguments go before it")
        super().__call__(parser, namespace, values, option_string)


def add_config_arguments(parser: argparse.ArgumentParser, kind: type[Recipe] = ImageRecipe) -> None:
    """Add the arguments that every tool with a config shares; `--help-options` lists the options of `kind`."""
    parser.add_argument("config", type=Path, help="a config's file, or FILE.py:ROW for a row of a table")
    parser.add_argument("--work-dir", type=Path, help="where results go (default: work_dirs/ and the config's name)")
    parser.add_argument("--amp", choices=("no", "bf16", "fp16"), help="precision of the matrix products")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=OptionsAction,
        default={},
        metavar="KEY=VALUE",
        help="change the config, such as schedule.num_epochs=10",
    )
    parser.add_argument("--help-options", action=_HelpOptions, kind=kind, help="list a config's options, and exit")


def add_run_arguments(parser: argparse.ArgumentParser, kind: type[Recipe] = ImageRecipe) -> None:
    """Add the arguments of the tools that train."""
    add_config_arguments(parser, kind)
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="CHECKPOINT",
        help="resume from a checkpoint, by default the newest readable one of the work dir if there is one",
    )


class _HelpOptions(argparse.Action):
    """Print the options of a config's sections, and exit."""

    def __init__(self, option_strings: Sequence[str], dest: str, kind: type[Recipe], **rest: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **rest)
        self.kind = kind

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        sys.stdout.write(help_text(self.kind))
        parser.exit()


def recipe_of(arguments: argparse.Namespace, kind: type[R]) -> R:
    """The recipe that the arguments of :func:`add_config_arguments` name."""
    amp = {"train.amp": arguments.amp} if arguments.amp else {}
    return load_recipe(arguments.config, kind, {**arguments.cfg_options, **amp})


def load_recipe(path: Path, kind: type[R], options: Mapping[str, object] | None = None) -> R:
    """Read a config file, or a row of a table of configs, and merge the options into it.

    A table is a config file with a dict `rows`: each row holds the sections, or parts of sections, that distinguish
    one run, and is merged into the sections that all rows share. A variable of the file's own has a name that begins
    with an underscore.

    Args:
        path: FILE.py, or FILE.py:ROW.
        kind: :class:`ImageRecipe` or :class:`SeriesRecipe`.
        options: such as {"schedule.num_epochs": 10}.

    Raises:
        UserError: the file is missing, not valid Python, or lacks a section; there is no such row or section; or an
            option or a value does not fit.
    """
    return _recipe(_sections(path, options).to_dict(), kind, f"the config {path}")


def row_names(file: Path) -> list[str]:
    """The rows of a table of configs; none of a file that is one config.

    Raises:
        UserError: as :func:`load_recipe`.
    """
    return list(_read(file).get("rows", {}))


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write a config from which :func:`load_recipe` reads the same recipe, with every default written out."""
    sections = asdict(recipe).items()
    # mmengine's own dump takes seconds
    write_text(path, "".join(f"{name} = {pprint.pformat(value, width=110)}\n" for name, value in sections))


def recipe_name(path: Path) -> str:
    """The row's name, or the file's name without `.py`."""
    file, row = _split(path)
    return row or file.stem


def work_dir_of(arguments: argparse.Namespace) -> Path:
    """The folder for results: `--work-dir`, or by default work_dirs/ and the recipe's name."""
    return arguments.work_dir or Path("work_dirs") / recipe_name(arguments.config)


@contextmanager
def reading(section: str) -> Iterator[None]:
    """Turn any exception of this block into a UserError that names the config's section."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # timm and torch raise many kinds
        raise UserError(f"the config's {section} does not fit: {describe(error)}") from error


def _split(path: Path) -> tuple[Path, str]:
    """FILE.py:ROW as (FILE.py, ROW); ROW is empty if the path names no row."""
    file, colon, row = str(path).rpartition(".py:")
    return (Path(f"{file}.py"), row) if colon else (path, "")


def _sections(path: Path, options: Mapping[str, object] | None) -> Config:
    """Read the file and merge the row and the options into it, without checking any option."""
    file, row = _split(path)
    config = _read(file)
    _merge_row(config, file, row)
    _check_names([name.split(".")[0] for name in options or {}], SECTIONS, "--cfg-options")
    _merge(config, options or {}, f"--cfg-options does not fit the config {path}")
    return Config({name: config[name] for name in SECTIONS if name in config})


def _read(file: Path) -> Config:
    """Read a file with all its rows."""
    found = find_config(file)
    try:
        config = Config.fromfile(str(found), use_environment_variables=False)
    except Exception as error:  # mmengine raises what the file raises
        raise UserError(f"cannot read the config {file}: {type(error).__name__}: {error}") from error
    _check_names([name for name in config if not name.startswith("_")], [*SECTIONS, "rows"], str(file), OWN)
    return config


def _check_names(names: Sequence[str], known: Sequence[str], source: str, hint: str = "") -> None:
    for name in names:
        if name not in known:
            others = f"{closest(name, known)}, only {', '.join(known)}{hint}"
            raise UserError(f"{source} has {name}: a config has no such section {others}")


def _merge(config: Config, changes: Mapping[str, object], problem: str) -> None:
    try:
        config.merge_from_dict(dict(changes))
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise UserError(f"{problem}: {error}") from error


def _merge_row(config: Config, file: Path, row: str) -> None:
    """Merge the named row of a table into the sections that all rows share."""
    rows = config.get("rows", {})
    if not row and not rows:
        return
    if not rows:
        raise UserError(f"{file} is one config, not a table: leave out :{row}")
    if row not in rows:
        problem = f"has no row {row}" if row else f"is a table of configs: name a row, {file}:ROW"
        closest = sorted(rows, key=lambda name: -SequenceMatcher(None, name, row).ratio())
        more = f" and {len(closest) - 5} more" if len(closest) > 5 else ""
        raise UserError(f"{file} {problem}; its rows are {', '.join(closest[:5])}{more}")
    problem = f"the row {row} does not fit the table {file}"
    if not isinstance(rows[row], dict):
        raise UserError(f"{problem}: expected a dict of sections, got {rows[row]!r}")
    _check_names(list(rows[row]), SECTIONS, f"the row {row} of {file}")
    _merge(config, rows[row], problem)


def _recipe(sections: Section, kind: type[R], source: str) -> R:
    """Check the sections and make them a recipe."""
    required = [section.name for section in fields(kind) if section.default is MISSING]
    missing = [name for name in required if name not in sections]
    if missing:
        raise UserError(f"{source} lacks {', '.join(missing)}: a config has {', '.join(required)}")
    data = sections["data"] if isinstance(sections["data"], dict) else {}
    is_series, is_images = "lookback" in data, "num_workers" in data  # each is required of its kind
    if (kind is ImageRecipe and is_series) or (kind is SeriesRecipe and is_images and not is_series):
        other = sibling("train" if kind is SeriesRecipe else "forecast")
        raise UserError(f"{source} is for another kind of task: use {other}")
    for name in sections:
        if name not in [section.name for section in fields(kind)]:
            raise UserError(f"{source} has {name}, which is for images: a forecast takes none")
    built: Section = {}
    for section in fields(kind):
        values, options = sections.get(section.name), section.type
        if values is None and section.name not in required:
            continue
        if not isinstance(values, dict):
            raise UserError(f"{section.name} must be a dict in {source}, got {values!r}")
        if section.name in CHECKED:
            built[section.name] = check(CHECKED[section.name], section.name, values, source)
        else:
            assert isinstance(options, type) and is_dataclass(options)
            built[section.name] = read(options, section.name, values, source)
    return kind(**built)
