"""VideoMamba-Middle on Kinetics-400, 64 frames of 384 pixels: 6 epochs from the model trained at 224.

Paper: https://arxiv.org/abs/2403.06977
Command:
    torchrun --nnodes 2 --nproc-per-node 8 tools/train.py \
        configs/videomamba/videomamba-middle-mask-f64-384_16xb2-6e_k400.py --cfg-options data.root=PATH
Hardware: 16 GPUs with 1 video, two clips of each, twice an update, as the authors'.
Accuracy: 85.0 % top-1 published (3 crops of each of 4 clips), not measured here.
"""

_base_ = [
    "../_base_/datasets/k400.py",
    "../_base_/schedules/videomamba.py",
    "../_base_/runtime_videomamba.py",
]

model = dict(
    model_name="videomamba_middle_f64.opengvlab_mask_k400",
    pretrained=True,
    num_classes=400,
    img_size=384,
    drop_path_rate=0.4,
)
data = dict(batch_size=2, video=dict(num_frames=64))
optimizer = dict(lr=1.25e-6, weight_decay=1e-8)  # 5e-6 * 16 * 1 * 2 * 2 / 256
schedule = dict(num_epochs=6, warmup_epochs=1, warmup_lr=2.5e-7, min_lr=2.5e-7)
train = dict(accumulate=2)
