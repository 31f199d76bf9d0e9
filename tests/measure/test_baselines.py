"""Ways to mix tokens: what they compute, what is counted, and what a comparison of them says."""

import csv
import math

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from vim.measure import FORMULAS, baselines, compare_baselines
from vim.measure.baselines import ATTENTION, Baseline, crossover, crossovers, linear_attention, mixings_of
from vim.measure.ops import PASSES

MATH, FLASH, *_ = ATTENTION


def mixings(l, d, dtype=torch.float32):
    return mixings_of(l, d, device="cpu", dtype=dtype, backends=[MATH, FLASH])


def test_linear_attention():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 5, 4, dtype=torch.float64)
    phi = [torch.where(x > 0, x + 1, x.exp()) for x in (q, k)]
    for h in range(2):
        for i in range(5):
            weights = torch.stack([phi[0][h, i] @ phi[1][h, j] for j in range(5)])
            wanted = sum(weights[j] / weights.sum() * v[h, j] for j in range(5))
            torch.testing.assert_close(linear_attention(q[None], k[None], v[None])[0, h, i], wanted)


def test_every_token_sees_all_others():
    for name, (op, inputs, _) in mixings(6, 128).items():
        values = next(key for key in ("v", "x") if key in inputs)
        before = op(**inputs).detach()
        for token in (0, 5):
            changed = inputs[values].clone()
            changed[..., token, :] += 1
            moved = (op(**{**inputs, values: changed}) - before).detach().abs()
            by_token = moved.movedim(-2, 0).flatten(1).sum(1)
            assert (by_token > 1e-4 * by_token.max()).all(), name  # more than rounding


@pytest.mark.parametrize(("l", "d"), [(40, 64), (24, 128)])
def test_counts(l, d):
    """The counter sees the sums of linear attention as well, and of S4D only the products that make kernels."""
    counted = mixings(l, d)
    assert counted.pop("attention, flash").flops == counted["attention, math"].flops  # the counter does not know it
    for name, (op, inputs, flops) in counted.items():
        with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter, torch.no_grad():
            op(**inputs)
        if name == "linear attention":
            assert counter.get_total_flops() == flops + 2 * l * d
        elif name == "S4D by FFT":
            side = math.ceil(math.sqrt(l))
            assert counter.get_total_flops() == 4 * side * -(-l // side) * d * 64
            assert flops == 15 * l * math.log2(2 * l) * d + 4 * l * d * 64
        else:
            assert counter.get_total_flops() == flops > 0, name


class Ops(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_the_backend_that_a_row_names_is_the_one_that_runs():
    assert baselines.sdpa_backends("cpu", torch.float32) == [MATH, FLASH]
    for backend in (MATH, FLASH):
        op, inputs, _ = mixings(4, 64)[f"attention, {ATTENTION[backend]}"]
        with Ops() as ops:
            op(**inputs)
        flash = {name for name in ops.names if "flash" in name}
        assert flash == ({"_scaled_dot_product_flash_attention_for_cpu"} if backend == FLASH else set())


def test_rows():
    rows = list(compare_baselines([8, 4], [64, 128], device="cpu", amp="bf16", rounds=1))
    names = list(mixings(4, 64))
    assert [name.partition(",")[0] for name in names] == [
        *("attention", "attention", "linear attention", "S4D by FFT", "selective scan", "ssd")
    ]
    wanted = [(d, l, run, name) for d in (64, 128) for l in (4, 8) for run in PASSES for name in names]
    assert [(row.width, row.tokens, row.run, row.name) for row in rows] == wanted
    for row in rows:
        flops = mixings(row.tokens, row.width)[row.name].flops * (3 if row.run == PASSES[1] else 1)
        assert row.gflops_per_second == pytest.approx(flops / row.milliseconds / 1e6)
        assert row.peak_mb > 0 and not row.skipped


def test_an_op_is_skipped_whose_memory_would_not_do(monkeypatch):
    """Plain attention's grows with the square of the tokens."""

    def peak(run):
        op, inputs, _ = run.args
        l = inputs["q"].shape[2] if "q" in inputs else inputs["x"].shape[1]
        plain = getattr(op, "keywords", {}).get("backend") == MATH
        return 1e6 * l * l if plain else 1e6 * l

    monkeypatch.setattr(baselines, "side_by_side", lambda runs, rounds, of_all: dict.fromkeys(runs, 1.0))
    monkeypatch.setattr(baselines, "peak_memory", peak)
    monkeypatch.setattr(baselines, "free_memory", lambda device: 3.9e9)
    rows = list(compare_baselines([16, 32, 64], [64], device="cpu", amp="no", rounds=1))
    skipped = [row for row in rows if row.skipped]
    assert [(row.name, row.run, row.tokens) for row in skipped] == [("attention, math", run, 64) for run in PASSES]
    assert skipped[0].skipped == "needs about 4.1 GB, 3.9 GB are free"
    assert (skipped[0].milliseconds, skipped[0].peak_mb, skipped[0].gflops_per_second) == (None, None, None)
    assert str(skipped[0]).endswith("64     64  skipped: needs about 4.1 GB, 3.9 GB are free")


def test_crossovers():
    lengths = (100, 400, 1600, 6400)
    linear, square = ({l: scale * l**power for l in lengths} for scale, power in ((1.0, 1), (1 / 900, 2)))
    assert crossover(linear, square) == pytest.approx(900)
    assert crossover(square, linear) == math.inf
    assert crossover({l: t / 20 for l, t in linear.items()}, square) == 0
    assert crossover(linear, {l: square[l] for l in lengths[:3]}) == pytest.approx(900)  # the last is missing
    assert crossover(linear, {}) == math.inf
    dips = {100: 0.5, 400: 2.0, 1600: 2.0, 6400: 0.5}  # below, above, below: from where it stays below
    assert crossover(dips, dict.fromkeys(lengths, 1.0)) == pytest.approx(3200)

    rows = [
        Baseline(name, "forward", 64, l, times[l])
        for name, times in {"attention, math": square, "linear attention": dict.fromkeys(lengths, 1e9)}.items()
        for l in lengths
    ]
    rows += [Baseline("S4D by FFT", "forward", 64, l, 4 * linear[l]) for l in lengths]
    rows += [Baseline("selective scan, cpu", "forward", 64, l, linear[l]) for l in lengths]
    rows += [Baseline("ssd, cpu", "forward", 64, l, 1e10) for l in lengths]
    head, s4d, scan, ssd = crossovers(rows).splitlines()
    assert head.split("  ")[-1].strip() == "linear attention"
    assert s4d.endswith("from 3600 tokens       at every length")
    assert scan.endswith("from 900 tokens       at every length")
    assert ssd.endswith("at no length          at no length")


def test_tool(call, tmp_path):
    words = ("baselines", "--tokens", 4, 8, "--width", 64, "--device", "cpu", "--rounds", 1)
    status, output, errors = call("benchmark", *words, "--csv", tmp_path / "a.csv", "--plot", tmp_path / "a.png")
    assert (status, errors) == (0, "")
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 6
    assert output.count("forward+backward") >= 2 * 6
    assert baselines.COUNTS in output
    assert "faster than" in output
    Image.open(tmp_path / "a.png").verify()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("baselines --tokens 0", "tokens and rounds must be at least 1, got 0"),
        ("baselines --rounds 0", "tokens and rounds must be at least 1, got 0"),
        ("--rounds 0 baselines", "tokens and rounds must be at least 1, got 0"),
        ("baselines --width 96", "a width must be a multiple of 64, the channels of a head, got 96"),
        ("baselines --device nothing", "there is no device nothing here"),
    ],
)
def test_tool_mistakes(words, message, call):
    status, _, errors = call("benchmark", *words.split())
    assert status == 2
    assert errors.startswith(f"error: {message}")
