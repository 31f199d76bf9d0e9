"""Run by .ci/run with an installed wheel and nothing of the checkout: all parts are there, and a model trains."""

import os
import sys

sys.path.append(os.environ["BORROWED"])  # after the site-packages that hold the wheel

import timm  # noqa: E402
import torch  # noqa: E402

import vim  # noqa: E402
import vim.data.digits  # noqa: E402
import vim.kernels  # noqa: E402
import vim.tasks.build  # noqa: E402

installed = os.path.dirname(vim.__file__)
assert installed.startswith(sys.prefix), installed
for package in (vim.kernels, vim.models):
    assert os.path.dirname(package.__file__).startswith(installed), package
assert "cpu" in vim.kernels.available_backends(), "the wheel lacks the native kernels"
model = timm.create_model("test_vim", num_classes=10)
model(torch.randn(2, 3, 64, 64)).sum().backward()
assert all(parameter.grad is not None for parameter in model.parameters())
sys.stdout.write("the wheel works by itself\n")
