"""Run by .ci/run with an installed wheel and nothing of the checkout: all parts are there, and a model trains."""

import os
import subprocess
import sys
from pathlib import Path

sys.path.append(os.environ["BORROWED"])  # after the site-packages that hold the wheel

import timm  # noqa: E402
import torch  # noqa: E402
import vim_zoo  # noqa: E402

import vim  # noqa: E402
import vim.data.digits  # noqa: E402
import vim.kernels  # noqa: E402
import vim.tasks.build  # noqa: E402
from vim.engine.config import load_recipe  # noqa: E402
from vim.options import ImageRecipe  # noqa: E402

for package in (vim, vim.kernels, vim.models, vim_zoo):
    assert package.__file__.startswith(sys.prefix), package
assert "cpu" in vim.kernels.available_backends(), "the wheel lacks the native kernels"
model = timm.create_model("test_vim", num_classes=10)
model(torch.randn(2, 3, 64, 64)).sum().backward()
assert all(parameter.grad is not None for parameter in model.parameters())

assert load_recipe(Path("vim/in1k.py:vim-tiny_in1k"), ImageRecipe).schedule["num_epochs"] == 300
for command, expected in (("--help", "predict"), ("--version", "backends"), ("configs", "vim/in1k.py:ROW")):
    words = [Path(sys.executable).with_name("vim-zoo"), command]
    environment = {**os.environ, "PYTHONPATH": os.environ["BORROWED"]}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and expected in done.stdout, (command, done.stdout, done.stderr)
sys.stdout.write("the wheel works by itself\n")
