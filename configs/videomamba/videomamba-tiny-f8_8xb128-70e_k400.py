"""VideoMamba-Tiny on Kinetics-400, 8 frames of 224 pixels: 70 epochs from ImageNet weights.

Paper: https://arxiv.org/abs/2403.06977
Command:
    torchrun --nproc-per-node 8 tools/train.py \
        configs/videomamba/videomamba-tiny-f8_8xb128-70e_k400.py --cfg-options data.root=PATH
Hardware: 8 GPUs with 64 videos, two clips of each, as the authors'.
Accuracy: 76.9 % top-1 published (3 crops of each of 4 clips), not measured here.
"""

_base_ = [
    "../_base_/datasets/k400.py",
    "../_base_/schedules/videomamba.py",
    "../_base_/runtime_videomamba.py",
]

model = dict(
    model_name="videomamba_tiny_f8.opengvlab_in1k",
    pretrained=True,
    num_classes=400,
    drop_path_rate=0.1,
)
data = dict(batch_size=128, video=dict(num_frames=8), train_transform=dict(auto_augment="rand-m5-n2-mstd0.25-inc1"))
optimizer = dict(lr=8e-4, weight_decay=0.1, layer_decay=0.75)  # 2e-4 * 8 * 64 * 2 / 256
schedule = dict(num_epochs=70, warmup_epochs=5, warmup_lr=4e-6, min_lr=4e-6)
