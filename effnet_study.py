"""The study: profiles, planned runs, execution of the notebooks, and the `effnet` command.

profiles/NAME.yaml says what is compared on which images by which recipe. `effnet study NAME` executes one
notebook per method and seed, each of which trains one network and writes results/NAME/runs/...; then the analysis
notebook reads all run records and writes tables, figures and verdicts.
"""

import argparse
import ast
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, cached_property
from pathlib import Path

import filelock
import nbformat
import pandas as pd
import torch
import yaml
from torch.distributed.elastic.multiprocessing.errors import record as elastic_record

from effnet_data import CLASS_COUNTS, ImageData, load_data
from effnet_lib import (
    SCHEMA_VERSION,
    TABLE7,
    VARIANTS,
    Cost,
    EfficientNet,
    Scaling,
    TrainConfig,
    device_name,
    estimate_seconds,
    launch,
    match_flops,
    read_record,
    recipe,
    round_resolution,
    scaled_cost,
    train,
    unknown_name,
    write_json,
)
from effnet_records import save_figure, save_table  # noqa: F401 - passed on to the notebooks
from effnet_statistics import (  # noqa: F401 - passed on to the notebooks
    MARGIN,
    holm,
    overall,
    paired_bootstrap,
    t_interval,
    verdict,
    welch_holm,
)

ROOT = Path(__file__).resolve().parent
NOTEBOOKS, RESULTS = ROOT / "notebooks", ROOT / "results"
STYLE = NOTEBOOKS / "study.mplstyle"  # for matplotlib: plt.style.use(study.STYLE)

# The notebook that trains each method, and the method's colour (Okabe and Ito's, told apart by the colour-blind).
TRAINED_BY = {
    "baseline": "01_baseline_b0",
    **dict.fromkeys(["depth", "width", "resolution"], "02_single_axis_scaling"),
    **dict.fromkeys(["depth_matched", "width_matched", "resolution_matched"], "02_single_axis_scaling"),
    "compound": "04_compound_scaling",
}
COLORS = {
    "baseline": "#000000",
    **dict.fromkeys(["depth", "depth_matched"], "#0072B2"),
    **dict.fromkeys(["width", "width_matched"], "#E69F00"),
    **dict.fromkeys(["resolution", "resolution_matched"], "#009E73"),
    "compound": "#D55E00",
}
# Table 7 as published: FLOPs (multiply-adds) and ImageNet top-1 in percent. arXiv 1905.11946v5.
PAPER_TABLE7 = {
    "baseline": (0.4e9, 77.3),
    "depth": (1.8e9, 79.0),
    "width": (1.8e9, 78.9),
    "resolution": (1.9e9, 79.1),
    "compound": (1.8e9, 81.1),
}
PURPOSES = {
    "check": "pipeline check, not evidence",
    "exploratory": "exploratory: fewer seeds, data or epochs than a claim needs",
    "evidence": "evidence, by the rules fixed before the runs",
}


# ---- 1. Profiles and planned runs ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Profile:
    """One study: what is compared, on which images, by which recipe. Made by `load_profile`."""

    name: str
    title: str
    purpose: str  # one of PURPOSES
    data: dict  # arguments of load_data
    base_resolution: int  # pixels at resolution coefficient 1
    stem_stride: int
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    train: dict  # TrainConfig, without resolution and seed
    devices: int | str = 1  # processes that share each batch of a run, or "auto": one for every GPU

    @property
    def stamp(self) -> str:
        """What every table and figure of this study must say of itself."""
        return PURPOSES[self.purpose]

    @property
    def num_classes(self) -> int:
        known = self.data.get("classes") or CLASS_COUNTS.get(self.data["name"])
        if known is None:
            raise ValueError(f"{self.name}: data: say how many classes {self.data['name']} has (classes: N)")
        return known

    def scaling(self, method: str) -> Scaling:
        """The method's coefficients: the paper's, or for NAME_matched those that cost as much as compound."""
        axis, _, matched = method.partition("_")
        if method not in TRAINED_BY:
            raise unknown_name("method", method, TRAINED_BY)
        if not matched:
            return TABLE7[method]
        return _matched(axis, self.base_resolution, self.num_classes, self.stem_stride)

    def config(self, method: str, seed: int) -> TrainConfig:
        """The recipe, the same for every method but for its resolution."""
        resolution = round_resolution(self.scaling(method).resolution, self.base_resolution)
        return TrainConfig.from_dict({**self.train, "resolution": resolution, "seed": seed})


@cache
def _matched(axis: str, base_resolution: int, num_classes: int, stem_stride: int) -> Scaling:
    target = scaled_cost(TABLE7["compound"], base_resolution, num_classes, stem_stride).flops
    return match_flops(axis, target, base_resolution, num_classes=num_classes, stem_stride=stem_stride).scaling


def profile_names() -> list[str]:
    return sorted(path.stem for path in (NOTEBOOKS / "profiles").glob("*.yaml"))


def load_profile(name: str | Path) -> Profile:
    """A profile by name (notebooks/profiles/NAME.yaml) or by path (any file that ends in .yaml).

    Raises ValueError naming the file, the key, what was expected and what was found.
    """
    path = Path(name)
    if path.suffix != ".yaml":
        if str(name) not in profile_names():
            raise unknown_name("profile", str(name), profile_names())
        path = NOTEBOOKS / "profiles" / f"{name}.yaml"
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"profile {path}: cannot be read: {error}") from None
    try:
        return _checked_profile(path.stem, values)
    except ValueError as error:
        raise ValueError(f"profile {path.name}: {error}") from None


def _checked_profile(name: str, values: object) -> Profile:
    kinds = {"title": str, "purpose": str, "data": dict, "base_resolution": int, "stem_stride": int}
    kinds |= {"methods": list, "seeds": list, "train": dict, "devices": int | str}
    if not isinstance(values, dict):
        raise ValueError(f"expected keys and values, got {values!r}")
    values = {"devices": 1, **values}
    for key in [*values, *kinds]:
        if key not in kinds:
            raise unknown_name("key", key, kinds)
        if key not in values:
            raise ValueError(f"{key} is missing")
        if not isinstance(values[key], kinds[key]) or isinstance(values[key], bool):
            raise ValueError(f"{key}: expected {getattr(kinds[key], '__name__', kinds[key])}, got {values[key]!r}")
    if values["devices"] != "auto" and not (isinstance(values["devices"], int) and values["devices"] >= 1):
        raise ValueError(f"devices: expected auto, or a whole number of at least 1, got {values['devices']!r}")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(f"its name {name!r} names a results folder: use letters, digits, '.', '_' and '-'")
    if values["purpose"] not in PURPOSES:
        raise unknown_name("purpose", values["purpose"], PURPOSES)
    arguments = ("name", "size", "classes", "train_per_class", "minival", "split_seed", "title")
    for key in values["data"]:
        if key not in arguments:
            raise unknown_name("data setting", key, arguments)
    if not isinstance(values["data"].get("name"), str):
        raise ValueError("data: name is missing")
    if values["base_resolution"] < 8:
        raise ValueError(f"base_resolution: expected at least 8 px, got {values['base_resolution']!r}")
    if values["stem_stride"] not in (1, 2):
        raise ValueError(f"stem_stride: expected 1 or 2, got {values['stem_stride']!r}")
    for key in ("methods", "seeds"):
        if not values[key] or len(set(map(str, values[key]))) < len(values[key]):
            raise ValueError(f"{key}: expected a list without repetitions, got {values[key]!r}")
    for method in values["methods"]:
        if method not in TRAINED_BY:
            raise unknown_name("method", method, TRAINED_BY)
    for key in ("resolution", "seed"):
        if key in values["train"]:
            raise ValueError(f"train: {key} follows from method and seeds; remove it")
    for seed in values["seeds"]:
        TrainConfig.from_dict({**values["train"], "seed": seed})
    lists = {key: tuple(values[key]) for key in ("methods", "seeds")}
    return Profile(name=name, **{**values, **lists})


@dataclass(frozen=True)
class Run:
    """One planned network: a method and a seed of a profile, and where its results go."""

    profile: Profile
    method: str
    seed: int
    results: Path = RESULTS  # holds a folder per profile

    @classmethod
    def plan(cls, profile: str | Path, method: str, seed: int, results: str | Path | None = None) -> "Run":
        """The run that a notebook's parameters name, checked."""
        run = cls(load_profile(profile), method, seed, Path(results or RESULTS).absolute())
        run.config  # noqa: B018 - refuses an unknown method or an impossible seed
        return run

    @cached_property
    def scaling(self) -> Scaling:
        return self.profile.scaling(self.method)

    @cached_property
    def config(self) -> TrainConfig:
        return self.profile.config(self.method, self.seed)

    @cached_property
    def cost(self) -> Cost:
        """Parameters, FLOPs and activations at its resolution."""
        profile = self.profile
        return scaled_cost(self.scaling, profile.base_resolution, profile.num_classes, profile.stem_stride)

    @property
    def folder(self) -> Path:
        """The study's folder: runs/, notebooks/, tables/, figures/."""
        return self.results / self.profile.name

    @property
    def directory(self) -> Path:
        return self.folder / "runs" / f"{self.method}_{self.scaling}_seed{self.seed}"

    @property
    def executed(self) -> Path:
        """The executed notebook."""
        return self.folder / "notebooks" / f"{TRAINED_BY[self.method]}_{self.method}_seed{self.seed}.ipynb"

    @property
    def about(self) -> dict:
        """What the run record says beyond what the trainer knows."""
        names = {"profile": self.profile.name, "purpose": self.profile.purpose, "method": self.method}
        return names | self._setting

    @property
    def _setting(self) -> dict:
        """What makes this run the profile's, beside the recipe."""
        profile, coefficients = self.profile, dataclasses.asdict(self.scaling)
        return {"coefficients": coefficients, "stem_stride": profile.stem_stride, "data": profile.data}

    def model(self, num_classes: int) -> EfficientNet:
        """The untrained network, its initial weights drawn by the run's seed."""
        torch.manual_seed(self.seed)
        options = self.config.model_options()
        return EfficientNet(self.scaling, num_classes, stem_stride=self.profile.stem_stride, **options)

    def train(self, data: ImageData, device: str | None = None) -> dict:
        """Train (or continue, or find finished) and return the record. RuntimeError if the run did not finish.

        Several devices have a process each, by torch's elastic launcher, or by torchrun, of whose this is then one.
        """
        processes = self._processes(device)
        if processes > 1 and not torch.distributed.is_torchelastic_launched() and read_record(self.directory) is None:
            error = launch(processes, _train_share, (self, device), self.directory)
            if error is not None:
                record = {"schema": SCHEMA_VERSION, "status": "failed", **self.about, "seed": self.seed}
                record |= {"config": dataclasses.asdict(self.config), "cost": dataclasses.asdict(self.cost)}
                write_json(self.directory / "run.json", record | {"dataset": data.describe(), "error": error})
            record = read_record(self.directory)
        else:
            model = self.model(len(data.classes))
            record = train(model, data, self.config, self.directory, about=self.about, device=device)
        if record["status"] != "finished":
            raise RuntimeError(f"{self.directory.name} {_ending(record)}; run again with: effnet study --retry")
        return record

    def _processes(self, device: str | None) -> int:
        """The profile's devices, counted. ValueError if this machine has fewer GPUs."""
        wanted, gpus = self.profile.devices, 0 if device == "cpu" else torch.cuda.device_count()
        if wanted == "auto":
            return max(1, gpus)
        if 0 < gpus < wanted:
            raise ValueError(f"devices: profile {self.profile.name} asks for {wanted}, torch finds {gpus}; use auto")
        return wanted

    def state(self) -> str:
        """finished, failed, diverged, stale (the profile has changed since), running, interrupted or missing."""
        record = read_record(self.directory)
        if record is not None:
            same = all(record.get(key, value) == value for key, value in self._setting.items())
            same &= recipe(record.get("config", {})) == recipe(dataclasses.asdict(self.config))
            return record["status"] if same else "stale"
        if not (self.directory / ".lock").exists():
            return "missing"
        try:
            with filelock.FileLock(self.directory / ".lock", blocking=False):
                return "interrupted" if (self.directory / "checkpoint.pt").exists() else "missing"
        except filelock.Timeout:
            return "running"


@elastic_record
def _train_share(run: Run, device: str | None) -> None:
    """One of the processes that train a run together."""
    run.train(load_data(**run.profile.data), device)


def _ending(record: Mapping) -> str:
    """How a run that did not finish ended, in words."""
    if record["status"] == "diverged":
        return "diverged in epoch {epoch}, step {step}, at LR {lr:.3g}".format(**record["diverged"])
    return f"failed ({record.get('error')})"


def plan_runs(
    profile: Profile,
    results: str | Path | None = None,
    methods: Iterable[str] | None = None,
    seeds: Iterable[int] | None = None,
) -> list[Run]:
    """The profile's runs, one seed after the other, so that any prefix is as complete as it can be."""
    for kind, asked, valid in (("method", methods, profile.methods), ("seed", seeds, profile.seeds)):
        for value in asked or ():
            if value not in valid:
                raise unknown_name(f"{kind} of profile {profile.name}", value, map(str, valid))
    results = Path(results or RESULTS).absolute()
    wanted = [(seed, method) for seed in seeds or profile.seeds for method in methods or profile.methods]
    return [Run(profile, method, seed, results) for seed, method in wanted]


# ---- 2. Records as tables ------------------------------------------------------------------------------------------


def load_runs(profile: str | Path | Profile, results: str | Path | None = None) -> pd.DataFrame:
    """The runs of a profile, a row each, in the profile's order. Unfinished ones have a status and no scores.

    top1, top5 are percentages, flops multiply-adds, seconds the whole run's, peak_memory_bytes torch's on a GPU
    and the process's on a CPU.
    """
    profile = profile if isinstance(profile, Profile) else load_profile(profile)
    rows = []
    for run in plan_runs(profile, results):
        row = {"method": run.method, "seed": run.seed, "status": run.state(), "directory": run.directory}
        row |= {"d": run.scaling.depth, "w": run.scaling.width, "r": run.scaling.resolution}
        row |= {"resolution": run.config.resolution}
        if row["status"] == "finished":
            record = read_record(run.directory)
            row |= {**record["cost"], **record["test"], "raw_top1": record["test_raw"]["top1"]}
            row |= {"minival_top1": record["minival"]["top1"], "device": record["device"]["name"]}
            row |= {"commit": record["git"]["commit"], "data": record["dataset"]["title"]}
            kept = ("seconds", "images_per_second", "peak_memory_bytes", "micro_batch", "started", "ended")
            row |= {name: record[name] for name in kept}
        rows.append(row)
    return pd.DataFrame(rows)


def load_pilots(profile: str | Path | Profile, results: str | Path | None = None) -> pd.DataFrame:
    """The pilots of a profile, a row each, best first: what they change of its recipe, and their minival scores."""
    profile = profile if isinstance(profile, Profile) else load_profile(profile)
    rows = []
    for path in (Path(results or RESULTS) / profile.name / "pilots").glob("*/run.json"):
        record = read_record(path.parent)
        row = {"pilot": path.parent.name, "status": record["status"]}
        scores = record.get("minival", {})
        rows.append(row | {f"minival_{k}": v for k, v in scores.items()} | {"seconds": record.get("seconds")})
    table = pd.DataFrame(rows, columns=["pilot", "status", "minival_top1", "minival_top5", "minival_loss", "seconds"])
    return table.sort_values("minival_top1", ascending=False, ignore_index=True)


def load_history(directory: str | Path) -> pd.DataFrame:
    """history.jsonl of a run: a row per epoch, minival scored with the EMA weights."""
    return pd.read_json(Path(directory) / "history.jsonl", lines=True)


# ---- 3. Notebooks --------------------------------------------------------------------------------------------------


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
    cells = nbformat.read(NOTEBOOKS / f"{notebook}.ipynb", as_version=4).cells
    declared = next(_assignments(c.source) for c in cells if "parameters" in c.metadata.get("tags", []))
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
    if TRAINED_BY.get(values.get("method"), notebook) != notebook:
        raise ValueError(f"method {values['method']!r} is trained by {TRAINED_BY[values['method']]}, not by {notebook}")


# Papermill has a process of its own: while it executes, it takes over the signals, and afterwards resets them.
_EXECUTE = """
import json, sys, papermill
try:
    papermill.execute_notebook(**json.loads(sys.argv[1]), stdout_file=sys.stdout, stderr_file=sys.stderr)
except papermill.PapermillExecutionError as error:
    sys.exit(f"{error.ename}: {error.evalue}")
except Exception as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def run_notebook(
    notebook: str,
    output: Path,
    parameters: Mapping[str, object],
    threads: int | None = None,
    running: set[subprocess.Popen] | None = None,
) -> None:
    """Execute notebooks/NOTEBOOK.ipynb into `output`, which appears only if every cell succeeded.

    What cells print comes out at once. `threads`: CPU threads for torch, which otherwise takes all cores. Raises
    RuntimeError if a cell failed or the kernel died; what there is of the notebook is then beside `output` as
    NAME.partial.ipynb. An interrupt stops the kernel before it goes on; in a thread, which gets no interrupts, whoever
    does may terminate the process that is in `running` meanwhile.
    """
    check_parameters(notebook, parameters)
    unfinished = output.with_suffix(".partial.ipynb")
    output.parent.mkdir(parents=True, exist_ok=True)
    arguments = {"input_path": str(NOTEBOOKS / f"{notebook}.ipynb"), "output_path": str(unfinished)}
    arguments |= {"parameters": dict(parameters), "kernel_name": "python3", "language": "python", "cwd": str(ROOT)}
    arguments |= {"progress_bar": False, "extra_arguments": ["--IPKernelApp.log_level=CRITICAL"]}
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    process = subprocess.Popen([sys.executable, "-c", _EXECUTE, json.dumps(arguments)], cwd=ROOT, env=environment)
    running = set() if running is None else running
    running.add(process)
    try:
        status = process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    finally:
        running.discard(process)
    if status != 0:
        raise RuntimeError(f"{notebook} failed; see {unfinished}")
    executed = nbformat.read(unfinished, as_version=4)
    for key in ("input_path", "output_path"):  # no paths of the machine it ran on
        executed.metadata.papermill[key] = f"{notebook}.ipynb" if key == "input_path" else output.name
    nbformat.write(executed, unfinished)
    unfinished.replace(output)


# ---- 4. The command ------------------------------------------------------------------------------------------------


def study(
    name: str,
    results: str | Path | None = None,
    *,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    device: str | None = None,
    retry: bool = False,
    analysis: bool = False,
    jobs: int | None = None,
    threads: int | None = None,
) -> int:
    """Execute a profile's notebooks, those of finished runs excepted. Returns 0 if all runs are finished, else 1.

    jobs, threads: notebooks at a time and CPU threads of each; see `_shares` for the defaults.
    retry: run failed and diverged runs again (their records are kept as run.earlier.json).
    analysis: execute 00 and 05 even if no run was trained.
    """
    profile = load_profile(name)
    name = str(Path(name).absolute()) if str(name).endswith(".yaml") else name  # kernels start in another folder
    runs = plan_runs(profile, results, methods, seeds)
    folder = runs[0].folder
    place = {} if results is None else {"results": str(Path(results).absolute())}
    for run in runs:
        if retry and run.state() in ("failed", "diverged"):
            (run.directory / "run.json").replace(run.directory / "run.earlier.json")
            (run.directory / "checkpoint.pt").unlink(missing_ok=True)
    todo = _to_do(runs)
    jobs, threads = _shares(len(todo), profile, device, jobs, threads)
    print(f"{profile.title}: {len(runs)} runs, {len(todo)} to do ({profile.stamp})", flush=True)
    if jobs > 1:
        print(f"{jobs} at a time, {threads} CPU thread{'s' if threads > 1 else ''} each", flush=True)
    executions = []
    for number, run in enumerate(_longest_first(todo) if jobs > 1 else todo, 1):
        about = f"[{number}/{len(todo)}] {run.method}, seed {run.seed}, {run.config.resolution} px"
        parameters = {"profile": name, "method": run.method, "seed": run.seed, "device": device, **place}
        executions.append((about, TRAINED_BY[run.method], run.executed, parameters))
    _execute(executions, jobs, threads)
    finished = [run for run in runs if run.state() == "finished"]
    analysed = True
    if finished and (todo or analysis or not (folder / "tables" / "table7.csv").exists()):
        executions = [
            (f"{notebook}: executing", notebook, folder / "notebooks" / f"{notebook}.ipynb", {"profile": name, **place})
            for notebook in ("00_architecture", "05_analysis")
        ]
        analysed = _execute(executions, *_shares(len(executions), profile, "cpu"))
    print_status(profile, results)
    if not todo:
        print(_provenance(profile, results, name))
    return 0 if len(finished) == len(runs) and analysed else 1


def pilot(
    name: str | Path, changes: Mapping[str, object], results: str | Path | None = None, device: str | None = None
) -> dict:
    """Train a profile's baseline, seed 0, with some settings of its recipe changed: to choose the recipe by.

    No test image is read: the record, in RESULTS/PROFILE/pilots/CHANGES/, has minival scores also under "test".
    """
    profile = load_profile(name)
    for key in changes:
        if key in ("resolution", "seed"):
            raise ValueError(f"pilot: {key} is not part of a recipe")
    run = Run(dataclasses.replace(profile, train=profile.train | changes), "baseline", 0, Path(results or RESULTS))
    data = load_data(**profile.data)
    data = dataclasses.replace(data, indices=data.indices | {"test": data.indices["minival"]})
    label = "_".join(f"{key}={value}" for key, value in sorted(changes.items())) or "as_it_is"
    about = run.about | {"pilot": dict(changes), "scored": "minival"}
    return train(
        run.model(len(data.classes)), data, run.config, run.folder / "pilots" / label, about=about, device=device
    )


def _to_do(runs: Iterable[Run]) -> list[Run]:
    """Those that have not ended. One that failed or diverged has: it is never silently run again."""
    return [run for run in runs if run.state() not in ("finished", "failed", "diverged")]


def _shares(
    count: int, profile: Profile, device: str | None, jobs: int | None = None, threads: int | None = None
) -> tuple[int, int | None]:
    """How many of `count` notebooks to execute at a time, and with how many CPU threads each (None: torch's choice).

    One at a time on a GPU. On a CPU, where one thread in each of two processes does more than two threads in one, as
    many as there are cores, if each has 4 GiB of memory; all of them together get the cores that there are.
    """
    for name, value in {"jobs": jobs, "threads": threads}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected a whole number of at least 1, got {value}")
    on_cpu, cores = device == "cpu" or not torch.cuda.is_available(), torch.get_num_threads()
    processes = 1 if profile.devices == "auto" else profile.devices
    if jobs is None:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**32
        jobs = max(1, min(cores // processes, count, memory)) if on_cpu else 1
    if threads is None and on_cpu:
        threads = max(1, cores // (jobs * processes))
    return jobs, threads


def _longest_first(runs: Sequence[Run]) -> list[Run]:
    """Seed by seed: the baseline, whose curve the others draw, then the costliest, to end with short ones."""
    seeds = [run.seed for run in runs]
    return sorted(runs, key=lambda run: (seeds.index(run.seed), run.method != "baseline", -run.cost.activations))


def _execute(executions: Sequence[tuple[str, str, Path, Mapping]], jobs: int, threads: int | None) -> bool:
    """Execute notebooks (what to print, notebook, output, parameters), `jobs` at a time. False if one failed."""
    running: set[subprocess.Popen] = set()
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(_attempt, *execution, threads, running) for execution in executions]
        try:
            return all([future.result() for future in futures])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(running):
                process.terminate()
            raise


def _attempt(about: str, notebook: str, output: Path, parameters: Mapping, threads: int | None, running: set) -> bool:
    """Execute a notebook; if that fails it is told, and the study goes on."""
    print(f"{about}\n", end="", flush=True)  # in one piece, since others print too
    try:
        run_notebook(notebook, output, parameters, threads, running)
        return True
    except RuntimeError as error:
        print(f"effnet: {error}", file=sys.stderr, flush=True)
        return False


def print_status(profile: Profile, results: str | Path | None = None) -> None:
    """A line per run: state, cost, score, speed."""
    table = load_runs(profile, results)
    columns = {"method": "method", "seed": "seed", "status": "status", "resolution": "px"}
    if "top1" in table:
        table["params"], table["flops"] = table["params"] / 1e6, table["flops"] / 1e9
        columns |= {"params": "params (M)", "flops": "FLOPs (B)", "top1": "top-1 %", "top5": "top-5 %"}
        columns |= {"images_per_second": "images/s", "seconds": "seconds"}
    formats = {"params (M)": "{:.2f}", "FLOPs (B)": "{:.4f}", "top-1 %": "{:.2f}", "top-5 %": "{:.2f}"}
    formats |= {"images/s": "{:,.0f}", "seconds": "{:,.0f}"}
    table = table[list(columns)].rename(columns=columns)
    print(f"\n{profile.title} ({profile.stamp})")
    print(table.to_string(index=False, na_rep="-", formatters={k: f.format for k, f in formats.items()}), flush=True)
    for run in plan_runs(profile, results):
        if run.state() in ("failed", "diverged"):
            print(f"{run.directory.name} {_ending(read_record(run.directory))}; run it again with --retry")


def _provenance(profile: Profile, results: str | Path | None, name: str) -> str:
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
        f"To repeat them elsewhere: effnet study {name} --results DIR"
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
    runs = _to_do(plan_runs(profile, results))
    if runs:
        data = load_data(**profile.data, download=False)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    _, threads = _shares(len(runs), profile, device.type, jobs, threads)
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
        print("Nothing is to do: all runs have ended.")
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


def bench(results: str | Path | None = None, *, device: str | None = None, rounds: int = 15) -> None:
    """Execute 06_throughput on this device and print its tables, which lie in RESULTS/throughput/DEVICE/."""
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    folder = throughput_folder(kind, results)
    parameters = {"device": kind.type, "rounds": rounds, "results": results and str(Path(results).absolute())}
    run_notebook("06_throughput", folder / "06_throughput.ipynb", parameters)
    for name in ("peers", "methods"):
        print(f"\n{pd.read_csv(folder / f'{name}.csv').to_string(index=False, na_rep='-')}", flush=True)


def throughput_folder(device: torch.device, results: str | Path | None = None) -> Path:
    """Where measurements of this device go."""
    name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return Path(results or RESULTS).absolute() / "throughput" / name


def _cost_table(names: Sequence[str], resolution: int | None, num_classes: int, stem_stride: int) -> str:
    rows = []
    for name in names:
        scaling = {**VARIANTS, **TABLE7}.get(name)
        if scaling is None:
            raise unknown_name("network", name, {**VARIANTS, **TABLE7})
        pixels = round_resolution(scaling.resolution, resolution or 224)
        cost = scaled_cost(scaling, resolution or 224, num_classes, stem_stride)
        rows.append({"network": name, "px": pixels, **dataclasses.asdict(cost)})
    return pd.DataFrame(rows).to_string(
        index=False, formatters=dict.fromkeys(["params", "flops", "activations"], "{:,}".format)
    )


def _settings(words: Iterable[str]) -> dict[str, object]:
    """NAME=VALUE words as settings, their values read as in a profile."""
    pairs = [word.partition("=") for word in words]
    for name, equals, _ in pairs:
        if not (name and equals):
            raise ValueError(f"expected NAME=VALUE, such as lr=0.05, got {name + equals!r}")
    return {name: yaml.safe_load(value) for name, _, value in pairs}


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


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
    sub.add_argument("--analysis", action="store_true", help="execute the analysis even if nothing was trained")
    sub.add_argument("--jobs", type=int, help="notebooks at a time (default: on a CPU one per core, on a GPU one)")
    sub.add_argument("--threads", type=int, help="CPU threads of each (default: the cores, shared)")
    command("status", "list a profile's runs: finished, failed, diverged, stale, running, interrupted, missing")
    sub = command("plan", "list the runs that are to do, with their cost and the time they will take on this device")
    sub.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")
    sub.add_argument("--jobs", type=int, help="notebooks at a time (default: as effnet study)")
    sub.add_argument("--threads", type=int, help="CPU threads of each (default: as effnet study)")
    sub.add_argument("--seconds", type=float, default=60, help="time to spend on measuring (default: 60)")
    sub = command("bench", "time training steps of ours and of others' B0 side by side on this device", profile=False)
    sub.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")
    sub.add_argument("--rounds", type=int, default=15, help="rounds of measurements (default: 15)")
    sub.add_argument("--results", metavar="DIR", help="where results go, instead of results/")
    sub = command("train", "train one method and seed of a profile, without a notebook")
    sub.add_argument("method", choices=TRAINED_BY)
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")
    sub = command("pilot", "train the baseline with changed settings, scored on minival alone, to choose a recipe by")
    sub.add_argument("changes", nargs="*", metavar="NAME=VALUE", help="settings of the recipe, such as lr=0.05")
    sub.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")
    sub = command("cost", "count parameters, FLOPs (multiply-adds) and activations", profile=False)
    sub.add_argument("networks", nargs="+", metavar="NETWORK", help="b0 to b7, or a Table 7 row such as compound")
    sub.add_argument("--resolution", type=int, help="pixels at resolution coefficient 1 (default: 224)")
    sub.add_argument("--classes", type=int, default=1000)
    sub.add_argument("--stem-stride", type=int, default=2, choices=(1, 2))
    sub = command("data", "fetch a data set if it is missing, load it, and say what it is", profile=False)
    sub.add_argument("name", help="digits, cifar10, cifar100, tiny-imagenet or folder:PATH")
    sub.add_argument("--root", metavar="DIR", help="where data lies (default: $EFFNET_DATA, else ./data)")
    args = parser.parse_args(arguments)

    # A scheduler's SIGTERM must reach the kernel as an interrupt; a background shell starts us with SIGINT ignored.
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if args.command == "study":
            names = ("methods", "seeds", "device", "retry", "analysis", "jobs", "threads")
            return study(args.profile, args.results, **{name: getattr(args, name) for name in names})
        if args.command == "status":
            print_status(load_profile(args.profile), args.results)
        elif args.command == "plan":
            chosen = {name: getattr(args, name) for name in ("device", "jobs", "threads")}
            table = plan(args.profile, args.results, seconds=args.seconds, **chosen)
            print_plan(table, _shares(len(table), load_profile(args.profile), **chosen)[0])
        elif args.command == "bench":
            bench(args.results, device=args.device, rounds=args.rounds)
        elif args.command == "train":
            run = Run.plan(args.profile, args.method, args.seed, args.results)
            run.train(load_data(**run.profile.data), args.device)
            if os.environ.get("RANK", "0") == "0":  # the first process under torchrun
                print(f"written to {run.directory}")
        elif args.command == "pilot":
            pilot(args.profile, _settings(args.changes), args.results, args.device)
            print(load_pilots(args.profile, args.results).to_string(index=False, na_rep="-"))
        elif args.command == "cost":
            print(_cost_table(args.networks, args.resolution, args.classes, args.stem_stride))
        else:
            print(json.dumps(load_data(args.name, args.root).describe(), indent=2))
        return 0
    except (ValueError, OSError, RuntimeError) as error:
        print(f"effnet: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("effnet: interrupted; the same command continues", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
