import pytest
import timm
import torch

import vim  # noqa: F401  registers the models
from tests.golden.check import FAST_BACKENDS, check_keys, check_outputs, load_cases, published_weights
from vim.checkpoints import load_pretrained
from vim.errors import UserError
from vim.layers import insert_registers, split_registers

CASES = {name: case for name, case in load_cases("families.json").items() if name.startswith("mambar_")}
COUNTS = {  # parameters and tensors
    "mambar_tiny": (9_264_232, 416),
    "mambar_small": (27_801_064, 418),
    "mambar_base": (99_301_096, 418),
    "mambar_large": (341_222_376, 826),
}


@pytest.mark.parametrize("name", COUNTS)
def test_sizes(name):
    model = timm.create_model(name, device="meta")
    assert (sum(p.numel() for p in model.parameters()), len(model.state_dict())) == COUNTS[name]


@pytest.fixture(scope="module", params=CASES)
def golden(request, tmp_path_factory):
    case = CASES[request.param]
    path = tmp_path_factory.mktemp("golden") / "published.pth"
    torch.save({"model": published_weights(case)}, path)
    model = timm.create_model(case["name"])
    load_pretrained(model, path)
    return case, model.eval()


def test_published_keys_and_shapes(golden):
    check_keys(*golden)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_published_outputs(golden, backend, monkeypatch):
    monkeypatch.setenv("VIM_BACKEND", backend)
    check_outputs(*golden)


@pytest.mark.parametrize(
    ("patches", "m", "places"),
    [
        (196, 12, [15, 31, 47, 63, 79, 95, 111, 127, 143, 159, 175, 191]),
        (196, 16, [11, 23, 35, 47, 59, 71, 83, 95, 107, 119, 131, 143, 155, 167, 179, 191]),
        (576, 12, [45 * i + 44 for i in range(12)]),
        (4, 1, [2]),  # the middle, as Vim's class token
        (2, 3, [0, 1, 2]),
    ],
)
def test_places_of_the_registers(patches, m, places):
    sequence = insert_registers(torch.zeros(1, patches, 1), torch.ones(1, m, 1))
    assert sequence.flatten().nonzero().flatten().tolist() == places
    numbered = torch.arange(patches + m).view(1, -1, 1)
    found, registers = split_registers(numbered, m)
    assert registers.flatten().tolist() == places
    assert torch.equal(insert_registers(found, registers), numbered)


@torch.no_grad()
def test_one_register_is_vims_class_token():
    torch.manual_seed(0)
    vim_, model = (timm.create_model(f"test_{name}").eval() for name in ("vim", "mambar"))
    model = timm.create_model("test_mambar", num_registers=1, neck_reduction=1).eval()
    weights = vim_.state_dict()
    table = weights.pop("pos_embed")
    weights["pos_embed_cls"], weights["pos_embed"] = table[:, 8:9], torch.cat([table[:, :8], table[:, 9:]], 1)
    model.load_state_dict(weights)
    image = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(image), vim_(image))


@torch.no_grad()
def test_another_size_moves_the_registers():
    torch.manual_seed(0)
    dynamic = timm.create_model("test_mambar", dynamic_img_size=True).eval()
    fixed = timm.create_model("test_mambar").eval()
    fixed.load_state_dict(dynamic.state_dict())
    fixed.set_input_size((96, 80))
    image = torch.randn(1, 3, 96, 80)
    torch.testing.assert_close(dynamic(image), fixed(image))
    features, (map_,) = fixed.forward_intermediates(image, indices=[2], norm=True)
    (_, registers), = fixed.forward_intermediates(
        image, indices=[2], norm=True, intermediates_only=True, return_prefix_tokens=True
    )  # fmt: skip
    run = 30 // 4
    places = [(i + 1) * run + i for i in range(3)]
    torch.testing.assert_close(registers, features[:, places])
    rest = [i for i in range(33) if i not in places]
    torch.testing.assert_close(map_.flatten(2).transpose(1, 2), features[:, rest])


def test_the_head_reads_every_register():
    model = timm.create_model("test_mambar", num_classes=7)
    assert (model.num_features, model.head_hidden_size, model.head.weight.shape) == (64, 96, (7, 96))
    image = torch.randn(2, 3, 64, 64)
    assert model.forward_head(model.forward_features(image), pre_logits=True).shape == (2, 96)
    model.reset_classifier(3)
    assert model(image).shape == (2, 3)
    model.reset_classifier(0, "")
    assert model(image).shape == (2, 19, 64)
    model.reset_classifier(3, "avg")
    assert (model.head_hidden_size, model(image).shape) == (64, (2, 3))
    model(image).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with pytest.raises(ValueError, match="embed_dim must be a multiple of neck_reduction, 3, got 64"):
        timm.create_model("test_mambar", neck_reduction=3)


def test_published_weights_without_a_head(golden, tmp_path):
    case, model = golden
    torch.save({"model": published_weights(case)}, tmp_path / "a.pth")
    headless = timm.create_model(case["name"], num_classes=0).eval()
    load_pretrained(headless, tmp_path / "a.pth")
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        _, registers = split_registers(model.forward_features(image), 12)
        torch.testing.assert_close(headless(image), registers.mean(1))


def test_initial_weights_and_what_is_not_decayed():
    model = timm.create_model("test_mambar", num_registers=50, embed_dim=256)
    for parameter in (model.cls_token, model.pos_embed_cls, model.pos_embed, model.neck.weight, model.head.weight):
        assert parameter.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.no_weight_decay() == {"cls_token", "pos_embed", "pos_embed_cls"}


def test_weights_of_another_image_size(tmp_path):
    """The table has no rows of registers."""
    trained = timm.create_model("test_mambar", img_size=(64, 96))
    torch.save({"model": trained.state_dict()}, tmp_path / "a.pth")
    overlay = {"file": str(tmp_path / "a.pth"), "input_size": (3, 64, 96)}
    model = timm.create_model("test_mambar", pretrained=True, pretrained_cfg_overlay=overlay, img_size=(32, 128))
    table = trained.pos_embed.unflatten(1, (4, 6)).movedim(-1, 1)
    want = torch.nn.functional.interpolate(table, (2, 8), mode="bicubic").flatten(2).transpose(1, 2)
    torch.testing.assert_close(model.pos_embed, want)
    assert torch.equal(model.pos_embed_cls, trained.pos_embed_cls)


def test_weights_for_another_pooling(tmp_path):
    """The head is as wide as what is pooled, so the file's cannot be kept, but can be replaced."""
    torch.save(timm.create_model("test_mambar", num_classes=1000).state_dict(), tmp_path / "weights.pth")
    options = {"pretrained": True, "pretrained_cfg_overlay": {"file": tmp_path / "weights.pth"}, "global_pool": "avg"}
    assert timm.create_model("test_mambar", num_classes=7, **options).head.weight.shape == (7, 64)
    with pytest.raises(UserError, match="global_pool must be the file's, or num_classes 0"):
        timm.create_model("test_mambar", **options)
