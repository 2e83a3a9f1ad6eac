"""report/scale.md: what the study `imagenet` takes on some numbers of GPUs, and what it costs. Counted, not run.

From scale.yaml, the profile's exact FLOPs and activations, and the times in results/throughput/*/methods.csv, where a
GPU that has been measured takes the place of the published one.
"""

import heapq
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import yaml

import effnet_study as study
from effnet_data import IMAGENET_TRAIN
from effnet_lib import VARIANTS
from effnet_records import replace_file
from evidence import listed, spoken

FACTS, TEMPLATE = (Path(__file__).with_name(name) for name in ("scale.yaml", "scale-template.md"))
SPEED = "images_per_second"  # a column of methods.csv
PUBLISHED = ("b0_on_1", "b0_on_8", "b0_on_16", "b0_on_1_tf32", "b4_on_1", "b4_on_64", "b0_epochs", "b0_hours")


# ---- 1. What is known ----------------------------------------------------------------------------------------------


def load_facts(path: Path = FACTS) -> dict:
    """scale.yaml, checked. ValueError names the file, the key, what was expected and what was found."""

    def positive(value: object, kind: type = int | float) -> bool:
        return isinstance(value, kind) and not isinstance(value, bool) and 0 < value < math.inf

    checks = {name: ("a text", lambda value: isinstance(value, str)) for name in ("source", "address", "gpu")}
    checks |= {name: ("a positive number", positive) for name in (*PUBLISHED, "usd_per_gpu_hour")}
    checks["gpus"] = "whole numbers", lambda v: isinstance(v, list) and v and all(positive(one, int) for one in v)
    with path.open(encoding="utf-8") as file:  # of which yaml's own errors tell the name
        facts = yaml.safe_load(file)
    if not isinstance(facts, dict):
        raise ValueError(f"{path}: expected keys and values, got {facts!r}")
    for key in [*facts, *checks]:
        if key not in checks:
            raise study.unknown_name(f"key of {path}", str(key), checks)
        if not checks[key][1](facts.get(key)):
            raise ValueError(f"{path}: {key}: expected {checks[key][0]}, got {facts.get(key)!r}")
    return facts


@dataclass(frozen=True)
class Device:
    """What `effnet bench` has found on a device, training the baseline at `px`."""

    name: str
    type: str  # cpu or cuda
    px: int
    images_per_second: float
    ratios: pd.DataFrame  # flops, activations and seconds of an image over the baseline's, by method


def measured_devices(results: Path, methods: Sequence[str]) -> list[Device]:
    """Those whose methods.csv is there, the fastest first. ValueError names a file that is not as it should be."""
    found = []
    for file in sorted(results.glob("throughput/*/methods.csv")):
        try:
            about = json.loads((file.parent / "device.json").read_text(encoding="utf-8"))["device"]
            table = pd.read_csv(file, index_col="network").loc[list(methods)]
            base, costs = table.loc["baseline"], table[["flops", "activations"]].assign(seconds=1 / table[SPEED])
            ratios = costs / costs.loc["baseline"]
            found.append(Device(about["name"], about["type"], int(base["px"]), float(base[SPEED]), ratios))
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{file}: expected what effnet bench writes, with all of {methods}: {error}") from None
    return sorted(found, key=lambda device: -device.images_per_second)


# ---- 2. Time and money ---------------------------------------------------------------------------------------------


def makespan(hours: Sequence[float], places: int) -> float:
    """Hours until the last run ends, if the longest that waits takes the first of so many places that is free."""
    busy = [0.0] * places
    for one in sorted(hours, reverse=True):
        heapq.heapreplace(busy, busy[0] + one)
    return max(busy)


def gpus_each(gpus: int, runs: int, batch_size: int) -> int:
    """GPUs for each of some independent runs: as many as all can have and that divide a batch equally, or one."""
    return next(n for n in range(max(1, gpus // runs), 0, -1) if batch_size % n == 0)


def spend(hours: Sequence[float], gpus: int, per_run: int, shared: float) -> tuple[float, float]:
    """Wall time in hours and GPU-hours of runs that take `hours` on one GPU each, if each has `per_run` GPUs, at the
    efficiency `shared` if these are several. A GPU counts as long as a run holds it."""
    speed = per_run * shared if per_run > 1 else 1.0
    times = [one / speed for one in hours]
    return makespan(times, gpus // per_run), per_run * sum(times)


def efficiency(together: float, gpus: int, alone: float) -> float:
    """Images per second of so many GPUs that share a run, over those of one alone times their number."""
    return together / (gpus * alone)


def images_trained(profile: study.Profile) -> int:
    """Images that go through each network in training, over all epochs, whose last, partial batches are left out."""
    train = IMAGENET_TRAIN - math.ceil(profile.data["minival"] * IMAGENET_TRAIN)
    return profile.train["epochs"] * (train // profile.train["batch_size"]) * profile.train["batch_size"]


def estimate(hours: Mapping[str, Sequence[float]], seeds: int, batch_size: int, facts: Mapping) -> pd.DataFrame:
    """A row for each of the facts' numbers of GPUs, one seed and all, independent runs and one run at a time.
    hours: of each method's run on one GPU, by what they are proportional to: a column each, of (wall, GPU) hours."""
    rows, shared = [], efficiency(facts["b0_on_8"], 8, facts["b0_on_1"])
    for gpus in facts["gpus"]:
        for count in dict.fromkeys((1, seeds)):
            runs = count * len(next(iter(hours.values())))
            for per_run in dict.fromkeys((gpus_each(gpus, runs, batch_size), gpus)):
                row = {"gpus": gpus, "runs": runs, "per_run": per_run, "at_once": min(gpus // per_run, runs)}
                rows.append(row | {by: spend([*times] * count, gpus, per_run, shared) for by, times in hours.items()})
    return pd.DataFrame(rows)


# ---- 3. The document -----------------------------------------------------------------------------------------------


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, its columns of numbers aligned to the right."""
    rule = "|".join("---" if name in ("method", "use") else "---:" for name in head)
    return "\n".join([f"| {' | '.join(head)} |", f"|{rule}|", *(f"| {' | '.join(row)} |" for row in rows)])


def duration(hours: float) -> str:
    return f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:.1f} days"


def costs_table(ratios: pd.DataFrame, devices: Sequence[Device]) -> str:
    """FLOPs, activations and measured times over the baseline's, by method."""
    head = ["method", "FLOPs", "activations"]
    head += [f"time on {d.name}, B0 at {d.px} px (FLOPs there)" for d in devices]
    table = ratios[["flops", "activations"]].map("{:.2f}".format)
    for number, there in enumerate(device.ratios.map("{:.2f}".format) for device in devices):
        table[number] = there["seconds"] + " (" + there["flops"] + ")"
    return markdown(head, [[spoken(row[0]), *row[1:]] for row in table.itertuples(name=None)])


def spending_table(table: pd.DataFrame, bases: Sequence[str], price: float) -> str:
    """What `estimate` gives, and the cost at a price per GPU-hour."""
    rows = []
    for row in table.to_dict("records"):
        use = f"{row['at_once']} at a time, {row['per_run']} GPU{'s' * (row['per_run'] > 1)} each"
        cells = [str(row["gpus"]), str(row["runs"]), use]
        for wall, held in (row[basis] for basis in bases):
            cells += [duration(wall), f"{held:,.0f}", f"{price * held:,.0f}"]
        rows.append(cells)
    return markdown(["GPUs", "runs", "use", *(f"{b}: {x}" for b in bases for x in ("time", "GPU-hours", "USD"))], rows)


def describe_scale(facts: Mapping, profile: study.Profile, results: Path) -> str:
    """The text of scale.md: scale-template.md with its numbers."""
    runs = {run.method: run for run in study.plan_runs(profile, results, seeds=profile.seeds[:1])}
    config, price, images = runs["baseline"].config, facts["usd_per_gpu_hour"], images_trained(profile)
    cost = pd.DataFrame({method: vars(run.cost) for method, run in runs.items()}).T
    ratios, b4 = cost / cost.loc["baseline"], pd.Series(vars(profile.cost(VARIANTS["b4"]))) / cost.loc["baseline"]
    devices = measured_devices(results, list(runs))
    gpu = next((d for d in devices if d.type == "cuda" and d.px == config.resolution), None)
    if gpu:
        name, speed, second = gpu.name, gpu.images_per_second, {"by measured time": gpu.ratios["seconds"]}
        origin, status = "as `effnet bench` has measured", f"The {name} has been measured."
    else:
        name, speed, second = facts["gpu"], facts["b0_on_1"], {"by activations": ratios["activations"]}
        origin = f"as published by [{facts['source']}]({facts['address']}); in TF32 {facts['b0_on_1_tf32']:,}"
        status = f"**No GPU has been measured at {config.resolution} px by this project yet**; the speed is published."
    times = {basis: list(images / speed / 3600 * r) for basis, r in ({"by FLOPs": ratios["flops"]} | second).items()}
    table = estimate(times, len(profile.seeds), config.batch_size, facts)
    whole = table[table["runs"] == table["runs"].max()].drop_duplicates("gpus").to_dict("records")  # independent runs
    usd = [price * row[basis][1] for row in whole for basis in times]
    walls = {row["gpus"]: sorted(row[basis][0] for basis in times) for row in whole}
    answers = [f"{' to '.join(map(duration, pair))} on {gpus} GPU{'s' * (gpus > 1)}" for gpus, pair in walls.items()]
    b4_time, most, batch = facts["b0_on_1"] / facts["b4_on_1"], max(facts["gpus"]), config.batch_size
    hours = facts["b0_epochs"] * IMAGENET_TRAIN / facts["b0_on_8"] / 3600  # of the published training, by its speed
    shared = {"b0_on_8": 8, "b0_on_16": 16, "b4_on_64": 64}
    shared = {key: 100 * efficiency(facts[key], n, facts[f"{key[:2]}_on_1"]) for key, n in shared.items()}
    values = {"runs": len(runs) * len(profile.seeds), "networks": len(runs), "seeds": len(profile.seeds)}
    values |= {"answers": listed(answers), "usd_low": min(usd), "usd_high": max(usd), "status": status}
    values |= {"config": config, "millions": images / 1e6, "gpu": name, "speed": speed, "origin": origin}
    values |= {"facts": facts, "percent": shared, "hours": hours, "slower": facts["b0_hours"] / hours}
    values |= {"costs": costs_table(ratios, devices), "spending": spending_table(table, list(times), price)}
    values |= {"b4": b4, "b4_time": b4_time, "b4_off": 100 * (b4 / b4_time - 1), "sums": ratios.sum()}
    values |= {"most": most, "images_each": batch // most, "micro_batch": math.ceil(batch / config.accumulation)}
    return TEMPLATE.read_text(encoding="utf-8").format(**values)


def build_scale(folder: Path, results: Path = study.RESULTS) -> None:
    """Write scale.md there, whole or not at all."""
    text = describe_scale(load_facts(), study.load_profile("imagenet"), results)
    replace_file(folder / "scale.md", lambda file: file.write_text(text, encoding="utf-8"))
