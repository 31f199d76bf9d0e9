"""A mixer of linear time-invariant systems: what Mamba's mixer is without its selection.

Sources: https://arxiv.org/abs/2111.00396 (S4, whose block this is), https://arxiv.org/abs/2206.11893 (S4D),
https://arxiv.org/abs/2208.04933 (S5).
Sizes: b images, l tokens, d channels, c kernels a channel.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_choice, check_counts
from .dss import DSSKernel
from .factory import Factory
from .hippo import Spectrum
from .long_convolution import convolve
from .lti_kernels import LTIKernel, S4DKernel
from .mixer import MixerState
from .s4 import LSSLKernel, S4Kernel
from .s5 import S5

torch.fx.wrap("convolve")
LTIKind = Literal["s4d", "s4", "dss", "s5", "lssl"]
KERNELS: dict[LTIKind, Callable[..., LTIKernel]] = {
    "s4d": S4DKernel,
    "s4": S4Kernel,
    "dss": DSSKernel,
    "lssl": LSSLKernel,
}


class LTIConvolution(nn.Module):
    """``kernel * x + D x``, with c kernels for each channel; parameters under S4's names.

    Args:
        kernel: of c kernels a channel, or 2 c of which the second half look ahead.
        channels: c.
    """

    def __init__(
        self,
        kernel: LTIKernel,
        d_model: int,
        *,
        channels: int,
        bidirectional: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.kernel, self.bidirectional = kernel, bidirectional
        self.D = nn.Parameter(torch.empty(channels, d_model, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw D anew."""
        nn.init.normal_(self.D)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, l, d) to (b, l, c d)."""
        x = x.transpose(1, 2).unsqueeze(1)  # (b, 1, d, l)
        kernel = self.kernel(x.shape[3])
        if self.bidirectional:
            forwards, backwards = kernel.chunk(2)
            y = convolve(x, forwards, backwards)
        else:
            y = convolve(x, kernel)
        y = y + self.D.to(y.dtype).unsqueeze(-1) * x
        return y.flatten(1, 2).transpose(1, 2)

    @torch.jit.ignore
    def step(self, x: Tensor, state: MixerState | None) -> tuple[Tensor, MixerState]:
        """See :meth:`LTIMixer.step`: returns (b, l, c d)."""
        y, state = self.kernel.step(x, state)
        return (y.to(x.dtype) + self.D.to(x.dtype) * x.unsqueeze(2)).flatten(2), state


class HalfGLU(nn.Module):
    """``x sigmoid(W x + bias)``."""

    def __init__(self, dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d) to the same."""
        return x * torch.sigmoid(self.gate(x))


class LTIMixer(nn.Module):
    """Convolve with the kernels of state-space models, apply GELU, project with a gate; a token at a time, if causal.

    Args:
        d_model: d.
        kind: "s4d", a diagonal system a channel; "s4", a diagonal plus low-rank one; "dss", S4D without conjugate
            pairs; "s5", one system for all channels; "lssl", a dense HiPPO matrix, as a reference.
        d_state: states of a system, counting both of a conjugate pair.
        expand: c, the kernels of each channel; S4's `channels`. Not for "s5", which has one system.
        directions: "none" sees the tokens before and the token itself; "v2" also those after, with a C of its own.
        init: of "s4d" and "s4" only, see :class:`S4DKernel` and :class:`S4Kernel`.
        options: others of the kernel, see :class:`S4DKernel`, :class:`S4Kernel`, :class:`DSSKernel`, :class:`S5` and
            :class:`LSSLKernel`.

    Raises:
        ValueError: the kernel refuses an option, or a name is none of the above.
        TypeError: the kernel has no such option.
    """

    def __init__(
        self,
        d_model: int,
        *,
        kind: LTIKind = "s4d",
        d_state: int = 64,
        expand: int | None = None,
        directions: Literal["none", "v2"] = "v2",
        init: Spectrum | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        check_choice("kind", kind, get_args(LTIKind))
        check_choice("directions", directions, ("none", "v2"))
        self.directions = str(directions)
        bidirectional, dd = directions == "v2", Factory(device=device, dtype=dtype)
        if init is not None and kind not in ("s4d", "s4"):
            raise ValueError(f"init must be left out with {kind!r}, got {init!r}")
        if kind == "s5":
            if expand is not None:
                raise ValueError(f"expand must be left out with 's5', got {expand!r}")
            self.layer: S5 | LTIConvolution = S5(d_model, d_state=d_state, bidirectional=bidirectional, **options, **dd)
            self.output_linear: nn.Module = HalfGLU(d_model, **dd)
            return
        if init is not None:
            options["init"] = init
        channels = 2 if expand is None else expand
        check_counts(expand=channels)
        kernels = 2 * channels if bidirectional else channels
        kernel = KERNELS[kind](d_model, d_state=d_state, channels=kernels, **options, **dd)
        self.layer = LTIConvolution(kernel, d_model, channels=channels, bidirectional=bidirectional, **dd)
        self.output_linear = nn.Sequential(nn.Linear(channels * d_model, 2 * d_model, **dd), nn.GLU(dim=-1))

    def forward(self, x: Tensor, paths: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Map (b, l, d) to (b, l, d).

        Args:
            mask: (b, l), False for padding at the end of a sequence, which has no effect on the other tokens' outputs.

        Raises:
            ValueError: `paths` are given: the systems take the tokens in their order.
        """
        if paths is not None:
            raise ValueError("time-invariant mixers take the tokens in their order only, got paths")
        if mask is not None:
            x = x.masked_fill(~mask.unsqueeze(-1), 0)
        return self._project_out(self.layer(x), x)

    @torch.jit.ignore
    def step(self, x: Tensor, state: MixerState | None) -> tuple[Tensor, MixerState]:
        """Map the next tokens of a sequence, (b, l, d), to the outputs that :meth:`forward` has for them.

        Args:
            state: the state that the step before returned; None at the start of the sequence.

        Returns:
            (b, l, d), and the state for the next step: its real and its imaginary part, (b, d, m), of "s5" (b, m).

        Raises:
            ValueError: the mixer also looks ahead.
        """
        if self.directions != "none":
            raise ValueError(f"only directions='none' goes on step by step, got {self.directions!r}")
        y, state = self.layer.step(x, state)
        return self._project_out(y, x), state

    def _project_out(self, y: Tensor, x: Tensor) -> Tensor:
        """Map what the systems say, (b, l, c d), to the output (b, l, d) in the precision of the weights."""
        return self.output_linear(F.gelu(y.to(x.dtype)))
