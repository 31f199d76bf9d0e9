"""The training loop."""

import math
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
from vim.engine.config import reading, write_config
from vim.engine.evaluate import Evaluation, evaluate
from vim.engine.log import Bar, plot_confusion, plot_curves, progress_bar, write_csv
from vim.engine.weights import load_weights, make_folder, read_trained, save_atomically
from vim.errors import UserError


def build_model(options: dict[str, Any]) -> nn.Module:
    """The timm model that a config's `model` section describes.

    Raises:
        UserError: no such model, or an option it does not take.
    """
    with reading("model"):
        model = timm.create_model(**options)
    if not (hasattr(model, "in_chans") and hasattr(model, "patch_embed")):
        raise UserError(
            f"model.model_name must be a model of this package, such as vim_nano, got {options['model_name']}"
        )
    return model


def build_loader(data: dict[str, Any], dataset: Any, model: nn.Module, *, is_training: bool) -> Any:
    """Batches of (images (b, c, h, w), labels (b,)), transformed for the model.

    Raises:
        UserError: an option of the transform that does not exist, or a batch larger than the training set.
    """
    section = "train_transform" if is_training else "eval_transform"
    with reading(f"data.{section}"):
        loader = create_loader(
            dataset,
            **{**input_options(model), **data.get(section, {})},
            batch_size=data["batch_size"],
            is_training=is_training,
            num_workers=data["num_workers"],
            persistent_workers=data["num_workers"] > 0,
            use_prefetcher=False,
        )
    if len(loader) == 0:
        raise UserError(
            f"data.batch_size is {data['batch_size']}, and there are {len(dataset)} images to train on: "
            f"--cfg-options data.batch_size={len(dataset)}, or less"
        )
    return loader


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
        with reading("optimizer"):
            optimizer = create_optimizer_v2(model, **config.optimizer)
        self.ema = ModelEmaV3(model, decay=config.train.ema_decay) if config.train.get("ema_decay") else None
        self.model, self.optimizer, self.loader, self.held_out = self.accelerator.prepare(
            model,
            optimizer,
            build_loader(config.data, splits.train, model, is_training=True),
            build_loader(config.data, splits.held_out, model, is_training=False),
        )
        if config.schedule.get("sched") == "plateau":
            raise UserError("schedule.sched cannot be 'plateau', which is no function of the epoch: take 'cosine'")
        with reading("schedule"):
            self.scheduler, self.num_epochs = create_scheduler_v2(
                self.optimizer, **config.schedule, updates_per_epoch=len(self.loader)
            )
        smoothing = config.train.get("smoothing") or 0.0
        self.mixup = None
        self.loss: nn.Module = LabelSmoothingCrossEntropy(smoothing)
        if config.get("mixup"):
            if config.data.batch_size % 2:
                raise UserError(f"mixup needs an even data.batch_size, got {config.data.batch_size}")
            with reading("mixup"):
                self.mixup = Mixup(**config.mixup, label_smoothing=smoothing, num_classes=len(self.classes))
            self.loss = SoftTargetCrossEntropy()
        self.rows: list[dict[str, float]] = []  # of the log, one an epoch
        if resume is not None:
            self._resume(resume)

    def fit(self) -> Evaluation:
        """Train for the epochs that are left, and return the last evaluation."""
        main, steps = self.accelerator.is_main_process, len(self.loader)
        if main:
            make_folder(self.work_dir)
            write_config(self.config, self.work_dir / "config.py")
        evaluation = None
        with progress_bar(self.num_epochs * steps, len(self.rows) * steps, shown=main) as bar:
            for epoch in range(len(self.rows), self.num_epochs):
                train_loss = self._train_epoch(epoch, bar)
                if not math.isfinite(train_loss):
                    raise UserError(
                        f"the loss is {train_loss} in epoch {epoch + 1}: lower optimizer.lr or set train.clip_grad; "
                        f"the epochs before are in {self.work_dir}/last.pth"
                    )
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
        best_path = self.work_dir / "best.pth"
        if evaluation.top1 >= best or not best_path.exists():  # it may have resumed from another folder
            save_atomically(state, best_path)
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
                "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else {},
                "rows": self.rows,
                "random": _random_state(),
            },
        }

    def _resume(self, path: Path) -> None:
        state = read_trained(path)
        if "training" not in state:
            raise UserError(f"{path} holds weights only, not a run to go on with")
        training = state["training"]
        load_weights(self.accelerator.unwrap_model(self.model), training["model"], path)
        if self.ema is not None:
            load_weights(self.ema.module, state["model"], path)
        if state["meta"]["classes"] != self.classes:
            raise UserError(
                f"{path} was trained on other classes than the config's data has: resume with the same data"
            )
        if [set(group) for group in training["optimizer"]["param_groups"]] != [
            set(group) for group in self.optimizer.state_dict()["param_groups"]
        ]:
            raise UserError(
                f"{path} was trained with another optimizer: resume with the same optimizer.opt and weight_decay"
            )
        self.optimizer.load_state_dict(training["optimizer"])
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(training["scaler"])
        self.rows = training["rows"]
        # the learning rate follows from the epoch and this config, which may have more epochs than the last
        self.scheduler.step(len(self.rows))
        self.scheduler.step_update(len(self.rows) * len(self.loader))
        _set_random_state(training["random"])


def _random_state() -> dict[str, Any]:
    kind, keys, *rest = cast(tuple[Any, ...], np.random.get_state())
    return {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": [kind, keys.tolist(), *rest]}


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
