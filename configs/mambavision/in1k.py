"""MambaVision on ImageNet-1k, 300 epochs at 224 pixels and 10 more at the last rate.

As published: LAMB with a rate that does not depend on the images per update, the schedule, augmentation, a running
average that is evaluated and that from 25 to 30 % of the epochs on teaches the model (MESA,
https://arxiv.org/abs/2205.14083). The authors give 128 images per GPU, and not the number of GPUs. Ours: bf16 where the
authors have fp16. The recipes of the models that were pre-trained on ImageNet-21k are not published, nor is any of L3.

model.double_dt_bias=False trains without the second bias of the steps, which the published weights need.

Paper: https://arxiv.org/abs/2407.08083
Command: torchrun --nproc-per-node 8 tools/train.py configs/mambavision/in1k.py:mambavision-t_in1k \
    --cfg-options data.root=PATH
Hardware: 8 GPUs with 128 images each; more if there are.
Accuracy: top-1 in percent, published, not measured here: the comment beside a row.
"""

_base_ = [
    "../_base_/augmentations/swin_in1k.py",
    "../_base_/schedules/adamw_cosine.py",
    "../_base_/runtime.py",
]

data = dict(batch_size=128, train_transform=dict(interpolation="random"))
optimizer = dict(opt="lamb", lr=5e-3, eps=1e-8)
schedule = dict(num_epochs=300, warmup_epochs=20, min_lr=5e-6, cooldown_epochs=10)
train = dict(amp="bf16", clip_grad=5.0, ema_decay=0.9998)


def run(size, drop_path_rate, mesa, weight_decay=0.05, mesa_start=0.25, **schedule):
    return dict(
        model=dict(model_name=f"mambavision_{size}", drop_path_rate=drop_path_rate),
        optimizer=dict(weight_decay=weight_decay),
        schedule=schedule,
        train=dict(mesa=mesa, mesa_start=mesa_start),
    )


rows = {
    "mambavision-t_in1k": run("t", 0.2, mesa=0.5),  # 82.3
    "mambavision-t2_in1k": run("t2", 0.2, mesa=0.75),  # 82.7
    "mambavision-s_in1k": run("s", 0.2, mesa=1.0),  # 83.3
    "mambavision-b_in1k": run("b", 0.3, mesa=1.0, mesa_start=0.3, weight_decay=0.075, warmup_epochs=35),  # 84.2
    "mambavision-l_in1k": run("l", 0.3, mesa=6.0, weight_decay=0.12),  # 85.0
    "mambavision-l2_in1k": run("l2", 0.3, mesa=6.0, weight_decay=0.12),  # 85.3
}
