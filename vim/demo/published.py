"""Published weights, downloaded when a button is clicked and never else."""

import re
from pathlib import Path
from typing import cast

import gradio as gr
import timm
from huggingface_hub import hf_hub_download
from timm.models import PretrainedCfg, get_pretrained_cfg

from vim.checkpoints import TagFacts, cannot_download
from vim.command_line import sibling
from vim.demo.files import sentences
from vim.demo.models import Models
from vim.errors import UserError
from vim.registry import is_own
from vim.tasks.classification.predict import Predictor

OF_VIDEOS = re.compile(r"videomamba_\w+_f\d+\.")
OFFLINE = sibling("demo", "FILE", "--model", "NAME")


def tags(*, videos: bool) -> list[str]:
    """List the published weights of this package's models, of videos or of images, that have classes."""
    of_kind = [tag for tag in timm.list_pretrained() if bool(OF_VIDEOS.match(tag)) == videos]
    return [tag for tag in of_kind if is_own(tag) and _facts(tag).get("num_classes")]


def offer(models: Models, name: gr.Dropdown, *, videos: bool) -> None:
    """Add a closed panel that downloads weights, and offers their model in the list `name`."""
    with gr.Accordion("Published weights", open=False):
        tag = gr.Dropdown(tags(videos=videos), label="Weights", value=None)
        gr.Markdown(
            "The button asks huggingface.co for one file of tens to hundreds of megabytes, and keeps it in its cache. "
            f"Without a network: get the file elsewhere, and start the demo as `{OFFLINE}`, "
            "with the part of the name before the dot as NAME."
        )
        button = gr.Button("Download and use")

    def download(tag: str | None) -> gr.Dropdown:
        with sentences():
            models.add(str(tag), fetch(tag))
        return gr.Dropdown(list(models.videos if videos else models.images), value=tag)

    button.click(download, tag, name, api_visibility="private")


def fetch(tag: str | None) -> Predictor:
    """Download published weights, or take them from huggingface_hub's cache, and return their model.

    Raises:
        UserError: no weights are chosen, they cannot be downloaded, or not be read.
    """
    if tag is None:
        raise UserError("published weights are needed: choose some from the list above the button")
    facts = _facts(tag)
    try:
        path = hf_hub_download(facts["hf_hub_id"], facts["hf_hub_filename"])
    except OSError as error:
        raise cannot_download(facts, error) from error
    return Predictor.from_pretrained(tag.partition(".")[0], Path(path))


def _facts(tag: str) -> TagFacts:
    return cast(TagFacts, cast(PretrainedCfg, get_pretrained_cfg(tag)).to_dict())
