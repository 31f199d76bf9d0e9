"""The scripts of examples/ run from their first line to their last figure."""

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDED = {"segment": "segmentation_models_pytorch", "detect": "pycocotools"}
TINY = ["--steps", "2", "--batch", "2", "--held-out", "4", "--size", "64"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backbone", ["test_vim --pyramid 16", "test_resnet"])
@pytest.mark.parametrize("name", NEEDED)
def test_it_trains_and_tests(name, backbone, monkeypatch, capsys):
    for package in (NEEDED[name], "torchmetrics", "sklearn"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--backbone", *backbone.split(), *TINY])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    line = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(rf"{backbone.split()[0]}: \d+\.\d M parameters, held-out .* \d+\.\d %", line)


def test_scenes(monkeypatch):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    monkeypatch.syspath_prepend(EXAMPLES)
    from scenes import Scenes

    train, held_out = Scenes(True, 20, 64), Scenes(False, 20, 64)
    for scenes in (train, held_out):
        for image, mask, boxes, labels in scenes:
            assert image.shape == (3, 64, 64) and image.min() >= -1 and image.max() <= 1
            assert set(mask.unique().tolist()) == {0, *labels.tolist()}
            for (x1, y1, x2, y2), label in zip(boxes.int().tolist(), labels.tolist(), strict=True):
                inside = mask[y1:y2, x1:x2] == label
                assert inside.any(0).all() and inside.any(1).any() and inside[0].any() and inside[-1].any()
            assert len(boxes) == len(labels) >= 1
    assert not (train[3][0] == held_out[3][0]).all() and (train[3][0] == Scenes(True, 5, 64)[3][0]).all()
    ours = {image.tobytes() for image in train.digits.images}
    assert sum(image.tobytes() in ours for image in held_out.digits.images) < 5
