"""Images to patches."""

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """A convolution over patches that may overlap.

    Args:
        img_size: height and width in pixels.
        stride: pixels between neighbouring patches; below `patch_size` they overlap. By default the patch size.
        dynamic_img_size: take images of any size a patch fits in, not of `img_size` only.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        stride: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        embed_dim: int = 192,
        dynamic_img_size: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.patch_size: tuple[int, int] = to_2tuple(patch_size)
        self.stride: tuple[int, int] = to_2tuple(patch_size if stride is None else stride)
        self.dynamic_img_size = dynamic_img_size
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, self.stride, device=device, dtype=dtype)
        self.set_input_size(to_2tuple(img_size))

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Take images of another size from now on.

        Raises:
            ValueError: a patch does not fit in.
        """
        size: tuple[int, int] = to_2tuple(img_size)
        if min(size[0] - self.patch_size[0], size[1] - self.patch_size[1]) < 0:
            raise ValueError(f"img_size must be at least the patch size {self.patch_size}, got {size}")
        self.img_size = size
        self.grid_size = self.feat_size(size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches in an image of that height and width."""
        rows = (img_size[0] - self.patch_size[0]) // self.stride[0] + 1
        return rows, (img_size[1] - self.patch_size[1]) // self.stride[1] + 1

    def forward(self, image: Tensor) -> Tensor:
        """Map (b, c, h, w) to (b, rows, columns, d)."""
        if not self.dynamic_img_size:
            height, width = self.img_size
            expected = f"{height} x {width} pixels expected: set img_size, or dynamic_img_size=True"
            torch._assert(image.shape[2] == height, expected)
            torch._assert(image.shape[3] == width, expected)
        return self.proj(image).permute(0, 2, 3, 1)
