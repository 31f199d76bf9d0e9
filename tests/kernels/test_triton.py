"""The Triton kernels: in Triton's interpreter at small sizes where there is no GPU, else on it, real sizes too."""

import pytest
import torch

from tests.kernels.test_conv1d import make_inputs as make_conv_inputs
from tests.kernels.test_conv1d import run_with_gradients as run_conv
from tests.kernels.test_norm import run_with_gradients as run_norm
from tests.kernels.test_scan import (
    OPTIONAL,
    SIDE_BY_SIDE,
    alternating,
    assert_close,
    assert_fake_strides,
    in_float64,
    make_inputs,
    tokens_side_by_side,
)
from vim.kernels import causal_conv1d, rms_norm, selective_scan

triton = pytest.importorskip("triton", reason="triton is not installed")
from tests.interpreter import needs_loops  # noqa: E402
from vim.kernels.scan import triton as triton_scan  # noqa: E402
from vim.kernels.scan.reference import Inputs  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")


pytestmark = needs_loops


@pytest.fixture
def small(monkeypatch):
    """Limits so low that small inputs have several chunks, segments and parts of the states."""

    def limit(chunk=4, states=24, busy=0, block=None):
        monkeypatch.setattr(triton_scan, "CHUNK", chunk)
        monkeypatch.setattr(triton_scan, "MOST_STATES", states)
        monkeypatch.setattr(triton_scan, "BUSY", busy)
        if block:
            monkeypatch.setattr(triton_scan, "configuration", lambda rows, l, d, g, n: (block, -(-l // chunk) * chunk))

    return limit


def on_device(inputs):
    return {name: value.to(DEVICE) for name, value in inputs.items()}


def assert_matches_reference(inputs, dtype, **options):
    inputs = on_device(inputs)
    got = run_on_device(inputs, **options, backend="triton")
    assert_close(got, run_on_device(in_float64(inputs), **options, backend="reference"), dtype)


def run_on_device(inputs, **options):
    """As run_with_gradients, which draws on the CPU."""
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    y, state = selective_scan(**leaves, **options, return_last_state=True)
    draw = torch.Generator().manual_seed(1)
    pull = [torch.randn(t.shape, generator=draw, dtype=torch.float64).to(t) for t in (y, state)]
    grads = torch.autograd.grad([y, state], list(leaves.values()), pull)
    return {"y": y, "last_state": state, **{f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}}


@pytest.mark.parametrize(
    "shape",  # b, k, l, d, g, n
    [
        (1, 1, 1, 1, 1, 1),
        (2, 2, 6, 33, 1, 3),
        (1, 3, 6, 10, 2, 5),
        (1, 1, 3, 4, 1, 16),
        (1, 1, 3, 4, 1, 24),
        (1, 2, 6, 8, 2, 1),
        (1, 1, 5, 6, 1, 8),
    ],
    ids=str,
)
def test_matches_reference(shape, small):
    small()
    options = {"delta_softplus": True, "reverse": alternating(shape[1])}
    assert_matches_reference(make_inputs(*shape, dtype=torch.float32), torch.float32, **options)


@pytest.mark.parametrize("combine", ["none", "sum", "mean"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype, combine, small):
    small()
    options = {"delta_softplus": True, "reverse": [False, True], "combine": combine}
    assert_matches_reference(make_inputs(1, 2, 5, 4, 1, 2, combine=combine, dtype=dtype), dtype, **options)


@pytest.mark.parametrize("combine", ["none", "mean"])
@pytest.mark.parametrize("present", [(), *((name,) for name in OPTIONAL), ("D", "z", "delta_bias")], ids="-".join)
def test_optional_inputs(present, combine, small):
    small()
    inputs = make_inputs(1, 2, 5, 4, 1, 2, combine=combine, dtype=torch.float32, options=present)
    inputs["delta"] = inputs["delta"].abs()
    options = {"delta_softplus": "delta_bias" in present, "reverse": [True, False], "combine": combine}
    assert_matches_reference(inputs, torch.float32, **options)


@pytest.mark.parametrize("block", [32, 64])
def test_blocks_of_channels(block, small):
    small(block=block)
    options = {"delta_softplus": True, "reverse": [True]}
    assert_matches_reference(make_inputs(1, 1, 3, 70, 1, 3, dtype=torch.float32), torch.float32, **options)


@pytest.mark.parametrize(("l", "segments"), [(12, 3), (15, 4)])
def test_segments(l, segments, small):
    small(busy=8)
    assert -(-l // triton_scan.configuration(1, l, 4, 1, 3)[1]) == segments
    assert_matches_reference(make_inputs(1, 1, l, 4, 1, 3, dtype=torch.float32), torch.float32, reverse=[True])


@pytest.mark.parametrize(("combine", "busy"), [("none", 8), ("sum", 0)])
def test_states_in_several_launches(combine, busy, small):
    small(states=2, chunk=2, busy=busy)
    inputs = make_inputs(1, 2, 6, 4, 2, 5, combine=combine, dtype=torch.float32)
    options = {"delta_softplus": True, "reverse": [False, True], "combine": combine}
    assert_matches_reference(inputs, torch.float32, **options)


def test_most_states(small):
    small()
    options = {"delta_softplus": True, "reverse": [False]}
    assert_matches_reference(make_inputs(1, 1, 2, 3, 1, 64, dtype=torch.float32), torch.float32, **options)


@pytest.mark.parametrize(("scale", "loss"), [(1e-4, 1), (1.0, 1), (50.0, 100)])
def test_weak_and_strong_decays_over_whole_chunks(scale, loss):
    inputs = on_device(make_inputs(1, 1, 70, 3, 1, 2, dtype=torch.float32))
    inputs["delta"], inputs["delta_bias"] = scale * inputs["delta"].abs(), 0 * inputs["delta_bias"]
    got = run_on_device(inputs, reverse=[True], backend="triton")
    want = run_on_device(in_float64(inputs), reverse=[True], backend="reference")
    # dA alone loses digits where neighbouring steps differ by orders of magnitude
    grads_A = [{"grad_A": grads.pop("grad_A") / loss} for grads in (got, want)]
    assert_close(got, want, torch.float32)
    torch.testing.assert_close(*(grads["grad_A"].double() for grads in grads_A), rtol=0, atol=1e-4)


def test_small_steps_are_exact():
    x = torch.linspace(-30, 30, 7 * 40).view(1, 7, 40)
    ones = torch.ones(1, 7, 1)
    inputs = {"u": torch.ones_like(x), "delta": x, "A": torch.full((40, 1), -1e30), "B": ones, "C": ones}
    y = selective_scan(**on_device(inputs), delta_softplus=True, backend="triton")  # y = dt: A forgets all before
    torch.testing.assert_close(y.cpu(), torch.nn.functional.softplus(x.double()).float(), rtol=5e-6, atol=0)


def test_reads_through_strides():
    inputs = on_device(make_inputs(1, 1, 5, 6, 1, 3, dtype=torch.float32, options=("D", "z")))
    want = selective_scan(**inputs, reverse=[True], delta_softplus=True, backend="triton")
    both = {"u": inputs["u"], "delta": inputs["delta"], "B": inputs["B"], "C": inputs["C"], "z": inputs["z"]}
    wide = torch.cat([value.flatten(3) for value in both.values()], 3)
    views = dict(zip(both, wide.split([6, 6, 3, 3, 6], 3), strict=True))
    views = {name: value.unflatten(3, (1, 3)) if name in "BC" else value for name, value in views.items()}
    expanded = {name: value.expand(1, 2, *value.shape[2:]) for name, value in views.items()}
    rest = {name: inputs[name].expand(2, *inputs[name].shape[1:]) for name in ("A", "D")}
    y = selective_scan(**expanded, **rest, reverse=[True, False], delta_softplus=True, backend="triton")
    torch.testing.assert_close(y[:, :1], want, rtol=0, atol=0)
    scattered = {**views, "u": views["u"].transpose(2, 3).contiguous().transpose(2, 3)}
    again = selective_scan(
        **scattered, A=inputs["A"], D=inputs["D"], reverse=[True], delta_softplus=True, backend="triton"
    )
    torch.testing.assert_close(again, want, rtol=0, atol=0)


@pytest.mark.parametrize("combine", ["none", "sum"])
def test_tokens_side_by_side(combine, small):
    small()
    inputs = make_inputs(1, 2, 6, 8, 2, 3, combine=combine, dtype=torch.float32)
    inputs = {name: tokens_side_by_side(t) if name in SIDE_BY_SIDE else t for name, t in inputs.items()}
    options = {"delta_softplus": True, "reverse": [False, True], "combine": combine}
    assert_matches_reference(inputs, torch.float32, **options)
    y = selective_scan(**on_device(inputs), **options, backend="triton")
    assert y.stride()[-2:] == (1, 6)


def test_gradients_are_the_same_on_every_run(small):
    small(busy=64)
    inputs = on_device(make_inputs(1, 2, 9, 3, 1, 2, dtype=torch.float32))
    options = {"delta_softplus": True, "reverse": [False, True], "backend": "triton"}
    runs = [run_on_device(inputs, **options) for _ in range(2)]
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name


def canonical(combine):
    inputs = on_device(make_inputs(1, 2, 3, 4, 2, 2, combine=combine, dtype=torch.float32))
    if combine != "none":
        inputs["z"] = inputs["z"].unsqueeze(1)
    return Inputs(**{name: value.requires_grad_() for name, value in inputs.items()})


@pytest.mark.parametrize("combine", ["none", "sum"])
def test_opcheck(combine):
    inputs = canonical(combine)
    options = {"reverse": [False, True], "delta_softplus": True, "combine": combine, "backend": "triton"}
    options["return_last_state"] = True
    tests = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(torch.ops.vim.selective_scan, inputs, options, test_utils=tests)
    plain, options["save"] = tuple(t.detach() for t in inputs), True
    torch.library.opcheck(torch.ops.vim.selective_scan_forward, plain, options, test_utils=tests[:2])
    y, state, *kept = torch.ops.vim.selective_scan_forward(*plain, **options)
    options.pop("save")
    grads = (torch.randn_like(y), torch.randn_like(state), *kept)
    assert_fake_strides(torch.ops.vim.selective_scan_backward, (*grads, *plain), options)


def test_gradient_checkpointing():
    inputs = canonical("mean")

    def run(*tensors):
        options = {"reverse": [False, True], "delta_softplus": True, "combine": "mean", "backend": "triton"}
        return torch.ops.vim.selective_scan(*tensors, **options)[0]

    y = torch.utils.checkpoint.checkpoint(run, *inputs, use_reentrant=False)
    grads = torch.autograd.grad(y.sum(), inputs)
    for got, want in zip(grads, torch.autograd.grad(run(*inputs).sum(), inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize(("k", "combine"), [(1, "none"), (2, "sum"), (2, "mean")])
def test_float16_overflows_no_earlier_than_its_result(k, combine):
    """y before a gate that is nearly shut, and its gradient, are above 65,504."""
    wide = {"dtype": torch.float16, "device": DEVICE}
    u = torch.full((1, k, 1, 1), 300.0, **wide).requires_grad_()
    B, C = torch.full((1, k, 1, 1, 1), 300.0, **wide), torch.ones(1, k, 1, 1, 1, **wide)
    A, z = torch.zeros(k, 1, 1, device=DEVICE), torch.full((1, 1, 1, 1), -9.0, **wide).requires_grad_()
    results = {}
    for backend in ("reference", "triton"):
        y, _ = torch.ops.vim.selective_scan(
            u, torch.ones_like(u), A, B, C, z=z, reverse=[False] * k, combine=combine, backend=backend
        )
        results[backend] = [y, *torch.autograd.grad(y, (u, z), torch.full_like(y, 10.0))]
    for got, want in zip(results["triton"], results["reference"], strict=True):
        assert want.isfinite().all()
        torch.testing.assert_close(got, want, rtol=3e-3, atol=1e-3)


def test_autocast_keeps_the_state_in_float32():
    inputs = on_device(make_inputs(1, 1, 3, 4, 1, 2, dtype=torch.float32))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y, state = selective_scan(**inputs, reverse=[False], return_last_state=True, backend="triton")
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "silu"), [((1, 1, 1, 1, 1), True), ((2, 2, 35, 70, 4), True), ((1, 2, 3, 17, 7), False)]
)
def test_convolution_matches_reference(shape, silu, dtype):
    inputs = on_device(make_conv_inputs(*shape, dtype, bias=silu))
    options = {"silu": silu, "reverse": alternating(shape[1])}
    got = {name: value.cpu() for name, value in run_conv_on_device(inputs, **options, backend="triton").items()}
    assert_close(
        got, run_conv(in_float64({n: v.cpu() for n, v in inputs.items()}), **options, backend="reference"), dtype
    )


def run_conv_on_device(inputs, **options):
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    y = causal_conv1d(**leaves, **options)
    pull = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y)
    grads = torch.autograd.grad(y, list(leaves.values()), pull)
    return {"y": y, **{f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def test_convolution_reads_a_tensor_that_directions_share():
    inputs = on_device(make_conv_inputs(1, 1, 6, 8, 4, torch.float32))
    shared = inputs["x"].expand(1, 2, 6, 8)
    rest = {name: inputs[name].expand(2, *inputs[name].shape[1:]) for name in ("weight", "bias")}
    y = causal_conv1d(shared, **rest, reverse=[False, True], backend="triton")
    torch.testing.assert_close(y[:, 1:], causal_conv1d(**inputs, reverse=[True], backend="triton"), rtol=0, atol=0)


def test_convolution_opcheck():
    inputs = [v.requires_grad_() for v in on_device(make_conv_inputs(1, 2, 5, 6, 3, torch.float32)).values()]
    torch.library.opcheck(torch.ops.vim.causal_conv1d, inputs, {"reverse": [False, True], "backend": "triton"})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 37), (5, 64)], ids=str)
def test_norm_matches_reference(shape, dtype):
    draw = torch.Generator().manual_seed(0)
    inputs = [torch.randn(s, generator=draw, dtype=torch.float64).to(dtype) for s in (shape, shape[-1:], shape)]
    names = ("y", "grad_x", "grad_weight")
    got = dict(zip(names, run_norm(*(t.to(DEVICE) for t in inputs), "triton"), strict=True))
    want = dict(zip(names, run_norm(*(t.double() for t in inputs), "reference"), strict=True))
    assert_close({name: value.cpu() for name, value in got.items()}, want, dtype)


def test_a_row_too_wide_for_a_program_is_normed_by_pytorch(monkeypatch):
    x, weight = torch.randn(2, 8193, device=DEVICE), torch.randn(8193, device=DEVICE)
    with pytest.raises(ValueError, match="'triton' takes at most 8192 channels, got 8193: use 'chunked'"):
        rms_norm(x, weight, backend="triton")
    monkeypatch.setenv("VIM_BACKEND", "triton")
    torch.testing.assert_close(rms_norm(x, weight), rms_norm(x, weight, backend="chunked"), rtol=0, atol=0)
    rms_norm(x[:, 1:], weight[1:], backend="triton")


def test_norm_opcheck():
    x, weight = (torch.randn(*s, device=DEVICE, requires_grad=True) for s in ((2, 5, 20), (20,)))
    torch.library.opcheck(torch.ops.vim.rms_norm, (x, weight), {"backend": "triton"})


def test_tuning_leaves_no_trace():
    from vim.kernels.scan.tune import tune

    times = iter([3.0, 1.0])
    assert tune(b=1, k=1, l=2, d=3, n=1, device=DEVICE, time=lambda run: run() or next(times)) == [
        (1.0, 64, 64),
        (3.0, 32, 64),
    ]
    assert not triton_scan.TUNED


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (64, 2, 197, 384, 1, 16),
        (1, 2, 197, 768, 1, 16),
        (4, 2, 1569, 384, 1, 16),
        (2, 4, 300, 250, 1, 24),
        (1, 1, 70, 96, 2, 64),
    ],
    ids=str,
)
def test_real_sizes(shape, dtype):
    options = {"delta_softplus": True, "reverse": alternating(shape[1]), "combine": "mean"}
    inputs = make_inputs(*shape, combine="mean", dtype=dtype, options=("D", "z", "delta_bias"))
    assert_matches_reference(inputs, dtype, **options)


@needs_gpu
def test_real_gradients_are_the_same_on_every_run():
    inputs = on_device(make_inputs(16, 2, 197, 384, 1, 16, dtype=torch.bfloat16))
    options = {"delta_softplus": True, "reverse": [False, True], "backend": "triton"}
    runs = [run_on_device(inputs, **options) for _ in range(2)]
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name


@needs_gpu
def test_cuda_graph():
    inputs = [value.detach() for value in canonical("mean")]

    def run():
        options = {"reverse": [False, True], "delta_softplus": True, "combine": "mean", "backend": "triton"}
        return torch.ops.vim.selective_scan(*inputs, **options)[0]

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    inputs[0].mul_(2)
    graph.replay()
    torch.testing.assert_close(y, run())
