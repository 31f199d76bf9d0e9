"""ViM2-Tiny on ImageNet-1k, 300 epochs at 224 pixels.

Paper: https://arxiv.org/abs/2403.19888
Command:
    torchrun --nproc-per-node 8 tools/train.py configs/mambamixer/vim2-tiny_8xb128-300e_in1k.py \
        --amp bf16 --cfg-options data.root=PATH
The paper's: 300 epochs, 20 of them warm-up, 1,024 images a step, AdamW with lr 1e-3 and weight decay 0.05, "the
    pipeline of Swin". Swin's, the paper being silent: augmentation, smoothing, clipping, the ends of the schedule.
    VMamba's: drop_path_rate. Ours: bf16, and no average of the weights.
Hardware: 8 GPUs with 128 images each. On 4 add train.accumulate=2.
Accuracy: 82.7 % top-1 published (the authors call it preliminary), not measured here.
"""

_base_ = [
    "../_base_/augmentations/swin_in1k.py",
    "../_base_/schedules/adamw_cosine.py",
    "../_base_/runtime.py",
]

model = dict(model_name="vim2_tiny", drop_path_rate=0.2)
data = dict(batch_size=128)
schedule = dict(num_epochs=300, warmup_epochs=20)
train = dict(clip_grad=5.0)
