"""VideoMamba-Small on Breakfast, 32 frames of 224 pixels: 50 epochs from Kinetics weights.

Paper: https://arxiv.org/abs/2403.06977
Command:
    torchrun --nnodes 2 --nproc-per-node 8 tools/train.py \
        configs/videomamba/videomamba-small-f32_16xb32-50e_breakfast.py --cfg-options data.root=PATH
Hardware: 16 GPUs with 16 videos, two clips of each, as the authors'.
Accuracy: 95.3 % top-1 published (3 crops of each of 4 clips), not measured here.
"""

_base_ = [
    "../_base_/datasets/breakfast.py",
    "../_base_/schedules/videomamba.py",
    "../_base_/runtime_videomamba.py",
]

model = dict(
    model_name="videomamba_small_f32.opengvlab_k400",
    pretrained=True,
    num_classes=10,
    drop_path_rate=0.4,
)
data = dict(batch_size=32, video=dict(num_frames=32))
optimizer = dict(lr=4e-4, weight_decay=0.05, layer_decay=0.75)  # 2e-4 * 16 * 16 * 2 / 256
schedule = dict(num_epochs=50, warmup_epochs=5, warmup_lr=2e-6, min_lr=2e-6)
