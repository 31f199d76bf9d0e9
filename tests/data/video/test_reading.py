import os
import random
import re
import shutil
import signal
import struct
import sys
from collections import Counter

import av
import numpy as np
import pytest
from PIL import Image

from tests.tiny import VIDEO_FRAMES, frame_numbers, told, write_video
from vim.data import read_video
from vim.data.video import decoding
from vim.data.video.reading import DECODERS as ALL_DECODERS
from vim.data.video.reading import PACKAGES, _decoding_process, installed
from vim.data.video.sampling import View, sparse
from vim.errors import UserError

DECODERS = ["decord", "pyav"]


def write_audio(path):
    """Music with the picture of its cover."""
    with av.open(str(path), "w") as container:
        cover = container.add_stream("mjpeg", rate=1)
        cover.width = cover.height = 32
        cover.pix_fmt, cover.disposition = "yuvj420p", av.stream.Disposition.attached_pic
        stream = container.add_stream("aac", rate=8000, layout="mono")
        for start in range(0, 8000, 1000):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1000), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 8000, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        container.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        container.mux(cover.encode())
    return path


def these(*indices):
    return lambda count, fps: list(indices)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("videos") / "a.mp4", g="15")


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("suffix, codec", [("mp4", "libx264"), ("webm", "libvpx-vp9"), ("avi", "mpeg4")])
def test_frames_are_those_asked_for(decoder, suffix, codec, tmp_path):
    path = write_video(tmp_path / f"a.{suffix}", codec, g="15", **({"bf": "2"} if codec == "libx264" else {}))
    seen = []
    frames = read_video(path, lambda *args: seen.append(args) or [3, 0, 39, 7, 7, 22], decoder=decoder)
    assert seen == [(VIDEO_FRAMES, 10.0)]
    assert frame_numbers(frames) == [3, 0, 39, 7, 7, 22]
    assert {(frame.mode, frame.size) for frame in frames} == {("RGB", (64, 48))}


@pytest.mark.skipif("libsvtav1" not in av.codecs_available, reason="no encoder for AV1")
def test_av1(tmp_path):
    path = write_video(tmp_path / "a.mp4", "libsvtav1")
    assert frame_numbers(read_video(path, these(0, 21, 39), "L")) == [0, 21, 39]


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_frame_in_any_group_of_pictures(decoder, video):
    for index in range(0, VIDEO_FRAMES, 3):
        assert frame_numbers(read_video(video, these(index), decoder=decoder)) == [index]


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_variable_frame_rate(decoder, tmp_path):
    times = np.cumsum(np.random.default_rng(0).integers(1, 9, VIDEO_FRAMES)).tolist()
    path = write_video(tmp_path / "a.mp4", times=times)
    assert frame_numbers(read_video(path, these(0, 13, 39), decoder=decoder)) == [0, 13, 39]


MATRICES = [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0), (-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0)]
MATRICES += [(0, -1, -1, 0)]


def set_matrix(path, matrix):
    """Put a display matrix (a, b, c, d) into the header of an MP4 file's track."""
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 44
    a, b, c, d = (value << 16 for value in matrix)
    data[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("matrix", MATRICES)
def test_a_video_is_turned_and_mirrored_as_players_show_it(matrix, video, tmp_path):
    """A pixel at (x, y) is shown at (a x + c y, b x + d y): ISO 14496-12, 6.2.2."""
    path = set_matrix(shutil.copy(video, tmp_path / "a.mp4"), matrix)
    stored, shown = (np.asarray(read_video(file, these(5), "L")[0]) for file in (video, path))
    y, x = np.mgrid[: stored.shape[0], : stored.shape[1]]
    a, b, c, d = matrix
    left, top = a * x + c * y, b * x + d * y
    np.testing.assert_array_equal(shown[top - top.min(), left - left.min()], stored)
    if matrix == MATRICES[0]:
        np.testing.assert_array_equal(np.asarray(read_video(path, these(5), "L", decoder="decord")[0]), stored)
    else:  # decord would stretch it, or not mirror it
        with pytest.raises(UserError, match="it is turned or mirrored, which this decoder gets wrong, unlike PyAV"):
            read_video(path, these(5), decoder="decord")


@pytest.mark.parametrize("angle, corner", [(30, (0, 0)), (60, (-1, 0)), (-100, (0, -1))])
def test_a_video_that_is_turned_by_another_angle(angle, corner, tmp_path):
    """By the nearest quarter of a turn."""
    if not hasattr(av.VideoStream, "set_display_rotation"):
        pytest.skip("PyAV cannot write rotations")
    path = write_video(tmp_path / "a.mp4", rotation=angle)
    image = np.asarray(read_video(path, these(5), "L")[0])
    assert [place for place in [(0, 0), (0, -1), (-1, 0), (-1, -1)] if image[place] > 200] == [corner]


@pytest.mark.parametrize("name, codec, layout", [("a.gif", "gif", "bgra"), ("a.mov", "qtrle", "argb")])
def test_a_transparent_video_is_put_on_white(name, codec, layout, tmp_path):
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[8:] = 255, 0, 0, 255
    frame = av.VideoFrame.from_ndarray(pixels, format="rgba")
    if codec == "gif":
        first, second = Image.fromarray(pixels), Image.fromarray(pixels.copy())
        second.putpixel((0, 15), (0, 255, 0, 255))  # or Pillow would join the frames
        first.save(tmp_path / name, save_all=True, append_images=[second], disposal=2, transparency=0)
    else:
        with av.open(str(tmp_path / name), "w") as container:
            stream = container.add_stream(codec, rate=10)
            stream.width = stream.height = 16
            stream.pix_fmt = layout
            container.mux(stream.encode(frame.reformat(format=layout)))
            container.mux(stream.encode())
    image = np.asarray(read_video(tmp_path / name, these(0))[0])
    assert image[:8].min() == 255
    assert (image[8:, 1:] == [255, 0, 0]).all()


def test_no_video(tmp_path):
    (tmp_path / "text.mp4").write_text("hello")
    (tmp_path / "empty.mp4").write_bytes(b"")
    write_audio(tmp_path / "audio.mp4")
    for name, reason in (("text.mp4", "Invalid data"), ("empty.mp4", ""), ("audio.mp4", "it holds no video")):
        with pytest.raises(UserError, match=told("cannot read", name, "pyav: ", reason, "replace the file or take")):
            read_video(tmp_path / name, these(0))
    with pytest.raises(UserError, match=told("no such video", "give the path of a video file")):
        read_video(tmp_path / "none.mp4", these(0))
    os.mkfifo(tmp_path / "fifo.mp4")
    with pytest.raises(UserError, match="no such video"):
        read_video(tmp_path / "fifo.mp4", these(0))


@pytest.mark.parametrize("text", ["ffconcat version 1.0\nfile {}\n", "#EXTM3U\n#EXTINF:4.0,\n{}\n"])
def test_a_list_of_other_files_is_no_video(text, video, tmp_path):
    (tmp_path / "b.mp4").write_bytes(video.read_bytes())
    (tmp_path / "a.mp4").write_text(text.format("b.mp4"))
    with pytest.raises(UserError, match="it is a list of other files"):
        read_video(tmp_path / "a.mp4", these(0))


def test_the_next_decoder_is_tried(video, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    assert installed("auto") == ["decord"]
    monkeypatch.setitem(PACKAGES, "torchcodec", "decord")
    monkeypatch.setitem(ALL_DECODERS, "auto", ("torchcodec", "decord"))  # torchcodec fails: it is not installed
    assert frame_numbers(read_video(video, these(4))) == [4]


def test_a_clip_that_cannot_be_shared():
    memory = os.memfd_create("frames")
    large = np.zeros((1080, 1920, 3), np.uint8)
    with pytest.raises(ValueError, match="1000 frames of 1920 x 1080 pixels take more than 4 GB"):
        decoding.write(iter([large]), 1000, memory)
    with pytest.raises(ValueError, match=re.escape("its size changes from (4, 4, 3) to (4, 5, 3)")):
        decoding.write(iter([large[:4, :4], large[:4, :5]]), 2, memory)
    os.close(memory)


class Questions:
    """The end of a connection at which a parent asks for the first frame of a video, and goes."""

    def __init__(self, path):
        self.questions, self.answers = iter([("pyav", str(path), 30.0), [0]]), []

    def recv(self):
        try:
            return next(self.questions)
        except StopIteration:
            raise EOFError from None

    def send(self, answer):
        self.answers.append(answer)


def test_the_time_limit_is_of_a_video_and_not_of_the_wait_for_the_next(video):
    connection, memory, handler = Questions(video), os.memfd_create("frames"), signal.getsignal(signal.SIGALRM)
    try:
        with pytest.raises(EOFError):
            decoding.serve(connection, memory)
        assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        os.close(memory)
    assert connection.answers == [(VIDEO_FRAMES, 10.0), (1, 48, 64)]


def test_what_is_left_of_a_truncated_video(tmp_path):
    path = write_video(tmp_path / "a.mp4", g="10", bf="0")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 9 // 10])
    counts = []
    frames = read_video(path, lambda count, fps: counts.append(count) or [0, count - 1], decoder="pyav")
    assert counts[0] < VIDEO_FRAMES
    assert frame_numbers(frames)[0] == 0


def test_a_video_that_takes_too_long(video):
    def wait(count, fps):
        os.waitid(os.P_PID, _decoding_process(os.getpid()).process.pid, os.WEXITED | os.WNOWAIT)
        return [0]

    with pytest.raises(UserError, match=told("cannot read", video, "it takes longer than its time limit")):
        read_video(video, wait, time_limit=0.2)
    assert frame_numbers(read_video(video, these(4))) == [4]


def test_a_video_that_crashes_its_decoder(video):
    def crash(count, fps):
        os.kill(_decoding_process(os.getpid()).process.pid, signal.SIGSEGV)
        return [0]

    with pytest.raises(UserError, match=told("cannot read", video, "it crashes the decoder, exit status -11")):
        read_video(video, crash)
    assert frame_numbers(read_video(video, these(4))) == [4]


def test_an_interruption(video):
    def interrupt(count, fps):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read_video(video, interrupt)
    assert frame_numbers(read_video(video, these(4))) == [4]


def mutate(whole, seed):
    """Change some bytes, anywhere or where a file describes itself; or cut it off."""
    chance, data = random.Random(seed), bytearray(whole)
    for place in range(chance.choice([1, 10, 100])):
        place = chance.choice([chance.randrange(len(data)), chance.randrange(1000), -1 - chance.randrange(1500)])
        data[place] = chance.randrange(256)
    return bytes(data[: chance.randrange(len(data))] if seed % 4 == 0 else data)


def test_damaged_videos(tmp_path):
    count = int(os.environ.get("MUTATED_VIDEOS", 60))  # 500 took 20 s
    whole = [
        write_video(tmp_path / "a.mp4", g="10").read_bytes(),
        write_video(tmp_path / "a.webm", "libvpx-vp9", g="10").read_bytes(),
    ]
    outcomes = Counter()
    for seed in range(count):
        path = tmp_path / f"{seed}.{('mp4', 'webm')[seed % 2]}"
        path.write_bytes(mutate(whole[seed % 2], seed))
        try:
            frames = read_video(path, lambda count, fps: sparse(count, 8, View(0, 1)), time_limit=10)
            assert len(frames) == 8
            outcomes["read"] += 1
        except UserError as error:
            assert str(path) in str(error)
            outcomes["refused"] += 1
        path.unlink()
    assert min(outcomes["read"], outcomes["refused"]) > count / 10, outcomes
