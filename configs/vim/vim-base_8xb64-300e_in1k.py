"""Vim-Base on ImageNet-1k, 300 epochs at 224 pixels.

Paper: https://arxiv.org/abs/2401.09417
Command:
    torchrun --nproc-per-node 8 tools/train.py configs/vim/vim-base_8xb64-300e_in1k.py \
        --cfg-options data.root=PATH
Hardware: 8 GPUs with 64 images each; train.grad_checkpointing=True where memory is short.
Accuracy: 81.9 % top-1 published, not measured here.

The authors publish weights, but no recipe for this size. Ours: Vim-Small's, with the drop path rate of DeiT-Base.
"""

_base_ = [
    "../_base_/augmentations/deit_in1k.py",
    "../_base_/schedules/adamw_cosine_300e.py",
    "../_base_/runtime_in1k.py",
]

model = dict(model_name="vim_base", drop_path_rate=0.1)
data = dict(batch_size=64)
optimizer = dict(lr=1e-3)  # 1e-3 * 512 / 512
