"""Print the likeliest classes of images, or of videos.

Examples:
    vim-zoo predict work_dirs/vim-nano_1xb64_digits/best.pth work_dirs/vim-nano_1xb64_digits/samples
    vim-zoo predict vim_t_midclstok_76p1acc.pth IMAGES --model vim_tiny --draw PICTURES
"""

import argparse
import sys
from pathlib import Path

from vim.command_line import Parser
from vim.data import find_images, find_videos
from vim.engine.files import make_folder
from vim.errors import UserError, printable, run
from vim.tasks.classification.predict import Predictor, draw


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="best.pth or last.pth of a run; with --model, published weights")
    parser.add_argument("inputs", type=Path, nargs="+", help="image or video files, or folders of them")
    parser.add_argument("--model", help="the timm name of the model that published weights are for, such as vim_small")
    parser.add_argument(
        "--top-k", type=int, help="how many classes (default: 5, or all labels from their thresholds on)"
    )
    parser.add_argument("--draw", type=Path, metavar="FOLDER", help="also write pictures with the predictions there")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.top_k is not None and arguments.top_k < 1:
        raise UserError(f"--top-k must be at least 1, got {arguments.top_k}")
    if arguments.model:
        predictor = Predictor.from_pretrained(arguments.model, arguments.checkpoint)
    else:
        predictor = Predictor.from_checkpoint(arguments.checkpoint)
    paths = (find_videos if predictor.num_frames else find_images)(arguments.inputs)
    if arguments.draw:
        make_folder(arguments.draw)
    status = 0
    for number, path in enumerate(paths):
        try:
            frames = predictor.read(path)
            predictions = predictor(frames, arguments.top_k)
        except UserError as error:  # of this file alone
            sys.stderr.write(f"error: {error}\n")
            status = 2
            continue
        lines = [f"  {100 * probability:6.2f} %  {printable(name)}" for name, probability in predictions]
        print(printable(path), *(lines or ["  no label"]), sep="\n", flush=True)  # a file grows line by line
        if arguments.draw:
            draw(frames, predictions, arguments.draw / f"{number:04d}_{path.stem}.png")
    sys.exit(status)


if __name__ == "__main__":
    run(main)
