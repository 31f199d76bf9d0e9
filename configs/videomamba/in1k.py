"""VideoMamba on ImageNet-1k: 300 epochs at 224 pixels, then a few at 448, then a few at 576.

Middle and Base learn at 224 pixels from a trained Small as well as from the labels. The augmentation of Tiny is the
authors' AutoAugment and not RandAugment. Theirs is timm's policy "v0", which fails since Pillow 13 and turns 4 % of the
images black; "v0r" posterizes to more bits and is otherwise the same.

Paper: https://arxiv.org/abs/2403.06977
Command: torchrun --nnodes 1 --nproc-per-node 8 tools/train.py \
    configs/videomamba/in1k.py:videomamba-tiny_in1k --cfg-options data.root=PATH
Hardware: as many GPUs as the row names (here 8), with as many images in all as the authors'.
Accuracy: top-1 in percent, published, not measured here: the comment beside a row.
"""

_base_ = [
    "../_base_/augmentations/deit_in1k.py",
    "../_base_/schedules/adamw_cosine_300e.py",
    "../_base_/runtime_videomamba.py",
]

_drop_path = {
    "tiny": dict(),
    "small": dict(drop_path_rate=0.15),
    "middle": dict(drop_path_rate=0.5),
    "base": dict(drop_path_rate=0.5),
}
_augmentation_of_tiny = dict(repeats=1, train_transform=dict(auto_augment="v0r"))
_with_small = dict(
    teacher=dict(model_name="videomamba_small", pretrained=True),
    schedule=dict(warmup_epochs=20, warmup_lr=5e-7, min_lr=5e-6),
    train=dict(clip_grad=5.0),
)


def run(size, gpus, batch, lr=5e-4, weight_decay=0.05, tag="", **model):
    """`batch`: images per GPU; `lr`: for 512 images per update."""
    return dict(
        model=dict(model_name=f"videomamba_{size}{tag}", **_drop_path[size], **model),
        data=dict(batch_size=batch, **(_augmentation_of_tiny if size == "tiny" else {})),
        optimizer=dict(lr=lr * gpus * batch / 512, weight_decay=weight_decay),
    )


def at_448(size, gpus, batch):
    model = dict(tag=".opengvlab_in1k", pretrained=True, img_size=448)
    return run(size, gpus, batch, lr=5e-6, weight_decay=1e-8, **model) | dict(schedule=dict(num_epochs=30, min_lr=5e-6))


def at_576(size, gpus, batch):
    model = dict(tag=".opengvlab_in1k_448", pretrained=True, img_size=576)
    schedule = dict(num_epochs=10, warmup_epochs=2, min_lr=5e-6)
    return run(size, gpus, batch, lr=5e-6, weight_decay=1e-8, **model) | dict(schedule=schedule)


rows = {
    "videomamba-tiny_in1k": run("tiny", gpus=8, batch=512, weight_decay=0.1) | dict(train=dict(clip_grad=5.0)),  # 76.9
    "videomamba-tiny-448_in1k": at_448("tiny", gpus=8, batch=256),  # 79.3
    "videomamba-tiny-576_in1k": at_576("tiny", gpus=8, batch=128),  # 79.6
    "videomamba-small_in1k": run("small", gpus=8, batch=512),  # 81.2
    "videomamba-small-448_in1k": at_448("small", gpus=8, batch=64),  # 83.2
    "videomamba-small-576_in1k": at_576("small", gpus=8, batch=64),  # 83.5
    "videomamba-middle_in1k": run("middle", gpus=16, batch=128) | _with_small,  # 82.8
    "videomamba-middle-448_in1k": at_448("middle", gpus=16, batch=32),  # 83.8
    "videomamba-middle-576_in1k": at_576("middle", gpus=16, batch=32),  # 84.0
    "videomamba-base_in1k": run("base", gpus=16, batch=128) | _with_small,  # 82.7
}
