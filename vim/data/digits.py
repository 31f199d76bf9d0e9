"""The 1,797 handwritten digits that come with scikit-learn: 8 by 8 pixels, ten classes.

Source: https://archive.ics.uci.edu/dataset/80 (E. Alpaydin, C. Kaynak, 1998), the test part.
"""

from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

CLASSES = [str(digit) for digit in range(10)]


class Digits(Dataset[tuple[Any, int]]):
    """The digits as PIL images; a stratified fifth, always the same, is held out.

    Args:
        train: the other four fifths instead.
        mode: PIL's name for the kind of image: "L" for grey, "RGB".
    """

    def __init__(self, *, train: bool, mode: str = "L") -> None:
        from sklearn.model_selection import train_test_split

        grey, labels = self.load()
        split = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
        chosen = split[0 if train else 1]
        self.images = [Image.fromarray(image).convert(mode) for image in grey[chosen]]
        self.labels = labels[chosen].tolist()
        self.classes = CLASSES

    @staticmethod
    def load() -> tuple[np.ndarray, np.ndarray]:
        """Grey images (1797, 8, 8) of 0 to 255, and their labels (1797,)."""
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)  # 0 to 16
        return (pixels * (255 / 16)).round().astype(np.uint8).reshape(-1, 8, 8), labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.images[index], self.labels[index]
