"""Many notebooks on a cluster: executed by Ray, or handed over to Slurm by submitit. Neither needs to be installed."""

import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from effnet_study.execution.local import RETRIES, Execution, attempt, side_by_side
from effnet_study.execution.notebook import GRACE
from effnet_study.stop import Interrupted

# ---- 1. Ray --------------------------------------------------------------------------------------------------------


def execute_on_ray(
    executions: Sequence[Execution],
    jobs: int | None,
    threads: int | None,
    gpus: int,
    *,
    optional: bool,
    stop: Path | None = None,
    **options: object,
) -> bool:
    """Execute notebooks on the Ray cluster at $RAY_ADDRESS, or on a cluster of this machine alone, and return whether
    all succeeded. As many run at a time as the cluster has room for, and not more than `jobs`.

    Results lie on a file system that all machines share. gpus: of each notebook; optional: none if the cluster has
    none. threads: CPUs of each (default: one). A worker that dies is replaced, and its run continues from its
    checkpoint. stop and further options: as in `local.execute`.
    """
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # two runs may print the same line
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    handler = signal.getsignal(signal.SIGTERM)
    ray.init(os.environ.get("RAY_ADDRESS") or "local", logging_level="WARNING")
    signal.signal(signal.SIGTERM, handler)  # Ray's own handler would exit with another status
    folder = executions[0].output.parent
    folder.mkdir(parents=True, exist_ok=True)
    shared = tempfile.TemporaryDirectory(prefix=".stop.", dir=folder)
    stop = stop or Path(shared.name) / "stop"
    try:
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = 0 if optional and not any(machine.get("GPU") for machine in machines) else gpus
        check_resources(machines, {"CPU": threads or 1, "GPU": gpus})
        resources = {"num_cpus": threads or 1, "num_gpus": gpus, "max_retries": RETRIES, "retry_exceptions": False}
        resources["runtime_env"] = {"env_vars": {k: v for k, v in os.environ.items() if k.startswith("EFFNET_")}}
        options |= {"threads": threads or (None if gpus else 1), "stop": stop, "cwd": os.getcwd()}
        task = ray.remote(**resources)(_on_a_worker)

        def on_ray(execution: Execution) -> bool:
            try:
                succeeded = ray.get(task.remote(execution, options))
            except ray.exceptions.RayError as error:
                print(f"effnet: {execution.notebook}: {error}", file=sys.stderr, flush=True)
                return False
            if succeeded is None:
                raise Interrupted(f"{execution.notebook} stopped in time")
            return succeeded

        return side_by_side(on_ray, executions, jobs or len(executions), stop)
    finally:
        shared.cleanup()
        ray.shutdown()


def _on_a_worker(execution: Execution, options: Mapping) -> bool | None:
    """Return whether `attempt` succeeded; None if it was interrupted, which Ray would take for a cancelled task."""
    try:
        return attempt(execution, **options)
    except Interrupted:
        return None


def check_resources(machines: Sequence[Mapping], needed: Mapping[str, int]) -> None:
    """Raise RuntimeError if no machine has the CPUs and GPUs that a run needs. Ray itself would wait forever."""
    offered = [{name: machine.get(name, 0) for name in needed} for machine in machines]
    if not any(all(machine[name] >= needed[name] for name in needed) for machine in offered):
        raise RuntimeError(
            f"executor ray: a run needs {needed['CPU']} CPU and {needed['GPU']} GPU on one machine, the cluster's "
            f"have: {offered}. Give --threads or --device cpu, or set RAY_ADDRESS to a larger cluster"
        )


# ---- 2. Slurm ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SlurmTask:
    """A task for submitit to call on a node. Slurm warns a job before its time ends, and before a job of higher
    priority takes its place. Then the work stops with a checkpoint, is queued again, and continues from there."""

    work: Callable[..., bool]  # work(stop=FILE) returns whether all succeeded
    stop: Path

    def __call__(self) -> bool:
        self.stop.unlink(missing_ok=True)
        if not self.work(stop=self.stop):
            raise RuntimeError("a notebook failed, or another process trains its run; see above")
        return True

    def checkpoint(self):
        """Stop and return the continuation. submitit calls this in its signal handler, while notebooks still run."""
        import submitit

        self.stop.touch()
        time.sleep(GRACE)  # then what has not stopped is killed
        return submitit.helpers.DelayedSubmission(self)


def slurm_executor(folder: Path, seconds: float, jobs: int | None, threads: int | None, gpus: int):
    """Return submitit's executor, with its files in FOLDER/slurm. RuntimeError if Slurm is not here; ValueError if
    jobs of `seconds`, after which they are queued again, are too short.

    jobs: at most so many at a time. threads: CPUs of each (default: 4 for each GPU, else one). sbatch itself reads
    $SBATCH_PARTITION, $SBATCH_ACCOUNT and so on.
    """
    import submitit

    if seconds < 300:
        raise ValueError(f"time budget: expected at least 5m for Slurm, which warns 90 s before, got {seconds:.0f} s")
    executor = submitit.AutoExecutor(folder / "slurm", cluster="slurm", slurm_max_num_timeout=10_000)
    options = {"name": f"effnet-{folder.name}", "timeout_min": math.ceil(seconds / 60), "nodes": 1, "tasks_per_node": 1}
    options |= {"gpus_per_node": gpus or None, "cpus_per_task": (cpus := threads or 4 * gpus or 1)}
    options |= {"slurm_srun_args": [f"--cpus-per-task={cpus}"]}  # srun does not take this over from sbatch
    options |= {"slurm_array_parallelism": jobs or 256, "slurm_additional_parameters": {"requeue": True}}
    executor.update_parameters(**options)
    return executor


def submit_to_slurm(executor, works: Sequence[Callable[..., bool]], closing: Callable[..., bool]) -> list:
    """Submit work(stop=FILE) of each as one array job, and closing(stop=FILE) as a job after it. Return the jobs."""
    tasks = [SlurmTask(work, executor.folder / f".stop.{number}") for number, work in enumerate((*works, closing))]
    submitted, further = [], {"requeue": True}
    if works:
        with executor.batch():
            submitted = [executor.submit(task) for task in tasks[:-1]]
        further |= {"dependency": f"afterany:{submitted[0].job_id.partition('_')[0]}"}
    executor.update_parameters(slurm_additional_parameters=further)
    return [*submitted, executor.submit(tasks[-1])]
