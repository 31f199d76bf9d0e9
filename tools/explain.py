"""Draw what a model sees in images or videos, or check whether its maps can be trusted.

Examples:
    vim-zoo explain work_dirs/vim-nano_1xb64_digits/best.pth IMAGES --out MAPS
    vim-zoo explain work_dirs/vim-nano_1xb64_digits/best.pth --check vim/vim-nano_1xb64_digits.py --out CHECK
"""

import argparse
import sys
from itertools import islice
from pathlib import Path
from typing import cast

import torch

from vim.command_line import Parser
from vim.data import Share, find_images, find_videos, image_mode
from vim.engine.build import build_loader
from vim.engine.config import load_recipe
from vim.engine.files import make_folder
from vim.engine.log import reporting
from vim.errors import UserError, printable, run
from vim.explain import METHODS
from vim.layers import TimmModel
from vim.options import ImageRecipe
from vim.tasks.classification.candidates import load_candidate
from vim.tasks.classification.imagenet import held_out
from vim.tasks.classification.predict import Predictor
from vim.tasks.explanation import Check, Picture, class_of, methods_of, place_of


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="best.pth or last.pth of a run; with --model, published weights")
    parser.add_argument("inputs", type=Path, nargs="*", help="image or video files, or folders of them")
    parser.add_argument("--model", help="the timm name of the model that published weights are for, such as vim_small")
    parser.add_argument("--method", choices=METHODS, default="lrp", help="see docs/explain.md (default: %(default)s)")
    parser.add_argument("--target", metavar="CLASS", help="a class, by name or number (default: the predicted one)")
    parser.add_argument("--token", metavar="ROW,COLUMN", help="also draw what this patch takes from all others")
    parser.add_argument(
        "--check", type=Path, metavar="CONFIG", help="compare all methods on a config's held-out images"
    )
    parser.add_argument("--batches", type=int, metavar="N", help="with --check, take the first N batches only")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the results are written")
    return parser.parse_intermixed_args()


def main() -> None:
    arguments = parse()
    if bool(arguments.inputs) == bool(arguments.check):
        raise UserError("either images or videos are needed, or --check and a config")
    if arguments.check and (arguments.target or arguments.token):
        raise UserError("--check explains the right class of each image: leave out --target and --token")
    if arguments.batches is not None and (not arguments.check or arguments.batches < 1):
        raise UserError(f"--batches is for --check, and must be at least 1, got {arguments.batches}")
    make_folder(arguments.out)
    if arguments.check:
        check(arguments)
    else:
        sys.exit(draw(arguments))


def draw(arguments: argparse.Namespace) -> int:
    """Draw each input, and return the status of the process."""
    if arguments.model:
        predictor = Predictor.from_pretrained(arguments.model, arguments.checkpoint)
    else:
        predictor = Predictor.from_checkpoint(arguments.checkpoint)
    target = None if arguments.target is None else class_of(predictor.classes, arguments.target)
    token = None if arguments.token is None else place_of(arguments.token)
    status = 0
    for number, path in enumerate((find_videos if predictor.num_frames else find_images)(arguments.inputs)):
        try:
            frames = predictor.read(path)
        except UserError as error:  # of this file alone
            sys.stderr.write(f"error: {error}\n")
            status = 2
            continue
        picture, stem = Picture(predictor, frames, target), f"{number:04d}_{path.stem}"
        written = picture.draw(arguments.out, stem, arguments.method, token)
        print(printable(path), *(f"  {line}" for line in written), sep="\n", flush=True)
    return status


def check(arguments: argparse.Namespace) -> None:
    """Compare the methods on held-out images; print the table, and write it and a plot."""
    recipe = load_recipe(arguments.check, ImageRecipe)
    candidate = load_candidate(arguments.checkpoint, name=arguments.model)
    if candidate.thresholds is not None:
        raise UserError(f"--check needs a model of one class an image: {arguments.checkpoint} gives several labels")
    images = held_out(recipe.data, "none", candidate, image_mode(candidate.model), arguments.checkpoint)
    loader = build_loader(recipe.data, images.dataset, candidate.model, Share(), is_training=False)
    torch.manual_seed(0)  # of the random order
    found = Check(cast(TimmModel, candidate.model), methods_of(candidate.model))
    for batch in reporting(islice(loader, arguments.batches), "checking"):
        found.add(batch.images[batch.counted], batch.labels[batch.counted])
    found.write(arguments.out)
    print(*found.table, sep="\n")


if __name__ == "__main__":
    run(main)
