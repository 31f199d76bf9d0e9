"""Time-invariant state-space models along each axis of a map or a clip.

Paper: https://arxiv.org/abs/2210.06583 (S4ND).
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerScale, Mlp, register_notrace_module
from torch import Tensor, nn

from .checks import check_choice, check_counts
from .factory import Factory
from .hippo import Spectrum
from .long_convolution import convolve
from .lti_kernels import S4DKernel
from .norm import ResidualNorm, matrix_product, residual_dtype
from .patch_embed import pad_image
from .s4 import S4Kernel
from .stages import pad_tokens

S4NDKernel = Literal["s4", "s4d"]
LONGEST_MATRIX = 128  # rows or columns, of which the product with a matrix takes less time than an FFT
KERNELS: dict[S4NDKernel, Callable[..., nn.Module]] = {"s4": S4Kernel, "s4d": S4DKernel}


@register_notrace_module
class S4ND(nn.Module):
    """A convolution with a kernel along each axis, one after the other, which looks both ways.

    This is the convolution with the kernels' outer product, S4ND of tensor rank 1. It takes maps of any size.

    Args:
        d_model: d.
        axes: 1 for sequences, 2 for maps, 3 for clips.
        kind: "s4", systems with a low-rank part, as published; "s4d", diagonal ones, which take less to compute.
        d_state, init, dt_min, dt_max: see :class:`vim.layers.S4DKernel`.
        channels: kernels of each channel.
        out: "glu": GELU, then a linear layer over all kernels' outputs and a GLU; "sum": the sum over the input's
            channels, one for each kernel, without a skip connection; "none": the convolution itself.
        l_max: the longest kernel, in tokens; None for kernels as long as the axis.
        rate: the distance of neighbours, in those of the training: 0.5 for maps of twice the resolution.
        bandlimit: see :class:`vim.layers.S4DKernel`; it is that of the training, whatever the `rate`.

    Raises:
        ValueError: an option is none of its values.
    """

    def __init__(
        self,
        d_model: int,
        *,
        axes: int = 2,
        kind: S4NDKernel = "s4",
        d_state: int = 64,
        init: Spectrum = "legs",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        channels: int = 1,
        out: Literal["glu", "sum", "none"] = "glu",
        l_max: int | None = None,
        rate: float = 1.0,
        bandlimit: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_counts(d_model=d_model, axes=axes, channels=channels, l_max=1 if l_max is None else l_max)
        check_choice("kind", kind, tuple(KERNELS))
        check_choice("out", out, ("glu", "sum", "none"))
        if out == "none" and channels > 1:
            raise ValueError(f"channels must be 1 where they are not mixed (out='none'), got {channels}")
        if not rate > 0:
            raise ValueError(f"rate must be above 0, got {rate}")
        self.rate, self.out, self.longest_matrix = rate, str(out), LONGEST_MATRIX
        self.l_max = None if l_max is None else max(round(l_max / rate), 1)
        self.kernels = nn.ModuleList(
            KERNELS[kind](
                d_model,
                d_state=d_state,
                channels=2 * channels,  # forward, then backward
                init=init,
                dt_min=dt_min,
                dt_max=dt_max,
                bandlimit=bandlimit,
                device=device,
                dtype=dtype,
            )
            for _ in range(axes)
        )
        self.D = None if out == "sum" else nn.Parameter(torch.empty(channels, d_model, device=device, dtype=dtype))
        self.output_linear = (
            nn.Linear(channels * d_model, 2 * d_model, device=device, dtype=dtype) if out == "glu" else None
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the skip connection anew."""
        if self.D is not None:
            nn.init.normal_(self.D)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, ..., d), with a size for each axis between them, to the same; with "sum" to (b, ..., channels)."""
        u = x.to(residual_dtype(x)).unsqueeze(1)
        y = u  # (b, channels, ..., d)
        for axis, kernel in enumerate(self.kernels):
            l = x.shape[axis + 1]
            by_matrix = len(self.kernels) > 1 and l <= self.longest_matrix
            longest = l if self.l_max is None else min(l, self.l_max)
            y = _convolve_axis(y, kernel(longest, self.rate), axis, by_matrix)
        if self.D is None:
            return y.sum(-1).movedim(1, -1)
        y = y + u * self.D.to(u.dtype).reshape([-1] + [1] * len(self.kernels) + [u.shape[-1]])
        if self.output_linear is None:
            return y.squeeze(1)
        y = F.gelu(y).movedim(1, -2).flatten(-2).to(self.output_linear.weight.dtype)
        return F.glu(self.output_linear(y), dim=-1)


def _convolve_axis(x: Tensor, kernel: Tensor, axis: int, by_matrix: bool) -> Tensor:
    """Convolve x (b, 1 or channels, ..., d) with a kernel (2 channels, d, l), forward and backward, along an axis.

    Args:
        by_matrix: as the product with a matrix (l, l) for each channel, instead of by an FFT.
    """
    sizes = x.shape
    x = x.unsqueeze(2).flatten(2, axis + 2)
    x = x.unsqueeze(4).flatten(4, -2)  # (b, channels, before, l, after, d)
    before, l, after, d = x.shape[2], x.shape[3], x.shape[4], x.shape[5]
    forward, backward = kernel.chunk(2)
    channels, m = forward.shape[0], forward.shape[2]
    if by_matrix:
        # matrix[i, j] is forward[i - j], or backward[j - i - 1] above the diagonal
        line = F.pad(torch.cat([backward.flip(-1), forward], dim=-1), (l - m, l - m))
        matrix = line.unfold(-1, l, 1)[:, :, 1:].flip(-1)
        columns = x.expand(-1, channels, -1, -1, -1, -1).permute(1, 5, 3, 0, 2, 4).reshape(channels * d, l, -1)
        y = matrix_product(matrix.flatten(0, 1), columns).reshape(channels, d, l, -1, before, after)
        y = y.permute(3, 0, 4, 2, 5, 1)
    else:
        shape = (1, channels, 1, m, 1, d)
        y = convolve(x, forward.transpose(1, 2).reshape(shape), backward.transpose(1, 2).reshape(shape), dim=-3)
    return y.reshape([sizes[0], channels] + list(sizes[2:]))


class S4NDStem(nn.Module):
    """Local kernels over the pixels, the mean of each patch, a gated linear layer."""

    def __init__(self, mixer: S4ND, hidden: int, dim: int, patch: tuple[int, ...], dd: Factory) -> None:
        super().__init__()
        self.patch = patch
        self.mixer, self.proj = mixer, nn.Linear(hidden, 2 * dim, **dd)

    def forward(self, image: Tensor) -> Tensor:
        """Map (b, c, h, w) to (b, rows, columns, dim), rounded up; or (b, c, t, h, w) to (b, t, rows, columns, dim)."""
        x = self.mixer(pad_image(image, self.patch[-1]).movedim(1, -1))
        for axis, size in enumerate(self.patch):
            x = x.unflatten(axis + 1, (-1, size)).mean(axis + 2)
        return F.glu(self.proj(x.to(self.proj.weight.dtype)), dim=-1)


class S4NDDownsample(nn.Module):
    """A norm, then a convolution over 2 x 2 neighbours; or with S4ND the mean of these, and a gated linear layer."""

    def __init__(self, dim: int, out_dim: int, mixer: S4ND | None, dd: Factory) -> None:
        super().__init__()
        self.stride = (2, 2)
        self.norm, self.mixer = ResidualNorm(dim, eps=1e-6, **dd), mixer or nn.Identity()
        self.conv = nn.Conv2d(dim, out_dim, 2, 2, **dd) if mixer is None else nn.AvgPool2d(2, 2)
        self.glu = nn.Identity() if mixer is None else nn.Sequential(nn.Linear(dim, 2 * out_dim, **dd), nn.GLU())

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, ..., rows, columns, dim) to (b, ..., rows / 2, columns / 2, out_dim), rounded up."""
        x = self.mixer(self.norm(x)).to(self.norm.weight.dtype)
        shape = x.shape[:-3]
        x = pad_tokens(x.flatten(0, -4), self.stride[0]).permute(0, 3, 1, 2)  # the frames of clips one by one
        x = self.glu(self.conv(x).permute(0, 2, 3, 1))
        return x.reshape(shape + x.shape[1:])


class S4NDBlock(nn.Module):
    """ConvNeXt's block with S4ND in place of the depthwise convolution."""

    def __init__(self, dim: int, mixer: S4ND, drop_path: float, dd: Factory) -> None:
        super().__init__()
        self.mixer, self.norm = mixer, ResidualNorm(dim, eps=1e-6, **dd)
        self.mlp, self.scale = Mlp(dim, 4 * dim, **dd), LayerScale(dim, 1e-6, **dd)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, ..., dim) to the same."""
        return x + self.drop_path(self.scale(self.mlp(self.norm(self.mixer(x)))))
