"""The training loop."""

import random
from pathlib import Path
from typing import Any, cast

import numpy as np
import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from mmengine.config import Config
from timm.data import Mixup, create_loader
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import vim  # noqa: F401  registers the models
from vim.data import build_datasets, image_mode, input_options
from vim.engine.evaluate import Evaluation, evaluate
from vim.engine.log import Bar, plot_confusion, plot_curves, progress_bar, write_csv
from vim.engine.weights import load_weights, read_checkpoint, save_atomically
from vim.errors import UserError


def build_model(options: dict[str, Any]) -> nn.Module:
    """The timm model that a config's `model` section describes.

    Raises:
        UserError: no such model, or an option it does not take.
    """
    try:
        return timm.create_model(**options)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise UserError(f"the config's model cannot be built: {error}") from error


def build_loader(data: dict[str, Any], dataset: Any, model: nn.Module, *, is_training: bool) -> Any:
    """Batches of (images (b, c, h, w), labels (b,)), transformed for the model."""
    options = data.get("train_transform" if is_training else "eval_transform", {})
    return create_loader(
        dataset,
        **{**input_options(model), **options},
        batch_size=data["batch_size"],
        is_training=is_training,
        num_workers=data["num_workers"],
        persistent_workers=data["num_workers"] > 0,
        use_prefetcher=False,
    )


class Trainer:
    """A run: what a config describes, built; and :meth:`fit`, which trains it.

    Args:
        work_dir: gets `last.pth` and `best.pth`, `log.csv`, `curves.png`, `confusion.png` and `config.py`.
        resume: a checkpoint to go on from.

    Raises:
        UserError: the config does not fit the model or the data, or the checkpoint the model.
    """

    def __init__(self, config: Config, work_dir: Path, resume: Path | None = None) -> None:
        self.config, self.work_dir = config, work_dir
        self.accelerator = Accelerator(mixed_precision=config.train.get("amp", "no"))
        set_seed(config.train.seed, device_specific=True)
        model = build_model(config.model)
        splits = build_datasets(config.data, image_mode(model))
        self.classes = splits.classes
        if model.num_classes != len(self.classes):
            raise UserError(
                f"the data has {len(self.classes)} classes and the model {model.num_classes}: "
                f"--cfg-options model.num_classes={len(self.classes)}"
            )
        self.ema = ModelEmaV3(model, decay=config.train.ema_decay) if config.train.get("ema_decay") else None
        self.model, self.optimizer, self.loader, self.held_out = self.accelerator.prepare(
            model,
            create_optimizer_v2(model, **config.optimizer),
            build_loader(config.data, splits.train, model, is_training=True),
            build_loader(config.data, splits.held_out, model, is_training=False),
        )
        self.scheduler, self.num_epochs = create_scheduler_v2(
            self.optimizer, **config.schedule, updates_per_epoch=len(self.loader)
        )
        smoothing = config.train.get("smoothing", 0.0)
        self.mixup = None
        self.loss: nn.Module = LabelSmoothingCrossEntropy(smoothing)
        if config.get("mixup"):
            self.mixup = Mixup(**config.mixup, label_smoothing=smoothing, num_classes=len(self.classes))
            self.loss = SoftTargetCrossEntropy()
        self.rows: list[dict[str, float]] = []  # of the log, one an epoch
        if resume is not None:
            self._resume(resume)

    def fit(self) -> Evaluation:
        """Train for the epochs that are left, and return the last evaluation."""
        main, steps = self.accelerator.is_main_process, len(self.loader)
        if main:
            self.work_dir.mkdir(parents=True, exist_ok=True)
            self.config.dump(str(self.work_dir / "config.py"))
        evaluation = None
        with progress_bar(self.num_epochs * steps, len(self.rows) * steps, shown=main) as bar:
            for epoch in range(len(self.rows), self.num_epochs):
                train_loss = self._train_epoch(epoch, bar)
                evaluation = self._evaluate()
                bar.evaluated(evaluation.top1)
                self._record(epoch, train_loss, evaluation)
        evaluation = evaluation or self._evaluate()
        if main:
            plot_curves(self.work_dir / "curves.png", self.rows)
            plot_confusion(self.work_dir / "confusion.png", evaluation.confusion, self.classes)
        return evaluation

    def _train_epoch(self, epoch: int, bar: Bar) -> float:
        self.model.train()
        losses = torch.zeros((), device=self.accelerator.device)
        for step, (images, labels) in enumerate(self.loader, epoch * len(self.loader)):
            loss = self._step(images, labels, step)
            losses += loss
            bar.step(epoch + 1, loss.item())
        self.scheduler.step(epoch + 1)
        return self.accelerator.reduce(losses, "mean").item() / len(self.loader)

    def _step(self, images: Tensor, labels: Tensor, step: int) -> Tensor:
        if self.mixup is not None:
            images, labels = self.mixup(images, labels)
        with self.accelerator.autocast():
            loss = self.loss(self.model(images), labels)
        self.accelerator.backward(loss)
        if self.config.train.get("clip_grad"):
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.train.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step_update(step + 1)
        if self.ema is not None:
            self.ema.update(self.accelerator.unwrap_model(self.model), step=step)
        return loss.detach()

    def _evaluate(self) -> Evaluation:
        model = self.model if self.ema is None else self.ema.module
        return evaluate(model, self.held_out, self.accelerator, len(self.classes))

    def _record(self, epoch: int, train_loss: float, evaluation: Evaluation) -> None:
        best = max((row["top1"] for row in self.rows), default=0.0)
        row = {"epoch": epoch + 1, "lr": self.optimizer.param_groups[0]["lr"], "train_loss": train_loss}
        self.rows.append({**row, "loss": evaluation.loss, "top1": evaluation.top1, "top5": evaluation.top5})
        if not self.accelerator.is_main_process:
            return
        state = self._state()
        if evaluation.top1 >= best:
            save_atomically(state, self.work_dir / "best.pth")
        save_atomically(state, self.work_dir / "last.pth")
        write_csv(self.work_dir / "log.csv", self.rows)

    def _state(self) -> dict[str, Any]:
        model = self.accelerator.unwrap_model(self.model).state_dict()
        return {
            "model": model if self.ema is None else self.ema.module.state_dict(),  # the weights to use
            "meta": {
                "model": dict(self.config.model),
                "classes": self.classes,
                "eval_transform": dict(self.config.data.get("eval_transform", {})),
            },
            "training": {
                "model": model,
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else {},
                "rows": self.rows,
                "random": _random_state(),
            },
        }

    def _resume(self, path: Path) -> None:
        state = read_checkpoint(path)
        if "training" not in state:
            raise UserError(f"{path} holds weights only, not a run to go on with")
        training = state["training"]
        load_weights(self.accelerator.unwrap_model(self.model), training["model"], path)
        if self.ema is not None:
            load_weights(self.ema.module, state["model"], path)
        self.optimizer.load_state_dict(training["optimizer"])
        self.scheduler.load_state_dict(training["scheduler"])
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(training["scaler"])
        self.rows = training["rows"]
        _set_random_state(training["random"])


def _random_state() -> dict[str, Any]:
    kind, keys, *rest = cast(tuple[Any, ...], np.random.get_state())
    return {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": [kind, keys.tolist(), *rest]}


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
