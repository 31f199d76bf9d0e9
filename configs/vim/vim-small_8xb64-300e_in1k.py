"""Vim-Small on ImageNet-1k, 300 epochs at 224 pixels.

Paper: https://arxiv.org/abs/2401.09417
Command:
    torchrun --nproc-per-node 8 tools/train.py configs/vim/vim-small_8xb64-300e_in1k.py \
        --cfg-options data.root=PATH
Hardware: 8 GPUs with 64 images each, as the authors'. On 4 add train.accumulate=2.
Accuracy: 80.5 % top-1 published, not measured here; of Vim-Tiny, a reproduction on 4 GPUs with accumulation
    reports 74.x instead of 76.1: https://github.com/hustvl/Vim/issues/133
"""

_base_ = [
    "../_base_/augmentations/deit_in1k.py",
    "../_base_/schedules/adamw_cosine_300e.py",
    "../_base_/runtime_in1k.py",
]

model = dict(model_name="vim_small", drop_path_rate=0.05)
data = dict(batch_size=64)
optimizer = dict(lr=1e-3)  # 1e-3 * 512 / 512
