"""Many notebooks on a Ray cluster."""

import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from effnet_study.execution.local import RETRIES, Execution, attempt, side_by_side
from effnet_study.execution.notebook import GRACE
from effnet_study.stop import Interrupted

SEEN = 70  # seconds until every machine that shares a file system sees a new file, by NFS's defaults


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
    none. threads: CPUs of each (default: one). A worker that dies is replaced, and its notebook continues from the
    run's checkpoint. stop and further options: as in `local.execute`.
    """
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # two runs may print the same line
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise RuntimeError("executor ray: Ray is not installed; pip install 'effnet-study[ray]'") from None
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
            outcome, until = task.remote(execution, options), math.inf
            while not ray.wait([outcome], timeout=1)[0] and time.monotonic() < until:
                if stop.exists():
                    until = min(until, time.monotonic() + GRACE + SEEN)
            try:
                succeeded = ray.get(outcome, timeout=GRACE)
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
