"""Published files with Triton kernels, where triton is not installed."""

import importlib
import sys

import pytest
import torch

import vim.compat
from tests.compat.test_install import clean  # noqa: F401

KERNELS = """
import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice


@triton.autotune(configs=[triton.Config({"BLOCK": 64}, num_warps=8)], key=["n"])
@triton.heuristics({"HAS_X": lambda args: args["x"] is not None})
@triton.jit
def tuned(x, n: tl.constexpr, BLOCK: tl.constexpr = 4, dtype=tl.float32):
    tl.store(x + tl.arange(0, BLOCK), libdevice.exp(x))


@triton.jit(do_not_specialize=["n"])
def plain(x, n):
    pass


def launch(kernel, x):
    kernel[lambda meta: (triton.cdiv(x.numel(), meta["BLOCK"]),)](x, n=triton.next_power_of_2(5))
"""


@pytest.fixture
def without_triton(monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("vim.compat.finder.has_triton", lambda: False)
    monkeypatch.setattr("vim.compat.finder.has_triton_package", lambda: False)
    vim.compat.install()
    (tmp_path / "renamed.py").write_text(KERNELS)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("renamed")
    vim.compat.uninstall()
    assert not any(name.partition(".")[0] == "triton" for name in sys.modules)


def test_kernels_refuse_to_be_launched(without_triton):
    module = without_triton
    for name in ("tuned", "plain"):
        kernel = getattr(module, name)
        assert kernel.__name__ == name
        with pytest.raises(NotImplementedError, match=f"the kernel {name} needs triton, which is not installed"):
            module.launch(kernel, torch.zeros(3))
    with pytest.raises(NotImplementedError, match="the kernel plain"):
        module.plain(torch.zeros(3), 3)


def test_what_is_called_outside_of_kernels(without_triton):
    triton = without_triton.triton
    assert [triton.cdiv(n, 4) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]
    assert [triton.next_power_of_2(n) for n in (1, 2, 3, 8, 9)] == [1, 2, 4, 8, 16]
    assert int(triton.__version__[0]) >= 3
    from triton.runtime.jit import JITFunction

    assert not isinstance(without_triton.plain, JITFunction)
    assert issubclass(type("Mine", (JITFunction,), {}), JITFunction)
    assert not hasattr(triton, "__wrapped__")
    sys.modules.pop("vim.compat.softplus", None)
    from mamba_ssm.ops.triton.softplus import softplus

    with pytest.raises(NotImplementedError, match="the kernel softplus needs triton"):
        softplus[(1,)](torch.zeros(1))
    del sys.modules["vim.compat.softplus"]  # it has the stub
