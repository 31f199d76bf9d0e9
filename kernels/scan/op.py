"""The selective scan of Mamba: shapes, checks, autograd, and the op every model calls.

Upper case: the paper's tensors. Sizes: b images, k directions, l tokens, d channels, g groups of B and C, n states.

`torch.ops.vim.selective_scan` is one opaque op to autograd, autocast, torch.compile, torch.export and TorchScript. It
takes every tensor with its k directions, and B and C with their g groups; :func:`selective_scan` also takes them
without.
"""

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


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    delta_softplus: bool = False,
    reverse: bool | Sequence[bool] = False,
    combine: Combine = "none",
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Run ``h[t] = exp(dt[t] A) h[t-1] + dt[t] B[t] u[t]``, ``y[t] = C[t] h[t] + D u[t]``, then ``y * silu(z)``.

    ``dt = delta + delta_bias``, with `delta_softplus` its softplus. The state is float32, or float64 if u is. Source:
    https://arxiv.org/abs/2312.00752.

    Args:
        u: (b, l, d), the values to scan.
        delta: (b, l, d), the step sizes.
        A: (d, n), float32; negative, so that the state decays.
        B: (b, l, n), or (b, l, g, n) for g groups of d / g channels: how a token enters the state.
        C: like B: how the state is read.
        D: (d,), float32, the skip connection.
        z: (b, l, d), the gate before its SiLU.
        delta_bias: (d,), float32, added to `delta`.
        delta_softplus: apply a softplus to the step sizes.
        reverse: run from the last token to the first; nothing is flipped in memory.
        combine: "sum" or "mean" adds the directions up before the gate; y and z are then (b, l, d).
        initial_state: (b, d, n), float32, the state before the first token; by default zeros.
        return_last_state: also return the state after the last token.
        backend: "auto", "reference", "chunked", "cpu" or "triton". A backend named here runs or raises.

    u, delta, B, C and z have one dtype. What is float32 above is float64 if u is.

    For k directions in one call, the tensors with a b have a k after it (u is (b, k, l, d)), the others start with a k
    (A is (k, d, n)), and `reverse` holds k booleans. A tensor that all directions share may be expanded: it is not
    copied.

    Returns:
        y, (b, l, d) or (b, k, l, d), in u's dtype; with `return_last_state` also the last state, (b, d, n) or
        (b, k, d, n).

    Raises:
        ValueError: a shape, dtype or device is not as above, or the backend does not take it.
        RuntimeError: the backend named is not built or not installed.
    """
    if u.dim() not in (3, 4):
        raise ValueError(f"u must be (b, l, d) or (b, k, l, d), got {tuple(u.shape)}")
    several = u.dim() == 4
    if isinstance(reverse, bool):
        if several:
            raise ValueError(f"reverse must hold a bool for each of the {u.shape[1]} directions, got {reverse}")
        reverse = (reverse,)
    if not several:
        u, delta, B, C = (t.unsqueeze(1) for t in (u, delta, B, C))
        A = A.unsqueeze(0)
        D, delta_bias = (t if t is None else t.unsqueeze(0) for t in (D, delta_bias))
        initial_state = initial_state if initial_state is None else initial_state.unsqueeze(1)
    if B.dim() == 4:
        B = B.unsqueeze(3)
    if C.dim() == 4:
        C = C.unsqueeze(3)
    one_y = not several or combine != "none"
    if z is not None and one_y:
        z = z.unsqueeze(1)
    y, state = torch.ops.vim.selective_scan(
        u,
        delta,
        A,
        B,
        C,
        D=D,
        z=z,
        delta_bias=delta_bias,
        initial_state=initial_state,
        reverse=list(reverse),
        delta_softplus=delta_softplus,
        combine=combine,
        return_last_state=return_last_state,
        backend=backend,
    )
    y = y.squeeze(1) if one_y else y
    if not return_last_state:
        return y
    return y, (state if several else state.squeeze(1))


def _check(inputs: Inputs, options: Options) -> None:
    u, A, B = inputs.u, inputs.A, inputs.B
    for name, tensor, letters in (("u", u, "b, k, l, d"), ("A", A, "k, d, n"), ("B", B, "b, k, l, g, n")):
        check_dim(name, tensor, letters)
    if options.combine not in ("none", "sum", "mean"):
        raise ValueError(f"combine must be 'none', 'sum' or 'mean', got {options.combine!r}")
    b, k, l, d = u.shape
    n, g = A.shape[2], B.shape[3]
    if k > MOST_DIRECTIONS:
        raise ValueError(f"u must have at most {MOST_DIRECTIONS} directions, got {k}")
    if len(options.reverse) != k:
        raise ValueError(f"reverse must hold a bool for each of the {k} directions, got {list(options.reverse)}")
    if d % g:
        raise ValueError(f"B must have a number of groups that divides d = {d}, got {g}")
    device, dtype = u.device, (u.dtype,)
    state = (torch.float64,) if u.dtype == torch.float64 else (torch.float32,)
    check("u", u, "b, k, l, d", (b, k, l, d), DTYPES, device)
    check("delta", inputs.delta, "b, k, l, d", (b, k, l, d), dtype, device)
    check("A", A, "k, d, n", (k, d, n), state, device)
    check("B", B, "b, k, l, g, n", (b, k, l, g, n), dtype, device)
    check("C", inputs.C, "b, k, l, g, n", (b, k, l, g, n), dtype, device)
    check("D", inputs.D, "k, d", (k, d), state, device)
    letters = "b, k, l, d" if options.combine == "none" else "b, 1, l, d"
    check("z", inputs.z, letters, shape_of_y(inputs, options), dtype, device)
    check("delta_bias", inputs.delta_bias, "k, d", (k, d), state, device)
    check("initial_state", inputs.initial_state, "b, k, d, n", (b, k, d, n), state, device)


SCHEMA = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D=None, Tensor? z=None, Tensor? delta_bias=None, "
    "Tensor? initial_state=None, *, int[] reverse, bool delta_softplus=False, str combine='none', "
    "bool return_last_state=False, str backend='auto'"
)
SCAN = Scan("selective_scan", "scan", SCHEMA, Inputs, Options, _check, low=("u", "delta", "B", "C", "z"))
