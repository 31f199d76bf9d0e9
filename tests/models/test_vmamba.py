import pytest
import timm
import torch
from torch import nn

import vim  # noqa: F401  registers the models
from tests.golden.check import FAST_BACKENDS, check_outputs, load_cases, published_weights
from vim.checkpoints import check_fit, load_pretrained, rename
from vim.errors import UserError

CASES = {name: case for name, case in load_cases("families.json").items() if name.startswith("vmamba")}
COUNTS = {  # parameters and tensors
    "vmamba_tiny_v0": (22_893_448, 212),
    "vmamba_small_v0": (44_417_416, 446),
    "vmamba_base_v0": (76_254_056, 446),
    "vmamba_tiny_s2l5": (30_705_832, 222),
    "vmamba_small_s2l15": (50_147_752, 402),
    "vmamba_base_s2l15": (88_557_800, 402),
    "vmamba_tiny_s1l8": (30_249_064, 276),
    "vmamba_small_s1l20": (49_012_840, 492),
    "vmamba_base_s1l20": (86_614_504, 492),
}
SMALL = {"embed_dims": (16, 24, 32, 48), "depths": (1, 1, 1, 1)}
V0 = {**SMALL, "version": "v0", "d_state": 4, "expand": 2}


@pytest.mark.parametrize("name", COUNTS)
def test_sizes(name):
    model = timm.create_model(name, device="meta")
    assert (sum(p.numel() for p in model.parameters()), len(model.state_dict())) == COUNTS[name]


@pytest.fixture(scope="module", params=CASES)
def golden(request):
    case = CASES[request.param]
    model = timm.create_model(case["name"]).eval()
    weights = published_weights(case)
    model.load_state_dict(timm_filter({"model": weights}, model))
    return case, model, weights


def timm_filter(checkpoint, model):
    from vim.models.vmamba import checkpoint_filter_fn

    return checkpoint_filter_fn(checkpoint, model)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_published_outputs(golden, backend, monkeypatch):
    case, model, _ = golden
    monkeypatch.setenv("VIM_BACKEND", backend)
    check_outputs(case, model, lambda block: block.replace("layers", "stages").replace("blocks", "layers") + ".0.mixer")


def renamed(weights):
    """The published names after the authors' renaming."""
    names = {
        "patch_embed.proj": "patch_embed.0",
        "patch_embed.norm": "patch_embed.2",
        "ln_1": "norm",
        "self_attention": "op",
    }
    new = {}
    for key, value in weights.items():
        for old, name in names.items():
            key = key.replace(f"{old}.", f"{name}.")
        new[f"classifier.{key}" if key.startswith(("norm.", "head.")) else key] = value
    return new


def test_files_in_other_forms_are_the_same_weights(golden):
    case, model, weights = golden
    state = model.state_dict()
    linear = ("in_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight")
    forms = {
        "new names": renamed(weights),
        "1 x 1 convolutions": {k: v[..., None, None] if k.endswith(linear) else v for k, v in weights.items()},
        "our names": state,
        "a wrapper's prefix": {f"module.{key}": value for key, value in weights.items()},
    }
    for form, checkpoint in forms.items():
        found = timm_filter({"model": checkpoint}, model)
        assert found.keys() == state.keys(), form
        assert all(torch.equal(found[key], state[key]) for key in state), form


def test_the_backbone_of_a_detector(golden, tmp_path, caplog):
    case, model, weights = golden
    kept = {k: v for k, v in renamed(weights).items() if not k.startswith("classifier.")}
    checkpoint = {f"backbone.{key}": value for key, value in kept.items()}
    checkpoint |= {f"backbone.outnorm{i}.weight": torch.ones(96 * 2**i) for i in range(4)}
    checkpoint["decode_head.conv_seg.weight"] = torch.ones(150, 512, 1, 1)
    path = tmp_path / "upernet.pth"
    torch.save({"state_dict": checkpoint}, path)
    features = timm.create_model(
        case["name"], features_only=True, pretrained=True, pretrained_cfg_overlay={"file": str(path)}
    ).eval()
    assert caplog.text.count("5 tensors besides its backbone are left out; new in the model: norm_f\n") == 1
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for got, want in zip(features(image), model.forward_intermediates(image, intermediates_only=True), strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "key", ["layers.0.blocks.0.op.A_logs", "layers.0.blocks.0.op.x_proj_weight", "layers.0.blocks.0.op.Ds"]
)
@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (4, 1, 1, 1), (8,)], ids=str)
def test_a_tensor_of_another_shape_is_named(key, shape, tmp_path):
    case = CASES["vmamba_tiny_s1l8"]
    weights = {name: torch.zeros(shape if name == key else size) for name, size in case["state_dict"].items()}
    path = tmp_path / "a.pth"
    torch.save({"model": weights}, path)
    with pytest.raises(UserError, match=r"a.pth is of another model: stages.0.layers.0.0.mixer.*\(.*\) there"):
        load_pretrained(timm.create_model("vmamba_tiny_s1l8"), path)


@pytest.mark.parametrize(
    ("of", "into"),
    [
        ("tiny_v0", "tiny_s1l8"),
        ("tiny_s1l8", "tiny_v0"),
        ("tiny_s1l8", "tiny_s2l5"),
        ("small_v0", "tiny_v0"),
        ("base_s2l15", "small_s2l15"),
    ],
)
def test_weights_of_another_variant(of, into, tmp_path):
    with torch.device("meta"):
        weights = timm.create_model(f"vmamba_{of}").state_dict()
        model = timm.create_model(f"vmamba_{into}")
    with pytest.raises(UserError, match=f"^a.pth is of another model: its tensors are those of vmamba_{of}$"):
        rename(weights, model, "a.pth")
    del weights["stages.2.layers.1.0.mixer.out_proj.weight"]  # the file of no published variant
    assert "its tensors are those" not in refusal(lambda: check_fit(model.rename_weights(weights), model, "a.pth"))


def refusal(call):
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value)


def test_two_weights_of_one_name(tmp_path):
    model = timm.create_model("test_vmamba")
    weights = model.state_dict() | {"classifier.norm.weight": torch.ones(48)}
    assert "a.pth is of another model: two of its tensors are norm_f.weight in the model" in refusal(
        lambda: rename(weights, model, "a.pth")
    )


def transposed(weights):
    """The weights of the model that sees images transposed: routes change places, and kernels are transposed."""
    swapped = {}
    for key, value in weights.items():
        leaf = key.rpartition(".")[2]
        if leaf in ("x_proj_weight", "dt_projs_weight", "dt_projs_bias"):
            value = value[[1, 0, 3, 2]]
        elif leaf in ("A_logs", "Ds"):
            value = value.unflatten(0, (4, -1))[[1, 0, 3, 2]].flatten(0, 1)
        elif value.dim() == 4:
            value = value.transpose(2, 3)
        swapped[key] = value
    return swapped


@torch.no_grad()
def test_a_transposed_image_has_transposed_maps(golden):
    case, model, weights = golden
    if case["name"].endswith("v0"):
        pytest.skip("patch merging orders the channels by row and column")
    other = timm.create_model(case["name"]).eval()
    other.load_state_dict(timm_filter({"model": transposed(weights)}, other))
    image = torch.randn(1, 3, 64, 100)
    want = model.forward_features(image).transpose(2, 3)
    got = other.forward_features(image.transpose(2, 3))
    assert ((got - want).norm() / want.norm()).item() < 1e-5


def test_v0_leaves_out_what_does_not_fill_a_patch():
    torch.manual_seed(0)
    model, image = timm.create_model("test_vmamba", **V0).eval(), torch.randn(1, 3, 67, 50)
    torch.testing.assert_close(model(image), model(image[..., :64, :48]))
    assert [tuple(map_.shape[2:]) for map_ in model.forward_intermediates(image, intermediates_only=True)] == [
        (16, 12), (8, 6), (4, 3), (2, 2),
    ]  # fmt: skip


def test_v2_rounds_up():
    model, image = timm.create_model("test_vmamba", **SMALL), torch.randn(1, 3, 65, 50)
    assert [tuple(map_.shape[2:]) for map_ in model.forward_intermediates(image, intermediates_only=True)] == [
        (17, 13), (9, 7), (5, 4), (3, 2),
    ]  # fmt: skip


@pytest.mark.parametrize("options", [SMALL, V0], ids=["v2", "v0"])
def test_rates_and_weight_decay(options):
    model = timm.create_model("test_vmamba", **{**options, "depths": (1, 1, 2, 1)}, drop_path_rate=0.2)
    blocks = [block for stage in model.stages for block in stage.layers]
    rates = [[getattr(branch.drop_path, "drop_prob", 0.0) for branch in block] for block in blocks]
    assert rates == [pytest.approx([rate] * len(blocks[0])) for rate in (0, 0.05, 0.1, 0.15, 0.2)]
    decayed = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.dim() > 1} - {
        name.rpartition(".")[2] for name in model.no_weight_decay()
    }
    assert decayed == {"weight", "A_log", "dt_weight", "dt_bias"}
    exempt = timm.create_model("test_vmamba", **options, wd_exempt_A=True).no_weight_decay()
    assert {name.rpartition(".")[2] for name in exempt} == {"D", "A_log", "dt_bias"}


def test_initial_weights():
    torch.manual_seed(0)
    model = timm.create_model("vmamba_tiny_s1l8", depths=(1, 1, 1, 1))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith("x_proj"):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05), name
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, nn.Linear):
            assert module.weight.abs().max().item() == pytest.approx(module.in_features**-0.5, rel=0.05), name
    with pytest.raises(ValueError, match="version must be one of"):
        timm.create_model("test_vmamba", version="v1")
