"""Pictures of what a model sees, and the check of its maps, through the tool."""

import csv

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import vim  # noqa: F401  registers the models
from tests.tiny import DIGITS, few_digits, write_image, write_lines, write_run, write_video
from vim.data.digits import CLASSES
from vim.explain import METHODS, explain, layer_maps
from vim.tasks import explanation
from vim.tasks.classification.predict import Predictor
from vim.tasks.explanation import BLUE, GAP, HEAD, RED, Check, draw_layers, enlarged, overlay, sheet

GREY = {"in_chans": 1, "img_size": 32, "patch_size": 8}
MODELS = {
    "digits": ("test_vim", {**GREY, "num_classes": 10}, CLASSES),
    "colours": ("test_vim", {"num_classes": 3}, ["cat", "dog", "7"]),
    "hybrid": ("test_mambavision", {"num_classes": 3}, ["a", "b", "c"]),
    "clips": ("test_videomamba", {**GREY, "num_frames": 3, "num_classes": 2}, ["up", "down"]),
    "causal": ("test_videomamba", {**GREY, "num_frames": 3, "num_classes": 2, "directions": "none"}, ["up", "down"]),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A checkpoint of each of MODELS."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("runs")
    for run, (name, options, classes) in MODELS.items():
        model = timm.create_model(name, **options)
        nn.init.normal_(model.head.weight)  # so that the classes differ
        write_run(folder / f"{run}.pth", model, name, classes, **options)
    model = timm.create_model("test_vim", num_classes=2)
    write_run(folder / "labels.pth", model, "test_vim", ["cat", "dog"], thresholds=[0.4, 0.6], num_classes=2)
    return folder


@pytest.fixture
def image(tmp_path):
    return write_image(tmp_path / "image.png", 64, 64)


def inputs_of(checkpoint, path):
    predictor = Predictor.from_checkpoint(checkpoint)
    return predictor.model, predictor.prepare(predictor.read(path))


def halves(path):
    """The two pictures side by side in a file, below its title."""
    pixels = np.asarray(Image.open(path).convert("RGB"))[HEAD:]
    width = (pixels.shape[1] - GAP) // 2
    assert (pixels[:, width:-width] == 255).all()
    return pixels[:, :width], pixels[:, -width:]


# What is drawn


@pytest.mark.parametrize("method", METHODS)
def test_a_map_beside_its_image(method, call, runs, image, tmp_path):
    status, output, errors = call("explain", runs / "colours.pth", image, "--method", method, "--out", tmp_path / "out")
    assert (status, errors) == (0, "")
    model, images = inputs_of(runs / "colours.pth", image)
    with torch.no_grad():
        probabilities = model(images).softmax(1)[0]
    predicted, percent = int(probabilities.argmax()), 100 * float(probabilities.max())
    file = tmp_path / f"out/0000_image_{method}.png"
    assert f"  {['cat', 'dog', '7'][predicted]}, {percent:.1f} %: {file}\n" in output
    seen, mapped = halves(file)
    original = np.asarray(Image.open(image))
    assert np.array_equal(seen, original.repeat(5, 0).repeat(5, 1))  # the image's own pixels, enlarged
    expected = overlay(torch.from_numpy(original / 255).float(), explain(model, images, predicted, method)[0])
    difference = mapped[::5, ::5] / 255 - expected.numpy()
    assert abs(difference).max() < 2 / 255


def test_another_class_by_name_or_number(call, runs, image, tmp_path):
    drawn = {}
    for name in ("cat", "dog", "1", "7"):  # "7" is a name
        status, output, errors = call(
            "explain", runs / "colours.pth", image, "--target", name, "--out", tmp_path / name
        )
        assert (status, errors) == (0, "")
        assert f"  {'dog' if name == '1' else name}, " in output
        drawn[name] = (tmp_path / name / "0000_image_lrp.png").read_bytes()
    assert drawn["1"] == drawn["dog"]
    assert len(set(drawn.values())) == 3


def test_several_labels_have_a_probability_each(call, runs, image, tmp_path):
    output = call("explain", runs / "labels.pth", image, "--target", "dog", "--out", tmp_path / "out")[1]
    model, images = inputs_of(runs / "labels.pth", image)
    with torch.no_grad():
        assert f"  dog, {100 * float(model(images)[0, 1].sigmoid()):.1f} %: " in output


def test_a_folder_with_a_file_that_is_no_image(call, runs, tmp_path):
    for name in ("a", "b/c"):
        write_image(tmp_path / f"images/{name}.png", 20, 70)
    write_lines(tmp_path / "images/aa.png", "hello")
    status, output, errors = call("explain", runs / "digits.pth", tmp_path / "images", "--out", tmp_path / "out")
    assert (status, errors.count("\n")) == (2, 1)
    assert f"cannot read {tmp_path / 'images/aa.png'} as an image" in errors
    assert [line for line in output.splitlines() if line[0] != " "] == [
        str(tmp_path / f"images/{name}.png") for name in ("a", "b/c")
    ]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("0000_a_layers.png", "0000_a_lrp.png", "0002_c_layers.png", "0002_c_lrp.png")
    ]


def test_published_weights(call, image, tmp_path):
    torch.save({"model": timm.create_model("test_vim").state_dict()}, tmp_path / "a.pth")
    words = [tmp_path / "a.pth", image, "--model", "test_vim", "--target", 0, "--out", tmp_path / "out"]
    status, output, errors = call("explain", *words)
    assert (status, errors) == (0, "") and "  tench, Tinca tinca" in output


@pytest.fixture
def strips(monkeypatch):
    """What is drawn of the layers: the maps by direction, by the name of the file."""
    found = {}
    monkeypatch.setattr(explanation, "draw_layers", lambda path, seen, layers, title: found.update({path.name: layers}))
    return found


def assert_strip(strip, model, images, directions, token=None):
    assert list(strip) == directions
    for direction in directions:
        expected = layer_maps(model, images, None, direction, token)
        assert len(strip[direction]) == len(expected) == 3
        torch.testing.assert_close(torch.stack(strip[direction]), torch.cat(expected))


def test_the_strips_of_all_layers(call, runs, strips, image, tmp_path):
    words = ["--token", "1,3", "--out", tmp_path / "out"]
    status, output, errors = call("explain", runs / "digits.pth", *words, image)  # options may come first
    assert (status, errors) == (0, "")
    assert f"  what token 1,3 takes in each layer: {tmp_path / 'out/0000_image_token.png'}\n" in output
    model, images = inputs_of(runs / "digits.pth", image)
    assert_strip(strips["0000_image_layers.png"], model, images, ["forward", "backward"])
    assert_strip(strips["0000_image_token.png"], model, images, ["forward", "backward"], (1, 3))


def test_models_with_no_strip_or_one_row(call, runs, strips, image, tmp_path):
    status, output, errors = call("explain", runs / "hybrid.pth", image, "--out", tmp_path / "hybrid")
    assert (status, errors, output.count("\n")) == (0, "", 2) and not strips
    video = write_video(tmp_path / "a.mp4")
    assert call("explain", runs / "causal.pth", video, "--out", tmp_path / "causal")[::2] == (0, "")
    assert_strip(strips["0000_a_layers.png"], *inputs_of(runs / "causal.pth", video), ["forward"])


def test_a_strip_has_a_row_for_each_name_and_twelve_layers_at_most(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(explanation, "save_figure", lambda figure, path, dpi: figures.append(figure))
    for count in (3, 24):
        maps = [torch.rand(8, 8) for _ in range(count)]
        draw_layers(tmp_path / "a.png", torch.rand(8, 8, 3), {"forward": maps, "backward": maps[::-1]}, "title")
    few, many = (figure.axes for figure in figures)
    assert [axes.get_title() for axes in few] == ["layer 0", "layer 1", "layer 2", "", "", ""]
    assert [axes.get_ylabel() for axes in few] == ["forward", "", "", "backward", "", ""]
    titles = [axes.get_title() for axes in many]
    assert len(titles) == 24 and titles[0] == "layer 0" and titles[11] == "layer 23" and len(set(titles)) == 13
    shown = [np.asarray(axes.get_images()[0].get_array()) for axes in few]
    assert np.array_equal(shown[0], shown[5]) and not np.array_equal(shown[0], shown[3])


def test_a_video_has_a_map_for_each_frame(call, runs, tmp_path):
    video = write_video(tmp_path / "a.mp4")
    words = ["--token", "2,1,3", "--method", "gradcam", "--out", tmp_path / "out"]
    status, output, errors = call("explain", runs / "clips.pth", video, *words)
    assert (status, errors, output.count("\n")) == (0, "", 4)
    seen, mapped = halves(tmp_path / "out/0000_a_gradcam.png")
    # two rows of two frames of 32 pixels with a gap of 1, five times as large
    assert seen.shape == mapped.shape == (65 * 5, 65 * 5, 3)
    for pixels in (seen, mapped):
        assert (pixels[160:165] == 255).all() and (pixels[165:, 160:] == 255).all()  # the gap, and the fourth place
    model, clip = inputs_of(runs / "clips.pth", video)
    maps = explain(model, clip, None, "gradcam")[0]
    frame = torch.from_numpy(seen[165:, :160][::5, ::5] / 255).float()  # the third
    expected = overlay(torch.stack([frame] * 3), maps)[2]  # its colours are those of all three maps
    assert abs(mapped[165:, :160][::5, ::5] / 255 - expected.numpy()).max() < 2 / 255


# Colours


def test_a_map_with_both_signs_is_red_and_blue_and_clear_at_zero():
    picture = torch.rand(2, 3, 3)
    grey = picture.mean(-1, keepdim=True).expand(2, 3, 3)
    shown = overlay(picture, torch.tensor([[0.0, 2.0, -2.0], [-4.0, 4.0, 1.0]]))
    torch.testing.assert_close(shown[0, 0], grey[0, 0])
    torch.testing.assert_close(shown[0, 1], (grey[0, 1] + RED) / 2)
    torch.testing.assert_close(shown[0, 2], (grey[0, 2] + BLUE) / 2)
    torch.testing.assert_close(shown[1, :2], torch.stack([BLUE, RED]))
    torch.testing.assert_close(shown[1, 2], 0.75 * grey[1, 2] + 0.25 * RED)


@pytest.mark.parametrize("low", [0.0, 0.8])
def test_a_map_without_signs_goes_from_purple_to_yellow(low):
    picture = torch.rand(1, 2, 3)
    shown = overlay(picture, torch.tensor([[low, 1.0]]))
    colours = 2 * shown - picture.mean(-1, keepdim=True)
    ends = torch.tensor([[0.267, 0.005, 0.329], [0.993, 0.906, 0.144]])  # of viridis
    torch.testing.assert_close(colours[0], ends, atol=1e-3, rtol=0)


@pytest.mark.parametrize("values", [torch.zeros(4, 4), torch.ones(4, 4) + 1e-5 * torch.rand(4, 4)])
def test_a_map_of_one_value_has_one_colour(values):
    shown = overlay(torch.zeros(4, 4, 3), values).flatten(0, 1)
    assert (shown - shown[0]).abs().max() < 0.01


@pytest.mark.parametrize("sign", [1, -1])
def test_the_frames_of_a_clip_share_a_scale(sign):
    values = torch.tensor([0.0, 1.0, 0.5]).view(3, 1, 1).expand(3, 1, 2) * torch.tensor([1.0, sign])
    shown = overlay(torch.zeros(3, 1, 2, 3), values)
    assert shown.norm(dim=-1)[1, 0, 0] > shown.norm(dim=-1)[2, 0, 0] > shown.norm(dim=-1)[0, 0, 0]


@pytest.mark.parametrize(("t", "rows", "columns"), [(1, 1, 1), (2, 1, 2), (4, 2, 2), (5, 2, 3), (8, 3, 3)])
def test_a_contact_sheet(t, rows, columns):
    frames = torch.arange(t).view(t, 1, 1, 1).expand(t, 40, 60, 3) / 10
    shown = sheet(frames)
    assert shown.shape == (rows * 42 - 2, columns * 62 - 2, 3)
    for i in range(rows * columns):
        cell = shown[i // columns * 42 :, i % columns * 62 :][:40, :60]
        assert (cell == (frames[i] if i < t else 1)).all()


@pytest.mark.parametrize(("size", "times"), [((32, 32), 9), ((1, 2), 280), ((280, 300), 1), ((500, 281), 1)], ids=str)
def test_small_pictures_are_enlarged(size, times):
    assert enlarged(torch.rand(*size, 3)).size == (times * size[1], times * size[0])


# The check of maps


@pytest.fixture
def config(monkeypatch, tmp_path):
    few_digits(monkeypatch)
    return write_lines(
        tmp_path / "config.py", f"_base_ = [{str(DIGITS)!r}]", "data = dict(num_workers=0, batch_size=8)"
    )


def test_the_check_writes_curves_with_both_areas(call, runs, config, tmp_path):
    words = ["--check", config, "--batches", 1, "--out", tmp_path / "out"]
    status, output, errors = call("explain", runs / "digits.pth", *words)
    assert status == 0 and "Traceback" not in errors
    with (tmp_path / "out/curves.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = [*METHODS, "random", "gradient"]
    assert [(row["method"], row["order"]) for row in rows] == [
        (name, order) for name in names for order in ("most", "least")
    ]
    fractions = [f"0.{i}" for i in range(1, 10)]
    for row in rows:
        accuracy = [float(row[fraction]) for fraction in fractions]
        assert row["images"] == "8"
        assert float(row["area"]) == pytest.approx(np.trapezoid(accuracy, dx=0.1) * 100)
        assert float(row["mean"]) == pytest.approx(np.mean(accuracy) * 100)
    table = output.splitlines()[1:]
    assert [line.split()[0] for line in table] == names
    areas = [
        [f"{float(row[kind]):.2f}" for row in rows[i : i + 2] for kind in ("area", "mean")] for i in range(0, 14, 2)
    ]
    assert [line.split()[1:] for line in table] == areas
    assert Image.open(tmp_path / "out/curves.png").size == (1200, 480)


class Corner(nn.Module):
    """Its class is 0 if the corner of the image is brighter than 0."""

    pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}

    def forward(self, images):
        corner = images[:, 0, :4, :4].mean((1, 2))
        return torch.stack([corner, -corner], 1)


def test_a_map_that_is_right_has_the_curves_of_its_removed_pixels(monkeypatch):
    asked = []

    def right_map(model, images, targets, method):
        asked.append((method, targets.tolist()))
        return torch.ones(len(images), 8, 8).index_fill(1, torch.arange(4, 8), 0).index_fill(2, torch.arange(4, 8), 0)

    monkeypatch.setattr(explanation, "explain", right_map)
    check = Check(Corner(), ["lrp"])
    check.add(torch.ones(2, 3, 8, 8), torch.tensor([0, 0]))
    check.add(torch.ones(1, 3, 8, 8), torch.tensor([0]))
    assert asked == [("lrp", [0, 0]), ("lrp", [0])]
    # 7 of the corner's 16 pixels are black at 10 %, 13 at 20 %; or 4 at 80 %, and 10 at 90 %
    assert check.curves["lrp", "most"].accuracy == [1, *[0] * 8]
    assert check.curves["lrp", "least"].accuracy == [*[1] * 8, 0]
    assert check.curves["lrp", "least"].images == 3
    for order in ("most", "least"):  # the gradient is 0 outside the corner
        assert check.curves["gradient", order].accuracy == check.curves["lrp", order].accuracy


# Mistakes

OUTSIDE = r"token must be in a map of 4 x 4, got "


@pytest.mark.parametrize(
    ("run", "words", "message"),
    [
        ("digits", ["nothing.png"], "no such file or folder: nothing.png"),
        ("digits", ["empty"], "no image in empty"),
        ("digits", ["image.png", "--target", "10"], "no such class: 10 (the closest: 1, 0), or a number from 0 to 9"),
        ("digits", ["image.png", "--target", "-1"], "no such class: -1"),
        (
            "colours",
            ["image.png", "--target", "cart"],
            "no such class: cart (the closest: cat), or a number from 0 to 2",
        ),
        ("digits", ["image.png", "--token", "1"], "--token must be ROW,COLUMN, or FRAME,ROW,COLUMN for a video, got 1"),
        ("digits", ["image.png", "--token", "1,-1"], "--token must be ROW,COLUMN"),
        ("digits", ["image.png", "--token", f"1,{5000 * '1'}"], "--token must be ROW,COLUMN"),
        ("digits", ["image.png", "--target", 5000 * "1"], "no such class: 111"),
        ("digits", ["image.png", "--token", "4,0"], f"{OUTSIDE}4,0"),
        ("digits", ["image.png", "--token", "0,4"], f"{OUTSIDE}0,4"),
        ("digits", ["image.png", "--token", "0,0,0"], f"{OUTSIDE}0,0,0"),
        ("clips", ["a.mp4", "--token", "1,1"], "token must be in a map of 3 x 4 x 4, got 1,1"),
        ("hybrid", ["image.png", "--token", "1,1"], "a model whose tokens are scanned"),
        ("hybrid", ["image.png", "--method", "rollout"], "got MambaVision: use method 'lrp' or 'gradcam'"),
        ("digits", ["image.png", "--method", "rolout"], "invalid choice: 'rolout'"),
        ("digits", ["a.mp4"], "cannot read a.mp4 as an image"),
        ("clips", ["note.mp4"], "cannot read note.mp4 as a video"),
        ("none", ["image.png"], "no such checkpoint"),
        ("series", ["image.png"], "it does not say what model it is of"),
        ("digits", ["image.png", "--model", "vim_tiny"], "is of another model"),
        ("digits", [], "either images or videos are needed, or --check and a config"),
        (
            "digits",
            ["image.png", "--check", "config.py"],
            "either images or videos are needed, or --check and a config",
        ),
        ("digits", ["image.png", "--batches", "3"], "--batches is for --check"),
        ("digits", ["--check", "config.py", "--batches", "0"], "must be at least 1, got 0"),
        ("digits", ["--check", "config.py", "--token", "1,1"], "leave out --target and --token"),
        ("digits", ["--check", "conf.py"], "no such config: conf.py"),
        ("colours", ["--check", "config.py"], "was trained on other classes (3: cat, dog, 7)"),
        ("labels", ["--check", "config.py"], "--check needs a model of one class an image"),
        ("digits", ["image.png", "--out", "note.mp4"], "cannot make the folder note.mp4"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(run, words, message, call, runs, config, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(explanation, "draw_map", lambda *_: None)
    monkeypatch.setattr(explanation, "draw_layers", lambda *_: None)
    (tmp_path / "empty").mkdir()
    write_lines(tmp_path / "note.mp4", "hello")
    write_image(tmp_path / "image.png")
    torch.save({"model": {}, "meta": {"model": {}, "columns": ["a"]}}, runs / "series.pth")
    if "a.mp4" in words:
        write_video(tmp_path / "a.mp4")
    status, output, errors = call(
        "explain", runs / f"{run}.pth", *words, *([] if "--out" in words else ["--out", "out"])
    )
    assert (status, output, errors.count("\n")) == (2, "", 1)
    assert errors.startswith("error: ") and message in errors
