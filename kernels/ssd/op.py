"""State space duality, the scan of Mamba-2: shapes, checks, and the op every model calls.

Upper case: the paper's tensors. Sizes: b images, k directions, l tokens, h heads, p channels of a head, g groups of B
and C, n states. `torch.ops.vim.ssd` takes every tensor with its k directions, and D for each channel; :func:`ssd` also
takes them without.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..backends import DTYPES
from ..checks import check, check_dim
from ..directions import MOST_DIRECTIONS
from ..registration import Scan
from .reference import Inputs, Options, shape_of_y

Combine = Literal["none", "sum", "mean"]


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    reverse: bool | Sequence[bool] = False,
    combine: Combine = "none",
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Run ``h[t] = exp(s[t] A) h[t-1] + s[t] x[t] B[t]^T``, ``y[t] = h[t] C[t] + D x[t]``, then ``y * silu(z)``.

    ``s = dt + dt_bias``, with `dt_softplus` its softplus, and at last within `dt_limit`. The state of a head is a
    matrix, (p, n), and decays by one number. It is float32, or float64 if x is. Source:
    https://arxiv.org/abs/2405.21060.

    Args:
        x: (b, l, h, p), the values to scan.
        dt: (b, l, h), the step sizes.
        A: (h,), float32; negative, so that the state decays.
        B: (b, l, n), or (b, l, g, n) for g groups of h / g heads: how a token enters the state.
        C: like B: how the state is read.
        D: (h,) or (h, p), float32, the skip connection.
        z: (b, l, h, p), the gate before its SiLU.
        dt_bias: (h,), float32, added to `dt`.
        dt_softplus: apply a softplus to the step sizes.
        dt_limit: the least and the greatest step size. A step outside has no gradient.
        reverse: run from the last token to the first; nothing is flipped in memory.
        combine: "sum" or "mean" adds the directions up before the gate; y and z are then (b, l, h, p).
        initial_state: (b, h, p, n), float32, the state before the first token; by default zeros.
        return_last_state: also return the state after the last token.
        chunk_size: how many tokens are one product of matrices, by default the fastest. The result does not depend on
            it, but for rounding.
        backend: "auto", "reference", "chunked", "cpu" or "triton". A backend named here runs or raises.

    x, dt, B, C and z have one dtype. What is float32 above is float64 if x is.

    For k directions in one call, the tensors with a b have a k after it (x is (b, k, l, h, p)), the others start with a
    k (A is (k, h)), and `reverse` holds k booleans. A tensor that all directions share may be expanded: it is not
    copied.

    Returns:
        y, (b, l, h, p) or (b, k, l, h, p), in x's dtype; with `return_last_state` also the last state, (b, h, p, n) or
        (b, k, h, p, n).

    Raises:
        ValueError: a shape, dtype, device or option is not as above, or the backend does not take it.
        RuntimeError: the backend named is not built or not installed.
    """
    if x.dim() not in (4, 5):
        raise ValueError(f"x must be (b, l, h, p) or (b, k, l, h, p), got {tuple(x.shape)}")
    several = x.dim() == 5
    if isinstance(reverse, bool):
        if several:
            raise ValueError(f"reverse must hold a bool for each of the {x.shape[1]} directions, got {reverse}")
        reverse = (reverse,)
    if not several:
        x, dt, B, C = (t.unsqueeze(1) for t in (x, dt, B, C))
        A = A.unsqueeze(0)
        D, dt_bias = (t if t is None else t.unsqueeze(0) for t in (D, dt_bias))
        initial_state = initial_state if initial_state is None else initial_state.unsqueeze(1)
    if B.dim() == 4:
        B = B.unsqueeze(3)
    if C.dim() == 4:
        C = C.unsqueeze(3)
    if D is not None and D.dim() == 2:
        D = D.unsqueeze(2).expand(*D.shape, x.shape[4])
    one_y = not several or combine != "none"
    if z is not None and one_y:
        z = z.unsqueeze(1)
    y, state = torch.ops.vim.ssd(
        x,
        dt,
        A,
        B,
        C,
        D=D,
        z=z,
        dt_bias=dt_bias,
        initial_state=initial_state,
        reverse=list(reverse),
        dt_softplus=dt_softplus,
        dt_min=dt_limit[0],
        dt_max=dt_limit[1],
        combine=combine,
        return_last_state=return_last_state,
        chunk_size=0 if chunk_size is None else chunk_size,
        backend=backend,
    )
    y = y.squeeze(1) if one_y else y
    if not return_last_state:
        return y
    return y, (state if several else state.squeeze(1))


def _check(inputs: Inputs, options: Options) -> None:
    x, B = inputs.x, inputs.B
    for name, tensor, letters in (("x", x, "b, k, l, h, p"), ("B", B, "b, k, l, g, n")):
        check_dim(name, tensor, letters)
    if options.combine not in ("none", "sum", "mean"):
        raise ValueError(f"combine must be 'none', 'sum' or 'mean', got {options.combine!r}")
    if not options.dt_min <= options.dt_max:
        raise ValueError(f"dt_limit must be (least, greatest), got ({options.dt_min}, {options.dt_max})")
    if options.chunk_size < 0:
        raise ValueError(f"chunk_size must be a positive number of tokens, got {options.chunk_size}")
    (b, k, l, h, p), (g, n) = x.shape, B.shape[3:]
    if k > MOST_DIRECTIONS:
        raise ValueError(f"x must have at most {MOST_DIRECTIONS} directions, got {k}")
    if len(options.reverse) != k:
        raise ValueError(f"reverse must hold a bool for each of the {k} directions, got {list(options.reverse)}")
    if h % g:
        raise ValueError(f"B must have a number of groups that divides h = {h}, got {g}")
    device, dtype = x.device, (x.dtype,)
    state = (torch.float64,) if x.dtype == torch.float64 else (torch.float32,)
    check("x", x, "b, k, l, h, p", (b, k, l, h, p), DTYPES, device)
    check("dt", inputs.dt, "b, k, l, h", (b, k, l, h), dtype, device)
    check("A", inputs.A, "k, h", (k, h), state, device)
    check("B", B, "b, k, l, g, n", (b, k, l, g, n), dtype, device)
    check("C", inputs.C, "b, k, l, g, n", (b, k, l, g, n), dtype, device)
    check("D", inputs.D, "k, h, p", (k, h, p), state, device)
    letters = "b, k, l, h, p" if options.combine == "none" else "b, 1, l, h, p"
    check("z", inputs.z, letters, shape_of_y(inputs, options), dtype, device)
    check("dt_bias", inputs.dt_bias, "k, h", (k, h), state, device)
    check("initial_state", inputs.initial_state, "b, k, h, p, n", (b, k, h, p, n), state, device)


# dt_max's default is float32's greatest number: a schema knows no infinity
_SCHEMA = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D=None, Tensor? z=None, Tensor? dt_bias=None, "
    "Tensor? initial_state=None, *, int[] reverse, bool dt_softplus=False, float dt_min=0.0, "
    "float dt_max=3.4028234663852886e+38, str combine='none', bool return_last_state=False, int chunk_size=0, "
    "str backend='auto'"
)
Scan("ssd", "ssd", _SCHEMA, Inputs, Options, _check, low=("x", "dt", "B", "C", "z"))
