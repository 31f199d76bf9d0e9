"""VSSD on ImageNet-1k, 300 epochs at 224 pixels.

As published: the schedule, which is Swin's with the warm-up inside the cosine, 1,024 images per update and the rates
for them, augmentation, the drop path rates that take effect (micro's configuration names another), a running average,
and for the rows with "mesa" that average as a teacher from a quarter of the epochs on (MESA,
https://arxiv.org/abs/2205.14083). Ours: bf16 where the authors have fp16. Weight decay spares what has one dimension:
norms, biases, A_log, D and dt_bias.

Paper: https://arxiv.org/abs/2407.18559
Command: torchrun --nproc-per-node 8 tools/train.py configs/vssd/in1k.py:vssd-tiny_in1k \\
    --cfg-options data.root=PATH
Hardware: 8 GPUs with 128 images each. On 4 GPUs add train.accumulate=2.
Accuracy: top-1 in percent, published, not measured here: the comment beside a row.
"""

_base_ = [
    "../_base_/augmentations/swin_in1k.py",
    "../_base_/schedules/adamw_cosine.py",
    "../_base_/runtime.py",
]

data = dict(batch_size=128)
schedule = dict(num_epochs=300, warmup_epochs=20)
train = dict(amp="bf16", clip_grad=5.0, ema_decay=0.9999)


def run(size, drop_path_rate, mesa=0.0):
    row = dict(model=dict(model_name=f"vssd_{size}", drop_path_rate=drop_path_rate))
    if mesa:
        row["train"] = dict(mesa=mesa)
    if size in ("small", "base"):
        row |= dict(optimizer=dict(lr=6e-4), schedule=dict(min_lr=6e-6))
    return row


rows = {
    "vssd-micro_in1k": run("micro", 0.2),  # 82.5
    "vssd-tiny_in1k": run("tiny", 0.2),  # 83.6
    "vssd-tiny-mesa_in1k": run("tiny", 0.2, mesa=1.0),  # 84.1
    "vssd-small_in1k": run("small", 0.4),  # 84.1
    "vssd-small-mesa_in1k": run("small", 0.4, mesa=1.5),  # 84.5
    "vssd-base_in1k": run("base", 0.6),  # 84.7
    "vssd-base-mesa_in1k": run("base", 0.6, mesa=2.0),  # 85.4
}
