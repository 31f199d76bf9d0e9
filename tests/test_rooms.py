import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# what each room may import of the others
ALLOWED = {
    "kernels": set(),
    "vim/layers": {"kernels"},
    "models": {"layers", "checkpoints"},
    "vim/data": {"errors"},
    "vim/engine": {"checkpoints", "data", "errors", "kernels"},
}
PARTS = {"kernels", "layers", "models", "data", "engine", "checkpoints", "errors"}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = f"vim.{path.parent.name}" if node.level else ""  # where a relative import starts
            module = ".".join(filter(None, (package, node.module)))
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_point_one_way(room):
    own = room.removeprefix("vim/")
    for path in sorted((ROOT / room).glob("*.py")):
        for name in imported(path):
            first, _, rest = name.partition(".")
            part = rest.split(".")[0]
            assert first not in ("tools", "models", "kernels", "tests"), f"{path} imports {name}"
            if first == "vim" and part in PARTS:
                assert part in ALLOWED[room] | {own}, f"{path} imports {name}"


def test_families_do_not_import_one_another():
    for path in sorted((ROOT / "models").glob("*.py")):
        if path.name != "__init__.py":
            assert not [name for name in imported(path) if name.startswith("vim.models")], path


def test_imports_are_seen(tmp_path):
    (tmp_path / "models").mkdir()
    path = tmp_path / "models" / "one.py"
    path.write_text("from vim import engine\nfrom . import vim\nfrom .vim import Vim\nimport torch.nn\n")
    assert list(imported(path)) == ["vim.engine", "vim.models.vim", "vim.models.vim.Vim", "torch.nn"]


OPTIONAL = ("cv2", "datasets", "mlxtend", "onnx", "onnxruntime", "onnxscript", "pandas", "statsmodels", "webdataset")
WITHOUT = f"""
import pathlib, runpy, sys
sys.modules.update(dict.fromkeys({OPTIONAL}))  # as if they were not there
for tool in sorted(pathlib.Path("tools").glob("*.py")):
    runpy.run_path(str(tool), run_name="imported")
"""


def test_every_tool_starts_without_optional_packages():
    done = subprocess.run([sys.executable, "-c", WITHOUT], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_tools_are_short():
    for path in sorted((ROOT / "tools").glob("*.py")):
        assert len(path.read_text().splitlines()) < 100, path
