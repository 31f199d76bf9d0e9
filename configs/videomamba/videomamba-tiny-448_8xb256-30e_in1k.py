"""VideoMamba-Tiny on ImageNet-1k, 30 epochs at 448 pixels, from the model trained at 224.

Paper: https://arxiv.org/abs/2403.06977
Command:
    torchrun --nproc-per-node 8 tools/train.py \
        configs/videomamba/videomamba-tiny-448_8xb256-30e_in1k.py --cfg-options data.root=PATH
Hardware: 8 GPUs with 256 images each, as many in all as the authors'.
Accuracy: 79.3 % top-1 published, not measured here.
"""

_base_ = [
    "../_base_/augmentations/videomamba_tiny_in1k.py",
    "../_base_/schedules/adamw_cosine_300e.py",
    "../_base_/runtime_videomamba.py",
]

model = dict(model_name="videomamba_tiny.opengvlab_in1k", pretrained=True, img_size=448)
data = dict(batch_size=256)
optimizer = dict(lr=2e-5, weight_decay=1e-8)  # 5e-6 * 2048 / 512
schedule = dict(num_epochs=30, min_lr=5e-6)
