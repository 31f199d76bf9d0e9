"""Predictions of a classifier for image and video files."""

import math
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import ImageNetInfo
from torch import Tensor

from vim.data import eval_transform, image_mode, num_frames, read_image, video_eval_transform
from vim.data.video import Video, Videos
from vim.engine.plots import label, save_figure
from vim.engine.weights import load_published, load_trained
from vim.errors import UserError
from vim.options import Section
from vim.typing import VisionModel


class Predictor:
    """A model, its transform and the names of its classes.

    Args:
        transform: options for :func:`vim.data.eval_transform`.
        classes: a name for each of the model's outputs.
        thresholds: of each class, if an image may have several labels: the probability from which on it has that label.
    """

    def __init__(
        self,
        model: VisionModel,
        transform: Section,
        classes: Sequence[str],
        thresholds: Sequence[float] | None = None,
    ) -> None:
        if len(classes) != model.num_classes:
            raise UserError(f"the model has {model.num_classes} classes, and there are names for {len(classes)}")
        if thresholds is not None and len(thresholds) != model.num_classes:
            raise UserError(f"the model has {model.num_classes} classes, and there are {len(thresholds)} thresholds")
        self.model, self.classes, self.thresholds = model.eval(), classes, thresholds
        self.num_frames, self.mode = num_frames(model), image_mode(model)
        self.transform: Callable[[Any], Tensor] = (video_eval_transform if self.num_frames else eval_transform)(
            model, transform
        )

    @classmethod
    def from_checkpoint(cls, path: Path) -> "Predictor":
        """Read a checkpoint of a run."""
        model, state = load_trained(path)
        meta = state["meta"]
        return cls(model, meta["eval_transform"], meta["classes"], meta.get("thresholds"))

    @classmethod
    def from_pretrained(cls, name: str, path: Path) -> "Predictor":
        """Read published weights of ImageNet, or of videos, for a timm model. Kinetics' classes have names."""
        model = load_published(name, path)
        if num_frames(model) is None:
            info = ImageNetInfo()
            return cls(model, {}, [info.index_to_description(i) for i in range(info.num_classes())])
        kinetics = (files("vim.data") / "kinetics400.txt").read_text().splitlines()
        classes = kinetics if model.num_classes == len(kinetics) else [f"class {i}" for i in range(model.num_classes)]
        return cls(model, {}, classes)

    def read(self, path: Path) -> list[Image.Image]:
        """Read the image in a file; or the frames that the model takes of a video, or of a folder of frames."""
        if self.num_frames is None:
            return [read_image(path, self.mode)]
        return Videos([Video(str(path), 0)], self.mode, is_training=False, num_frames=self.num_frames)[0][0]

    def prepare(self, frames: Sequence[Image.Image]) -> Tensor:
        """Return the model's input for the frames of :meth:`read`, (1, c, h, w) or (1, c, t, h, w)."""
        return self.transform(frames if self.num_frames else frames[0]).unsqueeze(0)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the probability of each class, (b, classes); if an image may have several labels, of each by itself.

        Raises:
            UserError: the model's outputs are not finite.
        """
        if not logits.isfinite().all():
            raise UserError("the outputs of the model are not finite: its weights overflow, or are of another model")
        return logits.double().softmax(1) if self.thresholds is None else logits.double().sigmoid()

    @torch.inference_mode()
    def __call__(self, frames: Sequence[Image.Image], top_k: int | None = None) -> list[tuple[str, float]]:
        """Return names of classes and their probabilities, best first, for the frames of :meth:`read`.

        Args:
            top_k: how many. By default 5, or if an image may have several labels, those from their thresholds on.

        Raises:
            UserError: the model's outputs are not finite.
        """
        probabilities = self.probabilities(self.model(self.prepare(frames)))[0]
        top = probabilities.topk(
            min(top_k or (5 if self.thresholds is None else len(probabilities)), len(probabilities))
        )
        chosen = zip(top.values.tolist(), top.indices.tolist(), strict=True)
        least = self.thresholds if top_k is None else None
        return [(self.classes[i], p) for p, i in chosen if least is None or p >= least[i]]


def draw(frames: Sequence[Image.Image], predictions: Sequence[tuple[str, float]], out: Path) -> None:
    """Draw the image, or the frames row by row, beside the predictions as bars."""
    import matplotlib.pyplot as plt

    columns = math.ceil(math.sqrt(len(frames)))
    rows = math.ceil(len(frames) / columns)
    width, height = frames[0].size
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for i, frame in enumerate(frames):
        sheet.paste(frame, (i % columns * width, i // columns * height))
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    left.imshow(sheet)
    left.set_axis_off()
    names = [label(name.split(",")[0]) for name, _ in predictions]
    right.barh(range(len(names)), [100 * probability for _, probability in predictions])
    right.set_yticks(range(len(names)), names)
    right.invert_yaxis()
    right.set(xlabel="probability, %", xlim=(0, 100))
    save_figure(figure, out, dpi=100)
