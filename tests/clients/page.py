"""The snippets of docs/clients.md, run as they stand, but small and without a download."""

import re

from tests.tiny import ROOT

FAMILIES = [
    *("test_vim", "test_vim_ssd", "test_videomamba", "test_mambar"),
    *("test_vim2", "test_vmamba", "test_vssd", "test_mambavision"),
]
PAGE = (ROOT / "docs/clients.md").read_text()
SECTIONS = dict(re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
SMALL = {
    r"224": "64",
    r'(vim_tiny"|name), pretrained=True': r"\1, pretrained=False",
    "pretrained_image=True": "pretrained_image=False",
}


def snippet(title, language, model_name):
    """The code of a section, with another model than its `vim_tiny`."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", SECTIONS[title], re.MULTILINE | re.DOTALL)
    text = "\n".join(blocks)
    for words, small in {**SMALL, "vim_tiny": model_name}.items():
        text = re.sub(words, small, text)
    return text


def run(title, model_name):
    """Run a section's Python; return its variables."""
    variables = {"__name__": "page"}
    exec(compile(snippet(title, "python", model_name), f"docs/clients.md, {title}", "exec"), variables)
    return variables
