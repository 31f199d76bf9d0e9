import pytest
import torch

from vim.layers import MambaBlock, MambaMixer, RMSNorm

DIRECTIONS = [("none", "sum"), ("v1", "sum"), ("v2", "sum"), ("v2", "mean")]


def make_mixer(directions="v2", combine="mean", d_model=24, **options):
    torch.manual_seed(0)
    return MambaMixer(d_model, d_state=4, directions=directions, combine=combine, **options)


def tie_backward(mixer):
    """Give the backward direction the forward one's parameters."""
    state = mixer.state_dict()
    for name in list(state):
        if "_b" in name:
            state[name] = state[name.replace("_b", "", 1)].clone()
    mixer.load_state_dict(state)


@pytest.mark.parametrize(("d_model", "count"), [(192, 281_856), (384, 1_042_944), (768, 4_002_816)])
def test_parameter_count(d_model, count):
    mixer = MambaMixer(d_model, device="meta")
    assert sum(p.numel() for p in mixer.parameters()) == count


def test_published_names():
    once = {"A_log", "D", "conv1d.weight", "conv1d.bias", "x_proj.weight", "dt_proj.weight", "dt_proj.bias"}
    again = {"A_b_log", "D_b", "conv1d_b.weight", "conv1d_b.bias", "x_proj_b.weight", "dt_proj_b.weight"}
    ends = {"in_proj.weight", "out_proj.weight"}
    assert set(make_mixer("none", "sum").state_dict()) == once | ends
    assert set(make_mixer("v1", "sum").state_dict()) == once | ends | {"A_b_log"}
    assert set(make_mixer().state_dict()) == once | again | ends | {"dt_proj_b.bias"}


@pytest.mark.parametrize(("directions", "combine"), DIRECTIONS)
def test_every_parameter_gets_a_gradient(directions, combine):
    mixer = make_mixer(directions, combine)
    mixer(torch.randn(2, 9, 24)).square().sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("combine", ["sum", "mean"])
def test_tied_directions_turn_with_the_tokens(combine):
    mixer = make_mixer("v2", combine)
    tie_backward(mixer)
    x = torch.randn(2, 15, 24)
    torch.testing.assert_close(mixer(x.flip(1)), mixer(x).flip(1), rtol=1e-4, atol=1e-5)


def test_v1_is_v2_where_the_convolution_sees_one_token():
    v1, v2 = make_mixer("v1", "sum"), make_mixer("v2", "sum")
    tie_backward(v2)
    with torch.no_grad():
        for conv in (v2.conv1d, v2.conv1d_b):
            conv.weight.zero_()[..., -1] = 1
        v2.A_b_log += 0.3
    v1.load_state_dict({name: v2.state_dict()[name] for name in v1.state_dict()})
    x = torch.randn(2, 15, 24)
    torch.testing.assert_close(v1(x), v2(x), rtol=1e-4, atol=1e-5)


def test_mean_is_half_the_sum():
    mean, total = make_mixer("v2", "mean"), make_mixer("v2", "sum")
    total.load_state_dict(mean.state_dict())
    x = torch.randn(2, 15, 24)
    torch.testing.assert_close(2 * mean(x), total(x), rtol=1e-4, atol=1e-6)


def test_one_direction_reads_no_later_token():
    mixer, x = make_mixer("none", "sum"), torch.randn(1, 20, 24)
    later = x.clone()
    later[:, 12:] += 1
    torch.testing.assert_close(mixer(later)[:, :12], mixer(x)[:, :12])
    assert not torch.allclose(make_mixer()(later)[:, :12], make_mixer()(x)[:, :12])


def test_initialisation():
    mixer = MambaMixer(192, depth=24)
    n = mixer.d_state
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, n + 1).expand(384, n))
    torch.testing.assert_close(mixer.A_b_log, mixer.A_log)
    assert (mixer.D == 1).all() and (mixer.D_b == 1).all()
    steps = torch.nn.functional.softplus(mixer.dt_proj.bias)
    assert 1e-3 * 0.99 < steps.min() < 2e-3 and 5e-2 < steps.max() < 0.1 * 1.01
    assert (mixer.dt_proj_b.bias == 0).all()  # the published oversight
    corrected = torch.nn.functional.softplus(MambaMixer(192, init="corrected").dt_proj_b.bias)
    assert corrected.max() < 0.1 * 1.01
    bound = 384**-0.5 / 24**0.5
    assert 0.9 * bound < mixer.out_proj.weight.abs().max() <= bound


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"directions": "v3"}, "directions must be one of .*got 'v3'"),
        ({"combine": "max"}, "combine must be one of .*got 'max'"),
        ({"directions": "v1", "combine": "mean"}, "only ever sums"),
        ({"init": "zeros"}, "init must be one of .*got 'zeros'"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MambaMixer(24, **options)


def test_residual_stays_float32_under_autocast():
    block = MambaBlock(RMSNorm(24), make_mixer())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = block(torch.randn(1, 9, 24))
    assert y.dtype == torch.float32


def test_low_precision_stays_near():
    x, mixer = torch.randn(2, 30, 24), make_mixer()
    want = mixer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(mixer(x).float(), want, rtol=0, atol=0.03 * want.abs().max().item())
    for dtype in (torch.bfloat16, torch.float16):
        low = make_mixer().to(dtype)(x.to(dtype))
        assert low.dtype == dtype
        torch.testing.assert_close(low.float(), want, rtol=0, atol=0.03 * want.abs().max().item())
    torch.testing.assert_close(make_mixer().double()(x.double()).float(), want, rtol=1e-4, atol=1e-6)
