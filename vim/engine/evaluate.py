"""How well a model does on a data set."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn


@dataclass
class Evaluation:
    """The results on a held-out set: accuracies as shares of one, confusion as counts (actual, predicted)."""

    loss: float
    top1: float
    top5: float
    confusion: Tensor


@torch.inference_mode()
def evaluate(model: nn.Module, loader: Any, accelerator: Accelerator, num_classes: int) -> Evaluation:
    """Run the model over (images, labels); on several processes each sees a part, and all get the whole result."""
    was_training = model.training
    model.eval()
    confusion = torch.zeros(num_classes * num_classes, dtype=torch.int64, device=accelerator.device)
    loss = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    in_top5 = torch.zeros((), dtype=torch.int64, device=accelerator.device)
    for images, labels in loader:
        with accelerator.autocast():
            logits = model(images)
        logits, labels = accelerator.gather_for_metrics((logits.float(), labels))
        loss += F.cross_entropy(logits, labels, reduction="sum").double()
        in_top5 += (logits.topk(min(5, num_classes)).indices == labels.unsqueeze(1)).any(1).sum()
        confusion += torch.bincount(labels * num_classes + logits.argmax(1), minlength=num_classes**2)
    model.train(was_training)
    confusion = confusion.view(num_classes, num_classes).cpu()
    count = int(confusion.sum())
    return Evaluation(loss.item() / count, confusion.trace().item() / count, in_top5.item() / count, confusion)
