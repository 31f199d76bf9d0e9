"""Training of classifiers of images and clips, by labels and on request also by a teacher's tokens."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator
from timm.data import Mixup
from torch import Tensor, nn

from vim.data import Batch, Splits, build_datasets, image_mode, input_options, several_labels
from vim.data.balance import all_labels, class_weights
from vim.engine.build import build_model
from vim.engine.config import reading
from vim.engine.loop import Loop
from vim.engine.plots import plot_confusion, plot_curves
from vim.engine.students import Distilled, distance
from vim.engine.weights import Save
from vim.errors import UserError
from vim.options import ImageRecipe
from vim.registry import create
from vim.tasks.classification.evaluate import AnyEvaluation, Evaluation, evaluate, evaluate_several
from vim.tasks.classification.losses import build_loss, divergence, soft
from vim.tasks.classification.multilabel import MultiLabelEvaluation
from vim.tasks.images import Images, teacher_facts
from vim.typing import VisionModel


class Classification:
    """The task of a recipe with labels; see :class:`vim.engine.loop.Task`.

    Args:
        resume: the save whose weights will replace those that the recipe's model starts from.

    Attributes:
        classes: names in the order of the model's outputs.
        several: whether an image may have several labels.
        thresholds: the probability from which on each label is predicted; those of the last evaluation.
        evaluation: the last one.

    Raises:
        UserError: the recipe does not fit the model or the data.
    """

    evaluation: AnyEvaluation

    def __init__(
        self, recipe: ImageRecipe, work_dir: Path, accelerator: Accelerator, resume: Save | None = None
    ) -> None:
        self.recipe, self.accelerator = recipe, accelerator
        self.model = build_model({**recipe.model, **({"pretrained": False} if resume else {})})
        splits = build_datasets(recipe.data, image_mode(self.model))
        self.classes, self.several = _classes(splits, self.model), several_labels(splits.train)
        if self.several and recipe.train.mesa:
            raise UserError("train.mesa needs one class an image, and these may have several labels: set train.mesa=0")
        known = resume.state["meta"].get("thresholds") if resume else None
        self.thresholds: list[float] = known or [0.5] * len(self.classes)
        self.teacher: VisionModel | None = None
        self.student: nn.Module = self.model
        if recipe.teacher is not None:
            with reading("teacher"):
                teacher = cast(VisionModel, create(**recipe.teacher).eval().requires_grad_(False))
                self.student = Distilled(self.model, teacher)
            self.teacher = teacher.to(accelerator.device)
        self.images = Images(recipe, splits, self.model, work_dir, accelerator)
        self.notes, self.batches_per_epoch = self.images.notes, self.images.batches_per_epoch
        self.mixup, self.criterion = self._build_loss(splits)

    def _build_loss(self, splits: Splits) -> tuple[Mixup | None, nn.Module]:
        wanted = self.recipe.train.class_weights
        weights = None if wanted is None else class_weights(splits.train, self.classes, wanted)
        mixup, criterion = build_loss(self.recipe, len(self.classes), several=self.several, weights=weights)
        return mixup, criterion.to(self.accelerator.device)

    def batches(self, epoch: int, start: int) -> Iterator[Batch]:
        """Yield the training batches of an epoch from number `start` on."""
        return self.images.batches(epoch, start)

    def loss(self, student: nn.Module, batch: Batch, average: nn.Module | None = None) -> Tensor:
        """Return the loss of images (b, c, h, w) or clips (b, c, t, h, w), mixed and labelled."""
        images, targets = (tensor.to(self.accelerator.device, non_blocking=True) for tensor in batch[:2])
        if self.several:
            targets = soft(targets)
        if self.mixup is not None:
            mixed, targets = self.mixup(images.flatten(1, -3), targets)  # the frames of a clip as channels
            images = mixed.view(images.shape)
        output = student(images)
        logits = output if self.teacher is None else output[0]
        loss = self.criterion(logits, targets)
        if self.teacher is not None:
            with torch.no_grad():
                wanted = self.teacher.forward_features(images)
            loss = loss + distance(output[1], wanted)
        if average is not None:
            with torch.no_grad():
                wanted = average(images)
            loss = loss + self.recipe.train.mesa * divergence(logits, wanted)
        return loss

    def evaluate(self, model: nn.Module) -> Mapping[str, float]:
        """Return the figures on the held-out part: loss and accuracies; or loss, average precision and F1."""
        run = evaluate_several if self.several else evaluate
        self.evaluation = run(model, self.images.held_out, self.accelerator, len(self.classes))
        self.images.note_epoch(self.evaluation.unreadable)
        if isinstance(self.evaluation, MultiLabelEvaluation):
            self.thresholds = self.evaluation.thresholds.tolist()
        return self.evaluation.figures

    def score(self, figures: Mapping[str, float]) -> float:
        """Return the accuracy, or the mean average precision."""
        return figures["map" if self.several else "top1"]

    def meta(self) -> dict[str, object]:
        """Return the classes, all options of the evaluation transform, and the thresholds of several labels."""
        transform = {**input_options(self.model), **self.recipe.data.eval_transform}
        several = {"task": "multilabel", "thresholds": self.thresholds} if self.several else {}
        return {"classes": self.classes, "eval_transform": transform, **several}

    def identity(self) -> Mapping[str, object]:
        """Return the classes and labels, the teacher and how images are prepared, which resuming must not change."""
        prepared = {**input_options(self.model), **self.recipe.data.eval_transform}
        return {
            "list of classes": self.classes,
            **({"kind of labels": "several an image"} if self.several else {}),
            **{f"data.eval_transform.{name}": value for name, value in prepared.items()},
            **teacher_facts(self.recipe),
        }

    def order(self) -> Mapping[str, object]:
        """Return facts that the order of the images within an epoch follows from."""
        return self.images.order()


def _classes(splits: Splits, model: VisionModel) -> list[str]:
    """Return the names of the data's classes, or their numbers where the data has no names.

    Raises:
        UserError: the model has another number of classes, or a label of the videos is none of them.
    """
    classes = splits.classes or [str(i) for i in range(model.num_classes)]
    if model.num_classes != len(classes):
        raise UserError(
            f"the data has {len(classes)} classes and the model {model.num_classes}: "
            f"--cfg-options model.num_classes={len(classes)}"
        )
    for part, dataset in (("train", splits.train), ("val", splits.held_out)):
        if several_labels(dataset):
            if not (all_labels(dataset, "training") == 1).any():
                raise UserError(f"no image or video of {part} has a label that is 1: training needs some in each part")
            continue
        most = max((int(video.label) for video in getattr(dataset, "videos", [])), default=0)
        if most >= len(classes):
            raise UserError(
                f"a video of {part} has label {most}, and the model {len(classes)} classes: "
                f"--cfg-options model.num_classes={most + 1}"
            )
    return classes


def plot_run(task: Classification, loop: Loop[Batch]) -> None:
    """Draw `curves.png`, and if an image has one class `confusion.png`, in the work dir."""
    plot_curves(loop.work_dir / "curves.png", loop.rows)
    if isinstance(task.evaluation, Evaluation):
        plot_confusion(loop.work_dir / "confusion.png", task.evaluation.confusion, task.classes)
