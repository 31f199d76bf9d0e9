"""VideoMamba-Middle on COIN, 64 frames of 224 pixels: 30 epochs from Kinetics weights.

Paper: https://arxiv.org/abs/2403.06977
Command:
    torchrun --nproc-per-node 8 tools/train.py \
        configs/videomamba/videomamba-middle-f64_8xb8-30e_coin.py --cfg-options data.root=PATH
Hardware: 8 GPUs with 4 videos, two clips of each, as the authors'.
Accuracy: 89.5 % top-1 published (3 crops of each of 10 clips), not measured here.
"""

_base_ = [
    "../_base_/datasets/coin.py",
    "../_base_/schedules/videomamba.py",
    "../_base_/runtime_videomamba.py",
]

model = dict(
    model_name="videomamba_middle_f64.opengvlab_k400",
    pretrained=True,
    num_classes=180,
    drop_path_rate=0.8,
)
data = dict(batch_size=8, video=dict(num_frames=64))
optimizer = dict(lr=5e-5, weight_decay=0.05, layer_decay=0.8)  # 2e-4 * 8 * 4 * 2 / 256
schedule = dict(num_epochs=30, warmup_epochs=5, warmup_lr=2.5e-7, min_lr=2.5e-7)
