"""Print what models cost: parameters, tokens, and the compute of a forward pass, with the convention of each column."""

import argparse
import difflib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
from rich.box import ASCII2
from rich.console import Console
from rich.table import Table

import vim  # noqa: F401  registers the models
from vim.engine.files import write_csv
from vim.errors import UserError, describe, run
from vim.measure import count

NOTES = """\
Of one forward pass of {images}. 1 G is 10^9; a MAC is a multiply-add.
GMACs, published  matrix products and convolutions that fvcore sees in the published code, where they are called
                  FLOPs: of a mixer only in_proj and out_proj, since it does not see into the kernel in between
GMACs, all        also those inside that kernel: the depthwise convolution, x_proj and dt_proj
GFLOPs, scan      9 for each image, direction, token, channel and state, as Mamba's author estimates:
                  https://github.com/state-spaces/mamba/issues/110
GFLOPs, total     2 for each MAC, plus the scan. Norms, activations, gates and sums count nowhere."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="timm names (default: all models of this package)")
    parser.add_argument("--img-size", type=int, metavar="N", help="height and width in pixels (default: the model's)")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="images in a pass (default: 1)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the numbers there, unrounded")
    arguments = parser.parse_args()
    for option, value in (("--img-size", arguments.img_size), ("--batch-size", arguments.batch_size)):
        if value is not None and value < 1:
            raise UserError(f"{option} must be at least 1, got {value}")
    return arguments


def our_models() -> list[str]:
    return [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("vim.models.")]


def examine(name: str, img_size: int | None, batch_size: int) -> dict[str, Any]:
    """A row of the CSV file. The model is built without weights."""
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models())
        raise UserError(f"no such model: {name} (the closest: {', '.join(close) or 'none'})")
    try:
        fixed = getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False)  # other models take any size
        options: dict[str, Any] = {"img_size": img_size} if img_size and fixed else {}
        with torch.device("meta"):
            model: Any = timm.create_model(name, **options).eval()
        size = model.pretrained_cfg["input_size"]
        size = (*size[:-2], img_size, img_size) if img_size else size
        frames = getattr(getattr(model, "patch_embed", None), "num_frames", None)
        size = (size[0], frames, *size[1:]) if frames else size  # timm's input_size has no time
        counts = count(model, size, batch_size)
        features = model.forward_features(torch.empty(1, *size, device="meta"))
    except Exception as error:  # models raise many kinds
        raise UserError(f"cannot run {name} at {img_size or 'its own'} pixels: {describe(error)}") from error
    return {
        "model": name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "input": "x".join(map(str, size)),
        "tokens": features.shape[1] if getattr(features, "ndim", 0) == 3 else "-",  # else maps, or several branches
        "batch_size": batch_size,
        **asdict(counts),
        "flops": counts.flops,
    }


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(box=ASCII2, show_edge=False)
    table.add_column("model", overflow="fold")
    for header in ("params", "input", "tokens", "GMACs,\npublished", "GMACs,\nall", "GFLOPs,\nscan", "GFLOPs,\ntotal"):
        table.add_column(header, justify="right")
    for row in rows:
        compute = [f"{row[key] / 1e9:.3f}" for key in ("published_macs", "macs", "scan_flops", "flops")]
        table.add_row(row["model"], f"{row['parameters'] / 1e6:.2f} M", row["input"], str(row["tokens"]), *compute)
    Console(width=110).print(table)  # a narrow terminal would have the numbers cut


def main() -> None:
    arguments = parse()
    rows = [examine(name, arguments.img_size, arguments.batch_size) for name in arguments.models or our_models()]
    show(rows)
    print(NOTES.format(images="one image" if arguments.batch_size == 1 else f"{arguments.batch_size} images"))
    if arguments.csv:
        write_csv(arguments.csv, rows)


if __name__ == "__main__":
    run(main)
