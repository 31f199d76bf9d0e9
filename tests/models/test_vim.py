import os
import subprocess
import sys

import pytest
import timm
import torch

import vim
from tests.golden.check import check_keys, check_outputs, load_cases, published_weights

CASES = load_cases("vim.json")
COUNTS = {
    "vim_tiny": 7_148_008,
    "vim_tiny_stride8": 7_250_344,
    "vim_small": 25_796_584,
    "vim_small_stride8": 26_001_256,
    "vim_base": 97_598_440,
    "vim_ssd_tiny": 6_442_312,
    "vim_ssd_small": 23_525_032,
    "vim_s4d_tiny": 5_128_168,
}
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_classes": 5}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_count(name):
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]


def test_small_ones_are_small():
    for name, most in (
        ("test_vim", 300_000),
        ("test_vim_ssd", 300_000),
        ("test_vim_moe", 500_000),
        ("test_vim_s4d", 300_000),
        ("vim_nano", 500_000),
    ):
        assert sum(p.numel() for p in timm.create_model(name).parameters()) < most


@pytest.fixture(scope="module", params=CASES)
def golden(request, tmp_path_factory):
    """A published model: the case, and the model with its weights loaded from a file of the published layout."""
    case = CASES[request.param]
    path = tmp_path_factory.mktemp("golden") / "published.pth"
    torch.save({"model": published_weights(case)}, path)
    model = timm.create_model(case["name"], pretrained=True, pretrained_cfg_overlay={"file": str(path)})
    return case, model.eval()


def test_published_keys_and_shapes(golden):
    check_keys(*golden)


def test_published_outputs(golden, backend, monkeypatch):
    monkeypatch.setenv("VIM_BACKEND", backend)
    check_outputs(*golden)


@pytest.mark.parametrize("class_token", ["middle", "first", "ends", "none"])
@pytest.mark.parametrize(
    "options", [{}, {"stride": 4}, {"img_size": (40, 24)}, {"in_chans": 1}, {"mixer": "ssd", "head_dim": 8}], ids=str
)
def test_variants(class_token, options):
    model = timm.create_model("test_vim", **{**SMALL, "class_token": class_token, **options})
    size = options.get("img_size", (32, 32))
    image = torch.randn(2, options.get("in_chans", 3), *size)
    logits = model(image)
    assert logits.shape == (2, 5)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    rows, columns = model.patch_embed.grid_size
    assert model.forward_features(image).shape[1] == rows * columns + model.num_prefix_tokens


@pytest.mark.parametrize("class_token", ["middle", "first", "ends", "none"])
def test_dynamic_image_size_is_the_resized_model(class_token):
    torch.manual_seed(0)
    options = {**SMALL, "class_token": class_token}
    dynamic = timm.create_model("test_vim", dynamic_img_size=True, **options).eval()
    fixed = timm.create_model("test_vim", **options).eval()
    fixed.load_state_dict(dynamic.state_dict())
    fixed.set_input_size((48, 40))
    image = torch.randn(1, 3, 48, 40)
    torch.testing.assert_close(dynamic(image), fixed(image))


def test_another_image_size_is_refused():
    with pytest.raises(AssertionError, match="32 x 32 pixels expected: set img_size, or dynamic_img_size=True"):
        timm.create_model("test_vim", **SMALL)(torch.randn(1, 3, 40, 32))
    with pytest.raises(ValueError, match="img_size must be at least the patch size"):
        timm.create_model("test_vim", **{**SMALL, "img_size": 6})


def test_loading_resizes_the_position_table(tmp_path):
    path = tmp_path / "published.pth"
    trained = timm.create_model("test_vim", **SMALL)
    torch.save({"model": trained.state_dict()}, path)
    overlay = {"file": str(path), "num_classes": 5}
    larger = timm.create_model(
        "test_vim", pretrained=True, pretrained_cfg_overlay=overlay, **{**SMALL, "img_size": (48, 64)}
    )
    trained.set_input_size((48, 64))
    assert torch.equal(larger.pos_embed, trained.pos_embed)


def test_pools():
    model = timm.create_model("test_vim", **SMALL).eval()
    tokens = model.forward_features(torch.randn(2, 3, 32, 32))
    assert torch.equal(model.pool(tokens), tokens[:, 8])
    patches = torch.cat([tokens[:, :8], tokens[:, 9:]], 1)
    model.reset_classifier(0, "avg")
    torch.testing.assert_close(model.pool(tokens), patches.mean(1))
    with pytest.raises(AssertionError, match="needs a class token"):
        timm.create_model("test_vim", **SMALL, class_token="none", global_pool="token")


def test_drop_path_rates_grow_from_none_to_all_of_it():
    model = timm.create_model("test_vim", drop_path_rate=0.2, **{**SMALL, "depth": 5})
    rates = [getattr(layer.drop_path, "drop_prob", 0.0) for layer in model.layers]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


def test_weight_decay_and_layer_groups():
    from timm.optim import create_optimizer_v2, param_groups_layer_decay

    model = timm.create_model("test_vim", wd_exempt_A=True, **SMALL)
    names = dict(model.named_parameters())
    assert model.no_weight_decay() <= names.keys()
    kept = {
        id(p)
        for g in create_optimizer_v2(model, weight_decay=0.1).param_groups
        if g["weight_decay"]
        for p in g["params"]
    }
    for name, parameter in names.items():
        exempt = parameter.ndim < 2 or name in ("pos_embed", "cls_token") or "A_" in name
        assert (id(parameter) in kept) == (not exempt), name
    published = timm.create_model("test_vim", **SMALL)
    assert not any("A_" in name for name in published.no_weight_decay())
    scales = {s for g in param_groups_layer_decay(model, layer_decay=0.5) for s in [g["lr_scale"]]}
    assert scales == {1.0, 0.5, 0.25, 0.125}  # head and norm, two blocks, the stem


def test_init_weights_after_to_empty():
    torch.manual_seed(0)
    made = timm.create_model("test_vim")
    empty = timm.create_model("test_vim", device="meta").to_empty(device="cpu")
    empty.init_weights()
    for (name, a), b in zip(made.named_parameters(), empty.parameters(), strict=True):
        assert b.isfinite().all(), name
        assert a.std().item() == pytest.approx(b.std().item(), rel=0.35, abs=1e-6), name


def test_checkpointing_gives_the_same_gradients():
    model, image = timm.create_model("test_vim", **SMALL), torch.randn(2, 3, 32, 32)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(image).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("options", [{}, *({"mixer": "ssd", "head_dim": 8, "directions": d} for d in ("v2", "hydra"))])
def test_compile_and_export(options):
    model, image = timm.create_model("test_vim", **SMALL, **options).eval(), torch.randn(2, 3, 32, 32)
    want = model(image)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(image), want)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (image,), dynamic_shapes=({0: batch},), strict=False)
    torch.testing.assert_close(program.module()(image[:1]), model(image[:1]))


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="if_devide_out"):
        timm.create_model("test_vim", if_devide_out=True)


def test_import_needs_only_torch_and_timm():
    heavy = ("mmengine", "accelerate", "decord", "av", "sklearn", "matplotlib")
    code = f"import sys, vim; sys.exit(any(name in sys.modules for name in {heavy}))"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": ""})
    assert vim.__version__
