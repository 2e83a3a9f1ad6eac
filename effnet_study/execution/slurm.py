"""Many notebooks handed over to Slurm, by submitit."""

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from effnet_study.execution.local import Execution, execute
from effnet_study.execution.notebook import GRACE
from effnet_study.files import holder_of


@dataclass(frozen=True)
class SlurmTask:
    """A task for submitit to call on a node.

    Slurm warns a job before its time ends, and before a job of higher priority takes its place. Then the work stops
    with a checkpoint, is queued again, and goes on from there.
    """

    work: Callable[..., bool]  # work(stop=FILE) returns whether all succeeded
    stop: Path
    folder: Path  # holds the runs that it trains

    def __call__(self) -> bool:
        self.stop.unlink(missing_ok=True)
        if not self.work(stop=self.stop):
            raise RuntimeError("a notebook failed, or another process trains its run; see above")
        return True

    def checkpoint(self):
        """Stop and return the continuation. submitit calls this in its signal handler, while notebooks still run."""
        import submitit

        self.stop.touch()
        until = time.monotonic() + GRACE
        while any(holder_of(lock.parent) for lock in self.folder.rglob(".lock")) and time.monotonic() < until:
            time.sleep(0.2)
        return submitit.helpers.DelayedSubmission(self)


def slurm_executor(folder: Path, seconds: float):
    """Return submitit's executor, with its files in FOLDER/slurm.

    RuntimeError if Slurm or submitit is not here; ValueError if jobs of `seconds` are too short.
    """
    try:
        import submitit

        executor = submitit.AutoExecutor(folder / "slurm", cluster="slurm", slurm_max_num_timeout=10_000)
    except ImportError:
        raise RuntimeError("executor slurm: submitit is not installed; pip install 'effnet-study[slurm]'") from None
    except RuntimeError as error:
        raise RuntimeError(f"executor slurm: {error}") from None
    if seconds < 300:
        raise ValueError(f"time budget: expected at least 5m for Slurm, which warns 90 s before, got {seconds:.0f} s")
    return executor


def submit_to_slurm(
    executor,
    executions: Sequence[Execution],
    closing: Callable[..., bool],
    folder: Path,
    *,
    seconds: float,
    jobs: int | None,
    threads: int | None,
    gpus: int,
    tensorboard: bool,
) -> list:
    """Submit notebooks as one array job, and closing(stop=FILE) as a job after it. Return the jobs, closing last.

    executor: of `slurm_executor`. seconds: the time of each job, after which it is queued again. jobs: at most so many
    at a time. threads: CPUs of each (default: 4 for each GPU, else one). Logs and scripts go to FOLDER/slurm. sbatch
    itself reads partition, account and so on from $SBATCH_PARTITION, $SBATCH_ACCOUNT.
    """
    place, cpus, further = folder / "slurm", threads or 4 * gpus or 1, {"requeue": True}
    options = {"timeout_min": math.ceil(seconds / 60), "nodes": 1, "tasks_per_node": 1, "gpus_per_node": gpus or None}
    options |= {"cpus_per_task": cpus, "slurm_array_parallelism": jobs or max(1, len(executions))}
    options |= {"slurm_srun_args": [f"--cpus-per-task={cpus}"]}  # srun does not take this over from sbatch
    executor.update_parameters(name=f"effnet-{folder.name}", **options, slurm_additional_parameters=further)
    submitted, threads = [], threads or (None if gpus else 1)
    with executor.batch() if executions else contextlib.nullcontext():
        for number, execution in enumerate(executions):
            work = partial(execute, [execution], 1, threads, gpus, tensorboard=tensorboard)
            task = SlurmTask(work, place / f".stop.{number}", execution.run_dir or place)
            submitted.append(executor.submit(task))
    if submitted:
        further = further | {"dependency": f"afterany:{submitted[0].job_id.partition('_')[0]}"}
    executor.update_parameters(name=f"effnet-{folder.name}-closing", slurm_additional_parameters=further)
    submitted.append(executor.submit(SlurmTask(closing, place / ".stop.closing", folder)))
    return submitted
