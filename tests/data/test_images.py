import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from tests.tiny import image_data, is_upright, told, write_folder, write_image, write_truncated, write_turned
from vim.data import build_datasets, find_images, image_mode, read_image
from vim.data.images import convert
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
@pytest.mark.parametrize("kind", ["png", "tif", "jp2", "pgm"])
def test_sixteen_bits_are_scaled_to_eight(kind, mode, tmp_path):
    Image.fromarray(np.array([[0, 257 * 100 + 200, 65535]], dtype=np.uint16)).save(tmp_path / f"a.{kind}")
    image = np.asarray(read_image(tmp_path / f"a.{kind}", mode)).reshape(3, -1)
    assert image[:, 0].tolist() == [0, 100, 255]


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_thirty_two_bits_are_refused(kind, tmp_path):
    Image.fromarray(np.zeros((2, 2), dtype=kind)).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=told("cannot read", tmp_path / "a.tif", "save it with 8 or 16")):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif", "avif", "mpo"])
def test_images_are_upright(kind, orientation, tmp_path):
    assert is_upright(read_image(write_turned(tmp_path / f"a.{kind}", orientation)))


@pytest.mark.parametrize("depth", [8, 16])
def test_grey_images_are_upright(depth, tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    pixels = np.array([[0, 1, 2]], np.uint8) if depth == 8 else np.array([[0, 257, 514]], np.uint16)
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    assert np.asarray(read_image(tmp_path / "a.png", "L")).tolist() == [[0], [1], [2]]


def test_an_orientation_in_adobe_s_tags(tmp_path):
    turned = Image.open(write_turned(tmp_path / "a.png", 6))
    tags = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    turned.save(tmp_path / "a.jpg", xmp=tags, exif=b"")
    assert is_upright(read_image(tmp_path / "a.jpg"))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    "tags",
    [
        b"Exif\0\0garbage",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x02ab\0\0",
        b"Exif\0\0",
    ],
)
@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_damaged_tags_of_a_sound_image(kind, tags, tmp_path):
    with Image.open(write_turned(tmp_path / "a.png", 1)) as image:
        image.save(tmp_path / f"b.{kind}", exif=tags)
    assert is_upright(read_image(tmp_path / f"b.{kind}"))


# In each of these, the first pixel is transparent and black, the second half transparent and black where the kind of
# image can have that, and the last opaque and red, or 100 where it is grey.
CLEAR, HALF, RED = (0, 0, 0, 0), (0, 0, 0, 128), (255, 0, 0, 255)
COLOURS = np.array([[CLEAR, HALF, RED]], np.uint8)


def clear(mode):
    image = Image.fromarray(COLOURS)
    if mode == "PA":
        palette = Image.new("P", (3, 1))
        palette.putpalette([0, 0, 0, 255, 0, 0])
        palette.putdata([0, 0, 1])
        palette.putalpha(image.getchannel("A"))
        return palette
    if mode in ("LA", "La"):
        return Image.fromarray(np.array([[(0, 0), (0, 128), (100, 255)]], np.uint8)).convert(mode)
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "PA"])
def test_images_in_memory_are_put_on_white(mode):
    """As :func:`timm.data.create_dataset` may hand them on."""
    image = clear(mode)
    assert image.mode == mode
    pixels = np.asarray(convert(image, "RGB"))[0].tolist()
    assert pixels == [[255] * 3, [127] * 3, [100] * 3 if "L" in mode else [255, 0, 0]]
    assert np.asarray(convert(image, "L"))[0].tolist() == [255, 127, 100 if "L" in mode else 76]


@pytest.mark.parametrize("kind", ["png", "webp", "tif", "tga", "avif", "jp2"])
def test_transparent_images_are_put_on_white(kind, tmp_path):
    whole = np.repeat(np.repeat(COLOURS, 16, axis=0), 16, axis=1)
    Image.fromarray(whole).save(tmp_path / f"a.{kind}", **({"lossless": True} if kind == "webp" else {}))
    pixels = np.asarray(read_image(tmp_path / f"a.{kind}")).astype(int)[8, [8, 24, 40]]
    assert np.abs(pixels - [[255] * 3, [127] * 3, [255, 0, 0]]).max() <= (3 if kind == "avif" else 0)


def test_opaque_images_keep_their_pixels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 4), dtype=np.uint8)
    pixels[..., 3] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "a.png")), pixels[..., :3])


def write_png(path, depth, colour, row, transparent, palette=b""):
    """A PNG of one row, written out here because Pillow writes few of its kinds."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    width = {0: 8 * len(row) // depth, 2: 8 * len(row) // depth // 3, 3: len(row)}[colour]
    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0))]
    parts += [chunk(b"PLTE", palette)] if palette else []
    parts += [chunk(b"tRNS", transparent), chunk(b"IDAT", zlib.compress(b"\0" + row)), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


PALETTE = bytes([0, 0, 0, 40, 40, 40])


@pytest.mark.parametrize(
    "depth, colour, row, transparent, palette, expected",
    [
        (1, 0, b"\x55", b"\0\0", b"", [255] * 8),
        (2, 0, b"\x6c", b"\0\1", b"", [255, 170, 255, 0]),
        (4, 0, b"\x3a", b"\0\3", b"", [255, 170]),
        (8, 0, b"\7\t", b"\0\7", b"", [255, 9]),
        (16, 0, struct.pack(">2H", 700, 25700), struct.pack(">H", 700), b"", [255, 100]),
        (8, 2, b"\1\1\1\t\t\t", b"\0\1\0\1\0\1", b"", [255, 9]),
        (16, 2, struct.pack(">6H", *[700] * 3, *[25700] * 3), struct.pack(">3H", *[700] * 3), b"", [255, 100]),
        (8, 3, b"\0\1", b"\0", PALETTE, [255, 40]),
        (8, 3, b"\0\1", b"\x80\0", PALETTE, [127, 255]),
        (8, 3, b"\0\1", bytes(1000), PALETTE, [255, 255]),
    ],
)
def test_transparent_colours(depth, colour, row, transparent, palette, expected, tmp_path):
    image = read_image(write_png(tmp_path / "a.png", depth, colour, row, transparent, palette))
    assert np.asarray(image)[0].tolist() == [[value] * 3 for value in expected]


def test_a_transparent_colour_of_gif(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.putdata([0, 1])
    image.save(tmp_path / "a.gif", transparency=0)
    assert np.asarray(read_image(tmp_path / "a.gif"))[0].tolist() == [[255, 255, 255], [255, 0, 0]]


def test_find_images(tmp_path):
    one, two = write_image(tmp_path / "b/1.png"), write_image(tmp_path / "a/x/2.JPG")
    (tmp_path / "a/notes.txt").write_text("no image")
    assert find_images([one, tmp_path]) == [one, two, one]


def test_find_images_in_a_missing_path(tmp_path):
    with pytest.raises(UserError, match=told("no such file or folder", tmp_path / "a", "give image files")):
        find_images([tmp_path / "a"])


def test_find_images_in_an_empty_folder(tmp_path):
    with pytest.raises(
        UserError, match=told("no image in", tmp_path, "expected files that Pillow reads, such as .jpg")
    ):
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
