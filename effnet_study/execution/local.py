"""Many notebooks on this machine, one for each GPU or CPU core. Ray's workers and Slurm's jobs use it too."""

import math
import os
import queue
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from effnet_study.execution.notebook import run_notebook
from effnet_study.machine import gpu_count, memory
from effnet_study.profile import Profile
from effnet_study.stop import Interrupted, ProcessKilled

STARTING = 20  # seconds: with less time left, a study starts no further notebook
PAUSE = 5  # seconds until the kernel of a killed process has ended, too
RETRIES = 2  # further attempts at a notebook whose process was killed; a notebook that fails by itself gets none


class Execution(NamedTuple):
    """A notebook to be executed: the first arguments of `run_notebook`."""

    notebook: str
    output: Path
    parameters: Mapping[str, object]


def plan_workers(
    count: int, profile: Profile, device: str | None, jobs: int | None = None, threads: int | None = None
) -> tuple[int, int | None, int]:
    """Return how many of `count` notebooks to execute here at a time, the CPU threads of each (None: torch's own), and
    the GPUs of each. There is one for each GPU, or for each group of the profile's `devices`. On a CPU there is one for
    each core with 4 GiB of memory: one thread in each of two processes does more than two threads in one."""
    gpus, cores = gpu_count(device), torch.get_num_threads()
    processes = gpus_per_run(profile, gpus)
    most = gpus // processes if gpus else min(cores // processes, memory() // 2**32)
    jobs = max(1, min(jobs or most, count))
    if threads is None and (not gpus or jobs > 1):
        threads = max(1, cores // (jobs * processes))
    return jobs, threads, processes if gpus else 0


def gpus_per_run(profile: Profile, gpus: int) -> int:
    """Return how many processes a run of this profile has on a machine with so many GPUs."""
    return max(1, gpus) if profile.devices == "auto" else profile.devices


def execute(
    executions: Sequence[Execution], jobs: int, threads: int | None = None, gpus: int = 0, **options: object
) -> bool:
    """Execute notebooks on this machine, `jobs` at a time, and return whether all succeeded. gpus: how many each has
    for itself if there are several jobs. threads and options: as in `run_notebook`."""
    free = queue.SimpleQueue()
    for environment in _environments(jobs, gpus):
        free.put(environment)
    with tempfile.TemporaryDirectory() as folder:
        options["stop"] = stop = options.get("stop") or Path(folder) / "stop"

        def in_turn(execution: Execution) -> bool:
            environment = free.get()
            try:
                return attempt(execution, threads=threads, environment=environment, **options)
            finally:
                free.put(environment)

        return side_by_side(in_turn, executions, jobs, stop)


def side_by_side(call: Callable[[Execution], bool], executions: Sequence[Execution], jobs: int, stop: Path) -> bool:
    """Execute notebooks by `call`, `jobs` at a time, and return whether all succeeded. An interrupt of this process, or
    an error of a call, creates the file `stop`, and is raised when all calls that were under way have ended."""
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(call, execution) for execution in executions]
        try:
            return all([future.result() for future in futures])
        except BaseException:
            stop.touch()
            pool.shutdown(wait=False, cancel_futures=True)  # leaving the block waits for the calls under way
            raise


def _environments(jobs: int, gpus: int) -> list[dict[str, str]]:
    """Return the environment of each of `jobs` processes: GPUs of its own, or shared ones if there are too few."""
    if jobs == 1 or gpus == 0:
        return [{}] * jobs
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(gpu_count())]
    chosen = [dict.fromkeys(names[(i * gpus + k) % len(names)] for k in range(gpus)) for i in range(jobs)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(group)} for group in chosen]


def attempt(execution: Execution, *, stop: Path, deadline: float | None = None, **options: object) -> bool:
    """Execute a notebook and return whether it succeeded; print why not. Interrupted if there is no time to start it.
    It is attempted again only if its process is killed: the run then continues from its checkpoint."""
    for left in reversed(range(RETRIES + 1)):
        if stop.exists() or time.time() + STARTING > (deadline or math.inf):
            raise Interrupted("too little time is left to start another notebook")
        print(f"{execution.output.stem}\n", end="", flush=True)  # with its line end, since other threads print too
        try:
            run_notebook(*execution, stop=stop, deadline=deadline, **options)
            return True
        except ProcessKilled as error:
            print(f"effnet: {error}{'; it is attempted again' if left else ''}", file=sys.stderr, flush=True)
            time.sleep(PAUSE)
        except RuntimeError as error:  # RunLocked too
            print(f"effnet: {error}", file=sys.stderr, flush=True)
            return False
    return False
