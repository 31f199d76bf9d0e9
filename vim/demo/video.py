"""The tab of videos: predictions and a map a frame; or frame by frame, as a stream."""

from collections.abc import Iterator
from pathlib import Path

import gradio as gr
import torch
import torch.nn.functional as F
from PIL import Image

from vim.demo import published, samples
from vim.demo.files import read, sentences
from vim.demo.image import Answer, answer
from vim.demo.models import COMMANDS, Models, chosen
from vim.demo.parts import ONE_AT_A_TIME, model_list, picture, upload
from vim.demo.pictures import drawn
from vim.engine.plots import label, save_figure
from vim.errors import UserError, describe
from vim.explain import METHODS, Method
from vim.models import VideoMamba
from vim.tasks.classification.predict import Predictor
from vim.tasks.explanation import Picture, enlarged


def stream(predictor: Predictor, path: str) -> Iterator[Answer]:
    """Yield for each frame: it, the likeliest classes of all frames until then, and how these went over time.

    The model sees each frame once; from one to the next it keeps the states of its scans.

    Raises:
        UserError: the file cannot be read, or the model reads clips backwards too.
    """
    model = predictor.model
    if not isinstance(model, VideoMamba):
        raise UserError(f"a stream needs a VideoMamba, got {type(model).__name__}")
    found = Picture(predictor, read(predictor, path))
    size = model.patch_embed.tubelet_size  # frames of a step
    seen, history = [], []
    try:
        for t, tokens in enumerate(model.stream(found.images.split(size, dim=2))):
            seen.append(tokens)
            # the class token comes first and is not pooled
            features = F.pad(torch.cat(seen, 1), (0, 0, model.num_prefix_tokens, 0))
            with torch.no_grad():
                probabilities = predictor.probabilities(model.forward_head(features))[0]
            history.append(probabilities)
            names = {predictor.classes[i]: float(probabilities[i]) for i in probabilities.argsort(descending=True)[:5]}
            yield enlarged(found.seen[t * size]), names, _over_time(predictor, history, size)
    except ValueError as error:
        raise UserError(f"{describe(error)}; whole clips it can take") from error


def _over_time(predictor: Predictor, history: list[torch.Tensor], size: int) -> Image.Image:
    import matplotlib.pyplot as plt

    def draw(path: Path) -> None:
        figure, axes = plt.subplots(figsize=(5, 3.4), layout="constrained")
        table = 100 * torch.stack(history)
        for i in table[-1].argsort(descending=True)[:5].tolist():
            axes.plot(range(size, size * len(table) + 1, size), table[:, i], "o-", label=label(predictor.classes[i]))
        most = predictor.num_frames or size * len(table)
        axes.set(xlabel="frames seen", ylabel="probability, %", xlim=(0.5, most + 0.5), ylim=(-3, 103))
        axes.grid(alpha=0.3)
        figure.legend(loc="outside upper left", ncols=2, fontsize=8)
        save_figure(figure, path)

    return drawn(draw)


def tab(models: Models, folder: Path) -> None:
    """Add the tab.

    Args:
        folder: where samples are written.
    """
    with gr.Row():
        with gr.Column():
            name = model_list(list(models.videos), "video", COMMANDS["videos"])
            file = upload("Video", samples.write_videos(folder))
            method = gr.Radio(list(METHODS), value="lrp", label="Map, by method")
            whole = gr.Button("Whole clip", variant="primary")
            streamed = gr.Button("Frame by frame")
            published.offer(models, name, videos=True)
        with gr.Column():
            seen = picture("Frames")
            likeliest = gr.Label(label="Likeliest classes", num_top_classes=5)
        with gr.Column():
            mapped = picture("Map, or prediction over time")

    def predict(name: str | None, path: str | None, method: Method) -> Answer:
        with sentences(path):
            return answer(chosen(models.videos, name), _needed(path), method)

    def step(name: str | None, path: str | None) -> Iterator[Answer]:
        with sentences(path):
            yield from stream(chosen(models.videos, name), _needed(path))

    told = [seen, likeliest, mapped]
    whole.click(predict, [name, file, method], told, api_name="video", **ONE_AT_A_TIME)
    streamed.click(step, [name, file], told, api_name="stream", **ONE_AT_A_TIME)


def _needed(path: str | None) -> str:
    if path is None:
        raise UserError("a video is needed: drop one, or pick a sample")
    return path
