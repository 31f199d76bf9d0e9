"""Maps at falling resolution, stage by stage: what the hierarchical families share.

A family adds a stem, blocks and sizes. Maps are channels last between the modules, (b, rows, columns, c),
and channels first where timm sees them, (b, c, rows, columns).
"""

from collections.abc import Sequence
from typing import Unpack

import torch
import torch.nn.functional as F
from timm.layers import global_pool_nlc, register_notrace_function, to_2tuple
from torch import Tensor, nn

from .contract import TimmModel, feature_take_indices, update_model_input_size
from .factory import Factory
from .norm import ResidualNorm


@register_notrace_function
def pad_tokens(x: Tensor) -> Tensor:
    """Pad (b, rows, columns, c) with zeros on the right and below, until rows and columns are even."""
    down, right = x.shape[1] % 2, x.shape[2] % 2
    return F.pad(x, (0, 0, 0, right, 0, down)) if down + right > 0 else x


class Downsample(nn.Module):
    """Swin's patch merging: concatenate the channels of 2 x 2 neighbours, normalise, project.

    Source: https://arxiv.org/abs/2103.14030.
    """

    def __init__(self, dim: int, out_dim: int, **dd: Unpack[Factory]) -> None:
        super().__init__()
        self.norm = ResidualNorm(4 * dim, **dd)
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, rows, columns, dim) to (b, rows / 2, columns / 2, out_dim), rounded up."""
        x = pad_tokens(x)
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], dim=-1)
        return self.reduction(self.norm(x))


class Stage(nn.Module):
    """A downsampling (nn.Identity in the first stage), then layers that keep the shape."""

    def __init__(self, downsample: nn.Module, layers: nn.Module) -> None:
        super().__init__()
        self.downsample, self.layers = downsample, layers

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, rows, columns, c) of the stage before to this stage's."""
        return self.layers(self.downsample(x))


class StagedBackbone(TimmModel):
    """A stem, stages, a final norm, the mean over the map, a linear head.

    Args:
        img_size: height and width in pixels of the images to prepare. The model takes any size its modules take.
        global_pool: "avg", "max" or "avgmax" of the map; "" for the map itself.
        patch_embed: the stem; maps images (b, c, h, w) to (b, rows, columns, embed_dims[0]).
        stride: pixels between the stem's outputs.
        norm_embed: follows the stem. Its weight has the dtype of the model's outputs.
        embed_dims: channels of each stage; from one stage to the next, height and width are halved.
        norm_f: follows the last stage.

    Raises:
        ValueError: the image is smaller than the stride.
    """

    blocks = "stages"
    out_indices = (0, 1, 2, 3)

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int],
        in_chans: int,
        num_classes: int,
        global_pool: str,
        patch_embed: nn.Module,
        stride: int,
        norm_embed: nn.LayerNorm,
        stages: Sequence[Stage],
        embed_dims: Sequence[int],
        norm_f: nn.Module,
        drop_rate: float,
        not_decayed: tuple[str, ...],
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(
            in_chans=in_chans,
            num_classes=num_classes,
            num_features=embed_dims[-1],
            global_pool=global_pool,
            not_decayed=not_decayed,
        )
        self.patch_embed, self.norm_embed = patch_embed, norm_embed
        self.stages, self.norm_f = nn.ModuleList(stages), norm_f
        self._add_head(drop_rate, {"device": device, "dtype": dtype})
        self.feature_info = [
            {"module": f"stages.{i}", "num_chs": dim, "reduction": stride * 2**i} for i, dim in enumerate(embed_dims)
        ]
        self._set_img_size(img_size)

    @property
    def img_size(self) -> tuple[int, int]:
        """Height and width in pixels of the images to prepare."""
        return self._img_size

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Have images prepared in another size from now on.

        Raises:
            ValueError: the image is smaller than the stem's stride.
        """
        self._set_img_size(img_size)
        update_model_input_size(self, img_size)  # timm's exports record it

    def _set_img_size(self, img_size: int | tuple[int, int]) -> None:
        size, least = to_2tuple(img_size), int(self.feature_info[0]["reduction"])
        if min(size) < least:
            raise ValueError(f"img_size must be at least the patch size {least}, got {size}")
        self._img_size: tuple[int, int] = size

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, object]:
        """Return patterns of parameter names for layer-wise learning rates: the stem, a group a layer or a stage."""
        layers = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.layers\.(\d+)", None)]
        return {
            "stem": r"^patch_embed|^norm_embed",
            "blocks": r"^stages\.(\d+)" if coarse else [*layers, (r"^norm_f", (99999,))],
        }

    def _embed(self, image: Tensor) -> Tensor:
        """Map images (b, c, h, w) to the normed map of the stem, (b, rows, columns, d)."""
        expected = f"images (b, {self.in_chans}, h, w) expected"
        torch._assert(image.dim() == 4, expected)
        torch._assert(image.shape[1] == self.in_chans, expected)
        torch._assert(image.shape[0] > 0, "at least one image expected")
        torch._assert(image.shape[2] * image.shape[3] > 0, "at least one pixel expected")
        return self.norm_embed(self.patch_embed(image))

    def forward_features(self, image: Tensor) -> Tensor:
        """Map images (b, c, h, w) to the normed map of the last stage, (b, d, rows, columns)."""
        x = self._embed(image)
        for stage in self.stages:
            x = stage(x)
        return self._to_map(self.norm_f(x))

    def _to_map(self, x: Tensor) -> Tensor:
        """Map (b, rows, columns, d) to (b, d, rows, columns), in the model's dtype."""
        return x.to(self.norm_embed.weight.dtype).permute(0, 3, 1, 2).contiguous()

    def pool(self, x: Tensor) -> Tensor:
        """Map (b, d, rows, columns) to (b, d), or to itself for `global_pool` ""."""
        if self.global_pool == "":
            return x
        return global_pool_nlc(x.flatten(2).transpose(1, 2), self.global_pool, num_prefix_tokens=0)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map (b, d, rows, columns) to logits (b, num_classes), or to the features before the head.

        For `global_pool` "", map it to (b, num_classes, rows, columns).
        """
        x = self.head_drop(self.pool(x))
        if pre_logits:
            return x
        return self.head(x.movedim(1, -1)).movedim(-1, 1)  # there may be a map left

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the maps of chosen stages, and the final features.

        Args:
            x: images (b, c, h, w).
            indices: of the stages; the last n for an int, all for None.
            norm: apply the final norm to the output of the last stage. As in training, it follows no other.
            stop_early: leave out the stages after the last one wanted.
            output_fmt: "NCHW", (b, d, rows, columns); there is no other.
            intermediates_only: leave out the final features.
        """
        assert output_fmt == "NCHW", f"output_fmt must be NCHW, got {output_fmt}"
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        last = len(self.stages) - 1
        if torch.jit.is_scripting() or not stop_early:  # TorchScript slices no ModuleList
            stages = self.stages
        else:
            stages = self.stages[: max_index + 1]
        x = self._embed(x)
        intermediates = []
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in take_indices:
                intermediates.append(self._to_map(self.norm_f(x) if norm and i == last else x))
        if intermediates_only:
            return intermediates
        if torch.jit.is_scripting() or not stop_early or max_index == last:
            x = self.norm_f(x)
        return self._to_map(x), intermediates
