"""The figures of a classifier on held-out images or clips."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from vim.data import IGNORED, Batch, several_labels
from vim.engine.log import reporting
from vim.errors import UserError
from vim.tasks.classification.imagenet import HeldOut
from vim.tasks.classification.multilabel import MultiLabelEvaluation, Scores

FIGURES = ("loss", "top1", "top5")


@dataclass
class Evaluation:
    """The figures on a held-out set, over all processes.

    Attributes:
        top1, top5: accuracies, as fractions.
        confusion: counts, (actual, predicted).
        unreadable: a line for each image that could not be read; no figure counts them.
    """

    loss: float
    top1: float
    top5: float
    confusion: Tensor
    unreadable: list[str]

    @property
    def images(self) -> int:
        """Return how many images were counted."""
        return int(self.confusion.sum())

    @property
    def figures(self) -> dict[str, float]:
        """Return the figures by their names."""
        return {name: getattr(self, name) for name in FIGURES}

    @property
    def summary(self) -> list[str]:
        """Return the figures in lines, the most important one last."""
        return [f"loss {self.loss:.4f}, top-5 {100 * self.top5:.2f} %", f"top-1 {100 * self.top1:.2f} %"]


AnyEvaluation: TypeAlias = Evaluation | MultiLabelEvaluation


class Tally:
    """Sums over samples, on their device, so that no batch waits for the host."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.num_classes = num_classes
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.in_top5 = torch.zeros((), dtype=torch.int64, device=device)
        self.confusion = torch.zeros(num_classes**2, dtype=torch.int64, device=device)

    def add(self, logits: Tensor, right: Tensor) -> None:
        """Count samples with logits (b, num_classes) and the classes that are right for each, (b, most)."""
        log_probs = logits.log_softmax(1).gather(1, right.clamp(min=0)).masked_fill(right == IGNORED, -torch.inf)
        self.loss -= log_probs.logsumexp(1).double().sum()
        top5 = logits.topk(min(5, self.num_classes)).indices
        self.in_top5 += (top5.unsqueeze(2) == right.unsqueeze(1)).flatten(1).any(1).sum()
        predicted = logits.argmax(1)
        actual = torch.where((right == predicted.unsqueeze(1)).any(1), predicted, right[:, 0])
        self.confusion += torch.bincount(actual * self.num_classes + predicted, minlength=self.num_classes**2)

    def reduce(self, accelerator: Accelerator) -> None:
        """Add up the sums of all processes."""
        self.loss, self.in_top5, self.confusion = (
            accelerator.reduce(total) for total in (self.loss, self.in_top5, self.confusion)
        )

    def evaluation(self, unreadable: list[str]) -> Evaluation:
        """Return the means, with a line for each sample that could not be read."""
        confusion = self.confusion.view(self.num_classes, self.num_classes).cpu()
        count = max(int(confusion.sum()), 1)
        loss, top1, top5 = (total.item() / count for total in (self.loss, confusion.trace(), self.in_top5))
        return Evaluation(loss, top1, top5, confusion, unreadable)


def evaluate(
    model: nn.Module,
    loader: Iterable[Batch],
    accelerator: Accelerator,
    num_classes: int,
    *,
    outputs: Tensor | None = None,
    accepted: Tensor | None = None,
) -> Evaluation:
    """Run the model over a loader's batches. Of several processes each sees a part, and all return the whole result.

    Args:
        num_classes: the number of classes.
        outputs: (num_classes,) the index of the model's output for each class; by default all outputs, in order.
        accepted: (labels, most) for each label the accepted classes, padded with `IGNORED`; by default the label
            itself. A prediction is right if it is any of them. The loss is that of their summed probability. The
            confusion counts a right prediction as the actual class, else the first accepted class.

    Raises:
        UserError: a label is none of the classes.
    """
    device = accelerator.device
    tally = Tally(num_classes, device)

    def add(logits: Tensor, labels: Tensor) -> None:
        right = labels.unsqueeze(1) if accepted is None else accepted[labels]  # (b, most)
        if int(right.max()) >= num_classes:
            raise UserError(f"an image is labelled {int(right.max())}: expected 0 to {num_classes - 1}, the classes")
        tally.add(logits if outputs is None else logits[:, outputs.to(device)], right.to(device))

    unreadable = _run(model, loader, accelerator, add)
    tally.reduce(accelerator)
    return tally.evaluation(unreadable)


def evaluate_several(
    model: nn.Module,
    loader: Iterable[Batch],
    accelerator: Accelerator,
    num_classes: int,
    *,
    thresholds: Sequence[float] | None = None,
) -> MultiLabelEvaluation:
    """Do what :func:`evaluate` does where an image may have several labels; see :class:`Scores` for `thresholds`.

    Raises:
        UserError: no image has a label.
    """
    scores = Scores(num_classes, thresholds)
    unreadable = _run(model, loader, accelerator, scores.add)
    scores.gather(accelerator)
    return scores.evaluation(unreadable)


@torch.inference_mode()
def _run(
    model: nn.Module, loader: Iterable[Batch], accelerator: Accelerator, add: Callable[[Tensor, Tensor], None]
) -> list[str]:
    """Call `add` with the logits and labels of the images that count, and return the lines of all processes."""
    was_training, unreadable = model.training, []
    model.eval()
    for batch in reporting(loader, "evaluating"):
        unreadable += batch.unreadable
        counted = batch.counted
        if not counted.any():
            continue
        with accelerator.autocast():
            logits = model(batch.images.to(accelerator.device, non_blocking=True))
        add(logits[counted.to(accelerator.device)].float(), batch.labels[counted])
    model.train(was_training)
    return gather_object(unreadable)


def evaluate_timed(
    model: nn.Module, images: HeldOut, loader: Iterable[Batch], accelerator: Accelerator
) -> tuple[AnyEvaluation, float]:
    """Return the figures of a model, and the seconds it took, reading the images included.

    Raises:
        UserError: no image can be read, or the memory is full.
    """
    start = time.perf_counter()
    model, classes = model.to(accelerator.device), len(images.classes)
    evaluation: AnyEvaluation
    try:
        if several_labels(images.dataset):
            evaluation = evaluate_several(model, loader, accelerator, classes, thresholds=images.thresholds)
        else:
            options = {"outputs": images.outputs, "accepted": images.accepted}
            evaluation = evaluate(model, loader, accelerator, classes, **options)
    except torch.OutOfMemoryError as error:
        raise UserError("the GPU's memory is full: lower data.batch_size with --cfg-options") from error
    check_evaluation(evaluation, "image")
    return evaluation, time.perf_counter() - start


def check_evaluation(evaluation: AnyEvaluation, kind: str) -> None:
    """Raise UserError if there was nothing to evaluate."""
    if evaluation.images == 0:
        raise UserError(f"no {kind} was evaluated: {(evaluation.unreadable or ['the data set is empty'])[0]}")
