"""What is left to run of a profile, and how long it will take on this machine."""

from datetime import timedelta
from pathlib import Path

import pandas as pd
import torch

from effnet_study.data.load import load_data
from effnet_study.execution.local import plan_workers
from effnet_study.machine import choose_device
from effnet_study.profile import Profile
from effnet_study.run import count_runs, plan_runs
from effnet_study.speed import estimate_seconds


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
    and how many are trained at a time.

    `seconds` are spent on a few training steps of each method. Starting notebooks and reading images are not included.
    """
    runs = [run for run in plan_runs(profile, results) if run.is_to_do()]
    if waiting := [run for run in runs if run.state() == "waiting"]:
        print(f"Skipped until the search has run: {count_runs(waiting)}; {waiting[0].command('search')}")
    runs = [run for run in runs if run not in waiting]
    if runs:
        data = load_data(**profile.data.given(), download=False)
    jobs, threads, _ = plan_workers(len(runs), profile, device, jobs, threads)
    one_of_each, times, cores = {run.method: run for run in reversed(runs)}, {}, torch.get_num_threads()
    torch.set_num_threads(threads or cores)
    try:
        for method, run in one_of_each.items():
            print(f"measuring {method} at {run.config.resolution} px", flush=True)
            model, budget = run.model(len(data.classes)), seconds / len(one_of_each)
            times[method] = estimate_seconds(model, data, run.config, choose_device(device), budget)
    finally:
        torch.set_num_threads(cores)
    rows = [
        {"method": run.method, "seed": run.seed, "status": run.state(), "px": run.config.resolution}
        | {"flops": run.cost.flops, "activations": run.cost.activations, "seconds": times[run.method]}
        for run in runs
    ]
    return pd.DataFrame(rows), jobs


def print_plan(table: pd.DataFrame, jobs: int) -> None:
    """Print what `plan` returned, with the total."""
    if table.empty:
        print("Nothing left to run: all runs that can start have ended.")
        return
    numbers = {"flops": lambda count: f"{count / 1e6:,.1f}", "activations": lambda count: f"{count / 1e6:.3f}"}
    numbers["seconds"] = lambda seconds: str(timedelta(seconds=round(seconds)))
    header = ["method", "seed", "status", "px", "FLOPs (M)", "activations (M)", "time"]
    print(table.to_string(index=False, header=header, formatters=numbers))
    total = table["seconds"].sum()
    together = f", about {timedelta(seconds=round(total / jobs))} at {jobs} at a time" if jobs > 1 else ""
    print(f"{len(table)} runs, {timedelta(seconds=round(total))} one after the other{together}", flush=True)
