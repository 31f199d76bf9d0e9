import functools
import json
import re

import pytest
import timm
import torch
from PIL import Image

from tests.weight_files import (
    EVAL,
    WEIGHTS,
    published,
    save,
)
from vim.engine.weights import save_for_timm


@pytest.fixture
def convert(call):
    """Run the tool here: its exit status, output and errors."""
    return functools.partial(call, "convert")


def test_convert(convert, tmp_path):
    raw, average = (timm.create_model("test_vim", num_classes=7).eval() for _ in range(2))
    path = save(tmp_path / "a.pth", published(raw.state_dict(), average.state_dict()))
    folder, image = tmp_path / "a folder", torch.randn(1, 3, 64, 64)
    for words, model in (((), raw), (("--ema",), average)):
        status, output, errors = convert(path, folder, "--model", "test_vim", *words)
        assert (status, errors) == (0, "")
        assert output == f'in {folder}: timm.create_model("local-dir:{folder}", pretrained=True)\n'
        assert torch.equal(timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(image), model(image))
        assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("name", ["test_vim", "test_videomamba", "test_vim2"])
def test_what_convert_writes_transformers_reads(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    shape = (3, 4, 64, 64) if name == "test_videomamba" else (3, 64, 64)
    model = timm.create_model(name, num_classes=3, **({"num_frames": 4} if len(shape) == 4 else {})).eval()
    save_for_timm(model, tmp_path, ["cat", "dog", "owl"], {"crop_pct": 0.5})
    read, images = transformers.AutoModelForImageClassification.from_pretrained(tmp_path), torch.randn(2, *shape)
    assert torch.equal(read(images).logits, model(images))
    assert read.config.id2label == {0: "cat", 1: "dog", 2: "owl"}
    prepared = transformers.AutoImageProcessor.from_pretrained(tmp_path)(
        Image.new("RGB", (90, 70)), return_tensors="pt"
    )
    assert prepared["pixel_values"].shape == (1, 3, 64, 64)


def test_what_convert_writes_has_its_classes_once(tmp_path):
    """transformers passes those of the config and `model_args` to timm together."""
    save_for_timm(timm.create_model("test_vim", num_classes=3), tmp_path, None, {})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_classes"] == 3
    assert "num_classes" not in config["model_args"]


def test_convert_refuses(convert, folder):
    save("a.pth", {"model": WEIGHTS})
    save("b.pth", {"model": EVAL})
    for words, message in {
        "c.pth out --model test_vim": "no such checkpoint: c.pth",
        "a.pth out --model test_vim": r"a.pth is of another model: cls_token is \(1, 1, 16\) there and \(1, 1, 64\)",
        "a.pth out --model test_vim --ema": "a.pth holds no running average",
        "a.pth out --model resnet18": "resnet18 is timm's",
        "a.pth out --model vim_large": "no such model: vim_large \\(the closest: vim_base, vim2_base",
        "a.pth out --ema": "--ema goes with --model",
        "a.pth out": "a.pth is not a checkpoint of a run",
        "b.pth out --model test_vim": "b.pth as a checkpoint: it calls '__builtin__.eval'",
        "b.pth out": "b.pth as a checkpoint: it calls '__builtin__.eval'",
    }.items():
        status, output, errors = convert(*words.split())
        assert (status, output) == (2, "")
        assert re.fullmatch(f"error: .*{message}.*\n", errors), errors
    assert sorted(path.name for path in folder.iterdir()) == ["a.pth", "b.pth"]
