"""Evaluation of videos by the mean over several views of each."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader, Dataset

from vim.data import IGNORED, Videos
from vim.engine.log import reporting
from vim.errors import UserError
from vim.tasks.classification.evaluate import AnyEvaluation, Tally
from vim.tasks.classification.multilabel import Scores


class Views(Dataset[Any]):
    """The views of a data set's videos. The label of a view is its index.

    Attributes:
        videos: (views,) the video that each view is of; views of one path are of one video.
        labels: the label of each video: (videos,), or (videos, classes) if each may have several.
    """

    def __init__(self, dataset: Videos) -> None:
        self.dataset, self.num_frames = dataset, dataset.num_frames
        number_of: dict[str, int] = {}
        paths = [dataset.video_of(index) for index in range(len(dataset))]
        self.videos = torch.tensor([number_of.setdefault(path, len(number_of)) for path in paths])
        label_of = {video.path: torch.as_tensor(video.label) for video in dataset.videos}
        self.labels = torch.stack([label_of[path] for path in number_of])

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.dataset[index][0], index


@torch.inference_mode()
def evaluate_views(
    model: nn.Module,
    loader: DataLoader[Any],
    accelerator: Accelerator,
    classes: int,
    thresholds: Sequence[float] | None = None,
) -> AnyEvaluation:
    """Return the figures on videos, each predicted by the mean of the probabilities over its views.

    VideoMamba (https://arxiv.org/abs/2403.06977) is evaluated this way. Each process sees a part of the views.

    Args:
        loader: batches of :class:`Views`.
        classes: the number of classes.
        thresholds: where a video may have several labels; see :class:`Scores`.

    Raises:
        UserError: a label is none of the classes.
    """
    views: Views = loader.dataset.dataset  # type: ignore[attr-defined]
    labels = views.labels
    several = labels.ndim == 2
    if not several and labels.max() >= classes:
        raise UserError(f"a video is labelled {labels.max()}: expected 0 to {classes - 1}, the classes")

    # sums of probabilities of each video
    model.eval()
    total = torch.zeros(len(labels), classes, dtype=torch.float64, device=accelerator.device)
    count = torch.zeros(len(labels), dtype=torch.int64, device=accelerator.device)
    unreadable: dict[str, None] = {}
    for clips, places, lines in reporting(loader, "evaluating"):
        unreadable |= dict.fromkeys(lines)
        seen = places != IGNORED
        if not seen.any():
            continue
        with accelerator.autocast():
            logits = model(clips[seen].to(accelerator.device, non_blocking=True)).double()
        videos = views.videos[places[seen]].to(accelerator.device)
        total.index_add_(0, videos, logits.sigmoid() if several else logits.softmax(1))
        count.index_add_(0, videos, torch.ones_like(videos))

    # figures over the videos that could be read
    total, count = accelerator.reduce(total).cpu(), accelerator.reduce(count).cpu()
    known = count > 0
    means, labels = total[known] / count[known].unsqueeze(1), labels[known]
    lines = list(dict.fromkeys(gather_object(list(unreadable))))
    if several:
        scores = Scores(classes, thresholds)
        scores.add(means.logit(1e-12), labels)  # finite where a mean is 0 or 1
        return scores.evaluation(lines)
    tally = Tally(classes, torch.device("cpu"))
    if known.any():
        tally.add(means.log(), labels.unsqueeze(1))
    return tally.evaluation(lines)
