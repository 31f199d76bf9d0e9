"""Models compared: inference and training steps, and what `import vim` costs."""

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import timm
import torch
import torch.nn.functional as F
from timm.layers import set_fused_attn, use_fused_attn
from torch import Tensor, nn

import vim  # noqa: F401  registers the models
from vim.errors import UserError, describe
from vim.measure.compare import Row, compare
from vim.measure.timing import Run, side_by_side

PASSES = ("forward", "training step")
Context = Callable[[], AbstractContextManager[object]]


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
    """Compare forward passes and training steps (loss, backward, AdamW) of timm models; the last one is the baseline.

    Args:
        amp: "no", "bf16" or "fp16".

    Raises:
        UserError: there is no such device or model, or the model cannot be built for images of that size.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"there is no device {device} here ({describe(error)})") from error
    call = partial(call_of, img_size=img_size, batch_size=batch_size, device=device, context=autocast(device, amp))
    models = {name: build(name, img_size).to(device) for name in names}
    rows = []
    for run in passes:
        calls = {name: call(model, run) for name, model in models.items()}
        rows += compare(calls, run=run, batch_size=batch_size, size=img_size, rounds=rounds)
    return rows


def call_of(
    model: nn.Module, run: str, *, img_size: int, batch_size: int, device: str = "cpu", context: Context = nullcontext
) -> Run:
    """Return a call that runs the model on random images of `img_size` pixels: one of `PASSES`."""
    image = torch.randn(batch_size, *input_size(model, img_size), device=device)
    if run == "forward":
        return partial(forward, model.eval(), image, context)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-5)
    labels = torch.zeros(batch_size, dtype=torch.long, device=device)
    return partial(train_step, model, optimizer, image, labels, context)


def autocast(device: str, amp: str) -> Context:
    """The context for a forward pass in "bf16" or "fp16", or without mixed precision ("no")."""
    if amp == "no":
        return nullcontext
    return partial(torch.autocast, device, torch.bfloat16 if amp == "bf16" else torch.float16)


def build(name: str, img_size: int) -> nn.Module:
    """Build a timm model for square images of `img_size` pixels, with random weights.

    Raises:
        UserError: there is no such model, or it cannot be built for this size.
    """
    cfg = timm.get_pretrained_cfg(name)
    try:
        if cfg and cfg.fixed_input_size:
            return timm.create_model(name, img_size=img_size)
        return timm.create_model(name)  # takes any size
    except Exception as error:  # a model raises many kinds
        raise UserError(f"cannot build {name} at {img_size} pixels: {describe(error)}") from error


@contextmanager
def attention(*, fused: bool) -> Iterator[None]:
    """Build timm's transformers with PyTorch's fused attention, or with two matrix products and a softmax."""
    before = use_fused_attn()
    set_fused_attn(fused)
    try:
        yield
    finally:
        set_fused_attn(before)


def input_size(model: nn.Module, img_size: int) -> tuple[int, ...]:
    """The size of one image, (3, h, w), or of one clip, (3, t, h, w), that the model takes."""
    frames = getattr(model, "num_frames", None)  # a model of images may lack it
    return (3, frames, img_size, img_size) if frames else (3, img_size, img_size)


@torch.inference_mode()
def forward(model: Callable[[Tensor], Tensor], image: Tensor, context: Context) -> Tensor:
    """Run the model without gradients."""
    with context():
        return model(image)


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, image: Tensor, labels: Tensor, context: Context
) -> None:
    """Make one update: loss, gradients, optimizer."""
    with context():
        loss = F.cross_entropy(model(image).float(), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def compare_imports() -> str:
    """A line on the time that `import vim` adds to `import timm`, each in a process of its own."""
    codes = ("import timm", "import timm, vim")
    calls = {code: partial(subprocess.run, [sys.executable, "-c", code], check=True) for code in codes}
    alone, both = side_by_side(calls, rounds=5).values()
    return f"import vim adds {both - alone:.2f} s to import timm ({alone:.2f} s)"
