import pytest
import torch
from PIL import Image

from vim.engine import timing
from vim.engine.benchmark import (
    JointTransformer,
    compare,
    compare_clips,
    compare_decoding,
    compare_layers,
    compare_models,
    compare_routes,
    compare_scans,
    plot,
)
from vim.engine.files import write_csv
from vim.errors import UserError
from vim.kernels import available_backends


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts what is on the GPU")
def test_peak_memory_is_of_what_lives_at_once():
    def one_after_the_other():
        for _ in range(3):
            torch.empty(1000, 1000)

    def together():
        return [torch.empty(1000, 1000) for _ in range(3)]

    assert timing.peak_memory(one_after_the_other) == 4_000_000
    assert timing.peak_memory(together) == 12_000_000


def test_medians_of_calls_in_turns(monkeypatch):
    calls = []
    clock = iter(range(1000))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    medians = timing.side_by_side({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2)
    assert calls == ["a", "b", "a", "b", "a", "b"]
    assert medians == {"a": 1, "b": 1}


def test_speeds_are_relative_to_the_last(monkeypatch):
    monkeypatch.setattr("vim.engine.benchmark.side_by_side", lambda runs, rounds: {"fast": 0.5, "slow": 2.0})
    fast, slow = compare(dict.fromkeys(("fast", "slow"), list), run="forward", batch_size=4, size=1, rounds=1)
    assert (fast.baseline, fast.speed, fast.per_second, fast.milliseconds) == ("slow", 4, 8, 500)
    assert slow.speed == 1


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
    torch.manual_seed(0)
    plain, fused = (JointTransformer(2, img_size=32, fused=fused, depth=2).eval() for fused in (False, True))
    fused.load_state_dict(plain.state_dict())
    clip = torch.randn(1, 3, 2, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(plain(clip), fused(clip))


def test_routes():
    rows = compare_routes("cpu", shapes=[(9, 8)], rounds=1)
    assert [row.run for row in rows] == ["forward", "forward", "forward+backward", "forward+backward"]
    assert {row.baseline for row in rows} == {"four routes, four calls"}


def test_decoding():
    rows = compare_decoding(seconds=1, size=(96, 64), frames=3, rounds=1)
    assert {"vim.data.read_video", "PyAV"} <= {row.name for row in rows}
    assert all(row.milliseconds > 0 and row.baseline == "PyAV" for row in rows)


def test_layers():
    rows = compare_layers("cpu", shapes={"tiny": (1, 2, 5, 8)}, states=2, rounds=1)
    names = available_backends("cpu")
    expected = {f"tiny, {name}" for name in (*names, "copy")}
    for run in ("forward", "forward+backward"):
        assert expected <= {row.name for row in rows if row.run == run}
    assert all(row.milliseconds > 0 and row.baseline == "tiny, copy" for row in rows)
