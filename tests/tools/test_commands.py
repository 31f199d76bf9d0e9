"""`vim-zoo COMMAND`: what `tools/` has, for those who install a wheel."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import tools
from tests.tiny import DIGITS, ROOT, load_tool
from vim import runner
from vim.command_line import Parser, version
from vim.compat import runner as compat_runner
from vim.engine.config import load_recipe, row_names
from vim.engine.config_files import FOLDER, config_names, find_config
from vim.errors import UserError
from vim.options import ImageRecipe

FILES = sorted(path.stem for path in (ROOT / "tools").glob("[!_]*.py"))
NANO = "vim/vim-nano_1xb64_digits.py"


@pytest.fixture
def zoo(monkeypatch, capsys):
    """Run `vim-zoo` here: its exit status, output and errors."""

    def zoo(*words):
        monkeypatch.setattr(sys, "argv", ["vim-zoo", *map(str, words)])
        monkeypatch.setattr(sys, "path", list(sys.path))
        try:
            tools.main()
        except SystemExit as stop:
            return stop.code, *capsys.readouterr()
        return 0, *capsys.readouterr()

    return zoo


def test_every_tool_is_a_command(zoo):
    assert sorted(tools.TOOLS.values()) == FILES
    status, output, errors = zoo("--help")
    assert (status, errors) == (0, "")
    assert re.findall(r"^  ([a-z-]+) +[A-Z]", output, re.MULTILINE) == [*tools.TOOLS, *tools.RUNNERS]
    assert zoo() == (0, output, "")


STARTUP = "import sys, tools; sys.argv = ['vim-zoo', '--help']; tools.main(); assert 'torch' not in sys.modules"


def test_the_overview_imports_no_torch():
    done = subprocess.run([sys.executable, "-c", STARTUP], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_unknown_command(zoo):
    line = "error: no such command: 'trian' (the closest: train); see vim-zoo --help\n"
    assert zoo("trian", "a.py") == (2, "", line)


def test_versions(zoo, call):
    line = f"{version()}\n"
    assert re.fullmatch(r"vim-zoo \d+\.\d+\.\d+\S*, PyTorch 2\.\S+, backends reference, chunked.*\n", line)
    assert zoo("--version") == (0, line, "")
    for file in FILES:
        assert call(file, "--version") == (0, line, "")
    for command in tools.RUNNERS:
        assert zoo(command, "--version") == (0, line, "")


def examples(text):
    """The command lines that a help ends with."""
    return [shlex.split(line) for line in text.partition("\nexamples:\n")[2].splitlines()]


@pytest.mark.parametrize("command, file", tools.TOOLS.items())
def test_the_examples_of_a_command(command, file, call, monkeypatch):
    lines = examples(call(file, "--help")[1])
    assert len(lines) == 2
    for program, name, *words in lines:
        assert (program, name) == ("vim-zoo", command)
        monkeypatch.setattr(sys, "argv", [command, *words])
        load_tool(file).parse()
        for word in words:
            if re.match(r"\w+/[\w-]+\.py", word):
                assert find_config(Path(word.partition(":")[0]))
                assert ":" not in word or word.partition(":")[2] in row_names(Path(word.partition(":")[0]))


@pytest.mark.parametrize("command, module", [("vim-zoo run", runner), ("vim-compat", compat_runner)])
def test_the_examples_of_a_runner(command, module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [command, "--help"])
    with pytest.raises(SystemExit):
        module.main()
    lines = examples(capsys.readouterr().out)
    assert len(lines) == 2
    for line in lines:
        assert shlex.join(line).startswith(command)
        _, program = runner.split(module.parser(), line[len(command.split()) :])
        assert program.name


def test_mistakes_and_hints_are_in_the_users_words(zoo):
    status, _, errors = zoo("train", "tsm2/tsm2_lorenz_24.py")
    assert (status, errors) == (
        2,
        "error: the config tsm2/tsm2_lorenz_24.py is for another kind of task: use vim-zoo forecast\n",
    )
    status, _, errors = zoo("train", "a.py", "--work-dri", "b")
    assert errors.endswith("see vim-zoo train --help\n")


# configs


def test_configs_are_listed_and_described(zoo):
    status, output, errors = zoo("configs")
    assert (status, errors) == (0, "")
    lines = output.splitlines()
    assert [line.split()[0].removesuffix(":ROW") for line in lines] == config_names()
    assert all(len(line.split(maxsplit=1)[1]) > 20 for line in lines)
    status, output, errors = zoo("configs", "vim/in1k.py")
    assert (status, errors) == (0, "")
    assert output.startswith("Vim on ImageNet-1k") and "\n  vim/in1k.py:vim-tiny_in1k\n" in output


@pytest.mark.parametrize(
    "name", ["vim/vim-nano_1xb64_digits.py", "configs/vim/vim-nano_1xb64_digits.py", "vim/in1k.py:vim-tiny_in1k"]
)
def test_a_config_of_the_package_from_any_folder(name, folder):
    recipe = load_recipe(Path(name), ImageRecipe)
    assert recipe.schedule["num_epochs"] == (300 if "in1k" in name else 30)  # of the base


def test_a_file_goes_before_a_config_of_the_package(folder):
    (folder / "vim").mkdir()
    own = Path(NANO)
    own.write_text(f"_base_ = {str(DIGITS)!r}\nschedule = dict(num_epochs=7)\n")
    assert load_recipe(own, ImageRecipe).schedule["num_epochs"] == 7


def test_a_config_that_does_not_exist(folder):
    with pytest.raises(
        UserError, match=r"no such config: vim/vim-nano_1xb64_digit.py \(the closest: vim/vim-nano_1xb64_digits.py"
    ):
        find_config(Path("vim/vim-nano_1xb64_digit.py"))
    (folder / "mine.py").touch()
    with pytest.raises(UserError, match=r"no such config: mime.py \(the closest: mine.py\)"):
        find_config(Path("mime.py"))
    with pytest.raises(UserError, match=r"no such config: \.\./_base_/runtime.py"):
        find_config(Path("../_base_/runtime.py"))


def test_every_config_is_in_the_package():
    assert FOLDER.resolve() == ROOT / "configs"
    assert config_names() == sorted(
        str(path.relative_to(ROOT / "configs")) for path in (ROOT / "configs").glob("[!_]*/*.py")
    )


# programs of others

PROGRAM = """
import sys, timm
from beside import size
model = timm.create_model(sys.argv[1], img_size=size)
print(__name__, sys.argv[1:], type(model).__name__)
"""


@pytest.mark.parametrize("words", [["validate.py"], ["-m", "validate"]], ids=" ".join)
def test_a_program_has_the_models(words, folder, zoo):
    (folder / "validate.py").write_text(PROGRAM)
    (folder / "beside.py").write_text("size = 32")
    (folder / "vim").mkdir()  # another's package of our name
    assert zoo("run", *words, "test_vim", "--version") == (0, "__main__ ['test_vim', '--version'] Vim\n", "")


def test_a_program_ends_as_it_does_by_itself(folder, zoo):
    (folder / "broken.py").write_text("raise OSError('its own')")
    with pytest.raises(OSError, match="its own"):
        zoo("run", "broken.py")
    assert zoo("run", "brokn.py") == (2, "", "error: no such script: brokn.py (the closest: broken.py)\n")
    assert zoo("compat", "--aliaz")[:2] == (2, "")


def test_a_parser_without_examples():
    help = Parser(prog="a").format_help()
    assert "examples" not in help
