"""VideoMamba-Middle on Something-Something v2, pre-trained without labels: CLIP's features of the fifth it attends to.

Paper: https://arxiv.org/abs/2403.06977 (after https://arxiv.org/abs/2303.16058)
Command:
    torchrun --nnodes 4 --nproc-per-node 8 tools/train.py \
        configs/videomamba/videomamba-middle-mask-pt-f8_32xb64-801e_ssv2.py --cfg-options data.root=PATH
Hardware: 32 GPUs with 64 clips each, as the authors'.
Accuracy: none of its own. After fine-tuning 70.2 % top-1 published, not measured here:
    videomamba-middle-mask-f8_16xb64-30e_ssv2.py

Unlike in the published code, the last block and the last norm are trained as well. The crops' sizes are drawn evenly
from what the published code has four steps of.
"""

_base_ = [
    "../_base_/datasets/ssv2.py",
    "../_base_/runtime_videomamba.py",
]

model = dict(model_name="videomamba_middle_f8", num_classes=0, drop_path_rate=0.4)
teacher = dict(model_name="vit_base_patch16_clip_224.openai", pretrained=True)
masking = dict(ratio=0.8)
data = dict(
    batch_size=64,
    samples=1,
    video=dict(num_frames=8),
    train_transform=dict(_delete_=True, scale=(0.4356, 1.0), ratio=(0.75, 1.3333), color_jitter=0.0),
)
mixup = dict(_delete_=True)
optimizer = dict(opt="adamw", lr=1.2e-3, weight_decay=0.05, betas=(0.9, 0.95))  # 1.5e-4 * 32 * 64 / 256
schedule = dict(sched="cosine", num_epochs=801, warmup_epochs=40, warmup_lr=0.0, min_lr=8e-5, step_on_epochs=False)
