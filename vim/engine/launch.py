"""The same command on one process or many: plain, torchrun, accelerate launch, or srun."""

import os
import re
import subprocess
from collections.abc import MutableMapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin

from vim.data import Share, seed_all
from vim.engine.files import locked
from vim.errors import UserError
from vim.options import TrainOptions


def launch(options: TrainOptions) -> Accelerator:
    """Find the other processes of a run, set its precision, and seed the random generators.

    Raises:
        UserError: float16 on a CPU.
    """
    join_processes()
    accelerator = Accelerator(
        mixed_precision=options.amp,
        # not the number of `accelerate launch`, by which accelerate would divide the loss once more
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )
    if options.amp == "fp16" and accelerator.device.type == "cpu":
        raise UserError("train.amp=fp16 is for GPUs: take bf16 or no")
    seed_all(options.seed)
    return accelerator


def holding(work_dir: Path) -> AbstractContextManager[None]:
    """Hold the folder of a run for its processes, of which the first locks it; see :func:`vim.engine.files.locked`."""
    join_processes()
    return locked(work_dir) if os.environ.get("RANK", "0") == "0" else nullcontext()


def share_of(accelerator: Accelerator) -> Share:
    """Return which of the processes this is."""
    return Share(accelerator.process_index, accelerator.num_processes)


def join_processes(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the environment variables by which accelerate finds the other processes of this run."""
    _adopt_slurm(environment)
    if int(environment.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
        environment.setdefault("ACCELERATE_USE_CPU", "true")


def _adopt_slurm(environment: MutableMapping[str, str]) -> None:
    """In a SLURM job step of several tasks, set PyTorch's variables from SLURM's."""
    if "RANK" in environment or int(environment.get("SLURM_NTASKS", "1")) < 2 or "SLURM_STEP_ID" not in environment:
        return
    environment["RANK"] = environment["SLURM_PROCID"]
    devices = max(torch.cuda.device_count(), 1)  # each task may be shown one of its own
    environment["LOCAL_RANK"] = str(int(environment["SLURM_LOCALID"]) % devices)
    environment["WORLD_SIZE"] = environment["SLURM_NTASKS"]
    tasks = re.match(r"\d+", environment["SLURM_STEP_TASKS_PER_NODE"])  # such as 4(x2),3
    environment["LOCAL_WORLD_SIZE"] = tasks[0] if tasks else "1"  # accelerate shares the processors by it
    environment.setdefault("MASTER_ADDR", _first_host(environment["SLURM_STEP_NODELIST"]))
    environment.setdefault("MASTER_PORT", str(20000 + int(environment["SLURM_JOB_ID"]) % 20000))


def _first_host(nodes: str) -> str:
    """The first of SLURM's nodes, such as node[03-04]: where the task of rank 0 runs."""
    if "[" not in nodes:
        return nodes.split(",")[0]
    return subprocess.run(
        ["scontrol", "show", "hostnames", nodes], check=True, capture_output=True, text=True
    ).stdout.split()[0]
