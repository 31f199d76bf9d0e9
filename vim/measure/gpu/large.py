"""Tensors of more than 2^31 elements, whose offsets need 64 bits: the last image or tokens against float64."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from vim.kernels import causal_conv1d, rms_norm, selective_scan
from vim.measure.gpu.card import DEVICE
from vim.measure.gpu.check import Check, compare, new_seed
from vim.measure.gpu.inputs import Named
from vim.measure.gpu.shapes import Large

STATES, TAPS = 8, 4


def cases(large: Large) -> dict[str, Callable[[], Check]]:
    """The checks by name."""
    images, tokens, channels, long, seen, compared = large
    return {
        "scan, 2^31 elements": partial(check_scan, images, tokens, channels, tokens, tokens),
        "scan, 2^31 elements of an image": partial(check_scan, 1, long, channels, seen, compared),
        "conv, 2^31 elements": partial(check_conv, images, tokens, channels),
        "norm, 2^31 elements": partial(check_norm, images * tokens, channels),
    }


def check_scan(b: int, l: int, d: int, seen: int, compared: int) -> Check:
    """Check the last tokens of the last image.

    Args:
        seen: the tokens that the reference scans, from a state of zero.
        compared: how many of them count: the others are there for the state.
    """
    seed = _seeded()
    u, delta, pull = (_normal(b, 1, l, d) for _ in range(3))
    B, C = (_normal(b, 1, l, 1, STATES) for _ in range(2))
    inputs = {"u": u, "delta": delta, "B": B, "C": C}
    A = -torch.arange(1.0, STATES + 1, device=DEVICE).repeat(1, d, 1)
    bias = torch.full((1, d), -1.0, device=DEVICE)

    def scan(inputs: Named, pull: Tensor, A: Tensor, bias: Tensor, backend: str) -> Named:
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
        y = selective_scan(
            **leaves,
            A=A,
            delta_bias=bias,
            delta_softplus=True,
            reverse=[False],
            combine="none",
            return_last_state=False,
            backend=backend,
        )
        assert isinstance(y, Tensor)  # no last state was asked for
        grads = torch.autograd.grad(y, list(leaves.values()), pull)
        named = {"y": y.detach(), **dict(zip((f"grad {name}" for name in leaves), grads, strict=True))}
        return {name: tensor[-1:, :, -compared:].clone() for name, tensor in named.items()}

    got = scan(inputs, pull, A, bias, "triton")
    last = {name: tensor[-1:, :, -seen:].double() for name, tensor in inputs.items()}
    want = scan(last, pull[-1:, :, -seen:].double(), A.double(), bias.double(), "chunked")
    case = "scan, 2^31 elements" + (" of an image" if b == 1 else "")
    return compare(case, "bfloat16", seed, [got], want)


def check_conv(b: int, l: int, d: int) -> Check:
    """Check the last image."""
    seed = _seeded()
    x, pull, weight = _normal(b, 1, l, d), _normal(b, 1, l, d), _normal(1, d, TAPS)

    def conv(x: Tensor, pull: Tensor, weight: Tensor, backend: str) -> Named:
        x = x.detach().requires_grad_()
        y = causal_conv1d(x, weight, reverse=[False], backend=backend)
        (grad,) = torch.autograd.grad(y, [x], pull)
        return {"y": y.detach()[-1:].clone(), "grad x": grad[-1:].clone()}

    got = conv(x, pull, weight, "triton")
    want = conv(x[-1:].double(), pull[-1:].double(), weight.double(), "reference")
    return compare("conv, 2^31 elements", "bfloat16", seed, [got], want)


def check_norm(rows: int, d: int) -> Check:
    """Check the last row."""
    seed = _seeded()
    x, pull, weight = _normal(rows, d), _normal(rows, d), _normal(d)

    def norm(x: Tensor, pull: Tensor, weight: Tensor, backend: str) -> Named:
        x = x.detach().requires_grad_()
        y = rms_norm(x, weight, backend=backend)
        (grad,) = torch.autograd.grad(y, [x], pull)
        return {"y": y.detach()[-1:].clone(), "grad x": grad[-1:].clone()}

    got = norm(x, pull, weight, "triton")
    want = norm(x[-1:].double(), pull[-1:].double(), weight.double(), "reference")
    return compare("norm, 2^31 elements", "bfloat16", seed, [got], want)


def _seeded() -> int:
    seed = new_seed()
    torch.manual_seed(seed)
    return seed


def _normal(*shape: int) -> Tensor:
    """Draw in bfloat16: in float64 these would not fit."""
    return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)
