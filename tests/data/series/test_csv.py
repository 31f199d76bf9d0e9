import datetime

import numpy as np
import pytest
import torch

from tests.tiny import write_lines
from vim.data.series import Scaler, last_window, load_series, read_series, read_static
from vim.errors import UserError

NAN = float("nan")
HOURS = [f"2020-01-01 0{i}:00:00" for i in range(5)]


def rows(*values):
    return [f"{date},{value}" for date, value in zip(HOURS, values, strict=False)]


def test_a_table(tmp_path):
    series = read_series(write_lines(tmp_path / "a.csv", "date,HUFL,OT", *rows("5.827,1", "5.693,", "-1e2,3")))
    assert series.columns == ["HUFL", "OT"]
    assert series.dates[1] == np.datetime64("2020-01-01T01")
    np.testing.assert_array_equal(series.values, [[5.827, 1], [5.693, NAN], [-100, 3]])
    assert series.step == np.timedelta64(1, "h")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["time,a", *rows(1, 2, 3)], "has no column named date, only time, a"),
        (["date", *HOURS], "has no column beside date"),
        (["date,a", *rows(1, 2)], "has 2 rows: expected three at least"),
        (["date,a", *rows("1,2,3,4", 2, "3,4,5")], "cannot read .* as a CSV file"),
        (["Date,a", *rows(1, 2, 3)], "no column named date, only Date, a: rename 'Date' to date"),
        (
            ["x,,date", *(f"1,{x},{hour}" for x, hour in zip("ab7", HOURS, strict=False))],
            "column 2 has no name: name it",
        ),
        ([",a", "1000,1", "1001,2", "1003,3"], "column 1 has no name: name it"),
        (["Hour,a", "1,1", "2,2", "3,3"], "no column named date, only Hour, a: rename 'Hour' to date"),
        (["1,2,3", "4,5,6", "7,8,9"], "has no names of columns: expected them in its first line, found 1, ..."),
        (["date,a", *rows(1, '"1,5"', 3)], "row 2, column a: a number up to .* got 1,5"),
        (["date,a", *rows(1, '"1,23,456"', 3)], "row 2, column a: a number up to .* got 1,23,456"),
        (
            [
                "date;a",
                *(row.replace(",", ";") for row in rows("1", "2", "3")),
                "2020-01-01 04:00;1.5",
                "2020-01-01 05:00;1,5",
            ],
            "row 4, column a: .* got 1.5",
        ),
        (["date,a", "2020-01-01 24:01,1", "2020-01-02,2", "2020-01-03,3"], "row 1: a date with the year first"),
        (["date,a", "2020-01-01,1", "2020-01-02 24:00:00.5,2", "2020-01-03,3"], "row 2: a date with the year first"),
        (["date,a", "2020-01-01 00:00,1", "2020-01-01 01:00Z,2", "2020-01-03,3"], r"offsets from UTC \(\+0000, none\)"),
        (["unique_id,ds,y", "a,2020-01-01,1", "a,2020-01-01,2"], "row 2: a unique_id expected, and no other row with"),
        (["unique_id,ds,y", "a,2020-01-01,1", ",2020-01-01,2"], "row 2: a unique_id expected"),
        (
            ["unique_id,ds,y", "a,2020-01-01,1", "a,x,2", "a,2020-01-02,2"],
            "row 3: a date with the year first expected, got x",
        ),
        (["date,a,a", *rows("1,2", "2,3", "3,4")], "has 2 columns named a: rename"),
        (["date,a,b", *rows("1,2", "2,x", "3,4")], "row 2, column b: a number up to 1e\\+30 expected, got x"),
        (["date,a,b", *rows("1,2", "2,4", "inf,4")], "row 3, column a: a number up to 1e\\+30 expected, got inf"),
        (["date,a", *rows(1, "-1.797e308", 3)], "row 2, column a: a number up to 1e\\+30 expected, got -1.797e"),
        (["date,a", *rows(1, 2, "1e31")], "row 3, column a: a number up to 1e\\+30 expected, got 1e\\+?31"),
        (["date,a", *rows(1, 2), "whenever,3"], "row 3: a date with the year first expected, got whenever"),
        (["date,a", "2021 1,1", "2022 1,2", "2023 1,3"], "row 1: a date with the year first.* got 2021 1"),
        (["date,a", "1,1", "2,2", "3,3"], "row 1: a date with the year first.* got 1: write it as 2020-01-31 23:00"),
        (["date,a", ",1", ",2", ",3"], "row 1: a date with the year first"),
        (["date,a", "2020-01-13,1", "2020-13-01,1", "2020-01-14,1"], "row 2: a date with the year first"),
        (["date,a", *rows(1, 2), ",3"], "row 3: a date .* got nan"),
        (["date,a", *(f"{hour[:16]}+0{i}:00,1" for i, hour in enumerate(HOURS))], r"offsets from UTC \(\+0000, \+0100"),
        (
            ["date,a", f"{HOURS[1]},1", f"{HOURS[0]},1", f"{HOURS[2]},1"],
            "row 2: its date 2020-01-01 00:00:00 comes before that of row 1: sort the rows .* in UTC",
        ),
        (["date,a", *rows(1), *rows(2, 3), *rows(2, 3)[1:]], "most rows have the date of the row before"),
    ],
)
def test_a_table_that_is_none(tmp_path, lines, message):
    path = write_lines(tmp_path / "a.csv", *lines)
    with pytest.raises(UserError, match=message) as error:
        read_series(path)
    assert str(path) in str(error.value)


def same_as(path, expected):
    """The series of a file, which must be that of another, or of a table of one column and three hours."""
    series = read_series(path)
    np.testing.assert_array_equal(series.dates, expected.dates)
    np.testing.assert_array_equal(series.values, expected.values)
    assert series.columns == expected.columns
    return series


PLAIN = ["date,a,b", "2020-01-01 00:00,1234.5,1", "2020-01-01 01:00,-2,", "2020-01-01 02:00,3e3,3"]
SPLIT = [line.split(",") for line in reversed(PLAIN[1:])]


@pytest.mark.parametrize(
    ("lines", "line"),
    [
        ([*PLAIN, ",,", " , ,", "", ""], "2 empty rows at the end left out"),
        (["# of a sensor", "#a,b,c", *PLAIN[:2], "  # 3,4", *PLAIN[2:], "# end"], ""),
        (["\ufeff date , a,b ", *(line.replace(",", " , ") for line in PLAIN[1:])], ""),
        ([f"{i - 1 if i else ''},{line}" for i, line in enumerate(PLAIN)], "1 columns without a name left out"),
        ([f"{i - 1 if i else 'Unnamed: 0'},{line}" for i, line in enumerate(PLAIN)], "1 columns without a name"),
        ([f"{line},," for line in PLAIN], "2 columns without a name left out"),
        ([PLAIN[0][4:], *PLAIN[1:]], "the column without a name is taken as date"),
        (["ds,a,b", *PLAIN[1:]], ""),
        ([PLAIN[0], *(line.replace(" 0", "T0").replace(":00,", ":00Z,") for line in PLAIN[1:])], ""),
        ([PLAIN[0], *(line.replace(":00,", ":00 UTC,") for line in PLAIN[1:])], ""),
        ([line.replace("1234.5", '"1,234.5"') for line in PLAIN], "column a: 1 numbers with a sign between thousands"),
        ([line.replace(",", ";") for line in PLAIN], ""),
        ([line.replace(",", "\t") for line in PLAIN], ""),
        ([line.replace(",", ";").replace(".", ",") for line in PLAIN], ""),
        ([line.replace(",", ";").replace("1234.5", "1.234,5") for line in PLAIN], "column a: 1 numbers with a sign"),
        ([line.replace(",", ";").replace("1234.5", "1234,5").replace("3e3", "3.000") for line in PLAIN], "column a: 1"),
        ([line.replace("-2,", f"-2,{word}") for line, word in zip(PLAIN, ["", "", "N/A", ""], strict=True)], ""),
        (
            ["unique_id,ds,y", *(f"{'ab'[i - 1]},{row[0]},{row[i]}" for i in (2, 1) for row in SPLIT)],
            "long table of columns unique_id, ds, y: read as 3 rows of 2 series",
        ),
    ],
)  # fmt: skip
def test_what_spreadsheets_and_pandas_write(lines, line, tmp_path, caplog):
    caplog.set_level("INFO", "vim")
    plain = read_series(write_lines(tmp_path / "plain.csv", *PLAIN))
    np.testing.assert_array_equal(plain.values, [[1234.5, 1], [-2, NAN], [3000, 3]])
    same_as(write_lines(tmp_path / "a.csv", *lines), plain)
    assert line in caplog.text and bool(line) == bool(caplog.text)


def test_a_long_table_whose_series_have_different_dates(tmp_path, caplog):
    lines = ["z,unique_id,ds,y", "0,1,2020-1-10,1", "0,1,2020-1-9,2", "0,02,2020-1-11,3", "0,02,2020-1-9,4"]
    series = read_series(write_lines(tmp_path / "a.csv", *lines))
    assert series.columns == ["02", "1"]
    assert series.dates.astype("datetime64[D]").tolist() == [datetime.date(2020, 1, day) for day in (9, 10, 11)]
    np.testing.assert_array_equal(series.values, [[4, 2], [NAN, 1], [3, NAN]])
    assert "read as 3 rows of 2 series; left out: z" in caplog.text


@pytest.mark.parametrize("header", ["a,b", "0,1"])
def test_a_table_without_dates(header, tmp_path, caplog):
    series = read_series(write_lines(tmp_path / "a.csv", header, "1,2", "3,", "5,6"))
    np.testing.assert_array_equal(series.dates, np.datetime64("2000-01-01") + np.arange(3) * np.timedelta64(1, "h"))
    np.testing.assert_array_equal(series.values, [[1, 2], [3, NAN], [5, 6]])
    assert "has no column date: its rows are taken as an hour apart, from 2000-01-01T00:00" in caplog.text


def test_dates_of_one_column_that_are_written_differently(tmp_path):
    texts = [
        "2020-01-31",
        "2020-01-31T00:00:00.5",
        "2020-01-31 00:00:01",
        "2020/1/31 24:00",
        "20200201 01",
        "2020-02-01 2:00:00.000",
    ]
    series = read_series(write_lines(tmp_path / "a.csv", "date,a", *(f"{text},1" for text in texts)))
    expected = ["01-31", "01-31T00:00:00.5", "01-31T00:00:01", "02-01", "02-01T01", "02-01T02"]
    np.testing.assert_array_equal(series.dates, np.array([f"2020-{text}" for text in expected], "datetime64[us]"))


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_series(tmp_path / "a.csv")
    with pytest.raises(UserError, match="data.file must name the CSV file"):
        load_series("csv", "")
    with pytest.raises(
        UserError, match="data.dataset must be 'csv' or one of 'vic_elec', 'seattle_temps', 'lorenz', got"
    ):
        load_series("etth1")
    (tmp_path / "empty.csv").touch()
    with pytest.raises(UserError, match="cannot read .*empty.csv as a CSV file"):
        read_series(tmp_path / "empty.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00date")
    with pytest.raises(UserError, match="cannot read .*binary.csv as a CSV file"):
        read_series(tmp_path / "binary.csv")


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("2020/1/{} 0:00", "D"),  # as Exchange has them
        ("2020-01-0{}T00:00:00Z", "D"),
        ("2020-01-0{} 00:00+02:00", "D"),
        ("2020-01-01 00:00:00.{:03}", "ms"),
        ("202001{:02}", "D"),
        ("2020-{:02}", "M"),
        ("1{:03}", "Y"),
        ("300{}-01-01", "Y"),
    ],
)
def test_other_ways_to_write_a_date(tmp_path, text, unit):
    series = read_series(write_lines(tmp_path / "a.csv", "date,a", *(f"{text.format(i)},{i}" for i in (1, 2, 3))))
    first = {"1{:03}": "1001", "300{}-01-01": "3001", "2020-01-01 00:00:00.{:03}": "2020-01-01T00:00:00.001"}
    expected = np.datetime64(first.get(text, "2020-01-01"), unit) + np.arange(3)
    np.testing.assert_array_equal(series.dates, expected)


@pytest.mark.parametrize("text", ["0{}/01/2020", "{}/13/2020", "0{}.01.2020 00:00", "0{}-01-20", "Jan {} 2020"])
def test_the_year_comes_first(tmp_path, text):
    """01/02/2020 is one day here and another there."""
    with pytest.raises(UserError, match="row 1: a date with the year first.* write it as 2020-01-31 23:00"):
        read_series(write_lines(tmp_path / "a.csv", "date,a", *(f"{text.format(i)},{i}" for i in (1, 2, 3))))


def test_a_date_that_comes_twice(tmp_path, caplog):
    """As in the Weather benchmark."""
    series = read_series(write_lines(tmp_path / "a.csv", "date,a", *rows(1, 2, 3), f"{HOURS[2]},4", f"{HOURS[3]},5"))
    assert series.values[:, 0].tolist() == [1, 2, 3, 4, 5]
    scaler = Scaler(torch.zeros(1).double(), torch.ones(1).double())
    last_window(series, scaler, 2, 0)
    assert caplog.text == ""
    last_window(series, scaler, 4, 0)
    assert "1 rows have the date of the one before" in caplog.text
    assert "are not 1 hours" not in caplog.text


def test_only_some_columns(tmp_path):
    path = write_lines(tmp_path / "a.csv", "date,town,a", *rows("Oslo,1", "Oslo,2", "Oslo,3"))
    assert load_series("csv", str(path), ["a"]).columns == ["a"]
    with pytest.raises(UserError, match="column town: a number"):
        load_series("csv", str(path))


def test_static_covariates(tmp_path):
    """In the order of the variates, scaled over them; what is of no variate is left out."""
    path = write_lines(tmp_path / "a.csv", "area,column,height", "1,b,5", "9,x,9", "3,a,5")
    torch.testing.assert_close(read_static(path, ["a", "b"]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    with pytest.raises(UserError, match="a row for each variate expected, 0 found for c"):
        read_static(path, ["a", "c"])
    with pytest.raises(UserError, match="column height: 1 values are missing"):
        read_static(write_lines(tmp_path / "b.csv", "column,height", "a,1", "b,"), ["a", "b"])
    with pytest.raises(UserError, match="has no column named column, only date, a"):
        read_static(write_lines(tmp_path / "c.csv", "date,a", *rows(1)), ["a"])
