"""VideoMamba-Middle on Kinetics-400, 16 frames of 224 pixels: 45 epochs from masked pre-training.

Paper: https://arxiv.org/abs/2403.06977
Command:
    torchrun --nnodes 2 --nproc-per-node 8 tools/train.py \
        configs/videomamba/videomamba-middle-mask-f16_16xb32-45e_k400.py --cfg-options data.root=PATH
Hardware: 16 GPUs with 16 videos, two clips of each, as the authors'.
Accuracy: 83.4 % top-1 published (3 crops of each of 4 clips), not measured here.
"""

_base_ = [
    "../_base_/datasets/k400.py",
    "../_base_/schedules/videomamba.py",
    "../_base_/runtime_videomamba.py",
]

model = dict(
    model_name="videomamba_middle_f16.opengvlab_mask_k400",
    pretrained=True,
    pretrained_cfg_overlay=dict(hf_hub_filename="videomamba_m16_k400_mask_pt_f8_res224.pth", num_classes=0),
    num_classes=400,
    drop_path_rate=0.4,
)
data = dict(batch_size=32, video=dict(num_frames=16))
optimizer = dict(lr=2e-4, weight_decay=0.05, layer_decay=0.8)  # 1e-4 * 16 * 16 * 2 / 256
schedule = dict(num_epochs=45, warmup_epochs=5, warmup_lr=2e-6, min_lr=2e-6)
