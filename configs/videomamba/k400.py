"""VideoMamba on Kinetics-400, from ImageNet weights or from masked pre-training (`mask`).

A row is named videomamba-SIZE[-mask]-fFRAMES[-PIXELS]_k400. Rows of 384 pixels start from the model trained at 224.

Paper: https://arxiv.org/abs/2403.06977
Command: torchrun --nnodes 2 --nproc-per-node 8 tools/train.py \
    configs/videomamba/k400.py:videomamba-middle-f8_k400 --cfg-options data.root=PATH
Hardware: as many GPUs as the row names (here 16), as the authors'.
Accuracy: top-1 in percent, published (3 crops of each of 4 clips), not measured here: the comment beside a row.
"""

_base_ = [
    "../_base_/datasets/k400.py",
    "../_base_/schedules/videomamba.py",
    "../_base_/runtime_videomamba.py",
]

model = dict(pretrained=True, num_classes=400)

_tiny = dict(
    name="tiny",
    drop_path_rate=0.1,
    decay=dict(weight_decay=0.1, layer_decay=0.75),
    train_transform=dict(auto_augment="rand-m5-n2-mstd0.25-inc1"),
)
_small = dict(name="small", drop_path_rate=0.35, decay=dict(weight_decay=0.05, layer_decay=0.75))
_middle = dict(name="middle", drop_path_rate=0.8, decay=dict(weight_decay=0.05, layer_decay=0.75))
_masked = dict(name="middle", drop_path_rate=0.4, decay=dict(weight_decay=0.05, layer_decay=0.8))
_at_384 = dict(lr=5e-6, decay=dict(weight_decay=1e-8), img_size=384)
_from_mask = dict(
    pretrained_cfg_overlay=dict(hf_hub_filename="videomamba_m16_k400_mask_pt_f8_res224.pth", num_classes=0)
)


def run(size, frames, weights, gpus, batch, lr, epochs, warmup=5, accumulate=1, decay=None, **model):
    """`batch`: clips per GPU, two of each video; `lr`: for 256 clips per update."""
    scale = gpus * batch * accumulate / 256
    return dict(
        model=dict(
            model_name=f"videomamba_{size['name']}_f{frames}.opengvlab_{weights}",
            drop_path_rate=size["drop_path_rate"],
            **model,
        ),
        data=dict(batch_size=batch, video=dict(num_frames=frames), train_transform=size.get("train_transform", {})),
        optimizer=dict(lr=lr * scale, **(decay or size["decay"])),
        schedule=dict(num_epochs=epochs, warmup_epochs=warmup, warmup_lr=1e-6 * scale, min_lr=1e-6 * scale),
        train=dict(accumulate=accumulate),
    )


rows = {
    "videomamba-tiny-f8_k400": run(_tiny, 8, "in1k", gpus=8, batch=128, lr=2e-4, epochs=70),  # 76.9
    "videomamba-tiny-f16_k400": run(_tiny, 16, "in1k", gpus=8, batch=128, lr=2e-4, epochs=70),  # 78.1
    "videomamba-tiny-f32_k400": run(_tiny, 32, "in1k", gpus=8, batch=64, lr=2e-4, epochs=70),  # 78.8
    "videomamba-tiny-f64_k400": run(_tiny, 64, "in1k", gpus=16, batch=32, lr=2e-4, epochs=70),  # 79.6
    "videomamba-tiny-f64-384_k400": run(_tiny, 64, "k400", gpus=16, batch=12, epochs=10, warmup=2, **_at_384),  # 80.3
    "videomamba-small-f8_k400": run(_small, 8, "in1k", gpus=8, batch=128, lr=2e-4, epochs=50),  # 79.3
    "videomamba-small-f16_k400": run(_small, 16, "in1k", gpus=16, batch=64, lr=2e-4, epochs=50),  # 80.8
    "videomamba-small-f32_k400": run(_small, 32, "in1k", gpus=16, batch=32, lr=2e-4, epochs=50),  # 81.5
    "videomamba-small-f64_k400": run(_small, 64, "in1k", gpus=16, batch=16, lr=2e-4, epochs=50),  # 81.8
    "videomamba-small-f64-384_k400": run(
        _small, 64, "k400", gpus=32, batch=4, epochs=6, warmup=1, accumulate=2, **_at_384
    ),  # 82.7
    "videomamba-middle-f8_k400": run(_middle, 8, "in1k", gpus=16, batch=64, lr=2e-4, epochs=50),  # 80.6
    "videomamba-middle-f16_k400": run(_middle, 16, "in1k", gpus=16, batch=32, lr=1e-4, epochs=50),  # 81.9
    "videomamba-middle-f32_k400": run(_middle, 32, "in1k", gpus=16, batch=16, lr=1e-4, epochs=50),  # 82.4
    "videomamba-middle-f64_k400": run(_middle, 64, "in1k", gpus=16, batch=8, lr=1e-4, epochs=50),  # 82.8
    "videomamba-middle-f64-384_k400": run(
        _middle, 64, "k400", gpus=16, batch=2, epochs=6, warmup=1, accumulate=2, **_at_384
    ),  # 83.3
    "videomamba-middle-mask-f8_k400": run(_masked, 8, "mask_pt_k400", gpus=16, batch=64, lr=1e-4, epochs=45),  # 82.0
    "videomamba-middle-mask-f16_k400": run(
        _masked, 16, "mask_k400", gpus=16, batch=32, lr=1e-4, epochs=45, **_from_mask
    ),  # 83.4
    "videomamba-middle-mask-f32_k400": run(
        _masked, 32, "mask_k400", gpus=16, batch=16, lr=1e-4, epochs=45, **_from_mask
    ),  # 83.9
    "videomamba-middle-mask-f64_k400": run(
        _masked, 64, "mask_k400", gpus=16, batch=8, lr=1e-4, epochs=45, **_from_mask
    ),  # 84.3
    "videomamba-middle-mask-f64-384_k400": run(
        _masked, 64, "mask_k400", gpus=16, batch=2, epochs=6, warmup=1, accumulate=2, **_at_384
    ),  # 85.0
}
