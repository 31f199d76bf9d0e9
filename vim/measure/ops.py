"""The scan's backends compared, state space duality with the scan, and one call for several scan routes with many."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from vim.compat.raw_scan import Oflex
from vim.compat.scan import selective_scan_fn
from vim.kernels import available_backends, selective_scan, ssd
from vim.measure.compare import Row, compare

PASSES = ("forward", "forward+backward")


class Routes(NamedTuple):
    """The inputs of one call of the scan, by name, and which of its directions run backwards."""

    inputs: Mapping[str, Tensor]
    reverse: Sequence[bool]


def compare_scans(
    batch_size: int,
    device: str,
    *,
    tokens: int = 197,
    channels: int = 768,
    states: int = 16,
    passes: Sequence[str] = PASSES,
    rounds: int,
) -> list[Row]:
    """Compare the scan's backends, with softplus, D and gate; the loop over tokens is the baseline.

    The default sizes are those of Vim-Small.
    """
    torch.manual_seed(0)
    u, delta, z = torch.randn(3, batch_size, tokens, channels, device=device)
    B, C = torch.randn(2, batch_size, tokens, states, device=device)
    D, delta_bias = torch.randn(2, channels, device=device)
    A = -torch.arange(1.0, states + 1, device=device).repeat(channels, 1)
    inputs = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias - 3}

    rows = []
    for run in passes:
        names = [name for name in available_backends(device) if name != "reference"] + ["reference"]
        calls = {
            f"scan, {name}": partial(
                run_op, partial(selective_scan, delta_softplus=True, backend=name), inputs, run != "forward"
            )
            for name in names
        }
        rows += compare(calls, run=run, batch_size=batch_size, size=tokens, rounds=rounds if run == "forward" else 2)
    return rows


def compare_ssd(
    batch_size: int, device: str, *, tokens: Sequence[int] = (197, 730, 6085), head_dim: int = 64, rounds: int
) -> list[Row]:
    """Compare state space duality, with 16 and 64 states, with a scan of 16 states, the baseline.

    All have softplus and D, and the 384 channels of Vim-Tiny.
    """
    rows, channels = [], 384
    heads, fastest = channels // head_dim, available_backends(device)[-1]
    for l in tokens:
        u, delta = torch.randn(2, batch_size, l, channels, device=device)
        B, C = torch.randn(2, batch_size, l, 64, device=device)
        A, (D, bias) = -torch.rand(channels, 16, device=device), torch.randn(2, channels, device=device)
        narrow = {"B": B[..., :16].contiguous(), "C": C[..., :16].contiguous()}
        scanned = {"u": u, "delta": delta, "A": A, **narrow, "D": D, "delta_bias": bias - 3}
        shared = {"x": u.unflatten(2, (heads, head_dim)), "dt": delta[..., :heads].contiguous(), "A": A[:heads, 0]}
        shared |= {"D": D[:heads], "dt_bias": bias[:heads] - 3}
        for run in PASSES:
            call = partial(run_op, backward=run != PASSES[0])
            calls: dict[str, Callable[[], object]] = {
                f"ssd, {backend}, {n} states": partial(
                    call, partial(ssd, dt_softplus=True, backend=backend), {**shared, **products}
                )
                for n, products in ((64, {"B": B, "C": C}), (16, narrow))
                for backend in dict.fromkeys(("chunked", fastest))
            }
            calls["scan, 16 states"] = partial(call, partial(selective_scan, delta_softplus=True), scanned)
            rows += compare(calls, run=run, batch_size=batch_size, size=l, rounds=rounds)
    return rows


def run_op(op: Callable[..., object], inputs: Mapping[str, Tensor], backward: bool) -> None:
    leaves = {name: tensor.detach().requires_grad_(backward) for name, tensor in inputs.items()}
    y = op(**leaves)
    assert isinstance(y, Tensor)  # no last state was asked for
    if backward:
        torch.autograd.grad(y.sum(), list(leaves.values()))


def compare_routes(
    device: str, *, shapes: Sequence[tuple[int, int]] = ((196, 768), (784, 384), (3136, 192), (12544, 192)), rounds: int
) -> list[Row]:
    """Compare ViM2's scan of an image along four routes in one call with four calls, the baseline.

    The four routes are two orders of the tokens, each in both directions. Shapes are (tokens, channels).
    """
    rows = []
    for l, d in shapes:
        together, alone = routes(l, d, device)
        for run in PASSES:
            calls = {
                "four routes, one call": partial(scan_routes, [together], run != "forward"),
                "four routes, four calls": partial(scan_routes, alone, run != "forward"),
            }
            rows += compare(calls, run=run, batch_size=1, size=l, rounds=rounds)
    return rows


def compare_layouts(
    device: str,
    *,
    shapes: Sequence[tuple[int, int, int, int]] = (
        (1, 768, 4096, 16),
        (8, 768, 1024, 16),
        (1, 384, 3136, 1),
        (4, 768, 784, 1),
        (8, 3072, 49, 1),
    ),
    rounds: int,
) -> list[Row]:
    """Compare the published scan functions with our own on tensors in our own layout, the baseline.

    The shapes are (b, channels, tokens, states), with B and C in four groups, as VM-UNet and VMamba have them.
    """
    rows = []
    for b, d, l, n in shapes:
        u, delta = torch.randn(2, b, d, l, device=device)
        B, C = torch.randn(2, b, 4, n, l, device=device)
        A, D, bias = -torch.rand(d, n, device=device), *torch.randn(2, d, device=device)
        published = [u, delta, A, B, C, D, bias]
        u, delta = (t.transpose(1, 2).contiguous() for t in (u, delta))
        own = [u, delta, A, *(t.permute(0, 3, 1, 2).contiguous() for t in (B, C)), D, bias]
        ours = partial(selective_scan, delta_softplus=True)
        calls: dict[str, Callable[[], object]] = {
            "selective_scan_cuda_oflex.fwd": partial(_extension, published),
            "selective_scan_fn": partial(_scan, partial(selective_scan_fn, delta_softplus=True), published, False),
            "vim.kernels": partial(_scan, ours, own, False),
        }
        rows += compare(calls, run=PASSES[0], batch_size=b, size=l, rounds=rounds)
        calls = {
            "selective_scan_fn": partial(_scan, partial(selective_scan_fn, delta_softplus=True), published, True),
            "vim.kernels": partial(_scan, ours, own, True),
        }
        rows += compare(calls, run=PASSES[1], batch_size=b, size=l, rounds=rounds)
    return rows


def _scan(scan: Callable[..., object], tensors: Sequence[Tensor], backward: bool) -> None:
    *leaves, bias = (t.detach().requires_grad_(backward) for t in tensors)
    y = scan(*leaves, delta_bias=bias)
    assert isinstance(y, Tensor)  # no last state was asked for
    if backward:
        torch.autograd.grad(y, [*leaves, bias], torch.ones_like(y))


def _extension(tensors: Sequence[Tensor]) -> None:
    u, delta, A, B, C, D, bias = tensors
    Oflex.fwd(u, delta, A, B, C, D, bias, True, 1, True)


def routes(l: int, d: int, device: str) -> tuple[Routes, list[Routes]]:
    """Draw the inputs of an image's scan along four routes, together and a copy for each route alone.

    Together, the two orders of the tokens are two groups of d channels, and the two directions are k = 2.
    """
    u, delta = torch.randn(2, 1, 2, l, 2 * d, device=device)
    B, C = torch.randn(2, 1, 2, l, 2, 16, device=device)
    A = -torch.arange(1.0, 17, device=device).expand(2, 2 * d, 16).contiguous()
    D, delta_bias = torch.randn(2, 2, 2 * d, device=device)
    u = u[:, :1].expand(1, 2, l, 2 * d)  # both directions read the same tokens
    inputs = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "delta_bias": delta_bias - 3}
    alone = [Routes(_route(inputs, k, g, d), [k == 1]) for k in (0, 1) for g in (0, 1)]
    return Routes(inputs, [False, True]), alone


def _route(inputs: Mapping[str, Tensor], k: int, g: int, d: int) -> dict[str, Tensor]:
    own = slice(g * d, (g + 1) * d)
    route = {name: inputs[name][:, k, None, :, own] for name in ("u", "delta")}
    route |= {name: inputs[name][k, None, own] for name in ("A", "D", "delta_bias")}
    route |= {name: inputs[name][:, k, None, :, g, None] for name in ("B", "C")}
    return {name: tensor.contiguous() for name, tensor in route.items()}


def scan_routes(groups: Sequence[Routes], backward: bool) -> list[Tensor]:
    """Scan each group of routes in a call of its own, and add up its directions."""
    ys = []
    for inputs, reverse in groups:
        leaves = {name: tensor.detach().requires_grad_(backward) for name, tensor in inputs.items()}
        y = selective_scan(
            **leaves, delta_softplus=True, reverse=reverse, combine="sum", return_last_state=False, backend="auto"
        )
        assert isinstance(y, Tensor)  # no last state was asked for
        if backward:
            torch.autograd.grad(y.sum(), list(leaves.values()))
        ys.append(y)
    return ys
