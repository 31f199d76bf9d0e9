"""The data set of videos."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from vim.data.labels import Labels, ignored
from vim.data.loading import IGNORED, Label
from vim.data.video.annotations import Video, read_annotations, read_classes, video_folder
from vim.data.video.reading import DECODERS, installed, read_frames, read_video
from vim.data.video.sampling import SAMPLINGS, View
from vim.errors import UserError, describe


class Videos(Dataset[tuple[list[Image.Image], Label]]):
    """Clips, each a list of `num_frames` PIL images, and labels.

    In evaluation each video has `num_clips` x `num_crops` consecutive views: clips at different times, and of each clip
    squares at different places along the longer side. :meth:`video_of` names a view's video, to average over its views.

    Args:
        mode: PIL's mode for the images: "RGB", or "L" for grey.
        is_training: draw one random clip of each video in place of the views.
        classes: the names of the classes, if known.
        sampling: which frames form a clip: a name in SAMPLINGS.
        decoder, time_limit: see :func:`read_video`.
        frame_template: see :func:`read_frames`.

    Raises:
        UserError: an option has a value that is not allowed, or no decoder is installed.
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
                raise UserError(f"data.video.{name} must be a positive whole number, got {number!r}")
        if frame_template is not None and not _has_number(frame_template):
            raise UserError(
                f"data.video.frame_template must hold a number's place, such as img_{{:05}}.jpg, got {frame_template!r}"
            )
        if not isinstance(time_limit, int | float) or not 0 < time_limit < 1e6:
            raise UserError(f"data.video.time_limit must be a number of seconds above 0, got {time_limit!r}")
        if videos and not _is_folder(videos[0]):
            installed(decoder)
        self.videos, self.mode, self.classes = videos, mode, classes
        self.num_frames, self.sampling, self.frame_template = num_frames, SAMPLINGS[sampling], frame_template
        self.num_clips, self.num_crops = (1, 1) if is_training else (num_clips, num_crops)
        self.is_training, self.decoder, self.time_limit = is_training, decoder, time_limit
        self.ignored = ignored(videos[0].label) if videos else IGNORED
        self._last: tuple[int, list[Image.Image]] = (-1, [])

    @property
    def targets(self) -> torch.Tensor:
        """The labels of the videos (n,), or (n, classes) as in :class:`Labels`; in training each is one item."""
        return torch.stack([torch.as_tensor(video.label) for video in self.videos])

    def __len__(self) -> int:
        return len(self.videos) * self.num_clips * self.num_crops

    def __getitem__(self, index: int) -> tuple[list[Image.Image], Label]:
        clip, crop = divmod(index, self.num_crops)
        label = self.videos[clip // self.num_clips].label
        if self.num_crops == 1:
            return self._read(clip), label
        if self._last[0] != clip:  # a clip's crops are consecutive: decode it once
            self._last = clip, self._read(clip)
        return [_square(frame, crop, self.num_crops) for frame in self._last[1]], label

    def video_of(self, index: int) -> str:
        """The path of a view's video."""
        return self.videos[index // (self.num_clips * self.num_crops)].path

    def _read(self, clip: int) -> list[Image.Image]:
        video = self.videos[clip // self.num_clips]
        view = None if self.is_training else View(clip % self.num_clips, self.num_clips)

        def choose(count: int, fps: float) -> list[int]:
            start, end = 0, count
            if video.part is not None and fps:
                start, end = (min(round(second * fps), count) for second in video.part)
                start = min(start, count - 1)
            return [start + index for index in self.sampling(max(end - start, 1), self.num_frames, view)]

        if _is_folder(video):
            return read_frames(Path(video.path), choose, self.mode, self.frame_template, video.frames)
        return read_video(video.path, choose, self.mode, decoder=self.decoder, time_limit=self.time_limit)


def _is_folder(video: Video) -> bool:
    return video.frames is not None or os.path.isdir(video.path)


def _has_number(template: str) -> bool:
    try:
        return template.format(1) != template.format(2)
    except (KeyError, IndexError, ValueError):
        return False


def _square(frame: Image.Image, number: int, count: int) -> Image.Image:
    """Crop one of `count` squares, evenly spaced along the longer side from its start to its end."""
    side = min(frame.size)
    left, top = ((length - side) * number // (count - 1) for length in frame.size)
    return frame.crop((left, top, left + side, top + side))


def build_videos(
    root: Path, name: str, mode: str, /, *, prefix: str | None = None, classes: str | None = None, **options: Any
) -> Videos:
    """The "train", "val" or "test" part of the videos in a folder.

    The folder holds an annotation file `train.csv`, or a folder `train` with one folder of videos a class; and so on.

    Args:
        prefix: the folder that paths in the annotation file are relative to, by default `root`.
        classes: see :func:`read_classes`.
        options: keyword arguments of :class:`Videos`. With `sampling="windows"` or a `frame_template` the annotation
            file has a third column; see :func:`read_annotations`.

    Raises:
        UserError: the folder has no such part, a label has no class, or an option does not exist or fit.
    """
    names = read_classes(root, classes)
    annotations, folder = root / f"{name}.csv", root / name
    if annotations.exists():
        third = "duration" if options.get("sampling") == "windows" else None
        third = "frames" if options.get("frame_template") else third
        videos = read_annotations(annotations, Path(prefix or root), third=third)
    elif folder.is_dir():
        videos, names = video_folder(folder)
    else:
        raise UserError(f"no {name}.csv in {root}, nor a folder {name} with one folder of videos a class")
    most = max(videos, key=lambda video: int(video.label))
    if names is not None and int(most.label) >= len(names):
        raise UserError(f"{most.path} has label {most.label} in {annotations}: expected 0 to {len(names) - 1}")
    return _build(videos, mode, is_training=name == "train", classes=names, **options)


def labelled_videos(labels: Labels, mode: str, /, *, is_training: bool, **options: Any) -> Videos:
    """Return the videos, or folders of frames, of one part of a data set with a CSV file of labels.

    Args:
        options: keyword arguments of :class:`Videos`, except `sampling="windows"`, which needs annotations.

    Raises:
        UserError: an option does not exist or fit.
    """
    if options.get("sampling") == "windows":
        raise UserError(
            "data.labels does not go together with data.video.sampling='windows': use train.csv and val.csv"
        )
    videos = [Video(file, labels.label(index)) for index, file in enumerate(labels.files)]
    return _build(videos, mode, is_training=is_training, classes=labels.classes, **options)


def _build(videos: Sequence[Video], mode: str, **options: Any) -> Videos:
    try:
        return Videos(videos, mode, **options)
    except TypeError as error:
        raise UserError(f"the config's data.video does not fit: {describe(error)}") from error
