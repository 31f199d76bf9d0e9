"""Standardising the columns of a time series."""

import logging
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vim.errors import UserError

CONSTANT = 1e-12  # a standard deviation up to this fraction of the mean is rounding

_logger = logging.getLogger(__name__)


class Scaler(NamedTuple):
    """The columns' means and standard deviations, float64."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, values: np.ndarray, columns: list[str], source: str) -> "Scaler":
        """The scaler of rows (n, m), without their missing values; a constant column gets a deviation of 1.

        Raises:
            UserError: a column has only missing values.
        """
        missing = np.isnan(values)
        for i in np.flatnonzero(missing.all(0)):
            raise UserError(f"{source}: column {columns[i]} has no value: leave it out")
        count = (~missing).sum(0)
        mean = np.where(missing, 0.0, values).sum(0) / count
        std = np.sqrt(np.where(missing, 0.0, (values - mean) ** 2).sum(0) / count)
        constant = std <= CONSTANT * np.abs(mean).clip(1e-300)
        if constant.any():
            names = ", ".join(columns[i] for i in np.flatnonzero(constant)[:5])
            _logger.warning("%s: constant, and only shifted: %s", source, names)
        return cls(torch.from_numpy(mean), torch.from_numpy(np.where(constant, 1.0, std)))

    def scale(self, values: np.ndarray) -> Tensor:
        """Standardise values (n, m) in their own units; float32."""
        return ((torch.from_numpy(values) - self.mean) / self.std).float()

    def unscale(self, values: Tensor) -> Tensor:
        """Give scaled values of the first m columns, (..., m), back in their own units; float64."""
        m = values.shape[-1]
        return values.double() * self.std[:m] + self.mean[:m]
