"""VideoMamba-Tiny on COIN, 64 frames of 224 pixels: 40 epochs from Kinetics weights, which are those of 32 frames.

Paper: https://arxiv.org/abs/2403.06977
Command:
    torchrun --nnodes 2 --nproc-per-node 8 tools/train.py \
        configs/videomamba/videomamba-tiny-f64_16xb32-40e_coin.py --cfg-options data.root=PATH
Hardware: 16 GPUs with 16 videos, two clips of each, as the authors'.
Accuracy: 87.0 % top-1 published (3 crops of each of 10 clips), not measured here.
"""

_base_ = [
    "../_base_/datasets/coin.py",
    "../_base_/schedules/videomamba.py",
    "../_base_/runtime_videomamba.py",
]

model = dict(
    model_name="videomamba_tiny_f64.opengvlab_k400",
    pretrained=True,
    pretrained_cfg_overlay=dict(hf_hub_filename="videomamba_t16_k400_f32_res224.pth"),
    num_classes=180,
    drop_path_rate=0.1,
)
data = dict(batch_size=32, video=dict(num_frames=64), train_transform=dict(auto_augment="rand-m5-n2-mstd0.25-inc1"))
optimizer = dict(lr=4e-4, weight_decay=0.1, layer_decay=0.75)  # 2e-4 * 16 * 16 * 2 / 256
schedule = dict(num_epochs=40, warmup_epochs=5, warmup_lr=2e-6, min_lr=2e-6)
