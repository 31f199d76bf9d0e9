"""Softmax attention as a mixer: the baseline in the same blocks.

Source: https://arxiv.org/abs/2010.11929.
"""

from typing import Literal

import torch
from timm.layers import Attention
from torch import Tensor, nn

from .checks import check_choice, check_counts


class AttentionMixer(nn.Module):
    """timm's multi-head attention, with the arguments of the other mixers.

    Args:
        d_model: channels of a token.
        head_dim: channels of a head.
        directions: "v2", every token sees all others, is the only choice.

    Raises:
        ValueError: `head_dim` does not divide `d_model`, or other directions.
    """

    def __init__(
        self,
        d_model: int,
        *,
        head_dim: int = 64,
        directions: Literal["v2"] = "v2",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("directions", directions, ("v2",))
        check_counts(head_dim=head_dim)
        if d_model % head_dim:
            raise ValueError(f"head_dim must divide the {d_model} channels, got {head_dim}")
        self.attn = Attention(d_model, num_heads=d_model // head_dim, qkv_bias=True, device=device, dtype=dtype)

    def forward(self, x: Tensor, paths: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Map (b, l, d) to (b, l, d).

        Args:
            paths: have no effect: attention knows no order.
            mask: (b, l), False for padding, which has no effect on the other tokens' outputs.
        """
        return self.attn(x, None if mask is None else mask.unsqueeze(1).unsqueeze(1))
