"""Print what models cost: parameters, tokens, and the compute of a forward pass, with the convention of each column.

Examples:
    vim-zoo info
    vim-zoo info vim_tiny vim_small --img-size 448 --options moe_every=2 router=top1
"""

import argparse
import ast
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from vim.command_line import Parser
from vim.engine.files import write_csv
from vim.errors import UserError, require, run
from vim.measure import Cost, cost_of
from vim.registry import own_models

NOTES = """\
Of one forward pass of {images}. 1 G is 10^9; a MAC is a multiply-add.
active            parameters that one token's features depend on: of experts behind a "top1" router, one. Experts are
                  experimental: no published vision result exists
GMACs, published  what the published figures count, and call FLOPs. Matrix products and convolutions; inside a mixer
                  only in_proj and out_proj, because fvcore does not see into the fused kernel between them. VMamba's
                  figures have all products, and the scan; MambaVision's have all but attention's; S4ND's here leave out
                  the products that make its kernels once a batch; FFTs are not counted
GMACs, all        all matrix products and convolutions: inside a mixer also x_proj, dt_proj, the depthwise convolution
GFLOPs, scan      for each image, direction, token, channel and state 9, as Mamba's author estimates:
                  https://github.com/state-spaces/mamba/issues/110; of Mamba-2's recurrence 5
GFLOPs, total     2 for each MAC, plus the scan. Norms, activations, gates and sums are not counted."""


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="timm names (default: all models of this package)")
    parser.add_argument("--img-size", type=int, metavar="N", help="height and width in pixels (default: the model's)")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="images in a pass (default: 1)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the numbers there, unrounded")
    parser.add_argument(
        "--options", type=model_option, nargs="+", default=[], metavar="KEY=VALUE", help="of all the models"
    )
    arguments = parser.parse_args()
    for option, value in (("--img-size", arguments.img_size), ("--batch-size", arguments.batch_size)):
        if value is not None and value < 1:
            raise UserError(f"{option} must be at least 1, got {value}")
    return arguments


def model_option(word: str) -> tuple[str, object]:
    """Read an option of a model; a value that is no Python literal is a string."""
    name, equals, value = word.partition("=")
    if not (name.isidentifier() and equals):
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {word!r}")
    with suppress(ValueError, SyntaxError):
        return name, ast.literal_eval(value)
    return name, value


def show(costs: list[Cost]) -> None:
    require("rich", "model_info.py")
    from rich.box import ASCII2
    from rich.console import Console
    from rich.table import Table

    table = Table(box=ASCII2, show_edge=False)
    table.add_column("model", overflow="fold")
    compute_headers = ("GMACs,\npublished", "GMACs,\nall", "GFLOPs,\nscan", "GFLOPs,\ntotal")
    for header in ("params", "active", "input", "tokens", *compute_headers):
        table.add_column(header, justify="right")
    for cost in costs:
        compute = [f"{number / 1e9:.3f}" for number in (cost.published_macs, cost.macs, cost.scan_flops, cost.flops)]
        parameters = [f"{number / 1e6:.2f} M" for number in (cost.parameters, cost.active_parameters)]
        table.add_row(cost.model, *parameters, cost.input, str(cost.tokens), *compute)
    Console(width=120).print(table)  # a narrow terminal would have the numbers cut


def main() -> None:
    arguments = parse()
    sizes, options = (arguments.img_size, arguments.batch_size), dict(arguments.options)
    costs = [cost_of(name, *sizes, **options) for name in arguments.models or own_models()]
    show(costs)
    print(NOTES.format(images="one image" if arguments.batch_size == 1 else f"{arguments.batch_size} images"))
    if arguments.csv:
        write_csv(arguments.csv, [asdict(cost) for cost in costs])


if __name__ == "__main__":
    run(main)
