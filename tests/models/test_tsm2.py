import pytest
import torch
from timm.optim import create_optimizer_v2
from torch.nn.functional import layer_norm

from vim.models import TSM2

SMALL = {
    "num_variates": 3,
    "seq_len": 40,
    "horizon": 6,
    "patch_size": 8,
    "patch_stride": 4,
    "embed_dim": 8,
    "d_state": 4,
}
COVARIATES = {"future_dim": 2, "static_dim": 2}
VARIANTS = [
    {},
    {"variate_mixer": "mlp", "averaging": False},
    {"variate_mixer": "none"},
    {"norm": "batch"},
    {"affine": True},
    {"select_from": "input"},
    {"mixer_len": 24},
    COVARIATES,
    {**COVARIATES, "mixer_len": 24},
]


def build(**options):
    """A small model in float64 whose averaging and norms matter, in evaluation mode."""
    torch.manual_seed(0)
    model = TSM2(**{**SMALL, **options}).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] in ("alpha", "beta", "theta", "gamma") or "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def windows(*, batch=2, m=3, t=40):
    torch.manual_seed(1)
    return torch.randn(batch, t, m, dtype=torch.float64).cumsum(1)


def covariates(model, batch=2):
    torch.manual_seed(2)
    if not model.future_dim:
        return ()
    return torch.randn(batch, 3, 6, 2, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_forecasts_and_gradients(options):
    model = build(**options).train()
    x = windows()
    y = model(x, *covariates(model))
    assert y.shape == (2, 6, 3)
    y.square().mean().backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0}
    assert not without


def test_the_sizes_of_the_paper():
    """512 steps in patches of 16, 8 apart, the end repeated once: 64 patches."""
    model = TSM2(num_variates=7)
    assert model.num_patches == 64
    d, e, n, r, patches = 32, 64, 16, 2, 64
    mixer = 2 * d * e + e * d  # in_proj and out_proj
    direction = 5 * e + e * (r + 2 * n) + r * e + e + e * n + e  # convolution, x_proj, steps and their bias, A, D
    along_time, along_variates = mixer + direction, mixer + 2 * direction
    layer = along_time + along_variates + 2 * 2 * d
    scalars = 2 * (2 * 2 + 3)
    head = 2 * patches * d + patches * d * 96 + 96
    count = sum(p.numel() for p in model.parameters())
    assert count == 16 * d + d + 2 * layer + scalars + head == 248_846


@pytest.mark.parametrize(("seq_len", "count"), [(40, 10), (8, 2), (41, 10), (43, 10), (44, 11)])
def test_the_number_of_patches(seq_len, count):
    model = build(seq_len=seq_len)
    assert model.num_patches == count
    assert model.forward_features(windows(t=seq_len).transpose(1, 2)).shape == (2, 3, count, 8)


def test_the_layers_by_hand():
    """Every sequence through its mixer by itself: a variate's patches in time, a patch's variates both ways."""
    model = build(depth=2)
    x = windows()
    got = model(x)
    x = x.transpose(1, 2)
    mean, std = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False).sqrt()
    x = (x - mean) / std
    x = torch.cat([x, x[..., -1:].repeat(1, 1, 4)], -1)
    h = torch.stack([model.patch_embed(x[..., i : i + 8]) for i in range(0, 37, 4)], 2)  # (b, m, n, d)
    ys, zs = [h], [h]

    def summed(weights, terms):
        return sum(weight * term for weight, term in zip(weights, terms, strict=True))

    for layer in model.layers:
        u = summed(layer.alpha, ys) + summed(layer.beta, zs)
        mixer, norm = layer.token_mixer.mixer.mixer, layer.token_mixer.norm
        rows = [[mixer(norm(u[b, i])[None])[0] for i in range(3)] for b in range(2)]
        ys.append(u + torch.stack([torch.stack(row) for row in rows]))
        v = summed(layer.theta, ys) + summed(layer.gamma, zs)
        mixer, norm = layer.channel_mixer.mixer.mixer, layer.channel_mixer.norm
        columns = [[mixer(norm(v[b, :, j])[None])[0] for j in range(10)] for b in range(2)]
        zs.append(v + torch.stack([torch.stack(column, 1) for column in columns]))
    flat = layer_norm(zs[-1].flatten(2), (80,), model.norm_f.weight, model.norm_f.bias)
    want = (model.head(flat) * std + mean).transpose(1, 2)
    torch.testing.assert_close(got, want)


def test_batch_norm_is_over_windows_and_variates():
    model = build(norm="batch", depth=1).train()
    x = windows(batch=5)
    normed, _, _ = model.rev_norm(x.transpose(1, 2))
    h = model.forward_features(normed).flatten(2)
    mean, var = h.mean((0, 1)), h.var((0, 1), unbiased=False)
    h = (h - mean) / (var + 1e-5).sqrt() * model.norm_f.weight + model.norm_f.bias
    want = model.rev_norm.reverse(model.head(h), x.mean(1)[..., None], x.std(1, unbiased=False)[..., None])
    torch.testing.assert_close(model(x), want.transpose(1, 2))


@pytest.mark.parametrize("depth", [1, 3])
def test_time_is_mixed_causally(depth):
    model = build(depth=depth)
    x = windows().transpose(1, 2)
    before = model.forward_features(x)
    x[:, :, 24:] += 1
    after = model.forward_features(x)
    assert torch.equal(after[:, :, :5], before[:, :, :5])  # the fifth patch ends with step 23
    assert (after[:, :, 5:] != before[:, :, 5:]).any(-1).all()


@pytest.mark.parametrize("changed", [0, 2])
@pytest.mark.parametrize(("variate_mixer", "sees"), [("s6", True), ("mlp", True), ("none", False)])
def test_who_sees_the_other_variates(variate_mixer, sees, changed):
    model = build(variate_mixer=variate_mixer)
    x = windows()
    before = model(x)
    x[:, 10, changed] += 1
    after = model(x)
    assert (after[..., changed] != before[..., changed]).any()
    assert torch.equal(after[..., 1], before[..., 1]) is not sees


def test_variates_without_a_mixer_are_forecast_alike():
    model = build(variate_mixer="none")
    x = windows()
    torch.testing.assert_close(model(x[..., [2, 0, 1]]), model(x)[..., [2, 0, 1]])


@pytest.mark.parametrize("options", [{}, {"affine": True}, COVARIATES], ids=str)
def test_scale_and_shift_of_the_input_are_those_of_the_forecast(options):
    model = build(**options)
    x, others = windows(), covariates(model)
    scale, shift = torch.tensor([2.0, 0.01, 300.0]).double(), torch.tensor([-5.0, 0.0, 1e4]).double()
    torch.testing.assert_close(model(scale * x + shift, *others), scale * model(x, *others) + shift)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_a_constant_variate(options):
    model = build(**options).float()
    x = windows().float()
    x[..., 1] = 1e6
    y = model(x, *(part.float() for part in covariates(model)))
    assert y.isfinite().all()
    torch.testing.assert_close(y[..., 1], torch.full((2, 6), 1e6), rtol=1e-4, atol=1)
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_learned_scale_of_0():
    model = build(affine=True)
    with torch.no_grad():
        model.rev_norm.weight[1] = 0
    assert model(windows()).isfinite().all()


@pytest.mark.parametrize(("variate_mixer", "branches"), [("s6", 8), ("none", 4)])
def test_mixers_start_smaller_the_more_there_are(variate_mixer, branches):
    """Each adds to the same stream, as in Mamba."""
    torch.manual_seed(0)
    sizes = {**SMALL, "embed_dim": 64, "variate_mixer": variate_mixer, "averaging": False}
    weights = {depth: TSM2(**sizes, depth=depth).layers[0].token_mixer.mixer.mixer.out_proj.weight for depth in (1, 4)}
    ratio = weights[1].std() / weights[4].std()
    assert ratio.item() == pytest.approx(2, rel=0.05)
    bound = weights[4].abs().max().item()
    assert bound == pytest.approx(128**-0.5 / branches**0.5, rel=0.01)


def test_the_linear_map_beside_the_mixers():
    """All there is at the start; it sees every step, and the mixers only the last."""
    model, x = build(linear_skip=True, mixer_len=16).eval(), windows()
    mean, std = x.mean(1, keepdim=True), x.std(1, keepdim=True, unbiased=False)
    expected = (model.skip.weight @ ((x - mean) / std)) * std + mean
    torch.testing.assert_close(model(x), expected)
    torch.nn.init.normal_(model.head.weight)
    other = torch.cat([x[:, :24].flip(1), x[:, 24:]], 1)  # of the same mean and deviation
    beside = [model(one) - (model.skip.weight @ ((one - mean) / std)) * std for one in (x, other)]
    torch.testing.assert_close(*beside)
    assert (model(x) - model(other)).abs().min() > 1e-3
    assert (beside[0] - mean).abs().min() > 1e-3


def test_the_covariates():
    model = build(**COVARIATES)
    assert model.num_patches == (3 * 40 - 8) // 4 + 2
    x, (future, static) = windows(), covariates(model)
    before = model(x, future, static)
    for name, changed in {"future": (future + 1, static), "static": (future, static + 1)}.items():
        assert (model(x, *changed) != before).any(), name
    z = future.flatten(0, 1)[:, None]
    want = model.future.proj(model.future.to_one(z + model.future.mixer(z))[:, 0, :, 0]).view(2, 3, 40)
    torch.testing.assert_close(model.future(future), want)
    only = build(static_dim=2)
    assert only.num_patches == (2 * 40 - 8) // 4 + 2
    assert only(x, None, static).shape == (2, 6, 3)


def test_float32_agrees_with_float64():
    model = build()
    x = windows()
    torch.testing.assert_close(build().float()(x.float()), model(x).float(), rtol=1e-4, atol=1e-4)


def test_dropout_and_drop_path_are_for_training():
    model, x = build(drop_rate=0.5, drop_path_rate=0.5), windows()
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_weight_decay_spares_scalars_states_and_vectors():
    model = build(affine=True)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.1)
    names = {id(p): name.rpartition(".")[2] for name, p in model.named_parameters()}
    spared = {names[id(p)] for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    assert spared >= {"alpha", "beta", "theta", "gamma", "A_log", "D", "dt_bias", "conv_bias", "bias"}
    assert "x_proj" not in spared


def test_it_compiles():
    model = build()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(windows()), model(windows()))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 39, 3), r"windows \(b, 40 steps, 3 variates\) expected, got \(2, 39, 3\)"),
        ((2, 40, 4), r"windows \(b, 40 steps, 3 variates\) expected, got \(2, 40, 4\)"),
        ((40, 3), r"expected, got \(40, 3\)"),
        ((), r"expected, got \(\)"),
    ],
)
def test_windows_of_another_shape(shape, message):
    with pytest.raises(ValueError, match=message):
        build()(torch.zeros(shape).double())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(value):
    model, x = build(**COVARIATES), windows()
    future, static = covariates(model)
    bad = x.clone()
    bad[0, 3, 1] = value
    with pytest.raises(ValueError, match="finite values expected"):
        model(bad, future, static)
    with pytest.raises(ValueError, match="static covariates: finite values expected"):
        model(x, future, static * value)


def test_covariates_that_do_not_fit():
    model, x = build(**COVARIATES), windows()
    future, static = covariates(model)
    with pytest.raises(ValueError, match=r"future covariates: expected \(2, 3, 6, 2\), got None"):
        model(x, None, static)
    with pytest.raises(ValueError, match=r"future covariates: expected \(2, 3, 6, 2\), got \(2, 3, 5, 2\)"):
        model(x, future[:, :, :5], static)
    with pytest.raises(ValueError, match=r"static covariates: expected none \(static_dim=0\), got \(3, 2\)"):
        build()(x, None, static)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variate_mixer": "tied"}, "variate_mixer must be one of"),
        ({"norm": "rms"}, "norm must be one of"),
        ({"select_from": "x"}, "select_from must be"),
        ({"seq_len": 7}, r"seq_len \(data.lookback\) must be at least patch_size, 8, got 7"),
        ({"mixer_len": 41}, "mixer_len must be from patch_size, 8, to seq_len, 40, got 41"),
        ({"mixer_len": 7}, "mixer_len must be from patch_size, 8, to seq_len, 40, got 7"),
        ({"horizon": 0}, "horizon must be at least 1 and whole, got 0"),
        ({"d_state": 0}, "d_state must be at least 1 and whole, got 0"),
        ({"expand": 0}, "expand must be at least 1 and whole, got 0"),
        ({"future_dim": -1}, "future_dim must be at least 0 and whole, got -1"),
        ({"static_dim": -1}, "static_dim must be at least 0 and whole, got -1"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)
