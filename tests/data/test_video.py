import os
import random
import re
import signal
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest
import timm
import torch
from PIL import Image

import vim  # noqa: F401  registers the models
from tests.tiny import write_image
from vim.data import (
    IGNORED,
    Share,
    build_datasets,
    create_loader,
    part,
    read_video,
    video_eval_transform,
    video_train_transform,
)
from vim.data.sampling import SAMPLINGS, View, dense, something, sparse, windows
from vim.data.video import Video, Videos, _decoding_process, find_videos, read_annotations
from vim.errors import UserError

COUNT = 40  # frames of a test video; each is of one grey, 6 times its number
DECODERS = ["decord", "pyav"]


def write_video(path, codec="libx264", *, count=COUNT, size=(64, 48), times=None, rotation=0, **options):
    """A video whose frames are grey, and brighter in their left upper corner."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", container_options={"movflags": "faststart"}) as container:
        stream = container.add_stream(codec, rate=10, options={"crf": "10", **options})
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        for number in range(count):
            pixels = np.full((size[1], size[0], 3), 6 * number, np.uint8)
            pixels[:16, :16] = 255
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = number if times is None else times[number]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_audio(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        for start in range(0, 8000, 1000):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1000), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 8000, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbers(frames):
    """Which frames these are."""
    return [round(np.asarray(frame.convert("L"))[20:, 20:].mean() / 6) for frame in frames]


def these(*indices):
    return lambda count, fps: list(indices)


def told(*parts):
    """A pattern for pytest.raises: these texts in this order."""
    return ".*".join(re.escape(str(part)) for part in parts)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("videos") / "a.mp4", g="15")


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("suffix, codec", [("mp4", "libx264"), ("webm", "libvpx-vp9"), ("avi", "mpeg4")])
def test_frames_are_those_asked_for(decoder, suffix, codec, tmp_path):
    path = write_video(tmp_path / f"a.{suffix}", codec, g="15", **({"bf": "2"} if codec == "libx264" else {}))
    seen = []
    frames = read_video(path, lambda *args: seen.append(args) or [3, 0, 39, 7, 7, 22], decoder=decoder)
    assert seen == [(COUNT, 10.0)]
    assert numbers(frames) == [3, 0, 39, 7, 7, 22]
    assert {(frame.mode, frame.size) for frame in frames} == {("RGB", (64, 48))}


@pytest.mark.skipif("libsvtav1" not in av.codecs_available, reason="no encoder for AV1")
def test_av1(tmp_path):
    path = write_video(tmp_path / "a.mp4", "libsvtav1")
    assert numbers(read_video(path, these(0, 21, 39), "L")) == [0, 21, 39]


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_frame_in_any_group_of_pictures(decoder, video):
    for index in range(0, COUNT, 3):
        assert numbers(read_video(video, these(index), decoder=decoder)) == [index]


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_variable_frame_rate(decoder, tmp_path):
    times = np.cumsum(np.random.default_rng(0).integers(1, 9, COUNT)).tolist()
    path = write_video(tmp_path / "a.mp4", times=times)
    assert numbers(read_video(path, these(0, 13, 39), decoder=decoder)) == [0, 13, 39]


@pytest.mark.skipif(not hasattr(av.VideoStream, "set_display_rotation"), reason="PyAV cannot write rotations")
@pytest.mark.parametrize("rotation, corner", [(90, (-1, 0)), (180, (-1, -1)), (-90, (0, -1))])
def test_a_rotated_video_is_upright(rotation, corner, tmp_path):
    path = write_video(tmp_path / "a.mp4", rotation=rotation)
    image = np.asarray(read_video(path, these(5), "L")[0])
    assert image.shape == ((48, 64) if rotation == 180 else (64, 48))
    assert [place for place in [(0, 0), (0, -1), (-1, 0), (-1, -1)] if image[place] > 200] == [corner]


def test_no_video(tmp_path):
    (tmp_path / "text.mp4").write_text("hello")
    (tmp_path / "empty.mp4").write_bytes(b"")
    write_audio(tmp_path / "audio.mp4")
    for name, reason in (("text.mp4", "Invalid data"), ("empty.mp4", ""), ("audio.mp4", "it holds no video")):
        with pytest.raises(UserError, match=told("cannot read", name, "pyav: ", reason, "replace the file or take")):
            read_video(tmp_path / name, these(0))
    with pytest.raises(UserError, match=told("no such video", "give the path of a video file")):
        read_video(tmp_path / "none.mp4", these(0))
    os.mkfifo(tmp_path / "fifo.mp4")
    with pytest.raises(UserError, match="no such video"):
        read_video(tmp_path / "fifo.mp4", these(0))


def test_what_is_left_of_a_truncated_video(tmp_path):
    path = write_video(tmp_path / "a.mp4", g="10", bf="0")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 9 // 10])
    counts = []
    frames = read_video(path, lambda count, fps: counts.append(count) or [0, count - 1], decoder="pyav")
    assert counts[0] < COUNT
    assert numbers(frames)[0] == 0


def test_a_video_that_takes_too_long(video):
    def wait(count, fps):
        os.waitid(os.P_PID, _decoding_process(os.getpid()).process.pid, os.WEXITED | os.WNOWAIT)
        return [0]

    with pytest.raises(UserError, match=told("cannot read", video, "it takes longer than its time limit")):
        read_video(video, wait, time_limit=0.2)
    assert numbers(read_video(video, these(4))) == [4]


def test_a_video_that_crashes_its_decoder(video):
    def crash(count, fps):
        os.kill(_decoding_process(os.getpid()).process.pid, signal.SIGSEGV)
        return [0]

    with pytest.raises(UserError, match=told("cannot read", video, "it crashes the decoder, exit status -11")):
        read_video(video, crash)
    assert numbers(read_video(video, these(4))) == [4]


def test_an_interruption(video):
    def interrupt(count, fps):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read_video(video, interrupt)
    assert numbers(read_video(video, these(4))) == [4]


def mutate(whole, seed):
    """Change some bytes, anywhere or where a file describes itself; or cut it off."""
    chance, data = random.Random(seed), bytearray(whole)
    for place in range(chance.choice([1, 10, 100])):
        place = chance.choice([chance.randrange(len(data)), chance.randrange(1000), -1 - chance.randrange(1500)])
        data[place] = chance.randrange(256)
    return bytes(data[: chance.randrange(len(data))] if seed % 4 == 0 else data)


def test_damaged_videos(tmp_path):
    count = int(os.environ.get("MUTATED_VIDEOS", 60))  # 500 took 20 s
    whole = [
        write_video(tmp_path / "a.mp4", g="10").read_bytes(),
        write_video(tmp_path / "a.webm", "libvpx-vp9", g="10").read_bytes(),
    ]
    outcomes = Counter()
    for seed in range(count):
        path = tmp_path / f"{seed}.{('mp4', 'webm')[seed % 2]}"
        path.write_bytes(mutate(whole[seed % 2], seed))
        try:
            frames = read_video(path, lambda count, fps: sparse(count, 8, View(0, 1)), time_limit=10)
            assert len(frames) == 8
            outcomes["read"] += 1
        except UserError as error:
            assert str(path) in str(error)
            outcomes["refused"] += 1
        path.unlink()
    assert min(outcomes["read"], outcomes["refused"]) > count / 10, outcomes


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("count", [1, 3, 8, 17, 300])
def test_samplings_stay_within_a_video(sampling, count):
    for view in [None, View(0, 1), *(View(i, 4) for i in range(4))]:
        for _ in range(20 if view is None else 1):
            chosen = SAMPLINGS[sampling](count, 8, view)
            assert len(chosen) == 8
            assert min(chosen) >= 0 and max(chosen) < count
            assert sampling == "shuffled" or chosen == sorted(chosen)


def test_the_published_views():
    # as VideoMamba's code gives them for 100 frames
    assert sparse(100, 4, View(0, 1)) == [12, 37, 62, 86]
    assert sparse(100, 4, View(2, 4)) == [14, 39, 64, 88]
    assert something(100, 4, View(0, 1)) == [12, 37, 62, 87]
    assert something(100, 4, View(0, 2)) == [0, 25, 50, 75]
    assert something(100, 4, View(1, 2)) == [12, 37, 62, 87]
    assert dense(100, 4, View(0, 1)) == [42, 46, 50, 54]
    assert [dense(100, 4, View(i, 3))[0] for i in range(3)] == [0, 42, 84]


@pytest.mark.parametrize("sampling, last", [(sparse, 29), (something, 27), (dense, 26)])
def test_training_sees_every_frame(sampling, last):
    random.seed(0)
    assert {index for _ in range(300) for index in sampling(30, 4, None)} == set(range(last + 1))


def test_windows_of_long_videos():
    assert windows(45) == [(0, 45)]
    assert windows(60) == [(0, 60), (16, 60)]
    assert windows(95) == [(0, 60), (16, 76), (32, 92), (48, 95), (64, 95)]


@pytest.mark.parametrize("separator", [",", " ", "\t", ", "])
def test_separators_of_annotations(separator, tmp_path):
    path = tmp_path / "train.csv"
    path.write_text(f"\ufeffa b/1.mp4{separator}3\r\nc,d/2.mp4{separator}0\n\n")
    videos = read_annotations(path, tmp_path)
    assert [(Path(v.path).relative_to(tmp_path).as_posix(), v.label) for v in videos] == [
        ("a b/1.mp4", 3),
        ("c,d/2.mp4", 0),
    ]


def test_third_columns_of_annotations(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("a 12 3\n")
    assert read_annotations(path, tmp_path, third="frames")[0][1:] == (3, 12, None)
    path.write_text("a.mp4,3,75.5\n")
    assert [v.part for v in read_annotations(path, tmp_path, third="duration")] == [(0, 60), (16, 75.5), (32, 75.5)]


@pytest.mark.parametrize(
    "text, parts",
    [
        ("", ["no video in", "expected lines PATH LABEL"]),
        ("path,label\na.mp4,1\n", ["line 1", "expected PATH LABEL", "no line of names", "path,label"]),
        ("a.mp4,1\nb.mp4 2\n", ["line 2", "by a comma in all lines"]),
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
    train = build_datasets(data_of(root)).train
    batches = load(train)
    for one, other in zip(batches, load(train, num_workers=2), strict=True):
        assert torch.equal(one.images, other.images)
        assert one.unreadable == other.unreadable


def test_a_video_that_cannot_be_read_is_replaced_or_left_out(root):
    splits = build_datasets(data_of(root))
    batches = load(splits.train, num_workers=1)
    assert sum(len(batch.labels) for batch in batches) == 8
    lines = [line for batch in batches for line in batch.unreadable]
    assert len(lines) == 1 and lines[0].startswith(f"cannot read {root / 'a/3.mp4'} as a video")
    (batch,) = load(splits.held_out, is_training=False, batch_size=8)
    assert batch.labels.tolist() == [0, 1, 0, 1, 0, 1, IGNORED, 1]


def test_views_of_a_video(root):
    videos = part(data_of(root, num_clips=2, num_crops=3), "val", "L")
    assert len(videos) == 8 * 6
    assert [videos.video_of(index) for index in (0, 5, 6)] == [str(root / "a/0.mp4")] * 2 + [str(root / "b/0.mp4")]
    views = [videos[index] for index in range(6)]
    assert {label for _, label in views} == {0}
    assert {frame.size for frames, _ in views for frame in frames} == {(48, 48)}
    assert [np.asarray(frames[0])[0, 12] > 200 for frames, _ in views] == [True, False, False] * 2
    assert numbers(views[0][0]) != numbers(views[3][0])


def test_one_view_in_training(root):
    assert len(part(data_of(root, num_clips=2, num_crops=3), "train", "L")) == 8


def test_folders_of_frames(tmp_path):
    for number in range(1, 11):
        (tmp_path / "v").mkdir(exist_ok=True)
        Image.new("RGB", (30, 30), (6 * number,) * 3).save(tmp_path / f"v/img_{number:05}.png")
    (tmp_path / "val.csv").write_text("v 9 1\n")
    options = {"sampling": "ssv2", "num_frames": 3}
    (frames, label) = part(data_of(tmp_path, frame_template="img_{:05}.png", **options), "val", "RGB")[0]
    assert (label, numbers(frames)) == (1, [2, 5, 8])
    (tmp_path / "val.csv").write_text("v 1\n")
    assert numbers(part(data_of(tmp_path, **options), "val", "RGB")[0][0]) == [2, 6, 9]
    (tmp_path / "val.csv").write_text("v 12 1\n")
    broken = part(data_of(tmp_path, frame_template="img_{:05}.png", **options), "val", "RGB")
    with pytest.raises(UserError, match="no such image.*img_00011.png"):
        broken[0]


def test_a_folder_a_class(tmp_path):
    for name in ("train", "val"):
        for kind in ("cat", "dog"):
            write_video(tmp_path / name / kind / "1.mp4", count=4)
    splits = build_datasets({"dataset": "videos", "root": tmp_path})
    assert splits.classes == ["cat", "dog"]
    assert len(splits.train[1][0]) == 8
    (tmp_path / "train/cat/1.mp4").unlink()
    with pytest.raises(UserError, match="no video in .*cat: expected files ending in .mp4"):
        build_datasets({"dataset": "videos", "root": tmp_path})


def test_the_names_of_classes(root):
    names = part(data_of(root, classes="kinetics400"), "val", "L").classes
    assert (len(names), names[0], names[-1]) == (400, "abseiling", "zumba")
    (root / "one.txt").write_text("only\n\n")
    with pytest.raises(UserError, match="has label 1 in .*val.csv: expected 0 to 0"):
        part(data_of(root, classes="one.txt"), "val", "L")
    with pytest.raises(UserError, match="cannot read the classes .*none.txt"):
        part(data_of(root, classes="none.txt"), "val", "L")
    assert part(data_of(root), "val", "L").classes is None


@pytest.mark.parametrize(
    "video, expected",
    [
        ({"sampling": "all"}, "data.video.sampling must be one of sparse, ssv2, dense, windows, shuffled, got 'all'"),
        ({"decoder": "opencv"}, "data.video.decoder must be one of auto, decord, pyav, torchcodec, got 'opencv'"),
        ({"num_frames": 0}, "data.video.num_frames must be a whole number from 1, got 0"),
        ({"time_limit": 0}, "data.video.time_limit must be a number of seconds above 0, got 0"),
        ({"frames": 8}, "data.video does not fit: .*unexpected keyword argument 'frames'"),
    ],
)
def test_mistakes_in_options(video, expected, root):
    with pytest.raises(UserError, match=expected):
        part(data_of(root, **video), "val", "L")


@pytest.mark.parametrize("template", ["{foo}.jpg", "img_%05d.jpg", "{:05}{}.jpg"])
def test_a_frame_template_without_a_number(template):
    with pytest.raises(UserError, match=told("frame_template must hold a number's place, such as img_{:05}.jpg")):
        Videos([Video("v", 0, frames=3)], "RGB", is_training=False, frame_template=template)


def test_a_picture_among_videos(root, tmp_path):
    video = tmp_path / "a.mp4"
    video.write_bytes((root / "a/0.mp4").read_bytes())
    write_image(tmp_path / "poster.jpg")
    write_image(tmp_path / "frames/1.jpg")
    assert find_videos([tmp_path]) == [video]
    assert find_videos([tmp_path / "frames"]) == [tmp_path / "frames"]


def test_missing_parts(tmp_path):
    with pytest.raises(UserError, match="data.root must name the folder that holds val.csv"):
        part({"dataset": "videos"}, "val", "L")
    with pytest.raises(UserError, match="no test.csv in .*, nor a folder test"):
        part({"dataset": "videos", "root": tmp_path}, "test", "L")


def model_of(**options):
    return timm.create_model("test_videomamba", img_size=32, num_frames=4, **options)


def noise(size=(50, 40), mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((size[0] // 4, size[1] // 4)).resize(size).convert(mode)


AUGMENTED = {"auto_augment": "rand-m7-n4-mstd0.5-inc1", "color_jitter": 0.4, "re_prob": 1.0, "re_mode": "pixel"}


@pytest.mark.parametrize("in_chans, mode", [(3, "RGB"), (1, "L")])
def test_frames_are_transformed_alike(in_chans, mode):
    options = AUGMENTED if in_chans == 3 else {"hflip": 0.5}
    transform = video_train_transform(model_of(in_chans=in_chans), {**options, "re_prob": 0.0})
    random.seed(0)
    clips = [transform([noise(mode=mode)] * 4) for _ in range(8)]
    assert clips[0].shape == (in_chans, 4, 32, 32)
    assert all(torch.equal(clip[:, :1].expand_as(clip), clip) for clip in clips)
    assert len({float(clip.sum()) for clip in clips}) == 8


def test_erasing_is_in_one_place_of_all_frames():
    model = model_of()
    plain = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "hflip": 0.0, "color_jitter": 0.0}
    frames = [noise((32, 32))] * 4
    clean = video_train_transform(model, plain)(frames)
    erased = video_train_transform(model, {**plain, "re_prob": 1.0, "re_mode": "pixel"})(frames)
    changed = (clean != erased).any(0)
    assert 0 < changed.float().mean() < 0.5
    assert all(torch.equal(frame, changed[0]) for frame in changed)
    assert not torch.equal(erased[:, 0], erased[:, 1])


def test_a_clip_of_evaluation():
    transform = video_eval_transform(model_of(), {"crop_pct": 1.0})
    clip = transform([noise(), noise((40, 50)), noise(), noise()])
    assert clip.shape == (3, 4, 32, 32)
    assert torch.equal(clip[:, 0], clip[:, 2])
    with pytest.raises(TypeError):
        video_train_transform(model_of(), {"re_probability": 0.5})
