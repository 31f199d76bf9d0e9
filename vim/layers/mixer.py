"""What the mixers of Mamba and Mamba-2 share: their convolution.

Sizes: b images, l tokens, e convolved channels; c directions have a convolution of their own.
"""

from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vim.kernels  # noqa: F401  registers the ops

from .plain import stack_plain

Directions = Literal["none", "v1", "v2", "hydra"]
# what the next tokens of a sequence need: the convolution's last inputs, (b, taps - 1, ...), and the scan's state
MixerState = tuple[Tensor, Tensor]


class ConvolvedMixer(nn.Module):
    """A mixer whose tokens are convolved before they are scanned.

    A subclass sets `conv1d`, for a second direction `conv1d_b` (otherwise None), `d_conv`, their taps, and `convolved`:
    for each of them 1 if it runs from the last token to the first, otherwise 0.
    """

    if TYPE_CHECKING:  # TorchScript knows no annotation of a module that may be None
        conv1d: nn.Conv1d
        conv1d_b: nn.Conv1d | None
        d_conv: int
        convolved: list[int]

    def _convolve(self, h: Tensor) -> Tensor:
        """Convolve the tokens of (b, c, l, e), the second direction from their end, and apply SiLU."""
        if not torch.jit.is_scripting():
            stacked = stack_plain(self.conv1d, self.conv1d_b)
            if stacked is not None:
                taps, bias = stacked
                return torch.ops.vim.causal_conv1d(h, taps.squeeze(2), bias, reverse=self.convolved)
        before = (self.d_conv - 1, 0)  # zeros in front of the first token
        rows = h.transpose(2, 3).unbind(1)  # (b, e, l) each
        u = [self.conv1d(F.pad(rows[0], before))]
        if self.conv1d_b is not None:
            u.append(self.conv1d_b(F.pad(rows[1].flip(-1), before)).flip(-1))
        return F.silu(torch.stack(u)).permute(1, 0, 3, 2)
