"""S4ND on ImageNet-1k at 224 pixels.

As published: augmentation, rates, weight decay, drop path, and for ViT a running average and ten epochs at the last
rate. Ours: bf16 where the authors have fp16. The systems' steps, A, B and P learn at 1e-3 without decay, as published;
C and D at the rate of the recipe, where the authors have 1e-3 too.

Paper: https://arxiv.org/abs/2210.06583
Command: torchrun --nproc-per-node 8 tools/train.py configs/s4nd/in1k.py:vit-s4nd-base_in1k \\
    --cfg-options data.root=PATH
Hardware: 8 GPUs with 128 images each, or with 480 for ConvNeXt; the authors have 240 and accumulate two batches, as
    with data.batch_size=240 train.accumulate=2.
Accuracy: top-1 in percent, as others cite the paper, not measured here: the comment beside a row.
"""

_base_ = [
    "../_base_/augmentations/deit_in1k.py",
    "../_base_/schedules/adamw_cosine.py",
    "../_base_/runtime.py",
]

train = dict(amp="bf16", clip_grad=None)
schedule = dict(num_epochs=300)

rows = {
    "vit-s4nd-base_in1k": dict(  # 80.4
        model=dict(model_name="vit_s4nd_base", drop_path_rate=0.1),
        data=dict(batch_size=128),
        optimizer=dict(lr=1e-3, weight_decay=0.03),
        schedule=dict(warmup_epochs=10, cooldown_epochs=10),
        train=dict(ema_decay=0.99996),
    ),
    "convnext-s4nd-tiny_in1k": dict(  # 82.2
        model=dict(model_name="convnext_s4nd_tiny", drop_path_rate=0.1),
        data=dict(batch_size=480),
        optimizer=dict(lr=4e-3, weight_decay=0.05),
        schedule=dict(warmup_epochs=20),
    ),
}
