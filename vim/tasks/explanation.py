"""Pictures of what a model sees, and tables of whether its maps can be trusted."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vim.data import input_options
from vim.engine.files import written_whole
from vim.engine.plots import label, save_figure
from vim.errors import UserError, closest
from vim.explain import METHODS, Method, explain, layer_maps, num_scanning_layers
from vim.explain.curves import BASELINES, FRACTIONS, Curve, Order
from vim.layers import TimmModel
from vim.tasks.classification.predict import Predictor

ORDERS: tuple[Order, ...] = ("most", "least")
RED, BLUE = torch.tensor([1.0, 0.1, 0.0]), torch.tensor([0.1, 0.4, 1.0])
LEAST_SIDE, GAP, HEAD, DPI = 280, 12, 28, 100  # of pictures, in pixels


def black(model: TimmModel) -> Tensor:
    """Return the value of a black pixel in each channel of the model's normalised images, (c,)."""
    options = input_options(model)
    return torch.tensor([-mean / std for mean, std in zip(options["mean"], options["std"], strict=True)])


def pictures(model: TimmModel, images: Tensor) -> Tensor:
    """Return normalised images (b, c, ..., h, w) as colours from 0 to 1, (b, ..., h, w, 3): what the model saw."""
    options = input_options(model)
    shape = (1, -1, *[1] * (images.dim() - 2))
    mean, std = (torch.tensor(options[name]).view(shape) for name in ("mean", "std"))
    return (images * std + mean).clamp(0, 1).expand(-1, 3, *[-1] * (images.dim() - 2)).movedim(1, -1)


def overlay(picture: Tensor, values: Tensor) -> Tensor:
    """Lay a map (..., h, w) over the grey of a picture (..., h, w, 3). All frames of a clip share the scale of colours.

    A map with negative values is red where it is positive and blue where it is negative, and clear where it is 0. Any
    other is purple at its least value and yellow at its greatest, half clear.
    """
    import matplotlib

    grey = picture.mean(-1, keepdim=True).expand_as(picture)
    low, high = values.min(), values.max()
    if low < 0:
        shares = (values / values.abs().max()).unsqueeze(-1)
        return grey.lerp(torch.where(shares > 0, RED, BLUE), shares.abs())
    shares = (values - low) / (high - low).clamp(min=max(1e-3 * float(high), 1e-9))  # rounding is no contrast
    colours = matplotlib.colormaps["viridis"](shares.numpy())[..., :3]
    return (grey + torch.from_numpy(colours).to(grey)) / 2


def sheet(frames: Tensor) -> Tensor:
    """Put the frames (t, h, w, 3) of a clip side by side, row after row; a picture (h, w, 3) stays as it is."""
    if frames.dim() == 3:
        return frames
    t, h, w, _ = frames.shape
    columns = math.ceil(math.sqrt(t))
    rows = math.ceil(t / columns)
    gap = math.ceil(w / 32)
    whole = frames.new_ones(rows * columns, h + gap, w + gap, 3)
    whole[:t, :h, :w] = frames
    whole = whole.view(rows, columns, h + gap, w + gap, 3).transpose(1, 2)
    return whole.reshape(rows * (h + gap), columns * (w + gap), 3)[:-gap, :-gap]


def enlarged(picture: Tensor) -> Image.Image:
    """Return a picture (h, w, 3) from 0 to 1, or frames (t, h, w, 3) side by side; a small one some times as large."""
    pixels = (sheet(picture) * 255).round().byte().numpy()
    height, width, _ = pixels.shape
    times = -(-LEAST_SIDE // min(height, width))
    return Image.fromarray(pixels).resize((times * width, times * height), Image.Resampling.NEAREST)


def draw_map(path: Path, picture: Tensor, values: Tensor, title: str) -> None:
    """Draw a picture (h, w, 3), or the frames (t, h, w, 3) of a clip, beside the same under its map, pixel by pixel."""
    import matplotlib.pyplot as plt

    left, right = enlarged(picture), enlarged(overlay(picture, values))
    width, height = 2 * left.width + GAP, left.height + HEAD
    figure = plt.figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    for image, x in ((left, 0), (right, left.width + GAP)):
        figure.figimage(np.asarray(image), x, 0)
    figure.text(0.5, 1 - HEAD / 2 / height, label(title), ha="center", va="center", fontsize=9)
    save_figure(figure, path, dpi=DPI)


def draw_layers(path: Path, picture: Tensor, layers: Mapping[str, Sequence[Tensor]], title: str) -> None:
    """Draw a picture under the maps of every layer, a row for each name: 12 layers at most, evenly spread."""
    import matplotlib.pyplot as plt

    count = len(next(iter(layers.values())))
    chosen = sorted({round(i * (count - 1) / 11) for i in range(12)}) if count > 12 else list(range(count))
    side = 1.2 if picture.dim() == 3 else 2.4  # inches: a clip's frames share a cell
    size = (side * len(chosen) + 0.4, (side + 0.1) * len(layers) + 0.5)
    figure, grid = plt.subplots(len(layers), len(chosen), figsize=size, layout="constrained", squeeze=False)
    for row, (name, maps) in zip(grid, layers.items(), strict=True):
        for axes, layer in zip(row, chosen, strict=True):
            axes.imshow(sheet(overlay(picture, maps[layer])).numpy())
            axes.set(xticks=[], yticks=[])
        row[0].set_ylabel(name, fontsize=7)
    for axes, layer in zip(grid[0], chosen, strict=True):
        axes.set_title(f"layer {layer}", fontsize=7)
    figure.suptitle(title, fontsize=8)
    save_figure(figure, path, dpi=DPI)


class Picture:
    """An image or a clip as a model sees it, and what the model makes of it.

    Args:
        frames: of :meth:`Predictor.read`.
        target: the class to explain; None for the predicted one.
    """

    def __init__(self, predictor: Predictor, frames: Sequence[Image.Image], target: int | None = None) -> None:
        self.model = cast(TimmModel, predictor.model)
        self.images = predictor.prepare(frames)
        with torch.inference_mode():
            probabilities = predictor.probabilities(self.model(self.images))[0]
        self.target = int(probabilities.argmax()) if target is None else target
        self.title = f"{predictor.classes[self.target]}, {100 * float(probabilities[self.target]):.1f} %"
        self.seen = pictures(self.model, self.images)[0]

    def draw(self, folder: Path, stem: str, method: Method, token: Sequence[int] | None = None) -> list[str]:
        """Draw the map, the layers if the model scans its tokens, and what a token takes in them; list what was drawn.

        Args:
            stem: how the files' names begin.
            token: see :func:`vim.explain.layer_maps`.

        Raises:
            UserError: there is no such token, or the model has no such map.
        """
        written = [self.draw_map(folder / f"{stem}_{method}.png", method)]
        if num_scanning_layers(self.model):
            written.append(self.draw_layers(folder / f"{stem}_layers.png"))
        if token is not None:
            written.append(self.draw_layers(folder / f"{stem}_token.png", token))
        return written

    def draw_map(self, path: Path, method: Method) -> str:
        """Draw the picture beside its map; return what was drawn."""
        values = explain(self.model, self.images, self.target, method)[0]
        draw_map(path, self.seen, values, f"{self.title} ({method})")
        return f"{self.title}: {path}"

    def draw_layers(self, path: Path, token: Sequence[int] | None = None) -> str:
        """Draw what the class token, or the mean of all tokens, or one token takes in each layer.

        Return what was drawn. A model that scans forward only has no row for the other direction.
        """
        whose = "the pooled token" if token is None else f"token {','.join(map(str, token))}"
        title = f"what {whose} takes in each layer"
        layers = {
            direction: [one[0] for one in layer_maps(self.model, self.images, None, direction, token)]
            for direction in ("forward", "backward")
        }
        scanned = {name: maps for name, maps in layers.items() if any(one.any() for one in maps)} or layers
        draw_layers(path, self.seen, scanned, title)
        return f"{title}: {path}"


def methods_of(model: torch.nn.Module) -> tuple[Method, ...]:
    """Return the methods that a model has: three of them need scans of its tokens."""
    return METHODS if num_scanning_layers(model) else ("gradcam", "lrp")


def class_of(classes: Sequence[str], name: str) -> int:
    """Return the number of a class that is given by its name or its number.

    Raises:
        UserError: there is none.
    """
    if name in classes:
        return classes.index(name)
    if name in (numbers := [str(number) for number in range(len(classes))]):
        return numbers.index(name)
    raise UserError(f"no such class: {name} {closest(name, classes)}, or a number from 0 to {len(classes) - 1}")


def place_of(text: str) -> tuple[int, ...]:
    """Return the numbers of "ROW,COLUMN", or of "FRAME,ROW,COLUMN" for a clip.

    Raises:
        UserError: it is neither.
    """
    parts = text.split(",")
    if len(parts) not in (2, 3) or not all(part.strip().isdecimal() and len(part) < 10 for part in parts):
        raise UserError(f"--token must be ROW,COLUMN, or FRAME,ROW,COLUMN for a video, got {text}")
    return tuple(int(part) for part in parts)


class Check:
    """The curves of several methods on the same images, and of the two baselines.

    Args:
        methods: names of METHODS. Each explains the class that is right.
    """

    def __init__(self, model: TimmModel, methods: Sequence[str]) -> None:
        self.model, self.methods, self.black = model, methods, black(model)
        self.curves = {(name, order): Curve() for name in (*methods, *BASELINES) for order in ORDERS}

    def add(self, images: Tensor, targets: Tensor) -> None:
        """Count a batch of images with the classes that are right."""
        for name in (*self.methods, *BASELINES):
            maps = (
                BASELINES[name](self.model, images, targets)
                if name in BASELINES
                else explain(self.model, images, targets, cast(Method, name))
            )
            for order in ORDERS:
                self.curves[name, order].add(self.model, images, targets, maps, order, self.black)

    @property
    def table(self) -> list[str]:
        """The areas of all curves, a line for each method."""
        lines = ["method       most first: area, mean    least first: area, mean    (%; lower, higher is better)"]
        for name in (*self.methods, *BASELINES):
            most, least = (self.curves[name, order] for order in ORDERS)
            lines.append(f"{name:<12} {most.area:16.2f} {most.mean:6.2f} {least.area:20.2f} {least.mean:6.2f}")
        return lines

    def write(self, folder: Path) -> None:
        """Write curves.csv and curves.png."""
        with written_whole(folder / "curves.csv") as path, path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["method", "order", "images", "area", "mean", *FRACTIONS])
            for (name, order), curve in self.curves.items():
                writer.writerow([name, order, curve.images, curve.area, curve.mean, *curve.accuracy])
        self._plot(folder / "curves.png")

    def _plot(self, path: Path) -> None:
        import matplotlib.pyplot as plt

        figure, columns = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
        for axes, order in zip(columns, ORDERS, strict=True):
            for name in (*self.methods, *BASELINES):
                style = "--" if name in BASELINES else "-"
                accuracy = [100 * value for value in self.curves[name, order].accuracy]
                axes.plot([100 * fraction for fraction in FRACTIONS], accuracy, style, label=name)
            axes.set(xlabel="pixels removed, %", title=f"those that count {order} first")
            axes.grid(alpha=0.3)
        columns[0].set_ylabel("top-1 accuracy, %")
        figure.legend(*columns[0].get_legend_handles_labels(), loc="outside right center")
        save_figure(figure, path)
