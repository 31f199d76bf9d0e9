"""VideoMamba-Base on ImageNet-1k, 300 epochs at 224 pixels, beside labels by a trained VideoMamba-Small.

Paper: https://arxiv.org/abs/2403.06977
Command:
    torchrun --nnodes 2 --nproc-per-node 8 tools/train.py \
        configs/videomamba/videomamba-base_16xb128-300e_in1k.py --cfg-options data.root=PATH
Hardware: 16 GPUs with 128 images each, as many in all as the authors'.
Accuracy: 82.7 % top-1 published, not measured here.
"""

_base_ = [
    "../_base_/augmentations/deit_in1k.py",
    "../_base_/schedules/adamw_cosine_300e.py",
    "../_base_/runtime_videomamba.py",
]

model = dict(model_name="videomamba_base", drop_path_rate=0.5)
teacher = dict(model_name="videomamba_small", pretrained=True)
data = dict(batch_size=128)
optimizer = dict(lr=2e-3, weight_decay=0.05)  # 5e-4 * 2048 / 512
schedule = dict(warmup_epochs=20, warmup_lr=5e-7, min_lr=5e-6)
train = dict(clip_grad=5.0)
