"""`mamba_ssm.ops.triton.layernorm`, `layer_norm` and `layernorm_gated`: norms fused with a residual sum or a gate.

They compute in float32, or float64 for float64, and return x's dtype.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layout import state_dtype, without_autocast

# the arguments after the residual; version 1 has a number in the first place, version 2 a tensor or None
LAYER_NORM_1 = ("eps", "prenorm", "residual_in_fp32", "is_rms_norm")
RMS_NORM_1 = ("prenorm", "residual_in_fp32", "eps")
VERSION_2 = ("x1", "weight1", "bias1", "eps", "dropout_p", "rowscale", "prenorm", "residual_in_fp32")


def layer_norm_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None, *args: Any, **options: Any
) -> Tensor | tuple[Tensor | None, ...]:
    """Normalise ``x + residual`` over the last dimension; see :func:`add_norm`.

    The arguments after the residual are in the order of version 1: eps, prenorm, residual_in_fp32, is_rms_norm. Or in
    that of version 2: x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, residual_in_fp32, is_rms_norm,
    return_dropout_mask.
    """
    version_2 = (*VERSION_2, "is_rms_norm", "return_dropout_mask")
    return add_norm(x, weight, bias, residual, **_by_name("layer_norm_fn", args, LAYER_NORM_1, version_2), **options)


def rms_norm_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None, *args: Any, **options: Any
) -> Tensor | tuple[Tensor | None, ...]:
    """Run :func:`add_norm` with the root mean square, without subtracting the mean.

    The arguments after the residual are in the order of version 1, prenorm, residual_in_fp32, eps, or of version 2, as
    of :func:`layer_norm_fn` without `is_rms_norm`.
    """
    named = _by_name("rms_norm_fn", args, RMS_NORM_1, (*VERSION_2, "return_dropout_mask"))
    return add_norm(x, weight, bias, residual, is_rms_norm=True, **named, **options)


def layer_norm_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None, *args: Any, **options: Any
) -> Tensor | tuple[Tensor | None, ...]:
    """Run :func:`add_norm` with the arguments of the published reference.

    The arguments after the residual are in the order of version 1: eps, prenorm, upcast. Or in that of version 2: x1,
    weight1, bias1, eps, dropout_p, rowscale, prenorm, dropout_mask, dropout_mask1, upcast. With `upcast` the sum is
    float32; the norm is computed in float32 in any case.

    Raises:
        NotImplementedError: a mask is given.
    """
    masks = ("dropout_mask", "dropout_mask1")
    version_2 = (*VERSION_2[:-1], *masks, "upcast")
    options |= _by_name("layer_norm_ref", args, ("eps", "prenorm", "upcast"), version_2)
    if any(options.pop(mask, None) is not None for mask in masks):
        raise NotImplementedError("vim.compat serves the norms' references without a dropout_mask: it must be None")
    upcast = options.pop("upcast", False)
    if upcast and residual is not None:
        residual = residual.to(state_dtype(x.dtype))
    return add_norm(x, weight, bias, residual, residual_in_fp32=upcast, **options)


rms_norm_ref = partial(layer_norm_ref, is_rms_norm=True)


def _by_name(
    function: str, args: tuple[object, ...], version_1: tuple[str, ...], version_2: tuple[str, ...]
) -> dict[str, Any]:
    names = version_1 if args and isinstance(args[0], int | float) else version_2
    if len(args) > len(names):
        raise TypeError(f"{function} takes up to {4 + len(names)} arguments, got {4 + len(args)}")
    return dict(zip(names, args, strict=False))


@without_autocast
def add_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    *,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
) -> Tensor | tuple[Tensor | None, ...]:
    """Normalise ``dropout(rowscale * x) + dropout(x1) + residual`` over the last dimension.

    Args:
        x, x1, residual: (..., d).
        weight, bias: (d,).
        weight1, bias1: (d,), of a second norm of the same sum.
        dropout_p: the part of the values that becomes zero, in evaluation too.
        rowscale: (...), without `x1`.
        prenorm: also return the sum, in the residual's dtype.
        residual_in_fp32: where there is no residual, the sum is float32.
        return_dropout_mask: also return what was kept of x and of x1, or None.

    Returns:
        The norm in x's dtype; or, in this order, the norm, the second norm, the sum, and the two masks.
    """
    if x1 is not None and rowscale is not None:
        raise ValueError("rowscale is for one sequence: x1 must be None")
    wide = state_dtype(x.dtype)
    total = x.to(wide) if rowscale is None else x.to(wide) * rowscale.to(wide).unsqueeze(-1)
    total, mask = _dropout(total, dropout_p)
    mask1 = None
    if x1 is not None:
        kept1, mask1 = _dropout(x1.to(wide), dropout_p)
        total = total + kept1
    if residual is not None:
        total = total + residual.to(wide)
    y = _normalise(total, weight, bias, eps, is_rms_norm).to(x.dtype)
    returned: list[Tensor | None] = [y]
    if weight1 is not None:
        returned.append(_normalise(total, weight1, bias1, eps, is_rms_norm).to(x.dtype))
    if prenorm:
        returned.append(total.to(residual.dtype if residual is not None else wide if residual_in_fp32 else x.dtype))
    returned += [mask, mask1] if return_dropout_mask else []
    return y if len(returned) == 1 else tuple(returned)


def _dropout(x: Tensor, p: float) -> tuple[Tensor, Tensor | None]:
    """Return x with zeros, and where it was kept."""
    if p == 0:
        return x, None
    mask = torch.rand_like(x) >= p
    return x * mask / (1 - p), mask


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
        dropout_p: float | torch.device | str | None = 0.0,
        device: torch.device | str | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(dropout_p, int | float):  # version 1 has the device and the dtype here
            dropout_p, device, dtype = 0.0, dropout_p, dtype or device  # type: ignore[assignment]
        self.eps = eps
        self.drop = nn.Dropout(dropout_p) if dropout_p else None
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))  # type: ignore[arg-type]
        self.bias: nn.Parameter | None
        self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        """Set the weight to 1."""
        nn.init.ones_(self.weight)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> Tensor | tuple[Tensor | None, ...]:
        """Run :func:`rms_norm_fn`, in training with dropout."""
        drop = getattr(self, "drop", None)  # a norm of version 1 that was pickled has none
        return rms_norm_fn(
            *(x, self.weight, self.bias, residual),
            eps=self.eps,
            dropout_p=drop.p if drop is not None and self.training else 0.0,
            prenorm=prenorm,
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


def gated_rms_norm_ref(*args: Any, upcast: bool = True, **options: Any) -> Tensor:
    """Run :func:`rmsnorm_fn`; `upcast`, the last argument, is without effect."""
    return rmsnorm_fn(*args[:7], **options)


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
