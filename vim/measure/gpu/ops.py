"""Ops: every op at the shapes of whole models, against PyTorch, other packages and the card's measured ceilings."""

import importlib.util
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vim.kernels import causal_conv1d, rms_norm, selective_scan, ssd
from vim.kernels.scan import chunked
from vim.kernels.scan.reference import Inputs, Options
from vim.measure.gpu import card
from vim.measure.gpu.inputs import Draw, Named, alternating, draw_conv, draw_norm, draw_scan, draw_ssd
from vim.measure.gpu.shapes import Conv, Norm, Scan, Ssd
from vim.measure.gpu.stage import Failure, Stage
from vim.measure.timing import Run

Op = Callable[..., Tensor]
HEAD = 64  # channels of a head of attention
PACKAGES = ("mamba_ssm", "mambapy")


class Compared(NamedTuple):
    """One implementation of an op, in layers of at most `tokens`."""

    op: str
    by: str
    tokens: int = 2**20
    runs: tuple[str, ...] = ("forward", "forward+backward")


COMPARED = (
    *(Compared("scan", "triton"), Compared("conv", "triton"), Compared("norm", "triton")),
    *(Compared("attention", "pytorch"), Compared("scan", "mamba_ssm"), Compared("norm", "chunked")),
    *(Compared("conv", "reference"), Compared("scan", "chunked")),
    # they keep a state for every token, or take minutes to compile
    *(Compared("scan", "mambapy", 197), Compared("scan", "reference", 197)),
    Compared("scan", "compiled", 197, ("forward",)),
)
# in the layers of state space duality, whose scan has as many channels and states
SSD_COMPARED = (Compared("ssd", "triton"), Compared("scan", "triton"), Compared("ssd", "chunked"))


@dataclass(frozen=True)
class Ceilings:
    """What the card was measured to reach a second."""

    card: str
    copied_bytes: float
    exponentials: float
    products: float  # additions and multiplications, in a product of bfloat16 matrices


@dataclass(frozen=True)
class OpTime:
    """One op at the shape of a layer.

    Attributes:
        by: the backend; "compiled" is the chunked backend's code in torch.compile, "pytorch" attention on as many
            tokens and d / 2 channels, "mamba_ssm" the published CUDA kernel on channel-first tensors, and "mambapy" its
            parallel scan, of one direction without the rest.
        bandwidth: the least bytes over the time, as a part of the copy's.
        exponentials: the least exponentials over the time, as a part of the measured rate; of the scans only.
        products: the additions and multiplications over the time, as a part of the measured rate; of ssd only.
        peak_mb: allocated during a call, on top of the inputs.
    """

    op: str
    layer: str
    by: str
    run: str
    milliseconds: float
    bandwidth: float
    exponentials: float
    products: float
    peak_mb: float


def run(stage: Stage) -> None:
    """Measure the ceilings, then our kernels in all layers, then what they are compared with."""
    shapes = stage.shapes
    ceilings = Ceilings(
        card.name(),
        card.bytes_per_second(stage.clock, shapes.copied),
        card.exponentials_per_second(stage.clock, shapes.programs, shapes.rounds),
        card.products_per_second(stage.clock, shapes.multiplied),
    )
    stage.write(ceilings)
    cases: dict[str, Callable[[], OpTime]] = {}
    measured: list[tuple[Compared, Mapping[str, Scan | Ssd]]] = [(compared, shapes.layers) for compared in COMPARED]
    measured += [(compared, shapes.ssd_layers) for compared in SSD_COMPARED]
    for (op, by, tokens, runs), layers in measured:
        if by in PACKAGES and importlib.util.find_spec(by) is None:
            stage.write(Failure(f"{op}, {by}", "left out: it is not installed"))
        elif by == "triton" or not stage.warm:  # nothing else is compiled by Triton
            for (layer, shape), run in itertools.product(layers.items(), runs):
                if shape.l <= tokens:
                    case = partial(measure, stage.clock, ceilings, op, layer, shape, by, run)
                    cases[f"{op}, {layer}, {by}, {run}"] = case
    stage.each(cases)


def measure(clock: card.Clock, ceilings: Ceilings, op: str, layer: str, shape: Scan | Ssd, by: str, run: str) -> OpTime:
    """Time one op."""
    if op == "scan" and isinstance(shape, Ssd):
        shape = Scan(shape.b, shape.k, shape.l, shape.h * shape.p, n=shape.n, given="D delta_bias")
    call, inputs = OPS[op](shape, by)
    step = forward(call, inputs) if run == "forward" else forward_and_backward(call, inputs)
    milliseconds = clock(step)
    elements, exponentials, products = least(op, shape, run)
    return OpTime(
        op,
        layer,
        by,
        run,
        milliseconds,
        bandwidth=2 * elements / (1e-3 * milliseconds * ceilings.copied_bytes),
        exponentials=exponentials / (1e-3 * milliseconds * ceilings.exponentials),
        products=products / (1e-3 * milliseconds * ceilings.products),
        peak_mb=card.peak_mb(step),
    )


def scan(shape: Scan, by: str) -> tuple[Op, Named]:
    """The scan of a layer, and its inputs."""
    reverse = alternating(shape.k)
    inputs = draw_scan(shape, 0, card.DEVICE)
    if by == "mambapy":
        return _parallel_scan, inputs
    if by == "mamba_ssm":
        return partial(_published_scan, shape.k), {name: _channels_first(name, x) for name, x in inputs.items()}
    if by == "compiled":
        options = Options(reverse, delta_softplus=True, combine=shape.combine)
        compiled = card.compiled(chunked.selective_scan)
        inputs["z"] = inputs["z"].unsqueeze(1)
        return lambda **inputs: compiled(Inputs(**inputs), options)[0], inputs
    ours = partial(selective_scan, delta_softplus=True, reverse=reverse, combine=shape.combine, backend=by)
    return cast(Op, ours), inputs  # y alone: no last state is asked for


def duality(shape: Ssd, by: str) -> tuple[Op, Named]:
    """State space duality of a layer, and its inputs."""
    ours = partial(ssd, dt_softplus=True, reverse=alternating(shape.k), combine=shape.combine, backend=by)
    return cast(Op, ours), draw_ssd(shape, 0, card.DEVICE)


def conv(shape: Scan, by: str) -> tuple[Op, Named]:
    """The convolution of a layer, and its inputs."""
    inputs = draw_conv(Conv(shape.b, shape.k, shape.l, shape.d), 0, card.DEVICE)
    return partial(causal_conv1d, reverse=alternating(shape.k), backend=by), inputs


def norm(shape: Scan, by: str) -> tuple[Op, Named]:
    """The normalisation of a layer's d / 2 input channels, and its inputs."""
    return partial(rms_norm, backend=by), draw_norm(Norm(shape.b, shape.l, shape.d // 2), 0, card.DEVICE)


def attention(shape: Scan, by: str) -> tuple[Op, Named]:
    """PyTorch's flash attention over a layer's tokens and d / 2 input channels, and its inputs."""
    draw, heads = Draw(0, card.DEVICE, shape.dtype), max(shape.d // 2 // HEAD, 1)
    inputs = {name: draw(shape.b, heads, shape.l, HEAD) for name in ("query", "key", "value")}
    return _flash_attention, inputs


OPS: dict[str, Callable[..., tuple[Op, Named]]] = {
    "scan": scan,
    "ssd": duality,
    "conv": conv,
    "norm": norm,
    "attention": attention,
}


def _flash_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    backend = SDPBackend.FLASH_ATTENTION if card.DEVICE == "cuda" else SDPBackend.MATH
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(query, key, value)


def _parallel_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, **rest: Tensor) -> Tensor:
    from mambapy.pscan import pscan

    u, delta, B, C = (tensor[:, 0].float() for tensor in (u, delta, B, C))  # B, C (b, l, 1, n)
    dt = F.softplus(delta).unsqueeze(-1)
    return (pscan(torch.exp(dt * A[0]), dt * B * u.unsqueeze(-1)) * C).sum(-1)


def _published_scan(k: int, **inputs: Tensor) -> Tensor:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    ys = [selective_scan_fn(**{name: x[i] for name, x in inputs.items()}, delta_softplus=True) for i in range(k)]
    return torch.stack(ys).mean(0)


def _channels_first(name: str, x: Tensor) -> Tensor:
    """Lay an input out as the published kernel wants it, direction by direction: (k, b, d, l), (k, b, n, l), ..."""
    if name == "z":
        x = x.unsqueeze(1).expand(-1, 2, -1, -1)
    return x.squeeze(3).permute(1, 0, 3, 2).contiguous() if x.dim() >= 4 else x


def forward(call: Op, inputs: Named) -> Run:
    """The forward pass alone: nothing is kept for a backward pass."""

    def step() -> None:
        with torch.no_grad():
            call(**inputs)

    return step


def forward_and_backward(call: Op, inputs: Named) -> Run:
    """The forward pass and the gradients of all inputs, for a fixed random gradient of the output."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    with torch.no_grad():
        pull = torch.randn_like(call(**inputs))

    def step() -> None:
        # mambapy's scan does not use all inputs
        torch.autograd.grad(call(**leaves), list(leaves.values()), pull, allow_unused=True)

    return step


def least(op: str, shape: Scan | Ssd, run: str) -> tuple[int, int, int]:
    """The elements that a run must read and write, and the exponentials and products that it must compute.

    Inputs and gradients are read once, outputs and gradients written once. A scan takes n + 2 exponentials for each
    image, direction, token and channel: n decays and a softplus. Its backward pass takes them twice.
    """
    backward = run != "forward"
    if isinstance(shape, Ssd):
        return _least_of_ssd(shape, backward)
    b, k, l, d, _, n, *_ = shape
    rows, one, narrow = b * k * l * d, b * l * d, b * k * l * n
    if op == "scan":
        forward = 2 * rows + 2 * narrow + 2 * one  # u, delta; B, C; z, y
        elements = forward + (4 * rows + 4 * narrow + 3 * one) * backward  # du, ddelta; dB, dC; dy, dz
        return elements, (n + 2) * rows * (3 if backward else 1), 0
    if op == "conv":
        return (5 if backward else 2) * rows, 0, 0
    if op == "norm":
        return (5 if backward else 2) * (one // 2), 0, 0
    return (4 + 8 * backward) * (one // 2), 0, 0  # q, k, v, y; the same again, dy, dq, dk, dv


def _least_of_ssd(shape: Ssd, backward: bool) -> tuple[int, int, int]:
    """As :func:`least`, with chunks of 64 tokens, of whose pairs half are in order, and no gate.

    Four products of matrices go forwards: pairs of tokens, from pairs to y, to the state and from the state. Backwards
    each has two, and the pairs are made again.
    """
    b, k, l, h, p, g, n, *_ = shape
    rows, steps, narrow, one = b * k * l * h * p, b * k * l * h, b * k * l * g * n, b * l * h * p
    elements = rows + steps + 2 * narrow + one  # x, dt, B and C, y
    elements += (2 * rows + 2 * steps + 4 * narrow + one) * backward  # x, dx; dt, ddt; B, C, dB, dC; dy
    pairs, products = 64 * n * b * k * l * g, 64 * rows + 4 * n * rows
    return elements, (64 // 2 + 4) * steps * (2 if backward else 1), (pairs + products) * (3 if backward else 1)
