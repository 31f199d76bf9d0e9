"""Parts that several tabs have."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

# all computations of all tabs wait for one another: they share the models, and would disturb the timings
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_id": "computation", "concurrency_limit": 1}


def model_list(names: Sequence[str], kind: str, command: str) -> gr.Dropdown:
    """Add the list of models; where there is none, say how to get one."""
    if not names:
        gr.Markdown(f"There is no model of this kind yet. This trains one, then start the demo again:\n\n    {command}")
    return gr.Dropdown(list(names), value=names[0] if names else None, label=f"Model ({kind})")


def upload(label: str, paths: Sequence[Path]) -> gr.File:
    """Add a place to drop a file on, and samples."""
    file = gr.File(label=label, type="filepath", height=120)
    if paths:
        names = [path.stem.replace("_", " ") for path in paths]
        gr.Examples([[str(path)] for path in paths], file, label="Samples", example_labels=names, examples_per_page=20)
    return file


def picture(label: str, height: int = 360) -> gr.Image:
    """Add a place for a picture. Gradio's button that would publish it is left out."""
    return gr.Image(label=label, height=height, interactive=False, buttons=["download", "fullscreen"])
