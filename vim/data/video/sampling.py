"""Choosing the frames of a clip: the published samplings, as functions of a video's number of frames.

In training they draw from Python's `random`; in evaluation they are determined by the view.
"""

import random
from collections.abc import Callable
from typing import NamedTuple

WINDOW, WINDOW_STRIDE = 60, 16  # in seconds, as VideoMamba cuts long videos


class View(NamedTuple):
    """The index of a clip in evaluation, and the number of clips of a video."""

    clip: int
    clips: int


def sparse(count: int, num_frames: int, view: View | None) -> list[int]:
    """Choose one frame from each of `num_frames` equal parts: for Kinetics, Breakfast, COIN and LVU.

    Args:
        count: the number of frames of the video.
        view: the clip of evaluation, placed as in VideoMamba's code; None: draw at random, in training.

    Returns:
        `num_frames` indices.
    """
    step = (count - 1) / num_frames
    starts = [round(step * i) for i in range(num_frames + 1)]
    if view is None:
        return [min(random.randint(*ends), count - 1) for ends in zip(starts, starts[1:], strict=False)]
    offset = int(step / (view.clips + 1) * (view.clip + 1))
    return [min(start + offset, count - 1) for start in starts[:-1]]


def something(count: int, num_frames: int, view: View | None) -> list[int]:
    """Choose one frame from each of `num_frames` equal parts: for Something-Something v2; see :func:`sparse`.

    If there are fewer frames than parts, frames are repeated; the published code repeats the first one only.
    """
    step = count / num_frames
    if view is None and count >= num_frames:
        length = count // num_frames
        return [length * i + random.randrange(length) for i in range(num_frames)]
    offset = step / 2 if view is None or view.clips == 1 else step * view.clip / view.clips
    return [int(offset + step * i) for i in range(num_frames)]


def dense(count: int, num_frames: int, view: View | None, *, stride: int = 4) -> list[int]:
    """Choose every fourth frame from a start on, as in SlowFast and VideoMAE; see :func:`sparse`.

    The clips of evaluation are evenly spaced. If the video is too short, its last frame is repeated.
    """
    room = max(count - stride * num_frames, 0)
    if view is None:
        start = random.randint(0, room)
    else:
        start = room // 2 if view.clips == 1 else room * view.clip // (view.clips - 1)
    return [min(start + stride * i, count - 1) for i in range(num_frames)]


def shuffled(count: int, num_frames: int, view: View | None) -> list[int]:
    """Choose the frames of :func:`sparse`, in random order: accuracy on these needs no order of time."""
    chosen = sparse(count, num_frames, view)
    return random.sample(chosen, num_frames)


# "windows" samples a window of a long video like "sparse"; the annotations make the windows
SAMPLINGS: dict[str, Callable[[int, int, View | None], list[int]]] = {
    "sparse": sparse,
    "ssv2": something,
    "dense": dense,
    "windows": sparse,
    "shuffled": shuffled,
}


def windows(duration: float) -> list[tuple[float, float]]:
    """Cut a long video into overlapping windows, (start, end) in seconds.

    A window of a minute starts every 16 seconds; windows at the video's end are shorter, down to half a minute.
    """
    if duration < WINDOW:
        return [(0.0, duration)]
    last = int((duration - WINDOW / 2) // WINDOW_STRIDE)
    starts = [float(WINDOW_STRIDE * i) for i in range(last + 1)]
    return [(start, min(start + WINDOW, duration)) for start in starts]
