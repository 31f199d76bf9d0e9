"""Forecasts of pandas frames, with the recipes and checkpoints of `tools/forecast.py`.

Frames are wide or long; see :mod:`vim.data.series.frames`.
"""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Self

from vim.data.series import frame_like, is_long, select, series_of_frame
from vim.engine.config import load_recipe
from vim.engine.launch import holding, launch
from vim.engine.loop import Loop
from vim.engine.weights import State, choose_save, save_whole
from vim.errors import UserError
from vim.options import SeriesRecipe
from vim.tasks.forecasting.build import Forecaster, load_forecaster, read_forecaster
from vim.tasks.forecasting.predict import forecast_next
from vim.tasks.forecasting.train import Forecasting

if TYPE_CHECKING:
    import pandas


class FrameForecaster:
    """A forecaster that learns from a frame, and forecasts the steps after the last row of that frame or of another.

    Args:
        config: a config of `tools/forecast.py`, such as configs/tsm2/tsm2_vic-elec_24.py. Its data set is not read.
        options: changes of the config, such as {"data.horizon": 12}.

    Raises:
        UserError: no such config, or an option does not fit.
    """

    def __init__(self, config: str | Path, options: Mapping[str, object] | None = None) -> None:
        changes = {**(options or {}), "data.dataset": "csv", "data.file": None}
        self.recipe: SeriesRecipe | None = load_recipe(Path(config), SeriesRecipe, changes)
        self._checkpoint: State | None = None
        self._frame: pandas.DataFrame | None = None

    def fit(self, df: "pandas.DataFrame", work_dir: str | Path | None = None) -> Self:
        """Train on a frame, and keep the weights of the best epoch.

        Rows before the first that all series have are left out. `data.split` says which of the others train.

        Args:
            work_dir: a new folder for the logs and checkpoints of the run. By default they are deleted.

        Returns:
            The forecaster.

        Raises:
            UserError: the frame lacks a column or a value, has irregular dates or too few rows; or this forecaster was
                loaded, and has no recipe.
        """
        if self.recipe is None:
            raise UserError("a loaded forecaster has no recipe to train by: make a new FrameForecaster(CONFIG)")
        table = series_of_frame(df)
        with TemporaryDirectory() as scratch:
            folder = Path(work_dir or scratch)
            with holding(folder):
                choose_save(None, folder)  # refuses to overwrite a run
                accelerator = launch(self.recipe.train)
                task = Forecasting(self.recipe, folder, accelerator, table)
                if not Loop(task, self.recipe, folder, accelerator).fit():
                    raise KeyboardInterrupt("a signal ended the training")
            self._read(folder / "best.pth")
        self._frame = df
        return self

    def predict(self, df: "pandas.DataFrame | None" = None) -> "pandas.DataFrame":
        """Forecast the `data.horizon` steps after the last row of a frame, by default of the one given to :meth:`fit`.

        With `data.known` the last `data.horizon` rows have dates and these columns only: they are what is forecast.

        Returns:
            A frame of the same form: a wide one, or a long one of the columns `unique_id`, `ds` and `TSM2`.

        Raises:
            UserError: nothing was fitted; or the frame has other series than the fitted one, lacks a value, has
                irregular dates, or fewer rows than `data.lookback`.
        """
        frame = self._frame if df is None else df
        if self._checkpoint is None or frame is None:
            raise UserError("there is nothing to forecast: call fit(df) first, or after load(path) predict(df)")
        known, columns = self._fitted.data.known, self._fitted.columns
        series = series_of_frame(frame, without_values=self._fitted.data.horizon if known else 0)
        for name in series.columns:
            if name not in columns:
                kind = "unique_id" if is_long(frame) else "column"
                raise UserError(f"the frame has an unknown {kind}, {name}: expected {', '.join(columns)[:200]}")
        series = select(series, columns, len(known))
        dates, values = forecast_next(self._fitted, series)
        return frame_like(frame, dates, dict(zip(series.variates, values.T, strict=True)))

    def save(self, path: str | Path) -> None:
        """Write a checkpoint of the weights, which `tools/forecast.py` reads too.

        Raises:
            UserError: nothing was fitted.
        """
        if self._checkpoint is None:
            raise UserError("there is nothing to save: call fit(df) first")
        save_whole(self._checkpoint, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a checkpoint of :meth:`save` or of `tools/forecast.py`; nothing in the file is executed.

        Raises:
            UserError: the file is missing, damaged, or not such a checkpoint.
        """
        loaded = cls.__new__(cls)
        loaded.recipe, loaded._frame = None, None
        loaded._read(Path(path))
        return loaded

    def _read(self, path: Path) -> None:
        self._fitted: Forecaster = load_forecaster(path)
        self._checkpoint = {name: part for name, part in read_forecaster(path).items() if name != "training"}
