"""What the profiler profiles: forward and backward of one layer's scan, compiled and warm."""

import sys

import torch

from vim.measure.gpu.card import DEVICE
from vim.measure.gpu.ops import forward_and_backward, scan
from vim.measure.gpu.shapes import REAL, TOY


def main() -> None:
    layers = (TOY if "--rehearse" in sys.argv else REAL).layers
    step = forward_and_backward(*scan(next(iter(layers.values())), "triton"))
    step()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    step()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
