"""Scenes for the examples: handwritten digits on photographs, with masks and boxes, and nothing to download.

Both come with scikit-learn: 1,797 digits and two photographs. Training scenes have four fifths of the digits and the
left parts of the photographs, held-out scenes the others.
"""

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.utils.data import Dataset

from vim.data import Digits

LEFT = 0.6  # of a photograph's columns are for training
MARGIN = 2  # pixels at least between two digits


class Scenes(Dataset):
    """Digits 1 to 4 at a time, up to 40 pixels high, in colours that the background does not have.

    Args:
        train: which digits and which parts of the photographs.
        count: number of scenes; a scene depends on `train`, `seed` and its index only.
        size: height and width in pixels.
    """

    def __init__(self, train: bool, count: int, size: int, seed: int = 0) -> None:
        self.digits = Digits(train=train)
        photographs = [image[:, : int(LEFT * image.shape[1])] for image in load_sample_images().images]
        others = [image[:, int(LEFT * image.shape[1]) :] for image in load_sample_images().images]
        self.photographs = photographs if train else others
        self.train, self.count, self.size, self.seed = train, count, size, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return an image (3, size, size) from -1 to 1, a mask (size, size), boxes (n, 4) and labels (n,).

        In masks and labels a digit is a class from 1 to 10, and 0 is the background. A box is x1, y1, x2, y2 in pixels.
        """
        if index >= self.count:
            raise IndexError(index)
        rng = np.random.default_rng((self.seed, self.train, index))
        photograph = self.photographs[rng.integers(len(self.photographs))]
        top, left = (rng.integers(side - self.size + 1) for side in photograph.shape[:2])
        image = photograph[top : top + self.size, left : left + self.size].astype(np.float32) / 255
        mask, boxes, labels = np.zeros((self.size, self.size), np.int64), [], []
        for _ in range(rng.integers(1, 5)):
            ink, label = self._digit(rng)
            height, width = ink.shape
            y, x = rng.integers(self.size - height + 1), rng.integers(self.size - width + 1)
            near = mask[max(y - MARGIN, 0) : y + height + MARGIN, max(x - MARGIN, 0) : x + width + MARGIN]
            if near.any():
                continue
            place = slice(y, y + height), slice(x, x + width)
            colour = rng.random(3, np.float32)
            if abs(colour.mean() - image[place].mean()) < 0.3:
                colour = 1 - colour.round()
            image[place] += ink[..., None] * (colour - image[place])
            mask[place][ink > 0.5] = label
            boxes.append([x, y, x + width, y + height])
            labels.append(label)
        pixels = torch.from_numpy(2 * image - 1).permute(2, 0, 1)
        return pixels, torch.from_numpy(mask), torch.tensor(boxes, dtype=torch.float32), torch.tensor(labels)

    def _digit(self, rng: np.random.Generator) -> tuple[np.ndarray, int]:
        """Return the ink (height, width) of a digit, from 0 to 1, without a border, and its class."""
        image, digit = self.digits[int(rng.integers(len(self.digits)))]
        side = int(rng.integers(20, 41))
        ink = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC), np.float32) / 255
        rows, columns = ((ink > 0.5).any(axis).nonzero()[0] for axis in (1, 0))
        return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], digit + 1
