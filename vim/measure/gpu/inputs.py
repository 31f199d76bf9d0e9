"""Random inputs of the ops, drawn in float64 and rounded."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vim.measure.gpu.shapes import Conv, Norm, Scan

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
