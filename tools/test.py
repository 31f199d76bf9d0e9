"""Evaluate a model on the held-out part of a config's data, or on a variant of ImageNet, at one or several sizes."""

import argparse
from pathlib import Path

from accelerate import Accelerator

from vim.data import Share, image_mode
from vim.engine.config import add_config_arguments, load_config, work_dir_of
from vim.engine.evaluate import (
    LABELS,
    Result,
    append_result,
    evaluate_timed,
    for_size,
    held_out,
    image_size,
    load_candidate,
    open_results,
    plot_sizes,
    resized,
    write_evaluation,
)
from vim.engine.files import make_folder
from vim.engine.launch import join_processes
from vim.engine.trainer import build_loader
from vim.errors import run


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_arguments(parser)
    parser.add_argument("checkpoint", type=Path, help="best.pth or last.pth of a run; with --model, published weights")
    parser.add_argument("--model", metavar="NAME", help="the model that published weights are for, such as vim_small")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--raw", action="store_true", help="the weights as trained, of a run that kept their average")
    kinds.add_argument("--ema", action="store_true", help="their running average (the default where a run kept it)")
    parser.add_argument("--img-size", type=int, nargs="+", metavar="N", help="pixels a side (default: the model's)")
    parser.add_argument(
        "--labels",
        choices=("none", *LABELS),
        default="none",
        help="of a variant of ImageNet in data.root: -A, -R, -V2, -ReaL (default: none, the data's own)",
    )
    parser.add_argument(
        "--csv", type=Path, metavar="FILE", help="add the figures there (default: results.csv of the work dir)"
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    config = load_config(arguments.config, arguments.cfg_options)
    join_processes()
    accelerator = Accelerator(mixed_precision=arguments.amp or config.train.get("amp") or "no")
    share = Share(accelerator.process_index, accelerator.num_processes)
    weights = "raw" if arguments.raw else "ema" if arguments.ema else None
    candidate = load_candidate(arguments.checkpoint, name=arguments.model, weights=weights)
    images = held_out(config.data, arguments.labels, candidate, image_mode(candidate.model), arguments.checkpoint)
    sizes = arguments.img_size or [None]
    for size in sizes:  # all must fit before the first takes its time
        resized(candidate.model, size)
    work_dir = work_dir_of(arguments)
    table = arguments.csv or work_dir / "results.csv"
    tag = "test" if arguments.labels == "none" else f"test_{arguments.labels}"
    if accelerator.is_main_process:
        make_folder(work_dir)
        open_results(table)
    results = []
    for size in sizes:
        model, data = resized(candidate.model, size), for_size(config.data, size)
        loader = build_loader(data, images.dataset, model, share, is_training=False)
        evaluation, seconds = evaluate_timed(model, images, loader, accelerator)
        if not accelerator.is_main_process:
            continue
        result = Result.of(
            evaluation,
            checkpoint=str(arguments.checkpoint),
            config=str(arguments.config),
            weights=candidate.weights,
            labels=arguments.labels,
            img_size=image_size(model, data),
            seconds=round(seconds, 2),
        )
        results.append(result)
        append_result(table, result)
        names = write_evaluation(work_dir, f"{tag}_{size}" if size else tag, evaluation, images.classes)
        unreadable = f", {result.unreadable} more cannot be read" if result.unreadable else ""
        print(f"{result.img_size} pixels, {result.images} images{unreadable}; in {work_dir}: {', '.join(names)}")
        print(f"loss {result.loss:.4f}, top-5 {100 * result.top5:.2f} %")
        print(f"top-1 {100 * result.top1:.2f} %")
    if len(results) > 1:
        plot_sizes(work_dir / f"sizes_{tag}.png", results)


if __name__ == "__main__":
    run(main)
