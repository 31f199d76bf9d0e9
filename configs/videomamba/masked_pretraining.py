"""VideoMamba-Middle pre-trained without labels: it learns CLIP's features of the fifth of the tokens it sees.

Unlike in the published code, the last block and the last norm are trained as well. The sizes of the crops are drawn
evenly from a range of which the published code has four steps.

Paper: https://arxiv.org/abs/2403.06977 (after https://arxiv.org/abs/2303.16058)
Command: torchrun --nnodes 4 --nproc-per-node 8 tools/train.py \
    configs/videomamba/masked_pretraining.py:videomamba-middle-mask-pt-f8_k400 --cfg-options data.root=PATH
Hardware: 32 GPUs with 64 clips each, as the authors'.
Accuracy: none of its own. After fine-tuning (`videomamba-middle-mask-f8_k400`, `videomamba-middle-mask-f8_ssv2`)
    82.0 % top-1 on Kinetics-400 and 70.2 % on Something-Something v2 published, not measured here.
"""

_base_ = ["../_base_/runtime_videomamba.py"]

model = dict(model_name="videomamba_middle_f8", num_classes=0, drop_path_rate=0.4)
teacher = dict(model_name="vit_base_patch16_clip_224.openai", pretrained=True)
masking = dict(ratio=0.8)
data = dict(
    dataset="videos",
    root="",
    batch_size=64,
    num_workers=10,
    train_transform=dict(scale=(0.4356, 1.0), ratio=(0.75, 1.3333), color_jitter=0.0),
)
optimizer = dict(opt="adamw", lr=1.2e-3, weight_decay=0.05, betas=(0.9, 0.95))  # 1.5e-4 * 32 * 64 / 256
schedule = dict(sched="cosine", num_epochs=801, warmup_epochs=40, warmup_lr=0.0, min_lr=8e-5, step_on_epochs=False)

rows = {
    "videomamba-middle-mask-pt-f8_k400": dict(
        data=dict(video=dict(num_frames=8, sampling="sparse", classes="kinetics400"))
    ),
    "videomamba-middle-mask-pt-f8_ssv2": dict(data=dict(video=dict(num_frames=8, sampling="ssv2"))),
}
