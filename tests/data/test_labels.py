"""CSV files of labels: every layout, and every mistake with the line it is in."""

import os
import re

import pytest
import torch

from tests.tiny import image_data, write_image, write_lines
from vim.data import build_datasets, several_labels
from vim.data.labels import read_labels
from vim.errors import UserError


def labels(root, *lines, part="train"):
    write_lines(root / "labels.csv", *lines)
    return read_labels(root, "labels.csv", part)


def test_one_class_a_file(tmp_path):
    lines = "file,label,split,note", "b.jpg,dog,val,x", ' "c,d.jpg" ,cat,train,', "", "sub/a.jpg,owl,train,y", ",,,"
    lines = [line.replace(' "', '"').replace('" ', '"') for line in lines]
    train, val = labels(tmp_path, *lines), labels(tmp_path, *lines, part="val")
    assert train.classes == val.classes == ["cat", "dog", "owl"]
    assert train.files == [str(tmp_path / "c,d.jpg"), str(tmp_path / "sub/a.jpg")]
    assert (train.targets.tolist(), val.targets.tolist()) == ([0, 2], [1])
    assert (train.label(1), type(train.label(1))) == (2, int)


def test_names_separated_by_semicolons(tmp_path):
    lines = "file,labels", "train/a.jpg,dog; cat", "train/b.jpg,", "val/c.jpg,owl", "train/d.jpg,dog;dog;"
    train = labels(tmp_path, *lines)
    assert train.classes == ["cat", "dog", "owl"]  # of both parts
    assert train.targets.dtype == torch.int8
    assert train.targets.tolist() == [[1, 1, 0], [0, 0, 0], [0, 1, 0]]
    assert labels(tmp_path, *lines, part="val").targets.tolist() == [[0, 0, 1]]


def test_a_column_for_each_class(tmp_path):
    lines = "\ufefffile,split,zebra,ant", "a.jpg,train,1,0", "b.jpg,train,,1.0", "c.jpg,val,0.0,0"
    train = labels(tmp_path, *lines)
    assert train.classes == ["zebra", "ant"]  # in the order of the file
    assert train.targets.tolist() == [[1, 0], [-1, 1]]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["name,label"], "has the columns 'name,label': expected file,label, or file,labels with names separated"),
        (["file;labels"], "has the columns 'file;labels': expected .*, separated by commas"),
        (["file,cat,cat"], "has the column 'cat' twice"),
        (["file,cat,"], "has the columns 'file,cat,'"),
        (["file,label,labels"], "has the columns 'file,label,labels'"),
        (["file,split"], "has no labels: expected file,label"),
        (["file,label"], "has no file of the part 'train'"),
        (["file,label", "train/a,cat,dog"], "line 2 has 3 cells, and the header 2"),
        (["file,label", "train/a,cat", "", "train/b"], "line 4 has 1 cells"),
        (["file,label", "a.jpg,cat"], "line 2: the part must be train, val or test, the first folder .* got 'a.jpg'"),
        (["file,label,split", "a.jpg,cat,Train"], "line 2: the part must be train, val or test, got 'Train'"),
        (["file,label", "val/a.jpg,cat"], "has no file of the part 'train', only of val"),
        (["file,label", "train/../../a.jpg,cat"], "line 2: 'train/../../a.jpg' is not a file in"),
        (["file,label,split", "/etc/passwd,cat,train"], "line 2: '/etc/passwd' is not a file in"),
        (["file,label,split", ".,cat,train"], "line 2: '.' is not a file in"),
        (["file,label", "train/a.jpg,cat", "train/./a.jpg,dog"], "line 3: 'train/./a.jpg' comes twice"),
        (["file,label", "train/a.jpg,"], "line 2: expected the name of one class, got no label"),
        (["file,label", "train/a.jpg,cat;dog"], "line 2: .*, got 'cat;dog': name the column labels if a file may"),
        (["file,cat", "train/a.jpg,2"], "line 2: the column 'cat' must have 0, 1 or nothing, got '2'"),
        (["file,cat", "train/a.jpg,-1"], "the column 'cat' must have 0, 1 or nothing, got '-1'"),
        (["file,cat", 'train/a.jpg,"1'], "cannot read the labels .*labels.csv .unexpected end of data"),
        (["file,cat", "train/\x1b[2J.jpg,\x1b"], r"got '\\x1b'"),
    ],
)
def test_mistakes(lines, message, tmp_path):
    with pytest.raises(UserError, match=message):
        labels(tmp_path, *lines)


def test_a_file_that_is_no_csv(tmp_path):
    for content, reason in (
        (b"file,label\ntrain/a\xff,cat", "utf-8"),
        (b"", "the columns ''"),
        (None, "no such file: .*labels.csv"),
    ):
        (tmp_path / "labels.csv").unlink(missing_ok=True)
        if content is not None:
            (tmp_path / "labels.csv").write_bytes(content)
        with pytest.raises(UserError, match=reason):
            read_labels(tmp_path, "labels.csv", "train")


def test_a_pipe_is_no_csv(tmp_path):
    os.mkfifo(tmp_path / "labels.csv")
    with pytest.raises(UserError, match="no such file: .*labels.csv"):
        read_labels(tmp_path, "labels.csv", "train")


def test_a_single_class(tmp_path, caplog):
    labels(tmp_path, "file,label", "train/a.jpg,cat")
    assert "the labels hold one class only, 'cat': every prediction is right" in caplog.text


def data_of(root, *lines, **options):
    write_lines(root / "labels.csv", *lines)
    return image_data({"dataset": "folder", "root": str(root), "labels": "labels.csv", **options})


def test_images_and_their_labels(tmp_path):
    write_image(tmp_path / "train/a.png")
    write_image(tmp_path / "val/b.png")
    splits = build_datasets(data_of(tmp_path, "file,x,y", "train/a.png,1,", "val/b.png,0,1"))
    assert splits.classes == ["x", "y"]
    assert several_labels(splits.train)
    image, label = splits.train[0]
    assert (image.size, label.tolist()) == ((12, 10), [1, -1])
    assert splits.train.ignored.tolist() == [-1, -1]
    single = build_datasets(data_of(tmp_path, "file,label", "train/a.png,x", "val/b.png,y"))
    assert not several_labels(single.train)
    assert (single.train[0][1], single.held_out[0][1], single.classes) == (0, 1, ["x", "y"])


def test_videos_and_their_labels(tmp_path):
    for frame in range(2):
        for name in ("train/a", "val/b"):
            write_image(tmp_path / name / f"{frame}.png")
    lines = "file,labels", "train/a,x;y", "val/b,y"
    splits = build_datasets(data_of(tmp_path, *lines, dataset="videos", video={"num_frames": 2}))
    clip, label = splits.train[0]
    assert (len(clip), label.tolist(), splits.classes) == (2, [1, 1], ["x", "y"])
    assert splits.held_out.targets.tolist() == [[0, 1]]
    for video, message in (
        ({"sampling": "windows"}, "does not go together with"),
        ({"prefix": "/"}, "data.video does"),
    ):
        with pytest.raises(UserError, match=message):
            build_datasets(data_of(tmp_path, *lines, dataset="videos", video=video))


def test_data_sets_that_have_labels_of_their_own(tmp_path):
    with pytest.raises(UserError, match="data.labels is for data.dataset='folder' or 'videos', got 'digits'"):
        build_datasets(data_of(tmp_path, "file,label", "train/a,x", dataset="digits"))
    with pytest.raises(UserError, match=re.escape("data.root must name the folder that holds labels.csv")):
        build_datasets(image_data({"dataset": "folder", "labels": "labels.csv"}))
