"""Features of files, through the tool, against the model's own logits and tokens."""

import csv

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import vim  # noqa: F401  registers the models
from tests.tiny import write_image, write_truncated
from vim.data import eval_transform
from vim.tasks import features


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model("test_vim", num_classes=3).eval()


@pytest.fixture
def weights(model, tmp_path):
    torch.save({"model": model.state_dict()}, tmp_path / "a.pth")
    return tmp_path / "a.pth"


@pytest.fixture
def images(tmp_path):
    """Five images, the third of which cannot be read."""
    paths = [write_image(tmp_path / f"images/{i}.png", 40 + i, 60) for i in range(5)]
    write_truncated(paths[2])
    return paths


def features_of(folder):
    """The features of each file, as the index says."""
    with (folder / "index.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {row["path"]: load_file(folder / row["file"])["features"][int(row["row"])] for row in rows}


@torch.no_grad()
def test_images_in_several_files(call, model, weights, images, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "FILE_BYTES", 2 * 64 * 4)  # two rows
    words = [weights, images[0].parent, "--model", "test_vim", "--batch-size", 2, "--num-workers", 0]
    status, output, errors = call("features", *words, "--out", tmp_path / "out")
    assert (status, errors.count("\n")) == (2, 1)
    assert f"cannot read {images[2]}" in errors
    assert output == f"4 of 5 files, pooled, in {tmp_path / 'out'}: 2 files and index.csv\n"
    found = features_of(tmp_path / "out")
    assert list(found) == [str(path) for path in images if path != images[2]]

    transform = eval_transform(model, {})
    prepared = torch.stack([transform(Image.open(path).convert("RGB")) for path in found])
    torch.testing.assert_close(model.head(torch.stack(list(found.values()))), model(prepared))

    out = tmp_path / "maps"
    assert call("features", *words, "--out", out, "--map", -1)[0] == 2
    maps = torch.stack(list(features_of(out).values()))
    assert maps.shape == (4, 64, 4, 4)
    tokens = model.forward_features(prepared)
    tokens = torch.cat([tokens[:, :8], tokens[:, 9:]], 1)  # without the class token in the middle
    torch.testing.assert_close(maps.flatten(2).transpose(1, 2), tokens)


@torch.no_grad()
def test_videos(call, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("videomamba_tiny_f8", num_classes=2).eval()
    torch.save(model.state_dict(), tmp_path / "a.pth")
    for i in range(8):
        write_image(tmp_path / f"video/{i:02}.png", 224, 224)
    words = ["--model", "videomamba_tiny_f8", "--num-workers", 0, "--out", tmp_path / "out"]
    assert call("features", tmp_path / "a.pth", tmp_path / "video", *words)[::2] == (0, "")
    (found,) = features_of(tmp_path / "out").values()
    frame = np.asarray(Image.open(tmp_path / "video/00.png")) / 255
    frame = torch.tensor((frame - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).float()
    clip = frame.permute(2, 0, 1).unsqueeze(1).expand(1, 3, 8, 224, 224)
    torch.testing.assert_close(model.head(found), model(clip)[0], rtol=1e-4, atol=1e-5)


def test_mistakes(call, model, weights, images, tmp_path):
    words = [weights, images[0], "--model", "test_vim", "--num-workers", 0, "--out", tmp_path / "out"]

    def assert_told(message, *more):
        status, output, errors = call("features", *words, *more)
        assert (status, output, errors.count("\n")) == (2, "", 1)
        assert message in errors

    assert_told("--batch-size must be at least 1, got 0", "--batch-size", 0)
    assert_told("--map 7: the model has no such block", "--map", 7)
    with torch.no_grad():
        state = {**model.state_dict(), "norm_f.weight": torch.full((64,), 3.4e38)}
    torch.save(state, weights)
    assert_told(f"the features of {images[0]} are not finite")
    write_truncated(images[0])
    assert not (tmp_path / "out/index.csv").exists()
    torch.save(model.state_dict(), weights)
    assert call("features", *words)[2].endswith("error: no file could be read: there are no features to write\n")
    words[1] = images[1]
    assert call("features", *words)[0] == 0
    assert_told("out holds features already: name another folder by --out")
