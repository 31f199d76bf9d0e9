"""The Triton kernels of state space duality: interpreted where there is no GPU, else on it, real sizes too."""

import pytest
import torch

from tests.kernels.test_scan import alternating, assert_close, in_float64
from tests.kernels.test_ssd import OPTIONAL, make_inputs
from vim.kernels import ssd

triton = pytest.importorskip("triton", reason="triton is not installed")
from tests.interpreter import needs_loops  # noqa: E402
from vim.kernels.ssd import triton as triton_ssd  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = needs_loops
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")


def run(inputs, **options):
    leaves = {name: value.to(DEVICE).detach().requires_grad_() for name, value in inputs.items()}
    y, state = ssd(**leaves, dt_softplus=True, return_last_state=True, **options)
    draw = torch.Generator().manual_seed(1)
    pull = [torch.randn(t.shape, generator=draw, dtype=torch.float64).to(t) for t in (y, state)]
    grads = torch.autograd.grad([y, state], list(leaves.values()), pull)
    return {"y": y, "last_state": state, **{f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def assert_matches_reference(inputs, dtype, *, chunk_size=16, **options):
    got = run(inputs, **options, backend="triton", chunk_size=chunk_size)
    assert got["y"].dtype == dtype
    assert_close(got, run(in_float64(inputs), **options, backend="reference"), dtype)
    return got


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1, 1, 1), (1, 2, 18, 2, 5, 1, 3), (2, 1, 17, 2, 17, 2, 36)], ids=str)
def test_matches_reference(shape):
    inputs = make_inputs(*shape, dtype=torch.float32)
    assert_matches_reference(inputs, torch.float32, reverse=alternating(shape[1]), dt_limit=(0.2, 1.0))


@pytest.mark.parametrize(
    ("dtype", "combine", "present"),
    [
        (torch.float32, "none", ()),
        (torch.float32, "mean", ("D",)),
        (torch.bfloat16, "none", OPTIONAL),
        (torch.bfloat16, "sum", ("z",)),
        (torch.float16, "mean", ("D", "z", "dt_bias")),
    ],
    ids=str,
)
def test_dtypes_and_optional_inputs(dtype, combine, present):
    inputs = make_inputs(1, 2, 18, 1, 3, 1, 2, combine=combine, dtype=dtype, options=present)
    assert_matches_reference(inputs, dtype, reverse=[True, False], combine=combine)


@pytest.mark.parametrize(
    ("busy", "sizes", "segment"), [(12, (33, 2, 17, 1, 3), 16), (6, (65, 2, 3, 1, 2), 32)], ids=["blocks", "long"]
)
def test_segments(busy, sizes, segment, monkeypatch):
    """So little is too short or busy enough, and in the registers of a program, that small inputs are cut."""
    for name, value in {"SHORT": 0, "BUSY": busy, "STATE": 256}.items():
        monkeypatch.setattr(triton_ssd, name, value)
    assert triton_ssd.configuration(torch.float32, 1, *sizes) == (16, segment)
    inputs = make_inputs(1, 1, *sizes, dtype=torch.float32, options=OPTIONAL if segment == 16 else ())
    assert_matches_reference(inputs, torch.float32, chunk_size=None, reverse=[segment == 16])


def test_weak_decays_after_a_strong_one_keep_their_digits():
    inputs = make_inputs(1, 1, 16, 1, 2, 1, 2, dtype=torch.float32, options=())
    inputs["dt"].fill_(-6.0)[:, :, 2] = 30000.0
    inputs["A"].fill_(-1.0)
    got = run(inputs, reverse=[False], backend="triton", chunk_size=16)["y"]
    want = run(in_float64(inputs), reverse=[False], backend="reference")["y"]
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-3)


def test_decays_so_strong_that_their_inverse_overflows():
    inputs = make_inputs(1, 1, 18, 1, 2, 1, 2, dtype=torch.float32)
    inputs["A"].fill_(-1e5)
    assert_matches_reference(inputs, torch.float32, reverse=[False])


def test_reads_through_strides():
    inputs = make_inputs(1, 1, 18, 2, 4, 1, 3, dtype=torch.float32, options=("D", "z"))
    options = {"reverse": [True], "backend": "triton", "chunk_size": 16}
    want = run(inputs, **options)
    wide = torch.cat([inputs[name].flatten(3) for name in ("z", "x", "B", "C", "dt")], 3).to(DEVICE)
    z, x, B, C, dt = wide.split([8, 8, 3, 3, 2], 3)
    views = {"z": z.unflatten(3, (2, 4)), "x": x.unflatten(3, (2, 4)), "dt": dt}
    views |= {"B": B.unflatten(3, (1, 3)), "C": C.unflatten(3, (1, 3))}
    expanded = {name: view.expand(1, 2, *view.shape[2:]) for name, view in views.items()}
    rest = {name: inputs[name].to(DEVICE).expand(2, *inputs[name].shape[1:]) for name in ("A", "D")}
    y = ssd(**expanded, **rest, **{**options, "reverse": [True, False]}, dt_softplus=True)
    torch.testing.assert_close(y[:, :1], want["y"], rtol=1e-6, atol=1e-6)
    scattered = {n: t.transpose(2, -1).contiguous().transpose(2, -1) if n not in "AD" else t for n, t in inputs.items()}
    for name, value in run(scattered, **options).items():
        torch.testing.assert_close(value, want[name], rtol=1e-5, atol=1e-5)


def canonical():
    inputs = make_inputs(1, 2, 5, 1, 2, 1, 2, combine="mean", dtype=torch.float32)
    inputs["z"] = inputs["z"].unsqueeze(1)
    return tuple(value.to(DEVICE) for value in inputs.values())


def test_fake_kernels():
    options = {"reverse": [False, True], "dt_softplus": True, "combine": "mean", "return_last_state": True}
    options |= {"backend": "triton", "chunk_size": 16}
    tests = ["test_schema", "test_faketensor"]
    torch.library.opcheck(torch.ops.vim.ssd_forward, canonical(), {**options, "save": True}, test_utils=tests)


@pytest.mark.parametrize(("k", "combine"), [(1, "none"), (2, "mean")])
def test_float16_overflows_no_earlier_than_its_result(k, combine):
    """The state, y before a gate that is nearly shut, and its gradient are above 65,504."""
    wide = {"dtype": torch.float16, "device": DEVICE}
    x = torch.full((1, k, 1, 1, 1), 300.0, **wide).requires_grad_()
    B, C = torch.full((1, k, 1, 1, 1), 300.0, **wide), torch.ones(1, k, 1, 1, 1, **wide)
    A, z = torch.zeros(k, 1, device=DEVICE), torch.full((1, 1, 1, 1, 1), -9.0, **wide).requires_grad_()
    results = {}
    for backend in ("reference", "triton"):
        y, _ = torch.ops.vim.ssd(
            x, torch.ones_like(x[..., 0]), A, B, C, z=z, reverse=[False] * k, combine=combine, backend=backend
        )
        results[backend] = [y, *torch.autograd.grad(y, (x, z), torch.full_like(y, 10.0))]
    for got, want in zip(results["triton"], results["reference"], strict=True):
        assert want.isfinite().all()
        torch.testing.assert_close(got, want, rtol=3e-3, atol=1e-3)


def test_tuning_leaves_no_trace():
    from vim.kernels.ssd.tune import tune

    times = iter([3.0, 1.0])
    found = tune(
        b=1, k=1, l=17, h=1, p=2, n=1, dtype=torch.float32, device=DEVICE, time=lambda run: run() or next(times)
    )
    assert found == [(1.0, 16, 32), (3.0, 16, 16)]
    assert not triton_ssd.TUNED


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(16, 2, 197, 6, 64, 1, 64), (2, 2, 730, 12, 64, 1, 64), (1, 1, 2048, 6, 128, 2, 128), (1, 2, 300, 5, 24, 1, 16)],
    ids=str,
)
def test_real_sizes(shape, dtype):
    inputs = make_inputs(*shape, combine="mean", dtype=dtype)
    options = {"reverse": alternating(shape[1]), "combine": "mean"}
    got = assert_matches_reference(inputs, dtype, chunk_size=None, **options)
    for name, value in run(inputs, **options, backend="triton").items():
        assert torch.equal(value, got[name]), name
