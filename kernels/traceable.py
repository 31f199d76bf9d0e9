"""The ops as graphs of PyTorch's own operators, for formats without `vim::` ops, such as ONNX.

The selective scan is one loop that takes a token of every direction in each step, PyTorch's and ONNX's `scan`, so that
the graph does not grow with the number of tokens. State space duality is its products of matrices, a few for all chunks
and two small steps for each.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.scan import scan_op

from .conv1d import reference as conv1d
from .directions import add_up, turn
from .norm import reference as norm
from .scan.chunked import prepare
from .scan.reference import Inputs, Options
from .ssd import chunked as duality
from .ssd import reference as ssd


def selective_scan(inputs: Inputs, options: Options) -> tuple[Tensor, Tensor]:
    """See :func:`vim.kernels.scan.reference.selective_scan`."""
    scan = prepare(inputs, options._replace(delta_softplus=False))
    dt = _softplus(scan.dt) if options.delta_softplus else scan.dt
    by_token = [dt.unsqueeze(-2), (dt * scan.u).unsqueeze(-2), scan.B.unsqueeze(-1), scan.C.unsqueeze(-2)]
    by_token = [t.movedim(2, 0) for t in by_token]  # (l, b, k, g, ., .)
    start = scan.initial_state.contiguous()  # as each step leaves it
    # scan_op and not scan, which would compile the step with Dynamo
    state, y = scan_op(_step, [start], by_token, (scan.A.squeeze(1),))
    y = y.squeeze(-2).movedim(0, 2)  # (b, k, l, g, e)
    if scan.D is not None:
        y = y + scan.D * scan.u
    y = add_up(turn(y.flatten(-2), options.reverse), options.combine)
    if inputs.z is not None:
        y = y * F.silu(inputs.z.to(y.dtype))
    return y.to(inputs.u.dtype), state.transpose(3, 4).flatten(2, 3)


def _step(state: Tensor, dt: Tensor, drive: Tensor, B: Tensor, C: Tensor, A: Tensor) -> list[Tensor]:
    """Return the next state, (b, k, g, n, e), and its sum times C, (b, k, g, 1, e)."""
    state = torch.exp(dt * A) * state + B * drive
    return [state, torch.matmul(C, state)]


def _softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), without overflow. ONNX Runtime's own Softplus takes several times as long."""
    return x.clamp_min(0) + torch.log1p(torch.exp(-x.abs()))


def _selective_scan_forward(
    *tensors: Tensor | None, save: bool = False, **keywords: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = Options(**keywords)  # type: ignore[arg-type]
    y, state = selective_scan(Inputs(*tensors), options)  # type: ignore[arg-type]
    return y, state if options.return_last_state else state.new_empty(0), y.new_empty(0), y.new_empty(0)


def _ssd_forward(
    *tensors: Tensor | None, save: bool = False, **keywords: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = ssd.Options(**keywords)  # type: ignore[arg-type]
    y, state = duality.ssd(ssd.Inputs(*tensors), options)  # type: ignore[arg-type]
    return y, state if options.return_last_state else state.new_empty(0), y.new_empty(0), y.new_empty(0)


def _causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    reverse: Sequence[bool],
    silu: bool = True,
    backend: str = "auto",
) -> Tensor:
    return conv1d.causal_conv1d(x, weight, bias, silu, reverse)


def _rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-5, backend: str = "auto") -> Tensor:
    return norm.rms_norm(x, weight, eps)


# For torch.export.ExportedProgram.run_decompositions, where a scan has already called its NAME_forward.
DECOMPOSITIONS: dict[torch._ops.OpOverload, Callable[..., object]] = {
    torch.ops.vim.selective_scan_forward.default: _selective_scan_forward,
    torch.ops.vim.ssd_forward.default: _ssd_forward,
    torch.ops.vim.causal_conv1d.default: _causal_conv1d,
    torch.ops.vim.rms_norm.default: _rms_norm,
}
