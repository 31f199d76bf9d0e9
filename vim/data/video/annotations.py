"""Which videos a data set has, and their labels: annotation files, folders of videos, and the names of classes."""

import logging
import os
import re
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from vim.data.files import IMAGES, VIDEOS, class_files, files_below, files_in
from vim.data.loading import Label
from vim.data.video.sampling import windows
from vim.errors import UserError, no_such, printable

NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
# a path, in quotes or not, and all numbers at the end of its line
LINE = re.compile(rf'(?s:"((?:[^"]|"")*)"|(.*?))((?:(?:\s*[,;]\s*|\s+)"?{NUMBER}"?)*)')
COLUMNS = {None: "PATH LABEL", "frames": "PATH FRAMES LABEL", "duration": "PATH LABEL SECONDS"}


_logger = logging.getLogger(__name__)


class Video(NamedTuple):
    """A video, or a part of one, and its label; an annotation file has class indices only."""

    path: str
    label: Label
    frames: int | None = None  # of a folder of frames: their number, if known
    part: tuple[float, float] | None = None  # start and end in seconds; None: the whole video


def read_annotations(path: Path, prefix: Path, *, third: str | None = None) -> list[Video]:
    """Read an annotation file: one video a line, without a header.

    A line is `PATH LABEL`, separated by a comma, a semicolon, a tab or spaces; the label is a class index. The path may
    stand in double quotes, as CSV writes one with a comma in it.

    Args:
        prefix: the folder that paths are relative to.
        third: None, or a third column: "frames", for lines `PATH FRAMES LABEL` with the number of frames in a folder of
            images, or "duration", for lines `PATH LABEL SECONDS` of videos that are cut into windows.

    Raises:
        UserError: the file cannot be read or is empty, a line has other columns, a path leads out of the folder, or a
            video has two labels.
    """
    base = os.path.normpath(prefix)
    videos: list[Video] = []
    labels: dict[str, Label] = {}
    for number, line in enumerate(read_lines(path, "lines PATH LABEL"), 1):
        where = f"{path}, line {number}"
        for video in _parse(line.strip(), third, where) if line.strip() else []:
            file = os.path.normpath(os.path.join(base, video.path))
            if not Path(file).is_relative_to(base):
                raise UserError(f"{where}: {video.path} lies outside {base}: set data.video.prefix to its folder")
            if labels.setdefault(file, video.label) != video.label:
                raise UserError(f"{where}: {video.path} has label {video.label}, and {labels[file]} before: keep one")
            videos.append(video._replace(path=file))
    if not videos:
        raise UserError(f"no video in {path}: expected lines PATH LABEL")
    if 0 not in labels.values():
        text = "%s: no video has label 0, the first class: labels count from 0, so subtract 1 where they count from 1"
        _logger.warning(text, printable(path))
    return videos


def read_lines(path: Path, expected: str) -> list[str]:
    """The lines of a text file. Bytes that are no UTF-8 are kept, as Python keeps those of paths.

    Raises:
        UserError: the file cannot be read, or is no text.
    """
    try:
        if not path.is_file():  # reading a pipe would wait
            raise OSError("it is no regular file" if path.exists() else "it does not exist")
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
        if "\0" in text:
            raise OSError("it is not in UTF-8")
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror or error}): give a text file of {expected}") from None
    return text.split("\n")


def _parse(line: str, third: str | None, where: str) -> list[Video]:
    """The video of a line, or its windows."""
    match = LINE.fullmatch(line)
    assert match  # whatever else, it is a path
    path = match[2] if match[1] is None else match[1].replace('""', '"')
    values = re.findall(NUMBER, match[3])
    if len(values) > (1 if third is None else 2):
        raise UserError(
            f"{where}: expected {COLUMNS[third]}, got {len(values)} numbers after {path}: {', '.join(values)[:50]}. A "
            "video has one label, and a column of frames needs data.video.frame_template; put a path that ends in a "
            'number in double quotes: "a 1",0'
        )
    try:
        if third == "frames":
            frames, label = map(int, values)
            videos = [Video(path, label, frames=frames)] if frames > 0 else []
        elif third == "duration":
            label, duration = int(values[0]), float(values[1])
            videos = [Video(path, label, part=part) for part in windows(duration)] if 0 < duration < 1e9 else []
        else:
            (label,) = map(int, values)
            videos = [Video(path, label)]
    except (ValueError, IndexError):
        videos = []
    if not videos or not path or label < 0:
        raise UserError(
            f"{where}: expected {COLUMNS[third]}, separated by a comma, a tab or a space, and no line of names, got "
            f"{line[:100]}"
        )
    return videos


def video_folder(folder: Path) -> tuple[list[Video], list[str]]:
    """The videos of a folder that has one folder of videos a class, and the names of the classes.

    The errors are those of :func:`class_files`.
    """
    classes, found = class_files(folder, VIDEOS)
    return [Video(path, label) for path, label in found], classes


def read_classes(root: Path, name: str | None) -> list[str] | None:
    """Read the names of the classes, in the order of their indices.

    Args:
        name: "kinetics400", or a file in `root` with one name a line. By default `classes.txt`, if `root` has it.

    Returns:
        The names, or None if none are given.

    Raises:
        UserError: the file does not exist or is not a text file.
    """
    if name == "kinetics400":
        return files("vim.data").joinpath("kinetics400.txt").read_text().splitlines()
    path = root / (name or "classes.txt")
    if name is None and not path.exists():
        return None
    return [printable(line.strip()) for line in "\n".join(read_lines(path, "names, one a line")).rstrip().split("\n")]


def find_videos(paths: list[Path]) -> list[Path]:
    """Find the video files among paths and below the folders among them; a folder of images only is one video.

    Raises:
        UserError: a path does not exist or is neither a file nor a folder, or a folder has neither videos nor images.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_file():
            found.append(path)
            continue
        if not path.is_dir():
            raise UserError(f"{no_such('file or folder', path)} (give video files, or folders of them)")
        videos = [Path(video) for video in files_below(path, VIDEOS)] or [path] * bool(files_in(path, IMAGES))
        if not videos:
            raise UserError(f"no video in {path}: {VIDEOS.expected}, or images that are its frames")
        found += videos
    return found
