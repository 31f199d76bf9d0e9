import copy
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import Mlp
from timm.models.mlp_mixer import MixerBlock
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import nn

import vim  # noqa: F401  registers the models
from tests.layers.test_selective_mixers import vmamba_mixer
from tests.tiny import ROOT
from vim.checkpoints import load_pretrained
from vim.engine.config import load_recipe
from vim.errors import UserError
from vim.layers import SelectiveTokenMixer
from vim.options import ImageRecipe

COUNTS = {"vim2_tiny": 24_044_986, "vim2_small": 43_745_572, "vim2_base": 75_664_580}
MIXERS = ["tied", "transposed", "mlp", "transposed_mlp", "none"]
SMALL = {
    "img_size": 32,
    "embed_dims": (8, 12, 16, 20),
    "channel_dims": (16, 24, 20, 12),
    "depths": (1, 1, 2, 1),
    "d_state": 2,
    "num_classes": 5,
}
ONE_STAGE = {"embed_dims": (8,), "channel_dims": (16,), "depths": (3,), "img_size": 16}


def build(**options):
    torch.manual_seed(0)
    return timm.create_model("test_vim2", **{**SMALL, **options}).eval()


def set_averaging(model, **newest):
    """Give the newest of each kind of scalar that value, and the others 0."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            kind = name.rpartition(".")[2]
            if kind in ("alpha", "beta", "theta", "gamma"):
                parameter.zero_()[-1] = newest[kind]


# Sizes


@pytest.mark.parametrize(("name", "published", "ours"), [("tiny", 20, 24.0), ("small", 43, 43.8), ("base", 74, 75.7)])
def test_parameter_count(name, published, ours):
    """The paper's own counts agree with its table of sizes within 3 % but for the smallest model."""
    count = sum(p.numel() for p in timm.create_model(f"vim2_{name}", device="meta").parameters())
    assert count == COUNTS[f"vim2_{name}"]
    assert count / 1e6 == pytest.approx(ours, rel=0.002)
    assert name == "tiny" or count / 1e6 == pytest.approx(published, rel=0.03)


def test_the_ablation_with_mlps_has_the_published_size():
    model = timm.create_model("vim2_small", device="meta", channel_mixer="mlp", averaging=False)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(40, rel=0.01)


@pytest.mark.parametrize("name", COUNTS)
def test_the_scalars_of_a_stage_are_l_times_2l_plus_3(name):
    model = timm.create_model(name, device="meta")
    for stage in model.stages:
        l = len(stage.layers)
        scalars = [
            p for n, p in stage.named_parameters() if n.rpartition(".")[2] in ("alpha", "beta", "theta", "gamma")
        ]
        assert sum(p.numel() for p in scalars) == l * (2 * l + 3)


def test_the_small_one_is_small():
    assert sum(p.numel() for p in timm.create_model("test_vim2").parameters()) < 300_000


# The reductions the paper states


def test_without_channel_mixers_it_is_vmamba():
    model = build(channel_mixer="none", **ONE_STAGE).double()
    set_averaging(model, alpha=1, beta=0, theta=1, gamma=0)
    image = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    x = model.norm_embed(model.patch_embed(image))
    for mixer in (m for m in model.modules() if isinstance(m, SelectiveTokenMixer)):
        norm = nn.LayerNorm(8).double()
        x = x + vmamba_mixer(mixer, norm(x)).view(x.shape)
    torch.testing.assert_close(model.forward_features(image), model.norm_f(x).permute(0, 3, 1, 2))
    plain = build(channel_mixer="none", averaging=False, **ONE_STAGE).double()
    plain.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(plain(image), model(image))


def test_with_channel_mixers_frozen_out_it_is_vmamba():
    """The paper's other way: beta and gamma are 0 and the newest alpha and theta 1, and the last channel mixer's
    branch, whose output is the stage's, adds nothing."""
    model = build(**ONE_STAGE).double()
    set_averaging(model, alpha=1, beta=0, theta=1, gamma=0)
    with torch.no_grad():
        model.stages[0].layers[-1].channel_mixer.mixer.out_proj.weight.zero_()
    without = build(channel_mixer="none", averaging=False, **ONE_STAGE).double()
    without.load_state_dict({k: v for k, v in model.state_dict().items() if k in without.state_dict()})
    image = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(model(image), without(image))


def test_without_s6_and_convolution_it_is_mlp_mixer():
    options = {"token_mixer": "mlp", "channel_mixer": "transposed_mlp", "token_mixers": 1, "averaging": False}
    model = build(**options, **ONE_STAGE)
    image = torch.randn(2, 3, 16, 16)
    x = model.norm_embed(model.patch_embed(image)).flatten(1, 2)  # 16 tokens
    branches = [branch for layer in model.stages[0].layers for branch in (layer.token_mixer[0], layer.channel_mixer)]
    # timm's block mixes across tokens first, so one of them spans two of ours, and the ends are half blocks
    for across_channels, across_tokens in [
        (None, branches[0]),
        *zip(branches[1::2], [*branches[2::2], None], strict=True),
    ]:
        block = MixerBlock(8, 16, mlp_ratio=(4, 2), mlp_layer=Mlp, act_layer=nn.SiLU).eval()
        for norm, mlp, ours in (("norm1", "mlp_tokens", across_channels), ("norm2", "mlp_channels", across_tokens)):
            if ours is None:
                setattr(block, mlp, Zero())
            else:
                getattr(block, norm).load_state_dict(ours.norm.state_dict())
                getattr(block, mlp).load_state_dict(getattr(ours.mixer, "mixer", ours.mixer).state_dict())
        x = block(x)
    want = model.norm_f(x).transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(model.forward_features(image), want)


class Zero(nn.Module):
    def forward(self, x):
        return torch.zeros_like(x)


# Variants and sizes of images


@pytest.mark.parametrize("channel_mixer", MIXERS)
@pytest.mark.parametrize("averaging", [True, False])
def test_variants(channel_mixer, averaging):
    model = build(channel_mixer=channel_mixer, averaging=averaging, select_from="input" if averaging else "conv")
    logits = model.train()(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 5)
    logits.square().sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


@pytest.mark.parametrize("size", [(32, 32), (33, 30), (4, 4), (1, 1), (100, 7)])
def test_any_size_gives_maps_at_strides_4_to_32(size):
    model = timm.create_model("test_vim2", features_only=True).eval()
    maps = model(torch.randn(2, 3, *size))
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    assert model.feature_info.channels() == [16, 24, 32, 48]
    for feature, channels, stride in zip(maps, (16, 24, 32, 48), (4, 8, 16, 32), strict=True):
        assert feature.shape == (2, channels, *(-(-side // stride) for side in size))
        assert feature.is_contiguous() and feature.isfinite().all()


def test_what_does_not_fill_a_patch_is_filled_up_with_zeros():
    model, image = build(), torch.randn(1, 3, 30, 25)
    torch.testing.assert_close(model(image), model(nn.functional.pad(image, (0, 3, 0, 2))))
    odd = model.patch_embed(torch.randn(1, 3, 20, 12))  # 5 x 3 tokens
    downsample = model.stages[1].downsample
    torch.testing.assert_close(downsample(odd), downsample(nn.functional.pad(odd, (0, 0, 0, 1, 0, 1))))


def test_features_are_those_of_the_classifier():
    model, image = timm.create_model("test_vim2").eval(), torch.randn(2, 3, 64, 64)
    features = timm.create_model("test_vim2", features_only=True, out_indices=(1, 3))
    features.load_state_dict({f"model.{k}": v for k, v in model.state_dict().items()}, strict=False)
    final, maps = model.forward_intermediates(image, indices=[1, 3], norm=True)
    torch.testing.assert_close(maps[1], final)
    torch.testing.assert_close(final, model.forward_features(image))
    torch.testing.assert_close(features.eval()(image)[0], maps[0])


def test_pools():
    model = build()
    features = model.forward_features(torch.randn(2, 3, 64, 40))
    torch.testing.assert_close(model.pool(features), features.mean((2, 3)))
    model.reset_classifier(0, "max")
    torch.testing.assert_close(model.pool(features), features.amax((2, 3)))
    model.reset_classifier(7, "")
    logits = model.forward_head(features)
    assert logits.shape == (2, 7, *features.shape[2:])
    torch.testing.assert_close(logits[..., 0, 0], model.head(features[..., 0, 0]))


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channel_mixer": "s6"}, "channel_mixer must be one of .*'tied'.*, got 's6'"),
        ({"token_mixer": "none"}, "token_mixer must be one of .*, got 'none'"),
        ({"select_from": "z", "token_mixer": "mlp", "channel_mixer": "mlp"}, "'conv', 'input'.*, got 'z'"),
        ({"depths": (1, 1)}, "a number for each stage"),
        ({"depths": (1, 1, 0, 1)}, r"depths must be at least 1 and whole in each stage, got \(1, 1, 0, 1\)"),
        ({"embed_dims": (), "channel_dims": (), "depths": ()}, "embed_dims must be at least 1 and whole in each"),
        ({"token_mixers": 0}, "token_mixers must be at least 1 and whole, got 0"),
        ({"expand": 1.5}, "expand must be at least 1 and whole, got 1.5"),
        ({"d_state": 0}, "d_state must be at least 1 and whole, got 0"),
        ({"patch_size": (4, 2)}, r"patch_size must be at least 1 and whole, got \(4, 2\)"),
        ({"img_size": 3}, "img_size must be at least the patch size"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="chanel_mixer"):
        timm.create_model("test_vim2", chanel_mixer="mlp")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 32, 32), r"images \(b, 3, h, w\) expected"),
        ((1, 3, 8, 32, 32), r"images \(b, 3, h, w\) expected"),
        ((1, 1, 32, 32), r"images \(b, 3, h, w\) expected"),
        ((1, 3, 0, 32), "at least one pixel expected"),
        ((0, 3, 32, 32), "at least one image expected"),
    ],
)
def test_what_is_no_image_is_refused(shape, message):
    with pytest.raises(AssertionError, match=message):
        build()(torch.randn(shape))


def test_transposed_channel_mixers_are_of_one_size():
    model = build(channel_mixer="transposed")
    for size in ((32, 36), (16, 64)):  # the second has as many patches
        with pytest.raises(AssertionError, match="fills 8 x 8 patches expected: set img_size, or channel_mixer='tied'"):
            model(torch.randn(1, 3, *size))
    assert model(torch.randn(1, 3, 31, 29)).shape == (1, 5)
    with pytest.raises(ValueError, match="for one img_size"):
        model.set_input_size(64)
    assert build(channel_mixer="transposed", img_size=(40, 28))(torch.randn(1, 3, 40, 28)).shape == (1, 5)


# Training


def test_drop_path_rates_grow_from_none_to_all_of_it():
    model = build(drop_path_rate=0.7)
    rates = [m.drop_prob for m in model.modules() if type(m).__name__ == "DropPath"]
    assert rates == pytest.approx([0.05 * i for i in range(1, 15)])  # of 15 mixers the first has none


@pytest.mark.parametrize(("channel_mixer", "per_layer"), [("tied", 3), ("transposed", 3), ("none", 2)])
def test_mixers_start_smaller_the_more_a_stage_has(channel_mixer, per_layer):
    """Each adds to the same stream, as in Mamba."""
    model = build(channel_mixer=channel_mixer, embed_dims=(64,), channel_dims=(64,), depths=(4,))
    layer = model.stages[0].layers[0]
    mixers = [layer.token_mixer[1].mixer]
    if channel_mixer != "none":
        mixers.append(getattr(layer.channel_mixer.mixer, "mixer", layer.channel_mixer.mixer))
    for mixer in mixers:
        weight = mixer.out_proj.weight
        bound = weight.shape[1] ** -0.5 / (4 * per_layer) ** 0.5
        assert weight.abs().max().item() == pytest.approx(bound, rel=0.01)


def test_weight_decay_and_layer_groups():
    model = build()
    assert model.no_weight_decay() <= dict(model.named_parameters()).keys()
    groups = create_optimizer_v2(model, weight_decay=0.1).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    exempt = {name.rpartition(".")[2] for name, p in model.named_parameters() if id(p) not in decayed}
    assert exempt == {"alpha", "beta", "theta", "gamma", "A_log", "D", "dt_bias", "conv_bias", "bias", "weight"}
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and name.endswith("weight"):
            assert id(parameter) in decayed, name
    scales = {group["lr_scale"] for group in param_groups_layer_decay(model, layer_decay=0.5)}
    assert scales == {0.5**i for i in range(7)}  # the head and norm, five layers, the stem


@pytest.mark.parametrize("channel_mixer", ["tied", "transposed"])
def test_init_weights_after_to_empty(channel_mixer):
    torch.manual_seed(0)
    made = timm.create_model("test_vim2", img_size=32, channel_mixer=channel_mixer)
    empty = timm.create_model("test_vim2", img_size=32, channel_mixer=channel_mixer, device="meta")
    empty = empty.to_empty(device="cpu")
    empty.init_weights()
    for (name, a), b in zip(made.named_parameters(), empty.parameters(), strict=True):
        assert b.isfinite().all(), name
        if a.numel() > 50 or (a == a.mean()).all():
            assert a.std(correction=0).item() == pytest.approx(b.std(correction=0).item(), rel=0.35, abs=1e-6), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(reentrant, monkeypatch):
    monkeypatch.setattr("timm.layers.config._USE_REENTRANT_CKPT", reentrant)
    model, image = build().train(), torch.randn(2, 3, 32, 32)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(image).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_channels_last():
    model, image = build(), torch.randn(2, 3, 32, 32)
    expected = model(image)
    model, image = model.to(memory_format=torch.channels_last), image.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(image), expected)
    model(image).sum().backward()


def test_low_precision_stays_near():
    model, image = build(), torch.randn(2, 3, 32, 32)
    want = model(image)
    bound = 0.05 * want.abs().max().item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model(image).float(), want, rtol=0, atol=bound)
        x = model.norm_embed(model.patch_embed(image))
        for stage in model.stages:
            x = stage(x)
            assert x.dtype == torch.float32
    low = copy.deepcopy(model).to(torch.bfloat16)(image.to(torch.bfloat16))
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), want, rtol=0, atol=bound)


@pytest.mark.parametrize(("size", "drop_path_rate"), [("tiny", 0.2), ("small", 0.3), ("base", 0.6)])
def test_the_recipe_is_the_papers(size, drop_path_rate):
    recipe = load_recipe(Path(f"{ROOT}/configs/mambamixer/in1k.py:vim2-{size}_in1k"), ImageRecipe)
    assert recipe.model == {"model_name": f"vim2_{size}", "drop_path_rate": drop_path_rate}
    assert recipe.optimizer == {"opt": "adamw", "lr": 1e-3, "weight_decay": 0.05}
    assert (recipe.schedule["num_epochs"], recipe.schedule["warmup_epochs"]) == (300, 20)
    assert 8 * recipe.data.batch_size == 1024


# The ways out


TWO_STAGES = {"embed_dims": (8, 12), "channel_dims": (16, 12), "depths": (1, 1), "token_mixers": 1}


def test_compile():
    model, image = build(**TWO_STAGES), torch.randn(2, 3, 30, 32)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(image), model(image))


def test_export():
    model, image = build(**TWO_STAGES), torch.randn(2, 3, 30, 32)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (image,), dynamic_shapes=({0: batch},), strict=False)
    torch.testing.assert_close(program.module()(image[:1]), model(image[:1]))


def test_a_file_with_a_table_of_positions(tmp_path):
    torch.save(timm.create_model("test_vim", embed_dim=20).state_dict(), tmp_path / "vim.pth")  # as wide as the last
    with pytest.raises(UserError, match="is of another model"):
        load_pretrained(build(), tmp_path / "vim.pth")


def test_loading_a_file(tmp_path):
    trained, path = build(), tmp_path / "trained.pth"
    torch.save({"model": trained.state_dict()}, path)
    image = torch.randn(1, 3, 40, 32)
    overlay = {"file": str(path), "num_classes": 5}
    loaded = timm.create_model("test_vim2", pretrained=True, pretrained_cfg_overlay=overlay, **SMALL).eval()
    torch.testing.assert_close(loaded(image), trained(image))
    other = timm.create_model(
        "test_vim2", pretrained=True, pretrained_cfg_overlay=overlay, **{**SMALL, "num_classes": 7, "in_chans": 1}
    )
    assert other(image[:, :1]).shape == (1, 7)
    with pytest.raises(UserError, match="is of another model: .* is missing there|of another model"):
        load_pretrained(build(depths=(1, 1, 3, 1)), path)
