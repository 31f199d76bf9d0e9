"""Configs: mmengine's, with mistakes told in a line."""

import argparse
import pprint
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction

from vim.errors import UserError, describe

SECTIONS = ("model", "data", "optimizer", "schedule", "train")
OPTIONAL_SECTIONS = ("mixup", "teacher", "masking")
# what only vim.engine reads; the other sections go to functions that refuse what they do not know
KEYS = {
    "data": (
        "dataset",
        "root",
        "video",
        "train_options",
        "val_options",
        "batch_size",
        "num_workers",
        "repeats",
        "samples",
        "max_unreadable",
        "train_transform",
        "eval_transform",
    ),
    "train": (
        "seed",
        "amp",
        "clip_grad",
        "ema_decay",
        "smoothing",
        "accumulate",
        "grad_checkpointing",
        "compile",
        "save_updates",
        "keep",
        "max_skipped",
        "trackers",
    ),
}


Rule = tuple[Callable[[Any], bool], str]  # whether a value fits, and what was expected


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_share(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and 0 <= value < 1)


_COUNT = (lambda value: value is None or _is_whole(value, 1), "a whole number from 1")
_SWITCH = (lambda value: value in (None, True, False), "True or False")
VALUES: dict[str, Rule] = {
    "data.batch_size": (lambda value: _is_whole(value, 1), "a whole number from 1"),
    "data.num_workers": (lambda value: _is_whole(value, 0), "a whole number from 0"),
    "schedule.num_epochs": (lambda value: _is_whole(value, 1), "a whole number from 1"),
    "schedule.warmup_epochs": (lambda value: value is None or _is_whole(value, 0), "a whole number from 0"),
    "train.seed": (lambda value: _is_whole(value, 0), "a whole number from 0"),
    "train.amp": (lambda value: value in (None, "no", "bf16", "fp16"), "'no', 'bf16' or 'fp16'"),
    "train.clip_grad": (
        lambda value: value is None or (isinstance(value, int | float) and value > 0),
        "None or a number above 0",
    ),
    "data.repeats": _COUNT,
    "data.samples": _COUNT,
    "data.max_unreadable": (_is_share, "a number from 0 to below 1"),
    "train.accumulate": _COUNT,
    "train.grad_checkpointing": _SWITCH,
    "train.compile": _SWITCH,
    "train.save_updates": _COUNT,
    "train.keep": _COUNT,
    "train.max_skipped": _COUNT,
    "train.trackers": (
        lambda value: value is None or (isinstance(value, list | tuple) and all(isinstance(v, str) for v in value)),
        "a list of names",
    ),
    "train.ema_decay": (_is_share, "a number from 0 to below 1"),
    "train.smoothing": (_is_share, "a number from 0 to below 1"),
}


class OptionsAction(DictAction):
    """KEY=VALUE words, as mmengine reads them."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Take the words, or refuse the first that is not KEY=VALUE."""
        for word in values or ():
            if "=" not in word:
                raise UserError(f"--cfg-options takes KEY=VALUE, got {word!r}: other arguments go before it")
        super().__call__(parser, namespace, values, option_string)


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments every tool that takes a config shares."""
    parser.add_argument("config", type=Path, help="a file below configs/")
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


def load_config(
    path: Path,
    options: dict[str, Any] | None = None,
    *,
    keys: Mapping[str, Sequence[str]] = KEYS,
    values: Mapping[str, Rule] = VALUES,
) -> Config:
    """Read a config file and merge the options into it.

    Args:
        keys, values: what sections may hold, where it is not images that are trained on.

    Raises:
        UserError: the file is missing, not valid Python, or lacks a section; or an option or a value fits nowhere.
    """
    if not path.is_file():
        raise UserError(f"no such config: {path}")
    try:
        config = Config.fromfile(str(path), use_environment_variables=False)
    except Exception as error:  # mmengine raises what the file raises
        raise UserError(f"cannot read the config {path}: {type(error).__name__}: {error}") from error
    for option in options or {}:
        if option.split(".")[0] not in (*SECTIONS, *OPTIONAL_SECTIONS):
            expected = ", ".join((*SECTIONS, *OPTIONAL_SECTIONS))
            raise UserError(f"--cfg-options {option}: a config has no such section, only {expected}")
    try:
        config.merge_from_dict(options or {})
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"--cfg-options does not fit the config {path}: {error}") from error
    missing = [section for section in SECTIONS if section not in config]
    if missing:
        raise UserError(f"the config {path} lacks {', '.join(missing)}: a config has {', '.join(SECTIONS)}")
    _check(config, path, keys, values)
    return config


def write_config(config: Config, path: Path) -> None:
    """Write a config that :func:`load_config` reads; mmengine's own dump takes seconds to lay it out."""
    sections = config.to_dict().items()
    path.write_text("".join(f"{name} = {pprint.pformat(value, width=110)}\n" for name, value in sections))


def _check(config: Config, path: Path, allowed: Mapping[str, Sequence[str]], values: Mapping[str, Rule]) -> None:
    for section in (*SECTIONS, *OPTIONAL_SECTIONS):
        if not isinstance(config.get(section, {}), dict):
            raise UserError(f"{section} must be a dict in the config {path}, got {config[section]!r}")
    for section, keys in allowed.items():
        for key in config[section]:
            if key not in keys:
                raise UserError(f"{section} has no option {key} in the config {path}, only {', '.join(keys)}")
    for name, (fits, expected) in values.items():
        section, key = name.split(".")
        if not fits(config[section].get(key)):
            raise UserError(f"{name} must be {expected} in the config {path}, got {config[section].get(key)!r}")


@contextmanager
def reading(section: str) -> Iterator[None]:
    """What is built in here takes its options from that section: what it raises is told as the user's mistake."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # timm and torch raise many kinds
        raise UserError(f"the config's {section} does not fit: {describe(error)}") from error


def work_dir_of(arguments: argparse.Namespace) -> Path:
    """The folder for results: the one given, or work_dirs/ and the config's name."""
    return arguments.work_dir or Path("work_dirs") / arguments.config.stem
