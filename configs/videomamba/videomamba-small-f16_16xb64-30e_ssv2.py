"""VideoMamba-Small on Something-Something v2, 16 frames of 224 pixels: 30 epochs from ImageNet weights.

Paper: https://arxiv.org/abs/2403.06977
Command:
    torchrun --nnodes 2 --nproc-per-node 8 tools/train.py \
        configs/videomamba/videomamba-small-f16_16xb64-30e_ssv2.py --cfg-options data.root=PATH
Hardware: 16 GPUs with 32 videos, two clips of each, as the authors'.
Accuracy: 67.7 % top-1 published (3 crops of each of 4 clips), not measured here.
"""

_base_ = [
    "../_base_/datasets/ssv2.py",
    "../_base_/schedules/videomamba.py",
    "../_base_/runtime_videomamba.py",
]

model = dict(
    model_name="videomamba_small_f16.opengvlab_in1k",
    pretrained=True,
    num_classes=174,
    drop_path_rate=0.35,
)
data = dict(batch_size=64, video=dict(num_frames=16))
optimizer = dict(lr=1.6e-3, weight_decay=0.05, layer_decay=0.75)  # 4e-4 * 16 * 32 * 2 / 256
schedule = dict(num_epochs=30, warmup_epochs=5, warmup_lr=4e-6, min_lr=4e-6)
