"""The import finder, the command and the shims: forks, aliases, shadowing, order, uninstalling, threads."""

import importlib
import importlib.util
import sys
import threading
from pathlib import Path

import pytest
import torch

import vim.compat
from vim.compat import names
from vim.errors import UserError
from vim.kernels import available_backends


@pytest.fixture(autouse=True)
def clean():
    before = set(sys.modules)
    yield
    vim.compat.uninstall()
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in (*names.TOP, "renamed", "program"):
            del sys.modules[name]


def write(folder, **files):
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("/init/", "/__init__")
        path.parent.mkdir(parents=True, exist_ok=True)
        Path(f"{path}.py").write_text(text)


def fork(folder, package="mamba_ssm"):
    """A fork with an autograd function of its own on the extension."""
    interface = """
import torch, selective_scan_cuda
from causal_conv1d import causal_conv1d_fn
import causal_conv1d_cuda

class Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, delta, A, B, C):
        out, x, *rest = selective_scan_cuda.fwd(u, delta, A, B, C, None, None, None, True)
        ctx.save_for_backward(u, delta, A, B, C, x)
        return out

    @staticmethod
    def backward(ctx, dout):
        *inputs, x = ctx.saved_tensors
        return tuple(selective_scan_cuda.bwd(*inputs, None, None, None, dout, x, None, None, True, False)[:5])

selective_scan_fn = Scan.apply
mine = True
"""
    for part in ("", "ops", "ops/triton", "utils"):
        path = folder / package / part / "__init__.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    (folder / package / "ops/selective_scan_interface.py").write_text(interface)
    (folder / package / "ops/triton/layernorm.py").write_text("raise ImportError('needs a GPU')")
    (folder / package / "utils/generation.py").write_text("from transformers.generation import Gone")


@pytest.mark.parametrize("name", [*names.EXTENSIONS, *names.PACKAGES])
def test_every_name_is_served(name):
    vim.compat.install()
    assert importlib.util.find_spec(name).name == name
    module = importlib.import_module(name)
    assert all(callable(getattr(module, attribute)) or attribute == "__version__" for attribute in names_of(name))
    assert name in vim.compat.served()


def names_of(name):
    return (names.EXTENSIONS | names.PACKAGES)[name]


def test_uninstall_takes_away_what_was_made(tmp_path, monkeypatch):
    fork(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    vim.compat.install()
    import mamba_ssm.ops.triton.layernorm
    from selective_scan import selective_scan_fn

    assert callable(selective_scan_fn) and mamba_ssm.ops.triton.layernorm.RMSNorm
    vim.compat.uninstall()
    assert "selective_scan" not in sys.modules and not hasattr(mamba_ssm.ops.triton, "layernorm")
    assert "mamba_ssm" in sys.modules, "it is the program's"
    assert vim.compat.served() == []
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("selective_scan")
    vim.compat.uninstall()


def test_a_fork_runs_on_the_extensions(tmp_path, monkeypatch):
    fork(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    vim.compat.install()
    from mamba_ssm.ops.selective_scan_interface import mine, selective_scan_fn
    from mamba_ssm.ops.triton.layernorm import RMSNorm
    from mamba_ssm.utils.generation import GenerationMixin

    assert mine and RMSNorm and GenerationMixin
    torch.manual_seed(0)
    inputs = torch.randn(2, 4, 9), torch.randn(2, 4, 9), -torch.rand(4, 3), torch.randn(2, 1, 3, 9)
    inputs = [t.requires_grad_() for t in (*inputs, torch.randn(2, 1, 3, 9))]
    y = selective_scan_fn(*inputs)
    from vim.compat.scan import selective_scan_fn as ours

    theirs = ours(*inputs, delta_softplus=True)
    torch.testing.assert_close(y, theirs)
    for one, other in zip(*(torch.autograd.grad(out.square().sum(), inputs) for out in (y, theirs)), strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(ModuleNotFoundError, match="mamba_ssm.models"):
        importlib.import_module("mamba_ssm.models.mixer_seq_simple")  # the fork lacks it


def test_a_folder_of_sources_is_no_fork(tmp_path, monkeypatch):
    (tmp_path / "selective_scan/csrc").mkdir(parents=True)
    write(tmp_path, selective_scan__setup="", ops__other="")
    monkeypatch.syspath_prepend(tmp_path)
    vim.compat.install()
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    from selective_scan import selective_scan_fn as core_scan_fn

    assert selective_scan_fn.__module__ == core_scan_fn.__module__ == "vim.compat.scan"


def test_a_fork_without_init(tmp_path, monkeypatch):
    fork(tmp_path)
    (tmp_path / "mamba_ssm/__init__.py").unlink()
    monkeypatch.syspath_prepend(tmp_path)
    vim.compat.install()
    from mamba_ssm.ops.selective_scan_interface import mine

    assert mine


def test_a_renamed_fork(tmp_path, monkeypatch):
    (tmp_path / "renamed").mkdir()
    fork(tmp_path / "renamed", "bi_ssm")
    monkeypatch.syspath_prepend(tmp_path)
    vim.compat.install(alias={"renamed.bi_ssm": "mamba_ssm", "scan_of_ours": "selective_scan_cuda_core"})
    from renamed.bi_ssm.ops.selective_scan_interface import mine
    from renamed.bi_ssm.ops.triton.layernorm import layer_norm_fn
    from scan_of_ours import fwd

    assert mine and layer_norm_fn and fwd
    with pytest.raises(UserError, match="stands for 'torch', which is not served"):
        vim.compat.install(alias={"x": "torch"})


def test_real_packages_are_refused(tmp_path, monkeypatch):
    site = tmp_path / "site-packages"
    write(site, mamba_ssm__init__="real = True")
    (site / "mamba_ssm").mkdir(parents=True, exist_ok=True)
    (site / "mamba_ssm/__init__.py").write_text("real = True")
    monkeypatch.syspath_prepend(site)
    with pytest.raises(UserError, match=r"mamba_ssm is installed, at .*prefer='ours'"):
        vim.compat.install()
    vim.compat.install(prefer="ours")
    import mamba_ssm

    assert not hasattr(mamba_ssm, "real")
    vim.compat.uninstall()
    import mamba_ssm as real

    assert real.real
    with pytest.raises(UserError, match="mamba_ssm is already imported, from .*: call vim.compat.install"):
        vim.compat.install(prefer="ours")


def test_threads_import_one_module():
    vim.compat.install()
    found = []
    run = lambda: found.append(importlib.import_module("mamba_ssm.modules.mamba_simple"))  # noqa: E731
    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, found))) == 1 and len(found) == 8


def test_language_models_are_refused_when_called():
    vim.compat.install()
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
    from mamba_ssm.utils.hf import load_config_hf

    for call in (MambaLMHeadModel, load_config_hf):
        with pytest.raises(NotImplementedError, match="for import only"):
            call("state-spaces/mamba-130m")


def test_what_a_published_file_imports_is_imported_from_there():
    vim.compat.install()
    from causal_conv1d.causal_conv1d_interface import causal_conv1d_bwd_function
    from mamba_ssm.ops.selective_scan_interface import causal_conv1d_cuda, selective_scan_cuda

    assert causal_conv1d_bwd_function is causal_conv1d_cuda.causal_conv1d_bwd
    assert selective_scan_cuda is sys.modules["selective_scan_cuda"]
    with pytest.raises(ImportError, match="nothing_of_this_name"):
        from mamba_ssm.ops.selective_scan_interface import nothing_of_this_name  # noqa: F401


def test_modules_are_reached_through_their_packages():
    vim.compat.install()
    import mamba_ssm

    assert mamba_ssm.modules.mamba_simple.Mamba is mamba_ssm.Mamba
    assert mamba_ssm.ops.triton.layer_norm.RMSNorm is mamba_ssm.modules.mamba_simple.RMSNorm
    assert not hasattr(mamba_ssm, "moduls")


def test_kernels_are_there_and_refuse_to_be_called():
    vim.compat.install()
    from mamba_ssm.ops.triton.ssd_chunk_state import _chunk_state_fwd

    with pytest.raises(NotImplementedError, match="_chunk_state_fwd for import only"):
        _chunk_state_fwd(torch.zeros(1))


def test_another_preference_is_refused():
    with pytest.raises(UserError, match="prefer must be 'ours' or None, got 'our'"):
        vim.compat.install(prefer="our")


def test_one_line_of_log(caplog):
    vim.compat.install()
    vim.compat.install()
    assert [record.getMessage() for record in caplog.records] == [
        "vim.compat serves mamba_ssm, causal_conv1d, selective_scan, selective_scan_vmamba, "
        f"selective_scan_vmamba_pt202 and their extensions from vim.kernels, backend {available_backends()[-1]}"
    ]
