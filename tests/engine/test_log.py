import logging
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.tiny import few_digits, run_of, tiny_recipe
from vim.engine.log import logging_to
from vim.engine.trackers import Trackers
from vim.errors import UserError


def test_tensorboard_has_every_update_and_every_epoch(tmp_path, monkeypatch):
    few_digits(monkeypatch)
    trainer = run_of(tiny_recipe(train__trackers=["tensorboard"]), tmp_path / "run")
    trainer.fit()
    folders = {path.parent for path in tmp_path.rglob("events.out.tfevents.*")}  # one more has the config
    figures = next(f for f in (EventAccumulator(str(x)).Reload() for x in folders) if f.Tags()["scalars"])
    assert [event.step for event in figures.Scalars("train/loss")] == list(range(1, 9))
    assert [event.value for event in figures.Scalars("epoch/top1")] == pytest.approx([r["top1"] for r in trainer.rows])


def test_trackers_that_are_not_there(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="train.trackers has 'paper': expected tensorboard or wandb"):
        Trackers(["paper"], tmp_path, None, shown=True)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="train.trackers needs wandb, which is not installed: pip install wandb"):
        Trackers(["wandb"], tmp_path, None, shown=True)
    assert Trackers(["wandb"], tmp_path, None, shown=False).names == []


def test_what_is_said_is_kept(tmp_path, capsys):
    with logging_to(tmp_path / "train.log"):
        logging.getLogger("vim.engine.loop").warning("update 3 skipped")
    logging.getLogger("vim.engine.loop").warning("not in here")
    assert (tmp_path / "train.log").read_text().endswith("WARNING update 3 skipped\n")
    assert "update 3 skipped" in capsys.readouterr().err
