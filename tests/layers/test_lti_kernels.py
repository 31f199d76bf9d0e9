"""Kernels against golden numbers and against the recurrences that they stand for."""

import math

import pytest
import torch

from tests.golden.lti import DIGITS, GOLDEN, deviation, noise
from vim.layers import DSSKernel, LSSLKernel, S4DKernel, S4Kernel
from vim.layers.hippo import diagonal, diagonalize, transition

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
def test_either_of_a_conjugate_pair_will_do():
    kernel = S4DKernel(3, d_state=16, dtype=torch.float64)
    want = kernel(25)
    for parameter in (kernel.A_imag, kernel.B[..., 1], kernel.C[..., 1]):
        parameter.neg_()
    assert deviation(kernel(25), want) < 1e-12


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
        ({"dt_max": math.inf}, "dt_min must be above 0 and at most dt_max, got 0.001 and inf"),
        ({"bandlimit": 0.0}, "bandlimit must be above 0, or None for all states, got 0.0"),
        ({"l_max": 0}, "l_max must be at least 1 and whole, got 0"),
        ({"channels": 0}, "channels must be at least 1"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        S4DKernel(4, **options)


# DSS


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=str)
@pytest.mark.parametrize("name", list(GOLDEN["dss_kernel"]["cases"]))
@torch.no_grad()
def test_golden_dss(name, dtype, tolerance):
    golden = GOLDEN["dss_kernel"]
    want = golden["cases"][name]
    kernel = DSSKernel(golden["H"], d_state=golden["N"], disc=name.removesuffix("_positive_real"), dtype=dtype)
    kernel.log_dt.copy_(torch.tensor(golden["dt"], dtype=torch.float64).log())
    kernel.W.copy_(noise("dss.W", (1, 4, 64, 2)))
    if name == "softmax":
        assert deviation(kernel.Lambda[:4, 1], golden["Lambda"]["imag_first4"]) < 1e-7
        assert deviation(kernel.Lambda[-4:, 1], golden["Lambda"]["imag_last4"]) < 1e-6
    if name == "softmax_positive_real":
        kernel.Lambda[:, 0] = torch.tensor([0.02, -0.3], dtype=dtype).repeat(32)
        kernel.Lambda[:, 1] = torch.linspace(0.5, 20, 64, dtype=torch.float64)
    K = kernel(golden["L"]).squeeze(0)
    assert K.dtype == dtype
    for got, numbers in ((K[:, :8], want["first8"]), (K[:, -2:], want["last2"])):
        assert (got - torch.tensor(numbers, dtype=torch.float64)).abs().max() / K.abs().max() < tolerance
    assert deviation(K.norm(dim=1), want["norm"]) < tolerance


@torch.no_grad()
def test_dss_of_conjugate_pairs_is_s4d():
    """As 2 Re of one of each pair, with C B = W."""
    s4d, dss = (kind(3, d_state=8, dtype=torch.float64) for kind in (S4DKernel, DSSKernel))
    dss.log_dt.copy_(s4d.inv_dt.squeeze(1))
    dss.Lambda_log_neg_re.copy_(s4d.A_real[0].repeat(2))
    dss.Lambda_im.copy_(torch.cat([-s4d.A_imag[0], s4d.A_imag[0]]))
    W = torch.view_as_complex(s4d.C) * torch.view_as_complex(s4d.B.squeeze(0).contiguous())
    dss.W.copy_(torch.view_as_real(torch.cat([W, W.conj()], dim=-1).resolve_conj()))
    assert deviation(dss(30), s4d(30)) < 1e-12


def test_a_growing_state_of_dss_does_not_overflow():
    kernel = DSSKernel(1, d_state=2, disc="softmax")
    with torch.no_grad():
        kernel.log_dt.zero_()
        kernel.Lambda.copy_(torch.tensor([[0.5, 1.0], [-0.5, 2.0]]))
    assert kernel(1000).isfinite().all()


# S4 and LSSL


def dense(kernel):
    """The system that S4 stands for, with all its conjugates, complex128: A (d, n, n), B (d, n), C (c, d, n)."""
    d = kernel.C.shape[1]
    own = torch.arange(d) % kernel.A_real.shape[0]
    states = torch.complex(-kernel.A_real.double().exp(), -kernel.A_imag.double())[own]
    P = torch.view_as_complex(kernel.P.double())[:, own]
    B = torch.view_as_complex(kernel.B.double().squeeze(0).contiguous())[own]
    C = torch.view_as_complex(kernel.C.double())
    states, P, B, C = (torch.cat([half, half.conj()], dim=-1) for half in (states, P, B, C))
    return torch.diag_embed(states) - torch.einsum("rdn,rdm->dnm", P, P.conj()), B, C


def bilinear(A, B, dt):
    one, half = torch.eye(A.shape[-1], dtype=A.dtype), dt.double().view(-1, 1, 1) / 2
    inverse = torch.linalg.inv(one - half * A)
    return inverse @ (one + half * A), 2 * half.squeeze(2) * (inverse @ B.unsqueeze(2)).squeeze(2)


def impulse_response(A, B, C, l):
    outputs, state = [], B
    for _ in range(l):
        outputs.append((C * state).sum(-1).real)
        state = (A @ state.unsqueeze(-1)).squeeze(-1)
    return torch.stack(outputs, dim=-1)


def golden_s4(dtype):
    kernel = S4Kernel(2, d_state=16, n_ssm=2, dtype=dtype)
    conjugate = torch.tensor([1, -1])
    kernel.inv_dt.copy_(torch.tensor([[0.01], [0.1]], dtype=torch.float64).log())
    kernel.A_real.fill_(math.log(0.5))
    kernel.A_imag.copy_(math.pi * torch.arange(8, dtype=torch.float64))
    kernel.P.copy_(0.5 * noise("s4.P", (2, 8, 2)) * conjugate)
    kernel.B.copy_(noise("s4.B", (2, 8, 2)) * conjugate)
    kernel.C.copy_(noise("s4.C", (2, 8, 2)) * conjugate)
    return kernel


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=str)
@torch.no_grad()
def test_golden_s4(dtype, tolerance):
    want, kernel = GOLDEN["s4_dplr_kernel"], golden_s4(dtype)
    K = kernel(want["L"]).squeeze(0)
    for got, numbers in ((K[:, :8], want["first8"]), (K[:, -2:], want["last2"])):
        assert (got - torch.tensor(numbers, dtype=torch.float64)).abs().max() / K.abs().max() < tolerance
    assert deviation(K.norm(dim=1), want["norm"]) < tolerance
    assert deviation(kernel(128).norm(dim=2)[0], want["norm_at_L128"]) < tolerance


@torch.no_grad()
def test_s4_loads_what_the_published_code_saves():
    """Which is C (1 - A'^l), for one length l."""
    want, kernel = GOLDEN["s4_dplr_kernel"], golden_s4(torch.float64)
    A, B, C = dense(kernel)
    A, _ = bilinear(A, B, kernel.inv_dt.exp())
    C = C.unsqueeze(2)  # (c, d, 1, n)
    kept = (C - C @ torch.linalg.matrix_power(A, want["L"])).squeeze(2)[..., :8]
    kept = torch.view_as_real(kept.contiguous())
    assert deviation(kept[0, :, :4] * torch.tensor([1, -1]), want["C_tilde_first4"]) < DIGITS
    published = kernel.state_dict() | {"C": kept, "l_kernel": torch.tensor(want["L"])}
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        fresh = S4Kernel(2, d_state=16, n_ssm=2, dtype=dtype)
        fresh.load_state_dict(published)
        assert deviation(fresh.C, kernel.C) < tolerance
        fresh.load_state_dict(fresh.state_dict() | {"l_kernel": torch.tensor(0)})  # of a model that has not run yet
        assert deviation(fresh.C, kernel.C) < tolerance


@pytest.mark.parametrize("init", ["legs", "legt", "fout"])
@torch.no_grad()
def test_s4_is_its_recurrence(init):
    torch.manual_seed(1)
    for l, options in ((1, {"n_ssm": 4}), (37, {"n_ssm": 2}), (64, {"n_ssm": None})):
        kernel = S4Kernel(4, d_state=16, channels=3, init=init, **options).double()
        for parameter in (kernel.A_real, kernel.A_imag, kernel.B, kernel.P):
            parameter += 0.1 * torch.randn_like(parameter)
        A, B, C = dense(kernel)
        want = impulse_response(*bilinear(A, B, kernel.inv_dt.exp()), C, l)
        assert kernel(l).shape == (3, 4, l)
        assert deviation(kernel(l), want) < 1e-10
        assert deviation(kernel.float()(l), want) < 1e-4


@torch.no_grad()
def test_what_dense_kernels_start_from():
    for measure in ("legs", "legt", "fout"):
        A, B = transition(measure, 16)
        lssl = LSSLKernel(2, d_state=16, measure=measure, dtype=torch.float64)
        assert (lssl.A[0] == A).all() and (lssl.B[0] == B).all()
        for options in ({}, {"B_clip": None}):
            s4, s4d = (kind(2, d_state=16, init=measure, **options) for kind in (S4Kernel, S4DKernel))
            assert all((getattr(s4, name) == getattr(s4d, name)).all() for name in ("A_real", "A_imag", "B"))


@pytest.mark.parametrize("dt", [0.01, 0.1])
@pytest.mark.parametrize("kind", [S4Kernel, LSSLKernel])
@torch.no_grad()
def test_golden_hippo(kind, dt):
    """S4 and LSSL start from the same system: c is in another basis."""
    want = GOLDEN["hippo_legs_kernel_N8_L64"][f"bilinear_dt{dt}"]
    c = torch.stack([torch.eye(8, dtype=torch.float64)[0], torch.ones(8, dtype=torch.float64)])
    if kind is S4Kernel:
        kernel = S4Kernel(1, d_state=8, channels=2, B_clip=None, dtype=torch.float64)
        kernel.inv_dt.fill_(math.log(dt))
        C = c.to(torch.complex128) @ diagonalize("legs", 8).V.conj()
        kernel.C.copy_(torch.view_as_real(C).unsqueeze(1))
    else:
        kernel = LSSLKernel(1, d_state=8, channels=2, dtype=torch.float64)
        kernel.log_dt.fill_(math.log(dt))
        kernel.C.copy_(c)
    for K, name in zip(kernel(64)[:, 0], ("c_e0", "c_ones"), strict=True):
        assert deviation(K[:8], want[f"{name}_first8"]) < DIGITS
        assert K.norm().item() == pytest.approx(want[f"{name}_norm"], rel=DIGITS)


@torch.no_grad()
def test_dense_kernels_of_64_states_in_float32():
    torch.manual_seed(0)
    for kernel in (S4Kernel(8, B_clip=None), LSSLKernel(8), LSSLKernel(8, measure="legt")):
        single = kernel(197)
        with torch.autocast("cpu", torch.bfloat16):
            assert (kernel(197) == single).all()
        assert deviation(single, kernel.double()(197)) < 1e-4
