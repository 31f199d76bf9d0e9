"""VideoMamba-Middle on Breakfast, 32 frames of 224 pixels: 50 epochs from Kinetics weights.

Paper: https://arxiv.org/abs/2403.06977
Command:
    torchrun --nproc-per-node 8 tools/train.py \
        configs/videomamba/videomamba-middle-f32_8xb16-50e_breakfast.py --cfg-options data.root=PATH
Hardware: 8 GPUs with 8 videos, two clips of each, as the authors'.
Accuracy: 94.8 % top-1 published (3 crops of each of 4 clips), not measured here.
"""

_base_ = [
    "../_base_/datasets/breakfast.py",
    "../_base_/schedules/videomamba.py",
    "../_base_/runtime_videomamba.py",
]

model = dict(
    model_name="videomamba_middle_f32.opengvlab_k400",
    pretrained=True,
    num_classes=10,
    drop_path_rate=0.8,
)
data = dict(batch_size=16, video=dict(num_frames=32))
optimizer = dict(lr=1e-4, weight_decay=0.05, layer_decay=0.8)  # 2e-4 * 8 * 8 * 2 / 256
schedule = dict(num_epochs=50, warmup_epochs=5, warmup_lr=5e-7, min_lr=5e-7)
