"""The GPU command, rehearsed: every stage at toy shapes, on a GPU where there is one, else in Triton's interpreter."""

import math
import os
import stat
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
from tests.interpreter import needs_loops  # noqa: E402
from vim.kernels import selective_scan  # noqa: E402
from vim.measure.gpu import STAGES, card, check, command, correct, large, models, ops, profile, train, tune, usage  # noqa: E402
from vim.measure.gpu.check import Check, compare  # noqa: E402
from vim.measure.gpu.inputs import alternating, draw_scan  # noqa: E402
from vim.measure.gpu.shapes import REAL, TOY, Scan, Ssd  # noqa: E402
from vim.measure.gpu.stage import Failure, Stage, append, read  # noqa: E402
from vim.measure.gpu.table import LAYER, LONG, LONG_SSD, TARGETS, passed, table  # noqa: E402
from vim.measure.models import attention  # noqa: E402

ON_CPU = pytest.mark.skipif(card.DEVICE == "cuda", reason="for a machine without a GPU")


@pytest.fixture
def rehearse(tmp_path, monkeypatch):
    """Run a stage at toy shapes: its rows of a kind, and its failures."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # the stage changes it
    for module in (check, correct, large, usage):
        if hasattr(module, "new_seed"):
            monkeypatch.setattr(module, "new_seed", lambda: 1)

    def rehearse(module, kind, **options):
        stage = Stage("stage", tmp_path, end=time.monotonic() + 600, rehearse=True, **options)
        module.run(stage)
        return read(stage.file, kind), read(stage.file, Failure)

    return rehearse


@needs_loops
def test_correct(rehearse):
    checks, failures = rehearse(correct, Check)
    assert failures == []
    assert [check.case for check in checks if not check.passed] == []
    names = {check.case.split("(")[0].strip() for check in checks}
    assert names >= {
        "reference",
        "scan Scan",
        "ssd Ssd",
        "torch.compile, ssd",
        "CUDA graph, ssd",
        "conv Conv",
        "norm Norm",
        "torch.compile",
        "CUDA graph",
        "checkpointing",
    }
    assert names >= {"test_vim, amp bf16", "scan, 2^31 elements", "scan, 2^31 elements of an image"}


@needs_loops
def test_ops(rehearse):
    rows, failures = rehearse(ops, ops.OpTime)
    assert {row.case for row in failures} <= {"scan, mamba_ssm", "scan, mambapy"}
    expected = [(op, by, run) for op, by, _, runs in ops.COMPARED if by not in ops.PACKAGES for run in runs]
    for layer in TOY.layers:
        assert [(row.op, row.by, row.run) for row in rows if row.layer == layer] == expected
    for layer in TOY.ssd_layers:
        expected = [(op, by, run) for op, by, _, runs in ops.SSD_COMPARED for run in runs]
        assert [(row.op, row.by, row.run) for row in rows if row.layer == layer] == expected
    assert all(row.milliseconds > 0 and row.bandwidth > 0 for row in rows)
    assert all((row.exponentials > 0) == (row.op in ("scan", "ssd")) for row in rows)
    assert all((row.products > 0) == (row.op == "ssd") for row in rows)


def test_models(rehearse, monkeypatch):
    fused = []
    monkeypatch.setattr(models, "attention", lambda **options: fused.append(options["fused"]) or attention(**options))
    rows, failures = rehearse(models, models.ModelTime)
    assert failures == []
    assert fused == [case.attention == "fused" for case in TOY.models]
    assert [(row.name, row.run, row.attention, row.mode) for row in rows] == [
        (case.name, case.run, case.attention, case.mode) for case in TOY.models
    ]


@needs_loops
def test_tune(rehearse, tmp_path):
    rows, failures = rehearse(tune, tune.Tuned)
    assert failures == []
    assert [row.layer for row in rows] == [*TOY.layers, *TOY.ssd_layers]
    assert [row.op for row in rows] == ["scan", "scan", "ssd"]
    rows = [row for row in rows if row.op == "scan"]
    fast = [
        replace(row, key=(1, i, 3, 1, 2), milliseconds=1.0, default_milliseconds=1.0 + i) for i, row in enumerate(rows)
    ]
    tune.write_table(tmp_path / "tuned.py", fast)
    found = {}
    exec((tmp_path / "tuned.py").read_text(), found)
    assert found["TUNED"] == {(1, 1, 3, 1, 2): tuple(rows[1].best)}  # the other gains nothing


def test_train(rehearse):
    pytest.importorskip("mmengine")
    rows, failures = rehearse(train, train.Resumed)
    assert failures == []
    assert [(row.amp, row.same) for row in rows] == [("bf16", True)]
    assert 1 <= rows[0].stopped < 3


def test_training_needs_packages(rehearse, monkeypatch):
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None if name == "mmengine" else name)
    _, failures = rehearse(train, train.Resumed)
    assert failures == [Failure("train", "left out: mmengine not installed")]


PROFILER = """\
==PROF== Connected to process 1
"ID","Kernel Name","gpu__time_duration.sum","sm__warps_active.avg.pct_of_peak_sustained_active",\
"smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_selected_per_issue_active.ratio"
"","","nsecond","%","inst","inst"
"0","forward_kernel","120,500","44.5","2.5","9"
"1","gradients_kernel","500","50","0.5","1"
"""


@pytest.fixture
def profiler(tmp_path, monkeypatch):
    """Put a program named ncu on the PATH that runs what it profiles and prints a table."""
    (tmp_path / "table.csv").write_text(PROFILER)
    ncu = tmp_path / "ncu"
    ncu.write_text(f'#!/bin/sh\nwhile [ "$1" != --page ]; do shift; done\nshift 2\n"$@" && cat {tmp_path}/table.csv\n')
    ncu.chmod(ncu.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")


@needs_loops
def test_profile(rehearse, profiler):
    rows, failures = rehearse(profile, profile.Profiled)
    assert failures == []
    assert [row.kernel for row in rows] == ["forward_kernel", "gradients_kernel"]
    assert rows[0].figures == {"microseconds": 120.5, "occupancy": 44.5}
    assert rows[0].stalls == {"long_scoreboard": 2.5}
    assert rows[0].metrics["gpu__time_duration.sum"] == 120_500


def test_without_a_profiler(rehearse, monkeypatch):
    monkeypatch.setattr(profile, "find_profiler", lambda: None)
    monkeypatch.setattr(profile.sys, "executable", "true")  # profiles nothing
    assert rehearse(profile, profile.Profiled) == ([], [Failure("profile", "left out: ncu is not installed")])


def test_a_profiler_that_fails(rehearse, monkeypatch):
    monkeypatch.setattr(profile, "find_profiler", lambda: "false")
    assert rehearse(profile, profile.Profiled) == ([], [Failure("profile", "ended with status 1:")])


@needs_loops
def test_a_graph_that_replays_nothing_is_seen(monkeypatch):
    monkeypatch.setattr(usage, "graphed", lambda run: run() or (lambda: None))
    assert not usage.check_graph(TOY.scans[0]).passed


def test_a_wrong_element_is_seen():
    want = torch.randn(1000, dtype=torch.float64).clamp(-2, 2)

    def error(change, index=3):
        got = want.float()
        got[index] += change
        return compare("a", "float32", 0, [{"y": got, "z": want}], {"y": want, "z": want})

    assert error(0).passed
    assert error(0).error < 0.01
    assert error(0.01).worst == "y"
    assert not error(0.01).passed
    assert not error(float("nan")).passed
    broken = [{"y": want.float() + 1, "z": want.float() * float("nan")}]
    assert compare("a", "float32", 0, broken, {"y": want, "z": want}).worst == "z"
    # of one element: ten times the tolerance, of the largest; of all: the tolerance, of the norm
    spread = [{"y": want * (1 + 2e-4)}]
    assert compare("a", "float32", 0, spread, {"y": want}).error == pytest.approx(2)
    assert compare("a", "float32", 0, [{"grad A": want * (1 + 2e-4)}], {"grad A": want}).error == pytest.approx(0.2)
    sparse = torch.zeros(10**6, dtype=torch.float64)
    sparse[:10_000] = 1.0
    off = sparse.clone()
    off[-1] = 2e-3
    assert compare("a", "float32", 0, [{"y": off}], {"y": sparse}).error == pytest.approx(2)


def test_other_bits_in_a_second_run_are_seen():
    y = torch.ones(3)
    assert compare("a", "float32", 0, [{"y": y}, {"y": y.clone()}], {"y": y}).repeatable
    other = compare("a", "float32", 0, [{"y": y}, {"y": y.nextafter(y + 1)}], {"y": y})
    assert (other.error, other.repeatable) == (0, False)
    assert not other.passed


@pytest.fixture(params=["mamba_ssm", "mambapy"])
def by(request):
    """The name of a package, which is forgotten afterwards: other tests ask whether it is installed."""
    yield request.param
    for name in [name for name in sys.modules if name.split(".")[0] == request.param]:
        del sys.modules[name]


def test_other_packages_compute_the_same(by, tmp_path, monkeypatch):
    """Stand-ins with the packages' interfaces."""
    files = {
        "mamba_ssm/ops/selective_scan_interface.py": """
from vim.kernels import selective_scan
def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    u, delta, B, C, z = (x.transpose(1, 2) for x in (u, delta, B, C, z))
    y = selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus=delta_softplus, backend="reference")
    return y.transpose(1, 2)
""",
        "mambapy/pscan.py": """
import torch
def pscan(A, X):
    states = [X[:, 0]]
    for a, x in zip(A.unbind(1)[1:], X.unbind(1)[1:]):
        states.append(a * states[-1] + x)
    return torch.stack(states, 1)
""",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    shape = Scan(2, 2, 5, 4, n=3, dtype="float32")
    call, inputs = ops.scan(shape, by)
    y = call(**inputs)
    inputs = draw_scan(shape, 0, card.DEVICE)
    if by == "mamba_ssm":
        want = selective_scan(
            **inputs, delta_softplus=True, reverse=[False, False], combine="mean", backend="reference"
        )
        torch.testing.assert_close(y.transpose(1, 2), want)
    else:
        one = {name: inputs[name][:, :1] for name in ("u", "delta", "B", "C")} | {"A": inputs["A"][:1]}
        want = selective_scan(**one, delta_softplus=True, reverse=[False], backend="reference")
        torch.testing.assert_close(y, want[:, 0])


def test_the_least_work():
    shape = Scan(2, 2, 3, 8, n=4)  # 96 elements of a row's tensor, 48 of an image's, 48 of B
    assert ops.least("scan", shape, "forward") == (2 * 96 + 2 * 48 + 2 * 48, 6 * 96, 0)
    assert ops.least("scan", shape, "forward+backward") == (6 * 96 + 6 * 48 + 5 * 48, 18 * 96, 0)
    assert ops.least("conv", shape, "forward") == (2 * 96, 0, 0)
    assert ops.least("norm", shape, "forward+backward") == (5 * 24, 0, 0)
    assert ops.least("attention", shape, "forward") == (4 * 24, 0, 0)
    shape = Ssd(2, 1, 3, 4, p=2, g=2, n=4)  # 48 elements of x, 24 steps, 48 of B
    assert ops.least("ssd", shape, "forward") == (48 + 24 + 2 * 48 + 48, 36 * 24, 64 * 48 + 64 * 48 + 16 * 48)
    assert ops.least("ssd", shape, "forward+backward")[0] == 4 * 48 + 3 * 24 + 6 * 48 + 48


@pytest.mark.parametrize("shapes", [REAL, TOY], ids=["real", "toy"])
def test_shapes_have_what_the_table_wants(shapes):
    assert {LAYER, LONG} <= set(shapes.layers) and LONG_SSD in shapes.ssd_layers
    assert next(iter(shapes.layers)) == LAYER  # the one that is profiled
    assert len(set(shapes.models)) == len(shapes.models)
    assert (
        shapes.scans[0].k == shapes.ssds[0].k == 2 and not shapes.ssds[0].views
    )  # what is compiled and captured has two directions
    for elements in (shapes.large.images * shapes.large.tokens, shapes.large.long):
        assert (elements * shapes.large.channels > 2**31) == (shapes is REAL)


def cases(ran, count=5, broken=None):
    def case(number):
        if number == broken:
            raise ValueError("it\nbroke")
        ran.append(number)
        return Failure(str(number), "none")

    return {str(number): lambda number=number: case(number) for number in range(count)}


def test_processes_share_the_cases(tmp_path):
    ran, alone = [], []
    for part in range(3):
        stage = Stage("a", tmp_path, end=math.inf, part=part, parts=3)
        stage.each(cases(ran))
        stage.each(cases(alone, 2), shared=False)
    assert sorted(ran) == [0, 1, 2, 3, 4]
    assert ran != sorted(ran)
    assert alone == [0, 1]
    assert len(read(tmp_path / "a.jsonl", Failure)) == 7


def test_a_failure_stops_no_other_case(tmp_path, capsys):
    ran = []
    stage = Stage("a", tmp_path, end=math.inf)
    stage.each(cases(ran, broken=1))
    assert ran == [0, 2, 3, 4]
    assert Failure("1", "ValueError: it broke") in read(stage.file, Failure)
    assert "Traceback" in capsys.readouterr().err


def test_cases_end_with_the_time(tmp_path, monkeypatch):
    ran = []
    stage = Stage("a", tmp_path, end=math.inf)
    monkeypatch.setattr(stage, "left", lambda: 2 - len(ran))
    stage.each(cases(ran))
    assert ran == [0, 1]
    assert read(stage.file, Failure)[-1] == Failure("3 cases from 2 on", "not reached in the stage's time")


def test_warming_writes_nothing(tmp_path):
    ran = []
    stage = Stage("a", tmp_path, end=math.inf, warm=True)
    stage.each(cases(ran, broken=1))
    assert len(ran) == 4
    assert not stage.file.exists()
    assert stage.clock == card.once


def test_rows_are_read_by_kind(tmp_path):
    file = tmp_path / "a.jsonl"
    rows = [Failure("a", "b"), train.Resumed("bf16", 1, True, "c"), Failure("d", "e")]
    for row in rows:
        append(file, row)
    assert read(file, Failure) == [rows[0], rows[2]]
    assert read(file, train.Resumed) == [rows[1]]
    assert read(tmp_path / "nothing.jsonl", Failure) == []


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Have a shell script run in the place of a stage."""

    def program(script):
        path = tmp_path / "program"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IEXEC)
        monkeypatch.setattr(command.sys, "executable", str(path))

    return program


def test_a_stage_that_fails_or_takes_too_long_stops_no_other(program, tmp_path, capsys):
    program(f'case "$3" in ops) sleep 600 & echo $! >{tmp_path}/child; wait;; *) echo it broke >&2; exit 3;; esac')
    assert not command.run_stages(tmp_path / "out", 0.05, ["correct", "ops", "profile"], rehearse=True)
    failures = [row for name in ("correct", "ops", "profile") for row in read(tmp_path / f"out/{name}.jsonl", Failure)]
    assert [row.case for row in failures] == ["stage correct", "stage ops", "stage profile"]
    assert failures[0].error == failures[2].error == "ended with status 3: it broke"
    assert failures[1].error == "stopped after 1 s"
    child = int((tmp_path / "child").read_text())
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(child)], capture_output=True, text=True).stdout
    assert state.strip()[:1] in ("", "Z")  # ended with the stage that started it
    assert "stage ops: stopped after 1 s" in capsys.readouterr().out


def test_time_is_shared_and_the_last_stage_gets_the_rest(program, tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(command, "_run_stage", lambda name, out, seconds, rehearse: given.update({name: seconds}))
    command.run_stages(tmp_path, 9, list(STAGES), rehearse=True)
    assert given == pytest.approx({**{name: plan.seconds for name, plan in STAGES.items()}, "profile": 540}, abs=1)
    command.run_stages(tmp_path, 7, ["correct", "ops"], rehearse=True)
    assert given["correct"] == pytest.approx(180, abs=1)


def test_timed_stages_are_warmed_and_timed_alone(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(command, "_run_processes", lambda *words: started.append(words) or [])
    command._run_stage("ops", tmp_path, 100, rehearse=False)
    command._run_stage("correct", tmp_path, 100, rehearse=False)
    (warm, *warming), (_, *timing), (_, *checking) = started
    assert "--warm" in warm
    assert (warming[0], warming[1], timing[0], checking[0]) == (8, 40, 1, 6)
    assert timing[1] == pytest.approx(100, abs=1)


def write_results(out, *, wrong=False, missed=False):
    """Rows as a GPU might give them."""
    out.mkdir()
    append(out / "correct.jsonl", Check("scan Scan(1)", "bfloat16", 2.0 if wrong else 0.5, "output 0", True, 7))
    append(out / "ops.jsonl", ops.Ceilings("a card", 4e12, 3e12, 6e14))
    for layer in REAL.layers:
        for op, by, _, runs in ops.COMPARED:
            for run in runs:
                time = {"triton": 0.2 if missed else 0.1, "chunked": 0.3}.get(by, 0.15 if op == "scan" else 0.4)
                time *= 1 if run == "forward" else 3
                row = ops.OpTime(op, layer, by, run, time, 0.5, 0.4 if missed else 0.7, 0.0, 1.0)
                append(out / "ops.jsonl", row)
    for op, time in (("ssd", 0.1), ("scan", 0.3 if missed else 0.6)):
        append(out / "ops.jsonl", ops.OpTime(op, LONG_SSD, "triton", "forward", time, 0.5, 0.5, 0.5, 1.0))
    for case in REAL.models:
        time = 3.0 if case.attention == "plain" else 1.0
        peak = 10.0 * ((case.img_size // 16) ** 2 + 1) if case.run != "forward" else 100.0 * time**3
        append(out / "models.jsonl", models.ModelTime(*case, time, 8.0, 1.0, peak))
    append(out / "train.jsonl", train.Resumed("bf16", 1, not missed, "1,2"))
    append(
        out / "profile.jsonl", profile.Profiled("forward_kernel", {"occupancy": 44.0}, {"wait": 2.0, "mio": 1.0}, {})
    )
    append(out / "tune.jsonl", tune.Tuned("a card", "scan", LAYER, (1, 2, 3, 1, 16), (64, 64), 1.0, (32, 64), 2.0))
    return out


def test_the_table(tmp_path):
    lines = table(write_results(tmp_path / "good"))
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 120
    assert lines[0] == "a card: copies 4.00 TB/s, 3.00 T exponentials/s"
    targets = lines[2 : 2 + len(TARGETS)]
    figures = [float(line.split()[-1]) for line in targets]  # nothing is missed
    assert figures == pytest.approx([0, 0.7, 0.7, 0.1, 3, 3, 6, 0.667, 1, 3, 0.963, 1, 0], abs=1e-3)
    assert passed(tmp_path / "good")
    assert "scan bfloat16 0.50" in "\n".join(lines)
    assert "tuned: 1 of 1 layers gain, at most 2.00 x; in tuned_*.py" in lines
    assert "  forward_kernel: occupancy 44, stalls on wait" in lines
    assert "  13 more in ops.jsonl" in lines


def test_what_is_missed_or_wrong(tmp_path):
    lines = table(write_results(tmp_path / "bad", wrong=True, missed=True))
    missed = [line for line in lines if line.endswith("MISSED")]
    assert len(missed) == 7
    assert not passed(tmp_path / "bad")
    assert "  FAILED scan Scan(1): output 0 2, seed 7" in lines


def test_a_table_of_nothing(tmp_path):
    assert [line.split()[-1] for line in table(tmp_path)[1:]] == ["-"] * len(TARGETS)
    assert passed(tmp_path)
    append(tmp_path / "correct.jsonl", Failure("scan", "not reached in the stage's time"))
    assert not passed(tmp_path)
    (tmp_path / "correct.jsonl").unlink()
    append(tmp_path / "ops.jsonl", Failure("scan, mambapy", "left out"))
    assert passed(tmp_path)
    append(tmp_path / "ops.jsonl", Failure("stage ops", "stopped after 9 s"))
    assert not passed(tmp_path)


@ON_CPU
def test_the_tool(call, tmp_path, monkeypatch):
    status, _, errors = call("benchmark", "gpu", "--out", tmp_path)
    assert (status, errors) == (
        2,
        "error: there is no GPU here: --rehearse runs every stage at toy shapes on the CPU\n",
    )
    asked = []
    monkeypatch.setattr(command, "run_stages", lambda *args, **options: asked.append((args, options)))
    assert call("benchmark", "gpu", "--out", tmp_path, "--stages", "ops", "tune", "--minutes", 2, "--rehearse")[0] == 1
    assert asked == [((tmp_path, 2, ["ops", "tune"]), {"rehearse": True})]


WITHOUT = """
import sys
sys.modules.update(dict.fromkeys(["accelerate", "av", "cv2", "datasets", "decord", "mmengine", "pandas", "sklearn"]))
import vim.measure.gpu.__main__, vim.measure.gpu.command, vim.measure.gpu.profiled
"""


def test_the_stages_need_few_packages():
    subprocess.run([sys.executable, "-c", WITHOUT], check=True)


def test_directions_alternate():
    assert alternating(4) == [False, True, False, True]
