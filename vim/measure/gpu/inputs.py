"""Random inputs of the ops, drawn in float64 and rounded."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vim.kernels import ssd
from vim.measure.gpu.shapes import Conv, Norm, Scan, Ssd

Named = dict[str, Tensor]
Op = Callable[..., tuple[Tensor, ...]]  # takes its inputs by name


class Draw:
    """Normally distributed tensors on a device, of one dtype."""

    def __init__(self, seed: int, device: str, dtype: str) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)
        self.dtype: torch.dtype = getattr(torch, dtype)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Draw a tensor."""
        wide = torch.randn(shape, generator=self.generator, device=self.generator.device, dtype=torch.float64)
        return wide.to(dtype or self.dtype)


def draw_scan(shape: Scan, seed: int, device: str) -> Named:
    """Draw the inputs of a scan by name, with the decays and step sizes of a Mamba block."""
    b, k, l, d, g, n, *_ = shape
    draw = Draw(seed, device, shape.dtype)
    if shape.views:
        u, z = draw(b, l, 2 * d).unsqueeze(1).chunk(2, dim=-1)
        u = u.expand(b, k, l, d)
    else:
        u, z = draw(b, k, l, d), draw(b, k if shape.combine == "none" else 1, l, d)
    rates = torch.arange(1.0, n + 1, device=device) * (0.1 * draw(k, d, n, dtype=torch.float32)).exp()
    bias = draw(k, d, dtype=torch.float32) - 3  # steps of about 0.05
    delta = draw(b, k, l, d) * 0.5
    inputs = {
        "u": u,
        "delta": delta if "delta_bias" in shape.given else delta.float().sub(3).exp().to(delta.dtype),
        "A": -rates,
        "B": draw(b, k, l, g, n),
        "C": draw(b, k, l, g, n),
        "D": draw(k, d, dtype=torch.float32),
        "z": z.squeeze(1) if shape.combine != "none" else z,
        "delta_bias": bias,
        "initial_state": draw(b, k, d, n, dtype=torch.float32),
    }
    wanted = ("u", "delta", "A", "B", "C", *shape.given.split())
    return {name: inputs[name] for name in wanted}


def draw_ssd(shape: Ssd, seed: int, device: str) -> Named:
    """Draw the inputs of state space duality by name, with the decays and step sizes of a Mamba-2 block."""
    b, k, l, h, p, g, n, *_ = shape
    draw = Draw(seed, device, shape.dtype)
    if shape.views:  # x, B and C are parts of one tensor, which the directions share
        parts = draw(b, 1, l, h * p + 2 * g * n).expand(b, k, -1, -1).split([h * p, g * n, g * n], -1)
        x, B, C = parts[0].unflatten(-1, (h, p)), parts[1].unflatten(-1, (g, n)), parts[2].unflatten(-1, (g, n))
    else:
        x, B, C = draw(b, k, l, h, p), draw(b, k, l, g, n), draw(b, k, l, g, n)
    dt = draw(b, k, l, h) * 0.5
    inputs = {
        "x": x,
        "dt": dt if "dt_bias" in shape.given else dt.float().sub(3).exp().to(dt.dtype),
        "A": -draw(k, h, dtype=torch.float32).exp() * 4,
        "B": B,
        "C": C,
        "D": draw(k, h, p, dtype=torch.float32),
        "z": draw(b, k, l, h, p) if shape.combine == "none" else draw(b, l, h, p),
        "dt_bias": draw(k, h, dtype=torch.float32) - 3,  # steps of about 0.05
        "initial_state": draw(b, k, h, p, n, dtype=torch.float32),
    }
    wanted = ("x", "dt", "A", "B", "C", *shape.given.split())
    return {name: inputs[name] for name in wanted}


def draw_conv(shape: Conv, seed: int, device: str) -> Named:
    """Draw the inputs of a convolution by name."""
    b, k, l, d, w, _, full = shape
    draw = Draw(seed, device, shape.dtype)
    inputs = {"x": draw(b, k, l, d), "weight": draw(k, d, w) / math.sqrt(w)}
    return {**inputs, "bias": draw(k, d)} if full else inputs


def draw_norm(shape: Norm, seed: int, device: str) -> Named:
    """Draw the inputs of a normalisation by name."""
    draw = Draw(seed, device, shape.dtype)
    return {"x": draw(shape.b, shape.l, shape.d), "weight": 1 + 0.1 * draw(shape.d)}


def alternating(k: int) -> list[bool]:
    """Every second direction runs backwards."""
    return [i % 2 == 1 for i in range(k)]


def duality(shape: Ssd, backend: str, **inputs: Tensor) -> tuple[Tensor, ...]:
    """Return y and the last state of state space duality."""
    out = ssd(
        **inputs,
        dt_softplus="dt_bias" in shape.given,
        reverse=alternating(shape.k),
        combine=shape.combine,
        return_last_state=True,
        backend=backend,
        dt_limit=(0.0, math.inf),
        chunk_size=None,
    )
    assert isinstance(out, tuple)
    return out


def in_float64(inputs: Named) -> Named:
    """The same values in float64."""
    return {name: tensor.double() for name, tensor in inputs.items()}


def results(op: Op, inputs: Named, seed: int, dtype: str) -> Named:
    """Outputs of an op, and the gradients of its inputs for random gradients of the outputs, rounded to `dtype`."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    outputs = op(**leaves)
    draw = Draw(seed, "cpu", dtype)  # the same values wherever the op runs
    pulls = [draw(*y.shape).to(y) for y in outputs]
    grads = torch.autograd.grad(outputs, list(leaves.values()), pulls)
    named = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    return named | {f"grad {name}": grad for name, grad in zip(leaves, grads, strict=True)}
