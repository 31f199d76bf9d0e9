import pytest
import torch

from vim.kernels import rms_norm

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
SHAPES = [(1, 1), (2, 7, 37), (5, 64), (3, 50, 130)]


def run_with_gradients(x, weight, pull, backend):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = rms_norm(x, weight, backend=backend)
    return y, *torch.autograd.grad(y, (x, weight), pull)


def assert_matches_reference(shape, dtype, backend):
    draw = torch.Generator().manual_seed(0)
    inputs = [torch.randn(s, generator=draw, dtype=torch.float64).to(dtype) for s in (shape, shape[-1:], shape)]
    want = run_with_gradients(*(t.double() for t in inputs), "reference")
    for got, reference in zip(run_with_gradients(*inputs, backend), want, strict=True):
        assert got.dtype == dtype
        scale = reference.abs().max().clamp_min(1e-2).item()
        torch.testing.assert_close(got.double(), reference, rtol=0, atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, dtype, backend):
    if backend == "cpu" and dtype == torch.float64:
        pytest.skip("the native backend computes in float32")
    assert_matches_reference(shape, dtype, backend)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_instruction_set(shape, instruction_set):
    assert_matches_reference(shape, torch.float32, "cpu")


def test_opcheck(backend):
    x, weight = torch.randn(2, 5, 20, requires_grad=True), torch.randn(20, requires_grad=True)
    torch.library.opcheck(torch.ops.vim.rms_norm, (x, weight), {"backend": backend})


def test_wrong_input_is_told():
    with pytest.raises(ValueError, match=r"weight must be \(d\) = \(4,\), got \(5,\)"):
        rms_norm(torch.zeros(2, 4), torch.zeros(5))
    with pytest.raises(ValueError, match="weight must be float32, got float16"):
        rms_norm(torch.zeros(2, 4), torch.zeros(4, dtype=torch.float16))
