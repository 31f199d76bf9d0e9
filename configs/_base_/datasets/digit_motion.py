"""Short videos of moving digits; the class is the direction. They are written once, to ~/.cache/vim or data.root."""

data = dict(
    dataset="digit_motion",
    batch_size=32,
    num_workers=2,
    video=dict(num_frames=8),
    train_transform=dict(scale=(0.8, 1.0), ratio=(0.9, 1.1), hflip=0.0, color_jitter=0.0),
    eval_transform=dict(crop_pct=1.0),
)
