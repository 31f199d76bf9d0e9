"""The stages one after the other, each in processes of its own with a time limit."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from vim.errors import UserError, one_line
from vim.measure.gpu import STAGES, card
from vim.measure.gpu.stage import Failure, append
from vim.measure.gpu.table import passed, table

WARM_SHARE = 0.4  # of a stage's time at most, to compile its kernels
GRACE = 0.9  # of a stage's time; after it no case is started


def run_stages(out: Path, minutes: float, names: Sequence[str], *, rehearse: bool = False) -> bool:
    """Run stages in the order of their worth and write `table.txt`.

    Args:
        out: gets NAME.jsonl of each stage, `tuned_scan.py`, `tuned_ssd.py` and `table.txt`.
        minutes: for all stages together.
        names: of the stages.
        rehearse: run toy shapes; without a GPU, in Triton's interpreter.

    Returns:
        Whether every check passed and every stage ended by itself.

    Raises:
        UserError: there is no GPU.
    """
    if card.DEVICE == "cpu" and not rehearse:
        raise UserError("there is no GPU here: --rehearse runs every stage at toy shapes on the CPU")
    out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    shares = {name: STAGES[name].seconds for name in names}
    for name in names:
        (out / f"{name}.jsonl").unlink(missing_ok=True)
        left = start + 60 * minutes - time.monotonic()
        seconds = left if name == names[-1] else min(left, 60 * minutes * shares[name] / sum(shares.values()))
        sys.stdout.write(f"{name}: {_run_stage(name, out, seconds, rehearse)}\n")
        sys.stdout.flush()
    lines = table(out)
    (out / "table.txt").write_text("\n".join([*lines, ""]))
    sys.stdout.write("\n".join([*lines, ""]))
    return passed(out)


def _run_stage(name: str, out: Path, seconds: float, rehearse: bool) -> str:
    """Run a stage; what stops it short goes to its file as a failure. Return how long it took."""
    start, plan = time.monotonic(), STAGES[name]
    words = [name, "--out", str(out), *(["--rehearse"] if rehearse else [])]
    if plan.warmers and not rehearse:
        _run_processes([*words, "--warm"], plan.warmers, WARM_SHARE * seconds)
    left = start + seconds - time.monotonic()
    for error in _run_processes(words, 1 if rehearse else plan.processes, left):
        append(out / f"{name}.jsonl", Failure(f"stage {name}", error))
    return f"{time.monotonic() - start:.0f} of {seconds:.0f} s"


def _run_processes(words: list[str], count: int, seconds: float) -> list[str]:
    """Share a stage's cases among processes and wait for them. Return what went wrong, a line for each."""
    environment = dict(os.environ)
    if card.DEVICE == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    if count > 1:  # they also share the processor
        environment["OMP_NUM_THREADS"] = str(max((os.cpu_count() or 1) // count, 1))
    command = [sys.executable, "-m", "vim.measure.gpu", *words]
    command += ["--end", str(time.monotonic() + GRACE * seconds), "--parts", str(count), "--part"]
    end, errors = time.monotonic() + seconds, []
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, f"{part}.log") for part in range(count)]
        processes = [_start([*command, str(part)], environment, log) for part, log in enumerate(logs)]
        try:
            for process, log in zip(processes, logs, strict=True):
                try:
                    if code := process.wait(max(end - time.monotonic(), 0)):
                        errors.append(one_line(f"ended with status {code}: {log.read_text()[-400:]}"))
                except subprocess.TimeoutExpired:
                    errors.append(f"stopped after {seconds:.0f} s")
        finally:
            for process in processes:
                with suppress(ProcessLookupError):  # it and all that it started have ended
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return errors


def _start(command: Sequence[str], environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own, so that what it starts can be ended with it."""
    with log.open("w") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
