"""The 1,797 handwritten digits that come with scikit-learn: 8 by 8 pixels, ten classes.

Source: https://archive.ics.uci.edu/dataset/80 (E. Alpaydin, C. Kaynak, 1998), the test part.
"""

from collections.abc import Callable
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
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        pixels, labels = load_digits(return_X_y=True)
        split = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
        chosen = split[0 if train else 1]
        grey = (pixels[chosen] * (255 / 16)).round().astype(np.uint8).reshape(-1, 8, 8)  # 0 to 16 in the source
        self.images = [Image.fromarray(image).convert(mode) for image in grey]
        self.labels = labels[chosen].tolist()
        self.classes = CLASSES
        self.transform: Callable[[Image.Image], Any] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.images[index]
        return image if self.transform is None else self.transform(image), self.labels[index]
