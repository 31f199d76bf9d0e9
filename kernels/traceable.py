"""The ops as graphs of PyTorch's own operators, for formats without `vim::` ops, such as ONNX.

The selective scan is one loop that takes a token of every direction in each step, ONNX's `Scan`, so that the graph does
not grow with the number of tokens, and the state stays in the processor's cache: several tokens a step, and chunks side
by side with cumulative sums between them, take longer in ONNX Runtime. State space duality is its products of matrices,
a few for all chunks and two small steps for each.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .scan.reference import Inputs, Options
from .ssd import chunked as duality
from .ssd import reference as ssd


def run_loop(state: Tensor, A: Tensor, dt: Tensor, driven: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Return the state after all tokens, and the tokens' y.

    Args:
        state: (b, k, g, n, e).
        A: (k, g, n, e).
        dt: (l, b, k, g, 1, e), the steps; `driven`, dt u, and y alike.
        B: (l, b, k, g, n, 1).
        C: (l, b, k, g, 1, n).
    """
    ys = []
    for dt_t, driven_t, B_t, C_t in zip(dt, driven, B, C, strict=True):
        state = torch.exp(dt_t * A) * state + B_t * driven_t
        ys.append(torch.matmul(C_t, state))
    return state, torch.stack(ys)


def _onnx_loop(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    """A call of :func:`onnx_loop` in place of :func:`run_loop`."""
    state, _, dt, *_ = tensors
    state, y = torch.onnx.ops.symbolic_multi_out(
        "vim::ScanLoop", tensors, dtypes=[state.dtype, dt.dtype], shapes=[state.shape, dt.shape], version=1
    )
    return state, y


def onnx_loop(opset: int) -> str:
    """Return :func:`run_loop` as a function in ONNX's textual syntax, with the operators of an opset.

    A is a state, since OpenVINO's loops capture nothing.
    """
    return f"""<domain: "vim", opset_import: ["" : {opset}]>
        ScanLoop (start, rates, steps, inputs, keys, queries) => (last, outputs) {{
            last, unused, outputs = Scan <num_scan_inputs = 4, body = step (
                float[] state, float[] A, float[] dt, float[] driven, float[] B, float[] C
            ) => (float[] next, float[] same, float[] y) {{
                exponent = Mul (dt, A)
                decay = Exp (exponent)
                kept = Mul (decay, state)
                entering = Mul (B, driven)
                next = Add (kept, entering)
                same = Identity (A)
                y = MatMul (C, next)
            }}> (start, rates, steps, inputs, keys, queries)
        }}"""


def selective_scan(
    inputs: Inputs, options: Options, loop: Callable[..., tuple[Tensor, Tensor]] = run_loop
) -> tuple[Tensor, Tensor]:
    """See :func:`vim.kernels.scan.reference.selective_scan`."""
    dtype = torch.promote_types(inputs.u.dtype, torch.float32)
    (b, k, l, d), g, n = inputs.u.shape, inputs.B.shape[3], inputs.A.shape[-1]
    order = _order(l, options.reverse)

    dt = inputs.delta.to(dtype)
    dt = dt if inputs.delta_bias is None else dt + inputs.delta_bias.unsqueeze(1)
    if options.delta_softplus:
        dt = _softplus(dt) if dtype == torch.float32 else F.softplus(dt)
    dt, u, B, C = (_by_token(t.to(dtype), order, g) for t in (dt, inputs.u, inputs.B, inputs.C))
    A = inputs.A.to(dtype).reshape(k, g, d // g, n).transpose(2, 3).contiguous()  # channels last, as in the state
    state = u.new_zeros(b, k, g, n, d // g)
    if inputs.initial_state is not None:
        state = state + inputs.initial_state.reshape(b, k, g, d // g, n).transpose(3, 4)
    tokens = [dt.unsqueeze(-2), (dt * u).unsqueeze(-2), B.unsqueeze(-1), C.unsqueeze(-2)]
    state, y = loop(state, A, *tokens)
    y = y.squeeze(-2)  # (l, b, k, g, e)
    if inputs.D is not None:
        y = y + inputs.D.to(dtype).view(k, g, d // g) * u
    y = _combine(y.transpose(0, 1).reshape(b, -1, d), order.view(l, k), options)
    if inputs.z is not None:
        y = y * F.silu(inputs.z.to(dtype))
    return y.to(inputs.u.dtype), state.transpose(3, 4).flatten(2, 3)


def _order(l: int, reverse: Sequence[bool]) -> Tensor:
    """Return where in (k, l) the scan's tokens are, l k of them: a token of each direction after the other."""
    forwards = torch.arange(l)
    rows = [k * l + (l - 1 - forwards if backwards else forwards) for k, backwards in enumerate(reverse)]
    return torch.stack(rows, 1).flatten()


def _by_token(x: Tensor, order: Tensor, g: int) -> Tensor:
    """(b, k, l, d) or (b, k, l, g, n), each direction in its order, to (l, b, k, g, d / g or n)."""
    b, k, l = x.shape[:3]
    x = x.reshape(b, -1, g, x[0, 0, 0].numel() // g).index_select(1, order)
    return x.reshape(b, l, k, *x.shape[2:]).transpose(0, 1)


def _combine(y: Tensor, order: Tensor, options: Options) -> Tensor:
    """Return y in the order of the tokens, (b, k, l, d), or added up, (b, 1, l, d).

    Args:
        y: (b, l k, d), each direction in its own order.
        order: (l, k).
    """
    l, k = order.shape
    # a direction's order is its own inverse
    directions = [y.index_select(1, (order[:, i] - i * l) * k + i) for i in range(k)]
    if options.combine == "none":
        return torch.stack(directions, 1)
    total = sum(directions[1:], directions[0]).unsqueeze(1)
    return total if options.combine == "sum" else total / k


def _softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)) in float32, to the last bits where it is tiny. ONNX Runtime's own takes several times as long.

    log(1 + e) = 2 artanh(e / (e + 2)), whose argument is at most 1/3: an odd polynomial of degree 9.
    """
    e = torch.exp(-x.abs())
    s = e / (e + 2)
    t = s * s
    return torch.relu(x) + s * (2 + t * (0.66666315 + t * (0.4002491 + t * (0.27960603 + t * 0.28178333))))


def _selective_scan(*tensors: Tensor | None, **keywords: object) -> tuple[Tensor, Tensor]:
    options = Options(**keywords)  # type: ignore[arg-type]
    y, state = selective_scan(Inputs(*tensors), options, _onnx_loop)  # type: ignore[arg-type]
    return y, state if options.return_last_state else state.new_empty(0)


def _ssd(*tensors: Tensor | None, **keywords: object) -> tuple[Tensor, Tensor]:
    options = ssd.Options(**keywords)  # type: ignore[arg-type]
    y, state = duality.ssd(ssd.Inputs(*tensors), options)  # type: ignore[arg-type]
    return y, state if options.return_last_state else state.new_empty(0)


def _forward(scan: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The op NAME_forward of a scan's op NAME. It keeps nothing for a backward pass."""

    def forward(
        *tensors: Tensor | None, save: bool = False, **keywords: object
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y, state = scan(*tensors, **keywords)
        return y, state, y.new_empty(0), y.new_empty(0)

    return forward


def _causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    reverse: Sequence[bool],
    silu: bool = True,
    backend: str = "auto",
) -> Tensor:
    """A reversed direction has mirrored taps and the zeros behind the tokens: nothing is flipped."""
    d, width = weight.shape[1:]
    ys = []
    for k, backwards in enumerate(reverse):
        taps = weight[k].to(x.dtype).unsqueeze(1)
        row = F.pad(x[:, k].transpose(1, 2), (0, width - 1) if backwards else (width - 1, 0))
        ys.append(F.conv1d(row, taps.flip(-1) if backwards else taps, None if bias is None else bias[k], groups=d))
    y = torch.stack(ys, 1).transpose(2, 3)  # (b, k, l, d)
    return F.silu(y) if silu else y


def _rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-5, backend: str = "auto") -> Tensor:
    """In the order of operations that ONNX Runtime joins into one."""
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _rfft(x: Tensor, n: int, dim: int = -1, norm: str | None = None) -> Tensor:
    """A Fourier transform of real numbers, followed by zeros up to n, as a product with a matrix."""
    x = x.movedim(dim, -1)
    cos, sin = (waves[: x.shape[-1]] for waves in _waves(n, x))
    return torch.complex(x @ cos, -(x @ sin)).movedim(-1, dim)


def _irfft(x: Tensor, n: int, dim: int = -1, norm: str | None = None) -> Tensor:
    parts = torch.view_as_real(x.movedim(dim, -1))
    f = torch.arange(n // 2 + 1)
    once = (f == 0) | (2 * f == n)  # each of the other waves has a conjugate
    weight = (2 - once.double()) / n
    cos, sin = (weight.to(waves).unsqueeze(1) * waves.T for waves in _waves(n, parts))
    return (parts[..., 0] @ cos - parts[..., 1] @ sin).movedim(-1, dim)


def _waves(n: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of n points, (n, n // 2 + 1)."""
    turns = torch.outer(torch.arange(n), torch.arange(n // 2 + 1)) % n
    angle = turns.double() * (2 * math.pi / n)
    return torch.cos(angle).to(like), torch.sin(angle).to(like)


# A scan has already called its NAME_forward when a program is decomposed, except in a graph that the program calls.
DECOMPOSITIONS: dict[torch._ops.OpOverload, Callable[..., object]] = {
    torch.ops.vim.selective_scan.default: _selective_scan,
    torch.ops.vim.selective_scan_forward.default: _forward(_selective_scan),
    torch.ops.vim.ssd.default: _ssd,
    torch.ops.vim.ssd_forward.default: _forward(_ssd),
    torch.ops.vim.causal_conv1d.default: _causal_conv1d,
    torch.ops.vim.rms_norm.default: _rms_norm,
    torch.ops.aten.fft_rfft.default: _rfft,
    torch.ops.aten.fft_irfft.default: _irfft,
}
