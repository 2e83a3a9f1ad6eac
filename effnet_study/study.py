"""A whole study: find the runs that are left, execute their notebooks, the search and the analysis, or plan them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from effnet_study.analysis.claims import verdict_lines
from effnet_study.coefficients import COEFFICIENTS
from effnet_study.data.load import load_data
from effnet_study.execution.clusters import execute_on_ray, slurm_executor, submit_to_slurm
from effnet_study.execution.local import Execution, execute, gpus_per_run, plan_workers
from effnet_study.execution.notebook import TRY_AGAIN
from effnet_study.files import RunLocked, RunMismatch, hold, holder_of
from effnet_study.machine import choose_device, gpu_count
from effnet_study.methods import TRAINED_BY, base_method
from effnet_study.profile import Profile
from effnet_study.progress import live_table, print_status
from effnet_study.record import read_record
from effnet_study.run import Run, plan_runs
from effnet_study.search import Candidate, all_candidates
from effnet_study.speed import estimate_seconds


@dataclass
class Launcher:
    """A profile's study, and where and how its notebooks are executed: the options of `effnet study`."""

    profile: Profile
    results: str | Path | None = None
    methods: Sequence[str] | None = None  # only these of the profile
    seeds: Sequence[int] | None = None  # only these of the profile
    retry: bool = False  # run failed and diverged runs again; their records are kept as run.earlier.json
    analysis: bool | None = None  # execute 00 and 05 (default: if 05 is missing or a run was trained)
    device: str | None = None
    jobs: int | None = None  # notebooks at a time; see plan_workers for the defaults
    threads: int | None = None  # CPU threads of each
    executor: str = "local"  # or ray
    stop: Path | None = None  # once this file exists, everything stops with checkpoints
    deadline: float | None = None  # Unix time at which everything has stopped
    tensorboard: bool = False  # write event files too

    def __post_init__(self) -> None:
        self.runs = plan_runs(self.profile, self.results, self.methods, self.seeds)
        self.study_dir = self.runs[0].study_dir
        self.analysed = self.study_dir / "notebooks" / "05_analysis.ipynb"
        self.gpus = 0 if self.device == "cpu" else gpus_per_run(self.profile, 1)  # that a run asks a cluster for
        source, results = self.profile.source, self.results
        # Parameters of every notebook. A kernel starts in another folder, so paths are absolute
        self.parameters = {"profile": str(Path(source).absolute()) if source else self.profile.name}
        self.parameters |= {"results": str(Path(results).absolute())} if results else {}

    # ---- 1. The study ----------------------------------------------------------------------------------------------

    def study(self) -> int:
        """Execute the notebooks that are left. Return 0 if all runs are finished, TRY_AGAIN if another process trains
        some of them, else 1. Interrupted before the deadline, or after a file appears at `stop`. RunMismatch, before
        anything is changed, if some runs were made with other settings than the profile's."""
        ready, waiting, candidates = self._left_to_do()
        todo = [*ready, *waiting]
        print(f"{self.profile.title}: {len(todo)} of {len(self.runs)} runs to do ({self.profile.stamp})", flush=True)
        if todo:  # what is missing is reported once, not by every notebook
            if self.executor == "local" and choose_device(self.device).index is not None and gpu_count() > 1:
                raise ValueError(f"device: {self.device!r}: notebooks have a GPU each; choose by $CUDA_VISIBLE_DEVICES")
            load_data(**self.profile.data.given())
        self._prepare(todo)
        with live_table([*self.runs, *candidates]):
            self._execute(self._executions(ready))
            if candidates and self._execute([self._search_execution(candidates)]):
                self._execute(self._executions(waiting))
            held = [run.run_dir for run in self.runs if run.state() == "running"]
            if candidates and holder_of(self.study_dir / "search") is not None:
                held.append(self.study_dir / "search")
            finished = [run for run in self.runs if run.state() == "finished"]
            analysed = True
            # `make report` may have executed 05 meanwhile, of fewer runs
            if finished and not held and (self._to_analyse or (self.analysis is None and todo)):
                try:
                    analysed = self._analyse()
                except RunLocked:
                    held = [self.analysed]
        print_status(self.runs)
        if held:
            print(f"Another process is at work on {', '.join(map(str, held))}; afterwards run the same command again.")
            return TRY_AGAIN
        if self.analysed.exists():
            print("", *_findings(self.study_dir / "tables"), sep="\n")
            print(f"({self.profile.stamp}) All of it: {self.study_dir / 'README.md'}", flush=True)
        return 0 if len(finished) == len(self.runs) and analysed else 1

    def search(self) -> bool:
        """Execute the search's notebook, which writes coefficients.json. Return whether it succeeded."""
        candidates = all_candidates(self.profile, self.results)
        refuse_stale(plan_runs(self.profile, self.results), candidates)
        return self._execute([self._search_execution(candidates)])

    def submit(self, seconds: float) -> list:
        """Hand the study over to Slurm, and return the submitted jobs. One array job executes the notebooks of the runs
        and of the search. Each element has `seconds`; when they are up, it is queued again. A job after it, `study` on
        one node, trains what waited for coefficients and does the analysis."""
        ready, waiting, candidates = self._left_to_do()
        if not (ready or waiting or self._to_analyse):
            return []
        # Refuses before anything is changed
        slurm = slurm_executor(self.study_dir, seconds, self.jobs, self.threads, self.gpus)
        self._prepare([*ready, *waiting])
        executions = self._executions(ready) + ([self._search_execution(candidates)] if candidates else [])
        how = {"jobs": 1, "threads": self.threads or (None if self.gpus else 1), "gpus": self.gpus}
        works = [partial(execute, [execution], **how, tensorboard=self.tensorboard) for execution in executions]
        return submit_to_slurm(slurm, works, replace(self, jobs=None, retry=False)._close)

    def _close(self, stop: Path) -> bool:
        """Do what is left of a study after its array job."""
        return replace(self, stop=stop, analysis=self.analysis is not False).study() == 0

    # ---- 2. What there is to do ------------------------------------------------------------------------------------

    @property
    def _to_analyse(self) -> bool:
        return not self.analysed.exists() if self.analysis is None else self.analysis

    def _left_to_do(self) -> tuple[list[Run], list[Run], list[Candidate]]:
        """Return the runs whose notebooks can be executed; the runs that wait for the search's coefficients; and the
        candidates of the search, if its notebook is to be executed."""
        # The notebook of a finished run takes seconds
        todo = [r for r in self.runs if r.is_to_do(self.retry) or (r.state() == "finished" and not r.executed.exists())]
        waiting = [run for run in todo if run.state() == "waiting"]
        searched = any(base_method(run.method) == "compound_searched" for run in self.runs)
        lost = searched and not self.analysed.with_stem("03_coefficient_search").exists()
        candidates = all_candidates(self.profile, self.results) if waiting or lost else []
        refuse_stale(plan_runs(self.profile, self.results), candidates)
        return [run for run in todo if run not in waiting], waiting, candidates

    def _prepare(self, todo: Sequence[Run]) -> None:
        """Set failed runs aside, and delete an analysis that will be out of date."""
        for run in todo:
            run.set_aside()
        if todo or any(run.state() == "damaged" for run in self.runs):
            self.analysed.unlink(missing_ok=True)

    # ---- 3. Executing notebooks ------------------------------------------------------------------------------------

    def _executions(self, runs: Sequence[Run]) -> list[Execution]:
        executions = []
        for run in runs:
            parameters = {**self.parameters, "method": run.method, "seed": run.seed, "device": self.device}
            executions.append(Execution(TRAINED_BY[base_method(run.method)], run.executed, parameters))
        return executions

    def _search_execution(self, candidates: Sequence[Candidate]) -> Execution:
        """Return the search's notebook. With `retry`, failed and diverged candidates are set aside before."""
        name, folder = "03_coefficient_search", self.study_dir / "search"
        for candidate in candidates if self.retry and holder_of(folder) is None else ():
            candidate.set_aside()
        return Execution(name, self.analysed.with_stem(name), {**self.parameters, "device": self.device})

    def _execute(self, executions: Sequence[Execution]) -> bool:
        """Execute notebooks that train, and return whether all succeeded."""
        if not executions:
            return True
        options = {"stop": self.stop, "deadline": self.deadline, "tensorboard": self.tensorboard}
        if self.executor == "ray":
            optional = self.device is None
            return execute_on_ray(executions, self.jobs, self.threads, self.gpus, optional=optional, **options)
        jobs, threads, gpus = plan_workers(len(executions), self.profile, self.device, self.jobs, self.threads)
        return execute(executions, jobs, threads, gpus, **options)

    def _analyse(self) -> bool:
        """Execute 00 and 05. RunLocked if another study executes them."""
        executions = []
        for name, given in (("00_architecture", {"explorer": False}), ("05_analysis", {})):
            executions.append(Execution(name, self.analysed.with_stem(name), self.parameters | given))
        workers = plan_workers(len(executions), self.profile, "cpu")
        with hold(self.study_dir):
            return execute(executions, *workers, stop=self.stop, deadline=self.deadline)


def refuse_stale(runs: Sequence[Run], candidates: Sequence[Run] = ()) -> None:
    """Raise RunMismatch if runs have other settings than their profile: a table must not mix old and new scores. Check
    a search's candidates too, and its coefficients if networks were scaled by them."""
    stale = [run for run in [*runs, *candidates] if run.state() == "stale"]
    lines = [f"  {run.run_dir}: {'; '.join(run.differences(read_record(run.run_dir)))}" for run in stale]
    coefficients, scaled = runs[0].study_dir / COEFFICIENTS, runs[0].study_dir.glob("runs/compound_searched*/run.json")
    if candidates and any(run.waiting for run in runs) and coefficients.exists() and any(scaled):
        lines.append(f"  {coefficients}: of another search or recipe, and there are networks scaled by it")
    if lines:
        raise RunMismatch(
            "\n".join([f"the profile {runs[0].profile.name} has changed since these were made:", *lines])
            + "\nNothing was touched. Restore the profile, or delete these files to run again, or keep them and give "
            "another folder for results: --results DIR"
        )


def _findings(tables: Path) -> list[str]:
    """Return in a few lines what the analysis has found."""
    if (tables / "ablation.csv").exists():
        rows = pd.read_csv(tables / "ablation.csv").itertuples()
        return [f"{row.what} ({row.weights}): {row.difference:+.2f} points by {row.change}" for row in rows]
    path = tables / "verdict.json"
    lines = verdict_lines(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else []
    return [line.replace("**", "") for line in lines]  # a terminal shows no Markdown


def plan(
    profile: Profile,
    results: str | Path | None = None,
    *,
    device: str | None = None,
    jobs: int | None = None,
    threads: int | None = None,
    seconds: float = 60,
) -> tuple[pd.DataFrame, int]:
    """Return the runs that are still to do, a row each (an image's flops and activations, and the run's seconds here),
    and how many are trained at a time. `seconds` are spent on a few training steps of each method. Starting notebooks
    and reading images are not included."""
    todo = [run for run in plan_runs(profile, results) if run.is_to_do()]
    runs = [run for run in todo if run.state() != "waiting"]
    if len(runs) < len(todo):
        print(f"Skipped until the search has run: {len(todo) - len(runs)}; {todo[0].command('search')}")
    if runs:
        data = load_data(**profile.data.given(), download=False)
    jobs, threads, processes = plan_workers(len(runs), profile, device, jobs, threads)
    one_of_each, times, cores = {run.method: run for run in reversed(runs)}, {}, torch.get_num_threads()
    torch.set_num_threads(threads or cores)
    for method, run in one_of_each.items():
        print(f"measuring {method} at {run.config.resolution} px", flush=True)
        model, budget = run.model(len(data.classes)), seconds / len(one_of_each)
        times[method] = estimate_seconds(model, data, run.config, choose_device(device), budget, max(1, processes))
    torch.set_num_threads(cores)
    rows = [
        {"method": run.method, "seed": run.seed, "status": run.state(), "px": run.config.resolution}
        | {"flops": run.cost.flops, "activations": run.cost.activations, "seconds": times[run.method]}
        for run in runs
    ]
    return pd.DataFrame(rows), jobs
