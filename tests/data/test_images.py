import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from tests.tiny import image_data, told, write_folder, write_image, write_truncated
from vim.data import build_datasets, find_images, image_mode, read_image
from vim.errors import UserError


def test_missing_image(tmp_path):
    with pytest.raises(UserError, match=told("no such image", tmp_path / "a.png", "give the path")):
        read_image(tmp_path / "a.png")


def test_truncated_image(tmp_path):
    path = write_truncated(tmp_path / "a.png")
    with pytest.raises(UserError, match=told("cannot read", path, "truncated", "replace the file or take it out")):
        read_image(path)


@pytest.mark.parametrize("content", ["hello", ""])
def test_text_named_png(content, tmp_path):
    path = tmp_path / "a.png"
    path.write_text(content)
    with pytest.raises(UserError, match=told("cannot read", path, "replace the file or take it out")):
        read_image(path)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("source", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_kinds_of_images(source, mode, tmp_path):
    path = tmp_path / "a.tif"
    Image.open(write_image(tmp_path / "a.png", 1, 3)).convert(source).save(path)
    image = read_image(path, mode)
    assert (image.mode, image.size) == (mode, (3, 1))


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_sixteen_bits_are_scaled_to_eight(mode, tmp_path):
    Image.fromarray(np.array([[0, 257 * 100 + 200, 65535]], dtype=np.uint16)).save(tmp_path / "a.png")
    image = np.asarray(read_image(tmp_path / "a.png", mode)).reshape(3, -1)
    assert image[:, 0].tolist() == [0, 100, 255]


def test_thirty_two_bits_are_refused(tmp_path):
    Image.fromarray(np.zeros((2, 2), dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=told("cannot read", tmp_path / "a.tif", "save it with 8 or 16")):
        read_image(tmp_path / "a.tif")


def test_find_images(tmp_path):
    one, two = write_image(tmp_path / "b/1.png"), write_image(tmp_path / "a/x/2.JPG")
    (tmp_path / "a/notes.txt").write_text("no image")
    assert find_images([one, tmp_path]) == [one, two, one]


def test_find_images_in_a_missing_path(tmp_path):
    with pytest.raises(UserError, match=told("no such file or folder", tmp_path / "a", "give image files")):
        find_images([tmp_path / "a"])


def test_find_images_in_an_empty_folder(tmp_path):
    with pytest.raises(UserError, match=told("no image in", tmp_path, "expected files ending in .jpg")):
        find_images([tmp_path])


def test_a_folder_of_images(tmp_path):
    splits = build_datasets(image_data({"dataset": "folder", "root": str(write_folder(tmp_path / "data"))}), "L")
    assert splits.classes == ["cat", "dog"]
    assert [len(splits.train), len(splits.held_out)] == [8, 8]
    image, label = splits.train[7]
    assert (image.mode, label) == ("L", 1)


@pytest.mark.parametrize("data", [{"dataset": "folder"}, {"dataset": "folder", "root": ""}])
def test_a_folder_without_a_name(data):
    with pytest.raises(UserError, match=told("data.root must name the folder", "--cfg-options data.root=PATH")):
        build_datasets(image_data(data))


def test_a_folder_that_is_missing(tmp_path):
    with pytest.raises(UserError, match=told("no such folder", tmp_path / "a/train", "expected one folder of images")):
        build_datasets(image_data({"dataset": "folder", "root": str(tmp_path / "a")}))


def test_a_folder_without_classes(tmp_path):
    write_folder(tmp_path / "data", train=(), val=())
    with pytest.raises(UserError, match=told(tmp_path / "data/train", "must hold one folder of images a class")):
        build_datasets(image_data({"dataset": "folder", "root": str(tmp_path / "data")}))


def test_a_class_without_images(tmp_path):
    (write_folder(tmp_path / "data") / "train/bird").mkdir()
    with pytest.raises(UserError, match=told(tmp_path / "data/train", "no valid file for the classes bird")):
        build_datasets(image_data({"dataset": "folder", "root": str(tmp_path / "data")}))


def test_other_classes_in_train_than_in_val(tmp_path):
    root = write_folder(tmp_path / "data", val=("cat", "bird"))
    with pytest.raises(UserError, match=told(root, "must hold the same classes", "bird, dog: add these folders")):
        build_datasets(image_data({"dataset": "folder", "root": str(root)}))


def test_an_unknown_data_set():
    with pytest.raises(UserError, match="data.dataset must be 'digits', .*, 'videos', or one of timm's"):
        build_datasets(image_data({"dataset": "imagenet"}))


def test_a_worker_hands_on_the_message_alone(tmp_path):
    root = write_folder(tmp_path / "data")
    path = write_truncated(root / "train/cat/0.png")
    train = build_datasets(image_data({"dataset": "folder", "root": str(root)})).train
    with pytest.raises(UserError) as error:
        list(DataLoader(train, num_workers=1, collate_fn=list))
    assert str(error.value).startswith(f"cannot read {path}")
    assert "\n" not in str(error.value)


def test_neither_grey_nor_colour():
    class Model:
        in_chans = 2

    with pytest.raises(UserError, match="1 or 3 channels, and the model 2: --cfg-options model.in_chans=3"):
        image_mode(Model())
