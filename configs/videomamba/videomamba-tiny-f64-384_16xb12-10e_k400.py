"""VideoMamba-Tiny on Kinetics-400, 64 frames of 384 pixels: 10 epochs from the model trained at 224.

Paper: https://arxiv.org/abs/2403.06977
Command:
    torchrun --nnodes 2 --nproc-per-node 8 tools/train.py \
        configs/videomamba/videomamba-tiny-f64-384_16xb12-10e_k400.py --cfg-options data.root=PATH
Hardware: 16 GPUs with 6 videos, two clips of each, as the authors'.
Accuracy: 80.3 % top-1 published (3 crops of each of 4 clips), not measured here.
"""

_base_ = [
    "../_base_/datasets/k400.py",
    "../_base_/schedules/videomamba.py",
    "../_base_/runtime_videomamba.py",
]

model = dict(
    model_name="videomamba_tiny_f64.opengvlab_k400",
    pretrained=True,
    num_classes=400,
    img_size=384,
    drop_path_rate=0.1,
)
data = dict(batch_size=12, video=dict(num_frames=64), train_transform=dict(auto_augment="rand-m5-n2-mstd0.25-inc1"))
optimizer = dict(lr=3.75e-6, weight_decay=1e-8)  # 5e-6 * 16 * 6 * 2 / 256
schedule = dict(num_epochs=10, warmup_epochs=2, warmup_lr=7.5e-7, min_lr=7.5e-7)
