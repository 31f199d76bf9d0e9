"""VideoMamba on Something-Something v2, from ImageNet weights or from masked pre-training (`mask`).

A row is named videomamba-SIZE[-mask]-fFRAMES[-PIXELS]_ssv2. Rows of 288 pixels start from the model trained at 224.

Paper: https://arxiv.org/abs/2403.06977
Command: torchrun --nnodes 2 --nproc-per-node 8 tools/train.py \
    configs/videomamba/ssv2.py:videomamba-middle-f8_ssv2 --cfg-options data.root=PATH
Hardware: as many GPUs as the row names (here 16), as the authors'.
Accuracy: top-1 in percent, published (3 crops of each of 4 clips), not measured here: the comment beside a row.
"""

_base_ = [
    "../_base_/datasets/ssv2.py",
    "../_base_/schedules/videomamba.py",
    "../_base_/runtime_videomamba.py",
]

model = dict(pretrained=True, num_classes=174)

_tiny = dict(
    name="tiny",
    drop_path_rate=0.1,
    decay=dict(weight_decay=0.1, layer_decay=0.75),
    train_transform=dict(auto_augment="rand-m5-n2-mstd0.25-inc1"),
)
_small = dict(name="small", drop_path_rate=0.35, decay=dict(weight_decay=0.05, layer_decay=0.75))
_middle = dict(name="middle", drop_path_rate=0.8, decay=dict(weight_decay=0.05, layer_decay=0.75))
_masked = dict(name="middle", drop_path_rate=0.4, decay=dict(weight_decay=0.05, layer_decay=0.8))
_at_288 = dict(lr=5e-6, decay=dict(weight_decay=1e-8), img_size=288)
_from_mask = dict(
    pretrained_cfg_overlay=dict(hf_hub_filename="videomamba_m16_ssv2_mask_pt_f8_res224.pth", num_classes=0)
)


def run(size, frames, weights, gpus, batch, lr, epochs, warmup=5, decay=None, **model):
    """`batch`: clips per GPU, two of each video; `lr`: for 256 clips per update."""
    scale = gpus * batch / 256
    return dict(
        model=dict(
            model_name=f"videomamba_{size['name']}_f{frames}.opengvlab_{weights}",
            drop_path_rate=size["drop_path_rate"],
            **model,
        ),
        data=dict(batch_size=batch, video=dict(num_frames=frames), train_transform=size.get("train_transform", {})),
        optimizer=dict(lr=lr * scale, **(decay or size["decay"])),
        schedule=dict(num_epochs=epochs, warmup_epochs=warmup, warmup_lr=1e-6 * scale, min_lr=1e-6 * scale),
    )


rows = {
    "videomamba-tiny-f8_ssv2": run(_tiny, 8, "in1k", gpus=8, batch=128, lr=4e-4, epochs=35),  # 65.1
    "videomamba-tiny-f16_ssv2": run(_tiny, 16, "in1k", gpus=8, batch=128, lr=4e-4, epochs=35),  # 66.0
    "videomamba-tiny-f16-288_ssv2": run(_tiny, 16, "ssv2", gpus=16, batch=64, epochs=10, warmup=2, **_at_288),  # 66.2
    "videomamba-small-f8_ssv2": run(_small, 8, "in1k", gpus=8, batch=128, lr=4e-4, epochs=30),  # 66.6
    "videomamba-small-f16_ssv2": run(_small, 16, "in1k", gpus=16, batch=64, lr=4e-4, epochs=30),  # 67.7
    "videomamba-small-f16-288_ssv2": run(_small, 16, "ssv2", gpus=16, batch=24, epochs=10, warmup=2, **_at_288),  # 68.1
    "videomamba-middle-f8_ssv2": run(_middle, 8, "in1k", gpus=16, batch=64, lr=4e-4, epochs=30),  # 67.3
    "videomamba-middle-f16_ssv2": run(_middle, 16, "in1k", gpus=16, batch=32, lr=4e-4, epochs=30),  # 68.3
    "videomamba-middle-f16-288_ssv2": run(
        _middle, 16, "ssv2", gpus=16, batch=12, epochs=10, warmup=2, **_at_288
    ),  # 68.4
    "videomamba-middle-mask-f8_ssv2": run(_masked, 8, "mask_pt_ssv2", gpus=16, batch=64, lr=1e-4, epochs=30),  # 70.2
    "videomamba-middle-mask-f16_ssv2": run(
        _masked, 16, "mask_ssv2", gpus=16, batch=32, lr=1e-4, epochs=30, **_from_mask
    ),  # 71.0
    "videomamba-middle-mask-f16-288_ssv2": run(
        _masked, 16, "mask_ssv2", gpus=16, batch=12, epochs=10, warmup=2, **_at_288
    ),  # 71.4
}
