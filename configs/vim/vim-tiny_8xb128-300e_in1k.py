"""Vim-Tiny on ImageNet-1k, 300 epochs at 224 pixels.

Paper: https://arxiv.org/abs/2401.09417
Command:
    torchrun --nproc-per-node 8 tools/train.py configs/vim/vim-tiny_8xb128-300e_in1k.py \
        --cfg-options data.root=PATH
Hardware: 8 GPUs with 128 images each, as the authors'. On 4 add train.accumulate=2.
Accuracy: 76.1 % top-1 published, not measured here; a reproduction on 4 GPUs with accumulation reports 74.x:
    https://github.com/hustvl/Vim/issues/133
"""

_base_ = [
    "../_base_/augmentations/deit_in1k.py",
    "../_base_/schedules/adamw_cosine_300e.py",
    "../_base_/runtime_in1k.py",
]

model = dict(model_name="vim_tiny")
data = dict(batch_size=128)
optimizer = dict(lr=1e-3, weight_decay=0.1)  # 5e-4 * 1024 / 512
