"""What a student learns from a frozen teacher, besides labels or instead of them."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn


class Student(nn.Module):
    """A model, and what is trained with it and then left out."""

    model: Any

    def no_weight_decay(self) -> set[str]:
        """The names of the parameters that weight decay must leave alone."""
        return {f"model.{name}" for name in self.model.no_weight_decay()}


def weights_of_model(state: dict[str, Any]) -> dict[str, Any]:
    """A model's own weights in the state of a :class:`Student`, or of itself."""
    own = {key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")}
    return own or state


class Distilled(Student):
    """A student whose tokens are compared with a teacher's, besides the labels.

    Self-distillation of https://arxiv.org/abs/2403.06977: the teacher is a smaller model of the family, trained before.

    Args:
        model, teacher: of this package, for the same input, cut into the same patches.

    Raises:
        ValueError: they take other images, or make another number of tokens of them.
    """

    def __init__(self, model: Any, teacher: Any) -> None:
        super().__init__()
        own, other = (
            (m.in_chans, m.patch_embed.num_frames, *m.patch_embed.img_size, m.pos_embed.shape[1])
            for m in (model, teacher)
        )
        if own != other:
            raise ValueError(
                f"the teacher's channels, frames, height, width and tokens must be the model's, {own}: got {other}"
            )
        self.model = model
        self.distill_head = nn.Sequential(
            nn.RMSNorm(model.embed_dim, 1e-5), nn.Linear(model.embed_dim, teacher.embed_dim)
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and all normed tokens in the width of the teacher's."""
        tokens = self.model.forward_features(images)
        return self.model.forward_head(tokens), self.distill_head(tokens)


class Masked(Student):
    """A student that sees the tokens a teacher attends to, and is to give the teacher's features of them.

    Masked pre-training of https://arxiv.org/abs/2403.06977, after https://arxiv.org/abs/2303.16058.

    Args:
        model: a video model with a class token first; see :meth:`vim.models.videomamba.VideoMamba.forward_visible`.
        width: of the teacher's features.
    """

    places: Tensor

    def __init__(self, model: Any, width: int) -> None:
        super().__init__()
        self.model = model
        self.clip_decoder = nn.Sequential(nn.Linear(model.embed_dim, width), nn.LayerNorm(width))
        places = sinusoids(1 + model.patch_embed.num_tubelets * model.patch_embed.num_patches, model.embed_dim)
        self.register_buffer("places", places, persistent=False)

    def forward(self, clips: Tensor, visible: Tensor) -> Tensor:
        """Features (b, 1 + v, width) of the class token and of the tokens at `visible` (b, v)."""
        tokens = self.model.forward_visible(clips, visible)
        places = torch.cat([torch.zeros_like(visible[:, :1]), 1 + visible], dim=1)
        return self.clip_decoder(tokens + self.places[places].to(tokens.dtype))


class MaskingTeacher(nn.Module):
    """An image model of timm's, such as CLIP's, that looks at a clip frame by frame.

    Args:
        model: a plain vision transformer with a class token, and attention without rotary positions.
        ratio: of the patches of a frame that are masked.

    Raises:
        ValueError: the model is no such transformer, or the ratio is not a number from 0 to below 1.
    """

    def __init__(self, model: Any, ratio: float) -> None:
        super().__init__()
        if not isinstance(ratio, int | float) or not 0 <= ratio < 1:
            raise ValueError(f"masking.ratio must be a number from 0 to below 1, got {ratio!r}")
        attention = getattr(model.blocks[-1], "attn", None) if hasattr(model, "blocks") else None
        if not hasattr(attention, "qkv") or getattr(model, "num_prefix_tokens", 0) < 1:
            raise ValueError(f"the teacher must be a vision transformer with a class token, got {type(model).__name__}")
        self.model, self.ratio = model.eval().requires_grad_(False), ratio
        self.projection = model.head if isinstance(model.head, nn.Linear) else nn.Identity()
        self.width = self.projection.out_features if isinstance(self.projection, nn.Linear) else model.embed_dim

    @torch.no_grad()
    def forward(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        """Which tokens a student is to see, and what it is to say of them.

        As in the published code, tokens are drawn by the class token's attention, averaged over heads, and features
        skip the last norm.

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
        """The first token's attention to the patches, (b, l), averaged over heads."""
        q, k, _ = attention.qkv(x).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = attention.q_norm(q[:, :, :1]), attention.k_norm(k)
        weights = (attention.scale * q @ k.transpose(2, 3)).float().softmax(-1)
        return weights.mean(1)[:, 0, self.model.num_prefix_tokens :]


def distance(features: Tensor, targets: Tensor) -> Tensor:
    """The mean of 2 - 2 cos of the angles between features (..., d)."""
    return 2 - 2 * F.cosine_similarity(features.float(), targets.float(), dim=-1).mean()


def sinusoids(length: int, width: int) -> Tensor:
    """Fixed positions (length, width) of https://arxiv.org/abs/1706.03762, sines and cosines in turns."""
    rates = 10000 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(length, dtype=torch.float64).unsqueeze(1) * rates
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)[:, :width].float()


def published_layer_decay(model: Any, *, layer_decay: float, weight_decay: float) -> list[dict[str, Any]]:
    """Groups of parameters with the learning rates that VideoMamba's published code has in effect.

    Its layer decay looks for `blocks`, where the model has `layers`: only what comes before the first block gets a
    rate of its own, `layer_decay ** (depth + 1)` of the others', which all but freezes it.
    """
    if not hasattr(model, "layers"):
        raise ValueError(f"published_decay is VideoMamba's, and the model is {type(model).__name__}: leave it out")
    scale = layer_decay ** (len(model.layers) + 1)
    names = ("cls_token", "pos_embed", "patch_embed")
    early = {id(parameter) for name, parameter in model.named_parameters() if name.startswith(names)}
    groups = []
    for group in param_groups_weight_decay(model, weight_decay, no_weight_decay_list=model.no_weight_decay()):
        for first in (True, False):
            own = [parameter for parameter in group["params"] if (id(parameter) in early) == first]
            groups.append({**group, "params": own, "lr_scale": scale if first else 1.0})
    return [group for group in groups if group["params"]]
