"""The figures of a classifier of images or clips that may have several labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from vim.data import IGNORED
from vim.errors import UserError

FIGURES = ("loss", "map", "f1_micro", "f1_macro", "f1_micro_tuned", "f1_macro_tuned")


class Counts(NamedTuple):
    """Of each class (classes,): labels predicted and right, predicted, and actual."""

    right: Tensor
    predicted: Tensor
    actual: Tensor

    def precision(self) -> Tensor:
        """Return the fraction of the predicted labels that are right; 0 where none is predicted."""
        return self.right / self.predicted.clamp(min=1)

    def recall(self) -> Tensor:
        """Return the fraction of the actual labels that are predicted; 0 where there is none."""
        return self.right / self.actual.clamp(min=1)

    def f1(self) -> Tensor:
        """Return the harmonic mean of precision and recall; 0 where nothing is predicted or actual."""
        return 2 * self.right / (self.predicted + self.actual).clamp(min=1)


@dataclass
class MultiLabelEvaluation:
    """The figures on a held-out set, over all processes. Labels that are not known count nowhere.

    Attributes:
        loss: binary cross-entropy, averaged over the known labels.
        average_precision: (classes,) NaN for a class that no image has.
        thresholds: (classes,) a label is predicted from this probability on.
        at_half, at_thresholds: the counts with a threshold of 0.5 for all classes, and with `thresholds`.
        images: how many have a label that is known.
        unreadable: a line for each image that could not be read; no figure counts them.
    """

    loss: float
    average_precision: Tensor
    thresholds: Tensor
    at_half: Counts
    at_thresholds: Counts
    images: int
    unreadable: list[str]

    @property
    def figures(self) -> dict[str, float]:
        """Return the figures by their names; means over classes leave out those that no image has."""
        found = self.at_half.actual > 0
        values = [self.loss, float(self.average_precision[found].mean())]
        for counts in (self.at_half, self.at_thresholds):
            total = Counts(*(count.sum() for count in counts))
            values += [float(total.f1()), float(counts.f1()[found].mean())]
        return dict(zip(FIGURES, values, strict=True))

    @property
    def summary(self) -> list[str]:
        """Return the figures in lines, the most important one last."""
        figures = {name: 100 * value for name, value in self.figures.items()}
        missing = int((self.at_half.actual == 0).sum())
        some = f" of the classes; {missing} that no image has are left out" if missing else ""
        return [
            f"loss {self.loss:.4f}",
            f"F1 at 0.5: micro {figures['f1_micro']:.2f} %, macro {figures['f1_macro']:.2f} %; at the thresholds of "
            f"the classes: micro {figures['f1_micro_tuned']:.2f} %, macro {figures['f1_macro_tuned']:.2f} %",
            f"mAP {figures['map']:.2f} %{some}",
        ]


class Scores:
    """Probabilities and labels of samples.

    Args:
        thresholds: of each class; by default those with the best F1 on these samples.
    """

    def __init__(self, num_classes: int, thresholds: Sequence[float] | None = None) -> None:
        self.thresholds = None if thresholds is None else torch.tensor(thresholds, dtype=torch.float64)
        self.probabilities = [torch.zeros(0, num_classes, dtype=torch.float64)]
        self.labels = [torch.zeros(0, num_classes, dtype=torch.int8)]
        self.loss = 0.0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count samples with logits and labels (b, classes): 1, 0 or `IGNORED`."""
        logits = logits.cpu().double()
        self.probabilities.append(logits.sigmoid())
        self.labels.append(labels)
        known = labels != IGNORED
        self.loss += float(F.binary_cross_entropy_with_logits(logits[known], labels[known].double(), reduction="sum"))

    def gather(self, accelerator: Accelerator) -> None:
        """Take the samples of all processes."""
        own = [(torch.cat(self.probabilities), torch.cat(self.labels), self.loss)]
        probabilities, labels, losses = zip(*gather_object(own), strict=True)
        self.probabilities, self.labels, self.loss = list(probabilities), list(labels), sum(losses)

    def evaluation(self, unreadable: list[str]) -> MultiLabelEvaluation:
        """Return the figures, with a line for each sample that could not be read.

        Raises:
            UserError: no label of any sample is 1.
        """
        probabilities, labels = torch.cat(self.probabilities), torch.cat(self.labels)
        if not (labels == 1).any():
            problem = (unreadable or [f"there are {len(labels)}"])[0]
            raise UserError(f"no image was evaluated that has a label: {problem}")
        known = labels != IGNORED
        pairs = [(probabilities[own, i], labels[own, i] == 1) for i, own in enumerate(known.T)]
        thresholds = self.thresholds
        if thresholds is None:
            thresholds = torch.tensor([best_threshold(*pair) for pair in pairs], dtype=torch.float64)
        return MultiLabelEvaluation(
            self.loss / int(known.sum()),
            torch.tensor([average_precision(*pair) for pair in pairs], dtype=torch.float64),
            thresholds,
            count_labels(probabilities, labels, torch.full_like(thresholds, 0.5)),
            count_labels(probabilities, labels, thresholds),
            int(known.any(1).sum()),
            unreadable,
        )


def average_precision(scores: Tensor, positive: Tensor) -> float:
    """Return the precision at each distinct score, averaged with the steps of the recall as weights.

    There is no interpolation; equal scores are one step.

    Args:
        scores, positive: (n,) of the samples of one class.

    Returns:
        NaN if no sample is positive.
    """
    from sklearn.metrics import average_precision_score  # here, because it takes a second

    return float(average_precision_score(positive, scores)) if positive.any() else float("nan")


def best_threshold(scores: Tensor, positive: Tensor) -> float:
    """Return the threshold, halfway between two scores, with the best F1; of several the highest.

    Args:
        scores, positive: (n,) of the samples of one class. Scores are from 0 to 1.

    Returns:
        0.5 if no sample is positive.
    """
    values, right, predicted = _cuts(scores, positive)
    if not positive.any():
        return 0.5
    best = int((2 * right / (predicted + right[-1])).argmax())
    below = float(values[best + 1]) if best + 1 < len(values) else 0.0
    return (float(values[best]) + below) / 2


def count_labels(probabilities: Tensor, labels: Tensor, thresholds: Tensor) -> Counts:
    """Return the counts over samples (n, classes) where labels from a threshold (classes,) on are predicted."""
    predicted = (probabilities >= thresholds) & (labels != IGNORED)
    actual = labels == 1
    return Counts(*(part.sum(0).double() for part in (predicted & actual, predicted, actual)))


def _cuts(scores: Tensor, positive: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the distinct scores, descending, and down to each the numbers of positive and of all samples."""
    values, order = scores.sort(descending=True)
    last = torch.ones_like(values, dtype=torch.bool)
    last[:-1] = values[1:] != values[:-1]
    places = torch.arange(1, len(values) + 1, dtype=torch.float64)
    return values[last], positive[order].double().cumsum(0)[last], places[last]
