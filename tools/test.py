"""Evaluate a trained model on the held-out part of a config's data."""

import argparse
from pathlib import Path

from accelerate import Accelerator

from vim.data import Share, build_datasets, image_mode
from vim.engine.config import add_config_arguments, load_config, work_dir_of
from vim.engine.evaluate import evaluate
from vim.engine.log import plot_confusion
from vim.engine.trainer import build_loader
from vim.engine.weights import load_trained, make_folder
from vim.errors import UserError, run


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_arguments(parser)
    parser.add_argument("checkpoint", type=Path, help="best.pth or last.pth of a run")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    config = load_config(arguments.config, arguments.cfg_options)
    accelerator = Accelerator(mixed_precision=arguments.amp or config.train.get("amp", "no"))
    model, meta = load_trained(arguments.checkpoint)
    splits = build_datasets(config.data, image_mode(model))
    if splits.classes and splits.classes != meta["classes"]:
        raise UserError(
            f"{arguments.checkpoint} was trained on other classes ({', '.join(meta['classes'][:5])}, ...) "
            f"than the config's data has ({', '.join(splits.classes[:5])}, ...)"
        )
    share = Share(accelerator.process_index, accelerator.num_processes)
    loader = build_loader(config.data, splits.held_out, model, share, is_training=False)
    evaluation = evaluate(model.to(accelerator.device), loader, accelerator, len(meta["classes"]))
    if accelerator.is_main_process:
        work_dir = work_dir_of(arguments)
        make_folder(work_dir)
        plot_confusion(work_dir / "confusion_test.png", evaluation.confusion, meta["classes"])
        print(f"in {work_dir}: confusion_test.png")
        print(f"loss {evaluation.loss:.4f}, top-5 {100 * evaluation.top5:.2f} %")
        print(f"top-1 {100 * evaluation.top1:.2f} %")


if __name__ == "__main__":
    run(main)
