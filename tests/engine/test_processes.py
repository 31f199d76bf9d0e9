"""Several processes do together what one does alone."""

import csv
import os
import shutil
import socket

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.engine.test_kills import CONTEXT, stop
from tests.engine.test_loop import RECIPES, load
from tests.tasks.test_forecasting import make, small_recipe, write
from tests.tiny import FewDigits, few_digits, run_of, tiny_recipe, write_parquet, write_shards
from vim.data.datasets import BUILT_IN
from vim.engine.launch import join_processes
from vim.engine.weights import find_last


def shard(self, model, optimizer):
    """What accelerate does for FSDP, which it does on GPUs only."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [{**group, "params": [names[id(p)] for p in group["params"]]} for group in optimizer.param_groups]
    mesh = init_device_mesh("cpu", (self.num_processes,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    parameters = dict(model.named_parameters())
    optimizer.param_groups = [{**group, "params": [parameters[n] for n in group["params"]]} for group in groups]
    return model, AcceleratedOptimizer(optimizer)


def train(rank, world, port, work_dir, options, sharded, arrange=None):
    torch.set_num_threads(1)
    if arrange is not None and rank == 1:
        arrange(0)
    BUILT_IN["digits"] = FewDigits
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        # accelerate divides the processors by the local one: oneDNN's threads hang where they outnumber the processors
        os.environ |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    if sharded:
        Accelerator.prepare = shard
    series = options.get("data__dataset") == "csv"
    recipe = small_recipe(**options) if series else tiny_recipe(**options)
    run_of(recipe, work_dir, find_last(work_dir)).fit()
    if world > 1:
        torch.distributed.destroy_process_group()


def run(world, work_dir, *, sharded=False, arrange=None, **options):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        CONTEXT.Process(target=train, args=(i, world, port, work_dir, options, sharded, arrange)) for i in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * world
    if not (work_dir / "log.csv").exists():
        return []
    with (work_dir / "log.csv").open() as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


@pytest.mark.parametrize(
    "options",
    [
        {"data__batch_size": 8},
        {"data__batch_size": 4, "train__accumulate": 2},
        {"data__batch_size": 8, "data__repeats": 3, "train__ema_decay": 0.9},
    ],
    ids=["plain", "accumulate", "repeats-ema"],
)
def test_two_processes_have_the_losses_of_one(options, tmp_path):
    alone = run(1, tmp_path / "one", **{**options, "data__batch_size": 2 * options["data__batch_size"]})
    together = run(2, tmp_path / "two", **options)
    assert len(alone) == len(together) == 2
    for one, two in zip(alone, together, strict=True):
        for key in ("lr", "train_loss", "loss", "top1", "top5"):
            assert two[key] == pytest.approx(one[key], rel=2e-5), key


def test_two_processes_evaluate_the_running_statistics_that_are_saved(tmp_path, monkeypatch):
    """A process normalises batches of its own, so its batch norms have statistics of their own."""
    few_digits(monkeypatch)
    options = RECIPES["batch norm"]
    rows = run(2, tmp_path / "two", **options, data__batch_size=8, schedule__num_epochs=1)
    alone = run_of(tiny_recipe(**options, schedule__num_epochs=1), tmp_path / "one", find_last(tmp_path / "two"))
    assert alone.fit()
    assert alone.task.evaluation.loss == pytest.approx(rows[0]["loss"], rel=1e-6)


@pytest.mark.parametrize(
    "extra", [{}, {"train__ema_decay": 0.9, "train__accumulate": 2}], ids=["plain", "accumulate-ema"]
)
def test_two_processes_forecast_as_one(extra, tmp_path):
    table = write(tmp_path / "table.csv", make())
    options = {"data__dataset": "csv", "data__file": str(table), "model__drop_rate": 0.0, **extra}
    alone = run(1, tmp_path / "one", **options, data__batch_size=32)
    together = run(2, tmp_path / "two", **options, data__batch_size=16)
    assert len(alone) == len(together) == 2
    for one, two in zip(alone, together, strict=True):
        for key in ("lr", "train_loss", "mse", "mae"):
            assert two[key] == pytest.approx(one[key], rel=2e-4), key


def test_a_model_spread_over_processes(tmp_path):
    """FSDP has the losses of one process, and either goes on with what the other has saved."""
    together = run(2, tmp_path / "together", sharded=True, data__batch_size=8)
    alone = run(1, tmp_path / "alone", data__batch_size=16)
    for first, second in (("one", "two"), ("two", "one")):
        for name, epochs in ((first, 1), (second, 2)):
            world = {"one": 1, "two": 2}[name]
            options = {"data__batch_size": 16 // world, "schedule__num_epochs": epochs}
            rows = run(world, tmp_path / first, sharded=name == "two", **options)
        (together if first == "two" else alone).extend(rows)
    for one, two in zip(alone, together, strict=True):
        assert two == pytest.approx(one, rel=2e-5)


def test_sigterm_to_one_of_two_processes_ends_both(tmp_path):
    assert run(2, tmp_path / "stopped", arrange=stop, data__batch_size=8) == []
    assert find_last(tmp_path / "stopped").state["training"]["position"]["update"] == 2
    rows = run(2, tmp_path / "stopped", data__batch_size=8)
    assert rows == run(2, tmp_path / "whole", data__batch_size=8)


@pytest.mark.parametrize("write", [write_shards, write_parquet])
def test_two_processes_share_a_stream(write, tmp_path):
    data = {f"data__{key}": value for key, value in write(tmp_path / "data", broken=(5, 18)).items()}
    options = {"model__num_classes": 2, "data__batch_size": 4, "data__max_unreadable": 0.1, "train__save_updates": 1}
    rows = run(2, tmp_path / "whole", **data, **options, train__keep=9)
    lines = (tmp_path / "whole/unreadable.txt").read_text().splitlines()
    assert (len(lines), len(set(lines))) == (4, 2)  # the same shards are trained on and held out
    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "whole/last.3.pth", tmp_path / "other/last.pth")
    assert load(tmp_path / "other/last.pth")["training"]["position"]["update"] not in (0, 4)
    assert run(2, tmp_path / "other", **data, **options) == rows


def test_slurm_says_who_is_who():
    step = {
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": "16",
        "SLURM_PROCID": "9",
        "SLURM_LOCALID": "1",
        "SLURM_JOB_ID": "1234567",
        "SLURM_STEP_NODELIST": "node1,node2",
        "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    }
    join_processes(step)
    step.pop("ACCELERATE_USE_CPU", None)  # without a GPU
    assert {name: value for name, value in step.items() if not name.startswith("SLURM_")} == {
        "RANK": "9",
        "LOCAL_RANK": str(1 % max(torch.cuda.device_count(), 1)),
        "WORLD_SIZE": "16",
        "LOCAL_WORLD_SIZE": "8",
        "MASTER_ADDR": "node1",
        "MASTER_PORT": "34567",
    }


@pytest.mark.parametrize(
    "others", [{}, {"SLURM_NTASKS": "1", "SLURM_STEP_ID": "0"}, {"SLURM_NTASKS": "4", "RANK": "0"}]
)
def test_slurm_is_left_alone(others):
    environment = dict(others)
    join_processes(environment)
    assert environment == others
