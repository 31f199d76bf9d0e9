"""Which backend runs an op, and when a backend is refused."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from tests.kernels.test_scan import make_inputs
from vim.kernels import available_backends, backends, selective_scan
from vim.kernels.native import library

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def choose(device, dtype, name="auto"):
    return backends.choose_backend(name, SimpleNamespace(device=torch.device(device), dtype=dtype))


def test_environment_variable_chooses(monkeypatch):
    monkeypatch.setenv("VIM_BACKEND", "nonsense")
    inputs = make_inputs(1, 1, 3, 4, 1, 2)
    with pytest.raises(ValueError, match="got 'nonsense'"):
        selective_scan(**inputs, reverse=[False])
    selective_scan(**inputs, reverse=[False], backend="chunked")


def test_named_backend_never_falls_back(monkeypatch):
    inputs = make_inputs(1, 1, 3, 4, 1, 2)
    if library.load() is not None:
        with pytest.raises(ValueError, match="backend 'cpu' takes float32, bfloat16 or float16"):
            selective_scan(**inputs, reverse=[False], backend="cpu")
    monkeypatch.setattr(library, "load", lambda: None)
    inputs = make_inputs(1, 1, 3, 4, 1, 2, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="not built"):
        selective_scan(**inputs, reverse=[False], backend="cpu")
    selective_scan(**inputs, reverse=[False])


def test_chosen_for_tensors_on_a_cpu(monkeypatch):
    monkeypatch.setattr(library, "load", lambda: object())
    assert available_backends() == ("reference", "chunked", "cpu")
    assert [choose("cpu", dtype) for dtype in DTYPES] == ["cpu"] * 3
    assert choose("cpu", torch.float64) == "chunked"
    assert available_backends("meta") == ("reference", "chunked") and choose("meta", torch.float32) == "chunked"
    monkeypatch.setattr(library, "load", lambda: None)
    assert available_backends() == ("reference", "chunked") and choose("cpu", torch.float32) == "chunked"


def test_chosen_for_tensors_on_a_gpu(monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    assert available_backends("cuda") == ("reference", "chunked", "triton")
    assert [choose("cuda", dtype) for dtype in DTYPES] == ["triton"] * 3
    assert choose("cuda", torch.float64) == "chunked"
    with pytest.raises(ValueError, match="'triton' takes float32, bfloat16 or float16, got float64: use 'chunked'"):
        choose("cuda", torch.float64, "triton")
    with pytest.raises(ValueError, match="'cpu' takes tensors on the CPU, got cuda"):
        choose("cuda", torch.float32, "cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="'triton' takes tensors on a GPU, got cpu.*TRITON_INTERPRET=1"):
        choose("cpu", torch.float32, "triton")
    monkeypatch.setattr(backends, "has_triton", lambda: False)
    assert choose("cuda", torch.float32) == "chunked"
    with pytest.raises(RuntimeError, match="triton, which is not installed"):
        choose("cuda", torch.float32, "triton")


def test_nothing_else_needs_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch, vim
from vim.kernels import available_backends, rms_norm
assert "triton" not in available_backends("cuda")
rms_norm(torch.ones(2, 3), torch.ones(3))
"""
    subprocess.run([sys.executable, "-c", code], check=True)
