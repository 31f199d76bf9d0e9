"""ImageNet-1k with DeiT's augmentation (https://arxiv.org/abs/2012.12877), which Vim's authors use.

With repeated augmentation an epoch has each of its images three times and keeps its length. As in timm, RandAugment
replaces colour jitter.
"""

_base_ = ["../datasets/in1k.py"]

data = dict(
    repeats=3,
    train_transform=dict(
        scale=(0.08, 1.0),
        hflip=0.5,
        interpolation="bicubic",
        auto_augment="rand-m9-mstd0.5-inc1",
        color_jitter=0.3,
        re_prob=0.25,
        re_mode="pixel",
        re_count=1,
    ),
)
mixup = dict(mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5, mode="batch")
