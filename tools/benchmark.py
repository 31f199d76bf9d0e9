"""Compare ops and models side by side in one run: time, throughput, peak memory; forward passes and training steps.

Without --models: the scan's backends, Vim against DeiT at several sizes, VideoMamba against a transformer, and the time
that `import vim` adds to `import timm`. Transformers have PyTorch's fused attention, or with TIMM_FUSED_ATTN=0 before
the command the plain one. `benchmark.py gpu` checks, times, tunes and profiles the Triton backend.

Examples:
    vim-zoo benchmark
    vim-zoo benchmark --models vim_tiny deit_tiny_patch16_224 --img-size 224 448 --forward-only
"""

import argparse
import itertools
import os
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that measures memory is talkative

import torch

from vim.command_line import Parser
from vim.engine.files import write_csv
from vim.errors import UserError, require, run
from vim.measure import PASSES, Row, compare_everything, compare_imports, compare_models, gpu, plot


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--models", nargs="+", metavar="NAME", help="timm names; speeds are relative to the last")
    parser.add_argument("--img-size", type=int, nargs="+", default=[224], metavar="N", help="with --models, pixels")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1], metavar="N", help="with --models, images")
    parser.add_argument("--forward-only", action="store_true", help="with --models, no training steps")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="with --models, how many to take medians of")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--amp", choices=("no", "bf16", "fp16"), default="no", help="autocast of models")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the figures there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw time and memory over sizes there")
    stages = parser.add_subparsers(dest="command", metavar="gpu").add_parser("gpu", help="the Triton backend on a GPU")
    stages.add_argument("--out", type=Path, required=True, metavar="DIR", help="gets the results, a file a stage")
    stages.add_argument("--minutes", type=float, default=gpu.MINUTES, metavar="N", help="for all stages together")
    stages.add_argument("--stages", nargs="+", choices=gpu.STAGES, default=list(gpu.STAGES), metavar="STAGE")
    stages.add_argument("--rehearse", action="store_true", help="toy shapes, also without a GPU")
    return parser.parse_args()


def chosen(arguments: argparse.Namespace) -> list[Row]:
    if min(*arguments.img_size, *arguments.batch_size, arguments.rounds, 1) < 1:
        raise UserError("--img-size, --batch-size and --rounds must be at least 1")
    measure = partial(compare_models, device=arguments.device, amp=arguments.amp, rounds=arguments.rounds)
    passes = PASSES[:1] if arguments.forward_only else PASSES
    sizes = itertools.product(arguments.img_size, arguments.batch_size)
    return [r for s, b in sizes for r in measure(arguments.models, img_size=s, batch_size=b, passes=passes)]


def show(rows: list[Row]) -> None:
    require("rich", "benchmark.py")
    from rich.box import ASCII2
    from rich.console import Console
    from rich.table import Table

    table = Table(box=ASCII2, show_edge=False)
    for header in ("", "", "batch", "size", "ms", "images/s", "peak MB", "speed"):
        table.add_column(header, justify="right" if header else "left")
    for row in rows:
        sizes = (str(row.batch_size), str(row.size))
        figures = (f"{row.milliseconds:.2f}", f"{row.per_second:.1f}", f"{row.peak_mb:.1f}", f"{row.speed:.2f} x")
        table.add_row(row.name, row.run, *sizes, *figures, end_section=row.name == row.baseline)
    Console(width=110).print(table)  # a narrow terminal would have the numbers cut
    print(
        "size: pixels a side, of the scan: tokens. speed: relative to the last of a group. peak MB: what PyTorch\n"
        "allocates in a run, on top of weights, images and the optimizer's state."
    )


def main() -> None:
    arguments = parse()
    if arguments.command == "gpu":
        require("triton", "benchmark.py gpu")
        from vim.measure.gpu.command import run_stages

        right = run_stages(arguments.out, arguments.minutes, arguments.stages, rehearse=arguments.rehearse)
        sys.exit(0 if right else 1)
    print(f"PyTorch {torch.__version__}, {arguments.device}, {torch.get_num_threads()} threads, amp {arguments.amp}")
    rows = chosen(arguments) if arguments.models else compare_everything(arguments.device, arguments.amp)
    show(rows)
    if not arguments.models:
        print(compare_imports())
    if arguments.csv:
        write_csv(arguments.csv, [asdict(row) for row in rows])
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    run(main)
