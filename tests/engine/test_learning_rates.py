"""The dynamics of time-invariant mixers learn at a rate of their own, in the trainer."""

import pytest
import timm

from tests.tiny import run_of, tiny_recipe
from vim.engine.build import build_optimizer, build_scheduler

ADAMW = {"opt": "adamw", "weight_decay": 0.05}
DYNAMICS = {"s4d": {"inv_dt", "A_real", "A_imag", "B"}, "s5": {"Lambda_re", "Lambda_im", "B", "log_step"}}


def model_of(mixer):
    return timm.create_model("test_vim", mixer=mixer, depth=2)


def by_name(model, optimizer):
    """For each parameter the options of its group."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [(names[id(p)], group) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(name for name, _ in found) == sorted(names.values())
    return dict(found)


@pytest.mark.parametrize("mixer", DYNAMICS)
@pytest.mark.parametrize("lr", [5e-4, 1e-2])
def test_rates_and_decay_of_each_parameter(mixer, lr):
    model = model_of(mixer)
    optimizer = build_optimizer(model, lr=lr, **ADAMW)
    scheduler, _ = build_scheduler(optimizer, {"sched": "cosine", "num_epochs": 10, "warmup_epochs": 0}, 1)
    scheduler.step(0)
    for name, group in by_name(model, optimizer).items():
        slow = name.rpartition(".")[2] in DYNAMICS[mixer]
        assert group["lr"] == pytest.approx(min(lr, 1e-3) if slow else lr), name
        if slow or name.endswith((".bias", "norm.weight")) or "." not in name:
            assert group["weight_decay"] == 0, name
        elif name.rpartition(".")[2] in ("C", "C1", "C2", "weight") and "norm" not in name:
            assert group["weight_decay"] == 0.05, name
    scheduler.step(9)
    rates = {name: group["lr"] for name, group in by_name(model, optimizer).items()}
    slowest = [rate for name, rate in rates.items() if name.rpartition(".")[2] in DYNAMICS[mixer]]
    assert max(slowest) / rates["head.weight"] == pytest.approx(min(1, 1e-3 / lr))


def test_together_with_layer_decay():
    model = model_of("s4d")
    scales = {
        name: group.get("lr_scale", 1.0)
        for name, group in by_name(model, build_optimizer(model, lr=4e-3, layer_decay=0.5, **ADAMW)).items()
    }
    for block, scale in (("layers.0", 0.25), ("layers.1", 0.5)):
        assert scales[f"{block}.mixer.output_linear.0.weight"] == scale
        assert scales[f"{block}.mixer.layer.kernel.A_imag"] == scale / 4


def test_another_models_groups_stay():
    model = timm.create_model("test_vim", depth=1)
    groups = build_optimizer(model, lr=1.0, **ADAMW).param_groups
    assert len(groups) == 2 and not any("lr_scale" in group for group in groups)


def test_in_a_recipe(tmp_path):
    trainer = run_of(tiny_recipe(model__mixer="s4d", optimizer__lr=2e-3), tmp_path)
    assert {group.get("lr_scale", 1.0) for group in trainer.optimizer.param_groups} == {1.0, 0.5}
