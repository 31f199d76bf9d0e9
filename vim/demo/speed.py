"""The tab of speed: Vim beside DeiT on this computer, over the size of the image."""

from collections.abc import Iterator
from functools import partial

import gradio as gr
import torch
from PIL import Image

from vim.demo.files import sentences
from vim.demo.parts import ONE_AT_A_TIME, picture
from vim.demo.pictures import drawn
from vim.errors import UserError
from vim.measure import PASSES, Row, compare_models, plot
from vim.measure.overview import SMALL, TINY

PAIRS = {" and ".join(pair): pair for pair in (TINY, SMALL)}
SIZES = [112, 224, 448, 672, 896]  # pixels a side
ROUNDS = 3
Table = list[list[int | float]]


def measure(pair: str, sizes: list[int]) -> Iterator[tuple[Image.Image, Table]]:
    """Yield the plot and the table of a forward pass of one image, after each size.

    Raises:
        UserError: no size is chosen.
    """
    if not sizes:
        raise UserError("at least one image size is needed")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[Row] = []
    table: Table = []
    for size in sorted(sizes):
        rows += compare_models(
            PAIRS[pair], img_size=size, batch_size=1, device=device, amp="no", passes=PASSES[:1], rounds=ROUNDS
        )
        vim, deit = rows[-2:]
        table.append([size, *(round(figure, 1) for figure in (vim.milliseconds, deit.milliseconds, vim.speed))])
        yield drawn(partial(plot, rows)), table


def tab() -> None:
    """Add the tab."""
    with gr.Row():
        with gr.Column(scale=1):
            pair = gr.Radio(list(PAIRS), value=next(iter(PAIRS)), label="Models, with random weights")
            sizes = gr.CheckboxGroup(SIZES, value=SIZES[:3], label="Image sizes, pixels a side")
            button = gr.Button("Measure", variant="primary")
            table = gr.Dataframe(headers=["size", "Vim, ms", "DeiT, ms", "speed"], label="Medians", interactive=False)
        with gr.Column(scale=2):
            plotted = picture("Time and memory of a forward pass of one image", height=460)

    def run(pair: str, sizes: list[int]) -> Iterator[tuple[Image.Image, Table]]:
        with sentences():
            yield from measure(pair, sizes)

    button.click(run, [pair, sizes], [plotted, table], api_name="speed", **ONE_AT_A_TIME)
