"""The run that a recipe describes."""

from pathlib import Path
from typing import Any

from vim.engine.launch import launch
from vim.engine.loop import Loop
from vim.engine.weights import Save
from vim.options import ImageRecipe, Recipe, SeriesRecipe
from vim.tasks.classification.train import Classification
from vim.tasks.forecasting.train import Forecasting
from vim.tasks.pretraining.train import Pretraining


def build_run(recipe: Recipe, work_dir: Path, resume: Save | None = None) -> Loop[Any]:
    """Return the loop that trains the task of a recipe.

    A recipe of a series is forecasting; one with a `masking` section is pre-training; others are classification.

    Args:
        work_dir: gets what :class:`vim.engine.loop.Loop` writes, and `unreadable.txt`.
        resume: the save to resume from.

    Raises:
        UserError: the recipe does not fit the model or the data, or the save does not fit the run.
    """
    accelerator = launch(recipe.train)
    task: Classification | Forecasting | Pretraining
    if isinstance(recipe, SeriesRecipe):
        task = Forecasting(recipe, work_dir, accelerator)
    else:
        assert isinstance(recipe, ImageRecipe)
        kind = Classification if recipe.masking is None else Pretraining
        task = kind(recipe, work_dir, accelerator, resume)
    return Loop(task, recipe, work_dir, accelerator, resume)
