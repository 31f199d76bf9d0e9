"""VideoMamba's augmentation of clips: RandAugment, erasing, mixup, cutmix, the same for all frames of a clip.

Each video comes twice in an epoch.
"""

data = dict(
    samples=2,
    train_transform=dict(
        scale=(0.08, 1.0),
        ratio=(0.75, 1.3333),
        hflip=0.5,
        interpolation="bicubic",
        auto_augment="rand-m7-n4-mstd0.5-inc1",
        color_jitter=0.0,
        re_prob=0.25,
        re_mode="pixel",
        re_count=1,
    ),
)
mixup = dict(mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5, mode="batch")
