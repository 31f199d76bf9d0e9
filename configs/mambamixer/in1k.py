"""ViM2 on ImageNet-1k, 300 epochs at 224 pixels.

From the paper: 300 epochs with 20 of warm-up, 1,024 images per update, AdamW with lr 1e-3 and weight decay 0.05, "the
pipeline of Swin". From Swin, as the paper gives no details: augmentation, smoothing, clipping, first and last rate.
From VMamba: drop_path_rate. Ours: bf16, and no running average of the weights.

Paper: https://arxiv.org/abs/2403.19888
Command: torchrun --nproc-per-node 8 tools/train.py configs/mambamixer/in1k.py:vim2-tiny_in1k \
    --amp bf16 --cfg-options data.root=PATH
Hardware: 8 GPUs with 128 images each. On 4 GPUs add train.accumulate=2.
Accuracy: top-1 in percent, published (the authors call it preliminary), not measured here: the comment beside a row.
"""

_base_ = [
    "../_base_/augmentations/swin_in1k.py",
    "../_base_/schedules/adamw_cosine.py",
    "../_base_/runtime.py",
]

data = dict(batch_size=128)
schedule = dict(num_epochs=300, warmup_epochs=20)
train = dict(clip_grad=5.0)
rows = {
    "vim2-tiny_in1k": dict(model=dict(model_name="vim2_tiny", drop_path_rate=0.2)),  # 82.7
    "vim2-small_in1k": dict(model=dict(model_name="vim2_small", drop_path_rate=0.3)),  # 83.7
    "vim2-base_in1k": dict(model=dict(model_name="vim2_base", drop_path_rate=0.6)),  # 83.9
}
