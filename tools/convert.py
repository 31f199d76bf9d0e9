"""Convert a checkpoint to safetensors and a config.json, a folder that timm and transformers load.

Examples:
    vim-zoo convert work_dirs/vim-nano_1xb64_digits/best.pth FOLDER
    vim-zoo convert vim_t_midclstok_76p1acc.pth FOLDER --model vim_tiny
"""

import argparse
from pathlib import Path

from vim.command_line import Parser
from vim.engine.weights import load_published, load_trained, save_for_timm
from vim.errors import UserError, run


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="best.pth or last.pth of a run; with --model, published weights")
    parser.add_argument("folder", type=Path, help="where to write model.safetensors and config.json")
    parser.add_argument("--model", help="the timm name of the model that published weights are for, such as vim_small")
    parser.add_argument("--ema", action="store_true", help="with --model: the running average, not the raw weights")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    classes, transform = None, {}
    if arguments.model:
        model = load_published(arguments.model, arguments.checkpoint, use_ema=arguments.ema)
    elif arguments.ema:
        raise UserError("--ema goes with --model: a checkpoint of a run holds the weights to use as they are")
    else:
        model, state = load_trained(arguments.checkpoint)
        meta = state["meta"]
        classes, transform = meta["classes"], meta["eval_transform"]
    save_for_timm(model, arguments.folder, classes, transform)
    print(f'in {arguments.folder}: timm.create_model("local-dir:{arguments.folder}", pretrained=True)')


if __name__ == "__main__":
    run(main)
