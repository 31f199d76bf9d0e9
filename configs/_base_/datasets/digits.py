"""The 1,797 digits of scikit-learn, a fifth held out; 8 x 8 pixels, enlarged to the model's size."""

data = dict(
    dataset="digits",
    batch_size=64,
    num_workers=0,
    train_transform=dict(scale=(0.7, 1.0), ratio=(0.8, 1.25), hflip=0.0, color_jitter=0.0),
    eval_transform=dict(crop_pct=1.0),
)
