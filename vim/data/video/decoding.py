"""Decoding videos in a process of its own: :mod:`vim.data.video.reading` runs `python decoding.py SOCKET MEMORY`.

A damaged file can make FFmpeg hang or crash in C code, where Python cannot catch it, and decord decodes ahead in a
thread. In this process none of that harms the parent: SIGALRM ends the process at a video's time limit, even if the
parent has died, and a crash ends this process only. Frames are returned in shared memory.

This file imports nothing of its package, so that the process starts in a tenth of a second, without torch.
"""

import mmap
import os
import re
import signal
import struct
import sys
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import suppress
from itertools import groupby
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    import av

MOST_BYTES = 4 << 30  # of a clip; a header that asks for more is damaged
PLAYLISTS = (b"ffconcat", b"#EXTM3U", b"<?xml", b"<MPD", b"[playlist]", b"v=0")  # FFmpeg opens the files they name


def as_shown(frame: np.ndarray, matrix: tuple[int, ...]) -> np.ndarray:
    """Turn and mirror a frame (h, w, c) as a display matrix says: by the nearest quarter of a turn.

    Args:
        matrix: a, b, u, c, d: a pixel at (x, y) is shown at (a x + c y, b x + d y), shifted (ISO 14496-12, 6.2.2).
    """
    a, b, _, c, d = matrix
    if abs(a) + abs(d) < abs(b) + abs(c):  # x is shown as y
        frame, a, d = frame.swapaxes(0, 1), c, b
    return frame[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def on_white(pixels: np.ndarray) -> np.ndarray:
    """Put a frame with alpha (h, w, 4) on white, (h, w, 3)."""
    colours, alpha = pixels[..., :3].astype(np.uint16), pixels[..., 3:].astype(np.uint16)
    return ((colours * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def check_upright(path: str) -> None:
    """Refuse an MP4 or QuickTime file with a display matrix: for a decoder that applies it wrongly, or not at all.

    The matrix stands in a track's header, in the box `moov` (ISO 14496-12, 8.3.2). Other files pass.
    """
    with open(path, "rb") as file:
        while len(head := file.read(8)) == 8:
            size, name = struct.unpack(">I4s", head)
            size = struct.unpack(">Q", file.read(8).ljust(8, b"\0"))[0] - 16 if size == 1 else size - 8
            if name != b"moov":
                if size < 0:  # to the end of the file, or no such file
                    return
                file.seek(size, os.SEEK_CUR)
                continue
            movie = file.read(max(size, -1))
            for header in re.finditer(b"tkhd(.)", movie, re.DOTALL):
                start = header.start() + (56 if header[1] == b"\1" else 44)
                matrix = movie[start : start + 20]
                if matrix not in (struct.pack(">5i", 1 << 16, 0, 0, 0, 1 << 16), bytes(20)):
                    raise ValueError("it is turned or mirrored, which this decoder gets wrong, unlike PyAV")


def check_alone(path: str) -> None:
    """Refuse a list of other files under a video's name."""
    with open(path, "rb") as file:
        if file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(PLAYLISTS):
            raise ValueError("it is a list of other files")


class Reader(Protocol):
    """An open video file."""

    count: int  # its number of frames
    fps: float  # frames per second, 0 if unknown

    def __init__(self, path: str) -> None: ...

    def frames(self, indices: list[int]) -> Iterator[np.ndarray]:
        """Decode frames (h, w, 3), 8 bits in RGB; the indices are ascending, without repeats."""


class Decord:
    """Reads with decord, which has no AV1."""

    def __init__(self, path: str) -> None:
        import decord

        check_upright(path)
        self.reader = decord.VideoReader(path, num_threads=1)
        self.count, self.fps = len(self.reader), float(self.reader.get_avg_fps())

    def frames(self, indices: list[int]) -> Iterator[np.ndarray]:
        """See :class:`Reader`."""
        for index in indices:
            yield self.reader[index].asnumpy()


class PyAV:
    """Reads with PyAV, whose wheel brings FFmpeg with all common codecs.

    It skips what the wanted frames do not depend on: whole groups of pictures, and within a group the pictures that no
    other refers to.
    """

    def __init__(self, path: str) -> None:
        import av

        self.container = av.open(path, metadata_errors="ignore")
        streams = [s for s in self.container.streams.video if not s.disposition & s.disposition.attached_pic]
        if not streams:
            raise ValueError("it holds no video")
        self.stream = streams[0]
        self.stream.codec_context.thread_count = 1
        self.size = self.stream.codec_context.width or None, self.stream.codec_context.height or None
        self.reformatter = av.video.reformatter.VideoReformatter()  # making one costs as much as a small frame
        # packets are in decoding order; frames come out in the order of their times
        packets = [(p.pts, p.is_keyframe) for p in self.container.demux(self.stream) if p.size and not p.is_discard]
        if not packets:
            raise ValueError("its video has no frames")
        self.count, self.fps = len(packets), float(self.stream.average_rate or 0)
        self.times = sorted({time for time, _ in packets if time is not None})
        self.keys = sorted({time for time, is_key in packets if time is not None and is_key})
        self.timed = len(self.times) == self.count and self.times[0] in self.keys

    def frames(self, indices: list[int]) -> Iterator[np.ndarray]:
        """See :class:`Reader`; a damaged frame is replaced by the one before it."""
        found = self._by_time(indices) if self.timed else {}
        if len(found) < len(indices):  # some containers have no times or cannot seek
            found |= self._by_order(indices)
        if 2 * len(found) < len(indices):
            raise ValueError(f"only {len(found)} of {len(indices)} frames can be decoded")
        frame = found[min(found)]
        for index in indices:
            frame = found.get(index, frame)
            yield frame

    def _by_time(self, indices: list[int]) -> dict[int, np.ndarray]:
        """Seek to the key frame before each wanted frame, and decode from there."""
        found = {}
        index_of = {self.times[index]: index for index in indices}
        for key, group in groupby(index_of, lambda time: self.keys[bisect_right(self.keys, time) - 1]):
            left = set(group)
            self.container.seek(key, stream=self.stream)
            for packet in self.container.demux(self.stream):
                self.stream.codec_context.skip_frame = "DEFAULT" if packet.pts in left else "NONREF"
                for frame in self._decode(packet):
                    if frame.pts in left:
                        left.remove(frame.pts)
                        found[index_of[frame.pts]] = self._array(frame)
                if not left:
                    break
        return found

    def _by_order(self, indices: list[int]) -> dict[int, np.ndarray]:
        """Decode from the start, and count."""
        import av

        wanted, found, number = set(indices), {}, 0
        with av.open(self.container.name, metadata_errors="ignore") as container:
            for packet in container.demux(container.streams[self.stream.index]):
                for frame in self._decode(packet):
                    if number in wanted:
                        found[number] = self._array(frame)
                    number += 1
                if number > indices[-1]:
                    break
        return found

    @staticmethod
    def _decode(packet: "av.Packet") -> list["av.VideoFrame"]:
        import av

        try:
            return packet.decode()
        except av.FFmpegError:  # this packet is damaged; later ones may not be
            return []

    def _array(self, frame: "av.VideoFrame") -> np.ndarray:
        width, height = self.size  # of the first frame: a stream may change its size
        has_alpha = frame.format.has_palette or any(part.is_alpha for part in frame.format.components)
        layout = "rgba" if has_alpha else "rgb24"
        pixels = self.reformatter.reformat(frame, width, height, layout, threads=1).to_ndarray()
        matrix = frame.side_data.get("DISPLAYMATRIX")
        pixels = on_white(pixels) if has_alpha else pixels
        return as_shown(pixels, struct.unpack_from("5i", matrix)) if matrix else pixels  # type: ignore[arg-type]


class TorchCodec:
    """Reads with torchcodec, which needs the system's FFmpeg."""

    def __init__(self, path: str) -> None:
        from torchcodec.decoders import VideoDecoder

        check_upright(path)
        self.decoder = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1)
        self.count, self.fps = len(self.decoder), float(self.decoder.metadata.average_fps or 0)

    def frames(self, indices: list[int]) -> Iterator[np.ndarray]:
        """See :class:`Reader`."""
        for index in indices:
            yield self.decoder[index].numpy()


READERS: dict[str, type[Reader]] = {"decord": Decord, "pyav": PyAV, "torchcodec": TorchCodec}


def write(frames: Iterator[np.ndarray], count: int, memory: int) -> tuple[int, int, int]:
    """Write `count` frames into the shared memory and return their shape, (count, h, w)."""
    first = next(frames)
    height, width, _ = first.shape
    if count * first.nbytes > MOST_BYTES:
        raise ValueError(f"{count} frames of {width} x {height} pixels take more than {MOST_BYTES >> 30} GB")
    os.ftruncate(memory, count * first.nbytes)
    with mmap.mmap(memory, count * first.nbytes) as shared:
        clip = np.frombuffer(shared, np.uint8).reshape(count, *first.shape)
        try:
            clip[0] = first
            for place, frame in enumerate(frames, 1):
                if frame.shape != first.shape:
                    raise ValueError(f"its size changes from {first.shape} to {frame.shape}")
                clip[place] = frame
        finally:
            del clip  # or the memory cannot be closed
    return count, height, width


def serve(connection: Connection, memory: int) -> None:
    """Answer the parent's questions until it has gone.

    A video takes two questions. (decoder, path, time limit) is answered by (number of frames, frames per second). The
    ascending indices of the wanted frames are answered by the shape of the clip in the shared memory. If a decoder
    fails, the answer to either is its message, a string.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    while True:
        decoder, path, time_limit = connection.recv()
        signal.setitimer(signal.ITIMER_REAL, time_limit)
        reader: Reader | None = None
        answer: tuple[int, int, int] | str
        try:
            check_alone(path)
            reader = READERS[decoder](path)
            connection.send((reader.count, reader.fps))
            indices = connection.recv()
            answer = write(reader.frames(indices), len(indices), memory)
        except Exception as error:  # each decoder raises its own classes
            answer = str(error).strip() or type(error).__name__
        reader = None  # or decord would go on decoding ahead
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send(answer)


if __name__ == "__main__":
    with suppress(EOFError, OSError):  # the parent has gone
        serve(Connection(int(sys.argv[1])), int(sys.argv[2]))
