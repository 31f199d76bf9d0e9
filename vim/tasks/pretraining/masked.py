"""The student and the frozen teacher of masked pre-training.

Source: https://arxiv.org/abs/2403.06977, after https://arxiv.org/abs/2303.16058.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vim.engine.students import Student
from vim.models import VideoMamba


class Masked(Student):
    """A student that sees the tokens that a teacher attends to, and learns the teacher's features of them.

    Args:
        model: a video model with a class token first; see :meth:`vim.models.videomamba.VideoMamba.forward_visible`.
        width: channels of the teacher's features.
    """

    places: Tensor

    def __init__(self, model: VideoMamba, width: int) -> None:
        super().__init__()
        self.model = model
        self.clip_decoder = nn.Sequential(nn.Linear(model.embed_dim, width), nn.LayerNorm(width))
        places = sinusoids(1 + model.patch_embed.num_tubelets * model.patch_embed.num_patches, model.embed_dim)
        self.register_buffer("places", places, persistent=False)

    def forward(self, clips: Tensor, visible: Tensor) -> Tensor:
        """Return features (b, 1 + v, width) of the class token and of the tokens with indices `visible` (b, v)."""
        tokens = self.model.forward_visible(clips, visible)
        places = torch.cat([torch.zeros_like(visible[:, :1]), 1 + visible], dim=1)
        return self.clip_decoder(tokens + self.places[places].to(tokens.dtype))


class MaskingTeacher(nn.Module):
    """A frozen image model of timm, such as CLIP's, that is applied to each frame of a clip.

    Args:
        model: a plain vision transformer with a class token, and attention without rotary positions.
        ratio: fraction of the patches of a frame that are masked.

    Raises:
        ValueError: the model is no such transformer, or the ratio is not a number from 0 to below 1.
    """

    def __init__(self, model: Any, ratio: float) -> None:
        super().__init__()
        if not isinstance(ratio, int | float) or not 0 <= ratio < 1:
            raise ValueError(f"masking.ratio must be a number from 0 to below 1, got {ratio!r}")
        blocks = getattr(model, "blocks", None)
        attention = getattr(blocks[-1], "attn", None) if blocks is not None else None
        if not hasattr(attention, "qkv") or getattr(model, "num_prefix_tokens", 0) < 1:
            raise ValueError(f"the teacher must be a vision transformer with a class token, got {type(model).__name__}")
        self.model, self.ratio = model.eval().requires_grad_(False), ratio
        self.projection = model.head if isinstance(model.head, nn.Linear) else nn.Identity()
        self.width = self.projection.out_features if isinstance(self.projection, nn.Linear) else model.embed_dim

    @torch.no_grad()
    def forward(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        """Draw the tokens that the student sees, and return them with their features.

        As in the published code, the class token's attention, averaged over heads, gives the probabilities of the
        draw, and the features skip the last norm.

        Args:
            clips: (b, c, t, h, w).

        Returns:
            (b, v) indices of patches in the clip, those of a frame together; and (b, 1 + v, width), unit features of
            the class token, averaged over the frames, and of these patches.
        """
        b, _, t = clips.shape[:3]
        frames = clips.transpose(1, 2).flatten(0, 1)
        weights: list[Tensor] = []
        handle = self.model.blocks[-1].attn.register_forward_pre_hook(
            lambda attention, inputs: weights.append(self._attention(attention, inputs[0]))
        )
        try:
            patches, prefix = self._tokens(frames)
        finally:
            handle.remove()
        count = patches.shape[1]
        kept = count - int(count * self.ratio)
        chosen = torch.multinomial(weights[0], kept).sort().values  # (b * t, v / t)
        patches = patches.gather(1, chosen.unsqueeze(2).expand(-1, -1, patches.shape[2]))
        token = prefix[:, :1].unflatten(0, (b, t)).mean(1)
        features = torch.cat([token, patches.unflatten(0, (b, t)).flatten(1, 2)], dim=1)
        starts = count * torch.arange(t, device=clips.device).view(1, t, 1)
        return (chosen.view(b, t, kept) + starts).flatten(1), F.normalize(self.projection(features), dim=-1)

    def _tokens(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Patches and prefix tokens that leave the last block."""
        return self.model.forward_intermediates(
            frames, indices=1, norm=False, output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
        )[0]

    def _attention(self, attention: Any, x: Tensor) -> Tensor:
        """Return the class token's attention to the patches, (b, l), averaged over heads."""
        q, k, _ = attention.qkv(x).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = attention.q_norm(q[:, :, :1]), attention.k_norm(k)
        weights = (attention.scale * q @ k.transpose(2, 3)).float().softmax(-1)
        return weights.mean(1)[:, 0, self.model.num_prefix_tokens :]


def sinusoids(length: int, width: int) -> Tensor:
    """Return the fixed positions (length, width) of https://arxiv.org/abs/1706.03762, alternating sines and cosines."""
    rates = 10000 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(length, dtype=torch.float64).unsqueeze(1) * rates
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)[:, :width].float()
