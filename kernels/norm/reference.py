"""Root-mean-square normalisation in slow, obvious PyTorch: the definition every backend is tested against."""

import torch
from torch import Tensor

from ..checks import differentiate


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, in x's dtype."""
    wide, weight = (t.to(torch.promote_types(x.dtype, torch.float32)) for t in (x, weight))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def rms_norm_backward(grad_y: Tensor, x: Tensor, weight: Tensor, eps: float) -> list[Tensor | None]:
    """Return the gradients of x and weight by PyTorch's own differentiation."""
    return differentiate(lambda x, weight: rms_norm(x, weight, eps), (x, weight), grad_y)
