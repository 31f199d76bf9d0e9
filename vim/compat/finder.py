"""The import finder that serves the names of names.py, in this process only."""

import logging
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Literal

from torch.utils._triton import has_triton_package

from vim.errors import UserError
from vim.kernels import available_backends
from vim.kernels.backends import has_triton

from . import language, names, shims, spawn, triton_stub
from .names import EXTENSIONS, KERNELS, PACKAGES, TOP

_logger = logging.getLogger(__name__)
# a folder without __init__.py is a fork if it has one of these, and else no package: the sources of an extension, say
FORKED = {
    "mamba_ssm": ("ops/selective_scan_interface.py", "modules/mamba_simple.py"),
    "causal_conv1d": ("causal_conv1d_interface.py",),
}


def install(
    *, prefer: Literal["ours"] | None = None, alias: Mapping[str, str] | None = None, cpu_shims: bool = False
) -> None:
    """Serve the import names of the published packages from now on; a second call replaces the options.

    The compiled extensions and the modules of Triton kernels are always served. `mamba_ssm`, `causal_conv1d` and
    `selective_scan` are served where the program has no fork of them on its path.

    Args:
        prefer: "ours" to serve the names although the real packages are installed.
        alias: names of renamed forks or extensions, and the names that they stand for:
            {"dis_mamba.mamba_ssm": "mamba_ssm"}.
        cpu_shims: on a machine without a GPU, also run code that asks for one on the CPU.

    Raises:
        UserError: one of the packages is imported already; or is installed, and not `prefer="ours"`; another `prefer`;
            an alias of a name that is not served.
    """
    if prefer not in (None, "ours"):
        raise UserError(f"prefer must be 'ours' or None, got {prefer!r}")
    alias = dict(alias or {})
    for name, target in alias.items():
        if target not in EXTENSIONS | PACKAGES:
            raise UserError(f"alias {name!r} stands for {target!r}, which is not served: expected one of {TOP}")
    if _installed_finder() is None:
        _refuse_real((*TOP, *alias), prefer)
        _logger.warning(
            "vim.compat serves %s and their extensions from vim.kernels, backend %s",
            *(", ".join(name for name in PACKAGES if "." not in name), available_backends()[-1]),
        )
    _serve(alias, cpu_shims)


def _serve(alias: dict[str, str], cpu_shims: bool) -> None:
    """Serve the names, and in the processes that this one starts."""
    finder = _installed_finder()
    if finder is None:
        finder = Finder()
        sys.meta_path.insert(0, finder)
    finder.alias = alias
    if cpu_shims:
        shims.install()
    spawn.inherit(_serve, alias, cpu_shims)


def uninstall() -> None:
    """Serve nothing any more, and forget the modules that were served; those that the program imported itself stay."""
    shims.uninstall()
    spawn.disinherit()
    finder = _installed_finder()
    if finder is None:
        return
    sys.meta_path.remove(finder)
    for name, module in list(sys.modules.items()):
        if isinstance(getattr(module, "__loader__", None), ServedLoader):
            del sys.modules[name]
            parent, _, leaf = name.rpartition(".")
            if getattr(sys.modules.get(parent), leaf, None) is module:
                delattr(sys.modules[parent], leaf)


def served() -> list[str]:
    """Return the names that were imported from us so far."""
    finder = _installed_finder()
    return [] if finder is None else list(finder.served)


class ServedLoader(Loader):
    """Fills a module with the objects of its name; `missing` makes those that are not in the table."""

    def __init__(self, contents: Mapping[str, str], missing: Callable[[str], object] | None = None) -> None:
        self.contents, self.missing = contents, missing

    def exec_module(self, module: ModuleType) -> None:
        """Set the module's attributes."""
        module.__file__ = names.__file__  # who serves it, for a program that prints or inspects it
        for name, source in self.contents.items():
            file, _, attribute = source.partition(".")
            setattr(module, name, attrgetter(attribute)(import_module(f"vim.compat.{file}")))
        module.__getattr__ = self.missing or partial(_also_there, module.__name__)  # type: ignore[method-assign]


def _also_there(module: str, name: str) -> object:
    """Return what published files import themselves, and others from there: modules, and einops' functions."""
    if name in ("rearrange", "repeat"):
        return getattr(import_module("einops"), name)
    for other in (f"{module}.{name}", name):
        if other in EXTENSIONS or other in PACKAGES:
            return import_module(other)
    raise AttributeError(f"module {module!r} has no attribute {name!r}: vim.compat does not serve it")


class Finder(MetaPathFinder):
    """Finds the names that are served."""

    def __init__(self) -> None:
        # PyTorch and our kernels keep the answer: they do not see the stub
        self.has_triton = has_triton() or has_triton_package()
        self.alias: dict[str, str] = {}
        self.served: dict[str, None] = {}  # a set in the order of first use

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a name that is served, otherwise None."""
        name = self._resolve(fullname)
        if name.partition(".")[0] == "triton" and not self.has_triton:
            loader = ServedLoader(triton_stub.CONTENTS if name == "triton" else {}, triton_stub.stub)
            return ModuleSpec(fullname, loader, origin="vim.compat", is_package=True)
        contents = EXTENSIONS.get(name)
        if contents is None:
            contents = PACKAGES.get(name)
            if contents is None or self._is_forked(fullname):
                return None
        self.served[fullname] = None
        loader = ServedLoader(contents, language.refused if name in KERNELS else None)
        is_package = any(other.startswith(f"{name}.") for other in EXTENSIONS | PACKAGES)
        return ModuleSpec(fullname, loader, origin="vim.compat", is_package=is_package)

    def _resolve(self, fullname: str) -> str:
        """Return the published name that a name stands for."""
        for name, target in self.alias.items():
            if fullname == name or fullname.startswith(f"{name}."):
                return target + fullname.removeprefix(name)
        return fullname

    def _is_forked(self, fullname: str) -> bool:
        """Whether the program has a module of this name, or of a package around it, of its own."""
        parent = fullname.rpartition(".")[0]
        if parent:
            return not isinstance(getattr(sys.modules.get(parent), "__loader__", None), ServedLoader)
        spec = _spec_of_others(fullname)
        return spec is not None and not _is_real(spec) and _is_package(spec, self._resolve(fullname))


def _installed_finder() -> Finder | None:
    return next((finder for finder in sys.meta_path if isinstance(finder, Finder)), None)


def _refuse_real(names: Sequence[str], prefer: str | None) -> None:
    """Refuse to serve names that the program has, or would have without us, from an installation."""
    for name in names:
        if name in sys.modules:
            place = getattr(sys.modules[name], "__file__", None) or "a package without a file"
            raise UserError(f"{name} is already imported, from {place}: call vim.compat.install() before")
        spec = _spec_of_others(name) if "." not in name else None
        if spec is not None and _is_real(spec) and prefer != "ours":
            raise UserError(
                f"{name} is installed, at {spec.origin}: uninstall it, or call vim.compat.install(prefer='ours')"
            )


def _spec_of_others(name: str) -> ModuleSpec | None:
    """Return what the import system finds without us."""
    for finder in sys.meta_path:
        if not isinstance(finder, Finder):
            spec = finder.find_spec(name, None, None)
            if spec is not None:
                return spec
    return None


def _is_real(spec: ModuleSpec) -> bool:
    """Whether a module is one that pip installed, and not a file of the program."""
    folders = {Path(sysconfig.get_path(key)) for key in ("purelib", "platlib")}
    folders |= {Path(entry) for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")}
    return spec.has_location and bool(folders & set(Path(str(spec.origin)).parents))


def _is_package(spec: ModuleSpec, name: str) -> bool:
    """Whether Python could import a package from this; not only a folder of that name."""
    if spec.has_location:
        return True
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    return any((folder / file).is_file() for folder in folders for file in FORKED.get(name, ()))
