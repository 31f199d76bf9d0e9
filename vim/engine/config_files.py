"""The configs that the package brings: their names, what each is for, and how a command line finds one."""

import ast
from dataclasses import dataclass
from pathlib import Path

import vim
from vim.errors import no_such

FOLDER = Path(vim.__file__).parent / "configs"


@dataclass(frozen=True)
class About:
    """What a config says of itself.

    Attributes:
        text: its docstring.
        is_table: whether it has rows; a command takes one as FILE.py:ROW.
    """

    text: str
    is_table: bool


def find_config(file: Path) -> Path:
    """A file on disk, or else the package's config of that name: "vim/in1k.py" and "configs/vim/in1k.py" are the same.

    Raises:
        UserError: there is neither; the message has the closest names.
    """
    if file.is_file():
        return file
    name = file.relative_to("configs") if file.parts[:1] == ("configs",) else file
    names = config_names()
    if str(name) not in names:
        raise no_such("config", file, names)
    return FOLDER / name


def config_names() -> list[str]:
    """The names of the package's configs, such as "vim/in1k.py", which any command takes from any folder."""
    files = (path.relative_to(FOLDER) for path in FOLDER.glob("*/*.py"))
    return sorted(str(file) for file in files if file.parts[0] != "_base_")


def read_about(file: Path) -> About:
    """What a config says of itself; its code does not run."""
    module = ast.parse(find_config(file).read_text())
    assigned = (target for node in module.body if isinstance(node, ast.Assign) for target in node.targets)
    is_table = any(isinstance(target, ast.Name) and target.id == "rows" for target in assigned)
    return About(ast.get_docstring(module) or "", is_table)
