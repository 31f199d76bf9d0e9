"""Files in, tensors out."""

from vim.data.datasets import Splits, build_datasets
from vim.data.digits import Digits
from vim.data.images import find_images, read_image
from vim.data.transforms import eval_transform, image_mode, input_options

__all__ = [
    "Digits",
    "Splits",
    "build_datasets",
    "eval_transform",
    "find_images",
    "image_mode",
    "input_options",
    "read_image",
]
