"""`vim-compat PROGRAM`, and the processes that a program starts."""

import os
import pickle
import subprocess
import sys
from multiprocessing import spawn
from pathlib import Path

import pytest

import vim.compat
from tests.compat.test_install import clean, write  # noqa: F401
from vim.compat import runner

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the command in this process, from a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def command(*argv):
        monkeypatch.setattr(sys, "argv", ["vim-compat", *argv])
        runner.main()

    return command


PROGRAM = """
import sys
from helper import name
from mamba_ssm import Mamba
import torch
print(name, sys.argv[1:], tuple(Mamba(8)(torch.zeros(1, 3, 8)).shape), __name__)
"""


@pytest.mark.parametrize("module", [False, True])
def test_the_command_in_this_process(module, run, tmp_path, capsys):
    write(tmp_path, program=PROGRAM, helper="name = 'helper'")
    run(*(["-m", "program"] if module else ["program.py"]), "-q", "--x")
    assert capsys.readouterr().out == "helper ['-q', '--x'] (1, 3, 8) __main__\n"


@pytest.mark.parametrize("argv", [["tool"], ["-m", "tool"]], ids=" ".join)
def test_a_folder_with_a_program(argv, run, tmp_path, capsys):
    write(tmp_path, tool__name_of="name = 'beside'")
    source = "name_of" if argv == ["tool"] else "tool.name_of"
    (tmp_path / "tool/__main__.py").write_text(PROGRAM.replace("helper", source))
    run(*argv)
    assert capsys.readouterr().out == "beside [] (1, 3, 8) __main__\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no program"),
        (["-m"], "no program"),
        (["nothing.py"], "no such script: nothing.py\n"),
        (["programm.py"], "no such script: programm.py (the closest: program.py)"),
        (["folder"], "folder is a folder without a __main__.py: expected a script"),
        (["-m", "no.such.module"], "no such module: no.such.module; expected"),
        (["-m", "program.inside"], "no such module: program.inside; expected"),
        (["-m", "folder"], "no such module: folder.__main__; expected"),
        (["--alias", "x", "a.py"], "expected FORK=NAME, got 'x'"),
        (["--what", "a.py"], "--what"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_on_the_command_line(argv, message, run, tmp_path, capsys):
    write(tmp_path, program="", folder__file="")
    with pytest.raises(SystemExit) as end:
        run(*argv)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("def f(:", SyntaxError),
        ("import sys; sys.exit(5)", SystemExit),
        ("raise SystemExit('a reason')", SystemExit),
        ("raise KeyboardInterrupt", KeyboardInterrupt),
        ("import not_installed_package", ModuleNotFoundError),
    ],
)
@pytest.mark.parametrize("module", [False, True])
def test_a_programs_own_end(code, error, module, run, tmp_path):
    write(tmp_path, program=code)
    with pytest.raises(error) as end:
        run(*(["-m", "program"] if module else ["program.py"]))
    assert getattr(end.value, "code", 5) in (5, "a reason")


def test_a_package_that_lacks_one_of_its_own(run, tmp_path):
    write(tmp_path, package__init__="import not_installed_package")
    (tmp_path / "package/__init__.py").write_text("import not_installed_package")
    with pytest.raises(ModuleNotFoundError, match="not_installed_package"):
        run("-m", "package.program")


def test_a_program_with_a_folder_of_our_name(tmp_path):
    write(tmp_path, vim__main=PROGRAM, vim__helper="name = 'theirs'")
    code = "from vim.compat.runner import main; main()"  # as a console script: without the current folder on the path
    command = [sys.executable, "-P", "-c", code, "vim/main.py"]
    result = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert result.stdout == "theirs [] (1, 3, 8) __main__\n", result.stderr
    assert result.stderr.count("\n") == 1 and "vim.compat serves" in result.stderr


SPAWN = """
import pickle
import sys

import torch
from mamba_ssm import Mamba
from renamed.ops.triton.layernorm import RMSNorm
from torch.utils.data import DataLoader, Dataset


class Rows(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        return torch.zeros(3, device="cuda"), Mamba.__module__


assert type(pickle.loads(pickle.dumps(Rows()))) is Rows
if __name__ == "__main__":
    sys.stderr.write("started\\n")
    for context in ("fork", "spawn"):
        loader = DataLoader(Rows(), num_workers=1, multiprocessing_context=context)
        print(context, [(row.sum().item(), module) for row, (module,) in loader])
"""


def test_workers_serve_the_names(run, tmp_path, capfd, monkeypatch):
    write(tmp_path, program=SPAWN)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    run("--cpu-shims", "--alias", "renamed=mamba_ssm", str(tmp_path / "program.py"))
    rows = [(0.0, "vim.compat.mamba")]
    out, err = capfd.readouterr()
    assert out == f"fork {rows}\nspawn {rows}\n", err
    assert "vim.compat serves" not in err and err.count("started") == 1


def test_only_processes_of_a_program_with_the_names_serve_them():
    def prepare():
        data = spawn.get_preparation_data("worker")
        del data["authkey"]  # which is only pickled for a process
        return pickle.loads(pickle.dumps(data))

    assert "vim.compat" not in prepare()
    vim.compat.install(alias={"renamed": "mamba_ssm"})
    finder = sys.meta_path.pop(0)
    prepare()  # as in a new process
    assert sys.meta_path[0] is not finder and sys.meta_path[0].alias == {"renamed": "mamba_ssm"}
    vim.compat.uninstall()
    assert "vim.compat" not in prepare()
