import ast
import graphlib
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest

from vim.errors import EXTRAS

ROOT = Path(__file__).parents[1]
# what each room may import of the others
ALLOWED = {
    "kernels": set(),
    "vim/errors.py": set(),
    "vim/command_line.py": {"errors", "kernels"},
    "vim/runner.py": {"command_line", "errors"},
    "vim/checkpoints.py": {"errors"},
    "vim/fields.py": {"errors"},
    "vim/options.py": {"errors", "fields"},
    "vim/registry.py": {"errors", "layers"},
    "vim/typing.py": {"checkpoints"},
    "vim/export.py": {"data", "engine", "errors", "layers"},
    "vim/forecasting.py": {"data", "engine", "errors", "options", "tasks"},
    "vim/layers": {"kernels", "checkpoints"},
    "models": {"layers", "checkpoints"},
    "vim/compat": {"command_line", "errors", "kernels", "runner"},
    "vim/explain": {"errors", "kernels", "layers"},
    "vim/data": {"errors", "fields", "options"},
    "vim/demo": {
        *("checkpoints", "command_line", "data", "engine", "errors", "explain", "layers", "measure", "models"),
        *("registry", "tasks"),
    },
    "vim/engine": {"checkpoints", "command_line", "data", "errors", "fields", "options", "registry", "typing"},
    "vim/measure": {"compat", "data", "errors", "kernels", "layers", "models", "registry", "typing"},
    "vim/tasks": {
        *("checkpoints", "data", "engine", "errors", "explain", "fields", "layers", "models", "options", "registry"),
        "typing",
    },
}
PARTS = {
    *("compat", "demo", "explain", "kernels", "layers", "models", "data", "engine", "measure", "tasks"),
    *("checkpoints", "command_line", "errors", "export", "fields", "forecasting", "options", "registry", "runner"),
    "typing",
}


def imported(path, root=ROOT):
    package = ["vim", *path.relative_to(root).parts[:-1]]
    package = package[1:] if package[1:2] == ["vim"] else package
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join(filter(None, (*start, node.module)))
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_point_one_way(room):
    own = room.removeprefix("vim/").removesuffix(".py")
    for path in [ROOT / room] if room.endswith(".py") else sorted((ROOT / room).rglob("*.py")):
        for name in imported(path):
            first, _, rest = name.partition(".")
            part = rest.split(".")[0]
            assert first not in ("tools", "models", "kernels", "tests"), f"{path} imports {name}"
            if first == "vim" and part in PARTS:
                assert part in ALLOWED[room] | {own}, f"{path} imports {name}"


def test_families_do_not_import_one_another():
    for path in sorted((ROOT / "models").glob("*.py")):
        if path.name != "__init__.py":
            families = {name for name in imported(path) if name.startswith("vim.models")}
            assert all(name.startswith("vim.models._registry.") for name in families), path


def test_imports_are_seen(tmp_path):
    (tmp_path / "models").mkdir()
    path = tmp_path / "models" / "one.py"
    path.write_text("from vim import engine\nfrom . import vim\nfrom .vim import Vim\nimport torch.nn\n")
    assert list(imported(path, tmp_path)) == ["vim.engine", "vim.models.vim", "vim.models.vim.Vim", "torch.nn"]


NEEDED = {"accelerate", "matplotlib", "mmengine", "rich"}  # by training and evaluation
LEFT_OUT = ["cv2", *sorted(set(chain(*EXTRAS.values())) - NEEDED)]
WITHOUT = f"""
import pathlib, runpy, sys
sys.modules.update(dict.fromkeys({LEFT_OUT}))  # as if they were not installed
for tool in sorted(pathlib.Path("tools").glob("*.py")):
    runpy.run_path(str(tool), run_name="imported")
"""


def test_every_tool_starts_without_optional_packages():
    done = subprocess.run([sys.executable, "-c", WITHOUT], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


WITHOUT_TRAIN = f"""
import pathlib, runpy, sys
from vim.errors import UserError
sys.modules.update(dict.fromkeys({sorted(NEEDED)}))
for tool in sorted(pathlib.Path("tools").glob("*.py")):
    try:
        runpy.run_path(str(tool), run_name="imported")
    except UserError as raised:
        error = raised
raise error
"""


def test_a_tool_without_its_packages_ends_with_a_line():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRAIN], cwd=ROOT, capture_output=True, text=True, timeout=300)
    command = "pip install -e '.[train]'"
    assert done.stderr == f"error: training or evaluation needs accelerate, which is not installed: {command}\n"
    assert done.returncode == 1


def test_tools_are_short():
    for path in sorted((ROOT / "tools").glob("*.py")):
        text = path.read_text()
        docstring = ast.get_docstring(ast.parse(text), clean=False)
        assert len(text.replace(docstring, "").splitlines()) < 100, path


def modules():
    """The package's modules by their installed names."""
    found = {}
    for room in ("vim", "models", "kernels"):
        for path in (ROOT / room).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts if parts[0] == "vim" else ("vim", *parts)
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def test_no_imports_go_in_a_circle():
    found = modules()
    # importing a name from a package reads its __init__, unless the name is a module of its own
    imports = {
        name: {i if i in found else i.rpartition(".")[0] for i in imported(path)} & found.keys() - {name}
        for name, path in found.items()
        if path.name != "__init__.py"
    }
    order = graphlib.TopologicalSorter(imports)
    assert len(list(order.static_order())) >= len(imports) > 100
