"""VideoMamba-Small on ImageNet-1k, 300 epochs at 224 pixels.

Paper: https://arxiv.org/abs/2403.06977
Command:
    torchrun --nproc-per-node 8 tools/train.py \
        configs/videomamba/videomamba-small_8xb512-300e_in1k.py --cfg-options data.root=PATH
Hardware: 8 GPUs with 512 images each, as many in all as the authors'.
Accuracy: 81.2 % top-1 published, not measured here.
"""

_base_ = [
    "../_base_/augmentations/deit_in1k.py",
    "../_base_/schedules/adamw_cosine_300e.py",
    "../_base_/runtime_videomamba.py",
]

model = dict(model_name="videomamba_small", drop_path_rate=0.15)
data = dict(batch_size=512)
optimizer = dict(lr=4e-3, weight_decay=0.05)  # 5e-4 * 4096 / 512
