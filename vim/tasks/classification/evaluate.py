"""The figures of a classifier on held-out images or clips."""

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from vim.data import IGNORED, Batch
from vim.engine.log import reporting
from vim.errors import UserError
from vim.tasks.classification.imagenet import HeldOut


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


@torch.inference_mode()
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
    was_training, device = model.training, accelerator.device
    model.eval()
    tally, unreadable = Tally(num_classes, device), []
    for images, labels, lines in reporting(loader, "evaluating"):
        unreadable += lines
        if not images.numel():  # none can be read
            continue
        counted = labels != IGNORED
        with accelerator.autocast():
            logits = model(images.to(device, non_blocking=True))[counted.to(device)].float()
        labels = labels[counted]
        right = labels.unsqueeze(1) if accepted is None else accepted[labels]  # (b, most)
        if not len(right):
            continue
        if int(right.max()) >= num_classes:
            raise UserError(f"an image is labelled {int(right.max())}: expected 0 to {num_classes - 1}, the classes")
        tally.add(logits if outputs is None else logits[:, outputs.to(device)], right.to(device))
    model.train(was_training)
    tally.reduce(accelerator)
    return tally.evaluation(gather_object(unreadable))


def evaluate_timed(
    model: nn.Module, images: HeldOut, loader: Iterable[Batch], accelerator: Accelerator
) -> tuple[Evaluation, float]:
    """Return what :func:`evaluate` does, and the seconds it took, reading the images included.

    Raises:
        UserError: no image can be read, or the memory is full.
    """
    start = time.perf_counter()
    try:
        evaluation = evaluate(
            model.to(accelerator.device),
            loader,
            accelerator,
            len(images.classes),
            outputs=images.outputs,
            accepted=images.accepted,
        )
    except torch.OutOfMemoryError as error:
        raise UserError("the GPU's memory is full: lower data.batch_size with --cfg-options") from error
    if evaluation.images == 0:
        raise UserError(f"no image was evaluated: {(evaluation.unreadable or ['the data set is empty'])[0]}")
    return evaluation, time.perf_counter() - start
