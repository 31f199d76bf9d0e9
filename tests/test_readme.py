"""The README's first snippet, with random weights in place of the published ones."""

import ast
import re
from importlib.resources import files

from tests.tiny import ROOT


def test_the_snippet_that_classifies_an_image(capsys):
    (code,) = re.findall(r"```python\n(import timm, vim\nfrom PIL.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for word, other in (
        (", pretrained=True", ""),
        ('"photo.jpg"', repr(str(files("sklearn") / "datasets/images/china.jpg"))),
    ):
        assert code.count(word) == 1
        code = code.replace(word, other)
    found = {}
    exec(code, found)
    assert len(set(found["classes"][0].tolist())) == 5
    assert 0 < found["chances"].sum() < 1
    assert len(ast.literal_eval(capsys.readouterr().out)) == 5
