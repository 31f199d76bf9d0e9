"""The tab of images: predictions, a map of what they rest on, and what each layer takes."""

from pathlib import Path
from typing import get_args

import gradio as gr
from PIL import Image

from vim.demo import published, samples
from vim.demo.files import read, sentences
from vim.demo.models import COMMANDS, Models, chosen
from vim.demo.parts import ONE_AT_A_TIME, model_list, picture, upload
from vim.explain import METHODS, Direction, Method, explain, layer_maps, num_scanning_layers
from vim.tasks.classification.predict import Predictor
from vim.tasks.explanation import Picture, enlarged, methods_of, overlay

Answer = tuple[Image.Image, dict[str, float], Image.Image]


def answer(predictor: Predictor, path: str, method: Method) -> Answer:
    """Return what the model sees of an image, or of a video frame by frame; the five likeliest classes; the map."""
    frames = read(predictor, path)
    likeliest = dict(predictor(frames, 5))
    found = Picture(predictor, frames)
    values = explain(found.model, found.images, found.target, method)[0]
    return enlarged(found.seen), likeliest, enlarged(overlay(found.seen, values))


def layer_picture(predictor: Predictor, path: str, layer: int, direction: Direction) -> Image.Image:
    """Return what the class token, or the mean of all tokens, takes from each token in a layer."""
    found = Picture(predictor, read(predictor, path))
    (values,) = layer_maps(found.model, found.images, [layer], direction)
    return enlarged(overlay(found.seen, values[0]))


def tab(models: Models, folder: Path) -> None:
    """Add the tab.

    Args:
        folder: where samples are written.
    """

    def controls(name: str | None) -> tuple[gr.Radio, gr.Radio, gr.Slider]:
        """Return the controls that fit a model: those of layers only if it has some that scan."""
        model = models.images[name].model if name in models.images else None
        last = 0 if model is None else num_scanning_layers(model) - 1
        methods = METHODS if model is None else methods_of(model)
        return (
            gr.Radio(list(methods), value="lrp", label="Map, by method"),
            gr.Radio(list(get_args(Direction)), value="both", label="Scans of the layer", visible=last >= 0),
            gr.Slider(0, max(last, 1), value=0, step=1, precision=0, label="Layer", visible=last >= 0),
        )

    with gr.Row():
        with gr.Column():
            name = model_list(list(models.images), "image", COMMANDS["images"])
            file = upload("Picture", samples.write_images(folder))
            method, direction, layer = controls(name.value)
            published.offer(models, name, videos=False)
        with gr.Column():
            seen = picture("What the model sees")
            likeliest = gr.Label(label="Likeliest classes", num_top_classes=5)
        with gr.Column():
            mapped = picture("What the prediction rests on")
            layered = picture("What the layer takes")

    def predict(name: str | None, path: str | None, method: Method) -> Answer | tuple[None, None, None]:
        if path is None:
            return None, None, None
        with sentences(path):
            return answer(chosen(models.images, name), path, method)

    def layer_of(name: str | None, path: str | None, layer: int, direction: Direction) -> Image.Image | None:
        if path is None or name not in models.images or not num_scanning_layers(models.images[name].model):
            return None
        with sentences(path):
            return layer_picture(models.images[name], path, layer, direction)

    asked, told = [name, file, method], [seen, likeliest, mapped]
    of_layer = [name, file, layer, direction]
    private = {"api_visibility": "private", **ONE_AT_A_TIME}
    dropped = file.change(predict, asked, told, api_name="image", **ONE_AT_A_TIME)
    dropped.success(layer_of, of_layer, layered, api_name="layer", **ONE_AT_A_TIME)
    method.input(predict, asked, told, **private)
    gr.on([layer.input, direction.input], layer_of, of_layer, layered, trigger_mode="always_last", **private)
    setting = name.change(controls, name, [method, direction, layer], api_visibility="private")
    setting.then(predict, asked, told, **private).success(layer_of, of_layer, layered, **private)
