"""The study: execution of its notebooks, and the `effnet` command.

profiles/NAME.yaml says what is compared on which images by which recipe. `effnet study NAME` executes one
notebook per method and seed, each of which trains one network and writes results/NAME/runs/...; then the analysis
notebook reads all run records and writes tables, figures and verdicts. Profiles and runs are in effnet_runs.py,
statistics in effnet_stats.py; all of both is passed on here.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml

from effnet_data import NAMES, DamagedImages, data_root, describe_data, inspect_data, load_data, sample_grid
from effnet_execute import (  # noqa: F401 - some of them only passed on
    EXECUTORS,
    RETRIES,
    TRY_AGAIN,
    Execution,
    check_notebook,
    check_parameters,
    execute,
    execute_on_ray,
    gpus_per_run,
    run_notebook,
    shares,
    slurm_executor,
    submit_to_slurm,
)
from effnet_lib import (
    NEIGHBOURS,
    TABLE7,
    VARIANTS,
    EfficientNet,
    Held,
    Mismatch,
    Scaling,
    TrainConfig,
    choose_device,
    cost_by_stage,
    count_cost,
    create_model,
    device_name,
    gpu_count,
    hold,
    holder_of,
    recipe,
    round_resolution,
    unknown_name,
    write_json,
)
from effnet_live import Live, live_table, print_status, watch  # noqa: F401 - Live is passed on to the notebooks
from effnet_records import read_record, save_figure, save_table  # noqa: F401 - passed on to the notebooks
from effnet_runs import (  # noqa: F401 - some of them only passed on
    COEFFICIENTS,
    COLORS,
    NOTEBOOKS,
    PAPER_TABLE7,
    PHI,
    PURPOSES,
    RESULTS,
    ROOT,
    TIMES,
    TRAINED_BY,
    Candidate,
    Profile,
    Run,
    Search,
    color,
    describe_search,
    ending,
    family,
    figure8_lines,
    load_history,
    load_pilots,
    load_profile,
    load_runs,
    made_by,
    pilot,
    plan_model,
    plan_runs,
    plan_search,
    profile_names,
    rerun,
    searched_coefficients,
    text_color,
)
from effnet_stats import (  # noqa: F401 - some of them only passed on
    MARGIN,
    bootstrap,
    calibration,
    contrast_interval,
    holm,
    number,
    overall,
    paired_bootstrap,
    t_interval,
    verdict,
    welch_holm,
)
from effnet_use import check_on_imagenet, export, load_classifier, load_run, predict  # noqa: F401 - passed on

STYLE = NOTEBOOKS / "study.mplstyle"  # for matplotlib: plt.style.use(study.STYLE)


# ---- 1. The study --------------------------------------------------------------------------------------------------


def study(
    name: str,
    results: str | Path | None = None,
    *,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    device: str | None = None,
    retry: bool = False,
    analysis: bool | None = None,
    jobs: int | None = None,
    threads: int | None = None,
    executor: str = "local",
    stop: Path | None = None,
) -> int:
    """Execute a profile's notebooks, those of finished runs excepted. Returns 0 if all runs are finished, TRY_AGAIN if
    another process trains some of them, which are left to it, else 1. Raises Interrupted in time for $EFFNET_DEADLINE
    (Unix time), or once a file appears at `stop`: every run that was under way has a checkpoint then. Raises Mismatch,
    before anything is changed, if some runs are of another recipe than the profile's.

    jobs, threads: notebooks at a time and CPU threads of each; see `shares` for the defaults.
    retry: run failed and diverged runs again (their records are kept as run.earlier.json).
    analysis: whether to execute 00 and 05 (default: if they are missing, or a run was trained).
    executor: local, or ray: where runs and the search are executed.
    """
    profile = load_profile(name)
    name, place = _named(name), _place(results)
    runs = plan_runs(profile, results, methods, seeds)
    folder, todo = runs[0].folder, _to_do(runs, retry)
    waiting = [run for run in todo if run.state() == "waiting"]
    searching = _search_is_to_do(profile, folder, waiting)
    _refuse_stale(profile, results, searching)
    print(f"{profile.title}: {_count(runs)}, {len(todo)} to do ({profile.stamp})", flush=True)
    if todo:  # what is lacking is told once, and not by every notebook
        shares(len(todo), profile, device, jobs, threads)
        if executor == "local" and choose_device(device).index is not None and gpu_count() > 1:
            raise ValueError(f"device: {device!r}: every notebook has its own GPU; choose by $CUDA_VISIBLE_DEVICES")
        load_data(**profile.data)
    analysed = _prepare(runs, todo)
    kernels = {"device": device, "threads": threads, "executor": executor, "stop": stop}
    with live_table(profile, [*runs, *(_candidates(profile, results) if searching else ())]):
        _execute_runs(name, [run for run in todo if run not in waiting], place, jobs, **kernels)
        if searching and search(name, results, **kernels, retry=retry):
            _execute_runs(name, waiting, place, jobs, **kernels)
        finished = [run for run in runs if run.state() == "finished"]
        places = [run.directory for run in runs if run.state() != "waiting"]
        places += [folder / "search"] if searching else []
        held = [str(path) for path in places if holder_of(path) is not None]
        done = not held
        if finished and done and (not analysed.exists() if analysis is None else analysis):
            notebooks = {"00_architecture": {"profile": name, "explorer": False}, "05_analysis": {"profile": name}}
            executions = [
                Execution(f"{notebook}: executing", notebook, analysed.with_stem(notebook), given | place)
                for notebook, given in notebooks.items()
            ]
            try:
                with hold(folder):  # another study that ends now would write the same notebooks
                    done = execute(executions, *shares(len(executions), profile, "cpu"), stop=stop)
            except Held:
                done, held = False, [str(analysed)]
    print_status(profile, results, methods, seeds)
    if held:
        print(f"Another process is at work on {', '.join(held)}; when it has ended, the same command does the rest.")
        return TRY_AGAIN
    if not todo:
        print(_provenance(profile, results))
    if analysed.exists():
        print(_findings(profile, folder), flush=True)
    return 0 if len(finished) == len(runs) and done else 1


def _place(results: str | Path | None) -> dict[str, str]:
    """A notebook's parameter for results that go elsewhere."""
    return {} if results is None else {"results": str(Path(results).absolute())}


def _count(runs: Sequence[Run]) -> str:
    return f"{len(runs)} run{'s' * (len(runs) != 1)}"


def _to_do(runs: Sequence[Run], retry: bool) -> list[Run]:
    """The runs whose notebooks are to be executed; that of one that was killed after it had finished takes seconds."""
    return [run for run in runs if _is_to_do(run, retry) or (run.state() == "finished" and not run.executed.exists())]


def _refuse_stale(profile: Profile, results: str | Path | None, searching: bool) -> None:
    """Mismatch if runs of this profile, or candidates of a search that is to be made, are of other settings: their
    numbers and those to come must not meet in a table, nor may coefficients that networks were scaled by be lost."""
    runs = [*plan_runs(profile, results), *(_candidates(profile, results) if searching else ())]
    lines = [
        f"  {run.directory}: {'; '.join(run.differences(read_record(run.directory)))}"
        for run in runs
        if run.state() == "stale"
    ]
    coefficients, scaled = runs[0].folder / COEFFICIENTS, runs[0].folder.glob("runs/compound_searched*/run.json")
    if searching and any(run.waiting for run in runs) and coefficients.exists() and any(scaled):
        lines.append(f"  {coefficients}: of another search or recipe, and there are networks scaled by it")
    if lines:
        raise Mismatch(
            "\n".join([f"the profile {profile.name} has changed since these were made:", *lines])
            + "\nNothing was touched. Set the profile back; delete these, to make them anew; or keep them and give "
            "another folder for results: --results DIR"
        )


def _prepare(runs: Sequence[Run], todo: Sequence[Run]) -> Path:
    """Make the study's folder ready for runs that are to do; where the analysis goes."""
    folder = runs[0].folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):  # can it be written to at all?
        pass
    for run in todo:
        if run.state() == "failed" or (run.state() == "diverged" and not run.to_retry):
            run.set_aside()
    analysed = _analysed(folder)
    if todo or any(run.state() == "damaged" for run in runs):
        analysed.unlink(missing_ok=True)  # it will be out of date, and is missed if we do not come to it
    return analysed


def _analysed(folder: Path) -> Path:
    return folder / "notebooks" / "05_analysis.ipynb"


def _findings(profile: Profile, folder: Path) -> str:
    """What the analysis has found, in a few lines, and where all of it is."""
    lines, verdict_file, table = [], folder / "tables" / "verdict.json", folder / "tables" / "ablation.csv"
    if profile.ablation_of and table.exists():
        rows = pd.read_csv(table).itertuples()
        lines = [f"{row.what} ({row.weights}): {row.difference:+.2f} points by {row.change}" for row in rows]
    elif verdict_file.exists():
        claims = json.loads(verdict_file.read_text())["claims"]
        lines = [f"{claim}: {outcome}" for claim, outcome in claims.items()]
    return "\n".join(["", *lines, f"({profile.stamp}) All of it: {folder / 'README.md'}"])


def _search_is_to_do(profile: Profile, folder: Path, waiting: Sequence[Run]) -> bool:
    """Whether runs wait for its coefficients, or its notebook was lost."""
    searched = folder / "notebooks" / "03_coefficient_search.ipynb"
    lost = (folder / COEFFICIENTS).exists() and (folder / "search").exists() and not searched.exists()
    return bool(waiting) or (lost and profile.search is not None)


def _execute_runs(
    name: str,
    runs: Sequence[Run],
    place: Mapping,
    jobs: int | None,
    device: str | None,
    threads: int | None,
    executor: str,
    stop: Path | None,
) -> None:
    if runs:
        profile = runs[0].profile
        several = executor != "local" or shares(len(runs), profile, device, jobs, threads)[0] > 1
        executions = _executions(name, _longest_first(runs) if several else runs, place, device)
        _execute(executions, profile, device, jobs, threads, executor, stop)


def _executions(name: str, runs: Sequence[Run], place: Mapping, device: str | None) -> list[Execution]:
    """The notebook of each run."""
    executions = []
    for i, run in enumerate(runs, 1):
        about = f"[{i}/{len(runs)}] {run.method}, seed {run.seed}, {run.config.resolution} px"
        parameters = {"profile": name, "method": run.method, "seed": run.seed, "device": device, **place}
        notebook = TRAINED_BY[family(run.method)]
        executions.append(Execution(about, notebook, run.executed, parameters, run.directory))
    return executions


def _execute(
    executions: Sequence[Execution],
    profile: Profile,
    device: str | None,
    jobs: int | None,
    threads: int | None,
    executor: str,
    stop: Path | None,
) -> bool:
    """Execute trainings where `executor` does that."""
    if executor == "ray":
        gpus = 0 if device == "cpu" else gpus_per_run(profile, 1)
        return execute_on_ray(executions, jobs, threads, gpus, stop, optional=device is None)
    jobs, threads = shares(len(executions), profile, device, jobs, threads)
    if jobs > 1:
        print(f"{jobs} at a time, {threads or 'all'} CPU thread{'s' * (threads != 1)} each", flush=True)
    gpus = gpu_count(device)
    return execute(executions, jobs, threads, gpus_per_run(profile, gpus) if gpus else 0, stop)


def submit(
    name: str,
    results: str | Path | None = None,
    *,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    device: str | None = None,
    retry: bool = False,
    analysis: bool | None = None,
    jobs: int | None = None,
    threads: int | None = None,
    seconds: float = 3600,
) -> list:
    """Hand a profile's study over to Slurm, and return at once; the submitted jobs of submitit.

    One array job executes the notebooks of the runs, and 03 if there are coefficients to search for; each element has
    `seconds`, is queued again when they are up, and goes on. A job after it, `study` on one node, trains what waited
    for coefficients and does the analysis. A run has the profile's devices, as GPUs of one node (auto: one), unless
    `device` is "cpu". ValueError if `seconds` are too few to stop in.
    """
    profile = load_profile(name)
    name, place = _named(name), _place(results)
    runs = plan_runs(profile, results, methods, seeds)
    folder, todo = runs[0].folder, _to_do(runs, retry)
    ready = [run for run in todo if run.state() != "waiting"]
    searching = _search_is_to_do(profile, folder, [run for run in todo if run not in ready])
    _refuse_stale(profile, results, searching)
    if not todo and (_analysed(folder).exists() if analysis is None else not analysis):
        return []
    slurm = slurm_executor(folder, seconds)  # refuses before anything is changed
    _prepare(runs, todo)
    executions = _executions(name, _longest_first(ready), place, device)
    if searching:
        executions.append(_search_execution(name, results, device, retry))
    gpus = 0 if device == "cpu" else gpus_per_run(profile, 1)
    closing = {"methods": methods, "seeds": seeds, "device": device, "threads": threads, "analysis": analysis}
    options = {"seconds": seconds, "jobs": jobs, "threads": threads, "gpus": gpus}
    return submit_to_slurm(slurm, executions, _close, (name, results, closing), folder, **options)


def _close(name: str, results: str | Path | None, options: Mapping, stop: Path) -> bool:
    """What is left of a study after its array job."""
    return study(name, results, **options, stop=stop) == 0


def _named(name: str | Path) -> str:
    """A profile as a kernel, which starts in another folder, can be told it."""
    return str(Path(name).absolute()) if str(name).endswith(".yaml") else str(name)


def search(
    name: str | Path,
    results: str | Path | None = None,
    *,
    device: str | None = None,
    threads: int | None = None,
    retry: bool = False,
    executor: str = "local",
    stop: Path | None = None,
) -> bool:
    """Execute 03_coefficient_search for a profile, which writes its coefficients.json. False if that failed.

    retry: train failed and diverged candidates again (their records are kept as run.earlier.json).
    executor, stop: as in `study`.
    """
    profile, execution = load_profile(name), _search_execution(name, results, device, retry)
    return _execute([execution], profile, device, 1, threads, executor, stop)


def _search_execution(name: str | Path, results: str | Path | None, device: str | None, retry: bool) -> Execution:
    profile = load_profile(name)
    candidates = _candidates(profile, results)
    _refuse_stale(profile, results, True)
    folder, parameters = candidates[0].folder, {"profile": _named(name), "device": device, **_place(results)}
    for candidate in candidates if retry and holder_of(folder / "search") is None else ():
        if candidate.state() in ("failed", "diverged"):
            candidate.set_aside()
    output, count = folder / "notebooks" / "03_coefficient_search.ipynb", len({c.name for c in candidates})
    return Execution(f"coefficient search: {count} candidates", output.stem, output, parameters, folder / "search")


def _candidates(profile: Profile, results: str | Path | None) -> list[Candidate]:
    """All that a profile's search may train, with each of its seeds."""
    _, candidates = plan_search(profile, results)
    return [dataclasses.replace(c, seed=seed) for seed in profile.search.seeds for c in candidates]


def _is_to_do(run: Run, retry: bool = False) -> bool:
    """Whether it has not ended. One that failed or diverged has, and is never silently run again; nor is one made anew
    whose record is damaged, for that cannot be told from a lost result."""
    state = run.state()
    if state in ("failed", "diverged"):
        return retry or (state == "diverged" and run.to_retry)
    return state not in ("finished", "damaged")


def _longest_first(runs: Sequence[Run]) -> list[Run]:
    """Seed by seed: the baseline, whose curve the others draw, then the costliest, to end with short ones."""
    seeds = [run.seed for run in runs]
    return sorted(runs, key=lambda run: (seeds.index(run.seed), run.method != "baseline", -run.cost.activations))


def _provenance(profile: Profile, results: str | Path | None) -> str:
    """Who made the runs that are there, when, on what, and how to repeat them."""
    table = load_runs(profile, results).query("status == 'finished'")
    if table.empty:
        return "No run has finished."
    folder = Path(results or RESULTS).absolute() / profile.name
    log = ["git", "log", "-1", "--format=committed by %an on %as", "--", str(folder)]
    made = subprocess.run(log, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "made here, not committed"
    first, last = table["started"].min()[:10], table["ended"].max()[:10]
    return (
        f"\nThese {len(table)} runs are finished: {made}; run {first}{'' if first == last else f' to {last}'} "
        f"on {', '.join(table['device'].unique())}, code {', '.join(str(c)[:10] for c in table['commit'].unique())}.\n"
        f"To repeat them elsewhere: {profile.command('study')} --results DIR"
    )


def plan(
    name: str | Path,
    results: str | Path | None = None,
    *,
    device: str | None = None,
    jobs: int | None = None,
    threads: int | None = None,
    seconds: float = 60,
) -> pd.DataFrame:
    """The profile's runs that are still to do, a row each, with an image's flops and activations and the run's seconds
    here: `seconds` go on a few steps of each method's training. Starting notebooks and reading images are not in it."""
    profile = load_profile(name)
    runs = [run for run in plan_runs(profile, results) if _is_to_do(run)]
    waiting = [run for run in runs if run.state() == "waiting"]
    if waiting:
        print(f"not counted, for want of coefficients: {_count(waiting)}; {waiting[0].command('search')}")
    runs = [run for run in runs if run not in waiting]
    if runs:
        data = load_data(**profile.data, download=False)
    device = choose_device(device)
    _, threads = shares(len(runs), profile, device.type, jobs, threads)
    from effnet_speed import estimate_seconds  # with its peers from other libraries

    cores = torch.get_num_threads()
    torch.set_num_threads(threads or cores)
    one_of_each, times = {run.method: run for run in reversed(runs)}, {}
    try:
        for method, run in one_of_each.items():
            print(f"measuring {method} at {run.config.resolution} px", flush=True)
            model, budget = run.model(len(data.classes)), seconds / len(one_of_each)
            times[method] = estimate_seconds(model, data, run.config, device, budget)
    finally:
        torch.set_num_threads(cores)
    return pd.DataFrame(
        {"method": run.method, "seed": run.seed, "status": run.state(), "px": run.config.resolution}
        | {"flops": run.cost.flops, "activations": run.cost.activations, "seconds": times[run.method]}
        for run in runs
    )


def print_plan(table: pd.DataFrame, jobs: int) -> None:
    """`plan` for people, with the total."""
    if table.empty:
        print("Nothing is to do: all runs that can start have ended.")
        return
    shown = table.assign(
        flops=(table["flops"] / 1e9).map("{:.4f}".format),
        activations=(table["activations"] / 1e6).map("{:.3f}".format),
        seconds=[str(timedelta(seconds=round(s))) for s in table["seconds"]],
    ).rename(columns={"flops": "FLOPs (B)", "activations": "activations (M)", "seconds": "time"})
    print(shown.to_string(index=False))
    total = table["seconds"].sum()
    together = f", about {timedelta(seconds=round(total / jobs))} at {jobs} at a time" if jobs > 1 else ""
    print(f"{len(table)} runs, {timedelta(seconds=round(total))} one after the other{together}", flush=True)


def ablation(profile: Profile, results: str | Path | None = None) -> tuple[str, pd.DataFrame]:
    """The change that an ablation makes to the recipe of the profile it is one of, in words; and what that does to test
    top-1 over seeds: a row per method, and a row for the lead of each over the baseline, with the means as it is and
    changed, their difference with Welch's 95 % interval, and the mean of all seeds as it is, from which a few seeds may
    be far. First all of them by the moving average, which is what a study scores, then by the weights of the last step.
    An ablation without the baseline treats only its own methods otherwise: the baseline of their lead stays as it is,
    and the words say so. Only seeds are compared that have finished in both, and not with a lower learning rate after
    they had diverged.
    """
    whole = load_profile(profile.ablation_of)
    then, now = (recipe(dataclasses.asdict(TrainConfig.from_dict(p.train))) for p in (whole, profile))
    words = {name: (f"{v:g}" if isinstance(v, float) else str(v) for v in (then[name], now[name])) for name in now}
    change = ", ".join(f"{name} {' to '.join(words[name])}" for name in now if now[name] != then[name])
    if "baseline" not in profile.methods:
        change += f" of {', '.join(profile.methods)} alone"
    finished = [load_runs(p, results).query("status == 'finished'") for p in (whole, profile)]
    rows = []
    for weights, score in (("moving average", "top1"), ("last step", "raw_top1")):
        before, after = (_by_seed(runs, score) for runs in finished)
        methods = [method for method in after if method in before]
        if "baseline" not in profile.methods:
            after = after | {m: scores for m, scores in before.items() if m == "baseline"}
        leads = [(m, "baseline") for m in methods if m != "baseline" and "baseline" in set(before) & set(after)]
        for method, other in [*((method, None) for method in methods), *leads]:
            signs = {method: 1} | ({other: -1} if other else {})
            seeds = sorted(set.intersection(*(set(runs[m]) for runs in (before, after) for m in signs)))
            if not seeds:
                continue
            row = {"weights": weights, "what": f"{method} - {other}" if other else method, "n": len(seeds)}
            scores = {
                (way, m): np.array([runs[m][s] for s in seeds])
                for way, runs in ((-1, before), (1, after))
                for m in signs
            }
            for name, way in (("as_it_is", -1), ("changed", 1)):
                row[name] = sum(sign * scores[way, m].mean() for m, sign in signs.items())
            row["all_seeds_as_it_is"] = sum(sign * np.mean([*before[m].values()]) for m, sign in signs.items())
            terms = [(way * signs[m], values) for (way, m), values in scores.items() if m in profile.methods]
            rows.append(row | dict(zip(("difference", "low", "high"), contrast_interval(terms), strict=True)))
    return change, pd.DataFrame(rows)


def _by_seed(runs: pd.DataFrame, score: str) -> dict[str, dict[int, float]]:
    """A score of finished runs by method and seed, without those that were retried."""
    groups = runs[~runs["retried"].astype(bool)].groupby("method", sort=False) if len(runs) else ()
    return {method: dict(zip(group["seed"], group[score], strict=True)) for method, group in groups}


def bench(
    results: str | Path | None = None, *, device: str | None = None, rounds: int = 15, models: bool = False
) -> None:
    """Execute 06_throughput on this device, or 07_models; print its tables, which lie in RESULTS/throughput/DEVICE/."""
    kind = choose_device(device)
    folder, notebook = throughput_folder(kind, results), "07_models" if models else "06_throughput"
    parameters = {"device": kind.type, "results": results and str(Path(results).absolute())}
    run_notebook(notebook, folder / f"{notebook}.ipynb", parameters | ({} if models else {"rounds": rounds}))
    for name in ("models",) if models else ("peers", "methods"):
        print(f"\n{pd.read_csv(folder / f'{name}.csv').to_string(index=False, na_rep='-')}", flush=True)


def throughput_folder(device: torch.device, results: str | Path | None = None) -> Path:
    """Where measurements of this device go."""
    name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return Path(results or RESULTS).absolute() / "throughput" / name


# ---- 2. The command ------------------------------------------------------------------------------------------------


def _cost_table(
    names: Sequence[str], resolution: int | None, num_classes: int, stem_stride: int, by_stage: bool
) -> str:
    """Networks with their cost, a row each, or a row for each of their parts and their sum."""
    rows = []
    for name in names:
        scaling = {**VARIANTS, **TABLE7, **dict.fromkeys(NEIGHBOURS, Scaling())}.get(name)
        if scaling is None:
            raise unknown_name("network", name, {**VARIANTS, **TABLE7, **NEIGHBOURS})
        pixels = round_resolution(scaling.resolution, resolution or 224)
        with torch.device("meta"):
            model = None if name in NEIGHBOURS else EfficientNet(scaling, num_classes, stem_stride=stem_stride)
            model = model or create_model(name, num_classes, stem_stride=stem_stride)
        head = {"network": name, "px": pixels}
        if by_stage:
            rows += [{**head, "part": p, **dataclasses.asdict(c)} for p, c in cost_by_stage(model, pixels).items()]
            head["part"] = "total"
        rows.append(head | dataclasses.asdict(count_cost(model, pixels)))
    return pd.DataFrame(rows).to_string(
        index=False, formatters=dict.fromkeys(["params", "flops", "activations"], "{:,}".format)
    )


def _train(args: argparse.Namespace) -> None:
    """effnet train: a method of a profile, or a network by its name on a data set."""
    words = [word for word in args.words if "=" not in word]
    changes = _settings(word for word in args.words if "=" in word)
    dataset, name = args.dataset, args.model
    if words and (dataset or name):
        raise ValueError(f"train: {words[0]!r} and --model or --dataset say the same; give one of them")
    if len(words) > 2:
        raise ValueError(f"train: expected PROFILE METHOD, and settings as NAME=VALUE, got {' '.join(words)!r}")
    dataset, name = (*words, None, None)[:2] if words else (dataset, name)
    if not dataset or not name:
        raise ValueError("train: expected PROFILE METHOD, or --model NAME --dataset NAME; see effnet train --help")
    changes |= {key: True for key in ("pretrained", "freeze") if getattr(args, key)}
    if name in (*VARIANTS, *NEIGHBOURS):
        options = {"seed": args.seed, "pixels": args.resolution, "changes": changes}
        run = plan_model(name, dataset, args.results, **options)
    elif changes or args.resolution:
        raise ValueError(
            f"train: {name} is a method of the study, whose recipe is its profile's; copy that to change it"
        )
    elif name not in TRAINED_BY and not PHI.fullmatch(name) and not TIMES.fullmatch(name):
        others = ("compound_phi2.5", "depth_x8", *VARIANTS, *NEIGHBOURS)
        raise unknown_name("method or model", name, [*TRAINED_BY, *others])
    else:
        run = Run.plan(dataset, name, args.seed, args.results)
    run.train(load_data(**run.profile.data), args.device)
    if os.environ.get("RANK", "0") == "0":  # the first process under torchrun
        print(f"written to {run.directory}")


def _predict(args: argparse.Namespace) -> int:
    """effnet predict: classes and probabilities, a block for each file. 2 if one of them could not be read."""
    device = choose_device(args.device)
    damaged = 0
    for file, answer in predict(load_classifier(args.network), args.files, args.top, device):
        if isinstance(answer, Exception):
            damaged += 1
            print(f"effnet: {file} cannot be read as an image: {answer}", file=sys.stderr)
            continue
        print(file)
        for name, probability in answer:
            print(f"  {100 * probability:6.2f} %  {name}")
    return 2 if damaged else 0


def report_data(name: str, root: str | None, size: int | None, classes: int | None, output: str | None) -> int:
    """Say what a data set is, in words, and in NAME.json and NAME.png in `output`. Damaged images are named, and 2."""
    try:
        data = load_data(name, root, size=size, classes=classes)
    except DamagedImages as error:
        print("\n".join(f"{path}: {reason}" for path, reason in error.files))
        print(f"{len(error.files)} files cannot be read as an image; repair or remove them")
        return 2
    folder = Path(output or data_root(root) / "reports")
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{name}-{len(data.classes)}-{data.images.shape[1]}px"
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-")
    facts = inspect_data(data)
    print(describe_data(facts))
    write_json(folder / f"{stem}.json", facts)
    sample_grid(data).savefig(folder / f"{stem}.png", dpi=150)
    print(f"  written to {folder / stem}.json and .png")
    return 2 if facts["cache"] and facts["cache"]["damaged_blocks"] else 0


def _settings(words: Iterable[str]) -> dict[str, object]:
    """NAME=VALUE words as settings, their values read as in a profile."""
    pairs = [word.partition("=") for word in words]
    for name, equals, _ in pairs:
        if not (name and equals):
            raise ValueError(f"expected NAME=VALUE, such as lr=0.05, got {name + equals!r}")
    return {name: yaml.safe_load(value) for name, _, value in pairs}


def _duration(text: str) -> float:
    """Seconds of 90, 90s, 9m, 1h30m."""
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", text)
    if not text or match is None:
        raise argparse.ArgumentTypeError(f"expected a time such as 90s, 9m or 1h30m, got {text!r}")
    hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return 3600 * hours + 60 * minutes + seconds


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt("the time is up" if signum == signal.SIGALRM else "interrupted")


def main(arguments: Sequence[str] | None = None) -> int:
    """The `effnet` command."""
    parser = argparse.ArgumentParser(
        prog="effnet", description="A reproduction study of EfficientNet's compound scaling."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    known = f"a profile: {', '.join(profile_names())}, or a .yaml file"

    def command(name: str, text: str, profile: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        if profile:
            sub.add_argument("profile", help=known)
            sub.add_argument("--results", metavar="DIR", help="where results go, instead of results/")
        return sub

    sub = command("study", "execute all notebooks of a profile")
    sub.add_argument("--methods", nargs="+", help="only these methods of the profile")
    sub.add_argument("--seeds", nargs="+", type=int, help="only these seeds of the profile")
    sub.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")
    sub.add_argument("--retry", action="store_true", help="run failed and diverged runs again")
    text = "execute the analysis even if nothing was trained, or not at all (default: if something was)"
    sub.add_argument("--analysis", action=argparse.BooleanOptionalAction, help=text)
    sub.add_argument("--jobs", type=int, help="notebooks at a time (default: one per GPU, on a CPU one per core)")
    sub.add_argument("--threads", type=int, help="CPU threads of each (default: the cores, shared)")
    text = (
        "where notebooks are executed: here; on the Ray cluster at $RAY_ADDRESS, or one of this machine alone; or by "
    )
    text += "Slurm, as one array job that is queued again whenever its --time-budget (default: 1h) is up"
    sub.add_argument("--executor", choices=EXECUTORS, default="local", help=text)
    events = "write event files for TensorBoard too, in tensorboard/ of each run's folder"
    sub.add_argument("--tensorboard", action="store_true", help=events)
    budget = f"such as 9m: stop in time, with checkpoints and exit status {TRY_AGAIN}; the same command continues"
    sub.add_argument("--time-budget", type=_duration, metavar="TIME", help=budget)
    states = "finished, running, interrupted, failed, diverged, stale, damaged, missing, waiting for a search"
    sub = command("status", f"list a profile's runs with epochs, scores, speed and time left: {states}")
    sub.add_argument("--watch", action="store_true", help="keep it up to date until all runs have ended")
    sub = command("plan", "list the runs that are to do, with their cost and the time they will take on this device")
    sub.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")
    sub.add_argument("--jobs", type=int, help="notebooks at a time (default: as effnet study)")
    sub.add_argument("--threads", type=int, help="CPU threads of each (default: as effnet study)")
    sub.add_argument("--seconds", type=float, default=60, help="time to spend on measuring (default: 60)")
    sub = command("search", "search for alpha, beta and gamma on the profile's baseline, by its minival score")
    sub.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")
    sub.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    sub.add_argument("--retry", action="store_true", help="train failed and diverged candidates again")
    sub.add_argument("--time-budget", type=_duration, metavar="TIME", help=budget)
    sub = command("bench", "time training steps of ours and of others' B0 side by side on this device", profile=False)
    sub.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")
    sub.add_argument("--rounds", type=int, default=15, help="rounds of measurements of 06 (default: 15)")
    sub.add_argument("--models", action="store_true", help="instead: b0 to b7 and neighbours, cost and speed")
    sub.add_argument("--results", metavar="DIR", help="where results go, instead of results/")
    text = "train one method and seed of a profile, or a network by its name on a data set, without a notebook"
    sub = command("train", text, profile=False)
    words = "PROFILE METHOD, or PROFILE MODEL; of a model's recipe also NAME=VALUE, such as epochs=5"
    sub.add_argument("words", nargs="*", metavar="PROFILE METHOD", help=words)
    sub.add_argument("--model", help=f"instead: {', '.join([*VARIANTS, *NEIGHBOURS])}")
    sub.add_argument("--dataset", help=f"and a profile, for its data and recipe, or one of {', '.join(NAMES)}")
    sub.add_argument(
        "--pretrained", action="store_true", help="begin with torchvision's ImageNet weights and a new head"
    )
    sub.add_argument("--freeze", action="store_true", help="train the head alone")
    sub.add_argument("--resolution", type=int, help="pixels of a model's input (default: the profile's)")
    sub.add_argument("--results", metavar="DIR", help="where results go, instead of results/")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--tensorboard", action="store_true", help=events)
    sub.add_argument("--time-budget", type=_duration, metavar="TIME", help=budget)
    sub.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")
    sub = command("pilot", "train the baseline with changed settings, scored on minival alone, to choose a recipe by")
    sub.add_argument("changes", nargs="*", metavar="NAME=VALUE", help="settings of the recipe, such as lr=0.05")
    sub.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")
    sub = command("rerun", "train again what a run.json describes, and compare", profile=False)
    sub.add_argument("record", help="a run.json")
    sub.add_argument("--results", metavar="DIR", default="rerun", help="where results go (default: rerun/)")
    sub.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")
    sub = command("cost", "count parameters, FLOPs (multiply-adds) and activations", profile=False)
    known_networks = "b0 to b7, a Table 7 row such as compound, or resnet50, resnet152, densenet201"
    sub.add_argument("networks", nargs="+", metavar="NETWORK", help=known_networks)
    sub.add_argument("--by-stage", action="store_true", help="a row for each part, and their sum")
    sub.add_argument("--resolution", type=int, help="pixels at resolution coefficient 1 (default: 224)")
    sub.add_argument("--classes", type=int, default=1000)
    sub.add_argument("--stem-stride", type=int, default=2, choices=(1, 2))
    sub = command("data", "fetch a data set if it is missing, check every image, and say what it is", profile=False)
    sub.add_argument("name", help=f"one of {', '.join(NAMES)}")
    sub.add_argument("--root", metavar="DIR", help="where data lies (default: $EFFNET_DATA, else ./data)")
    sub.add_argument(
        "--size", type=int, help="pixels of a side at which images are stored (default: the data set's own)"
    )
    sub.add_argument("--classes", type=int, help="only the first so many classes")
    sub.add_argument("--output", metavar="DIR", help="for NAME.json and NAME.png, a grid (default: reports/ in there)")
    trained = "a finished run's folder, or b0 to b7 or a neighbour for its ImageNet weights"
    sub = command("predict", "say what is on images: classes with their probabilities", profile=False)
    sub.add_argument("network", metavar="RUN", help=trained)
    sub.add_argument("files", nargs="+", metavar="IMAGE")
    sub.add_argument("--top", type=int, default=5, help="how many classes (default: 5)")
    sub.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")
    sub = command("export", "write a trained network as ONNX or torch.export program, and verify it", profile=False)
    sub.add_argument("network", metavar="RUN", help=trained)
    sub.add_argument("--output", metavar="FILE", help="NAME.onnx or NAME.pt2 (default: model.onnx in the run's folder)")
    text = (
        "score pretrained weights in our network on ImageNet's validation images, beside torchvision's published top-1"
    )
    sub = command("evaluate", text, profile=False)
    sub.add_argument("model", choices=[*VARIANTS, *NEIGHBOURS])
    sub.add_argument("--root", metavar="DIR", help="holds imagenet/val/ (default: $EFFNET_DATA, else ./data)")
    sub.add_argument("--images", type=int, help="only so many, drawn at random (default: all 50,000)")
    sub.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")
    args, rest = parser.parse_known_args(arguments)
    if args.command == "train":  # argparse takes words only where they stand together
        args.words += [word for word in rest if not word.startswith("-")]
        rest = [word for word in rest if word.startswith("-")]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")

    # A scheduler's SIGTERM must reach the kernel as an interrupt; a background shell starts us with SIGINT ignored.
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    by_slurm = getattr(args, "executor", None) == "slurm"
    if getattr(args, "tensorboard", False):
        if importlib.util.find_spec("tensorboard") is None:
            parser.error("TensorBoard is not installed; pip install 'effnet-study[tensorboard]'")
        os.environ["EFFNET_TENSORBOARD"] = "1"  # for the kernels
    if getattr(args, "time_budget", None) is not None and not by_slurm:
        os.environ["EFFNET_DEADLINE"] = str(time.time() + args.time_budget)  # for the kernels too
        if args.command in ("study", "search"):  # for what does not look at the clock, such as a compiler
            signal.signal(signal.SIGALRM, _interrupt)
            signal.setitimer(signal.ITIMER_REAL, args.time_budget)
    try:
        if args.command == "study":
            names = ("methods", "seeds", "device", "retry", "analysis", "jobs", "threads")
            options = {name: getattr(args, name) for name in names}
            if by_slurm:
                jobs = submit(args.profile, args.results, **options, seconds=args.time_budget or 3600)
                last = f", the last of which, {jobs[-1].job_id}, waits for the others" if len(jobs) > 1 else ""
                how_far = load_profile(args.profile).command("status", args.results)
                print(f"submitted {len(jobs)} jobs{last}; how far they are: {how_far} --watch")
            else:
                return study(args.profile, args.results, **options, executor=args.executor)
        elif args.command == "status":
            (watch if args.watch else print_status)(load_profile(args.profile), args.results)
        elif args.command == "plan":
            chosen = {name: getattr(args, name) for name in ("device", "jobs", "threads")}
            table = plan(args.profile, args.results, seconds=args.seconds, **chosen)
            print_plan(table, shares(len(table), load_profile(args.profile), **chosen)[0])
        elif args.command == "search":
            options = {name: getattr(args, name) for name in ("device", "threads", "retry")}
            profile = load_profile(args.profile)
            candidates = _candidates(profile, args.results)
            with live_table(profile, candidates):
                done = search(args.profile, args.results, **options)
            if not done:
                return 1 if holder_of(candidates[0].folder / "search") is None else TRY_AGAIN
            found = json.loads((candidates[0].folder / COEFFICIENTS).read_text())
            print(f"{describe_search(found)} ({found['stamp']})")
        elif args.command == "bench":
            bench(args.results, device=args.device, rounds=args.rounds, models=args.models)
        elif args.command == "train":
            _train(args)
        elif args.command == "pilot":
            pilot(args.profile, _settings(args.changes), args.results, args.device)
            print(load_pilots(args.profile, args.results).to_string(index=False, na_rep="-"))
        elif args.command == "rerun":
            print(rerun(args.record, args.results, args.device).to_string(na_rep="-"))
        elif args.command == "cost":
            print(_cost_table(args.networks, args.resolution, args.classes, args.stem_stride, args.by_stage))
        elif args.command == "predict":
            return _predict(args)
        elif args.command == "export":
            folder = Path(args.network).parent if args.network.endswith("run.json") else Path(args.network)
            output = args.output or (folder / "model.onnx" if folder.is_dir() else f"{args.network}.onnx")
            difference = export(args.network, output)
            print(f"written to {output}; its logits differ from the network's by {difference:.1e} of the greatest")
        elif args.command == "evaluate":
            scores = check_on_imagenet(args.model, args.root, images=args.images, device=args.device)
            print("{images:,} images: top-1 {top1:.3f} %, top-5 {top5:.3f} %".format(**scores))
            print(
                "published by torchvision: top-1 {published_top1:.3f} %, top-5 {published_top5:.3f} %".format(**scores)
            )
        else:
            return report_data(args.name, args.root, args.size, args.classes, args.output)
        return 0
    except (ValueError, OSError, RuntimeError) as error:
        print(f"effnet: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"effnet: {str(error) or 'interrupted'}; the same command continues", file=sys.stderr)
        return TRY_AGAIN
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    sys.exit(main())
