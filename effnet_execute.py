"""Notebooks executed: parameters checked, papermill in a process of its own, many at a time.

Where notebooks are executed is an executor's business: this machine, one per core or per GPU; a Ray cluster; a Slurm
cluster, to which they are handed over. Each does the same with a notebook (`_attempt`) and leaves what is hard to
the trainer: a run is trained by one process at a time, and goes on from its checkpoint wherever it is started again.
"""

import ast
import contextlib
import json
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from effnet_lib import Held, Interrupted, Killed, gpu_count, holder_of, unknown_name
from effnet_runs import NOTEBOOKS, ROOT, TRAINED_BY, Profile, family

GRACE = 20  # seconds for a notebook to stop in once it is asked to
STARTING = 20  # seconds: with less of its time left, a study starts no further notebook
SEEN = 70  # seconds until every machine that shares a file system sees a new file, by NFS's defaults
RETRIES = 2  # further attempts at a notebook whose process was killed; one that fails by itself gets none
TRY_AGAIN = os.EX_TEMPFAIL  # exit status 75: stopped in time, to be continued by the same command
KILLED = os.EX_SOFTWARE  # exit status 70, of _EXECUTE: the kernel died
HELD = os.EX_UNAVAILABLE  # exit status 69, of _EXECUTE: another process trains the run
EXECUTORS = ("local", "ray", "slurm")


# ---- 1. Notebooks --------------------------------------------------------------------------------------------------


def _assignments(source: str) -> dict[str, object]:
    """NAME = literal lines of a cell."""
    pairs = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            pairs[target.id] = ast.literal_eval(node.value)
    return pairs


def check_parameters(notebook: str, values: Mapping[str, object]) -> dict[str, object]:
    """`values` if NOTEBOOK's cell tagged "parameters" declares them all, with like types; papermill only warns.

    Returns the declared defaults updated by `values`; a parameter whose default is None takes text or None.
    """
    cells = json.loads((NOTEBOOKS / f"{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]
    declared = next(_assignments("".join(c["source"])) for c in cells if "parameters" in c["metadata"].get("tags", []))
    for name, value in values.items():
        if name not in declared:
            raise unknown_name(f"parameter of {notebook}", name, declared)
        default = declared[name]
        allowed = {float: (int, float), type(None): (str, type(None))}.get(type(default), type(default))
        if not isinstance(value, allowed) or (isinstance(value, bool) and type(default) is not bool):
            raise ValueError(f"parameter {name} of {notebook}: expected a value like {default!r}, got {value!r}")
    return declared | dict(values)


def check_notebook(notebook: str, namespace: Mapping[str, object]) -> None:
    """For a notebook's second cell: refuse unknown or ill-typed parameters, whoever injected them.

    namespace: the notebook's globals(). The names come from the cell that papermill injected, which starts with
    "# Parameters", so that variables of the notebook itself are never taken for parameters.
    """
    injected = [_assignments(cell) for cell in namespace.get("In", ()) if cell.startswith("# Parameters\n")]
    declared = check_parameters(notebook, injected[-1] if injected else {})
    values = check_parameters(notebook, {name: namespace[name] for name in declared})
    if "method" in values and (trained_by := TRAINED_BY[family(values["method"])]) != notebook:
        raise ValueError(f"method {values['method']!r} is trained by {trained_by}, not by {notebook}")


# Papermill has a process of its own. Signals meant for training do not end it: it waits for the kernel, which stops.
# Slurm's warning (SIGUSR2) goes to every process of a job, but is for submitit's alone; the kernel inherits that.
# It does not outlive who started it (prctl: Linux only), nor the kernel it. Slow imports come after that.
_EXECUTE = """
import ctypes, os, signal, sys
getattr(ctypes.CDLL(None), "prctl", lambda *_: None)(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[2]):
    sys.exit(70)
signal.signal(signal.SIGUSR2, signal.SIG_IGN)
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: None)
import json, nbclient, papermill
try:
    papermill.execute_notebook(**json.loads(sys.argv[1]), stdout_file=sys.stdout, stderr_file=sys.stderr)
except papermill.PapermillExecutionError as error:
    told = error.ename in ("Interrupted", "Held")
    print(error.evalue if told else f"{error.ename}: {error.evalue}", file=sys.stderr)
    sys.exit({"Interrupted": 75, "Killed": 70, "Held": 69}.get(error.ename, 1))
except nbclient.exceptions.DeadKernelError:
    sys.exit(70)
except Exception as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def _wait(process: subprocess.Popen, stop: Path) -> int:
    """Its exit status. Once `stop` is there it has GRACE seconds; then it is killed, and its kernel ends with it."""
    asked = math.inf
    while True:
        try:
            return process.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            if stop.exists():
                asked = min(asked, time.monotonic())
            if time.monotonic() - asked > GRACE:
                process.kill()


@contextlib.contextmanager
def _repeated(process: subprocess.Popen):
    """Say what a process says, line by line, as this process: through whatever its sys.stdout and sys.stderr are."""

    def repeat(stream, name: str) -> None:
        for line in stream:
            print(line, end="", file=getattr(sys, name), flush=True)

    pairs = ((process.stdout, "stdout"), (process.stderr, "stderr"))
    threads = [threading.Thread(target=repeat, args=pair, daemon=True) for pair in pairs]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for thread in threads:  # what a kernel that is about to end still holds is not waited for
            thread.join(timeout=2)


def run_notebook(
    notebook: str,
    output: Path,
    parameters: Mapping[str, object],
    threads: int | None = None,
    stop: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Execute notebooks/NOTEBOOK.ipynb into `output`, which appears only if every cell succeeded.

    What cells print comes out at once. `threads`: CPU threads for torch, which otherwise takes all cores;
    `environment`: further variables of the kernel's environment. Raises RuntimeError if a cell failed, Killed if the
    process was killed; what there is of the notebook is then beside `output` as NAME.partial.ipynb. Raises Held if
    another process trains its run, Interrupted if training stopped in time, with a checkpoint. An interrupt, or else a
    file that appears at `stop`, asks training to do so; what has not ended GRACE seconds later is killed.
    """
    check_parameters(notebook, parameters)
    unfinished = output.with_suffix(".partial.ipynb")
    output.parent.mkdir(parents=True, exist_ok=True)
    arguments = {"input_path": str(NOTEBOOKS / f"{notebook}.ipynb"), "output_path": str(unfinished)}
    arguments |= {"parameters": dict(parameters), "kernel_name": "python3", "language": "python", "cwd": str(ROOT)}
    arguments |= {"progress_bar": False, "extra_arguments": ["--IPKernelApp.log_level=CRITICAL"]}
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {}) | (environment or {})
    with tempfile.TemporaryDirectory() as folder:
        stop = stop or Path(folder) / "stop"
        environment["EFFNET_STOP"] = str(stop)
        command = [sys.executable, "-c", _EXECUTE, json.dumps(arguments), str(os.getpid())]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)
        try:
            with _repeated(process):
                status = _wait(process, stop)
        except BaseException:
            stop.touch()
            _wait(process, stop)
            raise
        killed = status in (KILLED, -signal.SIGKILL) and not stop.exists()
    if status == TRY_AGAIN:
        unfinished.unlink(missing_ok=True)
        raise Interrupted(f"{notebook} stopped in time")
    if status == HELD:
        unfinished.unlink(missing_ok=True)
        raise Held(f"{notebook} is left to the process that is at it")
    if killed:
        raise Killed(f"{notebook}: its process was killed; see {unfinished}")
    if status != 0:
        raise RuntimeError(f"{notebook} failed; see {unfinished}")
    executed = json.loads(unfinished.read_text(encoding="utf-8"))
    for key in ("input_path", "output_path"):  # no paths of the machine it ran on
        executed["metadata"]["papermill"][key] = f"{notebook}.ipynb" if key == "input_path" else output.name
    unfinished.write_text(json.dumps(executed, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    unfinished.replace(output)


# ---- 2. Many at a time ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Execution:
    """A notebook to be executed."""

    about: str  # what to say when it starts
    notebook: str
    output: Path
    parameters: Mapping[str, object]
    folder: Path | None = None  # the run's, which its process holds


def shares(
    count: int, profile: Profile, device: str | None, jobs: int | None = None, threads: int | None = None
) -> tuple[int, int | None]:
    """How many of `count` notebooks to execute here at a time, and with how many CPU threads each (None: torch's own).

    One for each GPU, or for each group of the profile's `devices`. On a CPU, where one thread in each of two processes
    does more than two threads in one, as many as there are cores, if each has 4 GiB of memory; all of them together get
    the cores that there are.
    """
    for name, value in {"jobs": jobs, "threads": threads}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected a whole number of at least 1, got {value}")
    gpus = gpu_count(device)
    cores, processes = torch.get_num_threads(), gpus_per_run(profile, gpus) or 1
    if jobs is None:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**32
        jobs = max(1, min(gpus // processes, count) if gpus else min(cores // processes, count, memory))
    if threads is None and (not gpus or jobs > 1):
        threads = max(1, cores // (jobs * processes))
    return jobs, threads


def gpus_per_run(profile: Profile, gpus: int) -> int:
    """How many processes a run of this profile has where there are so many GPUs."""
    return max(1, gpus) if profile.devices == "auto" else profile.devices


def execute(
    executions: Sequence[Execution],
    jobs: int,
    threads: int | None,
    gpus: int = 0,
    stop: Path | None = None,
) -> bool:
    """Execute notebooks on this machine, `jobs` at a time. False if one failed.

    gpus: how many each has for itself if there are several jobs. An interrupt, a file that appears at `stop`, or one
    notebook that has no time left, asks all of them to stop with a checkpoint; Interrupted or the interrupt is raised
    then.
    """
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        stop, free = stop or Path(folder) / "stop", queue.SimpleQueue()
        for environment in _slots(jobs, gpus):
            free.put(environment)

        def in_a_slot(execution: Execution) -> bool:
            environment = free.get()
            try:
                return _attempt(execution, threads, stop, environment)
            finally:
                free.put(environment)

        futures = [pool.submit(in_a_slot, execution) for execution in executions]
        try:
            return all([future.result() for future in futures])
        except BaseException:
            stop.touch()
            pool.shutdown(wait=False, cancel_futures=True)  # the block ends when those that run have stopped
            raise


def _slots(jobs: int, gpus: int) -> list[dict[str, str]]:
    """The environment of each of `jobs` processes side by side: GPUs of its own, by turns if there are too few."""
    if jobs == 1 or gpus == 0:
        return [{}] * jobs
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(gpu_count())]
    chosen = [dict.fromkeys(names[(i * gpus + k) % len(names)] for k in range(gpus)) for i in range(jobs)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(group)} for group in chosen]


def _attempt(
    execution: Execution, threads: int | None, stop: Path, environment: Mapping[str, str] | None = None
) -> bool:
    """Execute a notebook; if that fails it is told, and the study goes on. Raises Interrupted if there is no time.

    One whose process was killed is attempted again, and goes on from its run's checkpoint; one that failed is not, nor
    one whose run another process trains, which it is left to.
    """
    for left in reversed(range(RETRIES + 1)):
        if stop.exists() or time.time() + STARTING > float(os.environ.get("EFFNET_DEADLINE", "inf")):
            raise Interrupted("too little time is left to start another notebook")
        holder = _wait_until_free(execution.folder, 10 if left == RETRIES else 60)
        left_to = "" if holder is None else f": left to {holder}"
        print(f"{execution.about}{left_to}\n", end="", flush=True)  # in one piece, since others print too
        if holder is not None:
            break
        notebook, output, parameters = execution.notebook, execution.output, execution.parameters
        try:
            run_notebook(notebook, output, parameters, threads, stop, environment)
            return True
        except Killed as error:
            again = "; it is attempted again" if left else ""
            print(f"effnet: {error}{again}", file=sys.stderr, flush=True)
        except RuntimeError as error:  # Held too
            print(f"effnet: {error}", file=sys.stderr, flush=True)
            break
    return False


def _wait_until_free(folder: Path | None, seconds: float) -> str | None:
    """Who still holds a run after a moment, which a kernel whose papermill was killed takes to notice that."""
    until = time.monotonic() + seconds
    while (holder := folder and holder_of(folder)) is not None and time.monotonic() < until:
        time.sleep(0.2)
    return holder


# ---- 3. On a Ray cluster -------------------------------------------------------------------------------------------


def execute_on_ray(
    executions: Sequence[Execution],
    jobs: int | None,
    threads: int | None,
    gpus: int = 0,
    stop: Path | None = None,
    *,
    optional: bool = False,
) -> bool:
    """`execute` on the Ray cluster at $RAY_ADDRESS, or on one of this machine alone, as many at a time as it has
    room for, and not more than `jobs`. Results lie on a file system that all its machines share.

    gpus: of each; optional: none if the cluster has none. threads: CPUs of each (default: its share of a machine with
    GPUs, else one). A worker that dies is replaced, and its notebook goes on from the run's checkpoint. RuntimeError if
    no machine has enough for one: Ray itself would wait for ever.
    """
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # two runs may well say the same
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise RuntimeError("executor ray: Ray is not installed; pip install 'effnet-study[ray]'") from None
    ours = not ray.is_initialized()
    if ours:
        handler = signal.getsignal(signal.SIGTERM)
        ray.init(os.environ.get("RAY_ADDRESS") or "local", logging_level="WARNING")
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray's own would exit with another status
    stop = stop or executions[0].output.parents[1] / f".stop.{os.getpid()}"
    stop.unlink(missing_ok=True)
    pending, todo, good = {}, list(reversed(executions)), True
    try:
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = 0 if optional and not any(machine.get("GPU") for machine in machines) else gpus
        threads = threads or _ray_threads(machines, gpus)
        _check_ray(machines, {"CPU": threads, "GPU": gpus})
        options = {"num_cpus": threads, "num_gpus": gpus, "max_retries": RETRIES, "retry_exceptions": False}
        options["runtime_env"] = {"env_vars": {k: v for k, v in os.environ.items() if k.startswith("EFFNET_")}}
        task = ray.remote(**options)(_on_a_worker)
        while todo or pending:
            while todo and len(pending) < (jobs or len(executions)):
                execution = todo.pop()
                pending[task.remote(execution, threads, stop)] = execution
            for done in ray.wait(list(pending), timeout=1)[0]:
                execution = pending.pop(done)
                try:
                    outcome = ray.get(done)
                except ray.exceptions.RayError as error:
                    print(f"effnet: {execution.notebook}: {error}", file=sys.stderr, flush=True)
                    outcome = "failed"
                if outcome == "interrupted":
                    raise Interrupted(f"{execution.notebook} stopped in time")
                good = good and outcome == "done"
        return good
    except BaseException:
        if pending:
            stop.touch()
            ray.wait(list(pending), num_returns=len(pending), timeout=GRACE + SEEN)
        raise
    finally:
        stop.unlink(missing_ok=True)
        if ours:
            ray.shutdown()


def _on_a_worker(execution: Execution, threads: int, stop: Path) -> str:
    """`_attempt`'s outcome in a word: Ray is to try again what died, not what raised."""
    try:
        return "done" if _attempt(execution, threads, stop) else "failed"
    except Interrupted:
        return "interrupted"


def _ray_threads(machines: Sequence[Mapping], gpus: int) -> int:
    """CPUs for a run: its share of the machine that has the fewest for each GPU."""
    able = [machine for machine in machines if machine.get("GPU", 0) >= gpus > 0]
    return max(1, min((int(m.get("CPU", 1) * gpus / m["GPU"]) for m in able), default=1))


def _check_ray(machines: Sequence[Mapping], needed: Mapping[str, int]) -> None:
    has = [{name: machine.get(name, 0) for name in needed} for machine in machines]
    if not any(all(machine[name] >= count for name, count in needed.items()) for machine in has):
        words = " and ".join(f"{count} {name}" for name, count in needed.items())
        there = "; ".join(", ".join(f"{count:g} {name}" for name, count in machine.items()) for machine in has)
        raise RuntimeError(
            f"executor ray: a run needs {words} on one machine, the cluster's have: {there}. Give --threads or "
            "--device cpu, or set RAY_ADDRESS to a larger cluster"
        )


# ---- 4. On a Slurm cluster -----------------------------------------------------------------------------------------


class SlurmTask:
    """What submitit calls on a node: work(*arguments, stop=FILE), which returns whether all went well.

    Slurm's warning, before the time is up or for a job of higher priority, has it stop with a checkpoint and queued
    again; it then goes on from there. folder: where the runs lie that it trains.
    """

    def __init__(self, work: Callable[..., bool], arguments: tuple, stop: Path, folder: Path):
        self.work, self.arguments, self.stop, self.folder = work, arguments, stop, folder

    def __call__(self) -> bool:
        self.stop.unlink(missing_ok=True)
        if not self.work(*self.arguments, stop=self.stop):
            raise RuntimeError("a notebook failed, or another process trains its run; see above")
        return True

    def checkpoint(self):
        """Called by submitit in its signal handler, while the threads that execute notebooks go on."""
        import submitit

        self.stop.touch()
        until = time.monotonic() + GRACE
        while any(holder_of(lock.parent) for lock in self.folder.rglob(".lock")) and time.monotonic() < until:
            time.sleep(0.2)
        return submitit.helpers.DelayedSubmission(self)


def slurm_executor(folder: Path, seconds: float):
    """submitit's executor, its files in FOLDER/slurm. RuntimeError if Slurm or submitit is not here, ValueError if jobs
    of so many seconds are too short."""
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
    arguments: tuple,
    folder: Path,
    *,
    seconds: float,
    jobs: int | None,
    threads: int | None,
    gpus: int,
) -> list:
    """Hand notebooks over as one array job, and closing(*arguments, stop=FILE) as a job that follows it; the submitted
    jobs, the closing one last.

    executor: of `slurm_executor`. seconds: the time of each job, after which it is queued again. jobs: at most so many
    at a time. threads: CPUs of each (default: 4 for each GPU, else one). Logs and scripts go to FOLDER/slurm.
    Partition, account and the like are those of sbatch's own $SBATCH_PARTITION, $SBATCH_ACCOUNT.
    """
    place, cpus = folder / "slurm", threads or 4 * gpus or 1
    options = {"timeout_min": math.ceil(seconds / 60), "nodes": 1, "tasks_per_node": 1, "gpus_per_node": gpus or None}
    options |= {"cpus_per_task": cpus, "slurm_array_parallelism": jobs or max(1, len(executions))}
    options |= {"slurm_srun_args": [f"--cpus-per-task={cpus}"]}  # which it does not take over from sbatch
    again = {"requeue": True}
    executor.update_parameters(name=f"effnet-{folder.name}", **options, slurm_additional_parameters=again)
    submitted = []
    with executor.batch() if executions else contextlib.nullcontext():
        for number, execution in enumerate(executions):
            arguments_here = [execution], 1, threads or (None if gpus else 1), gpus
            task = SlurmTask(execute, arguments_here, place / f".stop.{number}", execution.folder or place)
            submitted.append(executor.submit(task))
    if submitted:
        again = again | {"dependency": f"afterany:{submitted[0].job_id.partition('_')[0]}"}
    executor.update_parameters(name=f"effnet-{folder.name}-closing", slurm_additional_parameters=again)
    submitted.append(executor.submit(SlurmTask(closing, arguments, place / ".stop.closing", folder)))
    return submitted
