"""From the published layout to the kernels' own: channels before tokens, and every shape of B and C.

Sizes as in the published code: b images, d channels, l tokens, n states, g groups of B and C.
"""

import functools
import math
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
Maybe = Tensor | None
OpInputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Maybe, Maybe, Maybe]  # of the op, without an initial state


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function with its tensors' dtypes as they are, as the published kernels do inside autocast."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
            return function(*args, **kwargs)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return run


def widest(*tensors: Tensor | None) -> torch.dtype:
    """Return the dtype that holds the values of all tensors."""
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors if tensor is not None))


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of states, A and D beside tokens of a dtype: float32, or float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def by_token(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (b, d, l) as (b, 1, l, d), the kernels' layout, as a view if it has the dtype."""
    return x.to(dtype).transpose(1, 2).unsqueeze(1)


def by_channel(y: Tensor) -> Tensor:
    """Return (b, 1, l, d) as a contiguous (b, d, l): callers take views of it."""
    return y.squeeze(1).transpose(1, 2).contiguous()


def check_shape(x: Maybe, name: str, sizes: str, expected: tuple[int, ...]) -> None:
    """Raise ValueError where a tensor has another shape; `sizes` are the letters of the expected one."""
    if x is not None and tuple(x.shape) != expected:
        raise ValueError(f"{name} must be ({sizes}) = {expected}, got {tuple(x.shape)}")


def check_tokens(x: Tensor, name: str) -> None:
    """Raise ValueError where a tensor is not (b, d, l), is empty, or has integers, which would round the output."""
    if x.dim() != 3 or 0 in x.shape or not x.is_floating_point():
        raise ValueError(f"{name} must be (b, d, l), not empty, floating point, got {tuple(x.shape)}, {x.dtype}")


def grouped(B: Tensor, name: str, u: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """Return B or C, (d, n), (b, n, l) or (b, g, n, l), as (b, 1, l, g, n).

    Raises:
        ValueError: it has another shape, or is complex.
    """
    b, d, l = u.shape
    if B.is_complex():
        raise ValueError(f"{name} is complex, which the kernels do not take: expected floating point")
    if B.dim() == 2 and tuple(B.shape) == (d, n):  # one for each channel and all tokens: groups of one channel
        return B.to(dtype).view(1, 1, 1, *B.shape).expand(b, 1, l, *B.shape)
    if B.dim() == 3 and tuple(B.shape) == (b, n, l):
        return B.to(dtype).transpose(1, 2).unsqueeze(1).unsqueeze(3)
    if B.dim() == 4 and (B.shape[0], *B.shape[2:]) == (b, n, l) and d % B.shape[1] == 0:
        return B.to(dtype).permute(0, 3, 1, 2).unsqueeze(1)
    raise ValueError(
        f"{name} must be (d, n), (b, n, l) or (b, g, n, l) with b, d, l = {tuple(u.shape)}, n = {n} and g dividing d, "
        f"got {tuple(B.shape)}"
    )


def _same_groups(B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Repeat the groups of (b, 1, l, g, n) where B and C have different numbers of them."""
    groups = math.lcm(B.shape[3], C.shape[3])
    B, C = (t if t.shape[3] == groups else t.repeat_interleave(groups // t.shape[3], dim=3) for t in (B, C))
    return B, C


def op_inputs(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Maybe, z: Maybe, delta_bias: Maybe
) -> OpInputs:
    """Return the tensors of a published scan in the layout and with the dtypes of the kernels.

    Raises:
        ValueError: a shape is not one of the published ones, u holds integers, or A, B or C is complex.
    """
    if A.is_complex():
        raise ValueError("A is complex, which the kernels do not take: expected real decays (d, n)")
    check_tokens(u, "u")
    b, d, l = u.shape
    n = A.shape[-1]
    for each, name in ((delta, "delta"), (z, "z")):
        check_shape(each, name, "b, d, l", (b, d, l))
    for each, name in ((D, "D"), (delta_bias, "delta_bias")):
        check_shape(each, name, "d,", (d,))
    check_shape(A, "A", "d, n", (d, n))
    dtype = widest(u, delta, z, *(t for t in (B, C) if t.dim() > 2 and not t.is_complex()))
    wide = state_dtype(dtype)
    return (
        by_token(u, dtype),
        by_token(delta, dtype),
        A.to(wide).unsqueeze(0),
        *_same_groups(grouped(B, "B", u, n, dtype), grouped(C, "C", u, n, dtype)),
        None if D is None else D.to(wide).unsqueeze(0),
        None if z is None else by_token(z, dtype),
        None if delta_bias is None else delta_bias.to(wide).unsqueeze(0),
    )
