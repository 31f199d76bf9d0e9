import gc
import re
import subprocess
import sys

import pytest
import timm
import torch
from torch import nn

import vim  # noqa: F401  registers the models
from tests.golden.check import check_keys, check_outputs, load_cases, published_weights
from tests.tiny import ROOT
from vim.checkpoints import load_pretrained
from vim.engine.weights import save_for_timm
from vim.errors import UserError
from vim.layers import MambaMixer
from vim.models.videomamba import PUBLISHED

CASES = load_cases("videomamba.json")
SMALL = {"img_size": (32, 48), "patch_size": 16, "embed_dim": 16, "depth": 2, "num_classes": 5}
CLIP = {**SMALL, "num_frames": 4}
MIXERS = [{}, {"mixer": "ssd", "head_dim": 8}]
ORDERS = ["spatial_first", "temporal_first", "spatiotemporal_v1", "spatiotemporal_v2"]


def build(**options):
    """A small model with position tables that matter, in evaluation mode."""
    torch.manual_seed(0)
    model = timm.create_model("test_videomamba", **{**CLIP, **options}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters(recurse=False):
            if name in ("cls_token", "pos_embed", "temporal_pos_embedding"):
                parameter.normal_()
    return model


def clip(frames=4, height=32, width=48, batch=2):
    return torch.randn(batch, 3, frames, height, width)


# Sizes and the published outputs


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("videomamba_tiny", {}, 7_148_008),
        ("videomamba_small", {}, 25_796_584),
        ("videomamba_middle", {}, 74_217_448),
        ("videomamba_base", {}, 97_598_440),
        ("videomamba_tiny_f8", {}, 7_033_744),
        ("videomamba_small_f8", {}, 25_568_656),
        ("videomamba_middle_f8", {}, 73_875_856),
        ("videomamba_tiny_f16", {}, 7_033_744 + 8 * 192),
        ("videomamba_small_f32", {}, 25_568_656 + 24 * 384),
        ("videomamba_middle_f64", {}, 73_875_856 + 56 * 576),
        ("videomamba_tiny_f8", {"tubelet_size": 2}, 7_033_744 - 4 * 192 + 3 * 16 * 16 * 192),
    ],
)
def test_parameter_count(name, options, count):
    assert sum(p.numel() for p in timm.create_model(name, device="meta", **options).parameters()) == count


def test_the_small_one_is_small():
    assert sum(p.numel() for p in timm.create_model("test_videomamba").parameters()) < 300_000


@pytest.fixture(scope="module", params=CASES)
def golden(request, tmp_path_factory):
    """A published model: the case, and the model with its weights loaded from a file of the published layout."""
    case = CASES[request.param]
    path = tmp_path_factory.mktemp("golden") / "published.pth"
    weights = published_weights(case)
    torch.save(weights if "temporal_pos_embedding" in weights else {"model": weights}, path)
    model = timm.create_model(case["name"], pretrained=True, pretrained_cfg_overlay={"file": str(path)})
    return case, model.eval()


def test_published_keys_and_shapes(golden):
    check_keys(*golden)


def test_published_outputs(golden):
    check_outputs(*golden)


# Images and clips


def test_an_image_is_a_clip_of_one_frame():
    one, image_model = build(num_frames=1), build(num_frames=None)
    with torch.no_grad():
        one.temporal_pos_embedding.zero_()
    state = image_model.state_dict()
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].unsqueeze(2)
    missing, unexpected = one.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["temporal_pos_embedding"], [])
    image = clip(1)
    want = image_model(image[:, :, 0])
    torch.testing.assert_close(one(image), want, rtol=1e-6, atol=1e-6)
    assert torch.equal(image_model(image), want)  # and either takes the other's input
    torch.testing.assert_close(one(image[:, :, 0]), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scan_order", ORDERS)
@pytest.mark.parametrize("tubelet_size", [1, 2])
def test_every_parameter_gets_a_gradient(scan_order, tubelet_size):
    model = build(scan_order=scan_order, tubelet_size=tubelet_size, global_pool="avg")
    logits = model(clip())
    assert logits.shape == (2, 5)
    logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("scan_order", ORDERS)
@pytest.mark.parametrize("dynamic_img_size", [False, True])
def test_maps_hold_each_patch_at_its_place(scan_order, dynamic_img_size):
    """In a model whose blocks add nothing: the patch embedding and the position tables."""
    model = build(scan_order=scan_order, dynamic_img_size=dynamic_img_size)
    with torch.no_grad():
        for layer in model.layers:
            layer.mixer.out_proj.weight.zero_()
    x = clip()
    tokens, (_, maps) = model.forward_intermediates(x, norm=False)
    space = model.pos_embed[0, 1:].T.reshape(1, 16, 1, 2, 3)
    time = model.temporal_pos_embedding[0].T.reshape(1, 16, 4, 1, 1)
    torch.testing.assert_close(maps, model.patch_embed.proj(x) + space + time)
    class_token = (model.cls_token + model.pos_embed[:, :1]).expand(2, 1, 16)
    torch.testing.assert_close(tokens[:, :1], model.norm_f(class_token))
    assert torch.equal(model.pool(tokens), tokens[:, 0])


def test_features_of_a_clip():
    wrapped = timm.create_model("test_videomamba", features_only=True, out_indices=(0, 1), tubelet_size=2, **CLIP)
    assert [maps.shape for maps in wrapped(clip())] == [(2, 16, 2, 2, 3)] * 2
    assert wrapped.feature_info.reduction() == [16, 16]
    model = build(depth=3)
    x = clip()
    final, pairs = model.forward_intermediates(
        x, indices=[0, 2], return_prefix_tokens=True, norm=True, output_fmt="NLC"
    )
    torch.testing.assert_close(torch.cat([pairs[1][1], pairs[1][0]], 1), final)
    torch.testing.assert_close(final, model.forward_features(x))


# Token orders


def test_temporal_first_is_spatial_first_with_time_and_space_exchanged():
    of_clip = build(img_size=(16, 48), scan_order="temporal_first")  # 4 frames of 3 patches
    of_turned = build(img_size=(16, 64), num_frames=3)
    state = of_clip.state_dict()
    space, time = state["pos_embed"], state["temporal_pos_embedding"]
    state["pos_embed"], state["temporal_pos_embedding"] = torch.cat([space[:, :1], time], 1), space[:, 1:]
    of_turned.load_state_dict(state)
    x = clip(height=16)
    turned = x.unflatten(-1, (3, 16)).transpose(2, 4).flatten(-2)  # 3 frames of 4 patches
    torch.testing.assert_close(of_clip.forward_features(x), of_turned.forward_features(turned), rtol=1e-4, atol=1e-5)


def one_way(mixer, silenced):
    """The mixer with one of its directions silent: no D, no C."""
    with torch.no_grad():
        getattr(mixer, f"D{silenced}").zero_()
        getattr(mixer, f"x_proj{silenced}").weight[-mixer.d_state :] = 0
    return mixer


@pytest.mark.parametrize("combine", ["sum", "mean"])
def test_mixers_scan_along_paths(combine):
    def make():
        torch.manual_seed(0)
        return MambaMixer(24, d_state=4, combine=combine)

    x, other = torch.randn(2, 15, 24), torch.randperm(15)
    own, back = torch.arange(15), other.argsort()
    mixer, forwards, backwards = make(), one_way(make(), "_b"), one_way(make(), "")
    torch.testing.assert_close(mixer(x, torch.stack([own, own])), mixer(x), rtol=1e-4, atol=1e-6)
    along = mixer(x[:, other])[:, back]
    torch.testing.assert_close(mixer(x, torch.stack([other, other])), along, rtol=1e-4, atol=1e-6)
    half = forwards(x) + backwards(x[:, other])[:, back]
    torch.testing.assert_close(mixer(x, torch.stack([own, other])), half, rtol=1e-4, atol=1e-6)
    both = mixer(x) + along
    if combine == "mean":
        both = both / 2
    torch.testing.assert_close(mixer(x, torch.stack([own, own, other, other])), both, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scan_order", ORDERS[2:])
def test_spatiotemporal_paths_visit_frames_and_patches_in_turn(scan_order):
    paths = build(scan_order=scan_order)._paths([4, 2, 3], torch.device("cpu")).tolist()
    spatial = list(range(25))
    temporal = [0, *(1 + 6 * t + p for p in range(6) for t in range(4))]
    assert paths == ([spatial, temporal] if scan_order.endswith("v1") else [spatial] * 2 + [temporal] * 2)


def test_orders_share_their_weights_and_differ():
    models = [build(scan_order=order, init="corrected") for order in ORDERS]
    for model in models:
        model.load_state_dict(models[0].state_dict())
    x = clip()
    maps = [model.forward_intermediates(x, intermediates_only=True)[-1] for model in models]
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(maps) for b in maps[:i])
    image = clip(1)[:, :, 0]
    images = [timm.create_model("test_videomamba", scan_order=order, **SMALL).eval() for order in ORDERS]
    for model in images:
        model.load_state_dict(images[0].state_dict())
        assert torch.equal(model(image), images[0](image))


# Other sizes


@pytest.mark.parametrize("scan_order", ORDERS)
def test_dynamic_sizes_are_the_resized_model(scan_order):
    options = {"scan_order": scan_order, "tubelet_size": 2}
    dynamic, fixed = build(dynamic_img_size=True, **options), build(**options)
    fixed.set_input_size((48, 40), num_frames=6)
    x = clip(6, 48, 40)
    torch.testing.assert_close(dynamic(x), fixed(x))
    assert fixed.temporal_pos_embedding.shape == (1, 3, 16)
    fixed.set_input_size(num_frames=2)
    assert fixed(clip(2, 48, 40)).shape == (2, 5)


def test_times_are_interpolated():
    model = build(num_frames=2)
    first, last = model.temporal_pos_embedding.detach()[0]
    model.set_input_size(num_frames=4)
    table = model.temporal_pos_embedding[0]
    for row, share in zip(table, (0, 0.25, 0.75, 1), strict=True):
        torch.testing.assert_close(row, first + share * (last - first))


def test_exports_keep_sizes(tmp_path):
    model = build(scan_order="temporal_first", tubelet_size=2)
    model.set_input_size((48, 40), num_frames=8)
    save_for_timm(model, tmp_path, None, {})
    x = clip(8, 48, 40)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(x), model(x))
    shorter = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_frames=4).eval()
    model.set_input_size(num_frames=4)
    assert torch.equal(shorter(x[:, :, :4]), model(x[:, :, :4]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scan_order": "zigzag"}, "scan_order must be one of .*, got 'zigzag'"),
        ({"scan_order": "spatiotemporal_v1", "directions": "none"}, "needs directions='v2', got 'none'"),
        ({"inflation": "max"}, "inflation must be one of .*, got 'max'"),
        ({"tubelet_size": 3}, "num_frames must be a multiple of tubelet_size 3, got 4"),
        ({"num_frames": 0}, "num_frames must be a multiple of tubelet_size 1, got 0"),
        ({"num_frames": None, "tubelet_size": 2}, "tubelet_size must be 1 for images, got 2: set num_frames"),
        ({"img_size": 8}, "img_size must be at least the patch size"),
        ({"directions": "none", "global_pool": "token"}, "global_pool='token' needs two directions"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_wrong_inputs_are_refused():
    with pytest.raises(AssertionError, match="32 x 48 pixels expected: set img_size, or dynamic_img_size=True"):
        build()(clip(4, 48, 32))
    with pytest.raises(AssertionError, match="4 frames expected: set num_frames, or dynamic_img_size=True"):
        build()(clip(3))
    with pytest.raises(AssertionError, match="a multiple of 2 frames expected"):
        build(tubelet_size=2, dynamic_img_size=True)(clip(5))
    with pytest.raises(ValueError, match="a model of images takes no num_frames, got 8"):
        build(num_frames=None).set_input_size(num_frames=8)
    with pytest.raises(TypeError, match="if_bidirectional"):
        build(if_bidirectional=True)


# Streams


@pytest.mark.parametrize("tubelet_size", [1, 2])
@pytest.mark.parametrize("dynamic_img_size", [False, True])
@pytest.mark.parametrize("mixer", [*MIXERS, {"mixer": "s4d"}, {"mixer": "s5"}], ids=str)
def test_a_stream_is_the_clip_in_pieces(tubelet_size, dynamic_img_size, mixer):
    options = {"num_frames": 12, "tubelet_size": tubelet_size, "dynamic_img_size": dynamic_img_size}
    model = build(directions="none", **options, **mixer)
    x = clip(12)
    want = model.forward_features(x)[:, 1:]
    for lengths in ([2, 6, 4], [12], [2] * 6):
        pieces = list(model.stream(iter(x.split(lengths, dim=2))))
        assert [piece.shape[1] for piece in pieces] == [6 * length // tubelet_size for length in lengths]
        torch.testing.assert_close(torch.cat(pieces, 1), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.head(want.mean(1)), model(x))  # not the class token, which sees nothing


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("mixer", MIXERS, ids=str)
def test_a_stream_in_other_precisions(dtype, mixer):
    model = build(directions="none", **mixer).to(dtype)
    x = clip().to(dtype)
    got = torch.cat(list(model.stream(x.unbind(2))), 1)
    want = model.forward_features(x)[:, 1:]
    assert got.dtype == dtype
    tolerance = 1e-9 if dtype == torch.float64 else 0.05
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance * want.abs().max().item())


def held():
    """How many numbers all living tensors hold, but for fake ones, which compilers free late."""
    gc.collect()
    return sum(thing.numel() for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter))


@pytest.mark.parametrize(("count", "mixer"), [(1000, MIXERS[0]), (200, MIXERS[1])], ids=str)
def test_a_long_stream(count, mixer):
    """Equal to the clip, in memory that does not grow."""
    model = build(directions="none", num_frames=count, **mixer)
    seeds = range(count)

    def frame(seed):
        return torch.randn(1, 3, 32, 48, generator=torch.Generator().manual_seed(seed))

    with torch.no_grad():
        want = model.forward_features(torch.stack([frame(seed) for seed in seeds], 2))[:, 1:]
    sizes = []
    for i, tokens in enumerate(model.stream(map(frame, seeds))):
        assert tokens.shape == (1, 6, 16) and not tokens.requires_grad
        torch.testing.assert_close(tokens, want[:, 6 * i : 6 * i + 6], rtol=1e-3, atol=1e-4)
        if i in (10, count // 2, count - 2):
            sizes.append(held())
    assert i == count - 1
    assert sizes == sizes[:1] * 3


@pytest.mark.parametrize(
    "options", [{}, {"directions": "v1"}, {"directions": "none", "scan_order": "temporal_first"}, {"num_frames": None}]
)
def test_what_is_no_stream_is_refused(options):
    with pytest.raises(ValueError, match="a stream needs a model of clips with directions='none' and scan_order='spat"):
        next(build(**options).stream([torch.zeros(1, 3, 32, 48)]))


def test_time_invariant_mixers_take_one_order():
    for scan_order in ("spatiotemporal_v1", "spatiotemporal_v2"):
        with pytest.raises(ValueError, match=f"scan_order {scan_order!r} needs another mixer than 's4d'"):
            build(mixer="s4d", scan_order=scan_order)


def test_a_stream_is_no_training():
    with pytest.raises(ValueError, match="call eval"):
        next(build(directions="none").train().stream([torch.zeros(1, 3, 32, 48)]))


def test_image_weights_are_evaluated_as_videos_are():
    for frames in (8, 64):
        cfg = timm.get_pretrained_cfg(f"videomamba_tiny_f{frames}.opengvlab_in1k")
        assert (cfg.crop_pct, cfg.interpolation) == (1.0, "bilinear")
    assert timm.get_pretrained_cfg("videomamba_tiny.opengvlab_in1k").crop_pct == 0.875


def test_a_tubelet_has_frames():
    with pytest.raises(ValueError, match="tubelet_size must be at least 1, got 0"):
        build(tubelet_size=0)


def test_an_image_size_that_does_not_fit_changes_nothing():
    model = build()
    with pytest.raises(ValueError, match="at least the patch size"):
        model.set_input_size(3, num_frames=8)
    assert model(clip(4)).shape[0] == 2


def test_a_stream_ends_with_the_times_of_the_model():
    model = build(directions="none")
    with pytest.raises(ValueError, match="longer than num_frames=4: build the model with more, or set_input_size"):
        list(model.stream(clip(5).unbind(2)))
    model.set_input_size(num_frames=5)
    assert len(list(model.stream(clip(5).unbind(2)))) == 5


@pytest.mark.parametrize("d_conv", [1, 4])
def test_steps_of_a_mixer(d_conv):
    torch.manual_seed(0)
    mixer, x = MambaMixer(24, directions="none", d_conv=d_conv), torch.randn(2, 12, 24)
    state, parts = None, []
    for part in x.split([1, 2, 4, 5], dim=1):
        y, state = mixer.step(part, state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), mixer(x), rtol=1e-4, atol=1e-6)
    assert state[0].shape == (2, d_conv - 1, 48) and state[1].shape == (2, 1, 48, 16)
    with pytest.raises(ValueError, match="only directions='none' goes on step by step, got 'v2'"):
        MambaMixer(24).step(x, None)


# Checkpoints


def save(path, weights):
    torch.save(weights, path)
    return path


def load(path, tag_classes=5, **options):
    """In one call; the weights' tag has that many classes."""
    overlay = {"file": str(path), "num_classes": tag_classes}
    return timm.create_model("test_videomamba", pretrained=True, pretrained_cfg_overlay=overlay, **{**CLIP, **options})


def assert_same(model, weights, but=()):
    state = model.state_dict()
    assert state.keys() - set(but) == weights.keys() - set(but)
    assert all(torch.equal(state[key], weights[key]) for key in state.keys() - set(but))


CONV, TIMES, HEAD = "patch_embed.proj.weight", "temporal_pos_embedding", ("head.weight", "head.bias")


@pytest.mark.parametrize("inflation", ["center", "average"])
@pytest.mark.parametrize("tubelet_size", [1, 2, 4])
@pytest.mark.parametrize("tag_classes", [5, 7])
def test_image_weights_in_a_model_of_clips(inflation, tubelet_size, tag_classes, tmp_path, caplog):
    image_model = build(num_frames=None, num_classes=7)
    path = save(tmp_path / "image.pth", {"model": image_model.state_dict()})
    options = {"inflation": inflation, "tubelet_size": tubelet_size}
    model = load(path, tag_classes, **options).eval()
    assert_same(model, image_model.state_dict(), but=(CONV, TIMES, *HEAD))
    assert re.search("The head is new: .*image.pth was not trained on 5 classes", caplog.text)
    assert not model.temporal_pos_embedding.any()
    weight, image_weight = model.patch_embed.proj.weight, image_model.patch_embed.proj.weight
    if inflation == "center":
        assert torch.equal(weight[:, :, tubelet_size // 2], image_weight)
        assert weight.count_nonzero() == image_weight.count_nonzero()
    else:
        torch.testing.assert_close(weight, image_weight.unsqueeze(2).expand_as(weight) / tubelet_size)
    still = clip(1).expand(-1, -1, 4, -1, -1)  # a still picture gives the same patches
    torch.testing.assert_close(model.patch_embed(still)[:, 0], image_model.patch_embed(still[:, :, 0]))
    kept = load(path, 7, num_classes=7, **options)  # the image head, for who wants it
    assert all(torch.equal(kept.state_dict()[key], image_model.state_dict()[key]) for key in HEAD)


def test_channels_of_clips(tmp_path):
    trained = build()
    grey = load(save(tmp_path / "clip.pth", trained.state_dict()), in_chans=1)
    torch.testing.assert_close(grey.patch_embed.proj.weight, trained.patch_embed.proj.weight.sum(1, keepdim=True))
    image = save(tmp_path / "image.pth", build(num_frames=None).state_dict())
    assert load(image, in_chans=4, tubelet_size=2).patch_embed.proj.weight.shape == (16, 4, 2, 16, 16)


@pytest.mark.parametrize("frames", [1, 2, 4, 8])
def test_tables_take_the_models_size(frames, tmp_path):
    trained = build(num_frames=frames, img_size=32)
    path = save(tmp_path / "clip.pth", trained.state_dict())
    model = load(path)  # 4 frames of 2 x 3 patches
    trained.set_input_size((32, 48), num_frames=4)
    assert_same(model, trained.state_dict())


def test_layouts(tmp_path):
    weights = {key: value.clone() for key, value in build().state_dict().items()}
    headless = {key: value for key, value in weights.items() if key not in HEAD}
    layouts = {
        "bare": weights,
        "model": {"model": weights},
        "module": {"module": {f"encoder.{key}": value for key, value in weights.items()}},
        "distilled": weights | {"distill_head.0.weight": torch.ones(3), "distill_head.1.bias": torch.ones(3)},
    }
    for name, layout in layouts.items():
        assert_same(load(save(tmp_path / f"{name}.pth", layout)), weights)
    masked = {"norm.weight" if key == "norm_f.weight" else key: value for key, value in headless.items()}
    masked |= {f"clip_decoder.0.{key}": torch.ones(3) for key in ("head.weight", "head.bias", "norm.weight")}
    multimodal = {f"vision_encoder.{key}": value for key, value in masked.items()}
    multimodal |= {"vision_encoder.pool_norm.weight": torch.ones(3), "clip_teacher.proj": torch.ones(3)}
    multimodal |= {"text_encoder.bert.embeddings.position_ids": torch.arange(3), "temp": torch.tensor(1.0)}
    encoder = {f"encoder.{key}": value for key, value in masked.items() if "clip_decoder" not in key}
    encoder = {
        f"module.{key}": value for key, value in (encoder | {"clip_decoder.0.norm.weight": torch.ones(3)}).items()
    }
    headless_layouts = {"masked": masked, "multimodal": {"model": multimodal, "epoch": 3}, "encoder": encoder}
    for name, layout in headless_layouts.items():
        path = save(tmp_path / f"{name}.pth", layout)
        assert_same(load(path, 0, num_classes=0), headless)
        assert_same(load(path, 0), weights, but=HEAD)
        with pytest.raises(UserError, match="head.weight is missing there"):
            load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm.weight": torch.ones(16)}, re.escape("norm.weight is (16,) there and missing in the model")),
        ({TIMES: None}, re.escape(f"{TIMES} is missing there and (1, 4, 16) in the model")),
        ({TIMES: torch.ones(1, 4, 8)}, re.escape(f"{TIMES} is (1, 4, 8) there and (1, 4, 16) in the model")),
        ({TIMES: torch.ones(4, 16)}, re.escape(f"{TIMES} is (4, 16) there")),
        ({TIMES: torch.ones(1, 0, 16)}, re.escape(f"{TIMES} is (1, 0, 16) there")),
        ({TIMES: torch.ones(1, 4, 16) * float("nan")}, f"{TIMES} holds 64 numbers that are not finite"),
        ({CONV: torch.ones(16, 3, 2, 16, 16)}, re.escape(f"{CONV} is (16, 3, 2, 16, 16) there and (16, 3, 1, 16, 16)")),
        ({CONV: torch.ones(16, 3, 8, 8)}, re.escape(f"{CONV} is (16, 3, 1, 8, 8) there")),
        ({CONV: torch.ones(16)}, re.escape(f"{CONV} is (16,) there")),
    ],
)
def test_wrong_files_are_refused(change, message, tmp_path):
    weights = {**build().state_dict(), **change}
    path = save(tmp_path / "wrong.pth", {key: value for key, value in weights.items() if value is not None})
    with pytest.raises(UserError, match=message):
        load(path)
    with pytest.raises(UserError, match=message):
        load_pretrained(build(), path)


def test_clip_weights_do_not_go_into_a_model_of_images(tmp_path):
    path = save(tmp_path / "clip.pth", build().state_dict())
    with pytest.raises(UserError, match=re.escape(f"{CONV} is (16, 3, 1, 16, 16) there and (16, 3, 16, 16)")):
        load(path, num_frames=None)


def parts(file):
    """Model, frames, pixels and classes, read off a published file's name."""
    file = file.removeprefix("videomamba_").removesuffix(".pth")
    size = {"t": "tiny", "s": "small", "m": "middle", "b": "base"}[file[0]]
    frames = re.search(r"_f(\d+)_", file)
    classes = {"in1k": 1000, "k400": 400, "ssv2": 174, "breakfast": 10, "coin": 180}
    headless = "_pt_" in file or re.search(r"_\d+M_", file)
    pixels = int(re.split("res|to", file)[-1])
    return size, int(frames[1]) if frames else None, pixels, 0 if headless else classes[file.split("_")[1]]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("size", ["tiny", "small", "middle", "base"])
def test_every_published_file_has_a_tag(size, tmp_path, monkeypatch):
    asked = []

    def download(repository, filename, **options):
        """A file of the named shapes, but narrow and of one block."""
        assert repository == "OpenGVLab/VideoMamba"
        asked.append(filename)
        _, frames, pixels, classes = parts(filename)
        if "breakfast_mask_ft_f64" in filename:
            frames = 32  # as it is
        options = {"img_size": pixels, "num_frames": frames, "num_classes": classes}
        model = timm.create_model("test_videomamba", embed_dim=8, depth=1, **options)
        return str(save(tmp_path / "weights.pth", model.state_dict()))

    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    tags = timm.list_models(f"videomamba_{size}*", pretrained=True)
    for name in tags:
        asked.clear()
        model = timm.create_model(name, pretrained=True, embed_dim=8, depth=1)
        (filename,) = asked
        of_size, frames, pixels, classes = parts(filename)
        architecture, tag = name.split(".")
        assert of_size == size and model.img_size == (pixels, pixels) and model.num_classes == classes
        assert ("mask_" in tag) == ("mask" in filename)
        if tag != "opengvlab_in1k":
            assert architecture == f"videomamba_{size}" + (f"_f{frames}" if frames else "")
            assert model.num_frames == frames
        data = timm.data.resolve_model_data_config(model)
        assert data["crop_pct"] == (1.0 if "_f" in architecture else 0.875)
    files = {timm.get_pretrained_cfg(name).hf_hub_filename for name in tags}
    assert files == {f"videomamba_{file}.pth" for file in PUBLISHED if parts(file)[0] == size}


def test_the_published_table_is_the_model_zoos():
    """Row by row, by model and columns, as docs/model_zoo.md has it."""
    zoo = (ROOT / "docs/model_zoo.md").read_text().partition("\n## VideoMamba\n")[2].partition("\n## ")[0]
    figures = [top1 for top1 in PUBLISHED.values() if top1]
    tables = [re.findall(r"\d+\.\d", row) for row in re.findall(r"^\| `.*\|$", zoo, re.MULTILINE)]
    assert figures == [float(figure) for row in tables for figure in row]
    assert (len(figures), len(PUBLISHED)) == (58, 63)


def test_default_tags():
    for size in ("tiny", "small", "middle"):
        assert timm.get_pretrained_cfg(f"videomamba_{size}").tag == "opengvlab_in1k"
        for frames in (8, 16, 32, 64):
            assert timm.get_pretrained_cfg(f"videomamba_{size}_f{frames}").tag == "opengvlab_k400"


# Training


def test_published_initialisation():
    model = timm.create_model("test_videomamba", num_frames=4, depth=4)
    for tensor in (model.cls_token, model.temporal_pos_embedding, model.head.bias):
        assert not tensor.any()
    mixer = model.layers[0].mixer
    for name in ("in_proj", "x_proj", "x_proj_b", "dt_proj", "dt_proj_b"):
        assert getattr(mixer, name).weight.std().item() == pytest.approx(0.02, rel=0.25), name
    assert not mixer.dt_proj.bias.any() and not mixer.dt_proj_b.bias.any()
    bound = 128**-0.5 / 4**0.5
    assert 0.9 * bound < mixer.out_proj.weight.abs().max() <= bound
    corrected = timm.create_model("test_videomamba", init="corrected").layers[0].mixer
    for linear in (corrected.dt_proj, corrected.dt_proj_b):
        steps = nn.functional.softplus(linear.bias)
        assert steps.min() > 1e-3 * 0.99 and steps.max() < 0.1 * 1.01


@pytest.mark.parametrize("init", ["published", "corrected"])
def test_init_weights_after_to_empty(init):
    torch.manual_seed(0)
    options = {"num_frames": 4, "init": init}
    made = timm.create_model("test_videomamba", **options)
    empty = timm.create_model("test_videomamba", device="meta", **options).to_empty(device="cpu")
    empty.init_weights()
    for (name, a), b in zip(made.named_parameters(), empty.parameters(), strict=True):
        assert b.isfinite().all(), name
        assert a.std().item() == pytest.approx(b.std().item(), rel=0.35, abs=1e-6), name


def test_weight_decay_and_layer_groups():
    from timm.optim import param_groups_layer_decay

    model = build()
    assert model.no_weight_decay() == {"cls_token", "pos_embed", "temporal_pos_embedding"}
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    assert {group["lr_scale"] for group in groups} == {1.0, 0.5, 0.25, 0.125}  # head and norm, two blocks, the stem
    stem = {id(p) for group in groups if group["lr_scale"] == 0.125 for p in group["params"]}
    assert id(model.temporal_pos_embedding) in stem and id(model.patch_embed.proj.weight) in stem


@pytest.mark.parametrize("scan_order", ["spatial_first", "spatiotemporal_v2"])
def test_checkpointing_gives_the_same_gradients(scan_order):
    model, x, grads = build(scan_order=scan_order), clip(), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("scan_order", ["spatial_first", "spatiotemporal_v2"])
def test_compile_and_export(scan_order):
    model, x = build(scan_order=scan_order), clip()
    want = model(x)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), want)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},), strict=False)
    torch.testing.assert_close(program.module()(x[:1]), model(x[:1]))


SCRIPT = """
import sys, timm, torch, vim
for order in sys.argv[1:]:
    options = {"img_size": (32, 48), "embed_dim": 16, "depth": 1, "num_frames": 4, "tubelet_size": 2}
    model = timm.create_model("test_videomamba", scan_order=order, **options).eval()
    clip = torch.randn(2, 3, 4, 32, 48)
    torch.testing.assert_close(torch.jit.script(model)(clip), model(clip))
"""


def test_torchscript():
    """In a process of its own: what TorchScript has seen once it calls otherwise ever after."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT, *ORDERS], check=True)


def test_residual_stays_float32_under_autocast():
    model, x = build(), clip()
    streams = []
    model.layers[1].register_forward_hook(lambda module, args, out: streams.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(x).float()
    assert streams == [torch.float32]
    want = model(x)
    torch.testing.assert_close(low, want, rtol=0, atol=0.05 * want.abs().max().item())
