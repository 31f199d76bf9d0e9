import csv
import re

import pytest
import torch
from rich.console import Console

from tests.tiny import few_digits, run_of, tiny_recipe, write_parquet, write_shards
from vim.engine.config import load_recipe
from vim.engine.log import progress_bar
from vim.engine.loop import Loop
from vim.engine.weights import load_trained, save_whole
from vim.errors import UserError
from vim.options import ImageRecipe
from vim.tasks.classification.candidates import load_candidate

RECIPES = {
    "mixup": {"mixup__mixup_alpha": 0.8, "mixup__cutmix_alpha": 1.0},
    "ema": {"train__ema_decay": 0.9},
    # a worker, so that reading images does not seed the process that trains
    "drop": {"model__drop_path_rate": 0.2, "model__drop_rate": 0.2, "data__num_workers": 1},
    # with batch norms, whose counters are integers, and with a running average that teaches in the second epoch
    "batch norm": {
        **{"model__model_name": "test_mambavision", "model__embed_dim": 8},
        **{"model__patch_size": None, "model__depth": None, "model__drop_path_rate": 0.2},
        **{"train__ema_decay": 0.9, "train__mesa": 1.0, "train__mesa_start": 0.0},
    },
    "accumulate": {"train__accumulate": 2, "data__batch_size": 8, "data__repeats": 3, "data__num_workers": 2},
}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    few_digits(monkeypatch)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run: its work dir and its last evaluation."""
    work_dir = tmp_path_factory.mktemp("run") / "made"
    with pytest.MonkeyPatch.context() as monkeypatch:
        few_digits(monkeypatch)
        loop = run_of(tiny_recipe(schedule__num_epochs=4, optimizer__lr=0.01), work_dir)
        assert loop.fit()
    return work_dir, loop.task.evaluation


def rows_of(work_dir):
    with (work_dir / "log.csv").open() as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def load(path):
    return torch.load(path, weights_only=True)


def assert_same(got, want):
    """Equal to the bit, however nested."""
    if isinstance(want, torch.Tensor):
        assert torch.equal(got, want)
    elif isinstance(want, dict):
        assert list(got) == list(want)
        for key in want:
            assert_same(got[key], want[key])
    elif isinstance(want, list | tuple):
        for one, other in zip(got, want, strict=True):
            assert_same(one, other)
    else:
        assert got == want


def test_what_a_run_writes(run):
    work_dir, evaluation = run
    names = ["best.pth", "config.py", "environment.txt", "last.pth", "log.csv", "train.log"]
    assert sorted(path.name for path in work_dir.iterdir()) == names
    assert load_recipe(work_dir / "config.py", ImageRecipe).schedule["num_epochs"] == 4
    assert evaluation.confusion.sum() == 64


def test_the_log_has_a_row_an_epoch(run):
    work_dir, evaluation = run
    rows = rows_of(work_dir)
    assert list(rows[0]) == ["epoch", "lr", "train_loss", "loss", "top1", "top5"]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert (rows[-1]["loss"], rows[-1]["top1"], rows[-1]["top5"]) == (
        evaluation.loss,
        evaluation.top1,
        evaluation.top5,
    )


def test_the_loss_falls(run):
    rows = rows_of(run[0])
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_the_checkpoints(run):
    rows = rows_of(run[0])
    best, last = (load(run[0] / name) for name in ("best.pth", "last.pth"))
    assert last["training"]["rows"] == rows
    assert best["training"]["rows"][-1]["top1"] == max(row["top1"] for row in rows)
    assert last["meta"]["classes"] == list("0123456789")
    assert last["meta"]["model"]["embed_dim"] == 16


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_killed_run_goes_on_as_if_it_had_not_been(recipe, tmp_path, monkeypatch):
    config = tiny_recipe(**RECIPES[recipe], train__save_updates=1)
    run_of(config, tmp_path / "whole").fit()

    update = Loop._update

    def killed(self, batches, number):
        if number == 6:  # of 4 an epoch: in the second
            raise KeyboardInterrupt
        return update(self, batches, number)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_update", killed)
        with pytest.raises(KeyboardInterrupt):
            run_of(config, tmp_path / "parts").fit()
    assert load(tmp_path / "parts/last.pth")["training"]["position"]["update"] == 2
    run_of(config, tmp_path / "parts", tmp_path / "parts/last.pth").fit()

    assert (tmp_path / "parts/log.csv").read_text() == (tmp_path / "whole/log.csv").read_text()
    for name in ("last.pth", "best.pth"):
        assert_same(load(tmp_path / "parts" / name), load(tmp_path / "whole" / name))


def test_resumed_with_more_epochs_the_learning_rate_is_that_of_the_longer_schedule(run, tmp_path):
    longer = tiny_recipe(schedule__num_epochs=6, optimizer__lr=0.01)
    run_of(longer, tmp_path, run[0] / "last.pth").fit()
    rows = rows_of(tmp_path)
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[4]["lr"] > rows[3]["lr"] > rows[5]["lr"] * 0.99
    assert (tmp_path / "best.pth").exists()


def test_resuming_a_finished_run_only_evaluates(run, tmp_path):
    loop = run_of(tiny_recipe(schedule__num_epochs=4), tmp_path, run[0] / "last.pth")
    assert loop.fit()
    assert loop.task.evaluation.loss == run[1].loss
    assert not (tmp_path / "last.pth").exists()


def test_averaged_weights_are_the_ones_to_use(tmp_path):
    run_of(tiny_recipe(train__ema_decay=0.9, schedule__num_epochs=1), tmp_path).fit()
    state = load(tmp_path / "last.pth")
    assert not torch.equal(state["model"]["head.weight"], state["training"]["model"]["head.weight"])


def test_the_average_of_running_statistics(tmp_path):
    """Means and variances are averaged as weights are; counters are those of the model."""
    loop = run_of(tiny_recipe(**RECIPES["batch norm"]), tmp_path)
    loop.fit()
    state = load(tmp_path / "last.pth")
    raw, average = state["training"]["model"], state["model"]
    counters = [key for key in raw if key.endswith("num_batches_tracked")]
    assert {int(weights[key]) for weights in (raw, average) for key in counters} == {8}
    assert not torch.equal(raw["norm_f.norm.running_var"], average["norm_f.norm.running_var"])
    assert loop.task.evaluation.loss == pytest.approx(loss_of(loop.task, loop.ema.module.eval()), rel=1e-6)


def loss_of(task, model):
    batches = list(task.images.held_out)
    with torch.inference_mode():
        logits = torch.cat([model(batch.images) for batch in batches])
    return torch.nn.functional.cross_entropy(logits, torch.cat([batch.labels for batch in batches])).item()


def test_batches_too_small_for_a_batch_norm(tmp_path):
    """The last stage's map has one pixel: of one image, a batch norm there has one value a channel."""
    with pytest.raises(UserError, match="cannot be trained on one value a channel: set data.batch_size to at least 2"):
        run_of(tiny_recipe(**RECIPES["batch norm"], data__batch_size=1), tmp_path).fit()


def test_a_checkpoint_of_another_model(run, tmp_path):
    path = run[0] / "last.pth"
    message = f"{path} was trained with another model.depth: it was 2, and is now 3; resume with the same"
    with pytest.raises(UserError, match=re.escape(message)):
        run_of(tiny_recipe(model__depth=3), tmp_path, path)
    message = f"{path} was trained with another model.global_pool: it was None, and is now avg; resume with the same"
    with pytest.raises(UserError, match=re.escape(message)):
        run_of(tiny_recipe(model__global_pool="avg"), tmp_path, path)
    state = load(path)
    state["training"]["model"]["cls_token"] = torch.zeros(1, 1, 8)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(UserError, match=re.escape("other.pth is of another model: cls_token is (1, 1, 8) there and")):
        run_of(tiny_recipe(), tmp_path, tmp_path / "other.pth")


def test_a_save_with_layers_that_the_model_has_no_more(tmp_path):
    """As of Mamba-R that pools the patches: it once had its neck all the same."""
    recipe = tiny_recipe(**{"model.model_name": "test_mambar", "model.global_pool": "avg"})
    run_of(recipe, tmp_path).fit()
    image, path = torch.randn(2, 1, 16, 16), tmp_path / "old.pth"
    want = load_trained(tmp_path / "best.pth")[0](image)
    state = load(tmp_path / "last.pth")
    for weights in (state["model"], state["training"]["model"]):
        weights |= {"neck.weight": torch.ones(8, 16), "norm_neck.weight": torch.ones(24)}
    torch.save(state, path)
    assert torch.equal(load_candidate(path, weights="raw").model(image), load_trained(path)[0](image))
    with pytest.raises(
        UserError, match=r"old.pth is of another model: neck.weight is .8, 16. there and missing .* an ear"
    ):
        run_of(recipe, tmp_path / "again", path)
    state["model"] = load(tmp_path / "best.pth")["model"] | {"neck.weight": torch.ones(8, 16)}
    torch.save(state, path)
    overlay = {
        "model.pretrained": True,
        "model.pretrained_cfg_overlay.file": str(path),
        "model.model_name": "test_mambar",
    }
    anew = run_of(tiny_recipe(**overlay, **{"model.global_pool": "avg"}), tmp_path / "anew")
    assert torch.equal(anew.task.model.eval()(image), want)


def test_dropout_may_change_when_a_run_is_resumed(run, tmp_path):
    run_of(tiny_recipe(schedule__num_epochs=4, model__drop_path_rate=0.1), tmp_path, run[0] / "last.pth")


def test_a_checkpoint_of_another_optimizer(run, tmp_path):
    with pytest.raises(UserError, match="was trained with another optimizer: resume with the same"):
        run_of(tiny_recipe(optimizer__layer_decay=0.5), tmp_path, run[0] / "last.pth")


def test_a_checkpoint_of_another_optimizer_with_the_same_options(run, tmp_path):
    with pytest.raises(UserError, match="was trained with another optimizer.opt: it was adamw, and is now adam"):
        run_of(tiny_recipe(optimizer__opt="adam"), tmp_path, run[0] / "last.pth")


@pytest.mark.parametrize(
    ("option", "name"),
    [({"crop_pct": 0.5}, "crop_pct"), ({"mean": (0.1,)}, "mean"), ({"interpolation": "nearest"}, "interpolation")],
)
def test_a_checkpoint_of_images_prepared_otherwise(option, name, run, tmp_path):
    options = {f"data__eval_transform__{key}": value for key, value in option.items()}
    with pytest.raises(UserError, match=f"was trained with another data.eval_transform.{name}: it was .*, and is now"):
        run_of(tiny_recipe(**options), tmp_path, run[0] / "last.pth")


def test_a_save_that_lacks_a_fact_of_later_versions(run, tmp_path):
    state = load(run[0] / "last.pth")
    facts = state["training"]["identity"]
    state["training"]["identity"] = {key: facts[key] for key in facts if key.startswith(("model.", "list"))}
    torch.save(state, tmp_path / "older.pth")
    run_of(tiny_recipe(), tmp_path, tmp_path / "older.pth")


@pytest.mark.parametrize("opt", ["lamb", "adafactor", "sgd", "lion"])
def test_the_state_of_every_optimizer_is_found_again(opt, tmp_path):
    recipe = tiny_recipe(schedule__num_epochs=1, optimizer__opt=opt)
    run_of(recipe, tmp_path).fit()
    assert run_of(recipe, tmp_path, tmp_path / "last.pth").at.epoch == 1


def test_a_checkpoint_of_other_classes(run, tmp_path):
    state = load(run[0] / "last.pth")
    state["training"]["identity"]["list of classes"] = list("abcdefghij")
    torch.save(state, tmp_path / "other.pth")
    message = re.escape("other.pth was trained with another list of classes: it was ['a', 'b', 'c'")
    with pytest.raises(UserError, match=message):
        run_of(tiny_recipe(), tmp_path, tmp_path / "other.pth")


def test_a_checkpoint_that_is_missing_or_damaged(run, tmp_path):
    path = tmp_path / "damaged.pth"
    with pytest.raises(UserError, match=re.escape(f"no such checkpoint: {path}")):
        run_of(tiny_recipe(), tmp_path, path)
    path.write_bytes((run[0] / "last.pth").read_bytes()[:5000])
    with pytest.raises(UserError, match=re.escape(f"cannot read {path} as a checkpoint: expected safetensors, or")):
        run_of(tiny_recipe(), tmp_path, path)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ([1], "is not a checkpoint: expected a dict of tensors, got list"),
        ({"model": {}}, "it lacks 'model' or 'meta' .*--model NAME"),
        ({"model": {}, "meta": {"model": {}, "classes": [], "eval_transform": {}}}, "holds weights only"),
    ],
    ids=str,
)
def test_a_file_that_is_no_checkpoint_of_a_run(state, message, tmp_path):
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(UserError, match=f"a.pth .*{message}"):
        run_of(tiny_recipe(), tmp_path, tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model__num_classes": 7}, "the data has 10 classes and the model 7: --cfg-options model.num_classes=10"),
        ({"model__model_name": "vim_nothing"}, r"no such model: vim_nothing \(the closest: vim_tiny"),
        ({"model__direction": 1}, r"model does not fit: .* argument 'direction' \(the closest: directions"),
        ({"model__in_chans": 2}, "1 or 3 channels, and the model 2"),
        ({"optimizer__opt": "nothing"}, r"optimizer does not fit: no such opt: nothing \(the closest: "),
        ({"optimizer__opt": "adam_w"}, r"no such opt: adam_w \(the closest: adamw"),
        ({"optimizer__beta": 1}, r"optimizer does not fit: adamw has no option beta \(the closest: betas"),
        ({"schedule__sched": "nothing"}, "schedule.sched must be 'cosine', .* got 'nothing'"),
        ({"optimizer__opt": "adahessian"}, "optimizer does not fit: opt must not be 'adahessian', which needs second"),
        (
            {"optimizer__opt": "lookahead_adamw"},
            "opt must not be 'lookahead_adamw', whose slow weights PyTorch does not",
        ),
        ({"model__scriptable": True}, "a checkpoint cannot hold the option scriptable of a Vim"),
        (
            {"schedule__sched": "step", "schedule__decay_epochs": 0},
            "schedule.decay_epochs must be None or a number > 0",
        ),
        ({"schedule__noise": "abc"}, "schedule.noise must be "),
        ({"schedule__sched": "plateau"}, "schedule.sched must be 'cosine', .* got 'plateau'"),
        ({"mixup__nothing": 1}, "mixup has no option nothing"),
        ({"mixup__mixup_alpha": 1.0, "data__batch_size": 15}, "mixup needs an even data.batch_size, got 15"),
        ({"data__train_transform": {"nothing": 1}}, "data.train_transform has no option nothing"),
        ({"data__eval_transform": {"interpolation": "x"}}, "data.eval_transform.interpolation must be .*, got 'x'"),
        ({"train__mesa": 1.0}, "train.mesa needs a running average: set train.ema_decay too"),
        ({"data__batch_size": 65}, "64 images to train on: --cfg-options data.batch_size=64, or less"),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit(options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run_of(tiny_recipe(**options), tmp_path)


def test_lines_about_a_run_whose_output_is_no_terminal(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("vim.engine.log.SECONDS", 0)
    run_of(tiny_recipe(data__batch_size=32), tmp_path).fit()
    lines = [line.split(" INFO ")[1] for line in capsys.readouterr().out.splitlines()]
    assert lines == [line.split(" INFO ")[1] for line in (tmp_path / "train.log").read_text().splitlines()]
    assert lines[0] == "training from update 0 of 4"
    assert re.fullmatch(r"epoch 1, update 1 of 4, loss \d\.\d+, 0:00:\d\d left", lines[1])
    assert re.fullmatch(r"evaluating: 1 batches of 2, 0:00:\d\d left", lines[3])
    assert re.fullmatch(r"epoch 1, lr \S+, train_loss \S+, loss \S+, top1 \S+, top5 \S+", lines[5])
    assert len(lines) == 11


def test_a_bar_at_its_end(capsys, monkeypatch):
    monkeypatch.setattr("vim.engine.log.Console", lambda **options: Console(force_terminal=True, width=200, **options))
    with progress_bar(1, 0, shown=True) as bar:
        bar.step(1, 0.5)
    text = capsys.readouterr().out
    last = re.sub(r"\x1b\[[\d?]*\w", "", text[text.rindex("epoch 1") :])
    assert "1/1 loss 0.500 0:00:00" in last and "left" not in last


@pytest.mark.parametrize("write", [write_shards, write_parquet])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_goes_on_exactly(write, num_workers, tmp_path):
    data = {f"data__{key}": value for key, value in write(tmp_path / "data", broken=(5,)).items()}
    options = {"model__num_classes": 2, "data__batch_size": 8, "data__max_unreadable": 0.1, "train__save_updates": 1}
    config = tiny_recipe(**data, **options, data__num_workers=num_workers, train__keep=9)
    run_of(config, tmp_path / "whole").fit()
    for number in (2, 7):  # in the second epoch, and in the first
        resume = tmp_path / f"whole/last.{number}.pth"
        assert load(resume)["training"]["position"]["update"] not in (0, 4)
        run_of(config, tmp_path / "other", resume).fit()
        assert_same(load(tmp_path / "other/last.pth"), load(tmp_path / "whole/last.pth"))


def test_a_stream_resumed_by_other_workers(tmp_path):
    data = {f"data__{key}": value for key, value in write_shards(tmp_path / "data").items()}
    options = {**data, "model__num_classes": 2, "data__batch_size": 8, "train__save_updates": 1, "train__keep": 9}
    run_of(tiny_recipe(**options, schedule__num_epochs=1), tmp_path / "run").fit()
    with pytest.raises(UserError, match="follows from data.num_workers: it was 0, and is now 2; resume with the same"):
        run_of(tiny_recipe(**options, data__num_workers=2), tmp_path / "run", tmp_path / "run/last.3.pth")


def test_accumulation_is_the_configs(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")  # as `accelerate launch` may
    few_digits(monkeypatch)
    trainer = run_of(tiny_recipe(train__accumulate=2), tmp_path)
    assert (trainer.accumulate, trainer.accelerator.gradient_accumulation_steps) == (2, 1)


def test_a_work_dir_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    trainer = run_of(tiny_recipe(), tmp_path / "file/run")
    with pytest.raises(UserError, match=re.escape(f"cannot make the folder {tmp_path / 'file/run'} (Not a directory)")):
        trainer.fit()


def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "last.pth"
    save_whole({"epoch": 1}, path)

    def fail(state, file):
        file.write(b"half of it")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="no space left"):
        save_whole({"epoch": 2}, path)
    assert load(path) == {"epoch": 1}
