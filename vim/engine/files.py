"""Folders that one process writes to, and files that are complete or absent."""

import csv
import errno
import fcntl
import logging
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from vim.errors import UserError

_logger = logging.getLogger(__name__)


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


def results_in(folder: Path, *names: str) -> str:
    """A line that names those of the files that are in the folder."""
    return f"in {folder}: {', '.join(name for name in names if (folder / name).exists())}"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make a folder and hold it, until the context or the process ends: at a kill the kernel lets it go.

    Raises:
        UserError: another process holds it, or it cannot be made.
    """
    made = not folder.exists()
    make_folder(folder)
    path = folder / ".lock"
    file = _hold(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before it is closed: who comes now makes a new one
        file.close()
        with suppress(OSError):
            if made:
                folder.rmdir()  # if it is empty


def _hold(path: Path) -> TextIOWrapper:
    """Open and lock a file. A lock of lockf is the process's own: the workers it forks do not share it."""
    while True:
        file = path.open("a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                _logger.warning("%s cannot be locked (%s): start no second run there", path.parent, error.strerror)
                return file
            file.seek(0)
            holder = file.read(200) or "another process"
            file.close()
            raise UserError(
                f"{path.parent} is in use by {holder}: wait until that ends, or name another folder by --work-dir"
            ) from error
        if _is_same(file, path):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            return file
        file.close()  # its holder has just ended, and removed it


def _is_same(file: TextIOWrapper, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn what a library raises when the disk is full, or fails, into an OSError that names `path`.

    PyTorch raises RuntimeError and safetensors an error of its own.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        failed = _of_the_disk(error)
        if failed is None:
            raise
        raise OSError(failed.errno, failed.strerror or str(failed), str(path)) from error


def _of_the_disk(error: BaseException | None) -> OSError | None:
    while error is not None:
        if isinstance(error, OSError):
            return error
        if found := re.search(r"\(os error (\d+)\)", str(error)):  # of Rust
            return OSError(int(found[1]), os.strerror(int(found[1])))
        if "PytorchStreamWriter" in str(error) or "inline_container" in str(error):
            return _of_the_disk(error.__context__) or OSError(errno.EIO, os.strerror(errno.EIO))
        error = error.__cause__ or error.__context__
    return None


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
        with naming(path):
            yield beside
            _sync(beside)
            beside.replace(path)
            _sync(path.parent)
    finally:
        with suppress(OSError):  # the disk has failed: what it raised first says more
            beside.unlink(missing_ok=True)


@contextmanager
def appending(path: Path) -> Iterator[TextIOWrapper]:
    """Open a text file to read and append, alone: another process that appends to it waits. A failure adds nothing.

    Raises:
        OSError: the disk failed; the error names `path`.
    """
    with naming(path), path.open("a+", newline="", errors="replace") as file:
        with suppress(OSError):  # a file system without locks
            fcntl.lockf(file, fcntl.LOCK_EX)
        size = os.fstat(file.fileno()).st_size
        try:
            yield file
            file.flush()
        except OSError:
            os.ftruncate(file.fileno(), size)
            raise


def link_whole(source: Path, path: Path) -> None:
    """Make a hard link to a file, or a copy if the file system has no hard links."""
    with written_whole(path) as beside:
        beside.unlink(missing_ok=True)
        try:
            os.link(source, beside)
        except OSError:
            shutil.copyfile(source, beside)


def write_text(path: Path, text: str) -> None:
    """Write a text, replacing the file."""
    with written_whole(path) as beside:
        beside.write_text(text)


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
