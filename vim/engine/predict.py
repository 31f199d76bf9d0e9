"""What a trained model sees in images."""

from pathlib import Path
from typing import Any

import torch
from timm.data import ImageNetInfo
from torch import nn

from vim.data import eval_transform, image_mode, read_image
from vim.engine.weights import load_published, load_trained
from vim.errors import UserError


class Predictor:
    """A model, its transform and the names of its classes.

    Args:
        transform: options for :func:`vim.data.eval_transform`.
        classes: a name for each of the model's outputs.
    """

    def __init__(self, model: nn.Module, transform: dict[str, Any], classes: list[str]) -> None:
        if len(classes) != model.num_classes:
            raise UserError(f"the model has {model.num_classes} classes, and there are names for {len(classes)}")
        self.model, self.classes = model.eval(), classes
        self.transform = eval_transform(model, transform)
        self.mode = image_mode(model)

    @classmethod
    def from_checkpoint(cls, path: Path) -> "Predictor":
        """A model that tools/train.py trained, with the classes it was trained on."""
        model, meta = load_trained(path)
        return cls(model, meta["eval_transform"], meta["classes"])

    @classmethod
    def from_pretrained(cls, name: str, path: Path) -> "Predictor":
        """A timm model with ImageNet weights from a file: a published checkpoint, or one like it."""
        model = load_published(name, path)
        info = ImageNetInfo()
        return cls(model, {}, [info.index_to_description(i) for i in range(info.num_classes())])

    @torch.inference_mode()
    def __call__(self, path: Path, top_k: int = 5) -> list[tuple[str, float]]:
        """The names and probabilities of the likeliest classes of an image file, best first."""
        image = self.transform(read_image(path, self.mode)).unsqueeze(0)
        probabilities = self.model(image).float().softmax(-1)[0]
        top = probabilities.topk(min(top_k, len(self.classes)))
        return [(self.classes[i], p) for p, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)]


def draw(path: Path, predictions: list[tuple[str, float]], out: Path) -> None:
    """Write a picture of the image with its predictions as bars beside it."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    left.imshow(read_image(path))
    left.set_axis_off()
    names = [name.split(",")[0] for name, _ in predictions]
    right.barh(range(len(names)), [100 * probability for _, probability in predictions])
    right.set_yticks(range(len(names)), names)
    right.invert_yaxis()
    right.set(xlabel="probability, %", xlim=(0, 100))
    figure.savefig(out, dpi=100)
    plt.close(figure)
