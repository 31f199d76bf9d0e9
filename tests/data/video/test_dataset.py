import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny import frame_numbers, image_data, told, write_video
from vim.data import IGNORED, Share, build_datasets, create_loader, part
from vim.data.video import Video, Videos
from vim.errors import UserError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A data set of eight videos, one of them broken, in two folders with the same names."""
    root = tmp_path_factory.mktemp("root")
    lines = []
    for number in range(8):
        path = write_video(root / f"{'ab'[number % 2]}/{number // 2}.mp4", size=(64, 48), count=20)
        lines.append(f"{path.relative_to(root)} {number % 2}\n")
    (root / "a/3.mp4").write_text("broken")
    for name in ("train", "val"):
        (root / f"{name}.csv").write_text("".join(lines))
    return root


def data_of(root, **video):
    return {"dataset": "videos", "root": root, "video": {"num_frames": 4, **video}}


def to_tensor(frames):
    return torch.tensor([np.asarray(frame).mean() for frame in frames])


def load(dataset, *, num_workers=0, is_training=True, batch_size=4, transform=to_tensor):
    options = {"batch_size": batch_size, "num_workers": num_workers, "seed": 0, "share": Share()}
    return list(create_loader(dataset, transform, is_training=is_training, **options))


def test_workers_change_nothing(root):
    train = build_datasets(image_data(data_of(root))).train
    batches = load(train)
    for one, other in zip(batches, load(train, num_workers=2), strict=True):
        assert torch.equal(one.images, other.images)
        assert one.unreadable == other.unreadable


def test_a_video_that_cannot_be_read_is_replaced_or_left_out(root):
    splits = build_datasets(image_data(data_of(root)))
    batches = load(splits.train, num_workers=1)
    assert sum(len(batch.labels) for batch in batches) == 8
    lines = [line for batch in batches for line in batch.unreadable]
    assert len(lines) == 1 and lines[0].startswith(f"cannot read {root / 'a/3.mp4'} as a video")
    (batch,) = load(splits.held_out, is_training=False, batch_size=8)
    assert batch.labels.tolist() == [0, 1, 0, 1, 0, 1, IGNORED, 1]


def test_views_of_a_video(root):
    videos = part(image_data(data_of(root, num_clips=2, num_crops=3)), "val", "L")
    assert len(videos) == 8 * 6
    assert [videos.video_of(index) for index in (0, 5, 6)] == [str(root / "a/0.mp4")] * 2 + [str(root / "b/0.mp4")]
    views = [videos[index] for index in range(6)]
    assert {label for _, label in views} == {0}
    assert {frame.size for frames, _ in views for frame in frames} == {(48, 48)}
    assert [np.asarray(frames[0])[0, 12] > 200 for frames, _ in views] == [True, False, False] * 2
    assert frame_numbers(views[0][0]) != frame_numbers(views[3][0])


@pytest.mark.parametrize(
    "seconds, frames",
    [((1, 3), [12, 17, 22, 26]), ((3, 99), [31, 33, 35, 38]), ((50, 99), [39, 39, 39, 39]), (None, [4, 14, 24, 33])],
)
def test_a_part_of_a_video(seconds, frames, tmp_path):
    """Of 40 frames, ten a second."""
    video = Video(str(write_video(tmp_path / "a.mp4")), 0, part=seconds)
    clip, _ = Videos([video], "RGB", is_training=False, num_frames=4)[0]
    assert frame_numbers(clip) == frames


def test_windows_and_a_prefix(root, tmp_path):
    (tmp_path / "val.csv").write_text("a/0.mp4 0 95\nb/0.mp4 1 20\n")
    videos = part(image_data(data_of(tmp_path, sampling="windows", prefix=str(root))), "val", "L")
    assert [videos.video_of(index) for index in range(len(videos))] == [str(root / "a/0.mp4")] * 5 + [
        str(root / "b/0.mp4")
    ]
    assert videos.videos[1].part == (16, 76)


def test_the_options_of_a_part_come_before_those_of_all(root):
    videos = part(image_data({**data_of(root), "val_options": {"num_frames": 2}}), "val", "L")
    assert len(videos[0][0]) == 2


def test_a_clip_is_decoded_once_for_its_crops(root, monkeypatch):
    videos, clips = part(image_data(data_of(root, num_clips=2, num_crops=3)), "val", "L"), []
    read = videos._read
    monkeypatch.setattr(videos, "_read", lambda clip: clips.append(clip) or read(clip))
    for index in range(9):
        videos[index]
    assert clips == [0, 1, 2]


@pytest.mark.parametrize("is_wide", [True, False])
@pytest.mark.parametrize("num_crops, starts", [(2, [0, 21]), (3, [0, 10, 21]), (4, [0, 7, 14, 21])])
def test_crops_reach_from_one_end_of_the_longer_side_to_the_other(num_crops, starts, is_wide, tmp_path):
    pixels = np.arange(30, dtype=np.uint8)[None].repeat(9, 0)  # each pixel has its place along the longer side
    Image.fromarray(pixels if is_wide else pixels.T.copy()).save(tmp_path / "1.png")
    videos = Videos([Video(str(tmp_path), 0)], "L", is_training=False, num_frames=1, num_crops=num_crops)
    crops = [np.asarray(videos[index][0][0]) for index in range(num_crops)]
    for crop, start in zip(crops, starts, strict=True):
        np.testing.assert_array_equal(crop if is_wide else crop.T, pixels[:, start : start + 9])


def test_one_view_in_training(root):
    assert len(part(image_data(data_of(root, num_clips=2, num_crops=3)), "train", "L")) == 8


def test_folders_of_frames(tmp_path):
    for number in range(1, 11):
        (tmp_path / "v").mkdir(exist_ok=True)
        Image.new("RGB", (30, 30), (6 * number,) * 3).save(tmp_path / f"v/img_{number:05}.png")
    (tmp_path / "val.csv").write_text("v 9 1\n")
    options = {"sampling": "ssv2", "num_frames": 3}
    (frames, label) = part(image_data(data_of(tmp_path, frame_template="img_{:05}.png", **options)), "val", "RGB")[0]
    assert (label, frame_numbers(frames)) == (1, [2, 5, 8])
    (tmp_path / "val.csv").write_text("v 1\n")
    assert frame_numbers(part(image_data(data_of(tmp_path, **options)), "val", "RGB")[0][0]) == [2, 6, 9]
    (tmp_path / "val.csv").write_text("v 12 1\n")
    broken = part(image_data(data_of(tmp_path, frame_template="img_{:05}.png", **options)), "val", "RGB")
    with pytest.raises(UserError, match="no such image.*img_00011.png"):
        broken[0]


def test_a_folder_a_class(tmp_path):
    for name in ("train", "val"):
        for kind in ("cat", "dog"):
            write_video(tmp_path / name / kind / "1.mp4", count=4)
    splits = build_datasets(image_data({"dataset": "videos", "root": tmp_path}))
    assert splits.classes == ["cat", "dog"]
    assert len(splits.train[1][0]) == 8
    (tmp_path / "train/cat/1.mp4").unlink()
    with pytest.raises(UserError, match="no video in .*cat: expected files that FFmpeg reads, such as .mp4"):
        build_datasets(image_data({"dataset": "videos", "root": tmp_path}))


def test_the_names_of_classes(root):
    names = part(image_data(data_of(root, classes="kinetics400")), "val", "L").classes
    assert (len(names), names[0], names[-1]) == (400, "abseiling", "zumba")
    (root / "one.txt").write_text("only\n\n")
    with pytest.raises(UserError, match="has label 1 in .*val.csv: expected 0 to 0"):
        part(image_data(data_of(root, classes="one.txt")), "val", "L")
    (root / "two.txt").write_text("\ufeffcat\ndog\n\n")
    assert part(image_data(data_of(root, classes="two.txt")), "val", "L").classes == ["cat", "dog"]
    with pytest.raises(UserError, match="cannot read .*none.txt .it does not exist.: give a text file of names"):
        part(image_data(data_of(root, classes="none.txt")), "val", "L")
    assert part(image_data(data_of(root)), "val", "L").classes is None


@pytest.mark.parametrize(
    "video, expected",
    [
        ({"sampling": "all"}, "data.video.sampling must be one of sparse, ssv2, dense, windows, shuffled, got 'all'"),
        ({"decoder": "opencv"}, "data.video.decoder must be one of auto, decord, pyav, torchcodec, got 'opencv'"),
        ({"num_frames": 0}, "data.video.num_frames must be a positive whole number, got 0"),
        ({"time_limit": 0}, "data.video.time_limit must be a number of seconds above 0, got 0"),
        ({"frames": 8}, "data.video does not fit: .*unexpected keyword argument 'frames'"),
    ],
)
def test_mistakes_in_options(video, expected, root):
    with pytest.raises(UserError, match=expected):
        part(image_data(data_of(root, **video)), "val", "L")


@pytest.mark.parametrize("template", ["{foo}.jpg", "img_%05d.jpg", "{:05}{}.jpg"])
def test_a_frame_template_without_a_number(template):
    with pytest.raises(UserError, match=told("frame_template must hold a number's place, such as img_{:05}.jpg")):
        Videos([Video("v", 0, frames=3)], "RGB", is_training=False, frame_template=template)


def test_missing_parts(tmp_path):
    with pytest.raises(UserError, match="data.root must name the folder that holds val.csv"):
        part(image_data({"dataset": "videos"}), "val", "L")
    with pytest.raises(UserError, match="no test.csv in .*, nor a folder test"):
        part(image_data({"dataset": "videos", "root": tmp_path}), "test", "L")
