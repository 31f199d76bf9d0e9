import functools
import itertools
import math
import re
import sys
from collections import Counter

import onnx
import pytest
import timm
import torch
from torch import nn

import vim  # noqa: F401  registers the models
from tests.tiny import ROOT
from vim import export as exporting
from vim.data import input_shape
from vim.engine.weights import save_for_timm
from vim.errors import UserError
from vim.export import build, export, load_onnx, load_torch, load_torchscript
from vim.kernels import traceable
from vim.kernels.scan import reference
from vim.kernels.scan.reference import Inputs, Options
from vim.kernels.traceable import DECOMPOSITIONS, onnx_loop

ONNX = {"decompositions": DECOMPOSITIONS, "function": onnx_loop}
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


def assert_is_reference(inputs, options):
    got, want = (module.selective_scan(inputs, options) for module in (traceable, reference))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("combine", ["none", "sum", "mean"])
@pytest.mark.parametrize("present", [(), *itertools.combinations(OPTIONAL, 1), OPTIONAL], ids="-".join)
def test_the_loop_is_the_reference(present, combine, softplus):
    inputs = scan_inputs(2, 2, 9, 12, 3, 4, present, combine)
    if not softplus:  # steps go forward
        bias = inputs.delta_bias
        inputs = inputs._replace(delta=inputs.delta.abs(), delta_bias=bias if bias is None else bias.abs())
    assert_is_reference(inputs, Options([False, True], delta_softplus=softplus, combine=combine))


@pytest.mark.parametrize("reverse", [[False], [True], [True, False, True]], ids=str)
def test_the_loop_takes_any_directions(reverse):
    inputs = scan_inputs(3, len(reverse), 7, 6, 1, 5)
    assert_is_reference(inputs, Options(reverse, delta_softplus=True))


@pytest.mark.parametrize("size", [-1000.0, -30.0, 0.0, 30.0, 1000.0])
def test_a_step_of_any_size(size):
    inputs = scan_inputs(1, 1, 3, 4, 1, 2)
    inputs = inputs._replace(delta=torch.full_like(inputs.delta, size))
    assert_is_reference(inputs, Options([False], delta_softplus=True))


def assert_agrees(run, model, batch_sizes=(1, 2, 3, 5)):
    """Batch sizes beyond those that an export compares by itself."""
    for batch_size in batch_sizes:
        images = torch.randn(batch_size, *input_shape(model))
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


@pytest.mark.parametrize("n", [8, 9])
@pytest.mark.parametrize("dim", [-1, -2])
def test_fourier_transforms_are_products(n, dim):
    x = torch.randn(2, 5, 7, dtype=torch.float64)
    spectrum = torch.fft.rfft(x, n, dim)
    torch.testing.assert_close(traceable._rfft(x, n, dim), spectrum, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        traceable._irfft(spectrum, n, dim), torch.fft.irfft(spectrum, n, dim), rtol=1e-12, atol=1e-12
    )


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
        return model, path, export(model, path, format="onnx", **ONNX)

    return exported


@pytest.mark.parametrize("directions, depth", [("none", 1), ("v1", 1), ("v2", 2)])
def test_onnx_takes_any_batch(directions, depth, exported):
    model, path, differences = exported(directions=directions, depth=depth)
    assert max(difference.relative for difference in differences) < 1e-5
    assert_agrees(load_onnx(path), model)
    assert operators(path)["Scan"] == depth
    assert [file.name for file in path.parent.iterdir()] == ["a.onnx"]


@pytest.mark.parametrize("name", ["test_vim", "test_vim_ssd"])
def test_the_arguments_of_the_ops_are_json(name):
    """In which AOTInductor keeps them: it knows no infinity."""
    program = exporting._trace(timm.create_model(name, img_size=32, depth=1).eval())
    calls = [node for node in program.graph.nodes if str(node.target).startswith("vim.")]
    numbers = [value for node in calls for value in node.kwargs.values() if isinstance(value, float)]
    assert len(calls) >= 3
    assert all(map(math.isfinite, numbers))


FAMILIES = {
    "test_vim_ssd": {"depth": 1},
    "test_vim_s4d": {"depth": 1},
    "test_videomamba": {"depth": 1, "num_frames": 2},
    "test_vim2": {"depths": (1, 1, 1, 1)},
    "test_vmamba": {"embed_dims": (8, 16), "depths": (1, 1), "version": "v0", "d_state": 4},
    "test_mambar": {"depth": 1},
    "test_vssd": {"depths": (1, 1, 1, 1)},
    "test_convnext_s4nd": {"embed_dims": (8, 16), "depths": (1, 1), "kind": "s4", "stem": "s4nd", "init": "legs"},
    "test_mambavision": {"depths": (1, 1, 1, 2), "window_sizes": (3, 2)},  # with padding and several windows
}


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("name", ["test_vim", *FAMILIES])
def test_torchscript_takes_any_batch(name, tmp_path):
    model = timm.create_model(name, img_size=64, num_classes=3, **FAMILIES.get(name, {})).eval()
    export(model, tmp_path / "a.ts", format="torchscript", decompositions={}, batch_sizes=(1,))
    assert_agrees(load_torchscript(tmp_path / "a.ts"), model, batch_sizes=(5,))


def load_openvino(path):
    openvino = pytest.importorskip("openvino", reason="needs the extra [clients]")
    # by default bfloat16 on processors that have it
    compiled = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: torch.from_numpy(compiled(images.numpy())[0])


@pytest.mark.parametrize("name", FAMILIES)
def test_onnx_of_other_families(name, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=64, num_classes=3, **FAMILIES[name]).eval()
    export(model, tmp_path / "a.onnx", format="onnx", **ONNX, batch_sizes=(1,))
    assert_agrees(load_onnx(tmp_path / "a.onnx"), model, batch_sizes=(5,))
    operators(tmp_path / "a.onnx")
    assert_agrees(load_openvino(tmp_path / "a.onnx"), model, batch_sizes=(1, 5))


def test_openvino_takes_any_batch(exported):
    model, path, _ = exported(directions="v2")
    assert_agrees(load_openvino(path), model)


def test_onnx_does_not_grow_with_the_tokens(exported):
    few, many = (operators(exported(directions="none", **options)[1]) for options in ({}, {"img_size": 64}))
    assert few == many


class _Scan(nn.Module):
    """The options that no model uses, on a state made of the images."""

    in_chans = 2

    def __init__(self, inputs, softplus=True):
        super().__init__()
        self.softplus = softplus
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
            delta_softplus=self.softplus,
            return_last_state=True,
        )
        return torch.cat([y.flatten(1), state.flatten(1)], 1)


def test_onnx_of_every_option(tmp_path):
    model = _Scan(scan_inputs(1, 2, 7, 6, 3, 5, ("D", "delta_bias"), dtype=torch.float32)).eval()
    differences = export(model, tmp_path / "a.onnx", format="onnx", **ONNX)
    assert max(difference.relative for difference in differences) < 1e-5


@pytest.mark.parametrize("softplus", [True, False])
def test_onnx_of_steps_of_any_size(softplus, tmp_path):
    """From 1e-6 to 50, side by side, with decays that leave everything or nothing of the state."""
    inputs = scan_inputs(1, 2, 21, 6, 3, 5, ("D",), dtype=torch.float32)
    steps = torch.logspace(-6, math.log10(50), 2 * 21 * 6).view(inputs.delta.shape)
    steps = steps.flatten()[torch.randperm(steps.numel(), generator=torch.Generator().manual_seed(0))].view_as(steps)
    delta = torch.where(steps < 15, steps.double().expm1().log(), steps.double()).float() if softplus else steps
    A = torch.tensor([-1e-4, -1.0, -16.0, -64.0, -1000.0]).expand(inputs.A.shape)
    model = _Scan(
        inputs._replace(delta=delta, A=A.contiguous(), delta_bias=torch.zeros(2, 6)), softplus=softplus
    ).eval()
    path = tmp_path / "a.onnx"
    exporting._save_onnx(exporting._trace_blocks_once(model), path, *ONNX.values())
    state = torch.randn(2, 2, 6, 5)
    with torch.no_grad():
        want = model.double()(state.double())
    for load in (load_onnx, load_openvino):
        got = load(path)(state).double()
        assert (got - want).abs().max() < 5e-7 * want.abs().max()


@pytest.mark.parametrize("x", [-80.0, -20.0, -13.8, -1.0, 0.0, 1e-3, 1.0, 20.0, 600.0])
def test_softplus_to_the_last_bits(x):
    got = traceable._softplus(torch.tensor(x)).double()
    want = torch.nn.functional.softplus(torch.tensor(x, dtype=torch.float32).double(), threshold=1000)
    torch.testing.assert_close(got, want, rtol=4e-7, atol=0)


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
    assert_told(call("test_vim", tmp_path / "a.bin"), r"must end in .pt2 or .ts or .onnx, got .*a.bin: rename it")
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


SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "docs/deployment.md").read_text(), re.DOTALL)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit")
@pytest.mark.parametrize("package", ["onnxruntime", "openvino", "torchao", "torch.jit"])
def test_the_snippets_of_the_page(package, exported, tmp_path, monkeypatch):
    """With a smaller model."""
    pytest.importorskip(package, reason="needs the extras [export] and [clients]")
    (snippet,) = (text for text in SNIPPETS if package in text)
    _, path, _ = exported(directions="v2")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vim_tiny.onnx").symlink_to(path)
    found = {}
    snippet = snippet.replace("224", "32").replace(
        'create_model("vim_tiny")', 'create_model("test_vim", img_size=32, depth=1)'
    )
    exec(snippet, found)
    assert found["logits"].shape == (8, 1000)
