"""VideoMamba-Middle on Kinetics-400, 64 frames of 224 pixels: 50 epochs from ImageNet weights.

Paper: https://arxiv.org/abs/2403.06977
Command:
    torchrun --nnodes 2 --nproc-per-node 8 tools/train.py \
        configs/videomamba/videomamba-middle-f64_16xb8-50e_k400.py --cfg-options data.root=PATH
Hardware: 16 GPUs with 4 videos, two clips of each, as the authors'.
Accuracy: 82.8 % top-1 published (3 crops of each of 4 clips), not measured here.
"""

_base_ = [
    "../_base_/datasets/k400.py",
    "../_base_/schedules/videomamba.py",
    "../_base_/runtime_videomamba.py",
]

model = dict(
    model_name="videomamba_middle_f64.opengvlab_in1k",
    pretrained=True,
    num_classes=400,
    drop_path_rate=0.8,
)
data = dict(batch_size=8, video=dict(num_frames=64))
optimizer = dict(lr=5e-5, weight_decay=0.05, layer_decay=0.75)  # 1e-4 * 16 * 4 * 2 / 256
schedule = dict(num_epochs=50, warmup_epochs=5, warmup_lr=5e-7, min_lr=5e-7)
