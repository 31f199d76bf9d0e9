"""Tensors of k directions, (b, k, l, ...): their memory, the order of their tokens, and their sum."""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

MOST_DIRECTIONS = 32  # `pack` makes them the bits of a number
MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)


def pack(reverse: Sequence[bool]) -> int:
    """Return the directions as a number for compiled kernels; bit k is set if direction k runs backwards."""
    return sum(1 << k for k, backwards in enumerate(reverse) if backwards)


def empty_rows(like: Tensor, b: int, k: int, *sizes: int) -> Tensor:
    """Return an uninitialised (b, k, ...) tensor stored direction-major, so that torch.bmm over directions copies none.

    It has the dtype and device of `like`.
    """
    return like.new_empty(k, b, *sizes).transpose(0, 1)


def as_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x in a dtype and stored as by :func:`empty_rows`; x itself if it is."""
    out = empty_rows(x.new_empty(0, dtype=dtype), *x.shape)
    return x if x.dtype == dtype and x.stride() == out.stride() else out.copy_(x)


def tokens_contiguous(x: Tensor) -> bool:
    """Return whether x, (b, k, l, d), has its tokens side by side in memory, and not its channels."""
    return x.dim() == 4 and x.stride(-1) != 1 and x.stride(-2) == 1


def empty_like_tokens(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return an uninitialised (b, k, l, ...) with its tokens side by side where `like` has, otherwise its channels."""
    if tokens_contiguous(like):
        b, k, l, d = shape
        return like.new_empty(b, k, d, l, dtype=dtype).transpose(2, 3)
    return like.new_empty(shape, dtype=dtype)


def empty_gradient(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an uninitialised gradient of x, (b, k, l, ...): as :func:`empty_rows`, or with contiguous tokens as x."""
    if tokens_contiguous(x):
        b, k, l, d = x.shape
        return x.new_empty(k, b, d, l, dtype=dtype).permute(1, 0, 3, 2)
    return empty_rows(x.new_empty(0, dtype=dtype), *x.shape)


def unit_stride(x: MaybeTensor) -> MaybeTensor:
    """Return x if its last dimension is contiguous, else a contiguous copy: kernels take all other strides."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def dense(x: MaybeTensor) -> MaybeTensor:
    """Return x if it is contiguous, else a contiguous copy."""
    return None if x is None else x.contiguous()


def turn(x: Tensor, reverse: Sequence[bool]) -> Tensor:
    """Flip the tokens of the reversed directions of x, (b, k, l, ...)."""
    if not any(reverse):
        return x
    return torch.stack([x[:, k].flip(1) if backwards else x[:, k] for k, backwards in enumerate(reverse)], 1)


def add_up(y: Tensor, combine: str) -> Tensor:
    """Return y, (b, k, l, d), or with `combine` "sum" or "mean" its directions' sum or mean, (b, 1, l, d)."""
    if combine == "none":
        return y
    return y.sum(1, keepdim=True) if combine == "sum" else y.mean(1, keepdim=True)


def before_the_gate(
    grad_y: Tensor, z: Tensor | None, ungated: Tensor | None, combine: str, shape: Sequence[int]
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of each direction's y before it was added up and gated, and of the gate z.

    Args:
        grad_y: the gradient of y, in the dtype of the result.
        ungated: y before the gate; None if z is.
        shape: that of the first gradient, (b, k, l, ...).
    """
    dy, dz = grad_y, None
    if z is not None and ungated is not None:
        gate = z.to(dy.dtype)
        sigmoid = torch.sigmoid(gate)
        dz = dy * ungated * sigmoid * (1 + gate * (1 - sigmoid))
        dy = dy * gate * sigmoid
    if combine != "none":
        dy = (dy if combine == "sum" else dy / shape[1]).expand(shape)
    return dy, dz
