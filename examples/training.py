"""The loop that the examples share."""

import argparse
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def fit(model: nn.Module, batches: Iterable[Any], loss_of: Callable[[Any], Tensor], args: argparse.Namespace) -> None:
    """Train on each batch once, `args.steps` of them, with AdamW at `args.lr`."""
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.steps)
    for step, batch in enumerate(batches, 1):
        loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
