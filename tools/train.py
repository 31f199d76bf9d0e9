"""Train what a config describes."""

import argparse
import shlex
from pathlib import Path

from vim.data import Digits, num_frames
from vim.engine.config import add_config_arguments, load_config, work_dir_of
from vim.engine.pretrain import trainer_of
from vim.engine.weights import check_unused, find_last
from vim.errors import run


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_arguments(parser)
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="CHECKPOINT",
        help="go on from a checkpoint, by default the newest whole one of the work dir where there is one",
    )
    return parser.parse_args()


def checkpoint_to_resume(resume: str | None, work_dir: Path) -> Path | None:
    """What to go on from.

    Raises:
        UserError: the work dir holds another run, which this one would overwrite.
    """
    if resume == "auto":
        return find_last(work_dir)
    if resume is None or Path(resume).resolve().parent != work_dir.resolve():
        check_unused(work_dir)
    return None if resume is None else Path(resume)


def write_samples(folder: Path, count: int = 10) -> None:
    """Some held-out digits as files, for a first prediction."""
    folder.mkdir(exist_ok=True)
    digits = Digits(train=False)
    for i in range(count):
        image, label = digits[i]
        image.save(folder / f"{i}_is_{label}.png")


def next_commands(arguments: argparse.Namespace, work_dir: Path, num_epochs: int, inputs: str) -> list[str]:
    """What can be done with the run: predict, test, train on, each a line for a shell."""
    config = [str(arguments.config)]
    if arguments.work_dir or arguments.cfg_options or arguments.amp:  # the run's own config has them all
        config = [str(work_dir / "config.py"), "--work-dir", str(work_dir)]
    best = str(work_dir / "best.pth")
    longer = ["--resume", "--cfg-options", f"schedule.num_epochs={2 * num_epochs}"]
    return [
        shlex.join(["python", *words])
        for words in (
            ["tools/predict.py", best, inputs],
            ["tools/test_video.py" if inputs == "VIDEOS" else "tools/test.py", config[0], best, *config[1:]],
            ["tools/train.py", *config, *longer],
        )
    ]


def main() -> None:
    arguments = parse()
    config = load_config(arguments.config, arguments.cfg_options)
    if arguments.amp:
        config.train.amp = arguments.amp
    work_dir = work_dir_of(arguments)
    trainer = trainer_of(config)(config, work_dir, checkpoint_to_resume(arguments.resume, work_dir))
    evaluation = trainer.fit()
    if not trainer.accelerator.is_main_process:
        return
    if evaluation is None:
        print(f"stopped by SIGTERM; the run is saved in {work_dir}: go on with the same command and --resume")
        return
    if not trainer.classes:
        print(f"in {work_dir}: last.pth, which model.pretrained_cfg_overlay.file of another config can name")
        print(f"loss {evaluation.loss:.4f}")
        return
    inputs = "VIDEOS" if num_frames(trainer.bare_model) else "IMAGES"
    if config.data.dataset == "digits":
        write_samples(work_dir / "samples")
        inputs = str(work_dir / "samples")
    print(f"in {work_dir}: best.pth, last.pth, log.csv, train.log, curves.png, confusion.png")
    print("next:")
    for command in next_commands(arguments, work_dir, trainer.num_epochs, inputs):
        print(f"  {command}")
    print(f"top-1 {100 * evaluation.top1:.2f} %")


if __name__ == "__main__":
    run(main)
