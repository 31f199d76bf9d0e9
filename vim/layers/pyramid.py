"""Maps at four strides from the one map of an isotropic model: ViTDet's simple feature pyramid.

Paper: Exploring Plain Vision Transformer Backbones for Object Detection, https://arxiv.org/abs/2203.16527.
"""

import math
from collections.abc import Sequence
from typing import Unpack

import torch.nn.functional as F
from timm.layers import LayerNorm2d, get_device_dtype, register_notrace_function
from timm.models import FeatureInfo
from torch import Tensor, nn

from .backbone import MambaBackbone
from .checks import check_choice, check_counts
from .contract import FeatureGetter, feature_take_indices
from .factory import Factory

STRIDES = (4, 8, 16, 32)


def pyramid_level(dim: int, out_dim: int, stride: int, out_stride: int, **dd: Unpack[Factory]) -> nn.Sequential:
    """Map to another stride by deconvolutions that double, or by max pooling, then by 1 x 1 and 3 x 3 convolutions.

    A layer norm follows each convolution, and a layer norm and GELU each deconvolution but the last. Each deconvolution
    halves the channels.

    Args:
        stride, out_stride: pixels between neighbours in the map taken and in the map returned.
    """
    layers: list[nn.Module] = []
    if out_stride > stride:
        layers.append(nn.MaxPool2d(out_stride // stride, ceil_mode=True))
    for doubling in range(int(math.log2(max(stride // out_stride, 1)))):
        if doubling:
            layers += [LayerNorm2d(dim, **dd), nn.GELU()]
        layers.append(nn.ConvTranspose2d(dim, dim // 2, 2, 2, **dd))
        dim //= 2
    layers += [nn.Conv2d(dim, out_dim, 1, bias=False, **dd), LayerNorm2d(out_dim, **dd)]
    layers += [nn.Conv2d(out_dim, out_dim, 3, padding=1, bias=False, **dd), LayerNorm2d(out_dim, **dd)]
    return nn.Sequential(*layers)


class PyramidGetter(FeatureGetter):
    """timm's wrapper for `features_only=True` of an isotropic model, with maps at strides 4, 8, 16 and 32.

    All are made from the map after the last block and the final norm. Images can have any size: they are padded with
    zeros to whole patches, and a map has its stride's share of the rows and columns, rounded up, as a hierarchical
    model's.

    Args:
        out_indices: of the strides; the last n for an int.
        pyramid_channels: channels of each map; 256 in the paper.
        output_stride: the largest stride; coarser maps are returned at this one.

    Raises:
        ValueError: the model takes clips, or the stride of its patches is none of 4, 8, 16 and 32.
    """

    def __init__(
        self,
        model: MambaBackbone,
        out_indices: int | Sequence[int] = 4,
        pyramid_channels: int = 256,
        output_stride: int = 32,
    ) -> None:
        check_counts(pyramid_channels=pyramid_channels)
        check_choice("output_stride", output_stride, STRIDES)
        patches, steps = set(model.patch_embed.patch_size), set(model.patch_embed.stride)
        if model.num_frames is not None:
            raise ValueError(f"pyramid_channels is for models of images, got num_frames={model.num_frames}")
        if len(patches) > 1 or len(steps) > 1 or not steps < set(STRIDES):
            stride = model.patch_embed.stride
            raise ValueError(f"pyramid_channels needs square patches with a stride in {STRIDES}, got {stride}")
        super().__init__(model, out_indices=1, norm=True)
        indices = out_indices if isinstance(out_indices, int) else list(out_indices)
        taken, _ = feature_take_indices(len(STRIDES), indices)
        strides = [min(one, output_stride) for one in STRIDES]
        self.patch_size, self.stride, self.strides = patches.pop(), steps.pop(), [strides[i] for i in taken]
        dim, dd = model.num_features, get_device_dtype(model)
        self.pyramid = nn.ModuleList(
            pyramid_level(dim, pyramid_channels, self.stride, one, **dd) for one in self.strides
        )
        self.feature_info = FeatureInfo(
            [
                {"module": f"pyramid.{i}", "num_chs": pyramid_channels, "reduction": one}
                for i, one in enumerate(strides)
            ],
            tuple(taken),
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map images (b, c, h, w) to maps (b, pyramid_channels, h / stride, w / stride), rounded up."""
        h, w = x.shape[-2], x.shape[-1]
        x = pad_to_patches(x, self.patch_size, self.stride)
        taken = self.model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)  # type: ignore[operator]
        assert isinstance(taken, list)  # for TorchScript
        maps = []
        for i, level in enumerate(self.pyramid):
            stride = self.strides[i]
            maps.append(level(taken[0])[:, :, : -(-h // stride), : -(-w // stride)])
        return maps


@register_notrace_function
def pad_to_patches(image: Tensor, patch: int, stride: int) -> Tensor:
    """Pad (b, c, h, w) with zeros, until there is a patch for each `stride` rows and columns, the last ones included.

    Of patches larger than their stride half of the difference is before the first row and column: a patch is in the
    middle of what its cell of the map stands for.
    """
    before = (patch - stride) // 2
    below = -image.shape[-2] % stride + patch - stride - before
    right = -image.shape[-1] % stride + patch - stride - before
    return F.pad(image, (before, right, before, below))
