"""VideoMamba-Small on ImageNet-1k, 10 epochs at 576 pixels, from the model trained at 448.

Paper: https://arxiv.org/abs/2403.06977
Command:
    torchrun --nproc-per-node 8 tools/train.py \
        configs/videomamba/videomamba-small-576_8xb64-10e_in1k.py --cfg-options data.root=PATH
Hardware: 8 GPUs with 64 images each, as many in all as the authors'.
Accuracy: 83.5 % top-1 published, not measured here.
"""

_base_ = [
    "../_base_/augmentations/deit_in1k.py",
    "../_base_/schedules/adamw_cosine_300e.py",
    "../_base_/runtime_videomamba.py",
]

model = dict(model_name="videomamba_small.opengvlab_in1k_448", pretrained=True, img_size=576, drop_path_rate=0.15)
data = dict(batch_size=64)
optimizer = dict(lr=5e-6, weight_decay=1e-8)  # 5e-6 * 512 / 512
schedule = dict(num_epochs=10, warmup_epochs=2, min_lr=5e-6)
