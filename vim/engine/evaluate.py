"""How well a model does on a data set."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from vim.data import IGNORED


@dataclass
class Evaluation:
    """The results on a held-out set: accuracies as shares of one, confusion as counts (actual, predicted)."""

    loss: float
    top1: float
    top5: float
    confusion: Tensor
    unreadable: list[str]


@torch.inference_mode()
def evaluate(model: nn.Module, loader: Any, accelerator: Accelerator, num_classes: int) -> Evaluation:
    """Run the model over a loader's batches; on several processes each sees a part, and all get the whole result."""
    was_training = model.training
    model.eval()
    confusion = torch.zeros(num_classes * num_classes, dtype=torch.int64, device=accelerator.device)
    loss = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    in_top5 = torch.zeros((), dtype=torch.int64, device=accelerator.device)
    unreadable: list[str] = []
    for images, labels, lines in loader:
        unreadable += lines
        counted = labels != IGNORED
        if not counted.any():
            continue
        with accelerator.autocast():
            logits = model(images[counted].to(accelerator.device, non_blocking=True))
        logits, labels = logits.float(), labels[counted].to(accelerator.device)
        loss += F.cross_entropy(logits, labels, reduction="sum").double()
        in_top5 += (logits.topk(min(5, num_classes)).indices == labels.unsqueeze(1)).any(1).sum()
        confusion += torch.bincount(labels * num_classes + logits.argmax(1), minlength=num_classes**2)
    model.train(was_training)
    loss, in_top5, confusion = (accelerator.reduce(total) for total in (loss, in_top5, confusion))
    confusion = confusion.view(num_classes, num_classes).cpu()
    count = max(int(confusion.sum()), 1)
    return Evaluation(
        loss.item() / count, confusion.trace().item() / count, in_top5.item() / count, confusion, unreadable
    )
