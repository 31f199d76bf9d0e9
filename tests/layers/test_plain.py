"""Every linear layer and convolution of every family is called: hooks, adapters and quantizers on it have effect."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize, prune

from vim.layers import MambaMixer
from vim.models import TSM2

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
COVARIATES = {"future_dim": 2, "static_dim": 2}
FAMILIES = {
    "vim": ("test_vim", {}),
    "vim_v1": ("test_vim", {"directions": "v1"}),
    "vim_none": ("test_vim", {"directions": "none", "combine": "sum"}),
    "vim_ssd": ("test_vim_ssd", {}),
    "vim_hydra": ("test_vim_ssd", {"directions": "hydra"}),
    "vim_moe": ("test_vim_moe", {"depth": 2}),
    "vim_s4d": ("test_vim_s4d", {}),
    "vim_s5": ("test_vim", {"mixer": "s5"}),
    "vim_attention": ("test_vim", {"mixer": "attention"}),
    "videomamba": ("test_videomamba", {"num_frames": 2, "img_size": 32}),
    "vim2": ("test_vim2", {}),
    "vmamba": ("test_vmamba", {"embed_dims": (16, 24), "depths": (1, 1)}),
    "vmamba_v0": ("test_vmamba", {"embed_dims": (16, 24), "depths": (1, 1), "version": "v0", "d_state": 4}),
    "mambar": ("test_mambar", {}),
    "mambavision": ("test_mambavision", {"depths": (1, 1, 2, 2), "layer_scale": 0.5}),
    "vssd": ("test_vssd", {"depths": (1, 1, 1, 1)}),
    "tsm2": (None, {"variate_mixer": "mlp", **COVARIATES}),
}


@pytest.fixture(params=FAMILIES)
def family(request):
    """A small model in evaluation mode whose parameters all matter, and the tensors it takes."""
    torch.manual_seed(0)
    name, options = FAMILIES[request.param]
    if name is None:
        sizes = {"num_variates": 3, "seq_len": 24, "horizon": 6, "patch_size": 8, "patch_stride": 8, "embed_dim": 8}
        model = TSM2(**sizes, d_state=4, **options)
        inputs = (torch.randn(2, 24, 3), torch.randn(2, 3, 6, 2), torch.randn(3, 2))
    else:
        model = timm.create_model(name, num_classes=3, **options)
        frames = (2,) if "num_frames" in options else ()
        inputs = (torch.randn(2, 3, *frames, *[options.get("img_size", 64)] * 2),)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval(), inputs


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, LAYERS)}


class Adapter(nn.Module):
    """A layer, and another beside it."""

    def __init__(self, base):
        super().__init__()
        self.base, self.other = base, type(base)(**options_of(base))

    def forward(self, x):
        return self.base(x) + self.other(x)

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)


def options_of(layer):
    names = "in_features", "out_features"
    if not isinstance(layer, nn.Linear):
        names = "in_channels", "out_channels", "kernel_size", "stride", "padding", "groups"
    return {**{name: getattr(layer, name) for name in names}, "bias": layer.bias is not None}


def replace(model, name, module):
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)


def test_every_layer_is_called(family):
    model, inputs = family
    want, called = model(*inputs), set()
    for name, module in layers(model).items():
        module.register_forward_hook(lambda *call, name=name: called.add(name))
    torch.testing.assert_close(model(*inputs), want, rtol=1e-4, atol=1e-5)
    assert called == set(layers(model))


def test_hooks_of_all_modules_see_every_layer(family):
    model, inputs = family
    called = set()
    hook = nn.modules.module.register_module_forward_hook(lambda module, *call: called.add(module))
    try:
        model(*inputs)
    finally:
        hook.remove()
    assert called >= set(layers(model).values())


def test_an_adapter_of_any_layer_trains(family):
    model, inputs = family
    before = model.requires_grad_(False)(*inputs)
    for name, layer in layers(model).items():
        adapter = Adapter(layer)
        replace(model, name, adapter)
        after = model(*inputs)
        assert not torch.equal(after, before), name
        after.square().sum().backward()
        for parameter in adapter.other.parameters():
            assert parameter.grad.abs().sum() > 0, name
        replace(model, name, layer)
    torch.testing.assert_close(model(*inputs), before, rtol=0, atol=0)


def test_gradients_of_a_called_layer_are_those_of_its_op(family):
    """Captured by hooks, they also give the gradient of each sample."""
    model, inputs = family
    model(*inputs).square().sum().backward()
    want = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    seen = {}
    for name, module in layers(model).items():
        module.register_forward_hook(lambda module, args, out, name=name: seen.update({name: args[0].detach()}))
        module.register_full_backward_hook(lambda module, _, out, name=name: seen.update({f"grad {name}": out[0]}))
    model(*inputs).square().sum().backward()
    for name, parameter in model.named_parameters():
        scale = want[name].abs().max().item()
        torch.testing.assert_close(parameter.grad, want[name], rtol=1e-3, atol=1e-4 * scale)
    for name, module in layers(model).items():
        if isinstance(module, nn.Linear):
            grad, x = seen[f"grad {name}"], seen[name]
            product = torch.einsum("...o,...i->oi", grad, x)
            torch.testing.assert_close(
                product, module.weight.grad, rtol=1e-3, atol=1e-5 + 1e-4 * product.abs().max().item()
            )


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_dynamic_quantization(family):
    model, inputs = family
    small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    got, want = small(*inputs), model(*inputs)
    assert not torch.equal(got, want)
    torch.testing.assert_close(got, want, rtol=0, atol=0.2 * want.abs().max().item())


@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_torchao(family, config):
    torchao = pytest.importorskip("torchao.quantization", reason="needs the extra [clients]")
    model, inputs = family
    with torch.no_grad():
        want = model(*inputs)
        torchao.quantize_(model, getattr(torchao, config)())
        got = model(*inputs)
    assert 0 < (got - want).norm() < 0.05 * want.norm()


@pytest.mark.parametrize("name", ["in_proj", "conv1d", "conv1d_b", "x_proj", "dt_proj", "dt_proj_b", "out_proj"])
@pytest.mark.parametrize("how", ["parametrized", "pruned", "forward", "subclass"])
def test_a_changed_layer_of_a_mixer(name, how):
    """Each way makes the layer's weight zero, and is seen."""
    torch.manual_seed(0)
    mixer, x = MambaMixer(24, d_state=4), torch.randn(2, 9, 24)
    nn.init.normal_(mixer.dt_proj_b.bias)
    before = mixer(x)
    weight = getattr(mixer, name).weight.detach().clone()
    getattr(mixer, name).weight.data.zero_()
    want = mixer(x)
    layer = getattr(mixer, name)
    layer.weight.data.copy_(weight)
    if how == "parametrized":

        class Zero(nn.Module):
            def forward(self, x):
                return 0 * x

        parametrize.register_parametrization(layer, "weight", Zero())
    elif how == "pruned":
        prune.random_unstructured(layer, "weight", 0.9999)
        layer.weight_mask.zero_()
    elif how == "forward":
        plain = layer.forward
        bias = 0 if layer.bias is None else layer.bias.view(-1, *[1] * (weight.dim() - 2))
        layer.forward = lambda x: 0 * plain(x) + bias
    else:

        class Other(type(layer)):
            def forward(self, x):
                self.weight.data.zero_()
                return super().forward(x)

        layer.__class__ = Other
    assert not torch.allclose(want, before)
    torch.testing.assert_close(mixer(x), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("paths", [None, torch.stack([torch.arange(9), torch.tensor([2, 0, 1, 4, 3, 5, 6, 8, 7])])])
def test_called_layers_respect_masks_and_paths(paths):
    torch.manual_seed(0)
    mixer, x = MambaMixer(24, d_state=4), torch.randn(2, 9, 24)
    mask = torch.arange(9) < torch.tensor([[9], [6]])
    want = mixer(x, paths, mask if paths is None else None)
    for layer in (mixer.conv1d, mixer.conv1d_b, mixer.dt_proj, mixer.dt_proj_b):
        layer.register_forward_hook(lambda *call: None)
    got = mixer(x, paths, mask if paths is None else None)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_torchscript_calls_adapters():
    torch.manual_seed(0)
    mixer, x = MambaMixer(24, d_state=4), torch.randn(2, 9, 24)
    torch.testing.assert_close(torch.jit.script(mixer)(x), mixer(x), rtol=1e-4, atol=1e-5)
    before = mixer(x)
    mixer.dt_proj = nn.Sequential(mixer.dt_proj, nn.Linear(48, 48))
    mixer.conv1d_b = nn.Sequential(mixer.conv1d_b, nn.Conv1d(48, 48, 1))
    assert not torch.allclose(mixer(x), before)
    torch.testing.assert_close(torch.jit.script(mixer)(x), mixer(x), rtol=1e-4, atol=1e-5)


def test_the_sum_of_steps_and_bias_stays_float32():
    """Of layers that nothing wraps."""
    torch.manual_seed(0)
    mixer, x = MambaMixer(24, d_state=4).bfloat16(), torch.randn(2, 9, 24).bfloat16()
    biases, op = [], torch.ops.vim.selective_scan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.vim, "selective_scan", lambda *a, **k: biases.append(k["delta_bias"]) or op(*a, **k))
        mixer(x)
    assert biases[0].dtype == torch.float32
    torch.testing.assert_close(F.softplus(biases[0][0]), F.softplus(mixer.dt_proj.bias.float()))
