"""Masked pre-training as a run."""

import pytest

from tests.engine.test_loop import assert_same, load, rows_of
from tests.tasks.test_videos import ROOT, root  # noqa: F401  a fixture
from tests.tiny import run_of
from vim.engine.config import load_recipe
from vim.errors import UserError
from vim.options import ImageRecipe

CONFIG = ROOT / "configs/videomamba/videomamba-test_digit-motion.py"


def config(root, **options):  # noqa: F811
    teacher = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 7}
    return load_recipe(
        CONFIG,
        ImageRecipe,
        {
            "data.dataset": "videos",
            "data.root": str(root),
            "data.batch_size": 4,
            "data.num_workers": 0,
            "data.max_unreadable": 0.9,
            "data.samples": 2,
            "model.num_classes": 0,
            "model.in_chans": 3,
            "model.scan_order": "spatial_first",
            "schedule.num_epochs": 1,
            "schedule.warmup_epochs": 0,
            "teacher.model_name": "vit_tiny_patch16_224",
            **{f"teacher.{key}": value for key, value in teacher.items()},
            "masking.ratio": 0.75,
            "train.save_updates": 1,
            "train.keep": 9,
            **options,
        },
    )


def test_it_goes_on_exactly_whatever_the_workers(root, tmp_path):  # noqa: F811
    loop = run_of(config(root), tmp_path / "whole")
    assert loop.fit()
    assert len(loop.task.notes["val"]) == 1
    (row,) = rows_of(tmp_path / "whole")
    assert 0 < row["loss"] < 4
    run_of(config(root), tmp_path / "other", tmp_path / "whole/last.2.pth").fit()
    run_of(config(root, **{"data.num_workers": 2}), tmp_path / "workers").fit()
    for name in ("other", "workers"):
        assert_same(load(tmp_path / name / "last.pth"), load(tmp_path / "whole/last.pth"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"teacher.patch_size": 16},
            r"must be the model's, \(4, 4\) in each frame: got \(2, 2\)",
        ),
        ({"model.num_classes": 2}, "is for VideoMamba without a head"),
        ({"model.model_name": "test_vim"}, "does not fit|is for VideoMamba without a head"),
        ({"model.scan_order": "spatiotemporal_v1"}, "is for model.scan_order='spatial_first'"),
        ({"model.directions": "none"}, "and 'none'"),
        ({"masking.ratio": 1.0}, "masking.ratio must be a number >= 0 and < 1 .*, got 1.0"),
        ({"masking.ratio": "half"}, "got 'half'"),
        ({"mixup.mixup_alpha": 0.8}, "takes no mixup"),
        ({"train.class_weights": "balanced"}, "has no classes: take train.class_weights out"),
        ({"train.patience": 2}, "takes no train.patience: its last weights count as the best"),
        ({"teacher.model_name": "test_resnet"}, "teacher does not fit: "),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit(options, message, root, tmp_path):  # noqa: F811
    with pytest.raises(UserError, match=message):
        run_of(config(root, **options), tmp_path)
