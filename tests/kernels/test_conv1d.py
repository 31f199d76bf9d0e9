import pytest
import torch

from tests.kernels.test_scan import assert_fake_strides
from vim.kernels import causal_conv1d

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
SHAPES = [(1, 1, 1, 1, 1), (2, 2, 5, 24, 4), (1, 2, 197, 130, 4), (2, 2, 3, 17, 7), (1, 3, 20, 48, 2)]  # b, k, l, d, w


def make_inputs(b, k, l, d, w, dtype, bias=True):
    draw = torch.Generator().manual_seed(0)
    inputs = {"x": (b, k, l, d), "weight": (k, d, w), "bias": (k, d)}
    made = {n: torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for n, shape in inputs.items()}
    return made if bias else {n: v for n, v in made.items() if n != "bias"}


def run_with_gradients(inputs, **options):
    leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    y = causal_conv1d(**leaves, **options)
    pull = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    grads = torch.autograd.grad(y, list(leaves.values()), pull)
    return {"y": y, **{f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def assert_matches_reference(inputs, dtype, **options):
    got = run_with_gradients(inputs, **options)
    in_float64 = {name: value.double() for name, value in inputs.items()}
    want = run_with_gradients(in_float64, **{**options, "backend": "reference"})
    for name, reference in want.items():
        assert got[name].dtype == dtype
        scale = reference.abs().max().clamp_min(1e-2).item()
        torch.testing.assert_close(got[name].double(), reference, rtol=0, atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, silu, dtype, backend):
    if backend == "cpu" and dtype == torch.float64:
        pytest.skip("the native backend computes in float32")
    inputs = make_inputs(*shape, dtype, bias=silu)
    assert_matches_reference(inputs, dtype, silu=silu, reverse=[i % 2 == 1 for i in range(shape[1])], backend=backend)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_instruction_set(shape, instruction_set):
    inputs = make_inputs(*shape, torch.float32)
    assert_matches_reference(inputs, torch.float32, reverse=[i % 2 == 1 for i in range(shape[1])], backend="cpu")


def test_reads_no_later_token(backend):
    inputs = make_inputs(1, 1, 30, 8, 4, torch.float32)
    y = causal_conv1d(**inputs, reverse=[False], backend=backend)
    inputs["x"][:, :, 20:] += 1
    torch.testing.assert_close(causal_conv1d(**inputs, reverse=[False], backend=backend)[:, :, :20], y[:, :, :20])


def test_three_dimensions(backend):
    inputs = make_inputs(2, 1, 9, 8, 4, torch.float32)
    y = causal_conv1d(**inputs, reverse=[True], backend=backend)
    alone = causal_conv1d(inputs["x"][:, 0], inputs["weight"][0], inputs["bias"][0], reverse=True, backend=backend)
    torch.testing.assert_close(alone, y[:, 0])


def test_opcheck(backend):
    inputs = [v.requires_grad_() for v in make_inputs(2, 2, 9, 20, 4, torch.float32).values()]
    options = {"reverse": [False, True], "backend": backend}
    torch.library.opcheck(torch.ops.vim.causal_conv1d, inputs, options)
    assert_fake_strides(torch.ops.vim.causal_conv1d_backward, (inputs[0], *inputs), options)


def test_float32_weights_of_tokens_in_low_precision(backend):
    inputs = make_inputs(2, 2, 9, 20, 4, torch.bfloat16)
    mixed = {name: value if name == "x" else value.float() for name, value in inputs.items()}
    low, got = (run_with_gradients(i, reverse=[False, True], backend=backend) for i in (inputs, mixed))
    for name, value in got.items():
        assert value.dtype == (torch.bfloat16 if name in ("y", "grad_x") else torch.float32)
        torch.testing.assert_close(value.bfloat16(), low[name])


def test_too_many_directions_are_refused():
    with pytest.raises(ValueError, match="x must have at most 32 directions, got 33"):
        causal_conv1d(torch.zeros(1, 33, 2, 3), torch.zeros(33, 3, 4), reverse=[True] * 33)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4)}, r"x must be \(b, l, d\) or \(b, k, l, d\), got \(4,\)"),
        ({"weight": torch.zeros(5, 4)}, r"weight must be \(k, d, w\) = \(1, 8, 4\), got \(1, 5, 4\)"),
        ({"weight": torch.zeros(8, 0)}, "weight must not be empty"),
        ({"bias": torch.zeros(7)}, r"bias must be \(k, d\) = \(1, 8\), got \(1, 7\)"),
        ({"weight": torch.zeros(8, 4, dtype=torch.float64)}, "weight must be float32, got float64"),
        ({"bias": torch.zeros(8, device="meta")}, "bias must be on cpu, got meta"),
    ],
)
def test_wrong_input_is_told(change, message):
    inputs = {"x": torch.zeros(2, 6, 8), "weight": torch.zeros(8, 4), "bias": torch.zeros(8), **change}
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**inputs)
