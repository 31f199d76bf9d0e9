"""Pre-training without labels: a video model learns a frozen image model's features of the tokens it sees."""

from typing import Any

import timm
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from vim.data import IGNORED, Splits, seed_all
from vim.engine.evaluate import Evaluation
from vim.engine.objectives import Masked, MaskingTeacher, distance
from vim.engine.trainer import Trainer
from vim.errors import UserError


class Pretrainer(Trainer):
    """A :class:`Trainer` of the config's `model`, which has no head, by its `teacher` and `masking`.

    The log's loss is that of the held-out clips; there are no accuracies, and the last checkpoint counts as the best.
    """

    def _classes(self, splits: Splits, model: Any) -> list[str]:
        if model.num_classes or not hasattr(model, "forward_visible"):
            raise UserError("masked pre-training is for VideoMamba without a head: --cfg-options model.num_classes=0")
        if model.scan_order != "spatial_first" or model.directions == "none":
            raise UserError(
                "masked pre-training is for model.scan_order='spatial_first' and model.directions 'v1' or 'v2', "
                f"got {model.scan_order!r} and {model.directions!r}"
            )
        if self.config.get("mixup"):
            raise UserError("masked pre-training takes no mixup: take that section out of the config")
        return []

    def _with_teacher(self, model: Any) -> nn.Module:
        if "teacher" not in self.config:
            raise UserError("masked pre-training needs a teacher section in the config: teacher=dict(model_name=...)")
        teacher = MaskingTeacher(timm.create_model(**self.config.teacher), **self.config.masking)
        own, theirs = (m.patch_embed.grid_size for m in (model, teacher.model))
        if own != theirs or model.patch_embed.tubelet_size != 1:
            raise ValueError(f"the teacher's patches must be the model's, {own} in each frame: got {theirs}")
        self.teacher = teacher.to(self.accelerator.device)
        return Masked(model, teacher.width)

    def _loss(self, images: Tensor, targets: Tensor) -> Tensor:
        visible, features = self.teacher(images)
        return distance(self.model(images, visible), features)

    @torch.inference_mode()
    def _evaluate(self) -> Evaluation:
        self.model.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.accelerator.device)
        unreadable: list[str] = []
        for number, (images, labels, lines) in enumerate(self.held_out):
            unreadable += lines
            images = images[labels != IGNORED].to(self.accelerator.device)
            if not len(images):
                continue
            seed_all(self.options.seed, number, self.accelerator.process_index)  # the teacher draws what is masked
            with self.accelerator.autocast():
                loss = self._loss(images, labels)
            total += torch.stack([len(images) * loss.double(), total.new_tensor(len(images))])
        loss, count = self.accelerator.reduce(total).tolist()
        nothing = torch.zeros(0, 0, dtype=torch.int64)
        return Evaluation(loss / max(count, 1), 0.0, 0.0, nothing, gather_object(unreadable))


def trainer_of(config: Any) -> type[Trainer]:
    """Which of the two a config is for."""
    return Pretrainer if "masking" in config else Trainer
