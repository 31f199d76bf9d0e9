"""What Triton's compiler makes of the kernels, checked without a GPU: see triton_static.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
pytestmark = pytest.mark.skipif(not (TOOLS / "nvdisasm").exists(), reason="triton has no compiler for NVIDIA here")

# by channels of a program: registers a thread, bytes and instructions of spills, instructions a state update
MOST = {
    ("forward_kernel", 64): (168, 16, 9.7),
    ("states_kernel", 64): (168, 0, 15.5),
    ("gradients_kernel", 64): (168, 240, 19.3),
    ("forward_kernel", 32): (168, 16, 12.6),
    ("states_kernel", 32): (168, 0, 20.3),
    ("gradients_kernel", 32): (168, 0, 23.3),
    ("ends_kernel", 32): (128, 0, 11.5),
}


def run(*arguments):
    """What triton_static.py prints. In a process of its own, since in this one Triton may interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = [sys.executable, Path(__file__).with_name("triton_static.py"), *arguments]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module", params=["many", "few"])
def figures(request):
    """Of many images on both architectures; of one image, with fewer states too, and of what the interpreter
    forgives and Vim does not use."""
    if request.param == "many":
        return run("--architectures", "80", "90")
    return run("--architectures", "90", "--images", "1", "--states", "16", "8", "1", "--unusual")


def test_registers_and_spills(figures):
    assert len(figures) >= 20
    for row in figures:
        registers, spilled, _ = MOST.get((row["kernel"], row["block"]), (128, 0, 0))
        assert row["registers"] <= registers, row
        assert row["spilled"] <= spilled, row


def test_instructions_a_state_update(figures):
    scans = [row for row in figures if row["states"] == 16]
    assert {row["kernel"] for row in scans} >= {"forward_kernel", "states_kernel", "gradients_kernel"}
    for row in scans:
        assert row["per_update"] <= MOST[row["kernel"], row["block"]][2], row


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_state_space_duality_multiplies_matrices(dtype):
    rows = run("--architectures", "90", "--ssd", dtype, "64", "64")
    assert {row["kernel"] for row in rows} >= {"forward_kernel", "states_kernel", "gradients_kernel", "pass_kernel"}
    for row in rows:
        assert (row["matrix"] > 0) == (row["states"] is not None), row  # in every kernel with matrices of states
        assert row["spilled"] == 0, row
