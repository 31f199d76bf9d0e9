"""Train what a config describes.

Examples:
    vim-zoo train vim/vim-nano_1xb64_digits.py
    vim-zoo train vim/vim-nano_1xb64_folder.py --cfg-options data.root=PATH model.num_classes=2
"""

import argparse
from pathlib import Path

from vim.command_line import Parser, sibling
from vim.data import Digits, num_frames
from vim.engine.config import add_run_arguments, recipe_of, work_dir_of
from vim.engine.files import results_in
from vim.engine.launch import holding
from vim.engine.loop import Loop
from vim.engine.weights import choose_save
from vim.errors import run
from vim.options import ImageRecipe
from vim.tasks.build import build_run
from vim.tasks.classification.train import Classification, plot_run


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add_run_arguments(parser)
    return parser.parse_args()


def write_samples(folder: Path, count: int = 10) -> None:
    """Write some held-out digits as files, for a first prediction."""
    folder.mkdir(exist_ok=True)
    digits = Digits(train=False)
    for i in range(count):
        image, label = digits[i]
        image.save(folder / f"{i}_is_{label}.png")


def next_commands(arguments: argparse.Namespace, work_dir: Path, num_epochs: int, inputs: str) -> list[str]:
    """Return the commands to predict, to test and to train on, each a line for a shell."""
    config = [str(arguments.config)]
    if arguments.work_dir or arguments.cfg_options or arguments.amp:  # the run's own config has them all
        config = [str(work_dir / "config.py"), "--work-dir", str(work_dir)]
    best = str(work_dir / "best.pth")
    longer = ["--resume", "--cfg-options", f"schedule.num_epochs={2 * num_epochs}"]
    return [
        sibling(*words)
        for words in (
            ["predict", best, inputs],
            ["test-video" if inputs == "VIDEOS" else "test", config[0], best, *config[1:]],
            ["train", *config, *longer],
        )
    ]


def print_classifier(arguments: argparse.Namespace, task: Classification, loop: Loop) -> None:
    """Print where the results of a classifier are, what to run next, and how good it is."""
    inputs = "VIDEOS" if num_frames(task.model) else "IMAGES"
    if task.recipe.data.dataset == "digits":
        write_samples(loop.work_dir / "samples")
        inputs = str(loop.work_dir / "samples")
    names = ("best.pth", "last.pth", "log.csv", "train.log", "curves.png", "confusion.png")
    print(results_in(loop.work_dir, *names))
    print("next:")
    for command in next_commands(arguments, loop.work_dir, loop.num_epochs, inputs):
        print(f"  {command}")
    print(task.evaluation.summary[-1])


def train_in(work_dir: Path, arguments: argparse.Namespace, recipe: ImageRecipe) -> None:
    """Train, and print where the results are and what to run next."""
    loop = build_run(recipe, work_dir, choose_save(arguments.resume, work_dir))
    finished = loop.fit()
    if not loop.accelerator.is_main_process:
        return
    if not finished:
        loop.stop.leave(work_dir)
    task = loop.task
    if isinstance(task, Classification):
        plot_run(task, loop)
        print_classifier(arguments, task, loop)
    else:
        print(f"in {work_dir}: last.pth, which model.pretrained_cfg_overlay.file of another config can name")
        print(f"loss {loop.rows[-1]['loss']:.4f}")


def main() -> None:
    arguments = parse()
    recipe = recipe_of(arguments, ImageRecipe)
    work_dir = work_dir_of(arguments)
    with holding(work_dir):
        train_in(work_dir, arguments, recipe)


if __name__ == "__main__":
    run(main)
