"""Videos: VideoMamba on clips of several lengths against a transformer, and decoding against other readers."""

import importlib.util
import itertools
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from timm.models.vision_transformer import Block
from torch import Tensor, nn

import vim  # noqa: F401  registers the models
from vim.data.video import read_video
from vim.data.video.sampling import View, sparse
from vim.measure.compare import Row, compare
from vim.measure.models import attention, forward
from vim.measure.timing import Run


class JointTransformer(nn.Module):
    """A transformer of timm's blocks that attends to all patches of a clip at once; the size of VideoMamba-Tiny."""

    def __init__(self, num_frames: int, *, img_size: int, embed_dim: int = 192, depth: int = 24) -> None:
        super().__init__()
        self.num_frames = num_frames
        self.patch_embed = nn.Conv3d(3, embed_dim, (1, 16, 16), (1, 16, 16))
        self.pos_embed = nn.Parameter(torch.zeros(1, num_frames * (img_size // 16) ** 2, embed_dim))
        self.blocks = nn.Sequential(*(Block(embed_dim, num_heads=3, qkv_bias=True) for _ in range(depth)))
        self.head = nn.Linear(embed_dim, 400)

    def forward(self, clip: Tensor) -> Tensor:
        """Map (b, c, t, h, w) to (b, 400)."""
        x = self.patch_embed(clip).flatten(2).transpose(1, 2) + self.pos_embed
        return self.head(self.blocks(x).mean(1))


def compare_clips(
    device: str, *, frames: Sequence[int] = (8, 16, 32, 64), img_size: int = 224, rounds: int
) -> list[Row]:
    """Measure VideoMamba-Tiny on clips of several lengths.

    On the longest clips it is compared with :class:`JointTransformer`, with plain and with fused attention. A row's
    size is the number of patches of a clip.
    """
    rows = []
    for number in frames:
        clip = torch.randn(1, 3, number, img_size, img_size, device=device)
        model = timm.create_model("videomamba_tiny_f8", num_frames=number, img_size=img_size).to(device).eval()
        calls: dict[str, Run] = {"videomamba_tiny": partial(forward, model, clip, nullcontext)}
        if number == max(frames):
            for name, fused in (("joint ViT, plain attention", False), ("joint ViT", True)):
                with attention(fused=fused):
                    other = JointTransformer(number, img_size=img_size).to(device).eval()
                calls[name] = partial(forward, other, clip, nullcontext)
        size = number * (img_size // 16) ** 2
        rows += compare(calls, run="forward", batch_size=1, size=size, rounds=rounds)
    return rows


def compare_decoding(
    *, seconds: int = 10, size: tuple[int, int] = (1280, 720), frames: int = 16, rounds: int
) -> list[Row]:
    """Read evenly spaced frames of an H.264 video: our reader against decord, OpenCV and PyAV, one thread each.

    The video pans over a photograph. Our reader decodes in a process of its own; its time includes handing over the
    frames. A reader that is not installed is left out.

    Args:
        size: width and height in pixels.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "video.mp4")
        _write_pan(path, 30 * seconds, size)
        runs: dict[str, Run] = {
            "vim.data.read_video": lambda: read_video(path, lambda count, fps: sparse(count, frames, View(0, 1))),
            "decord": partial(_decord, path, frames),
            "OpenCV": partial(_opencv, path, frames),
            "PyAV": partial(_pyav, path, frames),
        }
        for name, module in (("decord", "decord"), ("OpenCV", "cv2")):
            if not importlib.util.find_spec(module):
                del runs[name]
        return compare(runs, run=f"{frames} frames", batch_size=frames, size=size[1], rounds=rounds)


def _write_pan(path: str, count: int, size: tuple[int, int]) -> None:
    """Encode `count` frames of a window that moves over a photograph."""
    import av
    from sklearn.datasets import load_sample_image

    photograph = np.asarray(
        Image.fromarray(load_sample_image("china.jpg")).resize((size[0] * 3 // 2, size[1] * 3 // 2))
    )
    with av.open(path, "w") as container:
        stream: av.VideoStream = container.add_stream("libx264", rate=30)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for number in range(count):
            x, y = number % (size[0] // 2), number % (size[1] // 2)
            picture = np.ascontiguousarray(photograph[y : y + size[1], x : x + size[0]])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())


def _decord(path: str, frames: int) -> np.ndarray:
    import decord

    reader = decord.VideoReader(path, num_threads=1)
    return reader.get_batch(sparse(len(reader), frames, View(0, 1))).asnumpy()


def _opencv(path: str, frames: int) -> list[np.ndarray]:
    import cv2

    capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    wanted = sparse(int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), frames, View(0, 1))
    pictures = []
    for number in range(wanted[-1] + 1):
        capture.grab()
        if number in wanted:
            pictures.append(cv2.cvtColor(capture.retrieve()[1], cv2.COLOR_BGR2RGB))
    return pictures


def _pyav(path: str, frames: int) -> list[np.ndarray]:
    import av

    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        wanted = sparse(stream.frames, frames, View(0, 1))
        decoded = itertools.islice(container.decode(stream), wanted[-1] + 1)
        return [frame.to_ndarray(format="rgb24") for number, frame in enumerate(decoded) if number in wanted]
