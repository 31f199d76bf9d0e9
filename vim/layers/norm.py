"""Norms of a float32 residual stream."""

from contextlib import AbstractContextManager, nullcontext
from typing import Unpack

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch import Tensor, nn

import vim.kernels  # noqa: F401  registers the ops

from .factory import Factory

torch.fx.wrap("residual_dtype")


@register_notrace_function
def residual_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of the residual stream: float32, or float64 in a float64 model.

    Vim's residual stream diverges in 16-bit precision.
    """
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def without_autocast(device: str) -> AbstractContextManager[object]:
    """Keep products in float32. Where autocast is off, nothing is entered: an exported graph has no trace of it."""
    if device == "meta" or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


@register_notrace_function
def matrix_product(left: Tensor, right: Tensor) -> Tensor:
    """Return the matrix product in the precision of its factors, also under autocast."""
    if torch.jit.is_scripting():
        return left @ right
    with without_autocast(left.device.type):
        return left @ right


class RMSNorm(nn.Module):
    """``x / rms(x) * weight``, computed in the dtype of x and returned in that of the weight.

    Source: https://arxiv.org/abs/1910.07467.
    """

    def __init__(
        self,
        dim: int,
        *,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to 1."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., dim) to the same."""
        y = torch.ops.vim.rms_norm(x, self.weight.to(x.dtype), eps=self.eps)
        return y.to(self.weight.dtype)


class GatedRMSNorm(RMSNorm):
    """``rms_norm(x * silu(z)) * weight``, or ``rms_norm(x) * weight * silu(z)``, in float32, or float64 for float64.

    Source: https://arxiv.org/abs/2405.21060 (Mamba-2).

    Args:
        groups: the mean of the squares is over dim / groups channels.
        norm_before_gate: the second of the two.
    """

    def __init__(self, dim: int, *, groups: int = 1, norm_before_gate: bool = False, **dd: Unpack[Factory]) -> None:
        super().__init__(dim, **dd)
        self.groups, self.norm_before_gate = groups, norm_before_gate

    def forward(self, x: Tensor, z: Tensor) -> Tensor:  # type: ignore[override]
        """Map x and z, (..., dim), to the same shape, in the dtype of the weight."""
        dtype = residual_dtype(x)
        x, gate, weight = x.to(dtype), F.silu(z.to(dtype)), self.weight.to(dtype)
        if not self.norm_before_gate:
            x = x * gate
        if self.groups == 1:
            x = torch.ops.vim.rms_norm(x, weight, eps=self.eps)
        else:
            rows = x.unflatten(-1, (self.groups, -1))
            x = torch.ops.vim.rms_norm(rows, torch.ones_like(rows[0, 0, 0]), eps=self.eps).flatten(-2) * weight
        if self.norm_before_gate:
            x = x * gate
        return x.to(self.weight.dtype)


class ResidualNorm(nn.LayerNorm):
    """Layer normalisation, computed in the dtype of x and returned in that of the weight."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., dim) to the same."""
        y = F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
        return y.to(self.weight.dtype)


class MapBatchNorm(nn.Module):
    """Batch normalisation of maps (b, rows, columns, c), computed and returned in the dtype of its weight."""

    def __init__(self, dim: int, **dd: Unpack[Factory]) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, rows, columns, c) to the same."""
        x = x.to(self.norm.weight.dtype).permute(0, 3, 1, 2)
        return self.norm(x).permute(0, 2, 3, 1)
