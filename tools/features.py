"""Write the features of images or videos to safetensors files, with an index that says which file is which row.

Examples:
    vim-zoo features work_dirs/vim-nano_1xb64_digits/best.pth IMAGES --out FEATURES
    vim-zoo features vim_t_midclstok_76p1acc.pth IMAGES --model vim_tiny --map -1 --out MAPS
"""

import argparse
import sys
from pathlib import Path

from vim.command_line import Parser
from vim.data import find_images, find_videos
from vim.errors import UserError, printable, run
from vim.tasks.features import Extractor, Writer, load_backbone


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="best.pth or last.pth of a run; with --model, published weights")
    parser.add_argument("inputs", type=Path, nargs="+", help="image or video files, or folders of them")
    parser.add_argument("--model", help="the timm name of the model that published weights are for, such as vim_small")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where to write")
    parser.add_argument(
        "--map",
        type=int,
        metavar="BLOCK",
        help="write the map of tokens after this block, -1 for the last, in place of the pooled features",
    )
    parser.add_argument("--batch-size", type=int, default=32, help="files per batch (default: 32)")
    parser.add_argument("--num-workers", type=int, default=2, help="processes that read files (default: 2)")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    for name, least in (("batch_size", 1), ("num_workers", 0)):
        if getattr(arguments, name) < least:
            option = name.replace("_", "-")
            raise UserError(f"--{option} must be at least {least}, got {getattr(arguments, name)}")
    model, transform = load_backbone(arguments.checkpoint, arguments.model)
    extractor = Extractor(model, transform, arguments.map)
    paths = (find_videos if extractor.num_frames else find_images)(arguments.inputs)
    kind = "pooled" if arguments.map is None else f"map after block {arguments.map}"
    writer = Writer(arguments.out, {"checkpoint": printable(arguments.checkpoint), "features": kind})
    status = 0
    for batch in extractor.batches(paths, arguments.batch_size, arguments.num_workers):
        for line in batch.unreadable:  # of a file alone
            sys.stderr.write(f"error: {line}\n")
            status = 2
        writer.add([paths[index] for index in batch.indices], batch.values)
    writer.close()
    print(f"{len(writer.rows)} of {len(paths)} files, {kind}, in {arguments.out}: {writer.files} files and index.csv")
    sys.exit(status)


if __name__ == "__main__":
    run(main)
