"""Training of forecasters of time series."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from vim.data.loading import EpochBatches
from vim.data.series import Batch, Series
from vim.engine.files import make_folder
from vim.engine.launch import share_of
from vim.engine.log import logging_to
from vim.errors import UserError
from vim.options import SeriesRecipe
from vim.tasks.forecasting.baselines import LinearMap, fit_skip, score
from vim.tasks.forecasting.build import build_model, inputs_of, series_of, windows_of

# options of the data that a resumed run must have again
SAME = ("dataset", "split", "lookback", "horizon", "max_gap", "calendar", "known")


class Forecasting:
    """The task of a recipe with a series; see :class:`vim.engine.loop.Task`.

    Its batches are the same for any number of processes, together. The last, shorter one of an epoch is left out.

    Args:
        table: the series, if it is none that the recipe's `data` section can name.

    Raises:
        UserError: the series cannot be read, or does not fit the model.
    """

    def __init__(
        self, recipe: SeriesRecipe, work_dir: Path, accelerator: Accelerator, table: Series | None = None
    ) -> None:
        self.recipe, self.data, self.accelerator = recipe, recipe.data, accelerator
        self.series = series_of(self.data, table)
        make_folder(work_dir)
        with logging_to(work_dir / "train.log"):
            self.windows, self.scaler = windows_of(self.data, self.series)
        self.model = build_model(recipe.model, self.data, len(self.series.variates), self.series.static)
        if self.model.skip is not None:
            fit_skip(self.model.skip, LinearMap(self.windows["train"], self.windows["val"], self.data.batch_size))
        self.student: nn.Module = self.model
        share, count = share_of(accelerator), len(self.windows["train"])
        if count < share.world:
            raise UserError(f"there are {count} windows to train on, fewer than {share.world} processes")
        batch_size = min(self.data.batch_size, count // share.world)
        self.sampler = EpochBatches(count, batch_size, recipe.train.seed, share)
        self.batches_per_epoch = len(self.sampler)
        self.notes: dict[str, list[str]] = {}

    def batches(self, epoch: int, start: int) -> Iterator[Batch]:
        """Yield the training batches of an epoch from number `start` on."""
        self.sampler.epoch, self.sampler.start = epoch, start
        for keys in self.sampler:
            yield self.windows["train"].batch(torch.tensor([key.image for key in keys]))

    def loss(self, student: nn.Module, batch: Batch, average: nn.Module | None = None) -> Tensor:
        """Return the mean squared error of the values that were observed, not filled in."""
        y = student(*inputs_of(self.model, batch)).float()
        observed, target = batch.observed.to(y.device), batch.y.to(y.device)
        return mse_loss(torch.where(observed, y, target), target, reduction="sum") / observed.sum().clamp(min=1)

    def evaluate(self, model: nn.Module) -> Mapping[str, float]:
        """Return the errors on the validation part."""
        model.eval()
        with self.accelerator.autocast():
            found = score(
                lambda batch: model(*inputs_of(self.model, batch)),
                self.windows["val"],
                self.data.batch_size,
                self.accelerator,
            )
        return {"mse": found.mse, "mae": found.mae}

    def score(self, figures: Mapping[str, float]) -> float:
        """Return the negative squared error."""
        return -figures["mse"]

    def meta(self) -> dict[str, object]:
        """Return the options of the data, and what scales its columns."""
        return {
            "data": asdict(self.data),
            "columns": self.series.columns,
            "mean": self.scaler.mean,
            "std": self.scaler.std,
            "static": self.series.static,
            "seconds": self.series.seconds,
        }

    def identity(self) -> Mapping[str, object]:
        """Return the options of the data and a digest of the table, which must not change when a run is resumed."""
        options = {f"data.{name}": value for name, value in asdict(self.data).items() if name in SAME}
        table = {
            "list of columns": self.series.columns,
            "data.file or data.static, or other rows in it": self.series.digest(),
        }
        return {**options, **table}

    def order(self) -> Mapping[str, object]:
        """Return facts that the order of the windows within an epoch follows from."""
        processes, train = self.accelerator.num_processes, self.recipe.train
        return {"windows an update": self.data.batch_size * processes * train.accumulate, "train.seed": train.seed}
