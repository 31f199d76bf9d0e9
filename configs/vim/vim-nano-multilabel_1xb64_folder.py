"""Vim-Nano on your own small images that may have several labels each, from PATH/labels.csv.

Paper: https://arxiv.org/abs/2401.09417 (the architecture; this size and recipe are ours).
Command: python tools/train.py configs/vim/vim-nano-multilabel_1xb64_folder.py
    --cfg-options data.root=PATH model.num_classes=N
Hardware: one GPU; for a few thousand small images a CPU.
Accuracy: depends on the images.
"""

_base_ = ["./vim-nano_1xb64_folder.py"]

# columns file and labels, with names separated by ";", or a column of 0 and 1 for each class (docs/training.md)
data = dict(labels="labels.csv", sampling="balanced")
