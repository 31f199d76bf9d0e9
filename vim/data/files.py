"""Which files of a folder are images or videos, and which of its folders are classes."""

import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from vim.errors import UserError, one_line

# What the systems and tools that make folders leave in them, in lower case; so is all that starts with a dot.
SYSTEM = {"$recycle.bin", "@eadir", "__macosx", "desktop.ini", "ehthumbs.db", "lost+found", "thumbs.db"}
SYSTEM |= {"system volume information"}

Image.init()
# Pillow's formats but those that it cannot decode by itself: for EPS it would run Ghostscript
FORMATS = sorted(Image.OPEN.keys() - {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})


class Kind(NamedTuple):
    """Files of one kind, by how their names end."""

    name: str
    suffixes: frozenset[str]  # in lower case, with the dot
    expected: str  # for messages

    def holds(self, name: str) -> bool:
        """Whether a file of this name is of the kind."""
        return os.path.splitext(name)[1].lower() in self.suffixes


_FFMPEG = """
    .3g2 .3gp .264 .265 .amv .asf .avi .divx .dv .f4v .flv .gif .h264 .h265 .hevc .ivf .m1v .m2t .m2ts .m2v .m4v .mj2
    .mjpeg .mjpg .mk3d .mkv .mov .mp4 .mpe .mpeg .mpg .mpv .mts .mxf .nut .obu .ogm .ogv .qt .rm .rmvb .ts .vob .webm
    .wmv .wtv .y4m
"""
_PILLOW = {suffix for suffix, name in Image.registered_extensions().items() if name in {*FORMATS, "MPO"}}
IMAGES = Kind("image", frozenset(_PILLOW), "expected files that Pillow reads, such as .jpg, .png or .webp")
VIDEOS = Kind("video", frozenset(_FFMPEG.split()), "expected files that FFmpeg reads, such as .mp4, .mkv or .webm")

_logger = logging.getLogger(__name__)


def is_system(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or made by a system for itself."""
    return name.startswith(".") or name.lower() in SYSTEM


def visible(folder: str | Path) -> list[os.DirEntry[str]]:
    """What a folder holds, in the order of the names, without hidden and system files.

    Raises:
        UserError: the folder cannot be listed.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not is_system(entry.name)), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"cannot list the folder {folder} ({error.strerror}): mend it, or take it out") from error


def files_in(folder: Path, kind: Kind) -> list[str]:
    """The names of a folder's own files of a kind, sorted."""
    return [entry.name for entry in visible(folder) if kind.holds(entry.name) and _is(entry.is_file)]


def files_below(folder: Path, kind: Kind) -> list[str]:
    """The paths of all files of a kind below a folder, sorted by the folder that they lie in, then by name.

    Links are followed, but no folder is entered twice. What is left out beside them is counted in a line of the log.
    """
    found: list[tuple[str, list[str]]] = []
    left_out: list[str] = []
    ahead, entered = [os.fspath(folder)], {_identity(folder)}
    while ahead:
        inside = ahead.pop()
        own = []
        for entry in visible(inside):
            if _is(entry.is_dir):
                if (identity := _identity(entry.path)) in entered:
                    left_out.append(entry.path)
                else:
                    ahead.append(entry.path)
                    entered.add(identity)
            elif kind.holds(entry.name) and _is(entry.is_file):
                own.append(entry.path)
            else:
                left_out.append(entry.path)
        if kind.holds(inside) and not own:
            left_out.append(inside)
        found.append((inside, own))
    paths = [path for _, own in sorted(found) for path in own]
    if paths:
        _log_left_out(folder, kind, left_out)
    return paths


def class_files(root: Path, kind: Kind) -> tuple[list[str], list[tuple[str, int]]]:
    """The names of the classes of a folder that has one folder of files a class, and each file's path and class index.

    Classes are in alphabetical order. The files of a class may lie in folders below its own.

    Raises:
        UserError: the folder does not exist, has no folder in it or one without files, or its class folders lie deeper.
    """
    if not root.is_dir():
        raise UserError(f"no such folder: {root} (expected one folder of {kind.name}s a class in it){_elsewhere(root)}")
    files: dict[str, list[str]] = {entry.name: [] for entry in visible(root) if _is(entry.is_dir)}
    beside, start = 0, len(os.path.join(root, ""))
    for path in files_below(root, kind):
        name, _, below = path[start:].partition(os.sep)
        if below:
            files[name].append(path)
        else:
            beside += 1
    if not files:
        raise UserError(
            f"{root} must hold one folder of {kind.name}s a class: it holds no folder, and {beside} {kind.name}s"
        )
    _check_depth(root, kind, files)
    for name, own in files.items():
        if not own:
            raise UserError(f"no {kind.name} in {root / name}: {kind.expected}; or take the folder out")
    if beside:
        _warn(f"{root}: left out, since they lie in no class's folder: {beside} {kind.name}s")
    if len(files) == 1:
        _warn(f"{root} holds one class only, {min(files)}: every prediction is right")
    return list(files), [(path, label) for label, own in enumerate(files.values()) for path in own]


def _elsewhere(root: Path) -> str:
    """Advice where a folder that is missing lies one level deeper."""
    entries = visible(root.parent) if root.parent.is_dir() else []
    deeper = [entry.path for entry in entries if os.path.isdir(os.path.join(entry.path, root.name))]
    return f"; {deeper[0]} has one: point data.root there" if deeper else ""


def _check_depth(root: Path, kind: Kind, files: Mapping[str, Sequence[str]]) -> None:
    """Refuse a single class folder, and warn of several, that hold the same folders and no file: maybe the classes."""
    inner = []
    for name, own in files.items():
        start = len(os.path.join(root, name, ""))
        if own and all(os.sep in path[start:] for path in own):
            inner.append({path[start:].partition(os.sep)[0] for path in own})
        elif own:
            return
    shared = sorted(set.intersection(*inner)) if inner else []
    if len(shared) < 2:
        return
    has = f"has folders ({', '.join(shared[:5])}) and no {kind.name}s of its own"
    if len(inner) == 1:
        outer = next(name for name, own in files.items() if own)
        raise UserError(
            f"{root / outer} {has}: if they are the classes, move them up to {root}, or point data.root at a folder "
            "that holds them where they are expected"
        )
    _warn(f"{root}: taken as classes: {', '.join([*files][:5])}. Each {has}: if these are the classes, move them up")


def _identity(folder: str | Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _is(question: Callable[[], bool]) -> bool:
    """Whether an entry is a file, or a folder; a link to itself is neither."""
    try:
        return question()
    except OSError:
        return False


def _log_left_out(folder: Path, kind: Kind, paths: list[str]) -> None:
    """Log how many files were left out, by how their names end or what they are, with an example of each."""
    sorts = [_sort(path) for path in paths]
    examples = {sort: os.path.relpath(path, folder) for sort, path in zip(sorts, paths, strict=True)}
    parts = [f"{count} {sort} ({examples[sort]})" for sort, count in Counter(sorts).most_common()]
    if parts:
        _warn(f"{folder}: left out, since they are no {kind.name} files: {', '.join(parts)}")


def _warn(text: str) -> None:
    _logger.warning("%s", one_line(text))


def _sort(path: str) -> str:
    """What was left out, in words."""
    if os.path.isfile(path):
        return os.path.splitext(path)[1] or "without an ending"
    if os.path.isdir(path):
        return "folders, empty or met before"
    return "pipes, sockets or devices" if os.path.exists(path) else "broken links"
