import pytest
import torch
from PIL import Image
from timm.layers import use_fused_attn

from vim.engine.files import write_csv
from vim.errors import UserError
from vim.kernels import available_backends
from vim.measure import (
    compare_clips,
    compare_decoding,
    compare_layouts,
    compare_models,
    compare_routes,
    compare_scans,
    compare_ssd,
    plot,
    timing,
)
from vim.measure.compare import compare
from vim.measure.models import attention, autocast, train_step
from vim.measure.ops import PASSES, routes, scan_routes
from vim.measure.videos import JointTransformer


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts what is on the GPU")
def test_peak_memory_is_of_what_lives_at_once():
    def one_after_the_other():
        for _ in range(3):
            torch.empty(1000, 1000)

    def together():
        return [torch.empty(1000, 1000) for _ in range(3)]

    assert timing.peak_memory(one_after_the_other) == 4_000_000
    assert timing.peak_memory(together) == 12_000_000


@pytest.fixture
def clock(monkeypatch):
    """A clock that only `sleep` moves: the times of a run's calls, one after the other."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def run(*times):
        left = iter(times)

        def call():
            now[0] += next(left)

        return call

    return run


def test_runs_take_turns(clock):
    calls = []
    timing.side_by_side({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2)
    assert calls == ["a", "b", *["a", "a", "b", "b"] * 2]


def test_the_second_of_two_short_calls_is_timed_and_the_median_taken(clock):
    warm_up = 100
    runs = {"a": clock(warm_up, 0.4, 0.1, 0.4, 0.3, 0.4, 0.2), "b": clock(warm_up, 0.5, 7, 6)}
    medians = timing.side_by_side(runs, rounds=3)
    assert medians == pytest.approx({"a": 0.2, "b": 6})  # b is long: one call a round


def test_speeds_are_relative_to_the_last(monkeypatch):
    monkeypatch.setattr("vim.measure.compare.side_by_side", lambda runs, rounds: {"fast": 0.5, "slow": 2.0})
    fast, slow = compare(dict.fromkeys(("fast", "slow"), list), run="forward", batch_size=4, size=1, rounds=1)
    assert (fast.baseline, fast.speed, fast.per_second, fast.milliseconds) == ("slow", 4, 8, 500)
    assert slow.speed == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts what is on the GPU")
def test_memory_is_in_megabytes():
    (row,) = compare({"a": lambda: torch.empty(1000, 1000)}, run="forward", batch_size=1, size=1, rounds=1)
    assert row.peak_mb == 4


def test_a_training_step_updates_the_model():
    model = torch.nn.Linear(3, 2)
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    image, labels = torch.randn(4, 3), torch.tensor([0, 1, 1, 1])
    loss = torch.nn.functional.cross_entropy(model(image), labels)
    (grad,) = torch.autograd.grad(loss, [model.weight])
    train_step(model, optimizer, image, labels, autocast("cpu", "no"))
    torch.testing.assert_close(model.weight, before - 0.1 * grad)
    assert model.weight.grad is None  # the next step starts anew
    assert autocast("cpu", "fp16")().fast_dtype == torch.float16
    assert autocast("cpu", "bf16")().fast_dtype == torch.bfloat16


def test_models_and_scans(tmp_path):
    rows = compare_models(["test_vim", "resnet18"], img_size=32, batch_size=2, device="cpu", amp="bf16", rounds=1)
    assert [(row.name, row.run) for row in rows] == [
        ("test_vim", "forward"),
        ("resnet18", "forward"),
        ("test_vim", "training step"),
        ("resnet18", "training step"),
    ]
    assert rows[2].peak_mb > rows[0].peak_mb > 0
    rows += compare_models(["videomamba_tiny_f8"], img_size=16, batch_size=1, device="cpu", amp="no", rounds=1)
    rows += compare_scans(1, "cpu", tokens=5, channels=4, states=2, rounds=1)
    assert {row.baseline for row in rows[6:]} == {"scan, reference"}
    assert {row.name for row in rows[6:]} == {f"scan, {name}" for name in available_backends()}
    plot(rows, tmp_path / "plot.png")
    Image.open(tmp_path / "plot.png").verify()
    write_csv(tmp_path / "rows.csv", [vars(row) for row in rows])
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 1 + len(rows)


def test_a_model_or_a_size_that_does_not_exist():
    options = {"batch_size": 1, "device": "cpu", "amp": "no", "rounds": 1}
    with pytest.raises(UserError, match=r"cannot build vim_huge at 64 pixels: Unknown model \(vim_huge\)"):
        compare_models(["vim_huge"], img_size=64, **options)
    with pytest.raises(UserError, match=r"cannot build test_vim at 8 pixels: img_size must be at least the patch"):
        compare_models(["test_vim"], img_size=8, **options)


def test_clips():
    rows = compare_clips("cpu", frames=(1, 2), img_size=32, rounds=1)
    assert [(row.name, row.size) for row in rows] == [
        ("videomamba_tiny", 4),
        ("videomamba_tiny", 8),
        ("joint ViT, plain attention", 8),
        ("joint ViT", 8),
    ]


def test_plain_attention_computes_the_same():
    torch.manual_seed(0)
    models, before = [], use_fused_attn()
    for fused in (True, False):
        with attention(fused=fused):
            models.append(JointTransformer(2, img_size=32, depth=2).eval())
    fused, plain = models
    assert [block.attn.fused_attn for block in (plain.blocks[0], fused.blocks[0])] == [False, True]
    assert use_fused_attn() == before
    fused.load_state_dict(plain.state_dict())
    clip = torch.randn(1, 3, 2, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(plain(clip), fused(clip))


def test_one_call_for_four_routes_computes_what_four_calls_do():
    together, alone = routes(9, 8, "cpu")
    (y,) = scan_routes([together], True)  # (1, l, 2 d), summed over the directions
    forwards, backwards = (torch.cat(scan_routes(alone[i : i + 2], True), dim=-1) for i in (0, 2))
    torch.testing.assert_close(y, forwards + backwards)


def test_layouts_are_compared():
    rows = compare_layouts("cpu", shapes=[(1, 8, 9, 2)], rounds=1)
    assert [(row.name, row.run) for row in rows] == [
        ("selective_scan_cuda_oflex.fwd", "forward"),
        ("selective_scan_fn", "forward"),
        ("vim.kernels", "forward"),
        ("selective_scan_fn", "forward+backward"),
        ("vim.kernels", "forward+backward"),
    ]


def test_state_space_duality_beside_the_scan():
    rows = compare_ssd(1, "cpu", tokens=[5], rounds=1)
    backends = dict.fromkeys(("chunked", available_backends()[-1]))
    names = [f"ssd, {backend}, {n} states" for n in (64, 16) for backend in backends] + ["scan, 16 states"]
    assert [(row.name, row.run) for row in rows] == [(name, run) for run in PASSES for name in names]
    assert {row.baseline for row in rows} == {"scan, 16 states"}


def test_routes():
    rows = compare_routes("cpu", shapes=[(9, 8)], rounds=1)
    assert [row.run for row in rows] == ["forward", "forward", "forward+backward", "forward+backward"]
    assert {row.baseline for row in rows} == {"four routes, four calls"}


def test_decoding():
    rows = compare_decoding(seconds=1, size=(96, 64), frames=3, rounds=1)
    assert {"vim.data.read_video", "PyAV"} <= {row.name for row in rows}
    assert all(row.milliseconds > 0 and row.baseline == "PyAV" for row in rows)
