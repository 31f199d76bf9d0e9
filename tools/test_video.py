"""Evaluate a model on the held-out videos of a config: the mean of the probabilities over several views of each.

Examples:
    vim-zoo test-video videomamba/videomamba-test_digit-motion.py work_dirs/videomamba-test_digit-motion/best.pth
    vim-zoo test-video videomamba/k400.py:videomamba-tiny-f8_k400 CHECKPOINT --clips 10 --cfg-options data.root=PATH
"""

import argparse
import dataclasses
import time

from vim.command_line import Parser, sibling
from vim.data import Videos, image_mode, num_frames, part, several_labels
from vim.engine.build import build_loader
from vim.engine.config import recipe_of
from vim.engine.launch import launch, share_of
from vim.engine.log import logging_to
from vim.errors import UserError, run
from vim.options import ImageRecipe
from vim.tasks.classification.evaluate import check_evaluation
from vim.tasks.classification.imagenet import own_classes
from vim.tasks.classification.results import Report, add_evaluation_arguments, candidate_of, image_size
from vim.tasks.classification.views import Views, evaluate_views


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add_evaluation_arguments(parser)
    parser.add_argument("--clips", type=int, default=4, metavar="N", help="at so many times of a video (default: 4)")
    parser.add_argument("--crops", type=int, default=3, metavar="N", help="squares along its frames (default: 3)")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    recipe = recipe_of(arguments, ImageRecipe)
    accelerator = launch(recipe.train)
    candidate = candidate_of(arguments)
    frames = num_frames(candidate.model)
    if not frames:
        raise UserError(f"{arguments.checkpoint} is of a model of images: use {sibling('test')}")
    views = {"num_clips": arguments.clips, "num_crops": arguments.crops}
    data = dataclasses.replace(recipe.data, video={**recipe.data.video, **views})
    videos = part(data, "val", image_mode(candidate.model))
    if not isinstance(videos, Videos):
        raise UserError(f"data.dataset must be 'videos' or 'digit_motion', got {data.dataset!r}: use {sibling('test')}")
    classes = own_classes(data, videos, candidate, arguments.checkpoint)
    loader = build_loader(data, Views(videos), candidate.model, share_of(accelerator), is_training=False)
    several = several_labels(videos)
    report = Report(arguments, candidate, several=several, writes=accelerator.is_main_process)
    start = time.perf_counter()
    model = candidate.model.to(accelerator.device)
    with logging_to(None, shown=accelerator.is_main_process):
        evaluation = evaluate_views(model, loader, accelerator, len(classes), candidate.thresholds)
    check_evaluation(evaluation, "video")
    name = f"{frames}x{arguments.crops}x{arguments.clips}"
    about = {"labels": "none", "views": name, "img_size": image_size(candidate.model, data)}
    for line in report.add(evaluation, classes, f"test_{name}", time.perf_counter() - start, **about):
        print(line)


if __name__ == "__main__":
    run(main)
