"""Pre-training without labels: a video model learns a frozen image model's features of the tokens it sees."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from vim.data import Batch, build_datasets, image_mode, seed_all
from vim.engine.build import build_model
from vim.engine.config import reading
from vim.engine.log import reporting
from vim.engine.students import distance
from vim.engine.weights import Save
from vim.errors import UserError
from vim.models import VideoMamba
from vim.options import ImageRecipe
from vim.registry import create
from vim.tasks.images import Images, teacher_facts
from vim.tasks.pretraining.masked import Masked, MaskingTeacher


class Pretraining:
    """The task of a recipe with a `masking` section; see :class:`vim.engine.loop.Task`.

    Raises:
        UserError: the recipe has no teacher, or does not fit the model or the data.
    """

    def __init__(
        self, recipe: ImageRecipe, work_dir: Path, accelerator: Accelerator, resume: Save | None = None
    ) -> None:
        self.recipe, self.accelerator = recipe, accelerator
        model = build_model({**recipe.model, **({"pretrained": False} if resume else {})})
        splits = build_datasets(recipe.data, image_mode(model))
        self.model = _checked(recipe, model)
        with reading("teacher"):
            teacher = MaskingTeacher(create(**(recipe.teacher or {})), **(recipe.masking or {}))
            own, theirs = (m.patch_embed.grid_size for m in (self.model, teacher.model))
            if own != theirs or self.model.patch_embed.tubelet_size != 1:
                raise ValueError(f"the teacher's patches must be the model's, {own} in each frame: got {theirs}")
            self.student = Masked(self.model, teacher.width)
        self.teacher = teacher.to(accelerator.device)
        self.images = Images(recipe, splits, model, work_dir, accelerator)
        self.notes, self.batches_per_epoch = self.images.notes, self.images.batches_per_epoch

    def batches(self, epoch: int, start: int) -> Iterator[Batch]:
        """Yield the training batches of an epoch from number `start` on."""
        return self.images.batches(epoch, start)

    def loss(self, student: nn.Module, batch: Batch, average: nn.Module | None = None) -> Tensor:
        """Return the distance between the student's and the teacher's features of clips (b, c, t, h, w)."""
        return self._distance(student, batch.images)

    def _distance(self, student: nn.Module, clips: Tensor) -> Tensor:
        clips = clips.to(self.accelerator.device, non_blocking=True)
        visible, features = self.teacher(clips)
        return distance(student(clips, visible), features)

    @torch.inference_mode()
    def evaluate(self, model: nn.Module) -> Mapping[str, float]:
        """Return the loss on the held-out clips. It is the student's, whose decoder has no running average."""
        self.student.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.accelerator.device)
        unreadable: list[str] = []
        for number, batch in enumerate(reporting(self.images.held_out, "evaluating")):
            unreadable += batch.unreadable
            clips = batch.images[batch.counted]
            if not len(clips):
                continue
            seed_all(self.recipe.train.seed, number, self.accelerator.process_index)  # the teacher draws the mask
            with self.accelerator.autocast():
                loss = self._distance(self.student, clips)
            total += torch.stack([len(clips) * loss.double(), total.new_tensor(len(clips))])
        self.images.note_epoch(gather_object(unreadable))
        loss, count = self.accelerator.reduce(total).tolist()
        return {"loss": loss / max(count, 1)}

    def score(self, figures: Mapping[str, float]) -> float:
        """Return the same for all: the last weights count as the best."""
        return 0.0

    def meta(self) -> dict[str, object]:
        """Return nothing more than the loop knows."""
        return {}

    def identity(self) -> Mapping[str, object]:
        """Return the masking and the teacher, which must not change when a run is resumed."""
        masking = {f"masking.{name}": value for name, value in (self.recipe.masking or {}).items()}
        return {**masking, **teacher_facts(self.recipe)}

    def order(self) -> Mapping[str, object]:
        """Return facts that the order of the clips within an epoch follows from."""
        return self.images.order()


def _checked(recipe: ImageRecipe, model: nn.Module) -> VideoMamba:
    if not isinstance(model, VideoMamba) or model.num_classes:
        raise UserError("masked pre-training is for VideoMamba without a head: --cfg-options model.num_classes=0")
    if model.scan_order != "spatial_first" or model.directions == "none":
        raise UserError(
            "masked pre-training is for model.scan_order='spatial_first' and model.directions 'v1' or 'v2', "
            f"got {model.scan_order!r} and {model.directions!r}"
        )
    if recipe.train.patience is not None:
        raise UserError("masked pre-training takes no train.patience: its last weights count as the best")
    if recipe.train.class_weights is not None:
        raise UserError("masked pre-training has no classes: take train.class_weights out of the config")
    if recipe.mixup:
        raise UserError("masked pre-training takes no mixup: take that section out of the config")
    if recipe.teacher is None:
        raise UserError("masked pre-training needs a teacher section in the config: teacher=dict(model_name=...)")
    return model
