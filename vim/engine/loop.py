"""The training loop of every task: epochs, updates, saves and logs.

Every random choice follows from the seed and from the position in the run; see :mod:`vim.data.loading`. So a run that
was killed continues exactly, and its checkpoints hold no random state.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch
from accelerate import Accelerator, DistributedType
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from vim.checkpoints import check_fit
from vim.data import seed_all
from vim.engine.build import build_optimizer, build_scheduler
from vim.engine.config import reading, write_recipe
from vim.engine.files import link_whole, make_folder, write_csv
from vim.engine.guards import StopRequest, advice, first_bad_layer
from vim.engine.log import Bar, logging_to, on_terminal, progress_bar, write_environment
from vim.engine.resuming import Position, check_names, check_optimizer, check_rows, refuse_changes
from vim.engine.schema import Meta, check
from vim.engine.statistics import running_statistics, share_statistics
from vim.engine.students import Student, own_weights
from vim.engine.trackers import Trackers
from vim.engine.weights import Save, State, save_last
from vim.errors import UserError
from vim.options import ImageTrainOptions, Recipe
from vim.registry import WEIGHTS_FROM, architecture

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # gathers a model that is spread over processes
# options of a model that may change when a run is resumed
RATES = ("drop_rate", "drop_path_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate")

Figures = Mapping[str, float]
Facts = Mapping[str, object]
Batch = TypeVar("Batch")

_logger = logging.getLogger(__name__)


class Task(Protocol[Batch]):
    """What a :class:`Loop` trains, and on what. A task knows neither epochs nor files.

    Attributes:
        model: the model that is saved and evaluated.
        student: the module that is trained: the model, or a :class:`Student` that holds it.
        batches_per_epoch: how many batches each process gets in an epoch.
        notes: lines that a resumed run continues with.
    """

    batches_per_epoch: int
    notes: dict[str, list[str]]

    @property
    def model(self) -> nn.Module: ...

    @property
    def student(self) -> nn.Module: ...

    def batches(self, epoch: int, start: int) -> Iterator[Batch]:
        """Yield the batches of an epoch from number `start` on, at least `batches_per_epoch` in all, or raise."""
        ...

    def loss(self, student: nn.Module, batch: Batch, average: nn.Module | None) -> Tensor:
        """Return the loss of a batch, a scalar. `student` may be wrapped for several processes.

        `average` is the running average of the model once it is to teach the model, otherwise None.
        """
        ...

    def evaluate(self, model: nn.Module) -> Figures:
        """Return the figures on held-out data, over all processes, of `model` or its running average."""
        ...

    def score(self, figures: Figures) -> float:
        """Return how good the figures are; higher is better."""
        ...

    def meta(self) -> dict[str, object]:
        """Return plain values and tensors that a checkpoint must hold besides the weights."""
        ...

    def identity(self) -> Facts:
        """Return facts that must be the same when a run is resumed, by the names users know them by."""
        ...

    def order(self) -> Facts:
        """Return facts that the order of samples within an epoch follows from."""
        ...


class Loop(Generic[Batch]):
    """A run of a task; :meth:`fit` trains it.

    Args:
        accelerator: of :func:`vim.engine.launch.launch`.
        work_dir: gets `last.pth` and the saves before it, `best.pth`, `log.csv`, `train.log`, `environment.txt` and
            `config.py`.
        resume: the save to resume from.

    Raises:
        UserError: the recipe does not fit the model, or the save does not fit the run.
    """

    def __init__(
        self,
        task: Task[Batch],
        recipe: Recipe,
        work_dir: Path,
        accelerator: Accelerator,
        resume: Save | None = None,
    ) -> None:
        self.task, self.recipe, self.options, self.work_dir = task, recipe, recipe.train, work_dir
        self.accelerator = accelerator
        self.trackers = Trackers(self.options.trackers, work_dir, recipe, shown=accelerator.is_main_process)
        self.stop = StopRequest(alone=accelerator.num_processes == 1)

        # the model, and what changes it
        self.architecture = architecture(recipe.model, task.model)
        check(self._meta(), Meta, "meta", work_dir / "last.pth")  # rather now than when it is read
        with reading("optimizer"):
            optimizer = build_optimizer(task.student, **recipe.optimizer)
        self.ema = ModelEmaV3(task.model, decay=self.options.ema_decay) if self.options.ema_decay else None
        if self.options.grad_checkpointing:
            checkpoint = getattr(task.model, "set_grad_checkpointing", None)
            if checkpoint is None:
                raise UserError(f"train.grad_checkpointing must be False for a {type(task.model).__name__}")
            checkpoint()
        if self.options.compile:
            task.student.compile()
        self._check_fsdp()
        self.student, self.optimizer = accelerator.prepare(task.student, optimizer)
        if self.ema is not None:
            self.ema.to(accelerator.device)
        self.running = running_statistics(task.student)

        # the schedule, in updates of the optimizer
        self.accumulate = self.options.accumulate
        self.updates = task.batches_per_epoch // self.accumulate  # of an epoch
        if self.updates == 0:
            raise UserError(f"train.accumulate is {self.accumulate}, and an epoch has {task.batches_per_epoch} batches")
        self.scheduler, self.num_epochs = build_scheduler(self.optimizer, recipe.schedule, self.updates)

        # the position
        self.at = Position()
        self.rows: list[dict[str, float]] = []  # of the log, one an epoch
        self.resumed_here = resume is not None and resume.path.resolve() == (work_dir / "last.pth").resolve()
        if resume is not None:
            self._resume(resume)
        # the rate follows from the position and this recipe, which may have more epochs than the resumed run had
        self.scheduler.step(self.at.epoch)
        self.scheduler.step_update(self.number)

    @property
    def number(self) -> int:
        """How many updates of the run are done."""
        return self.at.epoch * self.updates + self.at.update

    def _check_fsdp(self) -> None:
        if self.accelerator.distributed_type == DistributedType.FSDP:
            if not self.accelerator.is_fsdp2:
                raise UserError("FSDP must be of version 2: set fsdp_version: 2 in accelerate's config")
            if self.ema is not None:
                raise UserError("train.ema_decay and FSDP do not go together: use DDP, or set train.ema_decay=None")

    # Training

    def fit(self) -> bool:
        """Train for the epochs that are left. Return False if a signal came, after saving the run.

        Raises:
            UserError: losses or figures are not finite, or memory or disk are full. The message says what to do.
        """
        main = self.accelerator.is_main_process
        make_folder(self.work_dir)
        with (
            advice(self.work_dir),
            logging_to(self.work_dir / "train.log", shown=main and not on_terminal()),
            self.stop.watch(),
            self.trackers,
            progress_bar(self.num_epochs * self.updates, self.number, shown=main) as bar,
        ):
            if main:
                write_recipe(self.recipe, self.work_dir / "config.py")
                write_environment(self.work_dir / "environment.txt", self.accelerator)
                if self.resumed_here:
                    self._finish_epoch()
            if self._is_done():  # a finished run that is resumed: evaluate it once more
                self._evaluate()
            while not self._is_done():
                if not self._train_epoch(bar):
                    return False
                figures = self._evaluate()
                bar.evaluated(figures)
                self._end_epoch(figures)
                if not self._is_done() and self._stopping():
                    return False
            if main and self.at.epoch < self.num_epochs:
                _logger.info("stopped early: the last %s epochs were no better", self.options.patience)
        return True

    def _is_done(self) -> bool:
        scores = [self.task.score(row) for row in self.rows]
        without_gain = len(scores) - 1 - scores.index(max(scores)) if scores else 0
        patience = self.options.patience
        return self.at.epoch >= self.num_epochs or (patience is not None and without_gain >= patience)

    def _train_epoch(self, bar: Bar) -> bool:
        """Do the updates that are left in the epoch. Return False if a signal came, after saving the run."""
        self.student.train()
        every = self.options.save_updates
        rank = self.accelerator.process_index
        seed_all(self.options.seed, self.at.epoch, rank)  # the workers of a stream draw their seeds from this
        batches = self.task.batches(self.at.epoch, self.at.update * self.accumulate)
        for _ in range(self.at.update, self.updates):
            figures, stop = self._update(list(islice(batches, self.accumulate)), self.number)
            self.at.update += 1
            bar.step(self.at.epoch + 1, figures["loss"])
            self.trackers.add({f"train/{name}": value for name, value in figures.items()}, self.number)
            if stop or self.at.update == self.updates or (every and self.at.update % every == 0):
                self._save()
            if stop:
                return False
        return True

    def _update(self, batches: Sequence[Batch], number: int) -> tuple[Figures, bool]:
        """Do one update. Return its figures, averaged over all processes, and whether a signal came to one of them."""
        # forward and backward; gradients are exchanged with the last batch
        running = [buffer.clone() for buffer in self.running]
        total = torch.zeros(2, device=self.accelerator.device)
        for i, batch in enumerate(batches):
            last = i == len(batches) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.student):
                losses = self._losses(self.student, batch, number, i) / len(batches)
                self.accelerator.backward(losses[0])
            total += losses.detach()

        # the only transfer to the host: whether to take the step must be known before it
        self.accelerator.unscale_gradients()
        parameters = [parameter for parameter in self.student.parameters() if parameter.grad is not None]
        norm = get_total_norm([parameter.grad for parameter in parameters])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        came = total.new_full((), float(self.stop.came is not None))
        reduced = self.accelerator.reduce(torch.stack([*total, norm.to(total.dtype), came]), "mean")
        mean, aux, norm_on_host, stop = reduced.tolist()
        finite = math.isfinite(mean) and math.isfinite(norm_on_host)

        # the step; in float16 the scaler skips it by itself, and then tries a smaller scale
        if finite and self.options.clip_grad is not None:
            clip_grads_with_norm_(parameters, self.options.clip_grad, norm)
        if finite or self.accelerator.scaler is not None:
            self.optimizer.step()
        if finite:
            if self.ema is not None:
                self.ema.update(self.task.model, step=number)
            self.at.skipped = 0
            self.at.counted += 1
            self.at.losses += mean
            self.at.aux += aux
        else:
            self._skip(batches, number, mean, running)
        self.optimizer.zero_grad()
        self.scheduler.step_update(number + 1)
        return {"loss": mean, "lr": self._rate(), **self._balance(aux)}, stop > 0

    def _losses(self, student: nn.Module, batch: Batch, number: int, i: int) -> Tensor:
        """Return the loss of batch `i` of an update, and what of it balances a model's experts, (2,).

        Random choices follow from the batch's place in the run.
        """
        seed_all(self.options.seed, number, i, self.accelerator.process_index)
        with self.accelerator.autocast():
            loss = self.task.loss(student, batch, self._teacher())
        aux = getattr(self.task.model, "aux_loss", None)
        aux = torch.zeros_like(loss) if aux is None else aux
        return torch.stack([loss + aux, aux.detach()])

    def _balance(self, aux: float) -> Figures:
        """Return what balances a model's experts as a figure, if it has any to balance."""
        return {} if getattr(self.task.model, "aux_loss", None) is None else {"aux_loss": aux}

    def _teacher(self) -> nn.Module | None:
        """Return the running average, once the recipe wants it as a teacher."""
        options = self.options
        if self.ema is None or not isinstance(options, ImageTrainOptions) or options.mesa == 0:
            return None
        return self.ema.module if self.at.epoch > options.mesa_start * self.num_epochs else None

    def _skip(self, batches: Sequence[Batch], number: int, loss: float, running: Sequence[Tensor]) -> None:
        """Leave the model as it was, log the first layer that is not finite, and raise if it goes on."""
        student = self.accelerator.unwrap_model(self.student)
        repeat = (self._losses(student, batch, number, i) for i, batch in enumerate(batches))
        where = first_bad_layer(self.task.model, lambda: list(repeat))
        for buffer, before in zip(self.running, running, strict=True):
            buffer.copy_(before)
        self.at.skipped += 1
        most = self.options.max_skipped
        searching = self.accelerator.scaler is not None and math.isfinite(loss)  # for the scale of float16
        level = logging.INFO if searching else logging.WARNING
        _logger.log(level, "update %d skipped, the loss is %s: %s is not finite", number + 1, loss, where)
        if self.at.skipped >= most:
            raise UserError(
                f"{most} updates in a row were skipped, the last with a loss of {loss}: {where} is not finite; lower "
                f"optimizer.lr, set train.clip_grad or train.amp=bf16, then go on with --resume from {self.work_dir}"
            )

    def _stopping(self) -> bool:
        """Return whether a signal came to one of the processes."""
        came = torch.full((), float(self.stop.came is not None), device=self.accelerator.device)
        return self.accelerator.reduce(came).item() > 0

    def _rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    # The end of an epoch

    def _evaluate(self) -> Figures:
        model = self.task.model if self.ema is None else self.ema.module
        share_statistics(model)
        figures = self.task.evaluate(model)
        for name, value in figures.items():
            if not math.isfinite(value):
                before = f"; the run in {self.work_dir} is saved up to before" if self.rows else ""
                raise UserError(
                    f"the held-out {name} of epoch {self.at.epoch + 1} is {value}: lower optimizer.lr, or set "
                    f"train.clip_grad{before}"
                )
        return figures

    def _end_epoch(self, figures: Figures) -> None:
        mean, aux = (total / max(self.at.counted, 1) for total in (self.at.losses, self.at.aux))
        row = {"epoch": self.at.epoch + 1, "lr": self._rate(), "train_loss": mean}
        self.rows.append({**row, **self._balance(aux), **figures})
        self.trackers.add({f"epoch/{name}": value for name, value in self.rows[-1].items()}, self.number)
        if self.accelerator.is_main_process:
            _logger.info(", ".join(f"{name} {value:.6g}" for name, value in self.rows[-1].items()))
        self.at = Position(self.at.epoch + 1)
        self.scheduler.step(self.at.epoch)
        self._save()
        if self.accelerator.is_main_process:
            self._finish_epoch()

    def _finish_epoch(self) -> None:
        """Write best.pth and log.csv from last.pth; repeated on resuming, since a kill may have come in between."""
        if not self.rows:
            return
        last, best = self.work_dir / "last.pth", self.work_dir / "best.pth"
        at_end_of_epoch = self.at.update == 0 and last.exists()
        is_best = self.task.score(self.rows[-1]) == max(self.task.score(row) for row in self.rows)
        if at_end_of_epoch and (is_best or not best.exists()):  # the run may have been resumed from another folder
            link_whole(last, best)
        write_csv(self.work_dir / "log.csv", self.rows)

    # Saves

    def _save(self) -> None:
        state = self._state()
        if self.accelerator.is_main_process:
            for name, weight in state["training"]["model"].items():
                if not weight.isfinite().all():
                    raise UserError(
                        f"{name} is not finite after update {self.number}: lower optimizer.lr, or set train.clip_grad; "
                        f"the saves in {self.work_dir} are of before"
                    )
            save_last(state, self.work_dir, self.options.keep)
        self.accelerator.wait_for_everyone()

    def _state(self) -> State:
        trained, optimizer = get_state_dict(self.student, self.optimizer.optimizer, options=WHOLE)
        raw = own_weights(trained) if isinstance(self.task.student, Student) else trained
        return {
            "model": raw if self.ema is None else self.ema.module.state_dict(),  # to be used
            "meta": self._meta(),
            "training": {
                "model": trained,
                "student": isinstance(self.task.student, Student),
                "optimizer": optimizer,
                "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else {},
                "rows": self.rows,
                "position": asdict(self.at),
                "identity": self._identity(),
                "order": dict(self.task.order()),
                "notes": self.task.notes,
            },
        }

    def _meta(self) -> dict[str, object]:
        return {"model": self.architecture, **self.task.meta()}

    def _identity(self) -> dict[str, object]:
        options = {name: value for name, value in self.recipe.model.items() if name not in (*WEIGHTS_FROM, *RATES)}
        model = {f"model.{name}": value for name, value in options.items()}
        return {**model, "optimizer.opt": self.recipe.optimizer.get("opt", "sgd"), **self.task.identity()}

    def _resume(self, save: Save) -> None:
        path, state = save
        training = state.get("training")
        if training is None:
            raise UserError(f"{path} holds weights only, not a run to resume")
        # the same function on the same data, trained by the same optimizer
        refuse_changes(training["identity"], self._identity(), f"{path} was trained with another {{}}")
        check_fit(training["model"], self.accelerator.unwrap_model(self.student), path)
        if training["position"]["update"]:
            refuse_changes(
                training["order"],
                self.task.order(),
                f"{path} was saved within an epoch, whose order follows from {{}}",
            )
        check_rows(training["rows"], training["position"], path, score=self.task.score, updates=self.updates)
        check_names(training["notes"], self.task.notes, "the notes", path)
        own = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        fresh = get_optimizer_state_dict(self.student, self.optimizer.optimizer, options=WHOLE)
        if self.accelerator.is_main_process:  # the gathered state is nowhere else
            check_optimizer(training["optimizer"], fresh, path)

        # weights and the optimizer's state; its options are those of this recipe, such as the rate to start from
        if self.ema is not None:
            check_fit(state["model"], self.ema.module, path)
            self.ema.module.load_state_dict(state["model"])
        set_model_state_dict(self.student, training["model"], options=WHOLE)
        if training["optimizer"]["state"]:  # plain SGD has none, which torch refuses
            optimizer = self.optimizer.optimizer
            set_optimizer_state_dict(self.student, optimizer, training["optimizer"], options=WHOLE)
        for group, options in zip(self.optimizer.param_groups, own, strict=True):
            group.update(options)
        if self.accelerator.scaler:
            check_names(training["scaler"], self.accelerator.scaler.state_dict(), "train.amp=fp16", path)
            self.accelerator.scaler.load_state_dict(training["scaler"])
        self.rows, self.at = training["rows"], Position(**training["position"])
        self.task.notes.update(training["notes"])
