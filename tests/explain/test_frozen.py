from contextlib import contextmanager
from threading import Event, Thread

import pytest
import timm
import torch
from torch import nn

import vim  # noqa: F401
from vim.explain import METHODS, explain, implicit_attention, layer_maps


def model_and_images():
    torch.manual_seed(0)
    return timm.create_model("test_vim", num_classes=5, drop_path_rate=0.5), torch.randn(2, 3, 64, 64)


def everything(model, images):
    maps = {method: explain(model, images, 1, method) for method in METHODS}
    return maps | {"layer": layer_maps(model, images)[0], "matrix": implicit_attention(model, images)[0]}


def assert_same(found, want, **tolerances):
    assert found.keys() == want.keys()
    for name, values in want.items():
        torch.testing.assert_close(found[name], values, msg=lambda text, name=name: f"{name}: {text}", **tolerances)


@contextmanager
def checkpointing(model):
    model.set_grad_checkpointing()
    yield
    assert model.grad_checkpointing


@pytest.mark.parametrize(
    "around",
    [
        lambda model: torch.no_grad(),
        lambda model: torch.inference_mode(),
        lambda model: torch.autocast("cpu", torch.bfloat16),
        checkpointing,
    ],
)
def test_maps_are_the_same_whatever_surrounds_them(around):
    model, images = model_and_images()
    want = everything(model.eval(), images)
    with around(model):
        assert_same(everything(model.train(), images), want)
        assert model.training and all(parameter.requires_grad for parameter in model.parameters())


def test_a_compiled_model_is_explained_as_it_is_written():
    model, images = model_and_images()
    want = everything(model.eval(), images)
    assert_same(everything(torch.compile(model, backend="eager"), images), want)
    model.compile(backend="eager")
    assert_same(everything(model, images), want)


def test_half_precision_gives_maps_of_float32():
    model, images = model_and_images()
    want = everything(model.eval(), images)
    found = everything(model.bfloat16(), images.bfloat16())
    for name, values in want.items():
        assert found[name].dtype == torch.float32
        assert (found[name] - values).abs().max() < 0.05 * values.abs().max(), name


class Adapted(nn.Module):
    """A linear layer with a low-rank update, as adapters have it."""

    def __init__(self, base, update):
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, 1, bias=False)
        self.up.weight = nn.Parameter(update)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x)) * 2.0


@pytest.mark.parametrize("layer", ["in_proj", "x_proj", "dt_proj_b", "out_proj"])
def test_adapted_layers_are_part_of_the_model(layer):
    model, images = model_and_images()
    model.eval()
    base = getattr(model.layers[1].mixer, layer)
    adapted = Adapted(base, torch.randn(base.out_features, 2))
    setattr(model.layers[1].mixer, layer, adapted)
    found = everything(model, images)
    with torch.no_grad():
        base.weight += 2 * adapted.up.weight @ adapted.down.weight
    setattr(model.layers[1].mixer, layer, base)
    assert_same(found, everything(model, images), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_an_error_leaves_nothing_behind(method):
    model, images = model_and_images()
    model.layers[0].mixer.A_log.requires_grad_(False)
    model.layers[1].eval()
    broken = model.layers[2].mixer.out_proj.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        explain(model, images, 1, method)
    broken.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.overrides._len_torch_function_stack() == 0
    still = {name for name, module in model.named_modules() if not module.training}
    assert still == {name for name, _ in model.named_modules() if f"{name}.".startswith("layers.1.")}
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["layers.0.mixer.A_log"]


def test_threads_explain_one_model_while_another_runs_it():
    model, images = model_and_images()
    want, found, running = everything(model.eval(), images), {}, [True]

    def work(i):
        found[i] = everything(model, images)

    def run():
        while running:
            model(torch.randn(1, 3, 64, 64))

    other, threads = Thread(target=run), [Thread(target=work, args=(i,)) for i in range(3)]
    for thread in (other, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    running.clear()
    other.join()
    for one in found.values():
        assert_same(one, want)
    assert len(found) == 3 and all(parameter.requires_grad for parameter in model.parameters())


def test_one_explanation_at_a_time():
    model, images = model_and_images()
    entered, leave, order = Event(), Event(), []

    def wait(*_):
        if not entered.is_set():
            entered.set()
            leave.wait()

    model.norm_f.register_forward_pre_hook(wait)
    first, second = (Thread(target=lambda i=i: (explain(model, images), order.append(i))) for i in (1, 2))
    first.start()
    entered.wait()
    second.start()
    second.join(0.3)
    leave.set()
    first.join()
    second.join()
    assert order == [1, 2]
