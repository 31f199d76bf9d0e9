"""Evaluate a model on the held-out part of a config's data, or on a variant of ImageNet, at one or several sizes.

Examples:
    vim-zoo test vim/vim-nano_1xb64_digits.py work_dirs/vim-nano_1xb64_digits/best.pth
    vim-zoo test vim/in1k.py:vim-tiny_in1k vim_t_midclstok_76p1acc.pth --model vim_tiny --cfg-options data.root=PATH
"""

import argparse

from vim.command_line import Parser
from vim.data import image_mode, several_labels
from vim.engine.build import build_loader
from vim.engine.config import recipe_of
from vim.engine.launch import launch, share_of
from vim.engine.log import logging_to
from vim.errors import run
from vim.options import ImageRecipe
from vim.tasks.classification.candidates import for_size, resized
from vim.tasks.classification.evaluate import evaluate_timed
from vim.tasks.classification.imagenet import LABELS, held_out
from vim.tasks.classification.results import Report, add_evaluation_arguments, candidate_of, image_size, plot_sizes


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add_evaluation_arguments(parser)
    parser.add_argument("--img-size", type=int, nargs="+", metavar="N", help="pixels a side (default: the model's)")
    parser.add_argument(
        "--labels",
        choices=("none", *LABELS),
        default="none",
        help="of a variant of ImageNet in data.root: -A, -R, -V2, -ReaL (default: none, the data's own)",
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    recipe = recipe_of(arguments, ImageRecipe)
    accelerator = launch(recipe.train)
    candidate = candidate_of(arguments)
    mode = image_mode(candidate.model)
    images = held_out(recipe.data, arguments.labels, candidate, mode, arguments.checkpoint)
    sizes = arguments.img_size or [None]
    for size in sizes:  # all must fit before the first takes its time
        resized(candidate.model, size)
    several = several_labels(images.dataset)
    report = Report(arguments, candidate, several=several, writes=accelerator.is_main_process)
    tag = "test" if arguments.labels == "none" else f"test_{arguments.labels}"
    for size in sizes:
        model, data = resized(candidate.model, size), for_size(recipe.data, size)
        loader = build_loader(data, images.dataset, model, share_of(accelerator), is_training=False)
        with logging_to(None, shown=accelerator.is_main_process):
            evaluation, seconds = evaluate_timed(model, images, loader, accelerator)
        about = {"labels": arguments.labels, "img_size": image_size(model, data)}
        for line in report.add(evaluation, images.classes, f"{tag}_{size}" if size else tag, seconds, **about):
            print(line)
    if len(report.results) > 1:
        plot_sizes(report.folder / f"sizes_{tag}.png", report.results)


if __name__ == "__main__":
    run(main)
