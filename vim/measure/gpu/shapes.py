"""The shapes of all stages: real ones, and toy ones that rehearse the same code in seconds on a CPU.

Sizes: b images, k directions, l tokens, d channels, g groups of B and C, n states, w taps.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

VIM = "D z delta_bias"  # what the scan of a Vim block has
ALL = "D z delta_bias initial_state"


class Scan(NamedTuple):
    """One call of the scan.

    Attributes:
        given: the optional inputs, by name; with `delta_bias` goes a softplus.
        views: u is expanded over the directions, and u and z are parts of one tensor, as in a Vim block.
    """

    b: int
    k: int
    l: int
    d: int
    g: int = 1
    n: int = 16
    dtype: str = "bfloat16"
    combine: Literal["none", "sum", "mean"] = "mean"
    given: str = VIM
    views: bool = False


class Conv(NamedTuple):
    """One call of the convolution; without `full` it has no bias and no SiLU."""

    b: int
    k: int
    l: int
    d: int
    w: int = 4
    dtype: str = "bfloat16"
    full: bool = True


class Norm(NamedTuple):
    """One call of the normalisation."""

    b: int
    l: int
    d: int
    dtype: str = "bfloat16"


class Ssd(NamedTuple):
    """One call of state space duality, with h heads of p channels; the rest is as in :class:`Scan`."""

    b: int
    k: int
    l: int
    h: int
    p: int = 64
    g: int = 1
    n: int = 64
    dtype: str = "bfloat16"
    combine: Literal["none", "sum", "mean"] = "mean"
    given: str = "D dt_bias"
    views: bool = False


class ModelRun(NamedTuple):
    """One model in one way of running it.

    Attributes:
        name: timm's name, or "joint_vit" for :class:`vim.measure.videos.JointTransformer`.
        mode: "graph" replays a CUDA graph, "compiled" is torch.compile(mode="reduce-overhead").
    """

    name: str
    img_size: int
    batch: int
    run: Literal["forward", "training step"] = "forward"
    attention: Literal["fused", "plain"] = "fused"
    mode: Literal["eager", "graph", "compiled"] = "eager"


class Large(NamedTuple):
    """Sizes whose tensors have more than 2^31 elements.

    Attributes:
        images, tokens, channels: of many images.
        long: tokens of a single image.
        seen, compared: of its last tokens, those that the reference starts from and those that are compared. The state
            has forgotten the tokens before.
    """

    images: int
    tokens: int
    channels: int
    long: int
    seen: int
    compared: int


class Shapes(NamedTuple):
    """Everything that the stages run, most important first."""

    scans: Sequence[Scan]
    ssds: Sequence[Ssd]
    convs: Sequence[Conv]
    norms: Sequence[Norm]
    large: Large
    checked_model: str
    layers: Mapping[str, Scan]
    ssd_layers: Mapping[str, Ssd]
    models: Sequence[ModelRun]
    amps: Sequence[str]
    train_options: tuple[str, ...]
    copied: int  # float32 elements
    multiplied: int  # rows and columns of a matrix
    programs: int  # of the kernel that only computes exponentials
    rounds: int


REAL_SCANS = (
    Scan(64, 2, 197, 768),
    Scan(16, 2, 197, 384, dtype="float16"),
    Scan(8, 2, 730, 384, dtype="float32"),
    Scan(8, 2, 197, 1536, combine="sum"),
    Scan(4, 2, 197, 768, views=True),
    Scan(1, 2, 6085, 384),
    Scan(1, 1, 16384, 768, combine="none", given=ALL),
    Scan(1, 2, 16384, 160, dtype="float32", combine="sum", given=ALL),
    Scan(2, 4, 197, 160, g=2, n=8, dtype="float32", combine="none", given=ALL),
    Scan(1, 1, 1, 384, n=1, dtype="float32", combine="none", given=""),
    Scan(2, 2, 1, 160, combine="none", given=ALL),
    Scan(2, 1, 197, 384, n=1, dtype="float16", combine="none", given=ALL),
    Scan(1, 4, 730, 768, g=2, n=8, combine="sum", given=ALL),
    Scan(1, 2, 197, 160, n=24, dtype="float32", combine="none", given=ALL),
    Scan(2, 2, 730, 384, n=24),
    Scan(1, 1, 197, 160, n=64, dtype="float32", combine="none", given=ALL),
    Scan(1, 2, 730, 768, g=4, n=64, combine="none", given=ALL),
    Scan(1, 1, 6085, 160, g=2, n=64, dtype="float16", combine="none", given="initial_state"),
    Scan(1, 1, 6085, 1536, n=8, dtype="float16", combine="none"),
    Scan(1, 2, 16384, 384, dtype="float16"),
    Scan(1, 1, 6085, 768, dtype="float32", combine="none", given=""),
    Scan(8, 2, 3136, 192, g=2, n=1, combine="sum", given="D delta_bias"),
    Scan(8, 1, 196, 160, n=8, combine="none", given="D delta_bias"),
)
GIVEN = "D z dt_bias initial_state"
REAL_SSDS = (
    Ssd(16, 2, 197, 12),
    Ssd(8, 2, 197, 6, n=16, dtype="float16"),
    Ssd(2, 2, 730, 6, dtype="float32"),
    Ssd(4, 2, 197, 12, views=True),
    Ssd(1, 1, 6085, 12, p=128, n=128, combine="none", given=GIVEN),
    Ssd(1, 2, 16384, 6, combine="sum", given=GIVEN),
    Ssd(2, 4, 300, 6, p=24, g=2, n=20, dtype="float32", combine="none", given=GIVEN),
    Ssd(1, 1, 1, 1, p=1, n=1, dtype="float32", combine="none", given=""),
    Ssd(1, 1, 730, 4, p=32, n=256, dtype="float16", combine="none", given="initial_state"),
)
REAL_LAYERS = {
    "Vim-Small, b 64": Scan(64, 2, 197, 768),
    "16384 tokens": Scan(1, 2, 16384, 768),
    "Vim-Tiny, b 64": Scan(64, 2, 197, 384),
    "Vim-Base, b 64": Scan(64, 2, 197, 1536),
    "Vim-Tiny, 730 tokens, b 64": Scan(64, 2, 730, 384),
    "Vim-Small, 730 tokens, b 64": Scan(64, 2, 730, 768),
    "Vim-Base, 730 tokens, b 64": Scan(64, 2, 730, 1536),
    "VideoMamba-Tiny, 8 frames, b 8": Scan(8, 2, 1569, 384),
    "VideoMamba-Middle, 64 frames": Scan(1, 2, 12545, 1152),
    "Vim-Small, b 1": Scan(1, 2, 197, 768),
    "1024 tokens": Scan(1, 2, 1024, 768),
    "4096 tokens": Scan(1, 2, 4096, 768),
    "65536 tokens": Scan(1, 2, 65536, 768),
    "Vim-Tiny, b 128": Scan(128, 2, 197, 384),
    "Vim-Small, b 128": Scan(128, 2, 197, 768),
    "Vim-Base, b 128": Scan(128, 2, 197, 1536),
    "Vim-Tiny, 730 tokens, b 128": Scan(128, 2, 730, 384),
    "Vim-Small, 730 tokens, b 128": Scan(128, 2, 730, 768),
    "Vim-Base, 730 tokens, b 128": Scan(128, 2, 730, 1536),
}
REAL_SSD_LAYERS = {
    "4096 tokens, ssd": Ssd(8, 2, 4096, 12),
    "Vim-SSD-Small, b 64": Ssd(64, 2, 197, 12),
    "2048 tokens, ssd": Ssd(8, 2, 2048, 12),
    "16384 tokens, ssd": Ssd(1, 2, 16384, 12),
    "Vim-SSD-Tiny, b 64": Ssd(64, 2, 197, 6),
    "VideoMamba-SSD-Tiny, 8 frames, b 8": Ssd(8, 2, 1569, 6),
}
TINY, SMALL = ("vim_tiny", "deit_tiny_patch16_224"), ("vim_small", "deit_small_patch16_224")
REAL_MODELS = (
    # the largest images, and training memory over sizes
    *(ModelRun(name, 1248, 8) for name in TINY),
    ModelRun(TINY[1], 1248, 8, attention="plain"),
    *(ModelRun(TINY[0], size, 8, "training step") for size in (224, 512, 1024, 1248)),
    # throughput at the usual size
    *(ModelRun(name, 224, 128, run) for run in ("forward", "training step") for name in (*TINY, *SMALL)),
    # small batches, where the launches dominate
    *(ModelRun(name, 224, 1, mode=mode) for mode in ("eager", "graph") for name in (*TINY, *SMALL)),
    *(ModelRun(name, 224, 8, "training step", mode="graph") for name in TINY),
    # the other sizes
    *(ModelRun(name, size, 8) for size in (224, 512, 1024) for name in TINY),
    *(ModelRun(TINY[1], size, 8, attention="plain") for size in (224, 512, 1024)),
    *(ModelRun(TINY[1], size, 8, "training step") for size in (224, 512, 1024, 1248)),
    *(ModelRun(name, size, 8) for size in (512, 1024, 1248) for name in SMALL),
    # clips, and stages
    *(
        ModelRun(name, 224, 8, run)
        for run in ("forward", "training step")
        for name in ("videomamba_tiny_f16", "joint_vit")
    ),
    *(
        ModelRun(name, 224, 64, run)
        for run in ("forward", "training step")
        for name in ("vim2_tiny", "vmamba_tiny_s1l8", "swin_tiny_patch4_window7_224")
    ),
    # takes a minute each
    *(ModelRun(name, 224, 1, mode="compiled") for name in TINY),
)
REAL = Shapes(
    scans=REAL_SCANS,
    ssds=REAL_SSDS,
    convs=(
        Conv(64, 2, 197, 768),
        Conv(8, 2, 730, 384, dtype="float32"),
        Conv(1, 1, 16384, 1536, dtype="float16"),
        Conv(2, 4, 6085, 160, w=3, full=False),
        Conv(1, 1, 1, 160, dtype="float32"),
        Conv(1, 2, 197, 384, w=2, dtype="float16"),
    ),
    norms=(
        Norm(64, 197, 384),
        Norm(64, 730, 192, dtype="float32"),
        Norm(1, 16384, 768, dtype="float16"),
        Norm(2, 6085, 160),
        Norm(1, 1, 16, dtype="float32"),
        Norm(1, 3, 8192, dtype="float32"),
    ),
    large=Large(images=1400, tokens=2048, channels=768, long=2_900_000, seen=8192, compared=4096),
    checked_model="vim_tiny",
    layers=REAL_LAYERS,
    ssd_layers=REAL_SSD_LAYERS,
    models=REAL_MODELS,
    amps=("bf16", "fp16"),
    train_options=("schedule.num_epochs=6", "schedule.warmup_epochs=1"),
    copied=2**28,
    multiplied=8192,
    programs=16384,
    rounds=64,
)
TOY = Shapes(
    scans=(
        Scan(1, 2, 5, 16, n=2),
        Scan(1, 1, 3, 4, g=2, n=1, dtype="float32", combine="none", given=ALL),
        Scan(1, 2, 3, 16, n=2, views=True),
    ),
    ssds=(
        Ssd(1, 2, 5, 1, p=4, n=2),
        Ssd(1, 2, 3, 2, p=3, g=2, n=1, dtype="float32", combine="none", given=GIVEN, views=True),
    ),
    convs=(Conv(1, 2, 5, 16), Conv(1, 1, 2, 4, w=3, dtype="float32", full=False)),
    norms=(Norm(1, 3, 8), Norm(2, 1, 4, dtype="float32")),
    large=Large(images=2, tokens=3, channels=4, long=5, seen=5, compared=3),
    checked_model="test_vim",
    layers={"Vim-Small, b 64": Scan(1, 2, 3, 8, n=2), "16384 tokens": Scan(1, 2, 5, 8, n=2)},
    ssd_layers={"4096 tokens, ssd": Ssd(1, 2, 5, 1, p=4, n=2)},
    models=(
        ModelRun("test_vim", 32, 2),
        ModelRun("test_vit", 32, 2, attention="plain"),
        ModelRun("test_vmamba", 32, 2),
        ModelRun("test_vim", 32, 2, "training step", mode="graph"),
        ModelRun("joint_vit", 32, 1),
        ModelRun("test_vim", 32, 1, mode="compiled"),
    ),
    amps=("bf16",),
    train_options=(
        "schedule.num_epochs=3",
        "schedule.warmup_epochs=0",
        "model.depth=1",
        "model.embed_dim=16",
        "model.patch_size=8",
    ),
    copied=16,
    multiplied=16,
    programs=1,
    rounds=1,
)
