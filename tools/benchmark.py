"""Time the scan's backends and whole models against timm's DeiT, side by side in one run, and print the ratios."""

import argparse
import subprocess
import sys
from functools import partial
from typing import Any

import timm
import torch

import vim  # noqa: F401  registers the models
from vim.engine.timing import side_by_side
from vim.kernels import available_backends, selective_scan

TOKENS, CHANNELS, STATES = 197, 768, 16  # Vim-Small's scan


def scan_inputs(batch: int) -> dict[str, Any]:
    torch.manual_seed(0)
    (u, delta, z), (B, C) = torch.randn(3, batch, TOKENS, CHANNELS), torch.randn(2, batch, TOKENS, STATES)
    D, delta_bias = torch.randn(2, CHANNELS)
    A = -torch.arange(1.0, STATES + 1).repeat(CHANNELS, 1)
    return {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias - 3}


def scan(inputs: dict[str, Any], backend: str, backward: bool) -> None:
    leaves = {name: tensor.requires_grad_(backward) for name, tensor in inputs.items()}
    y: Any = selective_scan(**leaves, delta_softplus=True, backend=backend)
    if backward:
        torch.autograd.grad(y.sum(), list(leaves.values()))


def compare_scans(batch: int) -> None:
    inputs = scan_inputs(batch)
    for backward in (False, True):
        runs = {name: partial(scan, inputs, name, backward) for name in available_backends()}
        medians = side_by_side(runs, rounds=2 if backward else 15)
        for name, taken in medians.items():
            label = f"scan, batch {batch}, {'forward+backward' if backward else 'forward'}, {name}"
            print(f"{label:55s} {1e3 * taken:9.2f} ms   {medians['reference'] / taken:7.1f} x the loop")


@torch.inference_mode()
def compare_models(ours: str, theirs: str, size: int, batch: int, rounds: int) -> None:
    image = torch.randn(batch, 3, size, size)
    models = {name: timm.create_model(name, img_size=size).eval() for name in (ours, theirs)}
    medians = side_by_side({name: partial(model, image) for name, model in models.items()}, rounds)
    for name, taken in medians.items():
        label = f"{name}, {size} pixels, batch {batch}"
        print(f"{label:55s} {1e3 * taken:9.1f} ms   {taken / medians[theirs]:7.2f} of {theirs}'s time")


@torch.inference_mode()
def compare_lengths(name: str, size: int, factor: int) -> None:
    models: dict[int, Any] = {
        pixels: timm.create_model(name, img_size=pixels).eval() for pixels in (size, size * factor)
    }
    images = {pixels: torch.randn(1, 3, pixels, pixels) for pixels in models}
    medians = side_by_side({str(p): partial(models[p], images[p]) for p in models}, rounds=9)
    few, many = (medians[str(pixels)] / model.pos_embed.shape[1] for pixels, model in models.items())
    print(f"{name}, time per token at {factor**2} x the tokens: {many / few:.2f}")


def run_python(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads, float32")
    for batch in (1, 8):
        compare_scans(batch)
    compare_models("vim_small", "deit_small_patch16_224", size=224, batch=1, rounds=25)
    compare_models("vim_small", "deit_small_patch16_224", size=224, batch=8, rounds=10)
    compare_models("vim_tiny", "deit_tiny_patch16_224", size=1248, batch=1, rounds=3)
    compare_lengths("vim_tiny", size=224, factor=4)
    codes = ("import timm", "import timm, vim")
    alone, both = side_by_side({code: partial(run_python, code) for code in codes}, rounds=5).values()
    print(f"import vim adds {both - alone:.2f} s to import timm ({alone:.2f} s)")


if __name__ == "__main__":
    main()
