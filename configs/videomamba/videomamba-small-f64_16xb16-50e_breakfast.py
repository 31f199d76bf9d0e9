"""VideoMamba-Small on Breakfast, 64 frames of 224 pixels: 50 epochs from Kinetics weights.

Paper: https://arxiv.org/abs/2403.06977
Command:
    torchrun --nnodes 2 --nproc-per-node 8 tools/train.py \
        configs/videomamba/videomamba-small-f64_16xb16-50e_breakfast.py --cfg-options data.root=PATH
Hardware: 16 GPUs with 8 videos, two clips of each, as the authors'.
Accuracy: 97.4 % top-1 published (3 crops of each of 4 clips), not measured here.
"""

_base_ = [
    "../_base_/datasets/breakfast.py",
    "../_base_/schedules/videomamba.py",
    "../_base_/runtime_videomamba.py",
]

model = dict(
    model_name="videomamba_small_f64.opengvlab_k400",
    pretrained=True,
    num_classes=10,
    drop_path_rate=0.4,
)
data = dict(batch_size=16, video=dict(num_frames=64))
optimizer = dict(lr=2e-4, weight_decay=0.05, layer_decay=0.75)  # 2e-4 * 16 * 8 * 2 / 256
schedule = dict(num_epochs=50, warmup_epochs=5, warmup_lr=1e-6, min_lr=1e-6)
