"""1,797 handwritten digits that come with scikit-learn: 8 by 8 pixels, ten classes.

Source: https://archive.ics.uci.edu/dataset/80 (E. Alpaydin, C. Kaynak, 1998), the test part.
"""

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from vim.errors import require

CLASSES = [str(digit) for digit in range(10)]


class Digits(Dataset[tuple[Image.Image, int]]):
    """The digits as PIL images. A stratified fifth, always the same, is held out.

    Args:
        train: whether to give the other four fifths, or the held-out fifth.
        mode: PIL's mode for the images: "RGB", or "L" for grey.

    Raises:
        UserError: scikit-learn is not installed.
    """

    def __init__(self, *, train: bool, mode: str = "L") -> None:
        grey, labels = self.load()
        selection = require("sklearn.model_selection", "holding out digits")
        split = selection.train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
        chosen = split[0 if train else 1]
        self.images = [Image.fromarray(image).convert(mode) for image in grey[chosen]]
        self.labels = labels[chosen].tolist()
        self.classes = CLASSES

    @staticmethod
    def load() -> tuple[np.ndarray, np.ndarray]:
        """Grey images (1797, 8, 8), from 0 to 255, and their labels (1797,)."""
        datasets = require("sklearn.datasets", "the data set digits")
        pixels, labels = datasets.load_digits(return_X_y=True)  # 0 to 16
        return (pixels * (255 / 16)).round().astype(np.uint8).reshape(-1, 8, 8), labels

    @property
    def targets(self) -> list[int]:
        """The labels of the images."""
        return self.labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.images[index], self.labels[index]
