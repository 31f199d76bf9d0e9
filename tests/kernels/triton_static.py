"""What Triton's compiler makes of every kernel, with no GPU: registers, spills, instructions.

    python tests/kernels/triton_static.py [--states 16] [--architectures 80 90]
    python tests/kernels/triton_static.py --ssd bfloat16 64 64  # or all

The ops run on tensors without memory, by default of Vim-Small's sizes; their launches are recorded, and compiled. A
state update is one of n in one channel and token: what a loop executes for a token is shared out among a thread's.
"""

import argparse
import itertools
import json
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vim.kernels import gate
from vim.kernels.conv1d import triton as conv1d
from vim.kernels.norm import triton as norm
from vim.kernels.scan import triton as scan
from vim.kernels.scan.reference import Inputs, Options
from vim.kernels.ssd import reference as duality
from vim.kernels.ssd import triton as ssd

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")


@dataclass
class Recorder:
    """Stands for a kernel, and keeps what it is launched with."""

    kernel: triton.JITFunction
    launches: list = field(default_factory=list)

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append((args, options))


def record(launch):
    """The launches that `launch()` makes: (kernel, arguments, options)."""
    recorders = []
    for module in (conv1d, gate, norm, scan, ssd):
        for name, kernel in vars(module).items():
            if isinstance(kernel, triton.JITFunction) and name.endswith("_kernel"):
                recorders.append((module, name, Recorder(kernel)))
    for module, name, recorder in recorders:
        setattr(module, name, recorder)
    try:
        launch()
    finally:
        for module, name, recorder in recorders:
            setattr(module, name, recorder.kernel)
    return [(recorder.kernel, *made) for _, _, recorder in recorders for made in recorder.launches]


def compile_launch(kernel, args, options, architecture):
    """The compiled kernel, specialised as a launch would."""
    constants, attributes = {}, {}

    def declare(value, path):
        if isinstance(value, tuple):
            return tuple(declare(item, (*path, i)) for i, item in enumerate(value))
        if isinstance(value, torch.Tensor):
            attributes[path] = [["tt.divisibility", 16]]
            return TYPES[value.dtype]
        if value is None or value is True or value is False or value == 1:
            constants[path] = value
            return "constexpr"
        if isinstance(value, float):
            return "fp32"
        if value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32" if value < 2**31 else "i64"

    given = dict(zip(kernel.arg_names, args, strict=False))
    signature = {name: declare(value, (kernel.arg_names.index(name),)) for name, value in given.items()}
    for parameter in kernel.params:  # an integer that the kernel must not know
        if parameter.do_not_specialize:
            signature[parameter.name] = "i32"
            constants.pop((kernel.arg_names.index(parameter.name),), None)
    chosen = {name: options[name] for name in OPTIONS if name in options}
    for name, value in options.items():
        if name not in chosen:
            signature[name] = "constexpr"
            constants[(kernel.arg_names.index(name),)] = value
    source = ASTSource(kernel, {name: signature[name] for name in kernel.arg_names}, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=chosen)


def disassemble(compiled):
    """The instructions, a list; where each label stands in it; and the line that tells what the kernel uses."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        listing = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True)
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True)
    labels, instructions = {}, []
    for line in listing.stdout.splitlines():
        if label := re.match(r"\s*(\.L_\S+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?(.*?)\s*;", line):
            instructions.append(instruction[1])
    return instructions, labels, usage.stdout + usage.stderr


def main_loop(instructions, labels):
    """The loop over tokens: that with the most exponentials among those that load, and have no such loop in them."""
    loops = []
    for end, instruction in enumerate(instructions):
        target = re.search(r"^BRA.*\((\.L_\S+)\)", instruction)
        if target and any(i.startswith("LDG") for i in instructions[labels[target[1]] : end]):
            loops.append((labels[target[1]], end))
    inner = [(a, z) for a, z in loops if not any(a <= b and y <= z and (a, z) != (b, y) for b, y in loops)]
    bodies = [instructions[a : z + 1] for a, z in inner]
    return max(bodies, key=lambda body: sum("MUFU.EX2" in i for i in body), default=[])


def measure(kernel, args, options, architecture):
    compiled = compile_launch(kernel, args, options, architecture)
    instructions, labels, usage = disassemble(compiled)
    figures = {name: int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "SHARED")}
    row = {
        "module": kernel.__module__.removeprefix("vim.kernels."),
        "kernel": kernel.__name__,
        "block": options.get("BLOCK") if "N" in options else None,
        "architecture": architecture,
        "states": options.get("N"),
        "registers": figures["REG"],
        "spilled": figures["STACK"] + sum(i.startswith(("LDL", "STL")) for i in instructions),
        "matrix": sum(i.startswith(("HGMMA", "HMMA")) for i in instructions),  # on tensor cores
    }
    if "BLOCK" in options and "N" in options:
        body = main_loop(instructions, labels)
        updates = options["N"] * options["BLOCK"] // 32  # a token, for each thread of the warp
        exponentials = sum("MUFU.EX2" in i for i in body)
        tokens = max(exponentials // updates, 1)
        row["per_update"] = round(len(body) / (tokens * updates), 2)
        row["opcodes"] = dict(Counter(i.split()[0].split(".")[0] for i in body).most_common(12))
    return row


def forward_and_backward(b, k, l, d, n, dtype=torch.bfloat16):
    """Every op as a block of Vim calls it."""
    rows = torch.empty(b, k, l, d, dtype=dtype, device="meta")
    narrow = torch.empty(b, k, l, 1, n, dtype=dtype, device="meta")
    A, vector = torch.empty(k, d, n, device="meta"), torch.empty(k, d, device="meta")
    gated = torch.empty(b, 1, l, d, dtype=dtype, device="meta")
    inputs = Inputs(rows, rows, A, narrow, narrow, D=vector, z=gated, delta_bias=vector)
    options = Options([False, True][:k], delta_softplus=True, combine="mean")
    y, _, ungated, saved = scan.selective_scan(inputs, options, save=True)
    scan.selective_scan_backward(y, None, ungated, saved, inputs, options)
    convolution = (rows, torch.empty(k, d, 4, dtype=dtype, device="meta"), vector, True, [False, True][:k])
    conv1d.causal_conv1d(*convolution)
    conv1d.causal_conv1d_backward(rows, *convolution)
    x, weight = (torch.empty(*size, d // 2, dtype=dtype, device="meta") for size in ((b, l), ()))
    norm.rms_norm(x, weight, 1e-5)
    norm.rms_norm_backward(x, x, weight, 1e-5)


def ssd_forward_and_backward(dtype, p, n):
    """State space duality with everything a block may give; of many images, then of one long sequence."""
    k, h, kind = 2, 6, getattr(torch, dtype)

    def empty(*sizes, dtype=kind):
        return torch.empty(*sizes, dtype=dtype, device="meta")

    for b, l in ((64, 197), (1, 6085)):
        narrow, vector = empty(b, k, l, 1, n), empty(k, h, dtype=torch.float32)
        optional = empty(k, h, p, dtype=torch.float32), empty(b, k, l, h, p), vector
        inputs = duality.Inputs(empty(b, k, l, h, p), empty(b, k, l, h), vector, narrow, narrow, *optional)
        options = duality.Options([False, True], dt_softplus=True)
        y, _, ungated, saved = ssd.ssd(inputs, options, save=True)
        ssd.ssd_backward(y, None, ungated, saved, inputs, options)


def unusual():
    """The scan with nothing optional, then with everything; in segments and with the states in parts."""
    scan.MOST_STATES = 2
    for k, g, given, combine, dtype in (
        (1, 1, False, "none", torch.float32),
        (2, 2, True, "sum", torch.float16),
    ):
        b, l, d, n = 2, 300, 96, 4
        rows, narrow, wide = ((b, k, l, d), dtype), ((b, k, l, g, n), dtype), ((b, 1, l, d), dtype)
        A, vector, state = ((k, d, n), torch.float32), ((k, d), torch.float32), ((b, k, d, n), torch.float32)
        optional = (vector, wide, vector, state) if given else (None,) * 4
        shapes = (rows, rows, A, narrow, narrow, *optional)
        inputs = Inputs(*(x if x is None else torch.empty(x[0], dtype=x[1], device="meta") for x in shapes))
        options = Options([True, False][:k], delta_softplus=given, combine=combine, return_last_state=given)
        y, _, ungated, saved = scan.selective_scan(inputs, options, save=True)
        scan.selective_scan_backward(y, inputs.initial_state, ungated, saved, inputs, options)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--states", type=int, nargs="+", default=[16])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=197)
    parser.add_argument("--channels", type=int, default=768)
    parser.add_argument("--unusual", action="store_true", help="also what Vim does not use")
    parser.add_argument("--ssd", nargs="+", metavar="all | DTYPE P N", help="state space duality instead")
    parser.add_argument("--architectures", type=int, nargs="+", default=[80, 90])
    options = parser.parse_args()
    sizes = (options.images, 2, options.tokens, options.channels)
    launches = [launch for n in options.states for launch in record(partial(forward_and_backward, *sizes, n))]
    launches += record(unusual) if options.unusual else []
    if options.ssd:
        every = itertools.product(("bfloat16", "float16", "float32"), (32, 64), (16, 64, 128))
        chosen = every if options.ssd == ["all"] else [(options.ssd[0], int(options.ssd[1]), int(options.ssd[2]))]
        launches = [launch for sizes in chosen for launch in record(partial(ssd_forward_and_backward, *sizes))]
    launches = list(
        {(id(kernel), str(options)): (kernel, args, options) for kernel, args, options in launches}.values()
    )
    for architecture in options.architectures:
        for launch in launches:
            print(json.dumps(measure(*launch, architecture)), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
