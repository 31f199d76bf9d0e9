"""The arithmetic of updates, on a model of one weight whose gradient is the mean of a batch."""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vim.engine.launch import launch
from vim.engine.loop import Loop
from vim.engine.weights import find_last, read_run
from vim.errors import UserError
from vim.options import ImageData, ImageTrainOptions, Recipe


class Slope:
    """Minimise w x for the x of each batch; held-out figures are given."""

    def __init__(self, batches, figures=(1.0,)):
        self.model = self.student = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.model.weight)
        self.values, self.figures, self.notes = batches, list(figures), {}
        self.batches_per_epoch = len(batches)
        self.evaluated, self.taught = [], []

    def batches(self, epoch, start):
        return iter([torch.tensor([[float(x)]]) for x in self.values[start:]])

    def loss(self, student, batch, average):
        self.taught.append(average is not None)
        return student(batch).mean()

    def evaluate(self, model):
        self.evaluated.append(model.weight.item())
        return {"figure": self.figures[(len(self.evaluated) - 1) % len(self.figures)]}

    def score(self, figures):
        return figures["figure"]

    def meta(self):
        return {}

    def identity(self):
        return {}

    def order(self):
        return {}


def loop_of(task, folder, *, epochs=1, lr=1.0, momentum=0.0, weight_decay=0.0, resume=None, **options):
    recipe = Recipe(
        model={},
        data=ImageData(dataset="none", batch_size=1, num_workers=0),
        optimizer={"opt": "momentum", "lr": lr, "momentum": momentum, "weight_decay": weight_decay},
        schedule={"sched": "step", "decay_epochs": 1000, "num_epochs": epochs, "warmup_epochs": 0},
        train=ImageTrainOptions(**options),
    )
    return Loop(task, recipe, folder, launch(recipe.train), resume)


def weight_of(path):
    return read_run(path)["model"]["weight"].item()


def test_an_update_is_a_step_against_the_gradient(tmp_path):
    task = Slope([1, 2, 3])
    assert loop_of(task, tmp_path, lr=0.5).fit()
    assert task.model.weight.item() == -0.5 * (1 + 2 + 3)
    assert weight_of(tmp_path / "last.pth") == -3


def test_gradients_are_clipped_to_their_norm(tmp_path):
    task = Slope([10, 0.5])
    loop_of(task, tmp_path, clip_grad=2.0).fit()
    assert task.model.weight.item() == pytest.approx(-(2.0 + 0.5), rel=1e-5)


def test_accumulated_batches_are_averaged_and_what_is_left_of_an_epoch_is_not_used(tmp_path):
    task = Slope([1, 3, 5, 7, 100])
    loop = loop_of(task, tmp_path, accumulate=2)
    loop.fit()
    assert loop.updates == 2
    assert task.model.weight.item() == -(2 + 6)


def test_the_running_average_starts_from_the_first_trained_weights(tmp_path):
    """timm's copies the weights in the first two updates: decayed from the untrained ones, it would stay near 0."""
    task = Slope([4, 2, 1])
    loop_of(task, tmp_path, ema_decay=0.75).fit()
    assert task.model.weight.item() == -7
    average = 0.75 * -6 + 0.25 * -7
    assert task.evaluated == [average]
    assert weight_of(tmp_path / "last.pth") == average
    assert read_run(tmp_path / "last.pth")["training"]["model"]["weight"].item() == -7


@pytest.mark.parametrize(
    ("options", "epochs"),
    [({"mesa": 0.5}, [2, 3, 4]), ({"mesa": 0.5, "mesa_start": 0.6}, [4]), ({"mesa_start": 0.0}, [])],
)
def test_when_the_running_average_teaches(options, epochs, tmp_path):
    """From the first epoch on before which more than `mesa_start` of the epochs are done."""
    task = Slope([1, 1])
    loop_of(task, tmp_path, epochs=5, ema_decay=0.75, **options).fit()
    assert [i for i, taught in enumerate(task.taught[::2]) if taught] == epochs
    assert task.taught[::2] == task.taught[1::2]


def test_the_loss_of_an_epoch_is_the_mean_over_updates_that_were_not_skipped(tmp_path):
    task = Slope([1, math.nan, 3])
    loop = loop_of(task, tmp_path)
    loop.fit()
    losses = [0.0, -1.0 * 3]  # w is 0, then -1; the update between is skipped
    assert loop.rows[0]["train_loss"] == sum(losses) / 2
    assert task.model.weight.item() == -4


def test_skipped_updates_in_a_row_end_a_run_others_do_not(tmp_path):
    loop_of(Slope([math.nan, 1, math.nan, 1]), tmp_path / "a", max_skipped=2).fit()
    with pytest.raises(UserError, match="2 updates in a row were skipped"):
        loop_of(Slope([1, math.nan, math.nan, 1]), tmp_path / "b", max_skipped=2).fit()


class Balanced(nn.Linear):
    """A weight with a loss of its own in each batch of training, a multiple of it."""

    def __init__(self, aux_weight):
        super().__init__(1, 1, bias=False)
        nn.init.ones_(self.weight)
        self.aux_weight, self.aux_loss = aux_weight, torch.zeros(())

    def forward(self, x):
        if self.training:
            self.aux_loss = self.aux_weight * self.weight.sum()
        return super().forward(x)


@pytest.mark.parametrize("aux_weight", [0.0, 8.0])
def test_what_balances_experts_is_in_the_loss_once_in_each_batch(aux_weight, tmp_path):
    task = Slope([1, 3, math.nan, 3])
    task.model = task.student = Balanced(aux_weight)
    loop = loop_of(task, tmp_path, lr=0.5, accumulate=2)
    loop.fit()  # the second update is skipped
    assert task.model.weight.item() == 1 - 0.5 * (2 + aux_weight)
    assert loop.rows[0]["train_loss"] == 2 + aux_weight
    assert loop.rows[0]["aux_loss"] == aux_weight
    assert list(loop.rows[0]) == ["epoch", "lr", "train_loss", "aux_loss", "figure"]
    assert read_run(tmp_path / "last.pth")["training"]["rows"] == loop.rows


class Normed(Slope):
    """The slope behind a batch norm, whose running mean follows the batches."""

    def __init__(self, batches):
        super().__init__(batches)
        self.model = self.student = nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 1))

    def batches(self, epoch, start):
        return iter([torch.tensor([[float(x)], [-float(x)], [1.0]]) for x in self.values[start:]])

    def evaluate(self, model):
        return {"figure": 1.0}


def test_a_skipped_update_leaves_running_statistics_as_they_were(tmp_path):
    skipped, none = Normed([1, math.nan, 3]), Normed([1, 3])
    for task, name in ((skipped, "skipped"), (none, "none")):
        loop_of(task, tmp_path / name, lr=1e-3).fit()
    for one, other in zip(skipped.model[0].buffers(), none.model[0].buffers(), strict=True):
        assert torch.equal(one, other)


def test_the_best_checkpoint_is_of_the_best_epoch(tmp_path):
    task = Slope([1], figures=(0.2, 0.9, 0.5))
    loop_of(task, tmp_path, epochs=3).fit()
    assert task.evaluated == [-1, -2, -3]
    assert weight_of(tmp_path / "best.pth") == -2
    assert weight_of(tmp_path / "last.pth") == -3


def test_what_a_kill_kept_from_being_written_is_written_on_resuming(tmp_path):
    loop_of(Slope([1]), tmp_path).fit()
    log = (tmp_path / "log.csv").read_text()
    for name in ("best.pth", "log.csv"):
        (tmp_path / name).unlink()
    loop_of(Slope([1]), tmp_path, resume=find_last(tmp_path)).fit()
    assert weight_of(tmp_path / "best.pth") == -1
    assert (tmp_path / "log.csv").read_text() == log


def test_a_run_stops_when_its_patience_ends(tmp_path):
    loop = loop_of(Slope([1], figures=(0.2, 0.9, 0.5, 0.4, 1.0)), tmp_path, epochs=5, patience=2)
    assert loop.fit()
    assert [row["figure"] for row in loop.rows] == [0.2, 0.9, 0.5, 0.4]


@pytest.mark.parametrize("figure", [math.nan, math.inf])
def test_figures_that_are_not_finite_are_refused(figure, tmp_path):
    with pytest.raises(UserError, match=f"the held-out figure of epoch 2 is {figure}: lower .* saved up to before"):
        loop_of(Slope([1], figures=(0.5, figure)), tmp_path, epochs=2).fit()
    assert read_run(tmp_path / "last.pth")["training"]["position"]["epoch"] == 1


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_a_resumed_run_has_the_options_of_its_optimizer_from_the_recipe(momentum, tmp_path):
    loop_of(Slope([1]), tmp_path, momentum=momentum, weight_decay=0.5).fit()
    save = find_last(tmp_path)
    loop = loop_of(Slope([1]), tmp_path, epochs=2, momentum=momentum, weight_decay=0.25, resume=save)
    assert [group["weight_decay"] for group in loop.optimizer.param_groups] == [0.25]


class Transfers(TorchDispatchMode):
    """Counts the calls that bring a number from the device to Python."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_an_update_waits_for_the_device_at_most_once(tmp_path, monkeypatch):
    lists = []
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x, tolist=torch.Tensor.tolist: lists.append(x) or tolist(x))
    loop = loop_of(Slope([1, 2]), tmp_path, clip_grad=1.0, ema_decay=0.9)
    with Transfers() as transfers:
        loop._update([torch.ones(1, 1)], 0)
    assert (transfers.count, len(lists)) == (0, 1)
