"""Time-invariant mixers against golden numbers and against themselves, token by token."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from tests.golden.lti import DIGITS, GOLDEN, deviation, noise
from tests.golden.weights import generate
from vim.layers import S5, AttentionMixer, LTIMixer, MambaBlock, RMSNorm

PRECISIONS = [(torch.float64, DIGITS), (torch.float32, 1e-4)]
CONJUGATE = torch.tensor([1, -1])  # the golden eigenvalues have positive imaginary parts, S4's negative ones
KINDS = ["s4d", "s4", "dss", "s5", "lssl"]


def assert_golden(y, want, tolerance):
    largest = y.abs().max()
    for got, numbers in (
        (y.flatten()[:8], want["first8"]),
        *((y.flatten()[-len(want[name]) :], want[name]) for name in ("last8", "last4") if name in want),
    ):
        assert (got - torch.tensor(numbers, dtype=torch.float64)).abs().max() / largest < tolerance
    assert y.norm().item() == pytest.approx(want["norm"], rel=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=str)
@pytest.mark.parametrize(("case", "directions"), [("uni", "none"), ("bi", "v2")])
@torch.no_grad()
def test_golden_s4_block(case, directions, dtype, tolerance):
    golden = GOLDEN["s4_block"]
    mixer = LTIMixer(8, d_state=16, expand=1, directions=directions, n_ssm=8, dtype=dtype)
    weights = {
        "layer.D": 1 + 0.1 * noise("s4block.D", (1, 8)),
        "layer.kernel.inv_dt": torch.linspace(math.log(1e-3), math.log(0.1), 8, dtype=torch.float64).unsqueeze(1),
        "layer.kernel.A_real": math.log(0.5) + 0.1 * noise("s4block.A_real", (8, 8)),
        "layer.kernel.A_imag": math.pi * torch.arange(8, dtype=torch.float64) + 0.1 * noise("s4block.A_imag", (8, 8)),
        "layer.kernel.B": CONJUGATE * (torch.tensor([1, 0]) + 0.1 * noise("s4block.B", (8, 8, 2))).unsqueeze(0),
        "layer.kernel.C": CONJUGATE * noise(f"s4block.C.{case}", (2 if case == "bi" else 1, 8, 8, 2)),
        "output_linear.0.weight": noise("s4block.output_linear.weight", (16, 8)) / math.sqrt(8),
        "output_linear.0.bias": 0.02 * noise("s4block.output_linear.bias", (16,)),
    }
    assert weights.keys() == golden["public_state_dict"].keys()
    mixer.load_state_dict(weights)
    y = mixer(generate(7, (2, 20, 8)).to(dtype))
    assert_golden(y, golden[case], tolerance)
    assert deviation(y[0, 10], golden[case]["token_10_of_sample_0"]) < 10 * tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=str)
@pytest.mark.parametrize("name", list(GOLDEN["s5"]["cases"]))
@torch.no_grad()
def test_golden_s5(name, dtype, tolerance):
    disc, directions, _ = name.split("_")
    layer = S5(4, d_state=16, blocks=2, bidirectional=directions == "bi", disc=disc, dtype=dtype)
    imaginary = torch.tensor([0.43, 1.96, 5.35, 19.86], dtype=torch.float64).repeat(2)
    weights = {
        "Lambda_re": -0.5 - 0.1 * torch.arange(8, dtype=torch.float64),
        "Lambda_im": imaginary,
        "log_step": torch.linspace(math.log(1e-3), math.log(0.1), 8, dtype=torch.float64).unsqueeze(1),
        "B": noise("s5.B", (8, 4, 2)) / 2,
        "D": 1 + 0.1 * noise("s5.D", (4,)),
    }
    C = noise("s5.C", (4, 8, 2)) / math.sqrt(8)
    weights |= {"C1": C, "C2": noise("s5.C2", (4, 8, 2)) / math.sqrt(8)} if directions == "bi" else {"C": C}
    layer.load_state_dict(weights)
    assert_golden(layer(generate(13, (1, 50, 4)).to(dtype)), GOLDEN["s5"]["cases"][name], tolerance)


def test_s5_starts_from_copies_of_hippo():
    want = GOLDEN["s5"]["init_block_of_32"]
    layer = S5(6, d_state=64, blocks=2, dtype=torch.float64)
    imaginary = layer.Lambda_im.view(2, 16)
    assert (imaginary[0] == imaginary[1]).all() and ((layer.Lambda_re - want["real"]).abs() < 1e-12).all()
    ascending = imaginary[0].sort().values
    assert deviation(ascending[:4], want["imag_kept_half_ascending_first4"]) < 1e-8
    assert deviation(ascending[-4:], want["imag_kept_half_last4"]) < 1e-8


@torch.no_grad()
def test_every_state_of_s5_decays():
    layer, x = S5(4, d_state=16, dtype=torch.float64), torch.randn(1, 30, 4, dtype=torch.float64)
    layer.Lambda_re.fill_(-1e-4)
    want = layer(x)
    layer.Lambda_re.fill_(1)
    assert deviation(layer(x), want) == 0


def make(kind, directions="none", **options):
    """A mixer of 6 channels in float64 whose parameters all matter."""
    torch.manual_seed(0)
    mixer = LTIMixer(6, kind=kind, d_state=16, directions=directions, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return mixer


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_steps_are_the_convolution(kind):
    block = MambaBlock(RMSNorm(6, dtype=torch.float64), make(kind))
    x = torch.randn(2, 33, 6, dtype=torch.float64)
    outputs, state = [], None
    for piece in x.split([1, 1, 15, 16], dim=1):
        y, state = block.step(piece, state)
        outputs.append(y)
    assert deviation(torch.cat(outputs, dim=1), block(x)) < 1e-10
    single = LTIMixer.step(block.mixer.float(), x.float(), None)[0]
    assert deviation(single, block.mixer.double()(x)) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_two_directions(kind):
    """S4's backward direction starts at the next token, S5's at the token itself."""
    both, forwards = make(kind, "v2").layer, make(kind, expand=None if kind == "s5" else 4).layer
    x = torch.randn(2, 19, 6, dtype=torch.float64)
    if kind == "s5":
        shared = {name: tensor for name, tensor in both.state_dict().items() if name not in ("C1", "C2", "D")}
        forwards.load_state_dict(shared | {"C": both.C1, "D": both.D})
        want = forwards(x)
        forwards.load_state_dict(shared | {"C": both.C2, "D": torch.zeros_like(both.D)})
        want = want + forwards(x.flip(1)).flip(1)
    else:
        forwards.kernel.load_state_dict(both.kernel.state_dict())
        forwards.D.copy_(torch.cat([both.D, torch.zeros_like(both.D)]))
        first, second = forwards(x)[..., :12], forwards(x.flip(1))[..., 12:].flip(1)
        want = first + nn.functional.pad(second[:, 1:], (0, 0, 0, 1))
    assert deviation(both(x), want) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_a_causal_mixer_sees_no_later_token_and_one_of_two_directions_sees_all(kind):
    for directions in ("none", "v2"):
        mixer, x = make(kind, directions), torch.randn(1, 12, 6, dtype=torch.float64, requires_grad=True)
        mixer(x)[0, 7].sum().backward()
        seen = x.grad.abs().sum(-1)[0] > 1e-9
        assert seen.tolist() == [directions == "v2" or token <= 7 for token in range(12)]


@pytest.mark.parametrize("directions", ["none", "v2"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_half_precision(kind, directions):
    mixer, x = make(kind, directions), torch.randn(2, 49, 6, dtype=torch.float64)
    want = mixer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert deviation(mixer.float()(x.float()), want) < 2e-2
    y = mixer.bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16 and deviation(y, want) < 6e-2


@pytest.mark.parametrize("kind", [*KINDS, "attention"])
@pytest.mark.parametrize("directions", ["none", "v2"])
@torch.no_grad()
def test_padding_has_no_effect(kind, directions):
    if kind == "attention":
        mixer = AttentionMixer(6, head_dim=3).double()
    else:
        mixer = make(kind, directions)
    x, lengths = torch.randn(3, 9, 6, dtype=torch.float64), [9, 1, 5]
    mask = torch.arange(9) < torch.tensor(lengths).unsqueeze(1)
    y = mixer(x, mask=mask)
    for i, n in enumerate(lengths):
        assert deviation(y[i, :n], mixer(x[i : i + 1, :n])[0]) < 1e-12


def test_the_dynamics_are_named():
    names = set(make("s4d").layer.kernel.lti_parameters())
    assert names == {"inv_dt", "A_real", "A_imag", "B"}
    assert set(make("s4").layer.kernel.lti_parameters()) == names | {"P"}
    assert set(make("dss").layer.kernel.lti_parameters()) == {"log_dt", "Lambda_log_neg_re", "Lambda_im"}
    assert set(make("lssl").layer.kernel.lti_parameters()) == {"log_dt"}
    assert make("s5").layer.lti_parameters().keys() == {"Lambda_re", "Lambda_im", "B", "log_step"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "s6"}, "kind must be one of"),
        ({"directions": "v1"}, "directions must be one of"),
        ({"kind": "s5", "expand": 2}, "expand must be left out with 's5', got 2"),
        ({"kind": "s5", "init": "lin"}, "init must be left out with 's5', got 'lin'"),
        ({"kind": "dss", "init": "legs"}, "init must be left out with 'dss', got 'legs'"),
        ({"kind": "dss", "disc": "zoh"}, "disc must be one of"),
        ({"kind": "s4", "init": "lin"}, "init must be one of"),
        ({"kind": "s4", "n_ssm": 3}, "n_ssm must divide the 8 channels, got 3"),
        ({"kind": "lssl", "d_state": 3}, "n must be even"),
        ({"kind": "s5", "blocks": 5}, "blocks must cut d_state, 64, into even parts, got 5"),
        ({"init": "published"}, "init must be one of"),
        ({"kind": "s4", "bandlimit": -1.0}, "bandlimit must be above 0"),
        *(({"kind": kind, "dt_min": 0.0}, "dt_min must be above 0") for kind in ("s4d", "s4", "dss", "s5", "lssl")),
        *(({"kind": kind, "dt_min": 1.0}, "at most dt_max, got 1.0 and 0.1") for kind in ("s4", "dss", "s5", "lssl")),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        LTIMixer(8, **options)


def test_refused_calls():
    x = torch.zeros(1, 3, 6)
    with pytest.raises(ValueError, match="only directions='none' goes on step by step, got 'v2'"):
        LTIMixer(6).step(x, None)
    with pytest.raises(ValueError, match="take the tokens in their order only"):
        LTIMixer(6)(x, paths=torch.arange(3).expand(2, 3))
    with pytest.raises(ValueError, match="disc='softmax' needs the whole sequence"):
        LTIMixer(6, kind="dss", directions="none", disc="softmax").step(x, None)
    for options in ({"head_dim": 4}, {"directions": "none"}, {"head_dim": 0}):
        with pytest.raises(ValueError, match="must"):
            partial(AttentionMixer, 6, **options)()
