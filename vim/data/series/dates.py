"""Reading dates: year, month, day, so that no country reads them otherwise."""

import re
from collections.abc import Iterable
from typing import Literal, TypeAlias

import numpy as np

from vim.errors import UserError

DATE = re.compile(
    r"(?P<year>\d{4})"
    r"(?:-(?P<m1>\d\d?)(?:-(?P<d1>\d\d?))?|/(?P<m2>\d\d?)/(?P<d2>\d\d?)|(?P<m3>\d\d)(?P<d3>\d\d))?"
    r"(?:[T ](?P<hour>\d\d?)(?::(?P<minute>\d\d)(?::(?P<second>\d\d)(?:\.(?P<fraction>\d{1,9})\d*)?)?)?"
    r"(?: ?(?P<offset>Z|UTC|GMT|[+-]\d\d(?::?\d\d)?))?)?"
)
Unit: TypeAlias = Literal["ns", "us"]
UTC = {"Z", "UTC", "GMT", "+00", "-00", "+0000", "-0000"}


def parse_dates(column: Iterable[object], source: str) -> np.ndarray:
    """Parse dates (n,), the year first, in ascending order. One offset from UTC is dropped.

    Raises:
        UserError: there are fewer than three, one is not such a date or comes before the one above it, or the offsets
            differ.
    """
    texts = [str(value).strip() for value in column]
    if len(texts) < 3:
        raise UserError(f"{source} has {len(texts)} rows: expected three at least")
    matches = [_match(text) for text in texts]
    offsets = {_offset(match) for match in matches if match}
    if len(offsets) > 1:
        raise UserError(
            f"{source} has dates of several offsets from UTC ({', '.join(sorted(offsets)[:3])}), as daylight saving "
            "makes them: write all of them in UTC"
        )
    unit: Unit = "ns" if any(match and len(match["fraction"] or "") > 6 for match in matches) else "us"
    dates = np.array([_date(match, unit) for match in matches])
    wrong = np.isnat(dates)
    if wrong.any():
        row = int(wrong.argmax())
        raise UserError(
            f"{source}, row {row + 1}: a date with the year first expected, got {texts[row]}: write it as "
            "2020-01-31 23:00"
        )

    # Equal dates are accepted here: the Weather benchmark repeats one.
    back = np.diff(dates) < np.timedelta64(0)
    if back.any():
        row = int(back.argmax()) + 1
        raise UserError(
            f"{source}, row {row + 1}: its date {texts[row]} comes before that of row {row}: sort the rows by "
            "date, and where clocks were set back, write dates in UTC"
        )
    return dates


def as_dates(column: Iterable[object]) -> np.ndarray:
    """The dates of a column (n,), without their offsets; NaT where there is none."""
    return np.array([_date(_match(str(value).strip()), "us") for value in column], "datetime64[us]")


def _match(text: str) -> re.Match[str] | None:
    match = DATE.fullmatch(text)
    return None if match and match["hour"] and not (match["d1"] or match["d2"] or match["d3"]) else match


def _offset(match: re.Match[str]) -> str:
    offset = (match["offset"] or "none").replace(":", "")
    return "+0000" if offset in UTC else offset


def _date(match: re.Match[str] | None, unit: Unit) -> np.datetime64:
    """The date of a match, NaT if there is none or no such day; the hour 24 is the next day's first."""
    if match is None:
        return np.datetime64("NaT", unit)
    month = match["m1"] or match["m2"] or match["m3"] or "1"
    day = match["d1"] or match["d2"] or match["d3"] or "1"
    clock = [match["hour"] or "0", match["minute"] or "0", match["second"] or "0"]
    is_next = [int(number) for number in clock] == [24, 0, 0] and not (match["fraction"] or "").strip("0")
    hours = ":".join(number.zfill(2) for number in (["0"] * 3 if is_next else clock))
    try:
        text = f"{match['year']}-{month.zfill(2)}-{day.zfill(2)}T{hours}.{match['fraction'] or '0'}"
        return np.datetime64(text, unit) + np.timedelta64(int(is_next), "D")
    except ValueError:  # no such day, hour or second
        return np.datetime64("NaT", unit)
