"""Reading time series and static covariates from CSV files; a file that is no such table is refused."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from vim.data.series.scaling import Scaler
from vim.data.series.table import Series, check_complete
from vim.errors import UserError, one_line, require

if TYPE_CHECKING:
    import pandas

LARGEST = 1e30  # its square does not overflow a float64
CLOCK = r"[T ]\d\d?(?::\d\d){0,2}(?:\.\d+)?"
OFFSET = r"Z|[+-]\d\d:?\d\d"
YEAR_FIRST = rf"\d{{4}}(?:(?:-\d\d?){{1,2}}|(?:/\d\d?){{2}}|\d{{4}})?(?:{CLOCK})?(?: ?(?:{OFFSET}))?"


def read_series(path: Path, only: list[str] | None = None) -> Series:
    """Read a CSV file with a column `date` and columns of numbers; an empty field is a missing value.

    Args:
        only: the columns to read; all others are ignored, whatever they contain. By default all are read.

    Raises:
        UserError: the file does not exist or is not a CSV file, it has no column `date` or nothing else, a field is not
            a number or not a date, or dates are out of order.
    """
    return from_table(_read_table(path, "date"), str(path), only)


def read_static(path: Path, variates: list[str]) -> Tensor:
    """Read covariates of m variates, (m, s), from a CSV file, and scale each over the variates.

    The file has one row a variate, whose name is in the column `column`, and columns of numbers. Rows of other variates
    are ignored.

    Raises:
        UserError: the file does not exist or is not such a table, a variate does not have exactly one row, or a value
            is missing.
    """
    table = _read_table(path, "column")
    columns = _number_columns(table, "column", str(path))
    names = table["column"].tolist()
    for name in variates:
        if names.count(name) != 1:
            raise UserError(f"{path}: a row for each variate expected, {names.count(name)} found for {name}")
    values = _numbers(table, columns, str(path))[[names.index(name) for name in variates]]
    check_complete(values, columns, str(path))
    return Scaler.of(values, columns, str(path)).scale(values)


def _read_table(path: Path, text_column: str) -> "pandas.DataFrame":
    """Read a file whose column `text_column` stays text; pandas chooses the types of the others."""
    pandas = require("pandas", f"reading {path}")
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    header = _read_csv(path, header=None, nrows=1, dtype=str, keep_default_na=False).iloc[0].tolist()
    if len(header) == 1 and ";" in header[0]:
        raise UserError(f"{path} has one column, {header[0][:200]}: is it separated by semicolons? Commas are expected")
    table = _read_csv(path, dtype={text_column: str})
    if not isinstance(table.index, pandas.RangeIndex):  # pandas turns surplus fields into an index
        raise UserError(f"cannot read {path} as a CSV file: its rows have more fields than its header has names")
    if "" in header:
        raise UserError(f"{path}, column {header.index('') + 1} has no name: leave it out (index=False in pandas)")
    repeated = [name for name in header if header.count(name) > 1]
    if repeated:  # pandas would rename all but one
        raise UserError(
            f"{path} has {header.count(repeated[0])} columns named {repeated[0]}: rename or leave out all but one"
        )
    return table


def _read_csv(path: Path, **options: object) -> "pandas.DataFrame":
    try:
        return require("pandas", f"reading {path}").read_csv(path, **options)
    except ValueError as error:  # a UnicodeDecodeError and pandas' own errors are ValueErrors too
        raise UserError(f"cannot read {path} as a CSV file: {one_line(str(error))}") from error


def from_table(table: "pandas.DataFrame", source: str, only: list[str] | None = None) -> Series:
    """Check a pandas table with a column `date` and make it a series; see :func:`read_series`."""
    columns = _number_columns(table, "date", source)
    dates = _dates(table["date"], source)
    columns = [name for name in columns if only is None or name in only]
    series = Series(dates, _numbers(table, columns, source), columns, source)
    if not series.step:
        raise UserError(f"{source}: most rows have the date of the row before: expected a row for each date")
    return series


def _number_columns(table: "pandas.DataFrame", label: str, source: str) -> list[str]:
    """The names of all columns but the one of labels, which must exist."""
    names = [str(name) for name in table.columns]
    if label not in names:
        similar = [name for name in names if name.strip().lower() == label]
        advice = f": rename {similar[0]!r} to {label}" if similar else ""
        raise UserError(f"{source} has no column named {label}, only {', '.join(names)[:200]}{advice}")
    if len(names) == 1:
        raise UserError(f"{source} has no column beside {label}: expected columns of numbers")
    return [name for name in names if name != label]


def _numbers(table: "pandas.DataFrame", columns: list[str], source: str) -> np.ndarray:
    """The values (n, m) of columns of numbers."""
    pandas = require("pandas", f"reading {source}")
    values = np.empty((len(table), len(columns)))
    for i, name in enumerate(columns):
        numbers = pandas.to_numeric(table[name], errors="coerce").to_numpy(float, na_value=np.nan)
        wrong = (np.isnan(numbers) & table[name].notna().to_numpy()) | (np.abs(numbers) > LARGEST)
        if wrong.any():
            row = int(wrong.argmax())
            raise UserError(
                f"{source}, row {row + 1}, column {name}: a number up to {LARGEST:g} expected, got "
                f"{table[name].iloc[row]}; mend it, or leave the column out"
            )
        values[:, i] = numbers
    return values


def _dates(texts: "pandas.Series", source: str) -> np.ndarray:
    """Parse dates (n,), all written alike with the year first, and in ascending order."""
    pandas = require("pandas", f"reading {source}")
    texts = texts.astype(str).str.strip()
    if len(texts) < 3:
        raise UserError(f"{source} has {len(texts)} rows: expected three at least")

    # Offsets from UTC are dropped below, so all rows must have the same.
    offsets = texts.str.extract(rf"(?:{CLOCK}) ?({OFFSET})$", expand=False).dropna().unique()
    if len(offsets) > 1:
        raise UserError(
            f"{source} has dates of several offsets from UTC ({', '.join(offsets[:3])}), as daylight saving makes "
            "them: write all of them in UTC"
        )

    # pandas infers one format from the first row. If it finds none, it warns and guesses a format for every row.
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            dates = pandas.to_datetime(texts, errors="coerce").dt.tz_localize(None).to_numpy()
        guessed = any("Could not infer" in str(warning.message) for warning in caught)
    except (ValueError, TypeError, AttributeError):
        guessed, dates = True, np.full(len(texts), np.datetime64("NaT"))
    wrong = np.isnat(dates) | ~texts.str.fullmatch(YEAR_FIRST).to_numpy(bool) | guessed
    if wrong.any():
        row = int(wrong.argmax())
        like_first = ", written as that of row 1," if row else ""
        raise UserError(
            f"{source}, row {row + 1}: a date with the year first{like_first} expected, got {texts.iloc[row]}: "
            "write it as 2020-01-31 23:00"
        )

    # Equal dates are accepted here: the Weather benchmark repeats one.
    back = np.diff(dates) < np.timedelta64(0)
    if back.any():
        row = int(back.argmax()) + 1
        raise UserError(
            f"{source}, row {row + 1}: its date {texts.iloc[row]} comes before that of row {row}: sort the rows by "
            "date, and where clocks were set back, write dates in UTC"
        )
    return dates
