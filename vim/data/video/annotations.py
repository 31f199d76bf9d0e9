"""Which videos a data set has, and their labels: annotation files, folders of videos, and the names of classes."""

import os
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from vim.data.files import IMAGES, VIDEOS, class_files, files_below, files_in
from vim.data.video.sampling import windows
from vim.errors import UserError

_COLUMNS = {None: "PATH LABEL", "frames": "PATH FRAMES LABEL", "duration": "PATH LABEL SECONDS"}


class Video(NamedTuple):
    """A video, or a part of one, and its label."""

    path: str
    label: int
    frames: int | None = None  # of a folder of frames: their number, if known
    part: tuple[float, float] | None = None  # start and end in seconds; None: the whole video


def read_annotations(path: Path, prefix: Path, *, third: str | None = None) -> list[Video]:
    """Read an annotation file: one video a line, without a header.

    A line is `PATH LABEL`, separated by a comma, a tab or spaces; the label is a class index.

    Args:
        prefix: the folder that paths are relative to.
        third: None, or a third column: "frames", for lines `PATH FRAMES LABEL` with the number of frames in a folder of
            images, or "duration", for lines `PATH LABEL SECONDS` of videos that are cut into windows.

    Raises:
        UserError: the file cannot be read or is empty, a line has other columns, a path leads out of the folder, or a
            video has two labels.
    """
    # Read the lines; the first one decides the separator of all.
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the annotations {path} ({error}): give a text file of lines PATH LABEL") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UserError(f"no video in {path}: expected lines PATH LABEL")
    separator = "," if _parse(numbered[0][1], ",", third) else None  # None: tabs or spaces

    # Parse each line, and resolve and check its path.
    base = os.path.normpath(prefix)
    videos: list[Video] = []
    labels: dict[str, int] = {}
    for number, line in numbered:
        where = f"{path}, line {number}"
        parsed = _parse(line, separator, third)
        if not parsed:
            raise UserError(
                f"{where}: expected {_COLUMNS[third]}, separated by a comma in all lines or by a tab or a space in "
                f"all, and no line of names, got {line[:100]!r}"
            )
        for video in parsed:
            file = os.path.normpath(os.path.join(base, video.path))
            if not Path(file).is_relative_to(base):
                raise UserError(f"{where}: {video.path} lies outside {base}: set data.video.prefix to its folder")
            if labels.setdefault(file, video.label) != video.label:
                raise UserError(f"{where}: {video.path} has label {video.label}, and {labels[file]} before: keep one")
            videos.append(video._replace(path=file))
    return videos


def _parse(line: str, separator: str | None, third: str | None) -> list[Video]:
    """The video of a line, or its windows; an empty list if the line has other columns."""
    path, *values = (value.strip() for value in line.strip().rsplit(separator, 1 if third is None else 2))
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
        return []
    return videos if path and label >= 0 else []


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
    try:
        return path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the classes {path} ({error}): give a text file of names, one a line") from None


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
            raise UserError(f"no such file or folder: {path} (give video files, or folders of them)")
        videos = [Path(video) for video in files_below(path, VIDEOS)] or [path] * bool(files_in(path, IMAGES))
        if not videos:
            raise UserError(f"no video in {path}: {VIDEOS.expected}, or images that are its frames")
        found += videos
    return found
