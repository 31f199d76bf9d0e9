"""VideoMamba-Middle on ImageNet-1k, 30 epochs at 448 pixels, from the model trained at 224.

Paper: https://arxiv.org/abs/2403.06977
Command:
    torchrun --nnodes 2 --nproc-per-node 8 tools/train.py \
        configs/videomamba/videomamba-middle-448_16xb32-30e_in1k.py --cfg-options data.root=PATH
Hardware: 16 GPUs with 32 images each, as many in all as the authors'.
Accuracy: 83.8 % top-1 published, not measured here.
"""

_base_ = [
    "../_base_/augmentations/deit_in1k.py",
    "../_base_/schedules/adamw_cosine_300e.py",
    "../_base_/runtime_videomamba.py",
]

model = dict(model_name="videomamba_middle.opengvlab_in1k", pretrained=True, img_size=448, drop_path_rate=0.5)
data = dict(batch_size=32)
optimizer = dict(lr=5e-6, weight_decay=1e-8)  # 5e-6 * 512 / 512
schedule = dict(num_epochs=30, min_lr=5e-6)
