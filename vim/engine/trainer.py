"""The training loop.

Every random choice follows from the seed and from where in the run it is made; see :mod:`vim.data.loading`. So a run
that was killed goes on exactly, without any random state in its checkpoints.
"""

import itertools
import logging
import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import timm
import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import GradientAccumulationPlugin, gather_object
from mmengine.config import Config
from PIL import Image
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.data import DataLoader, IterableDataset

import vim  # noqa: F401  registers the models
from vim.checkpoints import check_fit
from vim.data import (
    Batch,
    Share,
    Splits,
    build_datasets,
    create_loader,
    eval_transform,
    image_mode,
    input_shape,
    num_frames,
    seed_all,
    train_transform,
    video_eval_transform,
    video_train_transform,
)
from vim.engine.config import reading, write_config
from vim.engine.evaluate import Evaluation, evaluate
from vim.engine.files import link_whole, make_folder, write_csv
from vim.engine.guards import StopRequest, advice, first_bad_layer
from vim.engine.launch import join_processes
from vim.engine.log import (
    Bar,
    Trackers,
    logging_to,
    plot_confusion,
    plot_curves,
    progress_bar,
    write_environment,
)
from vim.engine.objectives import Distilled, Student, distance, published_layer_decay, weights_of_model
from vim.engine.weights import load_weights, read_trained, save_last
from vim.errors import UserError

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # also of a model spread over processes

WEIGHTS_FROM = ("pretrained", "pretrained_cfg_overlay")  # of a model's options, where its first weights come from

_logger = logging.getLogger(__name__)


def build_model(options: dict[str, Any]) -> nn.Module:
    """The timm model that a config's `model` section describes.

    Raises:
        UserError: no such model, or an option it does not take.
    """
    with reading("model"):
        model = timm.create_model(**options)
    if not (hasattr(model, "in_chans") and hasattr(model, "patch_embed")):
        raise UserError(f"model.model_name must be a model of patches, such as vim_nano, got {options['model_name']}")
    return model


def _build_optimizer(model: Any, *, published_decay: bool = False, **options: Any) -> torch.optim.Optimizer:
    """timm's, over timm's groups of parameters or VideoMamba's."""
    if isinstance(model, Student) and options.get("layer_decay"):
        raise ValueError("layer_decay and a teacher do not go together")
    if published_decay:
        if not options.get("layer_decay"):
            raise ValueError("published_decay is a way of layer_decay: set that too, to a number such as 0.75")
        decay = {"layer_decay": options.pop("layer_decay"), "weight_decay": options["weight_decay"]}
        options["param_group_fn"] = partial(published_layer_decay, **decay)
    optimizer = create_optimizer_v2(model, **options)
    if getattr(optimizer, "is_second_order", False):
        raise ValueError(f"opt must not be {options['opt']!r}, which needs second derivatives")
    return optimizer


def build_loader(
    data: dict[str, Any], dataset: Any, model: nn.Module, share: Share, *, seed: int = 0, is_training: bool
) -> DataLoader[Any]:
    """Batches of images (b, c, h, w) or clips (b, c, t, h, w), prepared for the model, for one of several processes.

    Raises:
        UserError: an option of the transform that does not exist, or a batch larger than the training set.
    """
    section = "train_transform" if is_training else "eval_transform"
    frames = num_frames(model)
    makers: Any = (video_train_transform, video_eval_transform) if frames else (train_transform, eval_transform)
    make = makers[0] if is_training else makers[1]
    _check_frames(getattr(dataset, "num_frames", None), frames, dynamic=getattr(model, "dynamic_img_size", False))
    with reading(f"data.{section}"):
        transform = make(model, data.get(section, {}))
        image = Image.new(image_mode(model), (40, 30))
        made, wanted = transform([image] * frames if frames else image).shape, input_shape(model)
        if tuple(made) != wanted:
            raise ValueError(f"it makes images of {tuple(made)}, and the model takes {wanted}")
    return create_loader(
        dataset,
        transform,
        batch_size=data["batch_size"],
        num_workers=data["num_workers"],
        seed=seed,
        share=share,
        is_training=is_training,
        repeats=(data.get("repeats") or 1) if is_training else 1,
        samples=(data.get("samples") or 1) if is_training else 1,
    )


def _check_frames(data: int | None, model: int | None, *, dynamic: bool) -> None:
    if data and not model:
        raise UserError(f"the data are videos, and the model is for images: --cfg-options model.num_frames={data}")
    if model and not data:
        raise UserError(f"the data are images, and the model is for clips of {model} frames: take one for images")
    if data != model and not dynamic:
        raise UserError(f"data.video.num_frames is {data}, and model.num_frames {model}: make them equal")


@dataclass
class Position:
    """Where a run is: how many updates of an epoch are done, and the sum of their losses."""

    epoch: int = 0
    update: int = 0
    losses: float = 0.0
    counted: int = 0  # updates that were not skipped
    skipped: int = 0  # updates in a row


class Trainer:
    """A run: what a config describes, built; and :meth:`fit`, which trains it.

    Args:
        work_dir: gets `last.pth` and the ones before it, `best.pth`, `log.csv`, `train.log`, `environment.txt`,
            `unreadable.txt`, `curves.png`, `confusion.png` and `config.py`.
        resume: a checkpoint to go on from.

    Raises:
        UserError: the config does not fit the model or the data, or the checkpoint the model.
    """

    def __init__(self, config: Config, work_dir: Path, resume: Path | None = None) -> None:
        self.config, self.work_dir, self.options = config, work_dir, config.train
        self.teacher: Any = None
        join_processes()
        self.accelerator = Accelerator(
            mixed_precision=self.options.get("amp") or "no",
            # not that of `accelerate launch`, by which it would divide the loss once more
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        )
        share = Share(self.accelerator.process_index, self.accelerator.num_processes)
        seed_all(self.options.seed)
        if config.train.get("amp") == "fp16" and self.accelerator.device.type == "cpu":
            raise UserError("train.amp=fp16 is for GPUs: take bf16 or no")
        model: Any = build_model({**config.model, **({"pretrained": False} if resume else {})})
        splits = build_datasets(config.data, image_mode(model))
        self.classes = self._classes(splits, model)
        with reading("teacher"):
            student = self._with_teacher(model)
        with reading("optimizer"):
            optimizer = _build_optimizer(student, **config.optimizer)
        self.ema = ModelEmaV3(model, decay=self.options.ema_decay) if self.options.get("ema_decay") else None
        self.loader = build_loader(config.data, splits.train, model, share, seed=self.options.seed, is_training=True)
        self.held_out = build_loader(config.data, splits.held_out, model, share, is_training=False)
        self.accumulate = self.options.get("accumulate") or 1
        self.updates = len(self.loader) // self.accumulate  # an epoch
        if self.updates == 0:
            raise UserError(f"train.accumulate is {self.accumulate}, and an epoch has {len(self.loader)} batches")
        if self.options.get("grad_checkpointing"):
            model.set_grad_checkpointing()
        if self.options.get("compile"):
            student.compile()
        self.model, self.optimizer = self._spread(student, optimizer)
        if self.ema is not None:
            self.ema.to(self.accelerator.device)
        if config.schedule.get("sched") == "plateau":
            raise UserError("schedule.sched cannot be 'plateau', which is no function of the epoch: take 'cosine'")
        with reading("schedule"):
            self.scheduler, self.num_epochs = create_scheduler_v2(
                self.optimizer, **config.schedule, updates_per_epoch=self.updates
            )
            if self.scheduler is None:
                raise ValueError(f"sched must name a schedule such as 'cosine', got {config.schedule.sched!r}")
            self._set_rate(self.num_epochs - 1, self.updates)
        self._build_loss()
        self.at = Position()
        self.rows: list[dict[str, float]] = []  # of the log, one an epoch
        self.unreadable: dict[str, list[str]] = {"train": [], "val": []}  # lines on images, in the order they were met
        self.stop = StopRequest()
        self.resumed_here = resume is not None and resume.resolve() == (work_dir / "last.pth").resolve()
        if resume is not None:
            self._resume(resume)
        # it follows from the position and this config, which may have more epochs than the one resumed from
        self._set_rate(self.at.epoch, self.at.update)

    def _set_rate(self, epoch: int, update: int) -> None:
        """Have the learning rate that the schedule has there."""
        self.scheduler.step(epoch)
        self.scheduler.step_update(epoch * self.updates + update)

    def _classes(self, splits: Splits, model: Any) -> list[str]:
        """The names of the data's classes; numbers where it has none."""
        classes = splits.classes or [str(i) for i in range(model.num_classes)]
        if model.num_classes != len(classes):
            raise UserError(
                f"the data has {len(classes)} classes and the model {model.num_classes}: "
                f"--cfg-options model.num_classes={len(classes)}"
            )
        for part, dataset in (("train", splits.train), ("val", splits.held_out)):
            most = max((video.label for video in getattr(dataset, "videos", [])), default=0)
            if most >= len(classes):
                raise UserError(
                    f"a video of {part} has label {most}, and the model {len(classes)} classes: "
                    f"--cfg-options model.num_classes={most + 1}"
                )
        return classes

    def _with_teacher(self, model: nn.Module) -> nn.Module:
        """The model, and what it needs to learn from the teacher that the config names, if it does."""
        if "teacher" not in self.config:
            return model
        self.teacher = timm.create_model(**self.config.teacher).eval().requires_grad_(False)
        self.teacher.to(self.accelerator.device)
        return Distilled(model, self.teacher)

    def _spread(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """The two as accelerate is configured: DDP, FSDP, or as they are."""
        if self.accelerator.distributed_type == DistributedType.FSDP:
            if not self.accelerator.is_fsdp2:
                raise UserError("FSDP must be of version 2: set fsdp_version: 2 in accelerate's config")
            if self.ema is not None:
                raise UserError("train.ema_decay and FSDP do not go together: use DDP, or set train.ema_decay=None")
        return self.accelerator.prepare(model, optimizer)

    def _build_loss(self) -> None:
        smoothing = self.options.get("smoothing") or 0.0
        self.mixup = None
        self.loss: nn.Module = LabelSmoothingCrossEntropy(smoothing)
        if self.config.get("mixup"):
            if self.config.data.batch_size % 2:
                raise UserError(f"mixup needs an even data.batch_size, got {self.config.data.batch_size}")
            with reading("mixup"):
                self.mixup = Mixup(**self.config.mixup, label_smoothing=smoothing, num_classes=len(self.classes))
                self.mixup(torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.long))
                if self.mixup.mode not in ("batch", "pair", "elem"):
                    raise ValueError(f"mode must be 'batch', 'pair' or 'elem', got {self.mixup.mode!r}")
            self.loss = SoftTargetCrossEntropy()

    @property
    def bare_model(self) -> nn.Module:
        """The model without what spreads it over processes, and what learns from a teacher."""
        model = self.accelerator.unwrap_model(self.model)
        return model.model if isinstance(model, Student) else model

    def fit(self) -> Evaluation | None:
        """Train for the epochs that are left, and return the last evaluation; None if SIGTERM came: it has saved then.

        Raises:
            UserError: the loss stays infinite, images cannot be read, memory or disk are full; what to do is said.
        """
        main = self.accelerator.is_main_process
        make_folder(self.work_dir)
        evaluation = None
        done = self.at.epoch * self.updates + self.at.update
        with (
            advice(self.work_dir),
            logging_to(self.work_dir / "train.log"),
            self.stop.watch(),
            Trackers(self.options.get("trackers") or (), self.work_dir, self.config, shown=main) as self.trackers,
            progress_bar(self.num_epochs * self.updates, done, shown=main) as bar,
        ):
            if main:
                write_config(self.config, self.work_dir / "config.py")
                write_environment(self.work_dir / "environment.txt", self.accelerator)
                if self.resumed_here:
                    self._finish_epoch_end()
            while self.at.epoch < self.num_epochs:
                if not self._train_epoch(bar):
                    return None
                evaluation = self._evaluate()
                self._note_unreadable(gather_object(self.unreadable["train"]), "train", tell=False)  # each told its own
                self._note_unreadable(evaluation.unreadable, "val", tell=self.accelerator.is_main_process)
                bar.evaluated(evaluation.top1)
                self._end_epoch(evaluation)
                if self.at.epoch < self.num_epochs and self._stopping():
                    return None
            evaluation = evaluation or self._evaluate()
        if main:
            plot_curves(self.work_dir / "curves.png", self.rows)
            if self.classes:
                plot_confusion(self.work_dir / "confusion.png", evaluation.confusion, self.classes)
        return evaluation

    def _stopping(self) -> bool:
        """Whether SIGTERM has come to one of the processes."""
        flag = torch.tensor(float(self.stop.came), device=self.accelerator.device)
        return self.accelerator.reduce(flag).item() > 0

    def _train_epoch(self, bar: Bar) -> bool:
        """Do the updates left in the epoch; False if SIGTERM came."""
        self.model.train()
        every = self.options.get("save_updates")
        for batches in self._batches_left():
            number = self.at.epoch * self.updates + self.at.update
            if len(batches) < self.accumulate:
                raise UserError(
                    f"epoch {self.at.epoch + 1} ended after {self.at.update} of {self.updates} updates: the stream has "
                    f"fewer than the {len(cast(Any, self.loader.dataset))} images it was said to have"
                )
            loss, stop = self._update(batches, number)
            self.at.update += 1
            bar.step(self.at.epoch + 1, loss)
            self.trackers.add({"train/loss": loss, "train/lr": self.optimizer.param_groups[0]["lr"]}, number + 1)
            if stop or self.at.update == self.updates or (every and self.at.update % every == 0):
                self._save()
            if stop:
                return False
        return True

    def _batches_left(self) -> Iterator[list[Batch]]:
        """The batches of each update that is left in the epoch."""
        seen = self.at.update * self.accumulate
        seed_all(self.options.seed, self.at.epoch, self.accelerator.process_index)  # a stream's workers draw from it
        dataset: Any = self.loader.dataset
        sampler: Any = self.loader.batch_sampler
        if not hasattr(sampler, "epoch"):  # it can only be read from its beginning
            dataset.epoch = self.at.epoch
            batches: Iterator[Batch] = itertools.islice(self.loader, seen, None)
        else:
            sampler.epoch, sampler.start = self.at.epoch, seen
            batches = iter(self.loader)
        for _ in range(self.at.update, self.updates):
            yield list(itertools.islice(batches, self.accumulate))

    def _update(self, batches: list[Batch], number: int) -> tuple[float, bool]:
        """One step of the optimizer: the loss over all processes, and whether SIGTERM came to one of them."""
        total = torch.zeros((), device=self.accelerator.device)
        seen: list[Tensor] = []
        for i, batch in enumerate(batches):
            self._note_unreadable(batch.unreadable, "train")
            seed_all(self.options.seed, number, i, self.accelerator.process_index)
            images, targets = self._to_device(batch)
            seen.append(images)
            last = i == len(batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                with self.accelerator.autocast():
                    loss = self._loss(images, targets) / len(batches)
                self.accelerator.backward(loss)
            total += loss.detach()
        self.accelerator.unscale_gradients()
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = get_total_norm([parameter.grad for parameter in parameters])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        reduced = self.accelerator.reduce(
            torch.stack([total, torch.tensor(float(self.stop.came), device=total.device)]), "mean"
        )
        mean, stop = (float(value) for value in reduced)
        finite = math.isfinite(mean) and math.isfinite(float(norm))
        if finite and self.options.get("clip_grad"):
            clip_grads_with_norm_(parameters, self.options.clip_grad, norm)
        if finite or self.accelerator.scaler is not None:  # which skips by itself, and then tries a smaller scale
            self.optimizer.step()
        if finite:
            if self.ema is not None:
                self.ema.update(self.bare_model, step=number)
            self.at.skipped = 0
            self.at.counted += 1
            self.at.losses += mean
        else:
            self._skip(seen, number, mean)
        self.optimizer.zero_grad()
        self.scheduler.step_update(number + 1)
        return mean, stop > 0

    def _loss(self, images: Tensor, targets: Tensor) -> Tensor:
        if self.teacher is None:
            return self.loss(self.model(images), targets)
        logits, tokens = self.model(images)
        with torch.no_grad():
            wanted = self.teacher.forward_features(images)
        return self.loss(logits, targets) + distance(tokens, wanted)

    def _to_device(self, batch: Batch) -> tuple[Tensor, Tensor]:
        images, targets = (tensor.to(self.accelerator.device, non_blocking=True) for tensor in batch[:2])
        if self.mixup is None:
            return images, targets
        mixed, targets = self.mixup(images.flatten(1, -3), targets)  # to it, the frames of a clip are channels
        return mixed.view(images.shape), targets

    def _skip(self, seen: list[Tensor], number: int, loss: float) -> None:
        """Leave the weights as they are; say where it went wrong, and stop if it goes on."""

        def run() -> None:
            with self.accelerator.autocast():
                for images in seen:
                    self.bare_model(images)

        where = first_bad_layer(self.bare_model, run)
        self.at.skipped += 1
        most = self.options.get("max_skipped") or 10
        usual = self.accelerator.scaler is not None and math.isfinite(loss)  # while it looks for the scale
        level = logging.INFO if usual else logging.WARNING
        _logger.log(level, "update %d skipped, the loss is %s: %s is not finite", number + 1, loss, where)
        if self.at.skipped >= most:
            raise UserError(
                f"{most} updates in a row were skipped, the last with a loss of {loss}: {where} is not finite; lower "
                f"optimizer.lr, set train.clip_grad or train.amp=bf16, then go on with --resume from {self.work_dir}"
            )

    def _note_unreadable(self, lines: list[str], part: str, *, tell: bool = True) -> None:
        known, told = self.unreadable[part], self.work_dir / "unreadable.txt"
        new = [line for line in dict.fromkeys(lines) if line not in known]
        known += new
        if new and tell:
            for line in new:
                _logger.warning("left out: %s", line)
            with told.open("a") as file:
                file.writelines(f"{line}\n" for line in new)
        dataset = cast(Any, self.loader if part == "train" else self.held_out).dataset.dataset
        count, most = getattr(dataset, "num_images", len(dataset)), self.config.data.get("max_unreadable")
        most = 0.01 if most is None else most
        if new and len(known) > most * count:
            raise UserError(
                f"{len(known)} of {count} images cannot be read, more than data.max_unreadable ({most:.2%}): "
                f"see {told}; {'; '.join(known)}"
            )

    def _evaluate(self) -> Evaluation:
        model = self.bare_model if self.ema is None else self.ema.module
        return evaluate(model, self.held_out, self.accelerator, len(self.classes))

    def _end_epoch(self, evaluation: Evaluation) -> None:
        lr = self.optimizer.param_groups[0]["lr"]
        row = {"epoch": self.at.epoch + 1, "lr": lr, "train_loss": self.at.losses / max(self.at.counted, 1)}
        self.rows.append({**row, "loss": evaluation.loss, "top1": evaluation.top1, "top5": evaluation.top5})
        self.trackers.add(
            {f"epoch/{key}": value for key, value in self.rows[-1].items()}, self.updates * (self.at.epoch + 1)
        )
        self.at = Position(self.at.epoch + 1)
        self.scheduler.step(self.at.epoch)
        self._save()
        if self.accelerator.is_main_process:
            self._finish_epoch_end()

    def _finish_epoch_end(self) -> None:
        """Keep the best and write the log; again on resuming, where a kill may have come before."""
        if not self.rows:
            return
        last, best = self.work_dir / "last.pth", self.work_dir / "best.pth"
        at_end_of_epoch = self.at.update == 0 and last.exists()
        is_best = self.rows[-1]["top1"] == max(row["top1"] for row in self.rows)
        if at_end_of_epoch and (is_best or not best.exists()):  # it may have resumed from another folder
            link_whole(last, best)
        write_csv(self.work_dir / "log.csv", self.rows)

    def _save(self) -> None:
        state = self._state()
        if self.accelerator.is_main_process:
            save_last(state, self.work_dir, self.options.get("keep") or 1)
        self.accelerator.wait_for_everyone()

    def _state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer.optimizer, options=WHOLE)
        return {
            "model": weights_of_model(model) if self.ema is None else self.ema.module.state_dict(),  # to be used
            "meta": {
                "model": {key: value for key, value in self.config.model.to_dict().items() if key not in WEIGHTS_FROM},
                "classes": self.classes,
                "eval_transform": dict(self.config.data.get("eval_transform", {})),
            },
            "training": {
                "model": model,
                "optimizer": optimizer,
                "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else {},
                "rows": self.rows,
                "position": asdict(self.at),
                "order": self._order(),
                "unreadable": self.unreadable,
            },
        }

    def _order(self) -> dict[str, int]:
        """What the order of the images within an epoch follows from."""
        dataset = cast(Any, self.loader.dataset).dataset
        order = {
            "the number of images": len(dataset),
            "images an update": self.config.data.batch_size * self.accelerator.num_processes * self.accumulate,
            "data.repeats": self.config.data.get("repeats") or 1,
            "data.samples": self.config.data.get("samples") or 1,
            "train.seed": self.options.seed,
        }
        if isinstance(dataset, IterableDataset):  # its images are spread over what reads it
            order |= {"data.num_workers": self.config.data.num_workers, "processes": self.accelerator.num_processes}
        return order

    def _resume(self, path: Path) -> None:
        state = read_trained(path)
        if "training" not in state:
            raise UserError(f"{path} holds weights only, not a run to go on with")
        training = state["training"]
        check_fit(training["model"], self.accelerator.unwrap_model(self.model), path)
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
        own = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        states = {"model_state_dict": training["model"], "optim_state_dict": training["optimizer"]}
        set_state_dict(self.model, self.optimizer.optimizer, **states, options=WHOLE)
        for group, options in zip(self.optimizer.param_groups, own, strict=True):
            group.update(options)  # as this config has them: weight decay, or the rates a schedule starts from
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(training["scaler"])
        self.rows, self.at = training["rows"], Position(**training["position"])
        self.unreadable = training["unreadable"]
        changed = [key for key, value in self._order().items() if training["order"].get(key, value) != value]
        if self.at.update and changed:
            key = changed[0]
            raise UserError(
                f"{path} was saved within an epoch, whose order follows from {key}: it was {training['order'][key]}, "
                f"and is now {self._order()[key]}; resume with the same"
            )
