"""Export a model to .pt2 (torch.export), .ts (TorchScript) or .onnx, for any batch size, and compare both.

Examples:
    vim-zoo export local-dir:FOLDER model.onnx
    vim-zoo export vim_tiny vim_tiny.pt2 --checkpoint vim_t_midclstok_76p1acc.pth
"""

import argparse
from pathlib import Path

from vim.command_line import Parser
from vim.engine.files import make_folder
from vim.errors import EXTRAS, check_installed, run
from vim.export import SUFFIXES, build, choose_format, export
from vim.kernels.traceable import DECOMPOSITIONS, onnx_loop

NOTES = {
    "torch": "import vim before torch.export.load: it calls the ops of this package",
    "torchscript": "import vim before torch.jit.load: it calls the ops of this package",
    "onnx": "standard ONNX operators: it needs neither this package nor PyTorch",
}


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("model", help="a timm name of this package, such as vim_tiny, or local-dir:FOLDER")
    parser.add_argument("out", type=Path, help="the file to write: .pt2, .ts or .onnx")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights of the published layout")
    parser.add_argument("--format", choices=SUFFIXES.values(), help="of the file (default: by its suffix)")
    parser.add_argument("--img-size", type=int, metavar="N", help="height and width in pixels (default: the model's)")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    format = arguments.format or choose_format(arguments.out)
    model = build(arguments.model, checkpoint=arguments.checkpoint, img_size=arguments.img_size)
    if format == "onnx":
        check_installed(*EXTRAS["export"], purpose="ONNX")
    make_folder(arguments.out.parent)
    if not arguments.checkpoint and ":" not in arguments.model:
        print(f"{arguments.model} has random weights: name trained ones with --checkpoint")
    differences = export(model, arguments.out, format=format, decompositions=DECOMPOSITIONS, function=onnx_loop)
    print("the greatest difference from the model, on random images:")
    for found in differences:
        print(f"  batch size {found.batch_size}: {found.absolute:.1e}, {found.relative:.1e} of the greatest output")
    print(f"{arguments.out}, {arguments.out.stat().st_size / 1e6:.1f} MB: {NOTES[format]}")


if __name__ == "__main__":
    run(main)
