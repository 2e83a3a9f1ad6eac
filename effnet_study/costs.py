"""What networks cost, in parameters, FLOPs (multiply-adds) and activations, and how long the runs of a profile take."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch

from effnet_lib import TABLE7, VARIANTS, EfficientNet, Scaling, count_cost, round_resolution, unknown_name
from effnet_study.data.load import load_data
from effnet_study.execution.local import plan_workers
from effnet_study.machine import choose_device
from effnet_study.methods import cost_by_stage
from effnet_study.pretrained import TORCHVISION_MODELS, create_model
from effnet_study.profile import Profile
from effnet_study.run import plan_runs
from effnet_study.speed import estimate_seconds


def network_costs(names: Sequence[str], by_stage: bool = False) -> pd.DataFrame:
    """Return a row for each network with ImageNet's classes: network, px, params, flops, activations.

    names: b0 to b7, rows of Table 7, or names of TORCHVISION_MODELS. by_stage: a row for each part of a network too,
    named in the column `part`; the last part is the total. ValueError for an unknown name.
    """
    rows, known = [], {**VARIANTS, **TABLE7, **dict.fromkeys(TORCHVISION_MODELS, Scaling())}
    for name in names:
        if name not in known:
            raise unknown_name("network", name, known)
        pixels = round_resolution(known[name].resolution)
        with torch.device("meta"):
            model = create_model(name) if name in TORCHVISION_MODELS else EfficientNet(known[name])
        parts = cost_by_stage(model, pixels) if by_stage else {}
        parts["total"] = count_cost(model, pixels)
        rows += [{"network": name, "px": pixels, "part": part, **vars(cost)} for part, cost in parts.items()]
    table = pd.DataFrame(rows)
    return table if by_stage else table.drop(columns="part")


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
    jobs, threads, _ = plan_workers(len(runs), profile, device, jobs, threads)
    one_of_each, times, cores = {run.method: run for run in reversed(runs)}, {}, torch.get_num_threads()
    torch.set_num_threads(threads or cores)
    for method, run in one_of_each.items():
        print(f"measuring {method} at {run.config.resolution} px", flush=True)
        model, budget = run.model(len(data.classes)), seconds / len(one_of_each)
        times[method] = estimate_seconds(model, data, run.config, choose_device(device), budget)
    torch.set_num_threads(cores)
    rows = [
        {"method": run.method, "seed": run.seed, "status": run.state(), "px": run.config.resolution}
        | {"flops": run.cost.flops, "activations": run.cost.activations, "seconds": times[run.method]}
        for run in runs
    ]
    return pd.DataFrame(rows), jobs
