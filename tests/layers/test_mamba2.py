import pytest
import torch
import torch.nn.functional as F

from tests.golden.check import TOLERANCE, check_keys, load_cases, published_weights, relative
from tests.golden.weights import generate
from vim.layers import Mamba2Mixer

CASES = load_cases("mamba2.json")
SMALL = {"d_model": 24, "d_state": 4, "head_dim": 16, "ngroups": 3}
DIRECTIONS = ["none", "v2", "hydra"]


def make_mixer(directions="v2", **options):
    torch.manual_seed(0)
    mixer = Mamba2Mixer(directions=directions, **{**SMALL, **options})
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return mixer


@pytest.mark.parametrize("name", CASES)
def test_published_outputs_and_gradients(name):
    case = CASES[name]
    mixer = Mamba2Mixer(**case["options"])
    check_keys(case, mixer)
    mixer.load_state_dict(published_weights(case))
    x = generate(case["input"]["seed"], case["input"]["shape"]).requires_grad_()
    y = mixer(x)

    want = case["output"]
    tokens = {"first_token": y[0, 0], "middle_token": y[0, y.shape[1] // 2], "last_token": y[-1, -1]}
    for which, token in tokens.items():
        assert relative(token, want[which]) < TOLERANCE
    assert y.std().item() == pytest.approx(want["std"], rel=TOLERANCE)
    assert y.abs().sum().item() == pytest.approx(want["sum_abs"], rel=TOLERANCE)

    want = case["grad"]
    (y * generate(case["input"]["seed"] + 1000, y.shape)).sum().backward()
    assert x.grad.norm().item() == pytest.approx(want["input_norm"], rel=TOLERANCE)
    assert relative(x.grad, want["input_first"]) < TOLERANCE
    grads = {name: parameter.grad for name, parameter in mixer.named_parameters()}
    assert {name: grad.norm().item() for name, grad in grads.items()} == pytest.approx(want["norms"], rel=TOLERANCE)
    for name, values in want["small"].items():
        assert relative(grads[name], values) < TOLERANCE


@pytest.mark.parametrize(
    ("directions", "options", "count"),
    [("none", {}, 249_874), ("none", {"head_dim": 32}, 251_044), ("v2", {}, 252_452), ("hydra", {}, 280_466)],
)
def test_parameter_count(directions, options, count):
    mixer = Mamba2Mixer(192, directions=directions, device="meta", **options)
    assert sum(p.numel() for p in mixer.parameters()) == count


@pytest.mark.parametrize("directions", DIRECTIONS)
def test_every_parameter_gets_a_gradient(directions):
    mixer = make_mixer(directions, d_ssm=32, ngroups=2)
    mixer(torch.randn(2, 9, 24)).square().sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_two_directions_are_one_there_and_one_back():
    both, x = make_mixer("v2", rmsnorm=False), torch.randn(2, 15, 24)
    state, (there, back) = both.state_dict(), (make_mixer("none", rmsnorm=False) for _ in range(2))
    own = {"conv1d.weight": "conv1d_b.weight", "conv1d.bias": "conv1d_b.bias"}
    own |= {"dt_bias": "dt_bias_b", "A_log": "A_b_log", "D": "D_b"}
    assert state.keys() == there.state_dict().keys() | set(own.values())
    there.load_state_dict({name: state[name] for name in there.state_dict()})
    back.load_state_dict({name: state[own.get(name, name)] for name in there.state_dict()})
    torch.testing.assert_close(both(x), there(x) + back(x.flip(1)).flip(1), rtol=1e-4, atol=1e-6)


def test_one_direction_reads_no_later_token():
    x = torch.randn(1, 20, 24)
    later = x.clone()
    later[:, 12:] += 1
    for directions in DIRECTIONS:
        mixer = make_mixer(directions)
        same = torch.allclose(mixer(later)[:, :12], mixer(x)[:, :12], atol=1e-6)
        assert same == (directions == "none")


@pytest.mark.parametrize("limit", [(0.2, 9.0), (0.0, 1e-3)])
@torch.no_grad()
def test_steps_stay_in_their_limits(limit):
    """Where every step is at a limit, their bias has no effect."""
    mixer, x = make_mixer("none", dt_limit=limit), 0.1 * torch.randn(1, 9, 24)
    mixer.dt_bias.fill_(-5 if limit[0] else 5)
    want = mixer(x)
    mixer.dt_bias.mul_(1.1)
    torch.testing.assert_close(mixer(x), want, rtol=0, atol=0)


def test_hydra_normalises_all_channels_at_once():
    assert [make_mixer(d).norm.groups for d in DIRECTIONS] == [3, 3, 1]


def test_a_token_of_hydra_does_not_select_itself():
    """B, C and the steps of a token have no effect on its own output: x has, through D."""
    mixer = make_mixer("hydra", d_conv=1)
    e, steps = mixer.d_ssm, 2 * mixer.heads
    h = torch.randn(1, 1, 9, mixer.d_xbc + steps, requires_grad=True)
    y, _ = mixer._scan(h, None, "sum", False, None)
    (grad,) = torch.autograd.grad(y[0, 0, 4].sum(), h)
    assert grad[0, 0, 4, :e].all() and not grad[0, 0, 4, e:].any()
    assert grad[0, 0, [3, 5], e:].abs().sum(1).all()


@pytest.mark.parametrize(
    "options", [{}, {"d_conv": 1}, {"d_ssm": 32, "ngroups": 1}, {"learnable_init_states": True, "rmsnorm": False}]
)
def test_steps(options):
    mixer, x = make_mixer("none", **options), torch.randn(2, 12, 24)
    state, parts = None, []
    for part in x.split([1, 2, 4, 5], dim=1):
        y, state = mixer.step(part, state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), mixer(x), rtol=1e-4, atol=1e-6)
    assert state[0].shape[1] == mixer.d_conv - 1 and state[1].shape == (2, 1, mixer.heads, 16, 4)


@pytest.mark.parametrize("directions", ["v2", "hydra"])
def test_a_backward_direction_takes_no_steps(directions):
    with pytest.raises(ValueError, match=f"only directions='none' goes on step by step, got '{directions}'"):
        make_mixer(directions).step(torch.zeros(1, 1, 24), None)


def test_paths_are_orders_of_the_tokens():
    x, order = torch.randn(2, 9, 24), torch.randperm(9)
    one, two = make_mixer("none"), make_mixer("v2")
    torch.testing.assert_close(one(x, order.unsqueeze(0))[:, order], one(x[:, order]), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(two(x, order.expand(2, -1))[:, order], two(x[:, order]), rtol=1e-4, atol=1e-6)
    gated = make_mixer("v2", rmsnorm=False)
    twice = gated(x, order.expand(4, -1))
    torch.testing.assert_close(twice, 2 * gated(x, order.expand(2, -1)), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="directions='hydra' takes the tokens in their order only"):
        make_mixer("hydra")(x, order.expand(2, -1))


def test_initialisation():
    mixer = Mamba2Mixer(1024, head_dim=4, depth=24)
    for A_log, dt_bias, D in ((mixer.A_log, mixer.dt_bias, mixer.D), (mixer.A_b_log, mixer.dt_bias_b, mixer.D_b)):
        assert 1 <= A_log.exp().min() < 2 and 15 < A_log.exp().max() <= 16 * 1.0001
        assert 1e-3 * 0.99 < F.softplus(dt_bias).min() < 2e-3 and 5e-2 < F.softplus(dt_bias).max() < 0.1 * 1.01
        assert (D == 1).all()
    assert 0.9 * 2048**-0.5 / 24**0.5 < mixer.out_proj.weight.abs().max() <= 2048**-0.5 / 24**0.5
    assert not Mamba2Mixer(64, directions="hydra").A_log.any()
    assert not Mamba2Mixer(64, directions="none", learnable_init_states=True).init_states.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"directions": "v1"}, "directions must be one of .*got 'v1'"),
        ({"head_dim": 20}, "head_dim must divide the 48 channels that are scanned, got 20"),
        ({"ngroups": 2}, "ngroups must divide the number of heads, 3, got 2"),
        ({"d_ssm": 64}, "d_ssm must be at most the inner channels, 48, got 64"),
        ({"d_state": 0}, "d_state must be at least 1 and whole, got 0"),
        ({"directions": "hydra", "d_conv": 4}, "d_conv must be odd for directions='hydra'.*got 4"),
        ({"learnable_init_states": True}, "learnable_init_states must be False but for directions='none', got 'v2'"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Mamba2Mixer(**{**SMALL, **options})


@pytest.mark.parametrize("directions", DIRECTIONS)
def test_low_precision_stays_near(directions):
    x, mixer = torch.randn(2, 30, 24), make_mixer(directions)
    want = mixer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(mixer(x).float(), want, rtol=0, atol=0.03 * want.abs().max().item())
    for dtype in (torch.bfloat16, torch.float16):
        low = make_mixer(directions).to(dtype)(x.to(dtype))
        assert low.dtype == dtype
        torch.testing.assert_close(low.float(), want, rtol=0, atol=0.03 * want.abs().max().item())
    torch.testing.assert_close(make_mixer(directions).double()(x.double()).float(), want, rtol=1e-4, atol=1e-6)
