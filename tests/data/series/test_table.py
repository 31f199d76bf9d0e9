from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.tiny import make_series
from vim.data.series import Series, dates_after, select
from vim.errors import UserError


def test_a_table_has_a_digest_of_all_it_holds():
    table = make_series(np.arange(6.0).reshape(3, 2))
    finer = replace(table, dates=table.dates.astype("datetime64[s]"))  # the same dates
    others = (
        replace(table, dates=table.dates + np.timedelta64(1, "h")),
        replace(table, values=table.values + 1),
        replace(table, static=torch.ones(2, 1)),
        replace(table, static=torch.zeros(2, 1)),
    )
    assert finer.digest() == table.digest()
    assert len({table.digest(), *(other.digest() for other in others)}) == 5


def test_columns_are_found_by_name():
    series = make_series(np.arange(30.0).reshape(10, 3))
    np.testing.assert_array_equal(select(series, ["c", "a"]).values, series.values[:, [2, 0]])
    with pytest.raises(UserError, match="it has no column d: expected a, d"):
        select(series, ["a", "d"])


@pytest.mark.parametrize(
    ("dates", "expected"),
    [
        (["2020-02-28 22:00", "2020-02-28 23:00", "2020-02-29 00:00"], ["2020-02-29T01:00", "2020-02-29T02:00"]),
        (["2020-11-01", "2020-12-01", "2021-01-01"], ["2021-02-01", "2021-03-01"]),
        (["2020-01-31", "2020-02-29", "2020-03-31"], ["2020-04-30", "2020-05-31"]),
        (["2020-01-01", "2020-01-02", "2020-01-03", "2020-01-06"], ["2020-01-07", "2020-01-08"]),
        (["1500-01-01", "1501-01-01", "1502-01-01"], ["1503-01-01", "1504-01-01"]),
        (["2020-01-15", "2020-02-15", "2020-04-15", "2020-05-15"], ["2020-06-15", "2020-07-15"]),
        (["2021-02-15", "2021-03-15", "2021-05-15"], ["2021-06-15", "2021-07-15"]),
        (["2020-01-01", "2020-01-28", "2020-02-24", "2020-03-30"], ["2020-04-26", "2020-05-23"]),
        (["2018-03-15", "2019-03-15", "2020-03-15"], ["2021-03-15", "2022-03-15"]),
        (["2020-01-01", "2020-01-02", "2020-01-03", "2020-01-07", "2020-01-10"], ["2020-01-13", "2020-01-14"]),
        (["2020-01-01", "2020-01-02", "2020-01-03", "2020-01-05", "2020-01-10"], ["2020-01-11", "2020-01-12"]),
        (
            [f"2020-01-0{day} {hour}:00" for day in (3, 4, 5) for hour in range(10, 18)],
            ["2020-01-05T18", "2020-01-05T19"],
        ),
    ],
)
def test_the_dates_to_come(dates, expected):
    dates = np.array(dates, "datetime64[us]")
    series = Series(dates, np.zeros((len(dates), 1)), ["a"], "it")
    np.testing.assert_array_equal(dates_after(series, 2), np.array(expected, "datetime64[us]"))
