"""What mkdocs.yml asks of MkDocs besides its plugins."""

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT_PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}
ROLE = re.compile(r":([a-z]+):`([\w.]+)`")  # such as :func:`vim.explain.explain`


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the pages that the navigation does not name."""
    assert config.nav is not None
    named = set(re.findall(r"'([\w/]+\.md)'", repr(config.nav)))
    found = (str(path.relative_to(config.docs_dir)) for path in sorted(Path(config.docs_dir).rglob("*.md")))
    if others := [name for name in found if name not in named]:
        config.nav.append({"More": others})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files of the repository's root, whose links are those of GitHub."""
    root = Path(config.config_file_path).parent
    for source, page in ROOT_PAGES.items():
        text = (root / source).read_text().replace("](docs/", "](")
        for other in ROOT_PAGES:
            text = text.replace(f"]({other})", f"]({ROOT_PAGES[other]})")
        files.append(File.generated(config, page, content=text))
    return files


class Roles(griffe.Extension):
    """Sphinx's roles in docstrings as code, with a link where the site has the object."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring:
            obj.docstring.value = ROLE.sub(lambda match: _reference(obj, *match.groups()), obj.docstring.value)


def _reference(obj: griffe.Object, role: str, name: str) -> str:
    """The code and link of a name, which is the package's or of the same module, or for a method of the same class."""
    scope = obj.parent if role == "meth" and obj.is_function else obj if role == "meth" else obj.module
    path = name if name.startswith("vim.") or scope is None else f"{scope.path}.{name}"
    return f'<autoref identifier="{path}" optional><code>{name}</code></autoref>'
