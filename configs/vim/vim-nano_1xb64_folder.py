"""Vim-Nano on your own small images: PATH/train/CLASS/*.jpg and PATH/val/CLASS/*.jpg.

Paper: https://arxiv.org/abs/2401.09417 (the architecture; this size and recipe are ours).
Command: python tools/train.py configs/vim/vim-nano_1xb64_folder.py --cfg-options data.root=PATH model.num_classes=N
Hardware: one GPU; for a few thousand small images a CPU.
Accuracy: depends on the images.
"""

_base_ = ["../_base_/datasets/folder.py", "../_base_/schedules/adamw_cosine.py", "../_base_/runtime.py"]

model = dict(model_name="vim_nano", num_classes=10)
