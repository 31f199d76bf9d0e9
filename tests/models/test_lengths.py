"""Clips and series of several lengths in one batch, against each of them alone."""

import pytest
import timm
import torch
from torch import nn

import vim  # noqa: F401  registers the models
from vim.layers import Mamba2Mixer, MambaMixer
from vim.models import TSM2


def drawn(model):
    """The model in float64, with parameters large enough that every part shows in the output."""
    torch.manual_seed(0)
    model.double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize(
    ("kind", "directions"),
    [*((MambaMixer, d) for d in ("none", "v1", "v2")), *((Mamba2Mixer, d) for d in ("none", "v2", "hydra"))],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mixer_on_padded_sequences(kind, directions, dtype, backend, monkeypatch):
    monkeypatch.setenv("VIM_BACKEND", backend)
    options = {"head_dim": 16, "d_state": 8, "dt_limit": (0.01, 0.5)} if kind is Mamba2Mixer else {}
    mixer = drawn(kind(32, directions=directions, **options)).to(dtype)
    x = torch.randn(3, 9, 32, dtype=dtype)
    lengths = [9, 1, 5]
    mask = torch.arange(9) < torch.tensor(lengths).unsqueeze(1)
    whole, alone = x.clone().requires_grad_(), x.clone().requires_grad_()
    outs = [mixer(whole, mask=mask)[i, :n] for i, n in enumerate(lengths)]
    wanted = [mixer(alone[i : i + 1, :n])[0] for i, n in enumerate(lengths)]
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    for out, want in zip(outs, wanted, strict=True):
        torch.testing.assert_close(out, want, rtol=tolerance, atol=tolerance * want.abs().max().item())
    grads = []
    for one, tensor in ((outs, whole), (wanted, alone)):
        mixer.zero_grad()
        torch.cat(one).float().square().sum().backward()
        grads.append([tensor.grad, *(parameter.grad for parameter in mixer.parameters())])
    for grad, want in zip(*grads, strict=True):
        torch.testing.assert_close(grad, want, rtol=tolerance, atol=tolerance * want.abs().max().item())


@pytest.mark.parametrize("scan_order", ["spatial_first", "temporal_first", "spatiotemporal_v1", "spatiotemporal_v2"])
@pytest.mark.parametrize(
    ("global_pool", "mixer"), [("token", "s6"), ("avg", "s6"), ("avgmax", "s6"), ("avgmax", "ssd")]
)
@torch.no_grad()
def test_clips(scan_order, global_pool, mixer):
    options = {"num_frames": 8, "tubelet_size": 2, "dynamic_img_size": True, "num_classes": 5}
    model = timm.create_model("test_videomamba", scan_order=scan_order, global_pool=global_pool, mixer=mixer, **options)
    model = drawn(model)
    clips, lengths = torch.randn(4, 3, 8, 48, 32, dtype=torch.float64), torch.tensor([8, 2, 6, 4])
    alone = torch.cat([model(clip[None, :, :n]) for clip, n in zip(clips, lengths, strict=True)])
    for clip, n in zip(clips, lengths, strict=True):
        clip[:, n:] = torch.nan
    torch.testing.assert_close(model.forward_padded(clips, lengths), alone, rtol=1e-10, atol=1e-10)
    longest = lengths[1:].max()  # the padding's length does not matter
    torch.testing.assert_close(
        model.forward_padded(clips[1:, :, :longest], lengths[1:]), alone[1:], rtol=1e-10, atol=1e-10
    )


def test_lengths_of_clips_that_do_not_fit():
    clips, options = torch.zeros(2, 3, 4, 64, 64), {"num_frames": 4, "tubelet_size": 2}
    with pytest.raises(ValueError, match="lengths need a model of clips with dynamic_img_size=True"):
        timm.create_model("test_videomamba", **options).forward_padded(clips, torch.tensor([4, 2]))
    model = timm.create_model("test_videomamba", dynamic_img_size=True, **options)
    for wrong in ([4, 0], [4, 6], [3, 4], [4], [4, -2]):
        with pytest.raises(ValueError, match="lengths must be 2 multiples of 2 from 2 to 4, got"):
            model.forward_padded(clips, torch.tensor(wrong))


SERIES = [
    {},
    {"future_dim": 3, "static_dim": 2},
    {"mixer_len": 40, "linear_skip": True, "variate_mixer": "mlp"},
    {"affine": True, "norm": "batch", "variate_mixer": "none"},
]


@pytest.mark.parametrize("options", SERIES, ids=str)
@torch.no_grad()
def test_series(options):
    model = drawn(TSM2(num_variates=3, seq_len=64, horizon=8, embed_dim=8, **options))
    x, lengths = torch.randn(4, 64, 3, dtype=torch.float64), torch.tensor([64, 40, 33, 16])
    future = torch.randn(4, 3, 8, 3, dtype=torch.float64) if model.future_dim else None
    static = torch.randn(3, 2, dtype=torch.float64) if model.static_dim else None
    for window, n in zip(x, lengths, strict=True):
        window[: 64 - n] = torch.nan
    together = model(x, future, static, lengths)
    for i in range(4):
        one = slice(i, i + 1)
        alone = model(x[one], None if future is None else future[one], static, lengths[one])
        torch.testing.assert_close(together[one], alone, rtol=1e-10, atol=1e-10)
    whole = model(x[:1], None if future is None else future[:1], static)
    torch.testing.assert_close(together[:1], whole, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_a_short_window_has_the_statistics_and_features_of_a_short_model():
    model = drawn(TSM2(num_variates=3, seq_len=64, horizon=8, embed_dim=8))
    x = torch.randn(2, 3, 64, dtype=torch.float64)
    normed = model.rev_norm(x, torch.tensor([31, 31]))
    for found, wanted in zip(normed, model.rev_norm(x[..., 31:]), strict=True):
        torch.testing.assert_close(found[..., -33:], wanted)
    padded, short = model.forward_features(x, torch.tensor([31, 31])), model.forward_features(x[..., 31:])
    assert short.shape[2] == 4
    torch.testing.assert_close(padded[:, :, -4:], short)
    assert not padded[:, :, :-4].any()


@pytest.mark.parametrize("length", [17, 33, 50])
@torch.no_grad()
def test_a_short_window_is_forecast_as_by_a_short_model(length):
    options = {"num_variates": 3, "horizon": 4, "embed_dim": 8, "norm": "batch", "linear_skip": True}
    model = drawn(TSM2(seq_len=64, mixer_len=48, **options))
    short = TSM2(seq_len=length, mixer_len=min(length, 48), **options).double().eval()
    state, kept = model.state_dict(), 8 * short.num_patches
    offsets = model.norm_f(torch.zeros(1, 8 * model.num_patches, dtype=torch.float64))  # of patches that are zero
    state["head.bias"] = (
        state["head.bias"]
        + (offsets @ state["head.weight"].T - offsets[:, -kept:] @ state["head.weight"][:, -kept:].T)[0]
    )
    state["head.weight"] = state["head.weight"][:, -kept:]
    skip = state["skip.weight"]  # the first step that counts stands for those before
    state["skip.weight"] = torch.cat([skip[:, : 65 - length].sum(1, keepdim=True), skip[:, 65 - length :]], 1)
    for name in ("weight", "bias", "running_mean", "running_var"):
        state[f"norm_f.{name}"] = state[f"norm_f.{name}"][-kept:]
    short.load_state_dict(state)
    x = torch.randn(1, 64, 3, dtype=torch.float64)
    torch.testing.assert_close(model(x, lengths=torch.tensor([length])), short(x[:, -length:]))


def test_a_constant_window_has_gradients():
    x = torch.ones(1, 20, 1, requires_grad=True)
    TSM2(num_variates=1, seq_len=20, horizon=2, embed_dim=8)(x, lengths=torch.tensor([17])).sum().backward()
    assert x.grad.isfinite().all()


def test_lengths_of_series_that_do_not_fit():
    model = TSM2(num_variates=1, seq_len=20, horizon=2, embed_dim=8)
    for wrong in ([15], [21], [17, 17]):
        with pytest.raises(ValueError, match="lengths must be 1 numbers from patch_size, 16, to 20, got"):
            model(torch.zeros(1, 20, 1), lengths=torch.tensor(wrong))
