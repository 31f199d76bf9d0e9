"""Reading frames of a video: from a file through a decoding process, or from a folder of images."""

import functools
import mmap
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from vim.data.files import IMAGES, files_in
from vim.data.images import read_image
from vim.data.video import decoding
from vim.errors import UserError, missing, printable

# The names of `decoder`, and what each tries in order. PyAV takes 0.7 of decord's time on 720p, since it skips frames
# that no wanted frame refers to, and decodes AV1. decord 0.6 turns damaged frames grey.
DECODERS = {"auto": ("pyav", "decord"), "decord": ("decord",), "pyav": ("pyav",), "torchcodec": ("torchcodec",)}
PACKAGES = {"decord": "decord", "pyav": "av", "torchcodec": "torchcodec"}

Choose = Callable[[int, float], list[int]]  # the indices of the wanted frames, given their count and frames per second


class _DecodingError(Exception):
    """A decoder's message about a file."""


class _DecodingProcess:
    """A process that runs :mod:`vim.data.video.decoding`, and reads one video at a time."""

    def __init__(self) -> None:
        self.connection, theirs = multiprocessing.Pipe()
        self.memory = os.memfd_create("frames")
        numbers = (theirs.fileno(), self.memory)
        self.process = subprocess.Popen(
            [sys.executable, "-P", decoding.__file__, *map(str, numbers)],  # -P: never import a neighbour of the file
            pass_fds=numbers,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # FFmpeg prints a lot
            start_new_session=True,  # Ctrl-C reaches the parent only
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # NumPy's threads would only take up memory
        )
        theirs.close()

    def read(self, path: str, choose: Choose, decoder: str, time_limit: float) -> list[Image.Image]:
        """Return the frames that `choose` names, or raise _DecodingError; any other exception ends the process."""
        try:
            count, fps = self._ask((decoder, path, time_limit))
            wanted = choose(count, fps)
            order = sorted(set(wanted))
            frames = self._frames(*self._ask(order))
        except _DecodingError:
            raise
        except BaseException:  # an answer may be on its way
            self.end()
            raise
        return [frames[order.index(index)] for index in wanted]

    def _ask(self, question: object) -> tuple:
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
        """Kill the process and free its memory; the next video starts another."""
        _decoding_process.cache_clear()
        self.process.kill()
        self.process.wait()
        self.connection.close()
        os.close(self.memory)


@functools.lru_cache(maxsize=1)
def _decoding_process(pid: int) -> _DecodingProcess:
    """The decoding process of this process; a loader's worker has its own `pid`, so it never shares its parent's."""
    return _DecodingProcess()


def installed(decoder: str) -> list[str]:
    """The installed decoders among those that a key of DECODERS stands for.

    Raises:
        UserError: none is installed.
    """
    names = [name for name in DECODERS[decoder] if find_spec(PACKAGES[name])]
    if not names:
        raise missing(PACKAGES[DECODERS[decoder][0]], "reading videos")
    return names


def read_video(
    path: str | Path, choose: Choose, mode: str = "RGB", *, decoder: str = "auto", time_limit: float = 30.0
) -> list[Image.Image]:
    """Decode frames of a video file as players show them: turned and mirrored as it says, and on white.

    Args:
        choose: gets the number of frames and the frames per second (0 if unknown), and returns the wanted indices.
        mode: PIL's mode for the images: "RGB", or "L" for grey.
        decoder: "decord", "pyav" or "torchcodec"; "auto" tries PyAV, then decord.
        time_limit: in seconds, for each decoder that is tried.

    Raises:
        UserError: the file does not exist, or no decoder is installed or can decode it in time.
    """
    if not os.path.isfile(path):
        raise UserError(f"no such video: {printable(path)} (give the path of a video file)")
    reasons = []
    for name in installed(decoder):
        try:
            # the process may be older than a change of the working folder
            frames = _decoding_process(os.getpid()).read(os.path.abspath(path), choose, name, time_limit)
            return frames if mode == "RGB" else [frame.convert(mode) for frame in frames]
        except (_DecodingError, TimeoutError, ChildProcessError) as error:
            reasons.append(f"{name}: {error}")
    raise UserError(f"cannot read {printable(path)} as a video ({reasons[0][:200]}): replace the file or take it out")


def read_frames(folder: Path, choose: Choose, mode: str, template: str | None, count: int | None) -> list[Image.Image]:
    """Read frames of a video that is stored as a folder of images.

    Args:
        template: the pattern of their names, such as "img_{:05}.jpg", numbered from 1. By default all images of the
            folder, in alphabetical order, are the frames.
        count: the number of frames; needed with `template`.

    Raises:
        UserError: the folder does not exist or has no image, or a wanted frame is missing or damaged.
    """
    if template is None or count is None:
        if not folder.is_dir():
            raise UserError(f"no such folder of frames: {folder} (give the path of a folder of images)")
        names = files_in(folder, IMAGES)
    else:
        names = [template.format(number) for number in range(1, count + 1)]
    if not names:
        raise UserError(f"no frame in {folder}: {IMAGES.expected}")
    return [read_image(folder / names[index], mode) for index in choose(len(names), 0.0)]
