"""VideoMamba-Middle on Something-Something v2, 16 frames of 288 pixels: 10 epochs from the model trained at 224.

Paper: https://arxiv.org/abs/2403.06977
Command:
    torchrun --nnodes 2 --nproc-per-node 8 tools/train.py \
        configs/videomamba/videomamba-middle-mask-f16-288_16xb12-10e_ssv2.py --cfg-options data.root=PATH
Hardware: 16 GPUs with 6 videos, two clips of each, as the authors'.
Accuracy: 71.4 % top-1 published (3 crops of each of 4 clips), not measured here.
"""

_base_ = [
    "../_base_/datasets/ssv2.py",
    "../_base_/schedules/videomamba.py",
    "../_base_/runtime_videomamba.py",
]

model = dict(
    model_name="videomamba_middle_f16.opengvlab_mask_ssv2",
    pretrained=True,
    num_classes=174,
    img_size=288,
    drop_path_rate=0.4,
)
data = dict(batch_size=12, video=dict(num_frames=16))
optimizer = dict(lr=3.75e-6, weight_decay=1e-8)  # 5e-6 * 16 * 6 * 2 / 256
schedule = dict(num_epochs=10, warmup_epochs=2, warmup_lr=7.5e-7, min_lr=7.5e-7)
