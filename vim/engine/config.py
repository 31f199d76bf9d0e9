"""Configs: mmengine's, with mistakes told in a line."""

import argparse
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction

from vim.errors import UserError

SECTIONS = ("model", "data", "optimizer", "schedule", "train")


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments every tool that takes a config shares."""
    parser.add_argument("config", type=Path, help="a file below configs/")
    parser.add_argument("--work-dir", type=Path, help="where results go (default: work_dirs/ and the config's name)")
    parser.add_argument("--amp", choices=("no", "bf16", "fp16"), help="precision of the matrix products")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=DictAction,
        default={},
        metavar="KEY=VALUE",
        help="change the config, such as schedule.num_epochs=10",
    )


def load_config(path: Path, options: dict[str, Any] | None = None) -> Config:
    """Read a config file and merge the options into it.

    Raises:
        UserError: the file is missing, not valid Python, or lacks a section; or an option fits nowhere.
    """
    if not path.is_file():
        raise UserError(f"no such config: {path}")
    try:
        config = Config.fromfile(str(path), use_environment_variables=False)
    except Exception as error:  # mmengine raises what the file raises
        raise UserError(f"cannot read the config {path}: {type(error).__name__}: {error}") from error
    try:
        config.merge_from_dict(options or {})
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"--cfg-options does not fit the config {path}: {error}") from error
    missing = [section for section in SECTIONS if section not in config]
    if missing:
        raise UserError(f"the config {path} lacks {', '.join(missing)}: a config has {', '.join(SECTIONS)}")
    return config


def work_dir_of(arguments: argparse.Namespace) -> Path:
    """The folder for results: the one given, or work_dirs/ and the config's name."""
    return arguments.work_dir or Path("work_dirs") / arguments.config.stem
