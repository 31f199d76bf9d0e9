"""The same command on one process or many: plain, torchrun, accelerate launch, or srun."""

import os
from collections.abc import MutableMapping


def adopt_slurm(environment: MutableMapping[str, str] = os.environ) -> None:
    """Give PyTorch the names it expects for what SLURM says, in a job step of several tasks."""
    if "RANK" in environment or int(environment.get("SLURM_NTASKS", "1")) < 2 or "SLURM_STEP_ID" not in environment:
        return
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment["WORLD_SIZE"] = environment["SLURM_NTASKS"]
    environment.setdefault("MASTER_ADDR", environment.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1"))
    environment.setdefault("MASTER_PORT", str(20000 + int(environment["SLURM_JOB_ID"]) % 20000))
