"""TSM2: MambaMixer for time series, along the time of each variate and along the variates.

Paper: MambaMixer: Efficient Selective State Space Models with Dual Token and Channel Selection,
https://arxiv.org/abs/2403.19888v1. Its authors have published neither code nor weights: docs/forecasting.md says
choice by choice what is the paper's and what is ours.
"""

from functools import partial
from typing import Literal, Unpack, get_args

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from vim.layers import (
    NOT_DECAYED,
    Factory,
    MambaMixerLayer,
    MambaMixerStack,
    ResidualMixer,
    SelectFrom,
    SelectiveChannelMixer,
    SelectiveSequenceMixer,
    check_choice,
    check_counts,
)

VariateMixer = Literal["s6", "mlp", "none"]
Norm = Literal["layer", "batch"]


class ReversibleNorm(nn.Module):
    """Scale each variate of each window to mean 0 and standard deviation 1, and a forecast back (RevIN).

    Source: https://openreview.net/forum?id=cGDAkQo1C0p.

    Args:
        affine: then also apply a learned scale and shift to each variate.
        eps: the smallest standard deviation to divide by; a variate below it counts as constant.
    """

    def __init__(self, num_variates: int, *, affine: bool = False, eps: float = 1e-5, **dd: Unpack[Factory]) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_variates, 1, **dd)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_variates, 1, **dd)) if affine else None

    def forward(self, x: Tensor, missing: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Normalise (b, m, t); also return its means and standard deviations, (b, m, 1) each.

        Args:
            missing: (b,) steps at the start that the means and deviations leave out.
        """
        if missing is None:
            mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True, unbiased=False)
        else:
            t = x.shape[-1]
            counted = torch.arange(t, device=x.device) >= missing.view(-1, 1, 1)  # (b, 1, t)
            count = (t - missing).view(-1, 1, 1)
            mean = x.masked_fill(~counted, 0).sum(-1, keepdim=True) / count
            var = (x - mean).square().masked_fill(~counted, 0).sum(-1, keepdim=True) / count
            std = var.clamp(min=self.eps**2).sqrt()  # of 0, the square root has no gradient
        std = std.clamp(min=self.eps)
        x = (x - mean) / std
        if self.weight is not None and self.bias is not None:
            x = x * self.weight + self.bias
        return x, mean, std

    def reverse(self, y: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """Map a forecast (b, m, horizon) of normed values to the units of the input."""
        if self.weight is not None and self.bias is not None:
            y = (y - self.bias) / (self.weight + self.eps**2)  # a scale of 0 can be learned
        return y * std + mean


class Along(nn.Module):
    """A mixer of sequences (b, l, d) along one axis of (b, m, n, d)."""

    def __init__(self, mixer: nn.Module, axis: int) -> None:
        super().__init__()
        self.mixer, self.axis = mixer, axis

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, m, n, d) to the same."""
        x = x.movedim(self.axis, 2)
        y = self.mixer(x.flatten(0, 1))
        return y.unflatten(0, x.shape[:2]).movedim(2, self.axis)


class AcrossVariates(nn.Module):
    """An MLP over the variates of (b, m, n, d), for each patch and feature: TSMixer's feature mixing."""

    def __init__(self, num_variates: int, expand: int, **dd: Unpack[Factory]) -> None:
        super().__init__()
        self.mlp = Mlp(num_variates, expand * num_variates, act_layer=nn.SiLU, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, m, n, d) to the same."""
        return self.mlp(x.movedim(1, -1)).movedim(-1, 1)


class FutureProjection(nn.Module):
    """Turn known covariates of the steps to forecast into an input of `seq_len` steps: Linear(ChannelMixer(Z)).

    ViM2's channel mixer takes the steps as an image of one row. Its output is reduced to one number a step; a linear
    layer over the steps maps these to the input's length.
    """

    def __init__(self, dim: int, horizon: int, seq_len: int, d_state: int, **dd: Unpack[Factory]) -> None:
        super().__init__()
        self.mixer = SelectiveChannelMixer(dim, 2 * dim, d_state=d_state, **dd)
        self.to_one = nn.Linear(dim, 1, **dd)
        self.proj = nn.Linear(horizon, seq_len, **dd)

    def forward(self, z: Tensor) -> Tensor:
        """Map (b, m, horizon, c) to (b, m, seq_len)."""
        y = z.flatten(0, 1).unsqueeze(1)  # (b m, one row, horizon, c)
        y = self.to_one(y + self.mixer(y)).flatten(1)
        return self.proj(y).unflatten(0, z.shape[:2])


class TSM2(nn.Module):
    """Forecast series: patches of each variate, a causal mixer along time, one both ways along variates, a linear map.

    Args:
        num_variates: m.
        seq_len: steps of the input, t.
        horizon: steps to forecast.
        patch_size, patch_stride: steps of a patch, and from one patch to the next. Each variate's last value is
            repeated to fill one more patch.
        embed_dim, depth: features of a patch, d; layers.
        d_state, expand: of the mixers.
        variate_mixer: "s6"; "mlp", TSMixer's, with `averaging=False` the paper's ablation TSM2-MLP; "none" keeps the
            variates apart.
        norm: before the linear map: "layer", over a variate's patches and features; "batch", over the variates and
            windows of a batch, as TSMixer.
        affine: of the reversible norm; see :class:`ReversibleNorm`.
        future_dim, static_dim: covariates of a step to forecast, and of a variate; 0 for none.
        select_from, averaging: see :class:`vim.layers.SelectiveSequenceMixer`, :class:`vim.layers.MambaMixerLayer`.
        linear_skip: add a linear map from all input steps, shared by all variates, as LSTNet's autoregressive part
            (https://arxiv.org/abs/1703.07015). The forecast starts as this map alone.
        mixer_len: the mixers see only this many of the last input steps; None for all.
        drop_rate, drop_path_rate: dropout before the linear map; stochastic depth of each mixer.

    Raises:
        ValueError: an option is none of its names; a size is below 1, or a number of covariates below 0; or the input
            is shorter than a patch.
    """

    def __init__(
        self,
        *,
        num_variates: int,
        seq_len: int = 512,
        horizon: int = 96,
        patch_size: int = 16,
        patch_stride: int = 8,
        embed_dim: int = 32,
        depth: int = 2,
        d_state: int = 16,
        expand: int = 2,
        variate_mixer: VariateMixer = "s6",
        norm: Norm = "layer",
        affine: bool = False,
        future_dim: int = 0,
        static_dim: int = 0,
        select_from: SelectFrom = "conv",
        averaging: bool = True,
        linear_skip: bool = False,
        mixer_len: int | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("variate_mixer", variate_mixer, get_args(VariateMixer))
        check_choice("norm", norm, get_args(Norm))
        check_counts(num_variates=num_variates, horizon=horizon, patch_size=patch_size, patch_stride=patch_stride)
        check_counts(embed_dim=embed_dim, depth=depth, d_state=d_state, expand=expand)
        check_counts(least=0, future_dim=future_dim, static_dim=static_dim)
        self.mixer_len = seq_len if mixer_len is None else mixer_len
        if seq_len < patch_size:
            raise ValueError(f"seq_len (data.lookback) must be at least patch_size, {patch_size}, got {seq_len}")
        if not patch_size <= self.mixer_len <= seq_len:
            raise ValueError(f"mixer_len must be from patch_size, {patch_size}, to seq_len, {seq_len}, got {mixer_len}")
        dd: Factory = {"device": device, "dtype": dtype}
        self.num_variates, self.seq_len, self.horizon = num_variates, seq_len, horizon
        self.patch_size, self.patch_stride = patch_size, patch_stride
        self.future_dim, self.static_dim = future_dim, static_dim
        inputs = 1 + (future_dim > 0) + (static_dim > 0)  # one after the other, of mixer_len steps each
        self.num_patches = (inputs * self.mixer_len - patch_size) // patch_stride + 2

        self.rev_norm = ReversibleNorm(num_variates, affine=affine, **dd)
        self.future = FutureProjection(future_dim, horizon, self.mixer_len, d_state, **dd) if future_dim else None
        self.static = nn.Linear(static_dim, self.mixer_len, **dd) if static_dim else None
        self.patch_embed = nn.Linear(patch_size, embed_dim, **dd)

        # the layers
        branches = (2 if variate_mixer != "none" else 1) * depth
        mixer = partial(
            SelectiveSequenceMixer,
            embed_dim,
            expand=expand,
            d_state=d_state,
            select_from=select_from,
            depth=branches,
            **dd,
        )
        layers = []
        for l in range(1, depth + 1):
            along_time = Along(mixer(bidirectional=False), 2)
            variates: nn.Module = nn.Identity()
            if variate_mixer == "s6":
                variates = Along(mixer(bidirectional=True), 1)
            elif variate_mixer == "mlp":
                variates = AcrossVariates(num_variates, expand, **dd)
            if variate_mixer != "none":
                variates = ResidualMixer(embed_dim, variates, drop_path=drop_path_rate, **dd)
            patches = ResidualMixer(embed_dim, along_time, drop_path=drop_path_rate, **dd)
            layers.append(MambaMixerLayer(patches, variates, l, averaging=averaging, **dd))
        self.layers = MambaMixerStack(*layers)

        # from all features of a variate to its forecast
        width = self.num_patches * embed_dim
        self.norm_f = nn.LayerNorm(width, **dd) if norm == "layer" else nn.BatchNorm1d(width, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(width, horizon, **dd)
        self.skip = nn.Linear(seq_len, horizon, bias=False, **dd) if linear_skip else None
        if linear_skip:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that weight decay must leave alone."""
        return {name for name, _ in self.named_parameters() if name.rpartition(".")[2] in NOT_DECAYED}

    def forward_features(self, x: Tensor, missing: Tensor | None = None) -> Tensor:
        """Map the inputs of all variates (b, m, steps) to features of their patches (b, m, n, d).

        Args:
            missing: (b,) steps at the start that a window does not have; the patches that lack are zeros.
        """
        if missing is not None:  # what a window has comes first, where no step after it changes its features
            steps = torch.arange(x.shape[-1], device=x.device) + missing.unsqueeze(1)
            x = x.gather(-1, steps.clamp(max=x.shape[-1] - 1).unsqueeze(1).expand_as(x))
        x = F.pad(x, (0, self.patch_stride), mode="replicate")
        y = self.layers(self.patch_embed(x.unfold(-1, self.patch_size, self.patch_stride)))
        if missing is None:
            return y
        have = (x.shape[-1] - missing - self.patch_size) // self.patch_stride + 1
        places = torch.arange(y.shape[2], device=y.device) - (y.shape[2] - have).unsqueeze(1)  # (b, n)
        index = places.clamp(min=0).view(len(y), 1, -1, 1).expand_as(y)
        return y.gather(2, index).masked_fill((places < 0).view(len(y), 1, -1, 1), 0)

    def forward(
        self,
        x: Tensor,
        future: Tensor | None = None,
        static: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Forecast windows.

        Args:
            x: (b, t, m).
            future: covariates of the steps to forecast, (b, m, horizon, future_dim); None for a model without.
            static: covariates of the variates, (m, static_dim); None for a model without.
            lengths: (b,) for windows of several lengths in one batch: the last steps of each that count, at least
                `patch_size`. The linear skip sees the first of them in place of the steps before.

        Returns:
            (b, horizon, m).

        Raises:
            ValueError: a shape is not the one the model was built for, or a value is not finite.
        """
        missing: Tensor | None = None
        if lengths is not None:
            x, missing = self._fill(x, lengths)
        self._check(x, future, static)
        x, mean, std = self.rev_norm(x.transpose(1, 2), missing)
        inputs = [x[..., -self.mixer_len :]]
        if self.future is not None:
            inputs.append(self.future(future))
        if self.static is not None and static is not None:
            inputs.append(self.static(static).expand_as(inputs[0]))
        if missing is not None:
            missing = (missing - (self.seq_len - self.mixer_len)).clamp(min=0)
        z = self.forward_features(torch.cat(inputs, dim=-1), missing)
        z = self.norm_f(z.flatten(2).flatten(0, 1).to(self.norm_f.weight.dtype))
        y = self.head(self.head_drop(z)).unflatten(0, mean.shape[:2])
        if self.skip is not None:
            y = y + self.skip(x)
        return self.rev_norm.reverse(y, mean, std).transpose(1, 2)

    def _fill(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Fill the steps before the last `lengths` of each window with the first of those; also return their number."""
        t = x.shape[1]
        if lengths.shape != x.shape[:1] or not bool(((self.patch_size <= lengths) & (lengths <= t)).all()):
            raise ValueError(
                f"lengths must be {len(x)} numbers from patch_size, {self.patch_size}, to {t}, got {lengths.tolist()}"
            )
        missing = t - lengths.to(x.device)
        steps = torch.arange(t, device=x.device).maximum(missing.unsqueeze(1))
        return x.gather(1, steps.unsqueeze(2).expand_as(x)), missing

    def _check(self, x: Tensor, future: Tensor | None, static: Tensor | None) -> None:
        """Raise ValueError for shapes that the model was not built for, and for values that are not finite."""
        t, m, h = self.seq_len, self.num_variates, self.horizon
        if x.dim() != 3 or x.shape[1:] != (t, m):
            raise ValueError(f"windows (b, {t} steps, {m} variates) expected, got {tuple(x.shape)}")
        wanted = {
            "future": (future, (len(x), m, h, self.future_dim), self.future_dim),
            "static": (static, (m, self.static_dim), self.static_dim),
        }
        for name, (given, shape, dim) in wanted.items():
            got = None if given is None else tuple(given.shape)
            if got != (shape if dim else None):
                raise ValueError(f"{name} covariates: expected {shape if dim else f'none ({name}_dim=0)'}, got {got}")
            if given is not None and not torch.compiler.is_compiling() and not given.isfinite().all():
                raise ValueError(f"{name} covariates: finite values expected, some are not")
        if not torch.compiler.is_compiling() and not x.isfinite().all():
            raise ValueError("finite values expected, some are NaN or infinite: fill them, or leave the window out")
