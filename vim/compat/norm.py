"""`mamba_ssm.ops.triton.layernorm`, `layer_norm` and `layernorm_gated`: norms fused with a residual sum or a gate.

They compute in float32, or float64 for float64, and return x's dtype.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layout import state_dtype, without_autocast


@without_autocast
def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    **others: object,
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise ``x + residual`` over the last dimension.

    From the fifth argument on the published versions differ: give them by name. Those of version 2 that are not listed
    here must be None, 0 or False.

    Args:
        x, residual: (..., d).
        weight, bias: (d,).
        prenorm: also return the sum, in the residual's dtype.
        residual_in_fp32: the sum is float32.

    Raises:
        NotImplementedError: one of the other arguments is used.
    """
    used = [name for name, value in others.items() if isinstance(value, Tensor) or value]
    if used:
        raise NotImplementedError(f"vim.compat serves layer_norm_fn without {', '.join(used)}")
    wide = state_dtype(x.dtype)
    if residual is not None:
        total = x.to(wide) + residual.to(wide)
        kept = wide if residual_in_fp32 else residual.dtype
    else:
        total, kept = x.to(wide), wide if residual_in_fp32 else x.dtype
    y = _normalise(total.to(kept).to(wide), weight, bias, eps, is_rms_norm).to(x.dtype)
    return (y, total.to(kept)) if prenorm else y


def rms_norm_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None, **options: object
) -> Tensor | tuple[Tensor, Tensor]:
    """Run :func:`layer_norm_fn` with the root mean square, without subtracting the mean."""
    return layer_norm_fn(x, weight, bias, residual, is_rms_norm=True, **options)  # type: ignore[arg-type]


def _normalise(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, is_rms_norm: bool) -> Tensor:
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if not is_rms_norm:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    y = torch.ops.vim.rms_norm(x, weight, eps=eps)
    return y if bias is None else y + bias


class RMSNorm(nn.Module):
    """The published RMSNorm: `weight`, and a `bias` that is None."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dropout_p:
            raise NotImplementedError("vim.compat serves RMSNorm without dropout")
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.bias: nn.Parameter | None
        self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        """Set the weight to 1."""
        nn.init.ones_(self.weight)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run :func:`rms_norm_fn`."""
        return rms_norm_fn(
            x,
            self.weight,
            self.bias,
            residual,
            prenorm=prenorm,
            eps=self.eps,
            residual_in_fp32=residual_in_fp32,
        )


@without_autocast
def layernorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
) -> Tensor:
    """Normalise (..., d), in groups of `group_size` channels if it is given, and multiply by silu(z).

    Args:
        norm_before_gate: False to gate before the norm.
    """
    wide = state_dtype(x.dtype)
    y, gate = x.to(wide), None if z is None else F.silu(z.to(wide))
    if gate is not None and not norm_before_gate:
        y = y * gate
    group_size = group_size or x.shape[-1]
    ones = torch.ones(group_size, device=x.device, dtype=wide)
    y = _normalise(y.unflatten(-1, (-1, group_size)), ones, None, eps, is_rms_norm).flatten(-2) * weight.to(wide)
    y = y if bias is None else y + bias.to(wide)
    return (y * gate if gate is not None and norm_before_gate else y).to(x.dtype)


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """Run :func:`layernorm_fn` with the root mean square, without subtracting the mean."""
    return layernorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate, is_rms_norm=True)


class GatedRMSNorm(nn.Module):
    """`mamba_ssm.ops.triton.layernorm_gated.RMSNorm`."""

    is_rms_norm = True

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.bias = None if self.is_rms_norm else nn.Parameter(torch.zeros(hidden_size, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Set the weight to 1, and the bias to 0."""
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """Run :func:`layernorm_fn`."""
        return layernorm_fn(
            x, self.weight, self.bias, z, self.eps, self.group_size, self.norm_before_gate, self.is_rms_norm
        )


class GatedLayerNorm(GatedRMSNorm):
    """`mamba_ssm.ops.triton.layernorm_gated.LayerNorm`."""

    is_rms_norm = False
