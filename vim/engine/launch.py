"""The same command on one process or many: plain, torchrun, accelerate launch, or srun."""

import os
from collections.abc import MutableMapping

import torch


def join_processes(environment: MutableMapping[str, str] = os.environ) -> None:
    """Say in the environment what accelerate must know to find the other processes of this run."""
    _adopt_slurm(environment)
    if int(environment.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
        environment.setdefault("ACCELERATE_USE_CPU", "true")  # else each process would take itself for the only one


def _adopt_slurm(environment: MutableMapping[str, str]) -> None:
    """Give PyTorch the names it expects for what SLURM says, in a job step of several tasks."""
    if "RANK" in environment or int(environment.get("SLURM_NTASKS", "1")) < 2 or "SLURM_STEP_ID" not in environment:
        return
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment["WORLD_SIZE"] = environment["SLURM_NTASKS"]
    environment.setdefault("MASTER_ADDR", environment.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1"))
    environment.setdefault("MASTER_PORT", str(20000 + int(environment["SLURM_JOB_ID"]) % 20000))
