"""Reading time series and static covariates from CSV files; a file that is no such table is refused."""

import csv
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch import Tensor

from vim.data.series.dates import as_dates, parse_dates
from vim.data.series.scaling import Scaler
from vim.data.series.table import Series, check_complete
from vim.errors import UserError, one_line, require

if TYPE_CHECKING:
    import pandas

LARGEST = 1e30  # its square does not overflow a float64
LONG = ("unique_id", "ds", "y")  # the columns of a long table, one series below the other, as Nixtla's packages have it
TEXT = ("date", "ds", "unique_id", "column")  # columns that are not of numbers
TIMES = {"date", "datetime", "day", "ds", "hour", "index", "month", "time", "timestamp", "year"}  # no variate, likely
FIRST, STEP = np.datetime64("2000-01-01", "us"), np.timedelta64(1, "h")  # of the rows of a table without dates

_logger = logging.getLogger(__name__)


class Dialect(NamedTuple):
    """How a file is written, for pandas."""

    sep: str
    decimal: str
    skiprows: list[int]  # lines of comments


def read_series(path: Path, only: list[str] | None = None) -> Series:
    """Read a CSV file with a column `date` and columns of numbers; an empty field is a missing value.

    A long table, of columns `unique_id`, `ds` and `y`, becomes one with a column for each `unique_id`. A table of
    numbers alone gets dates that are an hour apart.

    Args:
        only: the columns to read; all others are ignored, whatever they contain. By default all are read.

    Raises:
        UserError: the file does not exist or is not a CSV file, it has no column `date` or nothing else, a field is not
            a number or not a date, or dates are out of order.
    """
    table = _read_table(path)
    table = _pivot(table, str(path)) if set(LONG) <= set(table.columns) else table
    return from_table(_with_dates(table, str(path)), str(path), only)


def read_static(path: Path, variates: list[str]) -> Tensor:
    """Read covariates of m variates, (m, s), from a CSV file, and scale each over the variates.

    The file has one row a variate, whose name is in the column `column`, and columns of numbers. Rows of other variates
    are ignored.

    Raises:
        UserError: the file does not exist or is not such a table, a variate does not have exactly one row, or a value
            is missing.
    """
    table = _read_table(path)
    columns = _number_columns(table, "column", str(path))
    names = table["column"].str.strip().tolist()
    for name in variates:
        if names.count(name) != 1:
            raise UserError(f"{path}: a row for each variate expected, {names.count(name)} found for {name}")
    values = _numbers(table, columns, str(path))[[names.index(name) for name in variates]]
    check_complete(values, columns, str(path))
    return Scaler.of(values, columns, str(path)).scale(values)


def _read_table(path: Path) -> "pandas.DataFrame":
    """Read a file as pandas does, but for what spreadsheets and pandas itself add to a table when they write it."""
    pandas = require("pandas", f"reading {path}")
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    dialect = _dialect(path)
    header = (
        _read_csv(path, dialect, header=None, nrows=1, dtype=str, keep_default_na=False).iloc[0].str.strip().tolist()
    )
    if all(re.fullmatch(r"[-+]?[.\d][-+.\deE]*", name) for name in header) and header != [
        *map(str, range(len(header)))
    ]:
        raise UserError(f"{path} has no names of columns: expected them in its first line, found {header[0][:50]}, ...")
    names = [name or f"Unnamed: {i}" for i, name in enumerate(header)]  # as pandas calls them
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path} has {names.count(name)} columns named {name}: rename or leave out all but one")
    text = {name: str for name in names if name in TEXT}
    table = _read_csv(path, dialect, names=names, header=0, dtype=text)
    if not isinstance(table.index, pandas.RangeIndex):  # pandas turns surplus fields into an index
        raise UserError(f"cannot read {path} as a CSV file: its rows have more fields than its header has names")
    table.attrs["decimal"] = dialect.decimal
    return _without_unnamed(_without_last_rows(table, str(path)), str(path))


def _dialect(path: Path) -> Dialect:
    """Find out what separates fields and decimals, and which lines are comments."""
    comments: list[int] = []
    rest: list[str] = []  # the first lines that are none
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        for i, line in enumerate(file):
            if line.lstrip().startswith("#"):
                comments.append(i)
            elif len(rest) < 1000 and line.strip():
                rest.append(line)
    header = rest[0][:100_000] if rest else ""  # csv refuses longer fields
    sep = max(",;\t", key=lambda sign: len(next(csv.reader([header], delimiter=sign))))
    decimal = re.compile(rf'(?:^|{sep})\s*"?[-+]?\d[\d.]*,\d+"?\s*(?:{sep}|$)')
    has_commas = sep != "," and any(decimal.search(line) for line in rest[1:])
    return Dialect(sep, "," if has_commas else ".", comments)


def _read_csv(path: Path, dialect: Dialect, **options: object) -> "pandas.DataFrame":
    read = require("pandas", f"reading {path}").read_csv
    try:
        return read(path, **dialect._asdict(), skipinitialspace=True, **options)
    except ValueError as error:  # a UnicodeDecodeError and pandas' own errors are ValueErrors too
        raise UserError(f"cannot read {path} as a CSV file: {one_line(str(error))}") from error


def _without_last_rows(table: "pandas.DataFrame", source: str) -> "pandas.DataFrame":
    """Leave out rows at the end that have no field, as spreadsheets write them."""
    filled = np.flatnonzero(table.notna().any(axis=1))
    end = int(filled[-1]) + 1 if len(filled) else 0
    if end < len(table):
        _logger.info("%s: %d empty rows at the end left out", source, len(table) - end)
    return table.iloc[:end]


def _without_unnamed(table: "pandas.DataFrame", source: str) -> "pandas.DataFrame":
    """Take an index that pandas wrote without a name as `date` if it has dates; leave it out if it has row numbers."""
    left_out = []
    for i, name in enumerate(table.columns):
        if not re.fullmatch(r"Unnamed: \d+", name):
            continue
        column = table[name]
        is_text = column.dtype.kind not in "iuf"
        if i == 0 and is_text and "date" not in table.columns and not np.isnat(as_dates(column)).any():
            _logger.info("%s: the column without a name is taken as date", source)
            table = table.rename(columns={name: "date"})
        elif column.isna().all() or (column.dtype.kind == "i" and (column.diff().iloc[1:] == 1).all()):
            left_out.append(name)
        else:
            raise UserError(f"{source}, column {i + 1} has no name: name it, or leave it out (index=False in pandas)")
    if left_out:
        text = "%s: %d columns without a name left out: they have row numbers or nothing"
        _logger.info(text, source, len(left_out))
    return table.drop(columns=left_out)


def _pivot(table: "pandas.DataFrame", source: str) -> "pandas.DataFrame":
    """Make a table with a row for each date and a column for each series of one that has them one below the other."""
    table = table.assign(ds=table["ds"].fillna("").str.strip(), unique_id=table["unique_id"].str.strip())
    wrong = table.duplicated(["unique_id", "ds"]) | table["unique_id"].isna()
    if wrong.any():
        row = int(wrong.to_numpy().argmax())
        raise UserError(
            f"{source}, row {row + 1}: a unique_id expected, and no other row with its ds, got "
            f"{table['unique_id'].iloc[row]}, {table['ds'].iloc[row]}"
        )
    numbers = _numbers(table, ["y"], source)[:, 0]
    wide = table.assign(y=numbers).pivot(index="ds", columns="unique_id", values="y")
    wide = wide.iloc[np.argsort(as_dates(wide.index), kind="stable")]
    wide = wide.rename_axis(columns=None).reset_index(names="date")
    others = [name for name in table.columns if name not in LONG]
    left_out = f"; left out: {', '.join(others)}" if others else ""
    text = "%s: long table of columns unique_id, ds, y: read as %d rows of %d series%s"
    _logger.warning(text, source, len(wide), len(wide.columns) - 1, left_out)
    return wide


def _with_dates(table: "pandas.DataFrame", source: str) -> "pandas.DataFrame":
    """Name the column `ds` of Prophet's tables `date`; give a table of numbers alone dates that are an hour apart."""
    if "date" in table.columns:
        return table
    if "ds" in table.columns:
        return table.rename(columns={"ds": "date"})
    names = [name for name in table.columns if name.lower() in TIMES or table[name].dtype.kind not in "iuf"]
    if names:
        raise UserError(
            f"{source} has no column named date, only {', '.join(table.columns)[:200]}: rename {names[0]!r} to date "
            "(a table of nothing but numbers may do without: its rows are taken as an hour apart)"
        )
    _logger.warning("%s has no column date: its rows are taken as an hour apart, from %s on", source, FIRST)
    return table.assign(date=np.datetime_as_string(FIRST + np.arange(len(table)) * STEP))


def from_table(table: "pandas.DataFrame", source: str, only: list[str] | None = None) -> Series:
    """Check a pandas table with a column `date` and make it a series; see :func:`read_series`."""
    columns = _number_columns(table, "date", source)
    dates = parse_dates(table["date"], source)
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
        column = table[name]
        if column.dtype.kind not in "iufb":
            column = _without_groups(column, table.attrs.get("decimal", "."), f"{source}, column {name}")
        numbers = pandas.to_numeric(column, errors="coerce").to_numpy(float, na_value=np.nan)
        wrong = (np.isnan(numbers) & table[name].notna().to_numpy()) | (np.abs(numbers) > LARGEST)
        if wrong.any():
            row = int(wrong.argmax())
            raise UserError(
                f"{source}, row {row + 1}, column {name}: a number up to {LARGEST:g} expected, got "
                f"{table[name].iloc[row]}; mend it, or leave the column out"
            )
        values[:, i] = numbers
    return values


def _without_groups(texts: "pandas.Series", decimal: str, where: str) -> "pandas.Series":
    """Write numbers such as 1,234.5, or with a decimal comma 1.234,5, as 1234.5; other texts stay as they are."""
    group = "," if decimal == "." else "."
    texts = texts.astype(str).str.strip()
    grouped = texts.str.fullmatch(rf"[-+]?\d{{1,3}}(?:\{group}\d{{3}})+(?:\{decimal}\d*)?").to_numpy(bool)
    if grouped.any():
        text = "%s: %d numbers with a sign between thousands, such as %s"
        _logger.warning(text, where, grouped.sum(), texts[grouped].iloc[0])
        texts = texts.mask(grouped, texts.str.replace(group, ""))
    if decimal == ",":  # a point that is none between thousands stands for nothing known
        texts = texts.where(grouped | ~texts.str.contains(".", regex=False), "?").str.replace(",", ".")
    return texts
