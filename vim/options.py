"""Every option of a run, in one place: name, type, range, default and help.

:func:`vim.fields.read` checks a section of a config and returns it as one of these dataclasses. The option tables in
docs/ and the output of `--help-options` are made from the same fields.
"""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from vim.errors import UserError
from vim.fields import Section, default_of, describe, option, read, required

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How a run trains, whatever the task: a config's `train` section."""

    seed: int = option(0, "seed of every random choice", at_least=0)
    amp: Literal["no", "bf16", "fp16"] = option("no", "precision of matrix products; `fp16` needs a GPU")
    clip_grad: float | None = option(None, "largest norm of the gradients of an update", above=0)
    ema_decay: float | None = option(
        None, "decay of a running average of the weights, which is then evaluated and saved", at_least=0, below=1
    )
    accumulate: int = option(1, "batches per update", at_least=1)
    grad_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, more time")
    compile: bool = option(False, "compile the model with `torch.compile`")
    patience: int | None = option(None, "stop after so many epochs without a better evaluation", at_least=1)
    save_updates: int | None = option(None, "save after every so many updates too, not only after an epoch", at_least=1)
    keep: int = option(1, "how many saves to keep: `last.pth`, `last.1.pth`, ...", at_least=1)
    max_skipped: int = option(
        10, "stop after so many consecutive updates whose loss or gradient is not finite", at_least=1
    )
    trackers: tuple[str, ...] = option((), "log to these as well: `tensorboard`, `wandb`")


@dataclass(frozen=True, kw_only=True)
class ImageTrainOptions(TrainOptions):
    """How a run on images or videos trains."""

    smoothing: float = option(0.0, "label smoothing", at_least=0, below=1)
    class_weights: Literal["balanced"] | tuple[float, ...] | dict[str, float] | None = option(
        None, "weight of each class in the loss; the classes that a dict leaves out have 1", above=0
    )
    mesa: float = option(0.0, "weight in the loss of the running average as a teacher", at_least=0)
    mesa_start: float = option(0.25, "part of the epochs before it teaches", at_least=0, below=1)


@dataclass(frozen=True, kw_only=True)
class VideoOptions:
    """How clips are read: `data.video`."""

    num_frames: int = option(8, "frames of a clip; the model takes as many", at_least=1)
    sampling: Literal["sparse", "ssv2", "dense", "windows", "shuffled"] = option("sparse", "which frames form a clip")
    num_clips: int = option(1, "clips of a video in evaluation", at_least=1)
    num_crops: int = option(1, "squares along the frames of a clip in evaluation", at_least=1)
    decoder: Literal["auto", "decord", "pyav", "torchcodec"] = option("auto", "what decodes the files")
    time_limit: float = option(30.0, "seconds that decoding one video may take", above=0, below=1e6)
    prefix: str | None = option(None, "the folder that paths in annotation files are relative to, by default `root`")
    classes: str | None = option(None, "`kinetics400`, or a file with a class name per line")
    frame_template: str | None = option(None, "names of frames, such as `img_{:05}.jpg`, where each video is a folder")


@dataclass(frozen=True, kw_only=True)
class TransformOptions:
    """How images are prepared: options of `timm.data.create_transform`; those left out are the model's or timm's."""

    input_size: tuple[int, ...] | None = option(None, "channels, height and width (default: the model's)", at_least=1)
    no_aug: bool = option(False, "in training: no augmentation but resizing and cropping")
    train_crop_mode: Literal["rrc", "rkrc", "rkrr"] | None = option(None, "in training: how images are cropped")
    scale: tuple[float, float] | None = option(None, "smallest and largest area of a crop", above=0, at_most=1)
    ratio: tuple[float, float] | None = option(None, "smallest and largest width / height of a crop", above=0)
    hflip: float = option(0.5, "probability of a horizontal flip", at_least=0, at_most=1)
    vflip: float = option(0.0, "probability of a vertical flip", at_least=0, at_most=1)
    color_jitter: float | tuple[float, ...] = option(
        0.4, "change of brightness, contrast and saturation", at_least=0, at_most=1
    )
    color_jitter_prob: float | None = option(None, "probability of color_jitter", at_least=0, at_most=1)
    grayscale_prob: float = option(0.0, "probability of grey", at_least=0, at_most=1)
    gaussian_blur_prob: float = option(0.0, "probability of blur", at_least=0, at_most=1)
    auto_augment: str | None = option(None, "timm's name of a policy, such as `rand-m9-mstd0.5-inc1`")
    interpolation: Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random"] | None = option(
        None, "how images are resized (default: the model's)"
    )
    mean: tuple[float, ...] | None = option(None, "subtracted from each channel (default: the model's)")
    std: tuple[float, ...] | None = option(None, "divides each channel (default: the model's)", above=0)
    re_prob: float = option(0.0, "probability of erasing rectangles", at_least=0, at_most=1)
    re_mode: Literal["const", "rand", "pixel"] = option("const", "what fills these: zeros, a colour, or noise")
    re_count: int = option(1, "most rectangles", at_least=1)
    re_num_splits: int = option(0, "parts of a batch, of which the first is not erased", at_least=0)
    crop_pct: float | None = option(
        None, "in evaluation: side of the crop / side of the image (default: the model's)", above=0, at_most=1
    )
    crop_mode: Literal["center", "squash", "border"] | None = option(None, "in evaluation: how images are cropped")
    crop_border_pixels: int | None = option(None, "in evaluation: margin before cropping, in pixels", at_least=0)
    normalize: bool = option(True, "subtract mean, and divide by std")


@dataclass(frozen=True, kw_only=True)
class ImageData:
    """Images or videos to train and evaluate on: a config's `data` section."""

    dataset: str = required("name of the data set, such as `folder` or `videos`")
    root: str | None = option(None, "folder of the data set")
    labels: str | None = option(None, "CSV file of labels in `root`, one or several a file, for `folder` and `videos`")
    sampling: Literal["shuffle", "balanced"] = option(
        "shuffle", "draw each image once an epoch, or each class equally often"
    )
    video: Section = option({}, "how clips are read (docs/video.md)", keys=VideoOptions)
    train_options: Section = option(
        {}, "for the training part: changes of `video`, or options of `timm.data.create_dataset`"
    )
    val_options: Section = option({}, "the same for the validation part")
    batch_size: int = required("images or videos per batch, in each process", at_least=1)
    num_workers: int = required("processes that load data, for each process that trains", at_least=0)
    repeats: int = option(
        1, "repeated augmentation: each image comes so many times, in an epoch of unchanged length", at_least=1
    )
    samples: int = option(1, "each image or video comes so many times, in an epoch so many times as long", at_least=1)
    max_unreadable: float = option(
        0.01, "stop when more than this fraction of the images cannot be read", at_least=0, below=1
    )
    train_transform: Section = option({}, "how images are prepared for training", keys=TransformOptions)
    eval_transform: Section = option({}, "how images are prepared for evaluation", keys=TransformOptions)

    def __post_init__(self) -> None:
        if self.dataset in ("videos", "digit_motion"):
            for name in ("train_options", "val_options"):
                read(VideoOptions, f"data.{name}", getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class SeriesData:
    """A time series to train and evaluate on: a config's `data` section.

    Raises:
        UserError: `season` is longer than `lookback`.
    """

    dataset: str = required("`csv`, `vic_elec`, `seattle_temps` or `lorenz`")
    file: str | None = option(None, "the CSV file of the data set `csv`")
    split: Literal["ratio", "etth", "ettm"] = option("ratio", "which rows train, validate and test")
    lookback: int = required("rows the model sees", at_least=1)
    horizon: int = required("rows the model forecasts", at_least=1)
    max_gap: int = option(6, "most consecutive missing values that are filled with the value before them", at_least=0)
    calendar: bool = option(False, "give the model the calendar of the rows to forecast")
    season: int | None = option(None, "rows per season; adds the simple forecast `last season`", at_least=1)
    known: tuple[str, ...] = option((), "columns whose future values are known")
    static: str | None = option(None, "CSV file of covariates that do not change over time")
    batch_size: int = required("windows per batch", at_least=1)

    def __post_init__(self) -> None:
        if self.season is not None and self.season > self.lookback:
            raise UserError(f"data.season must be at most data.lookback, {self.lookback}, got {self.season}")


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """A `model` or `teacher` section: options of `timm.create_model`. The model's own ones may be given as well."""

    takes_others: ClassVar[bool] = True

    model_name: str | None = option(None, "timm's name of the model")
    pretrained: bool = option(False, "start from the weights that the name stands for")
    num_classes: int | None = option(None, "outputs; 0 for a model without a head", at_least=0)
    in_chans: int | None = option(None, "channels of an image", at_least=1)
    img_size: int | tuple[int, ...] | None = option(None, "height and width of an image in pixels", at_least=1)
    patch_size: int | tuple[int, ...] | None = option(None, "height and width of a patch", at_least=1)
    embed_dim: int | tuple[int, ...] | None = option(None, "channels of a token", at_least=1)
    depth: int | tuple[int, ...] | None = option(None, "blocks", at_least=1)
    embed_dims: tuple[int, ...] | None = option(None, "channels of a token, a stage", at_least=1)
    channel_dims: tuple[int, ...] | None = option(None, "inner channels of the channel mixers, a stage", at_least=1)
    depths: tuple[int, ...] | None = option(None, "blocks, a stage", at_least=1)
    d_state: int | None = option(None, "size of the scan's state", at_least=1)
    d_conv: int | None = option(None, "width of the convolution before the scan", at_least=1)
    expand: float | None = option(None, "inner channels / channels of a mixer", above=0)
    num_frames: int | None = option(None, "frames of a clip", at_least=1)
    tubelet_size: int | None = option(None, "frames of a patch", at_least=1)
    drop_rate: float | None = option(None, "dropout", at_least=0, below=1)
    pos_drop_rate: float | None = option(None, "dropout of tokens with their positions", at_least=0, below=1)
    proj_drop_rate: float | None = option(None, "dropout of a mixer's output", at_least=0, below=1)
    attn_drop_rate: float | None = option(None, "dropout of attention", at_least=0, below=1)
    drop_path_rate: float | None = option(None, "stochastic depth", at_least=0, below=1)


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """The `optimizer` section: options of `timm.optim.create_optimizer_v2`, or the optimizer's own."""

    takes_others: ClassVar[bool] = True

    opt: str = option("sgd", "timm's name of the optimizer, such as `adamw`")
    lr: float | None = option(None, "largest learning rate (default: the optimizer's)", above=0, below=1e6)
    weight_decay: float = option(0.0, "weight decay", at_least=0)
    momentum: float = option(0.9, "momentum, where the optimizer has one", at_least=0, below=1)
    betas: tuple[float, ...] | None = option(None, "decay of the running moments", at_least=0, below=1)
    eps: float | tuple[float, ...] | None = option(None, "added to a denominator", above=0)
    filter_bias_and_bn: bool = option(True, "no weight decay of biases and norms")
    layer_decay: float | None = option(None, "factor of the rate from a layer to the one before", above=0, at_most=1)
    layer_decay_min_scale: float = option(0.0, "smallest product of these factors", at_least=0, at_most=1)
    layer_decay_no_opt_scale: float | None = option(None, "layers with a smaller product are frozen", at_least=0)
    published_decay: bool = option(False, "layer_decay as VideoMamba's published code has it in effect")
    foreach: bool | None = option(None, "update all tensors at once")
    nesterov: bool | None = option(None, "Nesterov's momentum")


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """The `schedule` section: options of `timm.scheduler.create_scheduler_v2`.

    Raises:
        UserError: the warm-up is as long as the run.
    """

    # without timm's "plateau": its rate follows from past evaluations, so a run could not be resumed exactly
    sched: Literal["cosine", "multistep", "poly", "step", "tanh"] = option("cosine", "how the learning rate falls")
    num_epochs: int = required("epochs of the run", at_least=1)
    warmup_epochs: int = option(0, "epochs of linear warm-up", at_least=0)
    warmup_lr: float = option(1e-5, "learning rate at the start of the warm-up", at_least=0)
    warmup_prefix: bool = option(False, "warm up before the schedule, and not in place of its first epochs")
    min_lr: float = option(0.0, "last learning rate", at_least=0)
    cooldown_epochs: int = option(0, "epochs at the last learning rate, after the others", at_least=0)
    decay_epochs: float | None = option(None, "`step`: epochs between two steps", above=0)
    decay_milestones: tuple[int, ...] = option((90, 180, 270), "`multistep`: epochs of the steps", at_least=1)
    decay_rate: float = option(0.1, "factor of a step; `poly`: its power", above=0)
    noise: float | tuple[float, ...] | None = option(
        None, "part of the run, or its start and end, in which noise is added to the rate", at_least=0, at_most=1
    )
    noise_pct: float = option(0.67, "largest noise, as a fraction of the rate", at_least=0, below=1)
    noise_std: float = option(1.0, "standard deviation of the noise", at_least=0)
    noise_seed: int = option(42, "seed of the noise", at_least=0)
    cycle_mul: float = option(1.0, "length of a cycle / length of the one before", above=0)
    cycle_decay: float = option(0.1, "rate of a cycle / rate of the one before", above=0, at_most=1)
    cycle_limit: int = option(1, "cycles", at_least=1)
    k_decay: float = option(1.0, "`cosine` and `poly`: power of the time", above=0)
    step_on_epochs: bool = option(True, "change the rate at every epoch, and not at every update")

    def __post_init__(self) -> None:
        if self.warmup_epochs >= self.num_epochs and self.warmup_epochs:
            raise UserError(
                f"schedule.warmup_epochs must be less than schedule.num_epochs, {self.num_epochs}, got "
                f"{self.warmup_epochs}: --cfg-options schedule.warmup_epochs={self.num_epochs // 10}"
            )


@dataclass(frozen=True, kw_only=True)
class MixupOptions:
    """The `mixup` section: options of `timm.data.Mixup`."""

    mixup_alpha: float = option(1.0, "mixup's alpha; 0 for none", at_least=0)
    cutmix_alpha: float = option(0.0, "cutmix's alpha; 0 for none", at_least=0)
    cutmix_minmax: tuple[float, float] | None = option(
        None, "range of the sides of cutmix's rectangle, in place of its alpha", above=0, below=1
    )
    prob: float = option(1.0, "probability of mixing", at_least=0, at_most=1)
    switch_prob: float = option(0.5, "probability of cutmix, where both are on", at_least=0, at_most=1)
    mode: Literal["batch", "pair", "elem"] = option("batch", "what one draw is for")
    correct_lam: bool = option(True, "labels by the true area of cutmix's rectangle")


@dataclass(frozen=True, kw_only=True)
class MaskingOptions:
    """The `masking` section, of masked pre-training."""

    ratio: float = required("fraction of the tokens of a frame that are hidden", at_least=0, below=1)


# sections that stay a dict: the keyword arguments of a function
CHECKED: dict[str, type["DataclassInstance"]] = {
    "model": ModelOptions,
    "optimizer": OptimizerOptions,
    "schedule": ScheduleOptions,
    "mixup": MixupOptions,
    "teacher": ModelOptions,
    "masking": MaskingOptions,
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run as a config describes it: a field per section.

    Raises:
        UserError: sections do not fit one another.
    """

    model: Section
    data: ImageData | SeriesData
    optimizer: Section
    schedule: Section
    train: TrainOptions

    def __post_init__(self) -> None:
        lr, schedule = self.optimizer.get("lr"), self.schedule
        for name in ("min_lr", "warmup_lr") if schedule.get("warmup_epochs") else ("min_lr",):
            if lr is not None and schedule.get(name, 0) > lr:
                raise UserError(
                    f"schedule.{name} must be at most optimizer.lr, {lr:g}, got {schedule[name]:g}: set both, such as "
                    f"--cfg-options optimizer.lr={lr:g} schedule.{name}={lr / 100:g}"
                )


@dataclass(frozen=True, kw_only=True)
class ImageRecipe(Recipe):
    """A run on images or videos; None stands for no mixing, no teacher and no masked pre-training."""

    data: ImageData
    train: ImageTrainOptions
    mixup: Section | None = None
    teacher: Section | None = None
    masking: Section | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train.mesa and self.train.ema_decay is None:
            raise UserError("train.mesa needs a running average: set train.ema_decay too, such as 0.9998")
        if self.train.mesa and self.masking is not None:
            raise UserError("train.mesa and masked pre-training do not go together: set train.mesa=0")


@dataclass(frozen=True, kw_only=True)
class SeriesRecipe(Recipe):
    """A run on time series."""

    data: SeriesData


def help_text(kind: type[Recipe]) -> str:
    """The options of a config's sections as text for a terminal, two lines each."""
    lines: list[str] = []
    for section in fields(kind):
        _add_help(CHECKED.get(section.name, section.type), section.name, lines)
    return "\n".join([*lines, "Other options of model, teacher and optimizer go to timm.", ""])


def _add_help(options: Any, section: str, lines: list[str]) -> None:
    for one in fields(options):
        limits = one.metadata["option"]
        lines += [f"{section}.{one.name}: {describe(one)}; default: {default_of(one)}", f"    {limits.help}"]
        if limits.keys is not None:
            _add_help(limits.keys, f"{section}.{one.name}", lines)
