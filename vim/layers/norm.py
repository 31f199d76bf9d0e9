"""Root-mean-square normalisation of a float32 residual stream."""

import torch
from timm.layers import register_notrace_function
from torch import Tensor, nn

import vim.kernels  # noqa: F401  registers the ops


@register_notrace_function
def residual_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the residual stream: float32, or float64 in a float64 model. In 16 bits Vim's diverges."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


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
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.ops.vim.rms_norm(x, self.weight.to(x.dtype), self.eps, "auto")
        return y.to(self.weight.dtype)
