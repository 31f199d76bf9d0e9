"""VideoMamba-Middle on Kinetics-400, 8 frames of 224 pixels: 45 epochs from masked pre-training.

Paper: https://arxiv.org/abs/2403.06977
Command:
    torchrun --nnodes 2 --nproc-per-node 8 tools/train.py \
        configs/videomamba/videomamba-middle-mask-f8_16xb64-45e_k400.py --cfg-options data.root=PATH
Hardware: 16 GPUs with 32 videos, two clips of each, as the authors'.
Accuracy: 82.0 % top-1 published (3 crops of each of 4 clips), not measured here.
"""

_base_ = [
    "../_base_/datasets/k400.py",
    "../_base_/schedules/videomamba.py",
    "../_base_/runtime_videomamba.py",
]

model = dict(
    model_name="videomamba_middle_f8.opengvlab_mask_pt_k400",
    pretrained=True,
    num_classes=400,
    drop_path_rate=0.4,
)
data = dict(batch_size=64, video=dict(num_frames=8))
optimizer = dict(lr=4e-4, weight_decay=0.05, layer_decay=0.8)  # 1e-4 * 16 * 32 * 2 / 256
schedule = dict(num_epochs=45, warmup_epochs=5, warmup_lr=4e-6, min_lr=4e-6)
