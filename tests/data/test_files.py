import os
import socket
from pathlib import Path

import pytest
from PIL import Image

from tests.tiny import image_data, told, write_folder, write_video
from vim.data import build_datasets, find_images, find_videos, read_image, read_video
from vim.data.files import IMAGES, VIDEOS, class_files, files_below, files_in
from vim.errors import UserError

SYSTEM = [".ipynb_checkpoints/0.png", "__MACOSX/cat/._0.png", "@eaDir/0.png/SYNOPHOTO.jpg", "lost+found/0.png"]
HIDDEN = ["._0.png", ".DS_Store", "Thumbs.db", "desktop.ini", ".thumbnails/0.png"]


def write(path, content="no image"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def names(paths, root):
    return [os.path.relpath(path, root) for path in paths]


def test_what_systems_leave_in_folders_is_ignored(tmp_path, caplog):
    root = write_folder(tmp_path / "data")
    for name in (*SYSTEM, *HIDDEN, *(f"cat/{name}" for name in (*SYSTEM, *HIDDEN))):
        write(root / "train" / name)
    splits = build_datasets(image_data({"dataset": "folder", "root": str(root)}))
    assert splits.classes == ["cat", "dog"]
    assert names(splits.train.paths, root / "train") == [f"{kind}/{i}.png" for kind in ("cat", "dog") for i in range(4)]
    assert names(find_images([root / "train/cat"]), root / "train/cat") == [f"{i}.png" for i in range(4)]
    assert caplog.text == ""


def write_strange(folder):
    """A pipe, a socket, a broken link, a link to itself, a link to a device and a folder, each named as an image."""
    os.mkfifo(folder / "pipe.png")
    here = os.getcwd()
    os.chdir(folder)  # a socket's path has a hundred characters at most
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")
    os.chdir(here)
    (folder / "broken.png").symlink_to("none.png")
    (folder / "itself.png").symlink_to("itself.png")
    (folder / "device.png").symlink_to("/dev/zero")
    (folder / "folder.png").mkdir()


def test_only_regular_files_are_read(tmp_path, caplog):
    root = write_folder(tmp_path / "data")
    write_strange(root / "train/cat")
    (root / "train/cat/link.png").symlink_to("0.png")
    data = build_datasets(image_data({"dataset": "folder", "root": str(root)})).train
    assert names(data.paths, root / "train/cat")[:5] == [*(f"{i}.png" for i in range(4)), "link.png"]
    assert len(data) == 9
    (line,) = caplog.messages
    assert line.startswith(f"{root / 'train'}: left out, since they are no image files: 3 pipes, sockets or devices (")
    assert "2 broken links (cat/" in line and "1 folders, empty or met before (cat/folder.png)" in line


@pytest.mark.parametrize("name", ["pipe.png", "socket.png", "device.png", "folder.png"])
def test_what_is_no_file_is_not_opened(name, tmp_path):
    write_strange(tmp_path)
    with pytest.raises(UserError, match=told("cannot read", tmp_path / name, "it is no regular file")):
        read_image(tmp_path / name)
    if name != "folder.png":
        for find in (find_images, find_videos):
            with pytest.raises(UserError, match=told("no such file or folder", tmp_path / name)):
                find([tmp_path / name])


def test_other_files_are_counted_and_named(tmp_path, caplog):
    for name in ("a.PNG", "b.txt", "c.txt", "d", "x/e.json", "x/f.jpeg"):
        write(tmp_path / name)
    assert names(files_below(tmp_path, IMAGES), tmp_path) == ["a.PNG", "x/f.jpeg"]
    (line,) = caplog.messages
    assert line == (
        f"{tmp_path}: left out, since they are no image files: 2 .txt (c.txt), 1 without an ending (d), "
        "1 .json (x/e.json)"
    )


def test_every_kind_that_the_decoders_read(tmp_path):
    kinds = [".flv", ".wmv", ".ts", ".3gp", ".mpeg", ".mts", ".m2ts", ".gif", ".ogv", ".vob", ".MP4", ".Mov"]
    assert all(VIDEOS.holds(f"a.b{kind}") for kind in kinds)
    assert all(IMAGES.holds(f"a{kind}") for kind in (".gif", ".jfif", ".avif", ".jp2", ".tga", ".mpo", ".TIFF"))
    assert not any(IMAGES.holds(f"a{kind}") for kind in (".mpg", ".mp4", ".pdf", ".eps", ".txt", ".h5", ""))
    for kind in (".eps", ".jpg"):  # for PostScript Pillow would run another program, whatever the file is called
        write(tmp_path / f"a{kind}", "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
        with pytest.raises(UserError, match="no image that Pillow knows"):
            read_image(tmp_path / f"a{kind}")


def test_files_in_the_order_of_their_folders(tmp_path):
    """As torchvision's ImageFolder has them, by which a run that is resumed finds its images."""
    for name in ("b.png", "a-b/c.png", "a/d.png", "a/x/e.png", "a/x.png"):
        write(tmp_path / name)
    assert names(files_below(tmp_path, IMAGES), tmp_path) == ["b.png", "a/d.png", "a/x.png", "a-b/c.png", "a/x/e.png"]
    assert files_in(tmp_path, IMAGES) == ["b.png"]


def test_links_to_folders_are_followed_once(tmp_path, caplog):
    write(tmp_path / "all/cat/0.png")
    (tmp_path / "train").mkdir()
    (tmp_path / "train/cat").symlink_to("../all/cat")
    (tmp_path / "all/cat/up").symlink_to("..")
    assert names(files_below(tmp_path / "train", IMAGES), tmp_path) == ["train/cat/0.png"]
    assert "met before (cat/up/cat)" in caplog.text


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    write(tmp_path / "x/a.png")
    scandir = os.scandir

    def refuse(folder):
        if str(folder).endswith("x"):
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=told("cannot list the folder", tmp_path / "x", "(Permission denied)")):
        files_below(tmp_path, IMAGES)


@pytest.mark.parametrize(
    "files, parts",
    [
        ((), ["no such folder: train (expected one folder of images a class in it)"]),
        (("images/train/cat/0.png",), ["no such folder: train", "; ./images has one: point data.root there"]),
        (("train/a.txt",), ["train must hold one folder of images a class: it holds no folder, and 0 images"]),
        (("train/0.png", "train/1.png"), ["it holds no folder, and 2 images"]),
        (("train/cat/0.png", "train/bird/a.txt"), ["no image in train/bird", "such as .jpg, .png", "take the folder"]),
        (
            ("train/images/cat/0.png", "train/images/dog/0.png"),
            [
                "train/images has folders (cat, dog) and no images of its own",
                "move them up to train, or point data.root",
            ],
        ),
        (
            ("train/images/cat/0.png", "train/images/dog/0.png", "train/labels/a.txt"),
            ["train/images has folders (cat, dog) and no images of its own"],
        ),
    ],
)
def test_folders_that_hold_no_classes(files, parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in files:
        write(tmp_path / name)
    with pytest.raises(UserError, match=told(*parts)):
        class_files(Path("train"), IMAGES)


@pytest.mark.parametrize(
    "files, classes, line",
    [
        (("cat/0.png",), ["cat"], "train holds one class only, cat: every prediction is right"),
        (("cat/x/0.png",), ["cat"], "train holds one class only, cat: every prediction is right"),
        (("a/0.png", "b/0.png", "0.png"), ["a", "b"], "train: left out, since they lie in no class's folder: 1 images"),
        (("cat/x/0.png", "dog/y/0.png", "dog/z/0.png"), ["cat", "dog"], None),
        (
            [f"{batch}/{name}/0.png" for batch in ("a", "b") for name in ("cat", "dog")],
            ["a", "b"],
            "train: taken as classes: a, b. Each has folders (cat, dog) and no images of its own: if these are the",
        ),
    ],
)
def test_classes_that_may_be_a_mistake(files, classes, line, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    for name in files:
        write(tmp_path / "train" / name)
    found, pairs = class_files(Path("train"), IMAGES)
    assert found == classes
    assert sorted(pairs) == sorted((f"train/{n}", classes.index(n.split("/")[0])) for n in files if "/" in n)
    assert caplog.text == "" if line is None else line in caplog.text


def test_images_of_every_kind_in_one_folder(tmp_path):
    kinds = ["jpg", "jfif", "png", "webp", "gif", "bmp", "tif", "jp2", "tga", "ppm", "avif", "ico", "qoi"]
    for kind in kinds:
        Image.new("RGB", (16, 16), "red").save(tmp_path / f"a.{kind}")
    found = find_images([tmp_path])
    assert sorted(path.suffix[1:] for path in found) == sorted(kinds)
    for path in found:
        red, green, blue = read_image(path).getpixel((8, 8))
        assert red > 250 and green < 5 and blue < 5, path


def test_names_that_cannot_be_printed(tmp_path):
    """Bytes that are no UTF-8, a new line, a terminal's command: files are found and read, and messages are escaped."""
    root = write_folder(tmp_path / "data", train=(), val=())
    folder, name = os.fsdecode(b"caf\xe9"), os.fsdecode(b"a\n\x1b[31m\xff.png")
    for part in ("train", "val"):
        write(root / part / folder / name)
    splits = build_datasets(image_data({"dataset": "folder", "root": str(root)}))
    assert splits.classes == ["caf\\udce9"]
    with pytest.raises(UserError, match=told("cannot read", "caf\\udce9/a\\n\\x1b[31m\\udcff.png as an image")):
        splits.train[0]
    path = root / "train" / folder / name
    Image.new("RGB", (4, 4)).save(path)
    assert splits.train[0][0].size == (4, 4)
    video = write_video(path.with_suffix(".mp4"))
    assert find_videos([root / "train"]) == [video]
    assert len(read_video(video, lambda count, fps: [0])) == 1
    with pytest.raises(UserError, match=told("no such video", "caf\\udce9/none\\udcff")):
        read_video(path.with_name(os.fsdecode(b"none\xff")), lambda count, fps: [0])
