"""The ops as graphs of PyTorch's own: for formats that know no `vim::` ops, such as ONNX.

The scan is one loop that takes a token of every direction in each step, so that the graph does not grow with the
tokens: PyTorch's `scan`, and ONNX's.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.scan import scan_op

from . import reference
from .chunked import add_up, prepare, turn


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    delta_softplus: bool,
    reverse: Sequence[bool],
    combine: str,
) -> tuple[Tensor, Tensor]:
    """See :func:`vim.kernels.reference.selective_scan`."""
    scan = prepare(u, delta, A, B, C, D, delta_bias, initial_state, False, reverse)
    dt = _softplus(scan.dt) if delta_softplus else scan.dt
    by_token = [dt.unsqueeze(-2), (dt * scan.u).unsqueeze(-2), scan.B.unsqueeze(-1), scan.C.unsqueeze(-2)]
    by_token = [t.movedim(2, 0) for t in by_token]  # (l, b, k, g, ., .)
    start = scan.initial_state.contiguous()  # as each step leaves it
    # scan_op and not scan, which would compile the step with Dynamo
    state, y = scan_op(_step, [start], by_token, (scan.A.squeeze(1),))
    y = y.squeeze(-2).movedim(0, 2)  # (b, k, l, g, e)
    if scan.D is not None:
        y = y + scan.D * scan.u
    y = add_up(turn(y.flatten(-2), reverse), combine)
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    return y.to(u.dtype), state.transpose(3, 4).flatten(2, 3)


def _step(state: Tensor, dt: Tensor, drive: Tensor, B: Tensor, C: Tensor, A: Tensor) -> list[Tensor]:
    """The next state, (b, k, g, n, e), and what is read of it, (b, k, g, 1, e)."""
    state = torch.exp(dt * A) * state + B * drive
    return [state, torch.matmul(C, state)]


def _softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), without overflow. The Softplus of ONNX Runtime takes several times as long."""
    return x.clamp_min(0) + torch.log1p(torch.exp(-x.abs()))


def _selective_scan_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *inputs, return_last_state, backend, save = args
    y, state = selective_scan(*inputs)
    return y, state if return_last_state else state.new_empty(0), y.new_empty(0), y.new_empty(0)


def _causal_conv1d(*args: Any) -> Tensor:
    *inputs, backend = args
    return reference.causal_conv1d(*inputs)


def _rms_norm(*args: Any) -> Tensor:
    *inputs, backend = args
    return reference.rms_norm(*inputs)


# for torch.export.ExportedProgram.run_decompositions; there selective_scan has already called selective_scan_forward
DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.vim.selective_scan_forward.default: _selective_scan_forward,
    torch.ops.vim.causal_conv1d.default: _causal_conv1d,
    torch.ops.vim.rms_norm.default: _rms_norm,
}
