import json
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F

import vim  # noqa: F401
from tests.golden.weights import generate, weight
from vim.errors import UserError
from vim.explain import implicit_attention, matrices
from vim.explain.attention import token_attention
from vim.explain.maps import follow_back
from vim.explain.recording import recorded
from vim.layers import GatedRMSNorm, MambaMixer

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "explain.json").read_text())["hidden_attention"]
INPUT = generate(21, (1, 11, 16)).double()


def golden_mixer():
    mixer = MambaMixer(16, d_state=4).double()
    weights = {name: weight(f"layers.0.mixer.{name}", t.shape) for name, t in mixer.state_dict().items()}
    for name in ("dt_proj.bias", "dt_proj_b.bias"):
        weights[name] = weights[name] + 3
    mixer.load_state_dict(weights)
    return mixer


def family(name, size=None):
    size = size or ((16, 32) if name in STAGED else 64)  # of 4 x 8 tokens, and 4 x 4
    model = timm.create_model(name, num_classes=5, img_size=size).double().eval()
    frames = (model.num_frames,) if model.num_frames else ()
    return model, torch.randn(2, 3, *frames, *model.img_size, dtype=torch.float64)


CONVOLVED, STAGED = ("test_vim", "test_videomamba", "test_mambar"), ("test_vmamba", "test_vim2")
FAMILIES = (*CONVOLVED, "test_vim_ssd", *STAGED)


@pytest.mark.parametrize(
    ("key", "scale", "options"),
    [
        ("alpha_forward_mean", 2, {"direction": "forward"}),  # the layer halves each direction, the file does not
        ("alpha_backward_mean_flipped", 2, {"direction": "backward"}),
        ("alpha_layer", 1, {}),
        ("with_conv_and_gate_forward_mean", 2, {"direction": "forward", "include_conv_gate": True}),
        ("with_conv_and_gate_layer", 1, {"include_conv_gate": True}),
    ],
)
def test_golden_matrices(key, scale, options):
    (matrix,) = implicit_attention(torch.nn.Sequential(golden_mixer()), INPUT, **options)
    torch.testing.assert_close(scale * matrix[0], torch.tensor(GOLDEN[key]).double(), rtol=1e-5, atol=1e-7)


def test_golden_rollout():
    (matrix,) = implicit_attention(torch.nn.Sequential(golden_mixer()), INPUT)
    weights = F.one_hot(torch.tensor([5]), 11).double()
    for _ in range(3):
        weights = follow_back(weights, matrix)
    want = torch.tensor(GOLDEN["rollout_3_layers_clamped_cls_row"]).double()
    torch.testing.assert_close(weights[0], want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", FAMILIES)
def test_matrix_times_values_is_what_the_scan_returns(name):
    model, images = family(name)
    seen, norms = [], []
    for module in model.modules():
        if isinstance(module, GatedRMSNorm):
            module.register_forward_pre_hook(lambda _, given: norms.append(given[0].unflatten(2, (4, -1)).mean(-1)))
        if hasattr(module, "s6") and hasattr(module, "out_norm"):
            module.out_norm.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].flatten(1, 2)))
    with torch.no_grad(), recorded(model) as found:
        model(images)
    of_channels = implicit_attention(model, images, reduce="none", include_D=True)
    assert len(of_channels) == len(found)
    for i, (one, matrix) in enumerate(zip(found, of_channels, strict=True)):
        if one.grid is None:
            want = one.gated / F.silu(one.gate) if one.gate is not None else norms[i]
            values = one.scan[0].u[:, 0]
            if one.scan[0].u.shape[1] == 2 and one.mixer.directions == "v2":  # each direction has its own values
                forward = implicit_attention(model, images, [i], "forward", "none", include_D=True)[0]
                got = torch.einsum("bdij,bjd->bid", forward, values)
                got += torch.einsum("bdij,bjd->bid", matrix - forward, one.scan[0].u[:, 1])
            else:
                got = torch.einsum("bdij,bjd->bid", matrix, values)
        else:
            want = seen[i]
            got = torch.einsum("bdij,bjd->bid", matrix, one.scan[0].u[:, 0, :, : matrix.shape[1]])
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_matrix_with_convolution_and_gate_times_input_is_what_the_gate_returns():
    mixer = golden_mixer()
    for convolution in (mixer.conv1d, mixer.conv1d_b):
        torch.nn.init.zeros_(convolution.bias)
    model = torch.nn.Sequential(mixer)
    (matrix,) = implicit_attention(model, INPUT, reduce="none", include_conv_gate=True)
    with torch.no_grad(), recorded(model) as (found):
        model(INPUT)
    (one,) = found
    torch.testing.assert_close(torch.einsum("bdij,bjd->bid", matrix, one.convolution[0][:, 0]), one.gated)


@pytest.mark.parametrize("name", FAMILIES)
def test_channels_in_chunks_and_rows_alone_are_the_same(name, monkeypatch):
    model, images = family(name)
    whole = implicit_attention(model, images)
    channels = implicit_attention(model, images, reduce="none")
    monkeypatch.setattr(matrices, "MOST", 5000)
    for one, matrix, each in zip(implicit_attention(model, images), whole, channels, strict=True):
        torch.testing.assert_close(one, matrix)
        torch.testing.assert_close(each.mean(1), matrix)
    with torch.no_grad(), recorded(model, [-1]) as found:
        model(images)
    rows = torch.rand(2, channels[-1].shape[-1], dtype=torch.float64)
    want = torch.einsum("bi,bdij->bjd", rows, channels[-1])
    torch.testing.assert_close(token_attention(found[0], rows), want)


@pytest.mark.parametrize("order", ["spatial_first", "temporal_first", "spatiotemporal_v1", "spatiotemporal_v2"])
def test_every_order_of_a_clip_has_its_tokens_in_place(order):
    model = timm.create_model("test_videomamba", num_frames=2, scan_order=order).double().eval()
    clip = torch.randn(1, 3, 2, 64, 64, dtype=torch.float64)
    with torch.no_grad(), recorded(model, [0]) as found:
        model(clip)
    (matrix,) = implicit_attention(model, clip, [0], reduce="none", include_conv_gate=True)
    h, _ = found[0].mixer.in_proj(found[0].arguments[0]).chunk(2, dim=-1)
    for convolution in (found[0].mixer.conv1d, found[0].mixer.conv1d_b):
        torch.nn.init.zeros_(convolution.bias)
    with torch.no_grad(), recorded(model, [0]) as found:
        model(clip)
    (matrix,) = implicit_attention(model, clip, [0], reduce="none", include_conv_gate=True)
    torch.testing.assert_close(torch.einsum("bdij,bjd->bid", matrix, h), found[0].gated)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("test_mambavision", {}, "a model whose tokens are scanned .*, got MambaVision: use method 'lrp'"),
        ("test_vim", {"layers": [3]}, "layers must be between -3 and 2, got 3"),
        ("test_vim", {"layers": [-4]}, "layers must be between -3 and 2, got -4"),
        ("test_vim", {"layers": []}, "layers must name at least one of 3 layers, got none"),
        ("test_vim", {"direction": "up"}, "direction must be one of"),
        ("test_vim", {"reduce": "sum"}, "reduce must be one of"),
        ("test_vmamba", {"include_conv_gate": True}, "which this SelectiveTokenMixer lacks"),
        ("test_vim_ssd", {"include_conv_gate": True}, "which this Mamba2Mixer lacks"),
    ],
)
def test_what_has_no_hidden_attention(name, options, message):
    model, images = family(name)
    with pytest.raises(ValueError, match=message):
        implicit_attention(model, images, **options)


@pytest.mark.parametrize("name", ["test_vim", "test_vim_ssd"])
def test_a_direction_without_scans_takes_nothing(name):
    model = timm.create_model(name, directions="none")
    for reduce in ("mean", "none"):
        forward, backward = (
            implicit_attention(model, torch.randn(2, 3, 64, 64), [0], direction, reduce)[0]
            for direction in ("forward", "backward")
        )
        assert forward.any() and backward.shape == forward.shape and not backward.any()


def test_hydra_has_no_hidden_attention():
    model = timm.create_model("test_vim_ssd", directions="hydra")
    with pytest.raises(UserError, match="directions='hydra' is not offered"):
        implicit_attention(model, torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, options) for name in FAMILIES for options in ({}, {"include_D": True})),
        *((name, {"include_conv_gate": True}) for name in CONVOLVED),
    ],
)
def test_directions_add_up_and_the_mean_is_that_of_the_channels(name, options):
    model, images = family(name)

    def matrix(**more):
        return implicit_attention(model, images, [-1], **options, **more)[0]

    both = matrix(reduce="none")
    torch.testing.assert_close(
        matrix(reduce="none", direction="forward") + matrix(direction="backward", reduce="none"), both
    )
    torch.testing.assert_close(matrix(), both.mean(1))
    torch.testing.assert_close(matrix(direction="forward"), matrix(reduce="none", direction="forward").mean(1))


@pytest.mark.parametrize("l", [1, 2, 3, 5, 8, 13, 16])
def test_any_number_of_tokens(l):
    mixer, x = golden_mixer(), torch.randn(2, l, 16, dtype=torch.float64)
    model = torch.nn.Sequential(mixer)
    (matrix,) = implicit_attention(model, x, reduce="none", include_D=True, direction="forward")
    with torch.no_grad(), recorded(model) as (found):
        model(x)
    inputs, _ = found[0].scan
    state, want = torch.zeros(2, 32, 4, dtype=torch.float64), []
    steps = F.softplus(inputs.delta[:, 0] + inputs.delta_bias[0])
    for i in range(l):
        state = state * torch.exp(steps[:, i, :, None] * inputs.A[0])
        state = state + (steps[:, i] * inputs.u[:, 0, i])[..., None] * inputs.B[:, 0, i]
        want.append((state * inputs.C[:, 0, i]).sum(-1) + inputs.D[0] * inputs.u[:, 0, i])
    got = 2 * torch.einsum("bdij,bjd->bid", matrix, inputs.u[:, 0])  # the layer halves each direction
    torch.testing.assert_close(got, torch.stack(want, 1), rtol=1e-10, atol=1e-12)


def test_long_steps_forget_without_overflow():
    mixer = golden_mixer().float()
    torch.nn.init.constant_(mixer.dt_proj.bias, 1e4)
    (matrix,) = implicit_attention(torch.nn.Sequential(mixer), INPUT.float(), direction="forward")
    assert matrix.isfinite().all() and (matrix.tril(-1) == 0).all() and (matrix.diagonal(dim1=1, dim2=2) != 0).all()
