import os
import sys

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # read when torch is imported; the programs that tests start inherit it
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads than cores spend their time waiting for one another

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, which torch does late

from vim.kernels import available_backends  # noqa: E402

# torch.empty gives NaN: memory that a kernel forgets to write shows
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(params=available_backends())
def backend(request):
    """Each backend this machine has."""
    return request.param


@pytest.fixture(params=range(3), ids=["baseline", "avx2", "avx512"])
def instruction_set(request, monkeypatch):
    """Each instruction set of the native backend that this processor has."""
    from vim.kernels.native import library

    if library.load() is None:
        pytest.skip("the native backend is not built")
    if request.param > library.instruction_set():
        pytest.skip("not on this processor")
    monkeypatch.setattr(library, "instruction_set", lambda: request.param)
    return request.param


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a tool here: its exit status, output and errors."""
    from tests.tiny import load_tool
    from vim.errors import run

    def call(name, *words):
        monkeypatch.setattr(sys, "argv", [f"tools/{name}.py", *map(str, words)])
        try:
            run(load_tool(name).main)
        except SystemExit as stop:
            return stop.code, *capsys.readouterr()
        return 0, *capsys.readouterr()

    return call


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to be in."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def fresh_accelerate():
    """accelerate keeps the precision of the first run of a process: forget it before and after the test."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)
