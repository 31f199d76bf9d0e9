"""Images to patches, clips to tubelets."""

from typing import Unpack

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function, to_2tuple
from torch import Tensor, nn

from .factory import Factory

torch.fx.wrap("as_frames")


@register_notrace_function
def as_frames(image: Tensor, frames: bool) -> Tensor:
    """Return (b, c, t, h, w) if `frames`, otherwise (b, c, h, w), from either: an image is a clip of one frame."""
    if frames and image.dim() == 4:
        return image.unsqueeze(2)
    if not frames and image.dim() == 5:
        return image.squeeze(2)
    return image


@register_notrace_function
def pad_image(image: Tensor, multiple: int) -> Tensor:
    """Pad (..., h, w) with zeros on the right and below, until h and w are multiples."""
    down, right = -image.shape[-2] % multiple, -image.shape[-1] % multiple
    return F.pad(image, (0, right, 0, down)) if down + right > 0 else image


class PaddedPatchEmbed(nn.Module):
    """A convolution over patches of an image of any size, which is padded with zeros to whole patches.

    Args:
        tubelet_size: frames of a clip that are embedded together, a divisor of their number; None for images.
    """

    def __init__(
        self,
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        *,
        tubelet_size: int | None = None,
        **dd: Unpack[Factory],
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj: nn.Conv2d | nn.Conv3d
        if tubelet_size is None:
            self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size, **dd)
        else:
            patch = (tubelet_size, patch_size, patch_size)
            self.proj = nn.Conv3d(in_chans, embed_dim, patch, patch, **dd)

    def forward(self, image: Tensor) -> Tensor:
        """Map (b, c, h, w) to (b, rows, columns, d), or (b, c, t, h, w) to (b, t, rows, columns, d), rounded up."""
        return self.proj(pad_image(image, self.patch_size)).movedim(1, -1)


class PatchEmbed(nn.Module):
    """A convolution over patches that may overlap; in a clip, over tubelets, which are patches through some frames.

    Args:
        img_size: height and width in pixels.
        stride: pixels between neighbouring patches; below `patch_size` they overlap. Default: the patch size.
        num_frames: frames of a clip; None for images. A model of clips takes an image as a clip of one frame, and the
            reverse.
        tubelet_size: frames of a tubelet; tubelets do not overlap in time.
        dynamic_img_size: take images of any size a patch fits in, instead of `img_size` only.

    Raises:
        ValueError: a patch does not fit in, or the frames are no multiple of the tubelets.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        stride: int | tuple[int, int] | None = None,
        num_frames: int | None = None,
        tubelet_size: int = 1,
        in_chans: int = 3,
        embed_dim: int = 192,
        dynamic_img_size: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if tubelet_size < 1:
            raise ValueError(f"tubelet_size must be at least 1, got {tubelet_size}")
        self.patch_size: tuple[int, int] = to_2tuple(patch_size)
        self.stride: tuple[int, int] = to_2tuple(patch_size if stride is None else stride)
        self.tubelet_size, self.dynamic_img_size = tubelet_size, dynamic_img_size
        kernel, step = self.patch_size, self.stride
        self.proj: nn.Conv2d | nn.Conv3d
        if num_frames is None:
            self.proj = nn.Conv2d(in_chans, embed_dim, kernel, step, device=device, dtype=dtype)
        else:
            kernel3, step3 = (tubelet_size, *kernel), (tubelet_size, *step)
            self.proj = nn.Conv3d(in_chans, embed_dim, kernel3, step3, device=device, dtype=dtype)
        self.set_input_size(img_size, num_frames)

    def set_input_size(self, img_size: int | tuple[int, int], num_frames: int | None = None) -> None:
        """Take images of another size from now on, or clips of another size and length.

        Raises:
            ValueError: a patch does not fit in, or the frames are no multiple of the tubelets.
        """
        size: tuple[int, int] = to_2tuple(img_size)
        if min(size[0] - self.patch_size[0], size[1] - self.patch_size[1]) < 0:
            raise ValueError(f"img_size must be at least the patch size {self.patch_size}, got {size}")
        if self.tubelet_size != 1 and num_frames is None:
            raise ValueError(f"tubelet_size must be 1 for images, got {self.tubelet_size}: set num_frames")
        if num_frames is not None and (num_frames < 1 or num_frames % self.tubelet_size):
            raise ValueError(f"num_frames must be a multiple of tubelet_size {self.tubelet_size}, got {num_frames}")
        self.img_size, self.num_frames = size, num_frames
        self.grid_size = self.feat_size(size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.num_tubelets = 1 if num_frames is None else num_frames // self.tubelet_size

    def feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Return the rows and columns of patches in an image of `img_size`, its height and width."""
        rows = (img_size[0] - self.patch_size[0]) // self.stride[0] + 1
        return rows, (img_size[1] - self.patch_size[1]) // self.stride[1] + 1

    def forward(self, image: Tensor) -> Tensor:
        """Map (b, c, h, w) to (b, rows, columns, d), or (b, c, t, h, w) to (b, t / tubelet_size, rows, columns, d)."""
        image = as_frames(image, self.num_frames is not None)
        if not self.dynamic_img_size:
            height, width = self.img_size
            expected = f"{height} x {width} pixels expected: set img_size, or dynamic_img_size=True"
            torch._assert(image.shape[-2] == height, expected)
            torch._assert(image.shape[-1] == width, expected)
        if self.num_frames is not None:
            multiple = f"a multiple of {self.tubelet_size} frames expected: they are embedded tubelet_size at a time"
            torch._assert(image.shape[2] % self.tubelet_size == 0, multiple)
        return self.proj(image).movedim(1, -1)
