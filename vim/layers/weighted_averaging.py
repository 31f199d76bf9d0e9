"""MambaMixer's layers: token and channel mixers whose inputs are weighted sums of the outputs of earlier layers.

Source: https://arxiv.org/abs/2403.19888v1, after DenseFormer, https://arxiv.org/abs/2402.02622.
"""

import torch
from timm.layers import DropPath, LayerScale
from timm.models import checkpoint
from torch import Tensor, nn

from .factory import Factory
from .norm import ResidualNorm, residual_dtype

AVERAGING = ("alpha", "beta", "theta", "gamma")  # the names of the learnable scalars
NOT_DECAYED = (*AVERAGING, "A_log", "D", "dt_bias", "conv_bias")  # names of a MambaMixer model's parameters


class ResidualMixer(nn.Module):
    """``x + drop_path(mixer(norm(x)))`` for x (..., dim).

    Args:
        layer_scale: the first value of learned scales of the mixer's channels; None for no scales.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        *,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.norm = ResidualNorm(dim, device=device, dtype=dtype)
        self.mixer = mixer
        dd: Factory = {"device": device, "dtype": dtype}
        self.layer_scale = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., dim) to the same."""
        return x + self.drop_path(self.layer_scale(self.mixer(self.norm(x))))


class MambaMixerLayer(nn.Module):
    """The l-th layer of a stack, counted from 1: a token mixer, then a channel mixer.

    The token mixer's input sums the earlier token mixers' outputs, weighted by alpha, and the channel mixers' outputs,
    weighted by beta. The channel mixer's input sums the token mixers' outputs, this layer's included, weighted by
    theta, and the earlier channel mixers' outputs, weighted by gamma. The stack's input counts as output 0 of both
    kinds. That makes 4 l + 1 scalars. They start with weight 1 for the newest output and 0 for the others: a plain
    residual stack.

    Args:
        averaging: False leaves out the scalars: each mixer's input is the newest output.
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
        dd: Factory = {"device": device, "dtype": dtype}
        self.alpha = nn.Parameter(torch.empty(l, **dd)) if averaging else None
        self.beta = nn.Parameter(torch.empty(l, **dd)) if averaging else None
        self.theta = nn.Parameter(torch.empty(l + 1, **dd)) if averaging else None
        self.gamma = nn.Parameter(torch.empty(l, **dd)) if averaging else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the scalars to a plain residual stack's."""
        for newest, weights in ((0, self.alpha), (1, self.beta), (1, self.theta), (0, self.gamma)):
            if weights is not None:
                with torch.no_grad():
                    weights.zero_()[-1] = newest

    def forward(self, tokens: list[Tensor], channels: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the outputs of the token and of the channel mixer, (..., dim) each.

        Args:
            tokens, channels: all earlier outputs of the two kinds, (..., dim) each; index 0 is the stack's input.
        """
        y = self.token_mixer(_weighted_sum(self.alpha, tokens, self.beta, channels, channels[-1]))
        return y, self.channel_mixer(_weighted_sum(self.theta, tokens + [y], self.gamma, channels, y))


class MambaMixerStack(nn.Sequential):
    """Layers at one resolution on a float32 stream; each receives the outputs of all earlier layers."""

    def __init__(self, *layers: MambaMixerLayer) -> None:
        super().__init__(*layers)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., dim) to the output of the last channel mixer, (..., dim)."""
        x = x.to(residual_dtype(x))
        tokens, channels = [x], [x]
        for layer in self:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                y, x = checkpoint(_apply_layer, layer, *tokens, *channels)  # a reentrant one sees no tensors in lists
            else:
                y, x = layer(tokens, channels)
            tokens, channels = tokens + [y], channels + [x]
        return x


def _apply_layer(layer: nn.Module, *outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Call a layer with the token mixers' outputs, in the first half of `outputs`, and the channel mixers'."""
    half = len(outputs) // 2
    return layer(list(outputs[:half]), list(outputs[half:]))


def _weighted_sum(
    token_weights: Tensor | None,
    tokens: list[Tensor],
    channel_weights: Tensor | None,
    channels: list[Tensor],
    newest: Tensor,
) -> Tensor:
    """Return the weighted sum of all earlier outputs; without weights, `newest` itself."""
    if token_weights is None or channel_weights is None:
        return newest
    expected = "the outputs of the l - 1 layers before, and the input, expected"
    torch._assert(token_weights.shape[0] == len(tokens), expected)
    torch._assert(channel_weights.shape[0] == len(channels), expected)
    weights = torch.cat([token_weights, channel_weights]).to(newest.dtype).unbind()
    terms = tokens + channels
    total = terms[0] * weights[0]
    for i in range(1, len(terms)):
        total = torch.addcmul(total, terms[i], weights[i])  # keeps no product
    return total
