from functools import partial

import pytest
import timm
import torch
from torch import nn
from torch.nn.functional import pad

import vim  # noqa: F401  registers the models
from tests.golden.check import FAST_BACKENDS, check_outputs, load_cases, published_weights
from vim.checkpoints import adapt, load_pretrained
from vim.errors import UserError
from vim.layers import SplitMixer

CASES = {name: case for name, case in load_cases("families.json").items() if name.startswith("mambavision")}
COUNTS = {  # parameters and tensors
    "mambavision_t": (31_794_248, 252),
    "mambavision_t2": (35_104_008, 298),
    "mambavision_s": (50_140_584, 285),
    "mambavision_b": (97_685_288, 356),
    "mambavision_l": (227_961_048, 356),
    "mambavision_l2": (241_554_824, 389),
    "mambavision_l2_512": (241_554_824, 389),
    "mambavision_l3": (739_570_472, 601),
    "mambavision_l3_512": (739_570_472, 601),
}


@pytest.mark.parametrize("name", COUNTS)
def test_sizes(name):
    model = timm.create_model(name, device="meta")
    assert (sum(p.numel() for p in model.parameters()), len(model.state_dict())) == COUNTS[name]
    rows = model.img_size[0] // 16  # at the third stage; a window is the whole map there
    assert [stage.windows for stage in model.stages] == [None, None, rows, rows // 2]


@pytest.fixture(scope="module", params=CASES)
def golden(request, tmp_path_factory):
    case = CASES[request.param]
    weights = published_weights(case)
    counts = {key: torch.tensor(7) for key in weights if key.endswith("num_batches_tracked")}  # integers, as published
    path = tmp_path_factory.mktemp("golden") / "published.pth"
    torch.save({"state_dict": {f"model.{key}": value for key, value in (weights | counts).items()}}, path)
    model = timm.create_model(case["name"])
    load_pretrained(model, path)
    return case, model.eval()


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_published_outputs(golden, backend, monkeypatch):
    monkeypatch.setenv("VIM_BACKEND", backend)
    case, model = golden
    assert model.norm_f.norm.num_batches_tracked == 7
    check_outputs(case, model, lambda block: block.replace("levels", "stages").replace("blocks", "layers") + ".0.mixer")


def test_the_later_half_of_the_blocks_attends():
    for depths in ((1, 1, 4, 5), (1, 1, 3, 2)):
        model = timm.create_model("test_mambavision", depths=depths)
        for stage in model.stages[2:]:
            scans = [isinstance(block[0].mixer, SplitMixer) for block in stage.layers]
            count = -(-len(scans) // 2)
            assert scans == [True] * count + [False] * (len(scans) - count)


def drawn(**options):
    torch.manual_seed(0)
    return timm.create_model("test_mambavision", layer_scale=0.5, **options).eval()


@torch.no_grad()
def test_windows():
    image = torch.randn(1, 3, 64, 64)
    whole, windowed = drawn(window_sizes=(0, 0)), drawn()
    assert [stage.windows for stage in whole.stages] == [None, None, 0, 0]
    torch.testing.assert_close(whole(image), windowed(image))  # at 64 pixels a window is the whole map

    # in the third stage: two windows side by side see nothing of each other
    third = windowed.stages[2].layers
    x = torch.randn(1, 4, 8, third[0][0].norm.weight.numel())
    windowed.stages[2].downsample = nn.Identity()
    left, right = (third(half.flatten(1, 2)).unflatten(1, (4, 4)) for half in (x[:, :, :4], x[:, :, 4:]))
    torch.testing.assert_close(windowed.stages[2](x), torch.cat([left, right], 2))

    # a window larger than the map: as if the map were padded
    x = x[:, :3, :2]
    padded = third(pad(x, (0, 0, 0, 2, 0, 1)).flatten(1, 2)).unflatten(1, (4, 4))
    torch.testing.assert_close(windowed.stages[2](x), padded[:, :3, :2])


@torch.no_grad()
@pytest.mark.parametrize("double_dt_bias", [True, False])
def test_the_mixer_token_by_token(double_dt_bias):
    """The mixer's equations in float64, one token after the other."""
    torch.manual_seed(0)
    mixer = SplitMixer(24, d_state=3, double_dt_bias=double_dt_bias).double()
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    u, z = mixer.in_proj(x).chunk(2, dim=-1)
    taps = [conv.weight.squeeze(1) for conv in (mixer.conv1d_x, mixer.conv1d_z)]
    near = [pad(half, (0, 0, 1, 1)).unfold(1, 3, 1) for half in (u, z)]  # (b, l, e, 3): before, itself, after
    u, z = (nn.functional.silu((n * t).sum(-1)) for n, t in zip(near, taps, strict=True))
    dt, B, C = mixer.x_proj(u).split([mixer.dt_rank, 3, 3], dim=-1)
    bias = mixer.dt_proj.bias * (2 if double_dt_bias else 1)
    dt = nn.functional.softplus(dt @ mixer.dt_proj.weight.T + bias)
    state, rows = torch.zeros(2, 12, 3, dtype=torch.float64), []
    for t in range(7):
        decay = torch.exp(-dt[:, t, :, None] * mixer.A_log.exp())
        state = decay * state + (dt[:, t] * u[:, t])[:, :, None] * B[:, t, None]
        rows.append((state * C[:, t, None]).sum(-1) + mixer.D * u[:, t])
    want = mixer.out_proj(torch.cat([torch.stack(rows, 1), z], -1))
    torch.testing.assert_close(mixer(x), want)


def test_initial_weights_rates_and_options():
    model = timm.create_model("test_mambavision", drop_path_rate=0.6)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.35), name
            assert module.bias is None or not module.bias.any()
    blocks = [block for stage in model.stages for block in stage.layers]
    branches = [block if hasattr(block, "drop_path") else block[1] for block in blocks]
    rates = [getattr(branch.drop_path, "drop_prob", 0.0) for branch in branches]
    assert rates == pytest.approx([0.1 * i for i in range(7)])
    for wrong in (
        {"num_heads": (3, 4)},
        {"depths": (1, 1, 1)},
        {"window_sizes": (-1, 2)},
        {"window_sizes": (4,)},
        {"window_sizes": 4},
        {"stem_dim": 0},
    ):
        with pytest.raises(ValueError, match="must"):
            timm.create_model("test_mambavision", **wrong)


def test_files_of_detectors_without_counters(tmp_path, caplog):
    """In a classifier and in a backbone, with windows of the whole map."""
    trained = drawn()
    weights = {
        f"backbone.{key}": value
        for key, value in trained.state_dict().items()
        if not key.startswith(("norm_f", "head")) and not key.endswith("num_batches_tracked")
    }
    weights |= {f"backbone.outnorm{i}.weight": torch.ones(8 * 2**i) for i in range(4)}
    weights["decode_head.conv_seg.bias"], weights["neck.0.bias"] = torch.ones(150), torch.ones(3)
    path = tmp_path / "a.pth"
    torch.save({"meta": {"epoch": 12}, "state_dict": weights}, path)
    load = partial(timm.create_model, "test_mambavision", pretrained=True, pretrained_cfg_overlay={"file": str(path)})
    image = torch.randn(1, 3, 64, 64)
    want = trained.forward_intermediates(image, intermediates_only=True)
    for options in ({"num_classes": 3}, {"features_only": True}):
        caplog.clear()
        model = load(window_sizes=None, **options).eval()
        new = "norm_f" if "features_only" in options else "head and norm_f"
        assert caplog.text.count(f"6 tensors besides its backbone are left out; new in the model: {new}\n") == 1
        found = model(image) if "features_only" in options else model.forward_intermediates(image)[1]
        for got, map_ in zip(found, want, strict=True):
            torch.testing.assert_close(got, map_)


@pytest.mark.parametrize("name", ["test_mambavision", "test_vmamba", "test_mambar", "test_vssd"])
@pytest.mark.parametrize("options", [{"num_classes": 0}, {"num_classes": 7}, {"features_only": True}, {"in_chans": 1}])
def test_a_classifier_in_other_models(name, options, tmp_path):
    weights = timm.create_model(name, num_classes=5).state_dict()
    path = tmp_path / "a.pth"
    torch.save({"model": {f"model.{key}": value for key, value in weights.items()}, "model_ema": weights}, path)
    overlay = {"file": str(path), "num_classes": 5}
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    state = getattr(model, "model", model).state_dict()
    kept = {key for key in weights if torch.equal(weights[key], state.get(key, torch.empty(0)))}
    left = {key.partition(".")[0] for key in weights.keys() - kept}
    assert left <= {"head", "norm_f", "neck", "norm_neck", "patch_embed"}
    assert len(kept) > len(weights) - 8
    convs = [(key, value) for key, value in weights.items() if key.startswith("patch_embed") and value.dim() == 4]
    if "in_chans" in options:
        torch.testing.assert_close(state[convs[0][0]], convs[0][1].sum(1, keepdim=True))
    else:
        assert "patch_embed" not in left


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_counter_that_is_no_number(value):
    model = drawn()
    weights = model.state_dict() | {"norm_f.norm.num_batches_tracked": torch.tensor(value)}
    with pytest.raises(UserError, match="norm_f.norm.num_batches_tracked holds 1 numbers that are not finite"):
        adapt(weights, model, "a.pth")
