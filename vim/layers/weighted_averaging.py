"""MambaMixer's layer: a token mixer and a channel mixer, fed with weighted sums of what the layers before gave.

Source: https://arxiv.org/abs/2403.19888v1, after DenseFormer, https://arxiv.org/abs/2402.02622.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

AVERAGING = ("alpha", "beta", "theta", "gamma")  # the names of the learnable scalars


class ResidualNorm(nn.LayerNorm):
    """Layer normalisation of a float32 stream, returned in the dtype of the weight."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
        return y.to(self.weight.dtype)


class ResidualMixer(nn.Module):
    """``x + drop_path(mixer(norm(x)))`` for x (..., dim)."""

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        *,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.norm = ResidualNorm(dim, device=device, dtype=dtype)
        self.mixer = mixer
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.mixer(self.norm(x)))


class MambaMixerLayer(nn.Module):
    """The l-th of a stack of token and channel mixers, l from 1; the 4l + 1 scalars are the paper's.

    Into the token mixer go, summed, alpha times what the token mixers before gave and beta times the channel mixers';
    into the channel mixer theta times the token mixers', this layer's included, and gamma times the channel mixers'.
    The input of the stack counts as the output of a token and of a channel mixer 0. At the start the newest output has
    weight 1 and the others 0: a plain residual stack.

    Args:
        averaging: False leaves out the scalars: the newest output only.
    """

    def __init__(
        self,
        token_mixer: nn.Module,
        channel_mixer: nn.Module,
        l: int,
        *,
        averaging: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.token_mixer, self.channel_mixer = token_mixer, channel_mixer
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.alpha = nn.Parameter(torch.empty(l, **dd)) if averaging else None
        self.beta = nn.Parameter(torch.empty(l, **dd)) if averaging else None
        self.theta = nn.Parameter(torch.empty(l + 1, **dd)) if averaging else None
        self.gamma = nn.Parameter(torch.empty(l, **dd)) if averaging else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the scalars to where they start."""
        for newest, weights in ((0, self.alpha), (1, self.beta), (1, self.theta), (0, self.gamma)):
            if weights is not None:
                with torch.no_grad():
                    weights.zero_()[-1] = newest

    def forward(self, tokens: list[Tensor], channels: list[Tensor]) -> tuple[Tensor, Tensor]:
        """What this token and this channel mixer give, from all that those before gave, the stack's input first."""
        y = self.token_mixer(_weighted_sum(self.alpha, tokens, self.beta, channels, channels[-1]))
        return y, self.channel_mixer(_weighted_sum(self.theta, tokens + [y], self.gamma, channels, y))


def _weighted_sum(
    token_weights: Tensor | None,
    tokens: list[Tensor],
    channel_weights: Tensor | None,
    channels: list[Tensor],
    newest: Tensor,
) -> Tensor:
    """The sum; the newest where there are no weights."""
    if token_weights is None or channel_weights is None:
        return newest
    expected = "what the l - 1 layers before gave, and the input, expected"
    torch._assert(token_weights.shape[0] == len(tokens), expected)
    torch._assert(channel_weights.shape[0] == len(channels), expected)
    weights = torch.cat([token_weights, channel_weights]).to(newest.dtype).unbind()
    terms = tokens + channels
    total = terms[0] * weights[0]
    for i in range(1, len(terms)):
        total = torch.addcmul(total, terms[i], weights[i])  # keeps no product
    return total
