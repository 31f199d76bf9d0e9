"""Writing files so that each is complete or absent."""

import csv
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vim.errors import UserError


def make_folder(path: Path) -> None:
    """Make a folder for results, and its parents.

    Raises:
        UserError: the folder cannot be made or cannot be written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path} ({error.strerror}): name another") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to the folder {path}: name another, or change its permissions")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`: written, synced and renamed at the end, or removed after a failure.

    A kill at any time leaves the old file or the new one.

    Raises:
        UserError: the path is a folder.
        OSError: the disk failed; the error names `path`.
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
    """Make a hard link to a file, or a copy if the file system has no hard links."""
    with written_whole(path) as beside:
        beside.unlink(missing_ok=True)
        try:
            os.link(source, beside)
        except OSError:
            shutil.copyfile(source, beside)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a table, replacing the file; the first row's keys are the header."""
    with written_whole(path) as beside, beside.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
