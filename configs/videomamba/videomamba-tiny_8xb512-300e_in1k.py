"""VideoMamba-Tiny on ImageNet-1k, 300 epochs at 224 pixels.

Paper: https://arxiv.org/abs/2403.06977
Command:
    torchrun --nproc-per-node 8 tools/train.py \
        configs/videomamba/videomamba-tiny_8xb512-300e_in1k.py --cfg-options data.root=PATH
Hardware: 8 GPUs with 512 images each, as many in all as the authors'.
Accuracy: 76.9 % top-1 published, not measured here.
"""

_base_ = [
    "../_base_/augmentations/videomamba_tiny_in1k.py",
    "../_base_/schedules/adamw_cosine_300e.py",
    "../_base_/runtime_videomamba.py",
]

model = dict(model_name="videomamba_tiny")
data = dict(batch_size=512)
optimizer = dict(lr=4e-3, weight_decay=0.1)  # 5e-4 * 4096 / 512
train = dict(clip_grad=5.0)
