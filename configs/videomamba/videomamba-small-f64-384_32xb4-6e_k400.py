"""VideoMamba-Small on Kinetics-400, 64 frames of 384 pixels: 6 epochs from the model trained at 224.

Paper: https://arxiv.org/abs/2403.06977
Command:
    torchrun --nnodes 4 --nproc-per-node 8 tools/train.py \
        configs/videomamba/videomamba-small-f64-384_32xb4-6e_k400.py --cfg-options data.root=PATH
Hardware: 32 GPUs with 2 videos, two clips of each, twice an update, as the authors'.
Accuracy: 82.7 % top-1 published (3 crops of each of 4 clips), not measured here.
"""

_base_ = [
    "../_base_/datasets/k400.py",
    "../_base_/schedules/videomamba.py",
    "../_base_/runtime_videomamba.py",
]

model = dict(
    model_name="videomamba_small_f64.opengvlab_k400",
    pretrained=True,
    num_classes=400,
    img_size=384,
    drop_path_rate=0.35,
)
data = dict(batch_size=4, video=dict(num_frames=64))
optimizer = dict(lr=5e-6, weight_decay=1e-8)  # 5e-6 * 32 * 2 * 2 * 2 / 256
schedule = dict(num_epochs=6, warmup_epochs=1, warmup_lr=1e-6, min_lr=1e-6)
train = dict(accumulate=2)
