"""Mamba-R on ImageNet-1k in three stages: 300 epochs at 128 pixels, 100 at 224, 20 at 224 with stronger augmentation.

The authors give one recipe, with the base model's name in it; the rows of the other sizes have the same options. Each
stage starts from the stage before, from the file model.pretrained_cfg_overlay.file: by default best.pth in the work dir
of that row. These weights are the running average, where the authors go on with the weights themselves. Stages 1 and 2
have three-augment, repeated augmentation and mixing, but neither erasing nor smoothing; stage 3 has RandAugment.

Paper: https://arxiv.org/abs/2405.14858
Command: torchrun --nproc-per-node 8 tools/train.py configs/mambar/in1k.py:mambar-base-stage1_in1k \
    --cfg-options data.root=PATH
Hardware: 8 GPUs, as the authors'. On 4 GPUs add train.accumulate=2. If memory is short, train.grad_checkpointing=True.
Accuracy: top-1 in percent after the last stage, published, not measured here: the comment beside a row. For the tiny
    model nothing is published.
"""

_base_ = [
    "../_base_/augmentations/deit_in1k.py",
    "../_base_/schedules/adamw_cosine_300e.py",
    "../_base_/runtime_in1k.py",
]

train = dict(amp="bf16")


def run(size, batch, lr, epochs, weight_decay=0.05, start=None, **model):
    """`batch`: images on each of 8 GPUs; `lr`: of the optimizer; `start`: the stage whose result is trained on."""
    if start:
        file = f"work_dirs/mambar-{size}-{start}_in1k/best.pth"
        model |= dict(pretrained=True, pretrained_cfg_overlay=dict(file=file))
    return dict(
        model=dict(model_name=f"mambar_{size}", **model),
        data=dict(batch_size=batch),
        optimizer=dict(lr=lr, weight_decay=weight_decay),
        schedule=dict(num_epochs=epochs),
    )


def three_augment(row):
    """Return a row with the augmentation of DeiT III, https://arxiv.org/abs/2204.07118, and without smoothing."""
    transform = dict(auto_augment="3a", re_prob=0.0)
    return row | dict(data=row["data"] | dict(train_transform=transform), train=dict(smoothing=0.0))


def stages(size):
    """The first two rates are published for 512 images per update, and are here for 8 x 128; the last is not scaled."""
    return {
        "stage1": three_augment(run(size, 128, lr=5e-4 * 2, epochs=300, img_size=128, drop_path_rate=0.1)),
        "stage2": three_augment(run(size, 128, lr=2e-4 * 2, epochs=100, start="stage1", drop_path_rate=0.4)),
        "stage3": run(size, 64, lr=1e-5, epochs=20, weight_decay=0.1, start="stage2", drop_path_rate=0.4)
        | dict(data=dict(batch_size=64, repeats=1, train_transform=dict(re_prob=0.0))),
    }


rows = {
    f"mambar-{size}-{stage}_in1k": row
    for size in ("tiny", "small", "base", "large")  # -, 81.4, 83.0, 83.6
    for stage, row in stages(size).items()
}
