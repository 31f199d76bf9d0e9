import csv
import functools
from dataclasses import replace

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import vim  # noqa: F401  registers the models
from tests.tiny import load_tool
from vim.kernels import causal_conv1d, selective_scan
from vim.measure import FORMULAS, cost_of, count

IMAGE = (3, 224, 224)
PASSES = (torch.inference_mode, torch.no_grad, torch.enable_grad)


def on_meta(name, **options):
    with torch.device("meta"):
        return timm.create_model(name, **options).eval()


@pytest.mark.parametrize(
    ("name", "published", "inside", "scan"),
    [
        ("vim_tiny", 1.075, 0.218, 0.523),
        ("vim_small", 4.241, 0.610, 1.046),
        ("vim_base", 16.85, 1.917, 2.092),
        ("vim_tiny_stride8", 3.98, None, None),
        ("vim_small_stride8", 15.7, None, None),
    ],
)
def test_known_figures(name, published, inside, scan):
    counts = count(on_meta(name), IMAGE)
    assert counts.published_macs / 1e9 == pytest.approx(published, rel=1.5e-3)
    if inside is not None:
        assert (counts.macs - counts.published_macs) / 1e9 == pytest.approx(inside, abs=5e-4)
        assert counts.scan_flops / 1e9 == pytest.approx(scan, abs=5e-4)
    assert counts.flops == 2 * counts.macs + counts.scan_flops


@pytest.mark.parametrize(
    ("name", "published", "error"),
    [
        ("vmamba_tiny_v0", 5.6, 0.005),
        ("vmamba_base_v0", 18.0, 0.02),
        ("vmamba_tiny_s2l5", 4.9, 0.02),
        ("vmamba_small_s2l15", 8.7, 0.01),
        ("vmamba_tiny_s1l8", 4.9, 0.01),
        ("vmamba_base_s1l20", 15.2, 0.005),
        ("vssd_micro", 2.3, 0.04),  # which leave out one of the two products
        ("vssd_small", 7.4, 0.045),
        ("mambavision_t", 4.4, 0.015),
        ("mambavision_t2", 5.1, 0.01),
        ("mambavision_b", 15.0, 0.005),
        ("mambavision_l2_512", 196.3, 0.005),
        ("mambavision_l3", 122.3, 0.002),
    ],
)
def test_figures_of_other_conventions(name, published, error):
    model = on_meta(name)
    counts = count(model, (3, *model.img_size))
    assert counts.published_macs / 1e9 == pytest.approx(published, rel=error)


def test_scans_and_attention_by_hand():
    """One block of each kind, and what the figures differ by."""
    l, dim, e, n, r = 8 * 8, 16, 16, 1, 1
    model = on_meta("test_vmamba", embed_dims=(dim,), depths=(1,), img_size=32)
    counts = count(model, (3, 32, 32))
    assert counts.scan_flops == 4 * 9 * l * e * n
    assert (
        counts.macs - (counts.published_macs - counts.scan_flops) == 4 * l * r * e
    )  # zeros beside each route's weights

    model = on_meta("test_mambavision", depths=(1, 1, 1, 2), window_sizes=(3, 3), img_size=64)
    counts = count(model, (3, 64, 64))
    assert counts.scan_flops == 9 * 8 * (4 * 9 * 16 + 9 * 32)  # 4 x 4 tokens in 4 windows, 2 x 2 in one
    assert counts.macs - counts.published_macs == 2 * 9 * 9 * 64


def test_by_hand():
    l, d, e, n, r, w, depth = 197, 192, 384, 16, 12, 4, 24
    counts = count(on_meta("vim_tiny"), IMAGE)
    assert counts.published_macs == 196 * 16 * 16 * 3 * d + depth * l * 3 * d * e + d * 1000
    assert counts.macs - counts.published_macs == depth * 2 * l * e * (w + (r + 2 * n) + r)
    assert counts.scan_flops == depth * 2 * 9 * l * e * n


def test_by_hand_with_mamba2s_mixer():
    l, d, e, n, h, w, depth = 197, 192, 384, 64, 6, 4, 24
    counts = count(on_meta("vim_ssd_tiny"), IMAGE)
    projections = d * (2 * e + 2 * n + h) + e * d
    assert counts.published_macs == 196 * 16 * 16 * 3 * d + depth * l * projections + d * 1000
    assert counts.macs - counts.published_macs == depth * 2 * l * (e + 2 * n) * w
    assert counts.scan_flops == depth * 2 * 5 * l * e * n


@pytest.mark.parametrize("router", ["soft", "top1"])
def test_by_hand_with_experts(router):
    l, d, e, p, bare = 17, 64, 8, 16, on_meta("test_vim")
    cost = cost_of("test_vim", moe_every=2, num_experts=e, router=router)  # of three blocks the second has experts
    expert = 2 * d * 4 * d + 4 * d + d
    routing = d * e * p + 1 if router == "soft" else d * e
    before = sum(parameter.numel() for parameter in bare.parameters())
    assert cost.parameters == before + d + routing + e * expert
    assert cost.active_parameters == cost.parameters - (0 if router == "soft" else (e - 1) * expert)
    places = 3  # of an expert, for 1.25 / 8 of the tokens
    slots = e * p if router == "soft" else e * places
    products = slots * 2 * d * 4 * d + (3 * l * d * slots if router == "soft" else l * d * e)
    assert cost.macs == count(bare, (3, 64, 64)).macs + products


def test_directions():
    none, v1, v2 = (
        count(on_meta("test_vim", directions=directions), (3, 64, 64)) for directions in ("none", "v1", "v2")
    )
    assert none.published_macs == v1.published_macs == v2.published_macs
    assert none.macs == v1.macs < v2.macs  # "v1" convolves and projects once, and scans twice
    assert 2 * none.scan_flops == v1.scan_flops == v2.scan_flops


def test_images_of_a_batch_and_of_another_size():
    one, two = (count(on_meta("test_vim"), (3, 64, 64), batch_size) for batch_size in (1, 2))
    assert (two.published_macs, two.macs, two.scan_flops) == (2 * one.published_macs, 2 * one.macs, 2 * one.scan_flops)
    wide = count(on_meta("test_vim", img_size=(64, 128)), (3, 64, 128))
    assert wide.scan_flops * 17 == one.scan_flops * 33


def seen(forward, formulas, mode):
    with mode(), FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        forward()
    return counter.get_total_flops()


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", ["test_vim", "test_vim_ssd"])
def test_pytorch_alone_sees_no_scan(device, name):
    """Its hooks make the mixers call their convolutions, which it counts."""
    with torch.device(device):
        model, image = timm.create_model(name).eval(), torch.empty(1, 3, 64, 64).fill_(0)
    counts = count(model, (3, 64, 64))
    for mode in PASSES:
        assert seen(lambda: model(image), {}, mode) == counts.flops - counts.scan_flops
        assert seen(lambda: model(image), FORMULAS, mode) == counts.flops


@pytest.mark.parametrize("mode", PASSES)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_formulas(mode, device):
    b, k, l, d, g, n, w = 2, 3, 5, 8, 2, 4, 3
    with torch.device(device):
        u, delta = torch.zeros(b, k, l, d, requires_grad=True), torch.zeros(b, k, l, d)
        A, B, weight = torch.zeros(k, d, n), torch.zeros(b, k, l, g, n), torch.zeros(k, d, w)
    reverse = [False, True, False]
    for combine in ("none", "sum"):
        scan = seen(lambda c=combine: selective_scan(u, delta, A, B, B, reverse=reverse, combine=c), FORMULAS, mode)
        assert scan == 9 * b * k * l * d * n
    assert seen(lambda: causal_conv1d(u, weight, reverse=reverse), FORMULAS, mode) == 2 * b * k * l * d * w


class Scanner(nn.Module):
    """Scans, but is no mixer: nothing that it does is in a fused kernel."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 4)

    def forward(self, image):
        u = image.flatten(2).transpose(1, 2)  # (b, l, 8)
        B = self.proj(u)
        return selective_scan(u, u, u.new_zeros(8, 4), B, B)


def test_any_model_with_our_ops():
    counts = count(Scanner(), (8, 3, 5))
    assert (counts.published_macs, counts.macs, counts.scan_flops) == (15 * 8 * 4, 15 * 8 * 4, 9 * 15 * 8 * 4)


def test_models_without_our_ops():
    counts = count(on_meta("deit_tiny_patch16_224"), IMAGE)
    assert counts.macs / 1e9 == pytest.approx(1.254, abs=5e-4)  # attention too
    assert (counts.published_macs, counts.scan_flops) == (counts.macs, 0)
    assert count(nn.Identity(), IMAGE).flops == 0


def test_a_model_stays_as_it_is():
    torch.manual_seed(0)
    model = nn.Sequential(timm.create_model("test_vim", num_classes=8), nn.BatchNorm1d(8)).double()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = list(model.parameters())
    assert count(model, (3, 64, 64), batch_size=2).scan_flops == 2 * 1880064
    assert model.training
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


@pytest.fixture
def call(call):
    """Run the tool here: its exit status, output and errors."""
    return functools.partial(call, "model_info")


def cells(output):
    """The table's rows, by model."""
    rows = [[cell.strip() for cell in line.split("|")] for line in output.splitlines() if "|" in line]
    return {name: rest for name, *rest in rows}


def test_tool(call):
    status, output, errors = call("vim_tiny", "deit_tiny_patch16_224", "resnet18")
    assert (status, errors) == (0, "")
    rows = cells(output)
    assert rows["vim_tiny"] == ["7.15 M", "7.15 M", "3x224x224", "197", "1.075", "1.293", "0.523", "3.108"]
    assert rows["deit_tiny_patch16_224"] == ["5.72 M", "5.72 M", "3x224x224", "197", "1.254", "1.254", "0.000", "2.507"]
    assert rows["resnet18"][3] == "-"
    assert "https://github.com/state-spaces/mamba/issues/110" in output
    assert "Of one forward pass of one image." in output


def test_tool_without_names_takes_ours(call, monkeypatch):
    cost = cost_of("test_vim")  # counting all would take a minute
    monkeypatch.setattr(load_tool("model_info"), "cost_of", lambda name, *sizes: replace(cost, model=name))
    names = set(cells(call()[1]))
    assert {"vim_nano", "vim_tiny", "vim_base", "vmamba_tiny_s1l8", "mambar_large", "mambavision_l3_512"} <= names
    assert "deit_tiny_patch16_224" not in names


def test_tool_options(call, tmp_path):
    words = ("vim_tiny", "resnet18", "--img-size", 64, "--batch-size", 2, "--csv", tmp_path / "a.csv")
    status, output, errors = call(*words)
    assert (status, errors) == (0, "")
    assert "Of one forward pass of 2 images." in output
    with (tmp_path / "a.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    counts = count(on_meta("vim_tiny", img_size=64), (3, 64, 64), batch_size=2)
    assert (first["model"], first["input"], first["tokens"], first["batch_size"]) == ("vim_tiny", "3x64x64", "17", "2")
    assert [int(first[key]) for key in ("published_macs", "macs", "scan_flops")] == [
        counts.published_macs,
        counts.macs,
        counts.scan_flops,
    ]
    assert int(first["flops"]) == counts.flops
    assert (second["model"], second["input"], second["scan_flops"]) == ("resnet18", "3x64x64", "0")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("vim_tini", "no such model: vim_tini (the closest: vim_tiny"),
        ("qqqqqqqqq", "no such model: qqqqqqqqq (the closest: none)"),
        ("vim_tiny.nothing", "cannot run vim_tiny.nothing at its own pixels: Invalid pretrained tag (nothing)"),
        ("vim_tiny --img-size 4", "cannot run vim_tiny at 4 pixels: img_size must be at least the patch size"),
        ("inception_v3 --img-size 4", "cannot run inception_v3 at 4 pixels: "),
        ("vim_tiny --options moe_every", "argument --options: expected KEY=VALUE, got 'moe_every'"),
        ("vim_tiny --options moe_evry=2", "cannot run vim_tiny at its own pixels: "),
        ("vim_tiny --options num_experts=2", "cannot run vim_tiny at its own pixels: num_experts must be left out"),
        ("--img-size 0", "--img-size must be at least 1, got 0"),
        ("--batch-size -1", "--batch-size must be at least 1, got -1"),
        ("test_vim --csv nothing/a.csv", "nothing/a.csv: No such file or directory"),
    ],
)
def test_tool_mistakes(words, message, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, errors = call(*words.split())
    assert status == 2
    assert errors.startswith(f"error: {message}")
    assert errors.count("\n") == 1
