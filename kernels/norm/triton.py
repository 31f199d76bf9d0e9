# mypy: ignore-errors
"""Root-mean-square normalisation on a GPU, in Triton: one pass over memory forward, and one backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import on_its_device

PROGRAMS = 1024  # at most, in a backward pass; each adds up dweight over its rows


@on_its_device
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See :func:`vim.kernels.norm.reference.rms_norm`."""
    x, weight = x.contiguous(), weight.contiguous()
    y, d = torch.empty_like(x), x.shape[-1]
    forward_kernel[(x.numel() // d,)](x, weight, y, d, eps, **_launch(d))
    return y


@on_its_device
def rms_norm_backward(grad_y: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and weight, in their dtype."""
    grad_y, x, weight = grad_y.contiguous(), x.contiguous(), weight.contiguous()
    dx, d, rows = torch.empty_like(x), x.shape[-1], x.numel() // x.shape[-1]
    programs = min(rows, PROGRAMS)
    dweight = x.new_empty(programs, d, dtype=torch.float32)
    backward_kernel[(programs,)](grad_y, x, weight, dx, dweight, rows, d, eps, **_launch(d))
    return dx, dweight.sum(0).to(weight.dtype)


def _launch(d: int) -> dict[str, int]:
    block = triton.next_power_of_2(d)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 16), "enable_fp_fusion": True}


@triton.jit
def forward_kernel(x, weight, y, d, eps, BLOCK: tl.constexpr):
    channel = tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * d + channel
    row = tl.load(x + at, channel < d, 0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(row * row) / d + eps)
    tl.store(y + at, row * scale * tl.load(weight + channel, channel < d, 0.0).to(tl.float32), channel < d)


@triton.jit
def backward_kernel(grad_y, x, weight, dx, dweight, rows, d, eps, BLOCK: tl.constexpr):
    channel = tl.arange(0, BLOCK)
    w = tl.load(weight + channel, channel < d, 0.0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(tl.program_id(0), rows, tl.num_programs(0)):
        at = tl.cast(i, tl.int64) * d + channel
        row = tl.load(x + at, channel < d, 0.0).to(tl.float32)
        grad = tl.load(grad_y + at, channel < d, 0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(row * row) / d + eps)
        normed = row * scale
        total += grad * normed
        grad *= w
        tl.store(dx + at, scale * (grad - normed * (tl.sum(grad * normed) / d)), channel < d)
    tl.store(dweight + tl.program_id(0).to(tl.int64) * d + channel, total, channel < d)
