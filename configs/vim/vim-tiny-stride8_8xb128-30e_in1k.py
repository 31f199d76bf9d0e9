"""Vim-Tiny on ImageNet-1k with patches every 8 pixels: 730 tokens instead of 197, 30 epochs from a trained Vim-Tiny.

Paper: https://arxiv.org/abs/2401.09417
Command:
    torchrun --nproc-per-node 8 tools/train.py configs/vim/vim-tiny-stride8_8xb128-30e_in1k.py \
        --cfg-options data.root=PATH model.pretrained_cfg_overlay.file=CHECKPOINT
Hardware: 8 GPUs with 128 images each, as the authors'. On 4 add train.accumulate=2.
Accuracy: 78.3 % top-1 published, not measured here, from 76.1 %; of Vim-Tiny at 224 pixels, a reproduction on 4 GPUs
    with accumulation reports 74.x instead of 76.1: https://github.com/hustvl/Vim/issues/133

CHECKPOINT is a file of the authors', such as vim_t_midclstok_76p1acc.pth; by default, what vim-tiny_8xb128-300e_in1k.py
has trained. Its position table is resized without the class token's row; the published code takes the first for it.
"""

_base_ = [
    "../_base_/augmentations/deit_in1k.py",
    "../_base_/schedules/adamw_cosine_300e.py",
    "../_base_/runtime_in1k.py",
]

model = dict(
    model_name="vim_tiny_stride8",
    pretrained=True,
    pretrained_cfg_overlay=dict(file="work_dirs/vim-tiny_8xb128-300e_in1k/best.pth"),
)
data = dict(batch_size=128)
optimizer = dict(lr=1e-5, weight_decay=1e-8)  # 5e-6 * 1024 / 512
schedule = dict(num_epochs=30, warmup_lr=1e-5)  # as min_lr: the rate is the same throughout
