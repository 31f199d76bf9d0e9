"""Your own images: data.root/train/CLASS/*.jpg and data.root/val/CLASS/*.jpg."""

data = dict(
    dataset="folder",
    root="",
    batch_size=64,
    num_workers=2,
    train_transform=dict(auto_augment="rand-m9-mstd0.5-inc1", color_jitter=0.3, re_prob=0.25, re_mode="pixel"),
)
