"""Files a run writes: whole, or not at all."""

import csv
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vim.errors import UserError


def make_folder(path: Path) -> None:
    """Make a folder for results, and those it lies in.

    Raises:
        UserError: it cannot be made, or not be written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path} ({error.strerror}): name another") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to the folder {path}: name another, or change its permissions")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A file beside the one wanted, to write: synced and renamed in the end, or gone after a failure.

    A kill at any time leaves the old file or the new one.

    Raises:
        UserError: the path is a folder.
        OSError: what went wrong with the disk, said of the path wanted.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file in it")
    beside = path.with_name(f"{path.name}.part")
    try:
        yield beside
        _sync(beside)
        beside.replace(path)
        _sync(path.parent)
    except OSError as error:
        if error.filename == str(beside):
            error.filename = str(path)
        raise
    finally:
        beside.unlink(missing_ok=True)


def link_whole(source: Path, path: Path) -> None:
    """Make a second name for a file, or a copy where the file system knows no second names."""
    with written_whole(path) as beside:
        beside.unlink(missing_ok=True)
        try:
            os.link(source, beside)
        except OSError:
            shutil.copyfile(source, beside)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a table anew, under the names in its rows."""
    with written_whole(path) as beside, beside.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk before going on."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
