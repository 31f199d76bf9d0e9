import functools
import itertools
import re
import sys
from collections import Counter

import onnx
import pytest
import timm
import torch
from torch import nn

import vim  # noqa: F401  registers the models
from vim import export as exporting
from vim.engine.weights import save_for_timm
from vim.errors import UserError
from vim.export import build, export, load_onnx, load_torch
from vim.kernels import traceable
from vim.kernels.scan import reference
from vim.kernels.scan.reference import Inputs, Options
from vim.kernels.traceable import DECOMPOSITIONS

OPTIONAL = ("D", "z", "delta_bias", "initial_state")


def tiny(**options):
    torch.manual_seed(0)
    return timm.create_model("test_vim", **{"img_size": 32, "embed_dim": 16, "depth": 1, **options}).eval()


def scan_inputs(b, k, l, d, g, n, present=OPTIONAL, combine="none", dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=draw, dtype=dtype)

    u, delta, B, C = normal(b, k, l, d), normal(b, k, l, d), normal(b, k, l, g, n), normal(b, k, l, g, n)
    optional = {
        "D": normal(k, d),
        "z": normal(b, k if combine == "none" else 1, l, d),
        "delta_bias": normal(k, d),
        "initial_state": normal(b, k, d, n),
    }
    return Inputs(u, delta, -normal(k, d, n).exp(), B, C, **{name: optional[name] for name in present})


@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("combine", ["none", "sum", "mean"])
@pytest.mark.parametrize("present", [(), *itertools.combinations(OPTIONAL, 1), OPTIONAL], ids="-".join)
def test_the_loop_is_the_reference(present, combine, softplus):
    inputs = scan_inputs(2, 2, 9, 12, 3, 4, present, combine)
    if not softplus:  # steps go forward
        bias = inputs.delta_bias
        inputs = inputs._replace(delta=inputs.delta.abs(), delta_bias=bias if bias is None else bias.abs())
    options = Options([False, True], delta_softplus=softplus, combine=combine)
    got, want = (module.selective_scan(inputs, options) for module in (traceable, reference))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reverse", [[False], [True], [True, False, True]], ids=str)
def test_the_loop_takes_any_directions(reverse):
    inputs = scan_inputs(3, len(reverse), 7, 6, 1, 5)
    options = Options(reverse, delta_softplus=True)
    got, want = (module.selective_scan(inputs, options) for module in (traceable, reference))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [-1000.0, -30.0, 0.0, 30.0, 1000.0])
def test_a_step_of_any_size(size):
    inputs = scan_inputs(1, 1, 3, 4, 1, 2)
    inputs = inputs._replace(delta=torch.full_like(inputs.delta, size))
    options = Options([False], delta_softplus=True)
    got, want = (module.selective_scan(inputs, options) for module in (traceable, reference))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def assert_agrees(run, model, batch_sizes=(1, 2, 3, 5)):
    """Batch sizes beyond those that an export compares by itself."""
    for batch_size in batch_sizes:
        images = torch.randn(batch_size, 3, *model.img_size)
        with torch.no_grad():
            torch.testing.assert_close(run(images), model(images), rtol=1e-5, atol=1e-5)


def test_pt2_takes_any_batch(tmp_path):
    model = tiny()
    differences = export(model, tmp_path / "a.pt2", format="torch", decompositions={})
    assert [difference.batch_size for difference in differences] == [1, 2, 3]
    run = load_torch(tmp_path / "a.pt2")
    assert_agrees(run, model)
    ops = {str(node.target) for node in run.graph.nodes}
    assert {"vim.selective_scan.default", "vim.causal_conv1d.default", "vim.rms_norm.default"} <= ops


def test_pt2_of_a_model_of_clips(tmp_path):
    model = timm.create_model("videomamba_tiny_f8", img_size=32, depth=2).eval()
    export(model, tmp_path / "a.pt2", format="torch", decompositions={})
    clips = torch.randn(5, 3, 8, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(load_torch(tmp_path / "a.pt2")(clips), model(clips))


def nodes(graph):
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from nodes(attribute.g)


def operators(path):
    """How often each operator is in a file, all of them standard."""
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path)
    assert [opset.domain for opset in model.opset_import] == [""]
    assert len(model.functions) == 0
    assert not model.graph.node[0].metadata_props  # which would name the folders of the machine
    found = list(nodes(model.graph))
    assert {node.domain for node in found} == {""}
    return Counter(node.op_type for node in found if node.op_type != "Constant")  # equal ones are one


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Write a tiny model to a file that is written once: the model, the file, the differences."""

    @functools.cache
    def exported(**options):
        path, model = tmp_path_factory.mktemp("onnx") / "a.onnx", tiny(**options)
        return model, path, export(model, path, format="onnx", decompositions=DECOMPOSITIONS)

    return exported


@pytest.mark.parametrize("directions", ["none", "v1", "v2"])
def test_onnx_takes_any_batch(directions, exported):
    model, path, differences = exported(directions=directions)
    assert max(difference.relative for difference in differences) < 1e-5
    assert_agrees(load_onnx(path), model)
    assert operators(path)["Scan"] == 1
    assert [file.name for file in path.parent.iterdir()] == ["a.onnx"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_vim_ssd", {"depth": 1}),
        ("test_vmamba", {"embed_dims": (8, 16), "depths": (1, 1), "version": "v0", "d_state": 4}),
        ("test_vssd", {"depths": (1, 1, 1, 1)}),
        ("test_mambavision", {"depths": (1, 1, 1, 2), "window_sizes": (3, 2)}),  # with padding and several windows
    ],
    ids=str,
)
def test_onnx_of_other_families(name, options, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=64, num_classes=3, **options).eval()
    export(model, tmp_path / "a.onnx", format="onnx", decompositions=DECOMPOSITIONS, batch_sizes=(1,))
    assert_agrees(load_onnx(tmp_path / "a.onnx"), model, batch_sizes=(5,))
    operators(tmp_path / "a.onnx")


def test_onnx_does_not_grow_with_the_tokens(exported):
    few, many = (operators(exported(directions="none", **options)[1]) for options in ({}, {"img_size": 64}))
    assert few == many


class _Scan(nn.Module):
    """The options that no model uses, on a state made of the images."""

    in_chans = 2

    def __init__(self, inputs):
        super().__init__()
        self.inputs = nn.ParameterList([nn.Parameter(tensor) for tensor in inputs[:8] if tensor is not None])
        self.pretrained_cfg = {"input_size": (2, 6, 5)}

    def forward(self, initial_state):
        u, delta, A, B, C, D, delta_bias = self.inputs
        u, delta, B, C = (
            tensor.expand(initial_state.shape[0], -1, -1, -1, *tensor.shape[4:]) for tensor in (u, delta, B, C)
        )
        y, state = torch.ops.vim.selective_scan(
            *(u, delta, A, B, C),
            D=D,
            delta_bias=delta_bias,
            initial_state=initial_state,
            reverse=[True, False],
            delta_softplus=True,
            return_last_state=True,
        )
        return torch.cat([y.flatten(1), state.flatten(1)], 1)


def test_onnx_of_every_option(tmp_path):
    model = _Scan(scan_inputs(1, 2, 7, 6, 3, 5, ("D", "delta_bias"), dtype=torch.float32)).eval()
    differences = export(model, tmp_path / "a.onnx", format="onnx", decompositions=DECOMPOSITIONS)
    assert max(difference.relative for difference in differences) < 1e-5


@pytest.mark.parametrize("wrong", [0.99, float("nan")])
def test_a_file_that_differs_is_not_kept(wrong, tmp_path, monkeypatch):
    model, path = tiny(), tmp_path / "a.pt2"
    path.write_text("an earlier file")
    monkeypatch.setattr(exporting, "load_torch", lambda path: lambda images: wrong * model(images))
    with pytest.raises(
        UserError, match="exported Vim differs from the model by .* of the greatest output at batch size 1"
    ):
        export(model, path, format="torch", decompositions={})
    assert [file.name for file in tmp_path.iterdir()] == ["a.pt2"]
    assert path.read_text() == "an earlier file"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint of the published layout and its model."""
    torch.manual_seed(1)
    model, path = timm.create_model("test_vim", num_classes=3).eval(), tmp_path_factory.mktemp("weights") / "a.pth"
    torch.save({"model": model.state_dict()}, path)
    return path, model


def test_build_takes_weights_from_a_file_or_a_folder(weights, tmp_path):
    path, model = weights
    save_for_timm(model, tmp_path, None, {})
    for built in (build("test_vim", checkpoint=path), build(f"local-dir:{tmp_path}")):
        assert not built.training
        torch.testing.assert_close(built.state_dict(), model.state_dict())


def test_build_at_another_size(weights):
    model = build("test_vim", checkpoint=weights[0], img_size=96)
    assert model(torch.zeros(1, 3, 96, 96)).shape == (1, 3)


@pytest.fixture
def call(call):
    """Run the tool here: its exit status, output and errors."""
    return functools.partial(call, "export")


def test_the_tool(call, weights, tmp_path):
    path = tmp_path / "new" / "a.model"
    status, output, errors = call("test_vim", path, "--format", "torch", "--checkpoint", weights[0], "--img-size", 32)
    assert (status, errors) == (0, "")
    lines = output.splitlines()
    assert [re.sub(r"\d\.\de[+-]\d\d", "X", line) for line in lines[1:4]] == [
        f"  batch size {batch}: X, X of the greatest output" for batch in (1, 2, 3)
    ]
    assert re.fullmatch(f"{re.escape(str(path))}, .* MB: import vim before torch.export.load.*", lines[-1])
    assert load_torch(path)(torch.zeros(4, 3, 32, 32)).shape == (4, 3)


def assert_told(result, message):
    status, _, errors = result
    assert status == 2
    assert re.fullmatch(f"error: .*{message}.*\n", errors), errors


def test_mistakes(call, weights, tmp_path, monkeypatch):
    out = tmp_path / "a.pt2"
    assert_told(call("vim_nothing", out), r"no such model: vim_nothing \(the closest: vim_tiny")
    assert_told(call("resnet10t", out), "resnet10t is timm's")
    assert_told(call(f"local-dir:{tmp_path}", out), "no such file: .*config.json")
    assert_told(call("test_vim", tmp_path / "a.bin"), r"must end in .pt2 or .onnx, got .*a.bin: rename it")
    assert_told(call("test_vim", tmp_path, "--format", "torch"), "is a folder: name a file in it")
    assert_told(call("test_vim", weights[0] / "a.pt2"), "cannot make the folder")
    assert_told(call("test_vim", out, "--checkpoint", tmp_path / "b.pth"), "no such checkpoint")
    assert_told(call("vim_nano", out, "--checkpoint", weights[0]), "a.pth")
    assert_told(call("test_vim", out, "--img-size", 3), "test_vim does not take images of 3 pixels: img_size must be")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    message = r"ONNX needs onnxruntime, which is not installed: pip install -e '.\[export\]'"
    assert_told(call("test_vim", tmp_path / "a.onnx"), message)
    assert_told(call("vim_nothing", tmp_path / "a.onnx"), "no such model")  # what was typed comes first
    assert_told(call("vim_nano", tmp_path / "a.onnx", "--checkpoint", weights[0]), "a.pth is of another model")
    assert list(tmp_path.iterdir()) == []
