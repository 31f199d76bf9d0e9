"""Show models in the browser: images, videos, time series and speed. Only this computer can reach the page.

Examples:
    vim-zoo demo
    vim-zoo demo vim_t_midclstok_76p1acc.pth --model vim_tiny
"""

import argparse
import os
import threading
from pathlib import Path

# before Gradio and torch are imported
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that measures memory is talkative

from vim.command_line import Parser
from vim.errors import UserError, require, run


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "checkpoints", type=Path, nargs="*", metavar="CHECKPOINT", help="of any run (default: work_dirs/*/best.pth)"
    )
    parser.add_argument("--model", help="the timm name of the model that published weights are for, such as vim_small")
    parser.add_argument("--port", type=int, default=7860, help="(default: %(default)s)")
    return parser.parse_intermixed_args()


def main() -> None:
    arguments = parse()
    if not 0 < arguments.port < 2**16:
        raise UserError(f"--port must be from 1 to 65535, got {arguments.port}")
    if arguments.model and not arguments.checkpoints:
        raise UserError("--model says what a file of published weights is for: name the file too")
    require("gradio", "the demo")
    from vim.demo.app import serving
    from vim.demo.models import find, load

    models = load(arguments.checkpoints, arguments.model) if arguments.checkpoints else find()
    with serving(models, arguments.port) as address:
        print(f"open {address} in a browser; Ctrl-C ends the demo", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    run(main)
