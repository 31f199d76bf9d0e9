"""TensorBoard and Weights & Biases, as accelerate writes to them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker

from vim.errors import UserError, check_installed
from vim.options import Recipe

TRACKERS: dict[str, type[GeneralTracker]] = {"tensorboard": TensorBoardTracker, "wandb": WandBTracker}


class Trackers:
    """The trackers of a run, which write within the context.

    Args:
        names: of "tensorboard" and "wandb".
        shown: whether this process writes; the others of a run do not.

    Raises:
        UserError: a name is unknown, or its package is not installed.
    """

    def __init__(self, names: Sequence[str], folder: Path, recipe: Recipe, *, shown: bool) -> None:
        self.names, self.folder, self.recipe = list(names) if shown else [], folder, recipe
        for name in self.names:
            if name not in TRACKERS:
                raise UserError(f"train.trackers has {name!r}: expected {' or '.join(TRACKERS)}")
            check_installed(name, purpose="train.trackers")

    def __enter__(self) -> "Trackers":
        self.trackers: list[GeneralTracker] = []
        for name in self.names:
            options = {"logging_dir": str(self.folder)} if name == "tensorboard" else {}
            self.trackers.append(TRACKERS[name](self.folder.name, **options))
            self.trackers[-1].start()
            self.trackers[-1].store_init_configuration(_flat(asdict(self.recipe)))
        return self

    def __exit__(self, *error: object) -> None:
        for tracker in self.trackers:
            tracker.finish()

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Write figures after `step` updates."""
        for tracker in self.trackers:
            tracker.log(values, step=step)


def _flat(config: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """Return a nested config as one level, which TensorBoard needs."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": str(value)}
    return flat
