import io
import subprocess
import sys
import tarfile

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from tests import tiny
from tests.tiny import image_data, is_upright, write_folder, write_parquet, write_shards, write_truncated
from vim.data import IGNORED, Digits, Share, build_datasets, create_loader, loading, part
from vim.data.datasets import TimmImages
from vim.data.streams import Stream
from vim.errors import UserError


def to_tensor(image):
    """The image's mean, and a random number."""
    return torch.tensor([sum(image.convert("L").tobytes()), torch.rand((), dtype=torch.float64)], dtype=torch.float64)


def load(dataset, *, share=Share(), epoch=0, start=0, is_training=True, batch_size=8, **options):  # noqa: B008
    loader = create_loader(
        dataset,
        to_tensor,
        batch_size=batch_size,
        seed=0,
        share=share,
        is_training=is_training,
        **{"num_workers": 0, **options},
    )
    if is_training:
        loader.batch_sampler.epoch, loader.batch_sampler.start = epoch, start
    return list(loader)


@pytest.fixture(scope="module")
def digits():
    return Digits(train=False)


def rows(batches):
    return sorted(tuple(row) for batch in batches for row in batch.images.tolist())


def test_workers_change_nothing(digits):
    for one, other in zip(load(digits), load(digits, num_workers=3), strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)


def test_an_epoch_goes_on_from_its_middle(digits):
    for one, other in zip(load(digits, epoch=3)[17:], load(digits, epoch=3, start=17), strict=True):
        assert torch.equal(one.images, other.images)


def test_epochs_differ_in_order_and_in_preparation(digits):
    one, other = load(digits, epoch=0), load(digits, epoch=1)
    assert not torch.equal(torch.cat([b.images[:, 0] for b in one]), torch.cat([b.images[:, 0] for b in other]))
    assert not {row[1] for row in rows(one)} & {row[1] for row in rows(other)}


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_each_step(digits, world, repeats):
    alone = load(digits, batch_size=world * 4, repeats=repeats)
    parts = [load(digits, batch_size=4, share=Share(rank, world), repeats=repeats) for rank in range(world)]
    assert [len(part) for part in parts] == [len(alone)] * world
    for step, whole in enumerate(alone):
        assert rows([whole]) == rows([part[step] for part in parts])


def test_samples_are_prepared_anew_and_make_the_epoch_longer(digits):
    batches = load(digits, samples=2)
    assert len(batches) == 2 * len(digits) // 8
    for batch in batches:
        means, numbers = batch.images.view(4, 2, 2).unbind(2)
        assert (means[:, 0] == means[:, 1]).all()
        assert (numbers[:, 0] != numbers[:, 1]).all()
    assert len({mean for mean, _ in rows(batches)}) == len({mean for mean, _ in rows(load(digits))})


def test_repeats_are_prepared_anew_and_make_no_epoch_longer(digits):
    batches = load(digits, repeats=3, batch_size=3)
    assert len(batches) == 256 // 3  # of 360 images
    for batch in batches:
        assert len(set(batch.images[:, 0].tolist())) == 1  # one image, three times
        assert len(set(batch.images[:, 1].tolist())) == 3


def test_repeats_of_few_images():
    assert [len(batch.labels) for batch in load([(Image.new("L", (2, 2)), 0)] * 10, repeats=3, batch_size=4)] == [4, 4]


@pytest.mark.parametrize("world", [1, 2, 7])
def test_evaluation_sees_every_image_once(digits, world):
    parts = [load(digits, is_training=False, share=Share(rank, world), batch_size=50) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    labels = torch.cat([batch.labels for part in parts for batch in part])
    assert sorted(labels[labels != IGNORED].tolist()) == sorted(digits.labels)


class Broken:
    """Three images, the first of which cannot be read."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        if index == 0:
            raise UserError("cannot read 0")
        return Image.new("L", (2, 2)), index


def test_padding_is_not_counted():
    """Of two processes the second has a padded batch: with the first image again, which is not named again."""
    parts = [load(Broken(), is_training=False, share=Share(rank, 2), batch_size=2) for rank in range(2)]
    assert [batch.labels.tolist() for batches in parts for batch in batches] == [[IGNORED, 2], [1, IGNORED]]
    assert [batch.unreadable for batches in parts for batch in batches] == [["cannot read 0"], []]


def test_what_cannot_be_read_is_replaced_in_training_and_left_out_in_evaluation(tmp_path):
    root = write_folder(tmp_path)
    bad = write_truncated(root / "train/cat/0.png")
    write_truncated(root / "val/cat/0.png")
    splits = build_datasets(image_data({"dataset": "folder", "root": root}))
    batches = load(splits.train)
    assert [len(batch.labels) for batch in batches] == [8]
    assert [line.startswith(f"cannot read {bad}") for batch in batches for line in batch.unreadable] == [True]
    (batch,) = load(splits.held_out, is_training=False)
    assert batch.labels.tolist() == [IGNORED, 0, 0, 0, 1, 1, 1, 1]
    assert len(batch.unreadable) == 1


def test_nothing_can_be_read(tmp_path):
    root = write_folder(tmp_path, count=2)
    for path in root.glob("train/*/*"):
        write_truncated(path)
    with pytest.raises(UserError, match="4 images in a row cannot be read: cannot read"):
        load(build_datasets(image_data({"dataset": "folder", "root": root})).train, batch_size=2)


def test_it_ends_after_many_images_that_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "MOST_UNREADABLE", 3)
    root = write_folder(tmp_path / "folder", count=2)
    for path in root.glob("train/*/*"):
        write_truncated(path)
    with pytest.raises(UserError, match="^3 images in a row cannot be read"):
        load(build_datasets(image_data({"dataset": "folder", "root": root})).train, batch_size=2)
    with pytest.raises(UserError, match="^3 images in a row cannot be read"):
        stream(write_shards(tmp_path / "shards", broken=range(32)))


def test_images_in_tar_files(tmp_path):
    root = write_folder(tmp_path / "images")
    bad = write_truncated(root / "train/dog/2.png")
    for name in ("train", "val"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as archive:
            archive.add(root / name, ".")
    splits = build_datasets(image_data({"dataset": "tar", "root": tmp_path}))
    assert isinstance(splits.train, TimmImages)
    assert splits.classes == ["cat", "dog"]
    batches = load(splits.train)
    assert sorted(torch.cat([batch.labels for batch in batches]).tolist()).count(0) >= 4
    assert [bad.name in line for batch in batches for line in batch.unreadable] == [True]


def test_what_systems_leave_in_tar_files(tmp_path):
    """Hidden files, a hidden class, one of system files; and images that are neither PNG nor JPEG."""
    root = write_folder(tmp_path / "images")
    Image.new("RGB", (9, 9)).save(root / "train/dog/a.webp")
    for name in ("cat/._0.png", ".ipynb_checkpoints/0.png", "__MACOSX/dog/._0.png", "zoo/._1.png"):
        (root / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "train" / name).write_text("no image")
    for name in ("train", "val"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as archive:
            archive.add(root / name, ".")
    splits = build_datasets(image_data({"dataset": "tar", "root": tmp_path}))
    assert splits.classes == ["cat", "dog"]
    assert [splits.train[i][1] for i in range(len(splits.train))] == [0] * 4 + [1] * 5


def encode_turned(number, broken=()):
    """A PNG of a red image as a camera on its side stores it; every other one has alpha, and is clear besides."""
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x112] = 6
    pixels = np.zeros((64, 48, 4), np.uint8)
    pixels[48:, :12] = 255, 0, 0, 255
    image = Image.fromarray(pixels)
    if number % 2:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    image.save(file, "png", exif=exif)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["folder", "tar", "torch/image_folder", "hfds", "hfids", "wds"])
def test_every_reader_makes_images_upright_and_opaque(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "encode", encode_turned)
    for part_name in ("train", "val"):
        for number in range(2):
            path = tmp_path / part_name / "ab"[number] / "0.png"
            path.parent.mkdir(parents=True)
            path.write_bytes(encode_turned(number))
        with tarfile.open(tmp_path / f"{part_name}.tar", "w") as archive:
            archive.add(tmp_path / part_name, ".")
    data = {"dataset": kind, "root": str(tmp_path)}
    if kind == "torch/image_folder":
        data["train_options"] = {"split": "train"}
    if kind == "wds":
        data = write_shards(tmp_path / "shards")
    if kind in ("hfds", "hfids"):
        data = write_parquet(tmp_path / "parquet")
        data["dataset"] = data["dataset"].replace("hfids", kind)
        data["train_options"] = {"split": "train"} if kind == "hfds" else data["train_options"]
    dataset = part(image_data(data), "train", "RGB")
    images = dataset if isinstance(dataset, Stream) else (dataset[i] for i in range(len(dataset)))
    images = [image for image, _ in images]
    assert len(images) >= 2 and all(map(is_upright, images))


STREAMS = pytest.mark.parametrize("write", [write_shards, write_parquet])


def stream_loader(data, num_workers, batch_size=8, *, is_training=True):
    return create_loader(
        part(image_data({**data, "batch_size": batch_size}), "train" if is_training else "val", "RGB"),
        pil_to_tensor,
        batch_size=batch_size,
        num_workers=num_workers,
        seed=0,
        share=Share(),
        is_training=is_training,
    )


def stream(data, epoch=0, num_workers=0, *, is_training=True):
    torch.manual_seed(epoch)  # what the trainer seeds before an epoch
    loader = stream_loader(data, num_workers, is_training=is_training)
    loader.dataset.epoch = epoch
    batches = list(loader)
    assert len(batches) == len(loader) == 4
    return batches


def numbers(batches):
    """Which images batches hold, by their colour."""
    return [int(image[0, 0, 0]) for batch in batches for image in batch.images]


@STREAMS
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_is_the_same_each_time(write, num_workers, tmp_path):
    data = write(tmp_path)
    one, again, other = (numbers(stream(data, epoch, num_workers)) for epoch in (0, 0, 1))
    assert one == again
    assert one != other
    assert sorted(one) == sorted(other) == list(range(32))


@STREAMS
def test_a_stream_is_the_same_after_others(write, tmp_path):
    dataset = part(image_data({"batch_size": 8, **write(tmp_path)}), "train", "RGB")
    orders = []
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        orders.append([image.getpixel((0, 0)) for image, _ in dataset])
    assert orders[0] == orders[2] != orders[1]


@STREAMS
@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_images_of_a_stream(write, num_workers, tmp_path):
    data = write(tmp_path, broken=(0, 5, 31))
    batches = stream(data, num_workers=num_workers)
    lines = [line for batch in batches for line in batch.unreadable]
    assert len(lines) == 3
    assert all("cannot read " in line for line in lines)
    assert set(numbers(batches)) == set(range(32)) - {0, 5, 31}
    batches = stream(data, num_workers=num_workers, is_training=False)
    assert [label for batch in batches for label in batch.labels.tolist()].count(IGNORED) == 3
    assert sum(len(batch.unreadable) for batch in batches) == 3


@STREAMS
def test_a_broken_image_of_a_stream_has_one_name(write, tmp_path):
    data = write(tmp_path, broken=(0, 5, 31))
    assert len({line for epoch in range(3) for batch in stream(data, epoch) for line in batch.unreadable}) == 3


def test_processes_see_each_sample_of_shards_once(tmp_path, monkeypatch):
    """Three shards for two processes; timm would have each give half of the samples."""
    data = write_shards(tmp_path)
    options = {"split": "in-train-{0..2}.tar|24"}
    seen = []
    for rank in range(2):
        dataset = part(image_data({**data, "val_options": options}), "val", "RGB")
        dataset.dataset.reader.dist_rank, dataset.dataset.reader.dist_num_replicas = rank, 2
        seen += [image.getpixel((0, 0))[0] for image, _ in dataset]
    assert sorted(seen) == list(range(24))


@STREAMS
def test_a_stream_of_images_of_16_bits(write, tmp_path, monkeypatch):
    file = io.BytesIO()
    Image.fromarray(np.full((10, 10), 200 * 257, np.uint16)).save(file, "png")
    monkeypatch.setattr(tiny, "encode", lambda number, broken: file.getvalue())
    assert set(numbers(stream(write(tmp_path)))) == {200}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("damaged", [2, 3])  # the last: no image comes after what is found there
def test_broken_shards_are_named(damaged, is_training, num_workers, tmp_path):
    data = write_shards(tmp_path)
    (tmp_path / "in-train-1.tar").unlink()
    path = tmp_path / f"in-train-{damaged}.tar"
    path.write_bytes(path.read_bytes()[: 10 * 1024 + 700])
    loader = stream_loader(data, num_workers, batch_size=4, is_training=is_training)
    lines = {line for batch in loader for line in batch.unreadable if "cannot read all of " in line}
    expected = ["1.tar: it is missing", f"{damaged}.tar: it is damaged"]
    assert sorted(line.partition("in-train-")[2] for line in lines) == expected


@STREAMS
def test_a_stream_of_broken_images(write, tmp_path):
    with pytest.raises(UserError, match="32 images in a row cannot be read: cannot read "):
        stream(write(tmp_path, broken=range(32)))


@STREAMS
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_more_workers_than_shards(write, tmp_path):
    with pytest.raises(UserError, match="shard"):
        stream(write(tmp_path), num_workers=5)


def test_a_hugging_face_data_set(tmp_path):
    images = [Image.new("RGB", (10, 10), (i, 0, 0)) for i in range(16)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dog", "cat"])})
    table = datasets.Dataset.from_dict({"image": images, "label": [i % 2 for i in range(16)]}, features=features)
    table.to_parquet(tmp_path / "train.parquet")
    data = {"dataset": f"hfds/{tmp_path}", "train_options": {"split": "train"}, "val_options": {"split": "train"}}
    splits = build_datasets(image_data(data))
    assert len(splits.train) == 16
    assert splits.classes == ["dog", "cat"]
    assert len(load(splits.train)) == 2


def test_a_data_set_of_torchvision(tmp_path):
    root = write_folder(tmp_path)
    write_truncated(root / "train/cat/1.png")
    data = {"dataset": "torch/image_folder", "root": root, "train_options": {"split": "train"}}
    splits = build_datasets(image_data({**data, "val_options": {"split": "val"}}), "L")
    assert splits.classes == ["cat", "dog"]
    assert splits.train[0][0].mode == "L"
    with pytest.raises(UserError, match="cannot read .*train/cat/1.png as an image"):
        splits.train[1]


def test_a_data_set_that_does_not_exist(tmp_path):
    with pytest.raises(UserError, match=r"cannot open the data set .*train.tar \(train\): "):
        build_datasets(image_data({"dataset": "tar", "root": tmp_path}))


LIVES_ON = """
import subprocess
from tests.data.test_loading import Digits, Share, create_loader, to_tensor
options = {"batch_size": 8, "num_workers": 1, "seed": 0, "share": Share(), "is_training": True}
batches = iter(create_loader(Digits(train=False), to_tensor, **options))
next(batches)
subprocess.run(["kill", str(batches._workers[0].pid)], check=True)
print(sum(1 for _ in batches))
batches.itself = batches
"""


def test_a_worker_outlives_the_signal_of_a_cluster_and_not_its_process():
    done = subprocess.run([sys.executable, "-c", LIVES_ON], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, f"{360 // 8 - 1}\n"), done.stderr
