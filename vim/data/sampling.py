"""Which frames of a video are looked at: the published samplings, by the numbers of frames.

In training they draw from Python's `random`; in evaluation they follow from the view.
"""

import random
from collections.abc import Callable
from typing import NamedTuple

WINDOW, WINDOW_STRIDE = 60, 16  # seconds, of VideoMamba's long videos


class View(NamedTuple):
    """One of several clips that a video is looked at in."""

    clip: int
    clips: int


def sparse(count: int, num_frames: int, view: View | None) -> list[int]:
    """One frame of each of `num_frames` parts of a video of `count` frames, as of Kinetics, Breakfast, COIN and LVU.

    Args:
        view: which, as VideoMamba's evaluation has it; None: at random.
    """
    step = (count - 1) / num_frames
    starts = [round(step * i) for i in range(num_frames + 1)]
    if view is None:
        return [min(random.randint(*ends), count - 1) for ends in zip(starts, starts[1:], strict=False)]
    offset = int(step / (view.clips + 1) * (view.clip + 1))
    return [min(start + offset, count - 1) for start in starts[:-1]]


def something(count: int, num_frames: int, view: View | None) -> list[int]:
    """One frame of each of `num_frames` parts, as of Something-Something v2; see :func:`sparse`.

    Where there are fewer frames than parts, all of them, some more often: the published code then takes the first only.
    """
    step = count / num_frames
    if view is None and count >= num_frames:
        length = count // num_frames
        return [length * i + random.randrange(length) for i in range(num_frames)]
    offset = step / 2 if view is None or view.clips == 1 else step * view.clip / view.clips
    return [int(offset + step * i) for i in range(num_frames)]


def dense(count: int, num_frames: int, view: View | None, *, stride: int = 4) -> list[int]:
    """Every fourth frame from one on, as with SlowFast and VideoMAE; the clips of evaluation lie evenly.

    Of a video that is too short the last frame comes several times.
    """
    room = max(count - stride * num_frames, 0)
    if view is None:
        start = random.randint(0, room)
    else:
        start = room // 2 if view.clips == 1 else room * view.clip // (view.clips - 1)
    return [min(start + stride * i, count - 1) for i in range(num_frames)]


def shuffled(count: int, num_frames: int, view: View | None) -> list[int]:
    """The frames of :func:`sparse` in a random order: what is right then is right without time."""
    chosen = sparse(count, num_frames, view)
    return random.sample(chosen, num_frames)


# "windows" are sparse, of a part of a video each
SAMPLINGS: dict[str, Callable[[int, int, View | None], list[int]]] = {
    "sparse": sparse,
    "ssv2": something,
    "dense": dense,
    "windows": sparse,
    "shuffled": shuffled,
}


def windows(duration: float) -> list[tuple[float, float]]:
    """The parts of a long video, in seconds: a minute from every 16th second on, at its end down to half a minute."""
    if duration < WINDOW:
        return [(0.0, duration)]
    last = int((duration - WINDOW / 2) // WINDOW_STRIDE)
    starts = [float(WINDOW_STRIDE * i) for i in range(last + 1)]
    return [(start, min(start + WINDOW, duration)) for start in starts]
