"""VideoMamba-Tiny on Something-Something v2, 16 frames of 288 pixels: 10 epochs from the model trained at 224.

Paper: https://arxiv.org/abs/2403.06977
Command:
    torchrun --nnodes 2 --nproc-per-node 8 tools/train.py \
        configs/videomamba/videomamba-tiny-f16-288_16xb64-10e_ssv2.py --cfg-options data.root=PATH
Hardware: 16 GPUs with 32 videos, two clips of each, as the authors'.
Accuracy: 66.2 % top-1 published (3 crops of each of 4 clips), not measured here.
"""

_base_ = [
    "../_base_/datasets/ssv2.py",
    "../_base_/schedules/videomamba.py",
    "../_base_/runtime_videomamba.py",
]

model = dict(
    model_name="videomamba_tiny_f16.opengvlab_ssv2",
    pretrained=True,
    num_classes=174,
    img_size=288,
    drop_path_rate=0.1,
)
data = dict(batch_size=64, video=dict(num_frames=16), train_transform=dict(auto_augment="rand-m5-n2-mstd0.25-inc1"))
optimizer = dict(lr=2e-5, weight_decay=1e-8)  # 5e-6 * 16 * 32 * 2 / 256
schedule = dict(num_epochs=10, warmup_epochs=2, warmup_lr=4e-6, min_lr=4e-6)
