import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import vim  # noqa: F401  registers the models
from tests.golden.check import check_outputs, load_cases, published_weights
from tests.golden.weights import generate
from vim.checkpoints import checkpoint_filter_fn, load_pretrained, rename
from vim.errors import UserError
from vim.layers import NonCausalSSD

CASES = load_cases("vssd.json")
TOLERANCES = {"vssd_tiny": 5e-5, "vssd_micro": 2e-4}  # micro is badly conditioned
COUNTS = {  # parameters and tensors
    "vssd_micro": (13_512_964, 379),
    "vssd_tiny": (24_270_724, 421),
    "vssd_small": (40_075_650, 730),
    "vssd_base": (88_823_151, 730),
}


@pytest.mark.parametrize("name", COUNTS)
def test_sizes(name):
    model = timm.create_model(name, device="meta")
    assert (sum(p.numel() for p in model.parameters()), len(model.state_dict())) == COUNTS[name]


@pytest.fixture(scope="module", params=CASES)
def golden(request):
    case = CASES[request.param]
    model = timm.create_model(case["name"]).eval()
    weights = published_weights(case)
    model.load_state_dict(checkpoint_filter_fn({"model": weights}, model))
    return case, model, weights


def test_published_outputs(golden):
    case, model, _ = golden
    name = lambda block: block.replace("layers", "stages").replace("blocks", "layers") + ".1.mixer"  # noqa: E731
    check_outputs(case, model, name, TOLERANCES[case["name"]])


def test_published_gradients(golden):
    """In float64: those of float32 lose up to 2 % in micro."""
    case, model, _ = golden
    model = timm.create_model(case["name"]).eval()
    model.load_state_dict(golden[1].state_dict())
    image = generate(case["input"]["seed"], case["input"]["shape"]).double().requires_grad_()
    logits = model.double()(image)
    (logits * generate(case["input"]["seed"] + 1000, logits.shape)).sum().backward()
    assert image.grad.norm().item() == pytest.approx(case["input_grad"], rel=1e-5)
    for name, want in case["grads"].items():
        gradient = model.get_parameter(model.rename_weight(name, None)[0]).grad
        assert gradient.norm().item() == pytest.approx(want, rel=1e-5), name


def test_files_in_other_forms_are_the_same_weights(golden):
    case, model, weights = golden
    state = model.state_dict()
    forms = {"our names": state, "a wrapper's prefix": {f"module.{key}": value for key, value in weights.items()}}
    for form, checkpoint in forms.items():
        found = checkpoint_filter_fn({"model": checkpoint}, model)
        assert found.keys() == state.keys(), form
        assert all(torch.equal(found[key], state[key]) for key in state), form


def published(**options):
    """Small weights under the published names, as the inverse of the renaming gives them."""
    torch.manual_seed(0)
    model = timm.create_model("test_vssd", **options).eval()
    case = CASES["vssd_tiny"]["state_dict"]
    names = {model.rename_weight(key, None)[0]: key for key in case}
    return model, {names[key]: value for key, value in model.state_dict().items()}


def test_the_backbone_of_a_detector(tmp_path, caplog):
    trained, weights = published()
    checkpoint = {f"backbone.{k}": v for k, v in weights.items() if not k.startswith(("norm.", "head."))}
    checkpoint |= {f"backbone.outnorm{i}.weight": torch.ones(8 * 2**i) for i in range(4)}
    checkpoint["roi_head.bbox_head.fc_cls.weight"] = torch.ones(81, 8)
    path = tmp_path / "mask_rcnn.pth"
    torch.save({"meta": {"epoch": 12}, "state_dict": checkpoint}, path)
    overlay = {"file": str(path)}
    features = timm.create_model("test_vssd", features_only=True, pretrained=True, pretrained_cfg_overlay=overlay)
    assert caplog.text.count("5 tensors besides its backbone are left out; new in the model: norm_f\n") == 1
    image = torch.randn(1, 3, 70, 90)
    with torch.no_grad():
        want = trained.forward_intermediates(image, intermediates_only=True)
        for got, map_ in zip(features.eval()(image), want, strict=True):
            torch.testing.assert_close(got, map_)


@pytest.mark.parametrize(("name", "loads"), [("a_best_ema.pth", "model_ema"), ("a_best.pth", "model")])
def test_a_file_named_after_its_running_average_loads_it(name, loads, tmp_path):
    model, weights = published()
    other = {key: value + 1 for key, value in weights.items()}
    torch.save({"model": weights, "model_ema": other}, tmp_path / name)
    loaded = timm.create_model("test_vssd")
    load_pretrained(loaded, tmp_path / name)
    raw = torch.equal(loaded.head.weight, model.head.weight)
    assert raw == (loads == "model")
    torch.save({"model": weights}, tmp_path / name)  # with raw weights alone, these are loaded
    load_pretrained(loaded, tmp_path / name)
    assert torch.equal(loaded.head.weight, model.head.weight)


def test_weights_of_other_sizes_and_of_the_later_version():
    """The later version's names are not known: any that the model lacks, and any other depth, are refused."""
    model, weights = published()
    micro = {key: torch.zeros(shape) for key, shape in CASES["vssd_micro"]["state_dict"].items()}
    with pytest.raises(UserError, match="^a.pth is of another model: its tensors are those of vssd_micro$"):
        rename(micro, timm.create_model("vssd_tiny", device="meta"), "a.pth")
    later = (
        r"^a.pth is of another model: its blocks are those of no VSSD .* the version of 2025, .*_iccv2025 .*package$"
    )
    for change in (
        {"layers.0.blocks.0.attn.q_norm.weight": torch.ones(8)},
        {"layers.0.blocks.0.attn.in_proj.weight": torch.ones(50, 8)},
    ):
        with pytest.raises(UserError, match=later):
            rename({**weights, **change}, model, "a.pth")
    with pytest.raises(UserError, match="head.weight is"):
        load = {**weights, "head.weight": torch.ones(1000, 3)}
        checkpoint_filter_fn(load, model)


# The mixer


@pytest.mark.parametrize("groups", [1, 2])
@torch.no_grad()
def test_the_mixer_token_by_token(groups):
    """The mixer's equations in float64: a loop over heads and tokens."""
    torch.manual_seed(0)
    dim, h, n = 6, 4, 3
    mixer = NonCausalSSD(dim, num_heads=h, d_state=n, ngroups=groups).double()
    for parameter in mixer.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    x, e, p = torch.randn(2, 5, 3, dim, dtype=torch.float64), 2 * dim, 2 * dim // h
    projected = x @ mixer.in_proj.weight.T
    z, dt = projected[..., :e].flatten(1, 2), projected[..., -h:].flatten(1, 2)
    near = (
        F.pad(projected[..., e:-h], (0, 0, 1, 1, 1, 1)).unfold(1, 3, 1).unfold(2, 3, 1)
    )  # (b, rows, columns, c, 3, 3)
    convolved = F.silu((near * mixer.conv2d.weight[:, 0]).sum((-1, -2)) + mixer.conv2d.bias).flatten(1, 2)
    y = torch.zeros(2, 15, e, dtype=torch.float64)
    for head in range(h):
        group = head % groups
        own = convolved[..., head * p : (head + 1) * p]
        B, C = (convolved[..., s + group * n : s + (group + 1) * n] for s in (e, e + groups * n))
        m = F.softplus(dt[..., head] + mixer.dt_bias[head]) * mixer.A_log[head].exp()
        state = sum(m[:, j, None, None] * B[:, j, :, None] * own[:, j, None] for j in range(15))
        y[..., head * p : (head + 1) * p] = torch.einsum("bln,bnp->blp", C, state) + mixer.D[head] * own
    want = (F.layer_norm(y, (e,), mixer.norm.weight, mixer.norm.bias) * z) @ mixer.out_proj.weight.T
    torch.testing.assert_close(mixer(x).flatten(1, 2), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_state_is_float32_in_16_bits(dtype):
    """A sum over many tokens that float16 cannot hold."""
    torch.manual_seed(0)
    mixer, x = NonCausalSSD(8, num_heads=2, d_state=4), torch.randn(1, 64, 64, 8)
    with torch.no_grad():
        mixer.conv2d.weight.zero_(), mixer.conv2d.bias.fill_(20)
        want = mixer(x)
        with torch.autocast("cpu", dtype):
            got = mixer(x)
        low = mixer.to(dtype)(x.to(dtype))
    for found in (got, low):
        assert (found.float() - want).norm() < 0.03 * want.norm()


def test_gradients_of_the_steps_do_not_vanish():
    torch.manual_seed(0)
    model = timm.create_model("test_vssd")
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    for stage in model.stages[:3]:
        mixer = stage.layers[0][1].mixer
        assert all(p.grad.abs().min() > 0 for p in (mixer.A_log, mixer.dt_bias, mixer.D))


# The model


def test_sizes_are_rounded_up():
    model = timm.create_model("test_vssd").eval()
    for rows, columns in ((230, 230), (256, 192)):
        maps = model.forward_intermediates(torch.randn(1, 3, rows, columns), intermediates_only=True)
        assert [tuple(m.shape[2:]) for m in maps] == [(-(-rows // s), -(-columns // s)) for s in (4, 8, 16, 32)]


def test_rates_weight_decay_and_options():
    model = timm.create_model("test_vssd", drop_path_rate=0.2)
    blocks = [block for stage in model.stages for block in stage.layers]
    rates = [[getattr(block[i].drop_path, "drop_prob", 0.0) for i in (1, 3)] for block in blocks]
    assert rates == [pytest.approx([rate] * 2) for rate in (0, 0.05, 0.1, 0.15, 0.2)]
    assert {name.rpartition(".")[2] for name in model.no_weight_decay()} == {"D", "A_log", "dt_bias"}
    for wrong in ({"num_heads": (3, 2, 4, 4)}, {"num_heads": (1, 2, 4, 3)}, {"ngroups": 2}, {"depths": (1, 1)}):
        with pytest.raises(ValueError, match="must"):
            timm.create_model("test_vssd", **wrong)


def test_initial_weights():
    torch.manual_seed(0)
    model = timm.create_model("test_vssd", embed_dim=32)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1), name
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, NonCausalSSD):
            assert module.A_log.exp().min() >= 1 and module.A_log.exp().max() <= 16
            assert F.softplus(module.dt_bias).min() >= 1e-3 and F.softplus(module.dt_bias).max() <= 0.1
            assert (module.D == 1).all()
