"""Evaluate a model on the held-out videos of a config: the mean of the probabilities over several views of each."""

import argparse
import time
from pathlib import Path

from accelerate import Accelerator

from vim.data import Share, image_mode, num_frames, part
from vim.engine.config import add_config_arguments, load_config, work_dir_of
from vim.engine.evaluate import (
    Result,
    Views,
    append_result,
    evaluate_views,
    image_size,
    load_candidate,
    open_results,
    own_classes,
    write_evaluation,
)
from vim.engine.files import make_folder
from vim.engine.launch import join_processes
from vim.engine.trainer import build_loader
from vim.errors import UserError, run


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_arguments(parser)
    parser.add_argument("checkpoint", type=Path, help="best.pth or last.pth of a run; with --model, published weights")
    parser.add_argument("--model", metavar="NAME", help="the model that published weights are for")
    parser.add_argument("--clips", type=int, default=4, metavar="N", help="at so many times of a video (default: 4)")
    parser.add_argument("--crops", type=int, default=3, metavar="N", help="squares along its frames (default: 3)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="add the figures there (default: results.csv)")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    config = load_config(arguments.config, arguments.cfg_options)
    join_processes()
    accelerator = Accelerator(mixed_precision=arguments.amp or config.train.get("amp") or "no")
    share = Share(accelerator.process_index, accelerator.num_processes)
    candidate = load_candidate(arguments.checkpoint, name=arguments.model)
    frames = num_frames(candidate.model)
    if not frames:
        raise UserError(f"{arguments.checkpoint} is of a model of images: use tools/test.py")
    data = config.data.to_dict()
    data["video"] = {**data.get("video", {}), "num_clips": arguments.clips, "num_crops": arguments.crops}
    videos = part(data, "val", image_mode(candidate.model))
    classes = own_classes(data, videos, candidate, arguments.checkpoint)
    loader = build_loader(data, Views(videos), candidate.model, share, is_training=False)
    work_dir = work_dir_of(arguments)
    table = arguments.csv or work_dir / "results.csv"
    if accelerator.is_main_process:
        make_folder(work_dir)
        open_results(table)
    start = time.perf_counter()
    model = candidate.model.to(accelerator.device)
    evaluation = evaluate_views(model, loader, accelerator, len(classes))
    if evaluation.images == 0:
        raise UserError(f"no video was evaluated: {(evaluation.unreadable or ['the data set is empty'])[0]}")
    if not accelerator.is_main_process:
        return
    result = Result.of(
        evaluation,
        checkpoint=str(arguments.checkpoint),
        config=str(arguments.config),
        weights=candidate.weights,
        labels="none",
        views=f"{frames}x{arguments.crops}x{arguments.clips}",
        img_size=image_size(candidate.model, data),
        seconds=round(time.perf_counter() - start, 2),
    )
    append_result(table, result)
    names = write_evaluation(work_dir, f"test_{result.views}", evaluation, classes)
    print(f"{result.images} videos, {len(evaluation.unreadable)} cannot be read; in {work_dir}: {', '.join(names)}")
    print(f"loss {result.loss:.4f}, top-5 {100 * result.top5:.2f} %")
    print(f"top-1 {100 * result.top1:.2f} % ({result.views} frames x crops x clips)")


if __name__ == "__main__":
    run(main)
