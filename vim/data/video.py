"""Videos: their files, the annotation files that name them, and the data set of both."""

import functools
import mmap
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from vim.data import decoding
from vim.data.images import read_image
from vim.data.sampling import SAMPLINGS, View, windows
from vim.errors import UserError, describe

VIDEO_EXTENSIONS = (".mp4", ".webm", ".avi", ".mkv", ".mov", ".mpg", ".m4v")
# PyAV first: it takes 0.7 of decord's time on 720p, as it leaves out frames that no other needs, and knows AV1; decord
# 0.6 stretches videos that lie on their side, and gives grey for what is damaged
DECODERS = {"auto": ("pyav", "decord"), "decord": ("decord",), "pyav": ("pyav",), "torchcodec": ("torchcodec",)}

Choose = Callable[[int, float], list[int]]  # of so many frames, so many a second: the numbers of those wanted


class _DecodingError(Exception):
    """What a decoder says of a file."""


class _DecodingProcess:
    """The process of :mod:`vim.data.decoding`, which is asked for one video at a time."""

    def __init__(self) -> None:
        self.connection, theirs = multiprocessing.Pipe()
        self.memory = os.memfd_create("frames")
        numbers = (theirs.fileno(), self.memory)
        silent: Any = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)  # FFmpeg is talkative
        self.process = subprocess.Popen(
            [sys.executable, "-P", decoding.__file__, *map(str, numbers)],  # -P: its neighbours here are no packages
            pass_fds=numbers,
            start_new_session=True,  # Ctrl-C is for who asks
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # NumPy's, which would only take up memory
            **silent,
        )
        theirs.close()

    def read(self, path: str, choose: Choose, decoder: str, time_limit: float) -> list[Image.Image]:
        """The frames that `choose` names, or _DecodingError; after any other exception the process has ended."""
        try:
            count, fps = self._ask((decoder, path, time_limit))
            wanted = choose(count, fps)
            order = sorted(set(wanted))
            frames = self._frames(*self._ask(order))
        except _DecodingError:
            raise
        except BaseException:  # it may be in the middle of an answer
            self.end()
            raise
        return [frames[order.index(index)] for index in wanted]

    def _ask(self, question: Any) -> Any:
        try:
            self.connection.send(question)
            answer = self.connection.recv()
        except (EOFError, ConnectionError):
            status = self.process.wait()
            if status == -signal.SIGALRM:
                raise TimeoutError("it takes longer than its time limit") from None
            raise ChildProcessError(f"it crashes the decoder, exit status {status}") from None
        if isinstance(answer, str):
            raise _DecodingError(answer)
        return answer

    def _frames(self, count: int, height: int, width: int) -> list[Image.Image]:
        size = height * width * 3
        with mmap.mmap(self.memory, count * size, prot=mmap.PROT_READ) as shared, memoryview(shared) as pixels:
            return [Image.frombytes("RGB", (width, height), pixels[i * size : (i + 1) * size]) for i in range(count)]

    def end(self) -> None:
        """End the process and let go of its memory; the next video gets another."""
        _decoding_process.cache_clear()
        self.process.kill()
        self.process.wait()
        self.connection.close()
        os.close(self.memory)


@functools.lru_cache(maxsize=1)
def _decoding_process(pid: int) -> _DecodingProcess:
    """The one of this process: a loader's worker must not share that of its parent."""
    return _DecodingProcess()


def read_video(
    path: str | Path, choose: Choose, mode: str = "RGB", *, decoder: str = "auto", time_limit: float = 30.0
) -> list[Image.Image]:
    """Decode frames of a video file, upright.

    Args:
        choose: says which: gets the number of frames, and of frames a second, which is 0 where the file does not say.
        mode: PIL's name for the kind of images wanted: "L" for grey.
        decoder: "decord", "pyav" or "torchcodec"; "auto" tries PyAV, and decord where that fails.
        time_limit: in seconds, for each that is tried.

    Raises:
        UserError: it is missing, or cannot be decoded, or not in time.
    """
    if not os.path.isfile(path):
        raise UserError(f"no such video: {path} (give the path of a video file)")
    reasons = []
    for name in DECODERS[decoder]:
        try:
            frames = _decoding_process(os.getpid()).read(str(path), choose, name, time_limit)
            return frames if mode == "RGB" else [frame.convert(mode) for frame in frames]
        except (_DecodingError, TimeoutError, ChildProcessError) as error:
            reasons.append(f"{name}: {error}")
    raise UserError(f"cannot read {path} as a video ({reasons[0][:200]}): replace the file or take it out")


def read_frames(folder: Path, choose: Choose, mode: str, template: str | None, count: int | None) -> list[Image.Image]:
    """Read frames of a video that is a folder of images.

    Args:
        template: their names, such as "img_{:05}.jpg", numbered from 1; by default all images, in the order of names.
        count: how many there are; by default as many as are there.

    Raises:
        UserError: there are none, or one that is wanted is missing or no image.
    """
    if template is None or count is None:
        if not folder.is_dir():
            raise UserError(f"no such folder of frames: {folder} (give the path of a folder of images)")
        names = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in IMG_EXTENSIONS)
    else:
        names = [template.format(number) for number in range(1, count + 1)]
    if not names:
        raise UserError(f"no frame in {folder}: expected files ending in {', '.join(IMG_EXTENSIONS)}")
    return [read_image(folder / names[index], mode) for index in choose(len(names), 0.0)]


class Video(NamedTuple):
    """A line of an annotation file."""

    path: str
    label: int
    frames: int | None = None  # of a folder of frames, where the file says it
    part: tuple[float, float] | None = None  # in seconds; None: all of it


class Videos(Dataset[Any]):
    """Clips of videos, as lists of `num_frames` PIL images, and class indices.

    In evaluation each video comes in `num_clips` x `num_crops` views, one after the other: clips at other times, and of
    each squares along the longer side. Views of :meth:`video_of` the same video are to be taken together.

    Args:
        mode: PIL's name for the kind of images wanted: "L" for grey.
        classes: their names, where they are known.
        sampling: which frames; see `SAMPLINGS`.
        decoder, time_limit: see :func:`read_video`.
        frame_template: see :func:`read_frames`.

    Raises:
        UserError: an option that does not exist, or is out of range.
    """

    def __init__(
        self,
        videos: Sequence[Video],
        mode: str,
        *,
        is_training: bool,
        classes: list[str] | None = None,
        num_frames: int = 8,
        sampling: str = "sparse",
        num_clips: int = 1,
        num_crops: int = 1,
        decoder: str = "auto",
        time_limit: float = 30.0,
        frame_template: str | None = None,
    ) -> None:
        for name, value, known in (("sampling", sampling, SAMPLINGS), ("decoder", decoder, DECODERS)):
            if value not in known:
                raise UserError(f"data.video.{name} must be one of {', '.join(known)}, got {value!r}")
        for name, number in (("num_frames", num_frames), ("num_clips", num_clips), ("num_crops", num_crops)):
            if not isinstance(number, int) or number < 1:
                raise UserError(f"data.video.{name} must be a whole number from 1, got {number!r}")
        if decoder == "torchcodec" and find_spec("torchcodec") is None:
            raise UserError("data.video.decoder='torchcodec' needs it: pip install torchcodec, or take 'auto'")
        if frame_template is not None and not _numbers(frame_template):
            raise UserError(
                f"data.video.frame_template must hold a number's place, such as img_{{:05}}.jpg, got {frame_template!r}"
            )
        if not isinstance(time_limit, int | float) or not 0 < time_limit < 1e6:
            raise UserError(f"data.video.time_limit must be a number of seconds above 0, got {time_limit!r}")
        self.videos, self.mode, self.classes = videos, mode, classes
        self.num_frames, self.sampling, self.frame_template = num_frames, SAMPLINGS[sampling], frame_template
        self.num_clips, self.num_crops = (1, 1) if is_training else (num_clips, num_crops)
        self.is_training, self.decoder, self.time_limit = is_training, decoder, time_limit
        self._last: tuple[int, list[Image.Image]] = (-1, [])

    def __len__(self) -> int:
        return len(self.videos) * self.num_clips * self.num_crops

    def __getitem__(self, index: int) -> tuple[list[Image.Image], int]:
        clip, crop = divmod(index, self.num_crops)
        if self.num_crops == 1:
            return self._read(clip), self.videos[clip // self.num_clips].label
        if self._last[0] != clip:  # its crops come one after the other: decode it once
            self._last = clip, self._read(clip)
        frames = [_square(frame, crop, self.num_crops) for frame in self._last[1]]
        return frames, self.videos[clip // self.num_clips].label

    def video_of(self, index: int) -> str:
        """The path of the video that a view is of."""
        return self.videos[index // (self.num_clips * self.num_crops)].path

    def _read(self, number: int) -> list[Image.Image]:
        video = self.videos[number // self.num_clips]
        view = None if self.is_training else View(number % self.num_clips, self.num_clips)

        def choose(count: int, fps: float) -> list[int]:
            start, end = 0, count
            if video.part is not None and fps:
                start, end = (min(round(second * fps), count) for second in video.part)
                start = min(start, count - 1)
            return [start + index for index in self.sampling(max(end - start, 1), self.num_frames, view)]

        if video.frames is not None or os.path.isdir(video.path):
            return read_frames(Path(video.path), choose, self.mode, self.frame_template, video.frames)
        return read_video(video.path, choose, self.mode, decoder=self.decoder, time_limit=self.time_limit)


def _numbers(template: str) -> bool:
    try:
        return template.format(1) != template.format(2)
    except (KeyError, IndexError, ValueError):
        return False


def _square(frame: Image.Image, number: int, of: int) -> Image.Image:
    """One of several squares along an image's longer side, from its one end to the other."""
    side = min(frame.size)
    left, top = ((length - side) * number // (of - 1) for length in frame.size)
    return frame.crop((left, top, left + side, top + side))


def read_annotations(path: Path, prefix: Path, *, third: str | None = None) -> list[Video]:
    """The videos that an annotation file names, one a line, without a line of names.

    A line is a path and a class index, separated by a comma, a tab or spaces. Between them it may have the number of
    frames, of a folder of frames; or after them the duration in seconds, of a video that is taken in windows.

    Args:
        prefix: the folder that paths are relative to.
        third: "frames" or "duration", where lines have that too.

    Raises:
        UserError: the file cannot be read or is empty; a line of another kind; a path that leads out of the folder; or
            a video with two labels.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the annotations {path} ({error}): give a text file of lines PATH LABEL") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UserError(f"no video in {path}: expected lines PATH LABEL")
    first = numbered[0][1]
    separator = "," if _parse(first, ",", third) else None  # None: tabs or spaces
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


_COLUMNS = {None: "PATH LABEL", "frames": "PATH FRAMES LABEL", "duration": "PATH LABEL SECONDS"}


def _parse(line: str, separator: str | None, third: str | None) -> list[Video]:
    """The video of a line, or its windows; none where the line is of another kind."""
    path, *values = (value.strip() for value in line.strip().rsplit(separator, 1 if third is None else 2))
    try:
        if third == "frames":
            frames, label = map(int, values)
            made = [Video(path, label, frames=frames)] if frames > 0 else []
        elif third == "duration":
            label, duration = int(values[0]), float(values[1])
            made = [Video(path, label, part=part) for part in windows(duration)] if 0 < duration < 1e9 else []
        else:
            (label,) = map(int, values)
            made = [Video(path, label)]
    except (ValueError, IndexError):
        return []
    return made if path and label >= 0 else []


def find_videos(paths: list[Path]) -> list[Path]:
    """The video files among the paths and below the folders among them; a folder of images alone is a video by itself.

    Raises:
        UserError: a path does not exist, or a folder holds neither videos nor images.
    """
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"no such file or folder: {path} (give video files, or folders of them)")
        if path.is_file():
            found.append(path)
            continue
        videos = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in VIDEO_EXTENSIONS]
        if not videos and any(file.suffix.lower() in IMG_EXTENSIONS for file in path.iterdir()):
            videos = [path]
        if not videos:
            raise UserError(f"no video in {path}: expected files ending in {', '.join(VIDEO_EXTENSIONS)}")
        found += videos
    return found


def video_folder(folder: Path) -> tuple[list[Video], list[str]]:
    """The videos of a folder with one folder of videos a class; and the classes.

    Raises:
        UserError: there are no such folders, or one without videos.
    """
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
    videos = []
    for label, name in enumerate(classes):
        found = [p for p in sorted((folder / name).rglob("*")) if p.suffix.lower() in VIDEO_EXTENSIONS]
        if not found:
            raise UserError(f"no video in {folder / name}: expected files ending in {', '.join(VIDEO_EXTENSIONS)}")
        videos += [Video(str(path), label) for path in found]
    if not classes:
        raise UserError(f"{folder} must hold one folder of videos a class")
    return videos, classes


def read_classes(root: Path, name: str | None) -> list[str] | None:
    """The names of classes, in their order: "kinetics400", or those in a file of the folder, one a line.

    By default those in its classes.txt; None where there is none.

    Raises:
        UserError: the file is missing.
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


def build_videos(data: dict[str, Any], name: str, mode: str) -> Videos:
    """The "train", "val" or "test" part of the videos in `data["root"]`, with the options of :class:`Videos`.

    They are in `data["video"]`, and what differs for one part in `data["train_options"]` or the like. Three more are
    `prefix`, the folder that paths in annotations are relative to, by default the root; `classes`, see
    :func:`read_classes`; and with the sampling "windows" or a `frame_template` annotations have a third column, see
    :func:`read_annotations`.

    Raises:
        UserError: no root, no such part in it, or an option that does not fit.
    """
    options = {**data.get("video", {}), **data.get(f"{name}_options", {})}
    if not data.get("root"):
        raise UserError(f"data.root must name the folder that holds {name}.csv: --cfg-options data.root=PATH")
    root = Path(str(data["root"]))
    prefix, classes = Path(options.pop("prefix", None) or root), read_classes(root, options.pop("classes", None))
    annotations, folder = root / f"{name}.csv", root / name
    if annotations.exists():
        third = (
            "frames" if options.get("frame_template") else "duration" if options.get("sampling") == "windows" else None
        )
        videos = read_annotations(annotations, prefix, third=third)
    elif folder.is_dir():
        videos, classes = video_folder(folder)
    else:
        raise UserError(f"no {name}.csv in {root}, nor a folder {name} with one folder of videos a class")
    most = max(videos, key=lambda video: video.label)
    if classes is not None and most.label >= len(classes):
        raise UserError(f"{most.path} has label {most.label} in {annotations}: expected 0 to {len(classes) - 1}")
    try:
        return Videos(videos, mode, is_training=name == "train", classes=classes, **options)
    except TypeError as error:
        raise UserError(f"the config's data.video does not fit: {describe(error)}") from error
