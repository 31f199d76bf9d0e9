"""Models under PyTorch's tracers."""

import pytest
import timm
import torch
from timm.models._features_fx import get_notrace_functions, get_notrace_modules
from torchvision.models.feature_extraction import create_feature_extractor

from tests.layers.test_plain import FAMILIES, family  # noqa: F401  the fixture

TRACED = [
    *("vim", "vim_v1", "vim_none", "vim_ssd", "vim_hydra", "vim_s4d", "vim_s5", "vim_attention", "vim_moe"),
    *("videomamba", "mambar"),
]


def twice_as_many(inputs):
    return tuple(torch.cat([t, t.flip(0)]) if t.shape[0] == 2 else t for t in inputs)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit")
def test_torch_jit_trace(family):  # noqa: F811
    model, inputs = family
    traced = torch.jit.trace(model, inputs)
    for images in (inputs, twice_as_many(inputs)):
        torch.testing.assert_close(traced(*images), model(*images), rtol=0, atol=0)


@pytest.mark.parametrize("family", TRACED, indirect=True)
def test_symbolic_trace(family):  # noqa: F811
    model, inputs = family
    traced = torch.fx.symbolic_trace(model)
    for images in (inputs, twice_as_many(inputs)):
        torch.testing.assert_close(traced(*images), model(*images), rtol=0, atol=0)


@pytest.mark.parametrize(
    "name",
    [
        *("test_vim", "test_vim_ssd", "test_vim_s4d", "test_vim_moe", "test_videomamba", "test_mambar"),
        *("test_vim2", "test_vmamba", "test_vssd", "test_mambavision", "test_s4nd", "test_convnext_s4nd"),
    ],
)
def test_torchvision_extracts_features(name):
    model, image = timm.create_model(name).eval(), torch.randn(2, 3, 64, 64)
    leaves = {"leaf_modules": list(get_notrace_modules()), "autowrap_functions": list(get_notrace_functions())}
    nodes = {info["module"]: str(i) for i, info in enumerate(model.feature_info)}
    got = create_feature_extractor(model, nodes, tracer_kwargs=leaves)(image)
    want = {}
    for path, node in nodes.items():
        model.get_submodule(path).register_forward_hook(lambda module, args, out, node=node: want.update({node: out}))
    model(image)
    assert got.keys() == want.keys()
    for node, features in got.items():
        torch.testing.assert_close(features, want[node], rtol=0, atol=0)
