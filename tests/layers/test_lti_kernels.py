"""Kernels against golden numbers and against the recurrences that they stand for."""

import math

import pytest
import torch

from tests.golden.lti import DIGITS, GOLDEN, deviation, noise
from vim.layers import S4DKernel
from vim.layers.hippo import diagonal

PRECISIONS = [(torch.float64, DIGITS), (torch.float32, 1e-4)]
INITS = ["legs", "legt", "fout", "lin", "inv", "inv2", "quad", "real", "rand"]


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=str)
@pytest.mark.parametrize("name", list(GOLDEN["s4d_kernel"]["cases"]))
@torch.no_grad()
def test_golden_s4d(name, dtype, tolerance):
    golden = GOLDEN["s4d_kernel"]
    want = golden["cases"][name]
    init, disc = name.split("_")
    kernel = S4DKernel(golden["H"], d_state=golden["N"], init=init, disc=disc, dtype=dtype)
    kernel.inv_dt.copy_(torch.tensor(golden["dt"], dtype=torch.float64).log().unsqueeze(1))
    kernel.B.copy_(torch.tensor([1.0, 0.0]))
    # the golden eigenvalues have positive imaginary parts
    kernel.C.copy_(noise("s4d.C", (4, 32, 2)) * torch.tensor([1, -1]))
    K = kernel(golden["L"]).squeeze(0)
    assert K.dtype == dtype
    largest = K.abs().max()
    for got, numbers in ((K[:, :8], want["first8"]), (K[:, -2:], want["last2"])):
        assert (got - torch.tensor(numbers, dtype=torch.float64)).abs().max() / largest < tolerance
    assert deviation(K.norm(dim=1), want["norm"]) < tolerance


def recurrence(kernel, l, rate=1.0):
    """The impulse response, (c, d, l), of x' = A x + B u discretized with dense float64 matrices, token by token."""
    d, m = kernel.C.shape[1:3]
    own = torch.arange(d) % kernel.A_real.shape[0]
    A = torch.complex(-kernel.A_real.double().exp(), -kernel.A_imag.double())[own]
    B = torch.view_as_complex(kernel.B.double().squeeze(0).contiguous())[own]
    dt = kernel.inv_dt.double().exp() * rate
    if kernel.disc == "zoh":
        factor = torch.exp(dt * A)
        state = (factor - 1) / A * B
    else:
        factor = (1 + dt * A / 2) / (1 - dt * A / 2)
        state = dt / (1 - dt * A / 2) * B
    C = torch.view_as_complex(kernel.C.double())
    outputs = []
    for _ in range(l):
        outputs.append(2 * (C * state).sum(-1).real)
        state = factor * state
    return torch.stack(outputs, dim=-1)


@pytest.mark.parametrize("disc", ["zoh", "bilinear"])
@pytest.mark.parametrize("init", INITS)
@torch.no_grad()
def test_s4d_is_its_recurrence(init, disc):
    torch.manual_seed(1)
    for l, options in (
        (50, {"n_ssm": 2}),
        (1, {"n_ssm": None, "dt_tie": False}),
        (17, {"dt_max": 1.0, "B_clip": None}),
    ):
        kernel = S4DKernel(4, d_state=16, channels=3, init=init, disc=disc, **options).double()
        for parameter in (kernel.A_real, kernel.A_imag, kernel.B):  # the systems start alike
            parameter += 0.1 * torch.randn_like(parameter)
        assert kernel(l).shape == (3, 4, l)
        assert deviation(kernel(l), recurrence(kernel, l)) < 1e-10
        assert deviation(kernel.float()(l), recurrence(kernel, l)) < 1e-4


def test_starts_from_the_conjugates_of_the_spectrum():
    for init in ("legs", "quad"):
        kernel = S4DKernel(2, d_state=16, init=init, B_clip=None, dtype=torch.float64)
        A, B = diagonal(init, 16, B_clip=None)
        assert deviation(-kernel.A_real.exp(), A.real.unsqueeze(0)) < 1e-12
        assert deviation(-kernel.A_imag, -A.imag.unsqueeze(0)) < 1e-12
        assert deviation(kernel.B, torch.view_as_real(B.conj().resolve_conj())) < 1e-12


@torch.no_grad()
def test_an_eigenvalue_whose_bilinear_factor_is_zero():
    kernel = S4DKernel(1, d_state=4, init="real", disc="bilinear", dtype=torch.float64)
    kernel.inv_dt.fill_(math.log(2))  # 1 + dt A / 2 = 0 for A = -1
    assert deviation(kernel(9), recurrence(kernel, 9)) < 1e-10


@torch.no_grad()
def test_rate_two_has_pairs_of_tokens():
    kernel = S4DKernel(4, d_state=16, init="lin", dtype=torch.float64)
    pairs = kernel(40).unflatten(-1, (20, 2)).sum(-1)
    assert deviation(kernel(20, rate=2.0), pairs) < 1e-12


@torch.no_grad()
def test_a_longer_kernel_starts_with_the_shorter_and_ends_at_l_max():
    kernel = S4DKernel(4, d_state=16, l_max=12, dtype=torch.float64)
    assert kernel(100).shape[-1] == 12
    assert deviation(kernel(7), kernel(12)[..., :7]) < 1e-12


@torch.no_grad()
def test_bandlimit_leaves_out_what_a_longer_step_would_alias():
    options = {"d_state": 16, "init": "lin", "dtype": torch.float64}
    kernel = S4DKernel(2, bandlimit=0.56, **options)
    kernel.inv_dt.fill_(math.log(0.1))  # the states' frequencies are pi j: 0.05 j turns a token; up to 0.28 stay
    free = S4DKernel(2, **options)
    free.load_state_dict(kernel.state_dict())
    free.C[:, :, 6:] = 0
    for rate in (1.0, 2.0):
        assert deviation(kernel(20, rate), free(20, rate)) < 1e-12


def test_autocast_keeps_the_kernel_in_float32():
    kernel = S4DKernel(8)
    want = kernel(64)
    with torch.autocast("cpu", torch.bfloat16):
        got = kernel(64)
    assert got.dtype == torch.float32 and (got == want).all()


def test_gradients():
    kernel = S4DKernel(2, d_state=4, channels=2, n_ssm=2, dt_min=0.1, dt_max=0.5, dtype=torch.float64)
    names, values = zip(*kernel.named_parameters(), strict=True)
    for disc in ("zoh", "bilinear"):
        kernel.disc = disc

        def call(*values):
            return torch.func.functional_call(kernel, dict(zip(names, values, strict=True)), (11,))

        assert torch.autograd.gradcheck(call, values)


def test_built_without_memory_and_then_drawn():
    with torch.device("meta"):
        kernel = S4DKernel(4)
    kernel.to_empty(device="cpu").reset_parameters()
    torch.manual_seed(0)
    kernel.reset_parameters()
    torch.manual_seed(0)
    assert all((a == b).all() for a, b in zip(kernel.parameters(), S4DKernel(4).parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_state": 5}, "d_state must be even"),
        ({"n_ssm": 3}, "n_ssm must divide the 4 channels"),
        ({"init": "lagt"}, "init must be one of"),
        ({"disc": "euler"}, "disc must be one of"),
        ({"dt_min": 0.2}, "dt_min must be above 0 and at most dt_max"),
        ({"channels": 0}, "channels must be at least 1"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        S4DKernel(4, **options)
