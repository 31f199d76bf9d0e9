"""Vim on ImageNet-1k: 300 epochs at 224 pixels, then 30 epochs with patches every 8 pixels (`stride8`).

Paper: https://arxiv.org/abs/2401.09417
Command: torchrun --nproc-per-node 8 tools/train.py configs/vim/in1k.py:vim-tiny_in1k --cfg-options data.root=PATH
Hardware: 8 GPUs, as the authors'. On 4 GPUs add train.accumulate=2. If memory is short, train.grad_checkpointing=True.
Accuracy: top-1 in percent, published, not measured here: the comment beside a row. For Vim-Tiny a reproduction on 4
    GPUs with accumulation reports 74.x instead of 76.1: https://github.com/hustvl/Vim/issues/133

The authors publish weights of Vim-Base, but no recipe. Ours has Vim-Small's options and DeiT-Base's drop path rate.

The `ssd` rows have Mamba-2's mixer (https://arxiv.org/abs/2405.21060) and the options of the rows without it. They are
ours, and were not run: no such weights or accuracies are published.

A `stride8` row has 730 tokens instead of 197. It starts from the file model.pretrained_cfg_overlay.file: by default the
result of the row without `stride8`; the authors' files work too, such as vim_t_midclstok_76p1acc.pth. Their position
table is resized without the class token's row, for which the published code takes the first row.
"""

_base_ = [
    "../_base_/augmentations/deit_in1k.py",
    "../_base_/schedules/adamw_cosine_300e.py",
    "../_base_/runtime_in1k.py",
]


def run(model_name, batch, lr, weight_decay=0.05, **model):
    """`batch`: images on each of 8 GPUs; `lr`: for 512 images per update."""
    return dict(
        model=dict(model_name=model_name, **model),
        data=dict(batch_size=batch),
        optimizer=dict(lr=lr * 8 * batch / 512, weight_decay=weight_decay),
    )


def stride8(size):
    """The rate does not change: the schedule starts from its end, min_lr."""
    model = dict(pretrained=True, pretrained_cfg_overlay=dict(file=f"work_dirs/vim-{size}_in1k/best.pth"))
    schedule = dict(num_epochs=30, warmup_lr=1e-5)
    return run(f"vim_{size}_stride8", batch=128, lr=5e-6, weight_decay=1e-8, **model) | dict(schedule=schedule)


rows = {
    "vim-tiny_in1k": run("vim_tiny", batch=128, lr=5e-4, weight_decay=0.1),  # 76.1
    "vim-small_in1k": run("vim_small", batch=64, lr=1e-3, drop_path_rate=0.05),  # 80.5
    "vim-ssd-tiny_in1k": run("vim_ssd_tiny", batch=128, lr=5e-4, weight_decay=0.1),
    "vim-ssd-small_in1k": run("vim_ssd_small", batch=64, lr=1e-3, drop_path_rate=0.05),
    "vim-base_in1k": run("vim_base", batch=64, lr=1e-3, drop_path_rate=0.1),  # 81.9
    "vim-tiny-stride8_in1k": stride8("tiny"),  # 78.3
    "vim-small-stride8_in1k": stride8("small"),  # 81.6
}
