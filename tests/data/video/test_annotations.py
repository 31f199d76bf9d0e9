import os
from pathlib import Path

import pytest

from tests.tiny import told, write_image
from vim.data.video import find_videos, read_annotations
from vim.errors import UserError


@pytest.mark.parametrize("separator", [",", " ", "\t", ", "])
def test_separators_of_annotations(separator, tmp_path):
    path = tmp_path / "train.csv"
    path.write_text(f"\ufeffa b/1.mp4{separator}3\r\nc,d/2.mp4{separator}0\n\n")
    videos = read_annotations(path, tmp_path)
    assert [(Path(v.path).relative_to(tmp_path).as_posix(), v.label) for v in videos] == [
        ("a b/1.mp4", 3),
        ("c,d/2.mp4", 0),
    ]


@pytest.mark.parametrize(
    "line, path, label",
    [
        ('"run, jump.mp4",2', "run, jump.mp4", 2),
        ('"a.mp4","2"', "a.mp4", 2),
        ('"a 1" 0', "a 1", 0),
        ('"a ""b"".mp4"\t0', 'a "b".mp4', 0),
        ("run, jump.mp4,2", "run, jump.mp4", 2),
        ('5" screen.mp4 2', '5" screen.mp4', 2),
        ("12 2", "12", 2),
        ("a.mp4 ; 2", "a.mp4", 2),
        ("caf\udce9.mp4 2", "caf\udce9.mp4", 2),
        ("a\u2028b\x0c.mp4,2", "a\u2028b\x0c.mp4", 2),
    ],
)
def test_paths_with_separators_and_quotes(line, path, label, tmp_path):
    (tmp_path / "train.csv").write_text(f"{line}\n", errors="surrogateescape")
    assert read_annotations(tmp_path / "train.csv", tmp_path) == [(str(tmp_path / path), label, None, None)]


def test_labels_that_count_from_one(tmp_path, caplog):
    (tmp_path / "train.csv").write_text("a.mp4,0\nb.mp4,2\n")
    read_annotations(tmp_path / "train.csv", tmp_path)
    assert caplog.text == ""
    (tmp_path / "train.csv").write_text("a.mp4,1\nb.mp4,2\n")
    read_annotations(tmp_path / "train.csv", tmp_path)
    assert "train.csv: no video has label 0, the first class" in caplog.text


def test_annotations_that_are_no_text(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("a.mp4,0\n", encoding="utf-16")
    with pytest.raises(UserError, match=told("cannot read", path, "it is not in UTF-8", "lines PATH LABEL")):
        read_annotations(path, tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=told("cannot read", path, "it does not exist")):
        read_annotations(path, tmp_path)
    os.mkfifo(path)
    with pytest.raises(UserError, match=told("cannot read", path, "it is no regular file")):
        read_annotations(path, tmp_path)


def test_third_columns_of_annotations(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("a 12 3\n")
    assert read_annotations(path, tmp_path, third="frames")[0][1:] == (3, 12, None)
    path.write_text("a.mp4,3,75.5\n")
    assert [v.part for v in read_annotations(path, tmp_path, third="duration")] == [(0, 60), (16, 75.5), (32, 75.5)]


@pytest.mark.parametrize(
    "third, line, columns",
    [
        ("frames", "a 0 3", "PATH FRAMES LABEL"),
        ("frames", "a 3", "PATH FRAMES LABEL"),
        ("duration", "a.mp4 3 0", "PATH LABEL SECONDS"),
        ("duration", "a.mp4 3 inf", "PATH LABEL SECONDS"),
        ("duration", "a.mp4 3 nan", "PATH LABEL SECONDS"),
        ("duration", "a.mp4 3", "PATH LABEL SECONDS"),
        (None, ",3", "PATH LABEL"),
    ],
)
def test_a_line_with_other_columns(third, line, columns, tmp_path):
    (tmp_path / "train.csv").write_text(f"{line}\n")
    with pytest.raises(UserError, match=told("line 1", f"expected {columns},")):
        read_annotations(tmp_path / "train.csv", tmp_path, third=third)


@pytest.mark.parametrize(
    "text, parts",
    [
        ("", ["no video in", "expected lines PATH LABEL"]),
        ("path,label\na.mp4,1\n", ["line 1", "expected PATH LABEL", "no line of names", "path,label"]),
        ("a.mp4,1.5\n", ["line 1", "expected PATH LABEL"]),
        ("a.mp4,1\nb.mp4 2|3\n", ["line 2", "expected PATH LABEL", "got b.mp4 2|3"]),
        *(
            (f"a.mp4{a}1{b}3\n", ["line 1", "expected PATH LABEL, got 2 numbers after a.mp4: 1, 3", "has one label"])
            for a, b in [",,", "  ", ", ", " ,", ";;", "\t\t"]
        ),
        ("v 12 1\n", ["got 2 numbers after v: 12, 1", "a column of frames needs data.video.frame_template"]),
        ("a 1,0\n", ["got 2 numbers after a: 1, 0", 'in double quotes: "a 1",0']),
        ('"a.mp4",x\n', ["line 1", "expected PATH LABEL"]),
        ("a.mp4,-1\n", ["line 1", "expected PATH LABEL"]),
        ("a.mp4\n", ["line 1", "expected PATH LABEL"]),
        ("a.mp4,1\n../b.mp4,2\n", ["line 2", "lies outside", "set data.video.prefix"]),
        ("/etc/b.mp4,2\n", ["line 1", "lies outside"]),
        ("x/a.mp4,1\ny/a.mp4,2\n./x/a.mp4,3\n", ["line 3", "has label 3, and 1 before"]),
    ],
)
def test_mistakes_in_annotations(text, parts, tmp_path):
    path = tmp_path / "train.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=told(*parts)):
        read_annotations(path, tmp_path / "videos")


def test_a_picture_among_videos(tmp_path):
    video = tmp_path / "a.mp4"
    video.touch()
    write_image(tmp_path / "poster.jpg")
    write_image(tmp_path / "frames/1.jpg")
    assert find_videos([tmp_path]) == [video]
    assert find_videos([tmp_path / "frames"]) == [tmp_path / "frames"]
