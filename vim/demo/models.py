"""The models that the demo offers."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from vim.command_line import sibling
from vim.engine.weights import read_run
from vim.errors import UserError
from vim.tasks.classification.predict import Predictor
from vim.tasks.forecasting.build import Forecaster, load_forecaster

RUNS = Path("work_dirs")  # where `train` and `forecast train` put their runs
# what trains a model of each kind, without a download
COMMANDS = {
    "images": sibling("train", "vim/vim-nano_1xb64_digits.py"),
    "videos": sibling("train", "videomamba/videomamba-causal-test_digit-motion.py"),
    "series": sibling("forecast", "train", "tsm2/tsm2_vic-elec_24.py"),
}

M = TypeVar("M")
_logger = logging.getLogger(__name__)


@dataclass
class Models:
    """The models of each kind, by the names that the lists show."""

    images: dict[str, Predictor] = field(default_factory=dict)
    videos: dict[str, Predictor] = field(default_factory=dict)
    series: dict[str, Forecaster] = field(default_factory=dict)

    def add(self, name: str, model: Predictor | Forecaster) -> None:
        """Offer a model in the list of its kind."""
        if isinstance(model, Forecaster):
            self.series[name] = model
        else:
            (self.images if model.num_frames is None else self.videos)[name] = model


def load(paths: Iterable[Path], model_name: str | None = None) -> Models:
    """Load checkpoints of any kind.

    Args:
        model_name: the timm name of the model that the files are published weights for.

    Raises:
        UserError: one cannot be read.
    """
    models = Models()
    for path in paths:
        models.add(str(path), Predictor.from_pretrained(model_name, path) if model_name else _read(path))
    return models


def find(folder: Path = RUNS) -> Models:
    """Load the best checkpoints of the runs in a folder, by their names; log a warning for each that cannot be read."""
    models = Models()
    for path in sorted(folder.glob("*/best.pth")):
        try:
            models.add(path.parent.name, _read(path))
        except UserError as error:
            _logger.warning("left out: %s", error)
    return models


def chosen(models: dict[str, M], name: str | None) -> M:
    """Return the model of a name in a list.

    Raises:
        UserError: there is none.
    """
    if name not in models:
        raise UserError(f"a model is needed, one of: {', '.join(models) or 'none, see above how to get one'}")
    return models[name]


def _read(path: Path) -> Predictor | Forecaster:
    if "columns" in read_run(path)["meta"]:
        return load_forecaster(path)
    return Predictor.from_checkpoint(path)
