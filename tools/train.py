"""Train what a config describes."""

import argparse
from pathlib import Path

from vim.data import Digits
from vim.engine.config import add_config_arguments, load_config, work_dir_of
from vim.engine.trainer import Trainer
from vim.errors import run


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_arguments(parser)
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="CHECKPOINT",
        help="go on from a checkpoint, by default the work dir's last.pth where there is one",
    )
    return parser.parse_args()


def checkpoint_to_resume(resume: str | None, work_dir: Path) -> Path | None:
    if resume == "auto":
        last = work_dir / "last.pth"
        return last if last.exists() else None
    return None if resume is None else Path(resume)


def write_samples(folder: Path, count: int = 10) -> None:
    """Some held-out digits as files, for a first prediction."""
    folder.mkdir(exist_ok=True)
    digits = Digits(train=False)
    for i in range(count):
        image, label = digits[i]
        image.save(folder / f"{i}_is_{label}.png")


def main() -> None:
    arguments = parse()
    config = load_config(arguments.config, arguments.cfg_options)
    if arguments.amp:
        config.train.amp = arguments.amp
    work_dir = work_dir_of(arguments)
    trainer = Trainer(config, work_dir, checkpoint_to_resume(arguments.resume, work_dir))
    evaluation = trainer.fit()
    if not trainer.accelerator.is_main_process:
        return
    images = "IMAGES"
    if config.data.dataset == "digits":
        write_samples(work_dir / "samples")
        images = str(work_dir / "samples")
    print(f"in {work_dir}: best.pth, last.pth, log.csv, curves.png, confusion.png")
    print("next:")
    print(f"  python tools/predict.py {work_dir}/best.pth {images}")
    print(f"  python tools/test.py {arguments.config} {work_dir}/best.pth")
    longer = f"--resume --cfg-options schedule.num_epochs={2 * trainer.num_epochs}"
    print(f"  python tools/train.py {arguments.config} {longer}")
    print(f"top-1 {100 * evaluation.top1:.2f} %")


if __name__ == "__main__":
    run(main)
