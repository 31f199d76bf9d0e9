"""VideoMamba on Breakfast, from the models trained on Kinetics-400.

A row is named videomamba-SIZE[-mask]-fFRAMES_breakfast; `mask` is for masked pre-training before Kinetics.

Paper: https://arxiv.org/abs/2403.06977
Command: torchrun --nnodes 1 --nproc-per-node 8 tools/train.py \
    configs/videomamba/breakfast.py:videomamba-tiny-f32_breakfast --cfg-options data.root=PATH
Hardware: as many GPUs as the row names (here 8), as the authors'.
Accuracy: top-1 in percent, published (3 crops of each of 4 clips), not measured here: the comment beside a row.
"""

_base_ = [
    "../_base_/datasets/breakfast.py",
    "../_base_/schedules/videomamba.py",
    "../_base_/runtime_videomamba.py",
]

model = dict(pretrained=True, num_classes=10)
schedule = dict(warmup_epochs=5)

_tiny = dict(
    name="tiny",
    drop_path_rate=0.1,
    decay=dict(weight_decay=0.1, layer_decay=0.75),
    train_transform=dict(auto_augment="rand-m5-n2-mstd0.25-inc1"),
)
_small = dict(name="small", drop_path_rate=0.4, decay=dict(weight_decay=0.05, layer_decay=0.75))
_middle = dict(name="middle", drop_path_rate=0.8, decay=dict(weight_decay=0.05, layer_decay=0.8))
_masked = dict(name="middle", drop_path_rate=0.4, decay=dict(weight_decay=0.05, layer_decay=0.8))
# the authors start 64 frames from the weights of 32
_of_32_frames = dict(pretrained_cfg_overlay=dict(hf_hub_filename="videomamba_t16_k400_f32_res224.pth"))


def run(size, frames, weights, gpus, batch, epochs, **model):
    """`batch`: clips per GPU, two of each video."""
    scale = gpus * batch / 256
    return dict(
        model=dict(
            model_name=f"videomamba_{size['name']}_f{frames}.opengvlab_{weights}",
            drop_path_rate=size["drop_path_rate"],
            **model,
        ),
        data=dict(batch_size=batch, video=dict(num_frames=frames), train_transform=size.get("train_transform", {})),
        optimizer=dict(lr=2e-4 * scale, **size["decay"]),
        schedule=dict(num_epochs=epochs, warmup_lr=1e-6 * scale, min_lr=1e-6 * scale),
    )


rows = {
    "videomamba-tiny-f32_breakfast": run(_tiny, 32, "k400", gpus=8, batch=64, epochs=70),  # 94.3
    "videomamba-tiny-f64_breakfast": run(_tiny, 64, "k400", gpus=16, batch=32, epochs=70, **_of_32_frames),  # 94.3
    "videomamba-small-f32_breakfast": run(_small, 32, "k400", gpus=16, batch=32, epochs=50),  # 95.3
    "videomamba-small-f64_breakfast": run(_small, 64, "k400", gpus=16, batch=16, epochs=50),  # 97.4
    "videomamba-middle-f32_breakfast": run(_middle, 32, "k400", gpus=8, batch=16, epochs=50),  # 94.8
    "videomamba-middle-f64_breakfast": run(_middle, 64, "k400", gpus=8, batch=8, epochs=50),  # 95.8
    "videomamba-middle-mask-f32_breakfast": run(_masked, 32, "mask_k400", gpus=8, batch=16, epochs=45),  # 97.9
    "videomamba-middle-mask-f64_breakfast": run(_masked, 64, "mask_k400", gpus=8, batch=8, epochs=45),  # 96.9
}
