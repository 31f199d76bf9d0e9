"""Compare ops and models side by side in one run: time, throughput, peak memory; forward passes and training steps.

Without --models: the scan's backends, Vim against DeiT at several sizes, VideoMamba against a transformer, and the time
that `import vim` adds to `import timm`. Transformers have PyTorch's fused attention, or with TIMM_FUSED_ATTN=0 before
the command the plain one. `benchmark.py models` compares models of every family with timm's of equal size, and on a CPU
the scan with its exponentials alone, and profiles Vim-Small. `benchmark.py baselines` compares ways to mix tokens:
attention, linear attention, S4D, the selective scan, state space duality. `benchmark.py gpu` checks, times, tunes and
profiles the Triton backend.

Examples:
    vim-zoo benchmark
    vim-zoo benchmark --models vim_tiny deit_tiny_patch16_224 --img-size 224 448 --forward-only
"""

import argparse
import itertools
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that measures memory is talkative

import torch

from vim.command_line import Parser
from vim.engine.files import write_csv
from vim.errors import UserError, require, run
from vim.kernels import available_backends
from vim.measure import PASSES, Row, compare_imports, compare_models, gpu, plot, show
from vim.measure.baselines import compare_baselines, plot_baselines, show_baselines
from vim.measure.overview import compare_everything, compare_with_peers
from vim.measure.profile import profile_small


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--models", nargs="+", metavar="NAME", help="timm names; speeds are relative to the last")
    parser.add_argument("--img-size", type=int, nargs="+", default=[224], metavar="N", help="with --models, pixels")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1], metavar="N", help="with --models, images")
    parser.add_argument("--forward-only", action="store_true", help="with --models, no training steps")
    add_shared(parser)
    parser.set_defaults(rounds=9, device="cuda" if torch.cuda.is_available() else "cpu", amp="no")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    add_shared(commands.add_parser("models", help="models of every family and timm's of equal size"), argparse.SUPPRESS)
    mixing = commands.add_parser("baselines", help="ways to mix tokens")
    add_shared(mixing, argparse.SUPPRESS)
    mixing.add_argument("--tokens", type=int, nargs="+", default=[196, 784, 3136, 12544], metavar="N")
    mixing.add_argument("--width", type=int, nargs="+", default=[192, 384, 768], metavar="N", help="channels")
    stages = commands.add_parser("gpu", help="the Triton backend on a GPU")
    stages.add_argument("--out", type=Path, required=True, metavar="DIR", help="gets the results, a file a stage")
    stages.add_argument("--minutes", type=float, default=gpu.MINUTES, metavar="N", help="for all stages together")
    stages.add_argument("--stages", nargs="+", choices=gpu.STAGES, default=list(gpu.STAGES), metavar="STAGE")
    stages.add_argument("--rehearse", action="store_true", help="toy shapes, also without a GPU")
    return parser.parse_args()


def add_shared(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    parser.add_argument("--rounds", type=int, default=default, metavar="N", help="runs to measure (default: 9)")
    parser.add_argument("--device", default=default, help="cpu or cuda")
    parser.add_argument("--amp", choices=("no", "bf16", "fp16"), default=default, help="autocast of models")
    parser.add_argument("--csv", type=Path, default=default, metavar="FILE", help="also write the figures there")
    parser.add_argument("--plot", type=Path, default=default, metavar="FILE", help="also draw them over sizes there")


def chosen(arguments: argparse.Namespace) -> list[Row]:
    if arguments.command == "models":
        return compare_with_peers(arguments.device, arguments.amp, arguments.rounds)
    if not arguments.models:
        return compare_everything(arguments.device, arguments.amp)
    measure = partial(compare_models, device=arguments.device, amp=arguments.amp, rounds=arguments.rounds)
    passes = PASSES[:1] if arguments.forward_only else PASSES
    sizes = itertools.product(arguments.img_size, arguments.batch_size)
    return [r for s, b in sizes for r in measure(arguments.models, img_size=s, batch_size=b, passes=passes)]


def main() -> None:
    arguments = parse()
    if arguments.command == "gpu":
        require("triton", "benchmark.py gpu")
        from vim.measure.gpu.command import run_stages

        right = run_stages(arguments.out, arguments.minutes, arguments.stages, rehearse=arguments.rehearse)
        sys.exit(0 if right else 1)
    if arguments.command != "baselines" and min(*arguments.img_size, *arguments.batch_size, arguments.rounds) < 1:
        raise UserError("--img-size, --batch-size and --rounds must be at least 1")
    print(f"PyTorch {torch.__version__}, {arguments.device}, {torch.get_num_threads()} threads, amp {arguments.amp}")
    draw: Callable[[Path], None]
    if arguments.command == "baselines":
        options = {name: getattr(arguments, name) for name in ("device", "amp", "rounds")}
        mixed = show_baselines(compare_baselines(arguments.tokens, arguments.width, **options))
        figures, draw = [asdict(row) for row in mixed], partial(plot_baselines, mixed)
    else:
        rows = chosen(arguments)
        show(rows)
        if arguments.command == "models" and arguments.device == "cpu" and "cpu" in available_backends():
            print(profile_small(arguments.rounds))
        elif not arguments.models:
            print(compare_imports())
        figures, draw = [asdict(row) for row in rows], partial(plot, rows)
    if arguments.csv:
        write_csv(arguments.csv, figures)
    if arguments.plot:
        draw(arguments.plot)


if __name__ == "__main__":
    run(main)
