"""What ops and models take: time, throughput and peak memory, compared side by side within one run."""

import importlib.util
import itertools
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models.vision_transformer import Block
from torch import Tensor, nn

import vim  # noqa: F401  registers the models
from vim.data.sampling import View, sparse
from vim.data.transforms import num_frames
from vim.data.video import read_video
from vim.engine.timing import peak_memory, side_by_side
from vim.errors import UserError, describe
from vim.kernels import available_backends, chunked, selective_scan

PASSES = ("forward", "training step")
SMALL, TINY = ("vim_small", "deit_small_patch16_224"), ("vim_tiny", "deit_tiny_patch16_224")


@dataclass(frozen=True)
class Row:
    """One figure. Speeds are relative to the row of the same comparison that is called `baseline`."""

    name: str
    run: str
    batch_size: int
    size: int  # pixels of a model's images, tokens of an op's
    milliseconds: float
    per_second: float
    peak_mb: float
    baseline: str
    speed: float


def compare(
    runs: Mapping[str, Callable[[], object]], *, run: str, batch_size: int, size: int, rounds: int
) -> list[Row]:
    """Measure runs in turns; the last one is the baseline."""
    medians = side_by_side(runs, rounds)
    memory = {name: peak_memory(call) for name, call in runs.items()}
    baseline = list(runs)[-1]
    return [
        Row(
            name,
            run,
            batch_size,
            size,
            milliseconds=1e3 * taken,
            per_second=batch_size / taken,
            peak_mb=memory[name] / 1e6,
            baseline=baseline,
            speed=medians[baseline] / taken,
        )
        for name, taken in medians.items()
    ]


def compare_scans(
    batch_size: int,
    device: str,
    *,
    tokens: int = 197,
    channels: int = 768,
    states: int = 16,
    passes: Sequence[str] = ("forward", "forward+backward"),
    rounds: int,
) -> list[Row]:
    """The scan's backends on Vim-Small's shapes, with softplus, D and gate; the loop over tokens is the baseline."""
    torch.manual_seed(0)
    u, delta, z = torch.randn(3, batch_size, tokens, channels, device=device)
    B, C = torch.randn(2, batch_size, tokens, states, device=device)
    D, delta_bias = torch.randn(2, channels, device=device)
    A = -torch.arange(1.0, states + 1, device=device).repeat(channels, 1)
    tensors = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias - 3}

    def scan(backend: str, backward: bool) -> None:
        leaves = {name: tensor.detach().requires_grad_(backward) for name, tensor in tensors.items()}
        y: Any = selective_scan(**leaves, delta_softplus=True, backend=backend)
        if backward:
            torch.autograd.grad(y.sum(), list(leaves.values()))

    rows = []
    for run in passes:
        names = [name for name in available_backends() if name != "reference"] + ["reference"]
        calls = {f"scan, {name}": partial(scan, name, run != "forward") for name in names}
        rows += compare(calls, run=run, batch_size=batch_size, size=tokens, rounds=rounds if run == "forward" else 2)
    return rows


# (b, k, l, d) of a layer of whole models, and long sequences
SHAPES = {
    "Vim-Tiny": (64, 2, 197, 384),
    "Vim-Small": (64, 2, 197, 768),
    "Vim-Base": (64, 2, 197, 1536),
    "VideoMamba-Tiny, 8 frames": (8, 2, 1569, 384),
    "VideoMamba-Middle, 64 frames": (1, 2, 12545, 1152),
    **{f"{length} tokens": (1, 2, length, 768) for length in (1024, 4096, 16384, 65536)},
}


def compare_layers(
    device: str, *, shapes: Mapping[str, tuple[int, int, int, int]] = SHAPES, states: int = 16, rounds: int
) -> list[Row]:
    """The scan of a layer in bfloat16, all directions, with softplus, D and gate, against what else there is on a GPU.

    That is the other backends, also compiled; mambapy's parallel scan, where it is installed, of one direction without
    the rest; and a copy of the inputs, the baseline. The least that its exponentials can take is a row without memory.
    """
    rows = []
    for name, shape in shapes.items():
        b, k, l, d = shape
        tensors = _of_a_layer(shape, states, device)
        options = (None, True, [bool(i % 2) for i in range(k)], "mean")  # no state, softplus
        scans: dict[str, Callable[..., Any]] = {
            backend: lambda *inputs, backend=backend, options=options: torch.ops.vim.selective_scan(
                *inputs, *options, False, backend
            )[0]
            for backend in reversed(available_backends(device))
            if backend != "reference" or l <= 197  # it takes minutes
        }
        if importlib.util.find_spec("mambapy"):
            scans["mambapy"] = _parallel_scan
        for run in ("forward", "forward+backward"):
            call = _infer if run == "forward" else _differentiate
            runs: dict[str, Callable[[], object]] = {}
            runs |= {f"{name}, {backend}": partial(call, scan, tensors) for backend, scan in scans.items()}
            if run == "forward":
                compiled: Any = torch.compile(chunked.selective_scan)
                runs[f"{name}, chunked, compiled"] = partial(compiled, *tensors, *options)
            runs[f"{name}, copy"] = partial(_copy, tensors)
            rows += compare(runs, run=run, batch_size=b, size=l, rounds=rounds)
            if device != "cpu":
                rows.append(_bound(f"{name}, bound", run, shape, states, rows[-1]))
    return rows


def compare_routes(
    device: str, *, shapes: Sequence[tuple[int, int]] = ((196, 768), (784, 384), (3136, 192), (12544, 192)), rounds: int
) -> list[Row]:
    """ViM2's scan of an image along four routes in one call, against four calls; shapes are (tokens, channels)."""
    rows = []
    for l, d in shapes:
        u, delta = torch.randn(2, 1, 2, l, 2 * d, device=device)  # two routes, and each backwards
        B, C = torch.randn(2, 1, 2, l, 2, 16, device=device)
        A = -torch.arange(1.0, 17, device=device).expand(2, 2 * d, 16).contiguous()
        D, delta_bias = torch.randn(2, 2, 2 * d, device=device)
        together = [u[:, :1].expand(1, 2, l, 2 * d), delta, A, B, C, D, None, delta_bias - 3]
        alone = [_route(together, k, g, d) for k in (0, 1) for g in (0, 1)]
        for run, call in (("forward", _infer), ("forward+backward", _differentiate)):
            calls = {
                "four routes, one call": partial(call, _scan_routes, together),
                "four routes, four calls": partial(_one_by_one, partial(call, _scan_routes), alone),
            }
            rows += compare(calls, run=run, batch_size=1, size=l, rounds=rounds)
    return rows


def _route(together: Sequence[Any], k: int, g: int, d: int) -> list[Any]:
    """The tensors of one route, in a direction, of their own."""
    u, delta, A, B, C, D, z, delta_bias = together
    own = slice(g * d, (g + 1) * d)
    u, delta = u[:, k, None, :, own], delta[:, k, None, :, own]
    A, D, delta_bias = A[k, None, own], D[k, None, own], delta_bias[k, None, own]
    B, C = B[:, k, None, :, g, None], C[:, k, None, :, g, None]
    return [t if t is None else t.contiguous() for t in (u, delta, A, B, C, D, z, delta_bias)]


def _scan_routes(*tensors: Tensor) -> Tensor:
    reverse = [bool(i % 2) for i in range(tensors[1].shape[1])]
    return torch.ops.vim.selective_scan(*tensors, None, True, reverse, "sum", False, "auto")[0]


def _one_by_one(call: Callable[[Sequence[Any]], None], groups: Sequence[Sequence[Any]]) -> None:
    for group in groups:
        call(group)


def _of_a_layer(shape: tuple[int, int, int, int], states: int, device: str) -> list[Tensor]:
    """u, delta, A, B, C, D, z and delta_bias."""
    b, k, l, d = shape
    wide: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    u, delta = torch.randn(2, b, k, l, d, **wide)
    B, C = torch.randn(2, b, k, l, 1, states, **wide)
    A = -torch.arange(1.0, states + 1, device=device).expand(k, d, states).contiguous()
    D, delta_bias = torch.randn(2, k, d, device=device)
    return [u, delta, A, B, C, D, torch.randn(b, 1, l, d, **wide), delta_bias - 3]


@torch.no_grad()
def _infer(scan: Callable[..., Tensor], tensors: Sequence[Any]) -> None:
    scan(*tensors)


def _copy(tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        tensor.clone()


def _differentiate(scan: Callable[..., Tensor], tensors: Sequence[Any]) -> None:
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in tensors]
    torch.autograd.grad(scan(*leaves).sum(), [leaf for leaf in leaves if leaf is not None], allow_unused=True)


def _parallel_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *rest: Tensor) -> Tensor:
    """The states of the first direction by mambapy, and what is read of them."""
    from mambapy.pscan import pscan

    u, delta, B, C = (tensor[:, 0].float() for tensor in (u, delta, B, C))
    dt = F.softplus(delta).unsqueeze(-1)
    return (pscan(torch.exp(dt * A[0]), dt * B * u.unsqueeze(-1)) * C).sum(-1)


def _bound(name: str, run: str, shape: tuple[int, int, int, int], states: int, copy: Row) -> Row:
    """The time of the exponentials alone: one a state and two of the softplus; three times that with backwards."""
    properties = torch.cuda.get_device_properties(0)
    a_second = 16 * properties.multi_processor_count * 1e3 * properties.clock_rate  # 16 a clock and multiprocessor
    b, _, l, _ = shape
    taken = math.prod(shape) * (states + 2) * (1 if run == "forward" else 3) / a_second
    return Row(name, run, b, l, 1e3 * taken, b / taken, 0.0, copy.baseline, copy.milliseconds / (1e3 * taken))


def compare_models(
    names: Sequence[str],
    *,
    img_size: int,
    batch_size: int,
    device: str,
    amp: str,
    passes: Sequence[str] = PASSES,
    rounds: int,
) -> list[Row]:
    """Forward passes and training steps (loss, backward, AdamW) of timm models; the last one is the baseline.

    Raises:
        UserError: no such model, or it takes no images of that size.
    """
    try:
        labels = torch.zeros(batch_size, dtype=torch.long, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"there is no device {device} here ({describe(error)})") from error
    context = _autocast(device, amp)
    models = {name: _build(name, img_size).to(device) for name in names}
    rows = []
    for run in passes:
        calls: dict[str, Callable[[], object]] = {}
        for name, model in models.items():
            frames = num_frames(model)
            image = torch.randn(batch_size, 3, *([frames] if frames else []), img_size, img_size, device=device)
            if run == "forward":
                calls[name] = partial(_forward, model.eval(), image, context)
            else:
                optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-5)
                calls[name] = partial(_step, model, optimizer, image, labels, context)
        rows += compare(calls, run=run, batch_size=batch_size, size=img_size, rounds=rounds)
    return rows


class JointTransformer(nn.Module):
    """A vision transformer of timm's blocks over all patches of a clip at once, the size of VideoMamba-Tiny."""

    def __init__(self, num_frames: int, *, img_size: int, fused: bool, embed_dim: int = 192, depth: int = 24) -> None:
        super().__init__()
        self.patch_embed = nn.Conv3d(3, embed_dim, (1, 16, 16), (1, 16, 16))
        self.pos_embed = nn.Parameter(torch.zeros(1, num_frames * (img_size // 16) ** 2, embed_dim))
        blocks = [Block(embed_dim, num_heads=3, qkv_bias=True) for _ in range(depth)]
        for block in blocks:
            cast(Any, block.attn).fused_attn = fused
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(embed_dim, 400)

    def forward(self, clip: Tensor) -> Tensor:
        """Map (b, c, t, h, w) to (b, 400)."""
        x = self.patch_embed(clip).flatten(2).transpose(1, 2) + self.pos_embed
        return self.head(self.blocks(x).mean(1))


def compare_clips(
    device: str, *, frames: Sequence[int] = (8, 16, 32, 64), img_size: int = 224, rounds: int
) -> list[Row]:
    """VideoMamba-Tiny on clips of several lengths, and on the longest the transformer of equal width and depth.

    A row's size is its clips' patches. The two transformers have PyTorch's attention, and the plain one.
    """
    rows = []
    for number in frames:
        clip = torch.randn(1, 3, number, img_size, img_size, device=device)
        model: Any = timm.create_model("videomamba_tiny_f8", num_frames=number, img_size=img_size).to(device).eval()
        calls = {"videomamba_tiny": partial(_forward, model, clip, nullcontext)}
        if number == max(frames):
            for name, fused in (("joint ViT, plain attention", False), ("joint ViT", True)):
                other = JointTransformer(number, img_size=img_size, fused=fused).to(device).eval()
                calls[name] = partial(_forward, other, clip, nullcontext)
        size = number * model.patch_embed.num_patches
        rows += compare(calls, run="forward", batch_size=1, size=size, rounds=rounds)
    return rows


def compare_decoding(
    *, seconds: int = 10, size: tuple[int, int] = (1280, 720), frames: int = 16, rounds: int
) -> list[Row]:
    """Some frames of a video, evenly spaced: our reader against what reads videos on this machine, on a thread each.

    The video pans over a photograph, in H.264 as FFmpeg's x264 makes it unless told otherwise. Of ours, the time of
    handing frames over from the process that decodes them is part.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "video.mp4")
        _write_pan(path, 30 * seconds, size)
        runs: dict[str, Callable[[], object]] = {
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
    import av
    from sklearn.datasets import load_sample_image

    photograph = np.asarray(
        Image.fromarray(load_sample_image("china.jpg")).resize((size[0] * 3 // 2, size[1] * 3 // 2))
    )
    with av.open(path, "w") as container:
        stream: Any = container.add_stream("libx264", rate=30)
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


def _autocast(device: str, amp: str) -> Callable[[], AbstractContextManager[Any]]:
    if amp == "no":
        return nullcontext
    return partial(torch.autocast, device, torch.bfloat16 if amp == "bf16" else torch.float16)


def _build(name: str, img_size: int) -> nn.Module:
    cfg = timm.get_pretrained_cfg(name)
    options: dict[str, Any] = {"img_size": img_size} if cfg and cfg.fixed_input_size else {}  # others take any size
    try:
        return timm.create_model(name, **options)
    except Exception as error:  # a model raises many kinds
        raise UserError(f"cannot build {name} at {img_size} pixels: {describe(error)}") from error


@torch.inference_mode()
def _forward(model: nn.Module, image: Tensor, context: Callable[[], AbstractContextManager[Any]]) -> None:
    with context():
        model(image)


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    image: Tensor,
    labels: Tensor,
    context: Callable[[], AbstractContextManager[Any]],
) -> None:
    with context():
        loss = F.cross_entropy(model(image).float(), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def compare_everything(device: str, amp: str) -> list[Row]:
    """What the documentation shows of a device."""
    measure = partial(compare_models, device=device, amp=amp)
    if device != "cpu":
        pairs = itertools.product((TINY, SMALL), (224, 512, 1024, 1248))
        return [
            *compare_layers(device, rounds=20),
            *[row for names, size in pairs for row in measure(names, img_size=size, batch_size=8, rounds=10)],
            *compare_routes(device, rounds=20),
            *compare_clips(device, rounds=5),
        ]
    return [
        *compare_scans(1, device, rounds=15),
        *compare_scans(8, device, rounds=5, passes=["forward"]),  # the loop's backward takes 40 s
        *measure(SMALL, img_size=224, batch_size=1, rounds=25, passes=PASSES[:1]),
        *measure(SMALL, img_size=224, batch_size=8, rounds=7),
        *measure(TINY, img_size=224, batch_size=1, rounds=15, passes=PASSES[:1]),
        *measure(TINY, img_size=448, batch_size=1, rounds=9, passes=PASSES[:1]),
        *measure(TINY, img_size=896, batch_size=1, rounds=5, passes=PASSES[:1]),
        *measure(TINY, img_size=1248, batch_size=1, rounds=3, passes=PASSES[:1]),
        *compare_routes(device, rounds=15),
        *compare_clips(device, rounds=3),
        *compare_decoding(rounds=5),
    ]


def compare_imports() -> str:
    """A line on what `import vim` adds to `import timm`, each in a process of its own."""
    codes = ("import timm", "import timm, vim")
    calls = {code: partial(subprocess.run, [sys.executable, "-c", code], check=True) for code in codes}
    alone, both = side_by_side(calls, rounds=5).values()
    return f"import vim adds {both - alone:.2f} s to import timm ({alone:.2f} s)"


def plot(rows: Sequence[Row], out: Path) -> None:
    """Draw time and memory over the size of the images, a line a model and kind of run."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    lines = sorted({(row.name, row.run, row.batch_size) for row in rows})
    for name, run, batch_size in lines:
        own = sorted(
            (r for r in rows if (r.name, r.run, r.batch_size) == (name, run, batch_size)), key=lambda r: r.size
        )
        sizes, label = [row.size for row in own], f"{name}, {run}, batch {batch_size}"
        axes[0].plot(sizes, [row.milliseconds for row in own], "o-", label=label)
        axes[1].plot(sizes, [row.peak_mb for row in own], "o-", label=label)
    for axis, ylabel in zip(axes, ("milliseconds", "peak memory, MB"), strict=True):
        axis.set(xlabel="pixels a side, or tokens of an op", ylabel=ylabel, xscale="log", yscale="log")
        axis.grid(alpha=0.3, which="both")
    axes[1].legend(fontsize="x-small")
    figure.savefig(out, dpi=100)
    plt.close(figure)
