"""Profiles and runs: what is compared, on which images, by which recipe, and what has become of it.

A profile is a study (notebooks/profiles/NAME.yaml); a run is one of its networks, a method and a seed.
"""

import dataclasses
import json
import math
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

import pandas as pd
import torch
import yaml
from torch.distributed.elastic.multiprocessing.errors import record as elastic_record

from effnet_data import CLASS_COUNTS, SIZES, ImageData, check_settings, class_count, load_data
from effnet_lib import (
    CHECKPOINTS,
    HEAD_CHANNELS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    NEIGHBOURS,
    STAGES,
    STEM_CHANNELS,
    TABLE7,
    VARIANTS,
    Cost,
    EfficientNet,
    Held,
    Interrupted,
    Mismatch,
    Scaling,
    TrainConfig,
    coefficient_grid,
    compound_scaling,
    count_cost,
    create_model,
    freeze_backbone,
    gpu_count,
    holder_of,
    launch,
    match_flops,
    read_record,
    recipe,
    round_filters,
    round_repeats,
    round_resolution,
    scaled_cost,
    train,
    unknown_name,
    write_record,
)

ROOT = Path(__file__).resolve().parent
NOTEBOOKS, RESULTS = ROOT / "notebooks", ROOT / "results"

# The notebook that trains each method, and the method's colour (Okabe and Ito's, told apart by the colour-blind).
TRAINED_BY = {
    "baseline": "01_baseline_b0",
    **dict.fromkeys(["depth", "width", "resolution"], "02_single_axis_scaling"),
    **dict.fromkeys(["depth_matched", "width_matched", "resolution_matched"], "02_single_axis_scaling"),
    **dict.fromkeys(["compound", "compound_searched"], "04_compound_scaling"),
}
PHI = re.compile(r"(compound|compound_searched)_phi(\d+(?:\.\d+)?)")  # compound_phi3.0: Equation 3 at any other phi
# depth_x8: scaled to 8 times the baseline's FLOPs, for Figure 8's lines; a number has one way to be written
TIMES = re.compile(r"(depth|width|resolution|compound|compound_searched)_x([1-9]\d*(?:\.\d*[1-9])?)")
COLORS = {
    "baseline": "#000000",
    **dict.fromkeys(["depth", "depth_matched"], "#0072B2"),
    **dict.fromkeys(["width", "width_matched"], "#E69F00"),
    **dict.fromkeys(["resolution", "resolution_matched"], "#009E73"),
    "compound": "#D55E00",
    "compound_searched": "#CC79A7",
}
# Table 7 as published: FLOPs (multiply-adds) and ImageNet top-1 in percent. arXiv 1905.11946v5.
PAPER_TABLE7 = {
    "baseline": (0.4e9, 77.3),
    "depth": (1.8e9, 79.0),
    "width": (1.8e9, 78.9),
    "resolution": (1.9e9, 79.1),
    "compound": (1.8e9, 81.1),
}
DIVERGED = "run.diverged.json"  # the record of a run that diverged and was run again with a lower LR
PURPOSES = {
    "check": "pipeline check, not evidence",
    "exploratory": "exploratory: fewer seeds, data or epochs than a claim needs",
    "evidence": "evidence, by the rules of the protocol",
}


# For data sets without a profile: `effnet train --model b0 --dataset folder:PATH`
PLAIN_RECIPE = {"epochs": 10, "batch_size": 32, "optimizer": "sgd", "lr": 0.05, "weight_decay": 1e-4}
PLAIN_RECIPE |= {"norm_momentum": 0.1, "ema_decay": 0.99}


def family(method: str) -> str:
    """The method as TRAINED_BY and COLORS have it: compound_phi3.0 is compound. ValueError if there is none."""
    match = PHI.fullmatch(method) or TIMES.fullmatch(method)
    name = match[1] if match else method
    if name not in TRAINED_BY:
        raise unknown_name("method", method, [*TRAINED_BY, "compound_phi2.5", "depth_x8"])
    return name


def figure8_lines(costs: Mapping[str, float]) -> list[list[str]]:
    """Figure 8's lines: methods that scale the same way, by their cost, from the baseline if that is there."""
    methods = sorted(costs, key=costs.__getitem__)
    start = [method for method in methods if method == "baseline"]
    ways = dict.fromkeys(family(method).removesuffix("_matched") for method in methods if method not in start)
    return [start + [m for m in methods if family(m).removesuffix("_matched") == way] for way in ways]


def color(method: str) -> str:
    """The method's colour in every figure."""
    return COLORS[family(method)]


def text_color(method: str) -> str:
    """The method's colour, dark enough for words on white: a contrast of 4.5 at least, as WCAG asks."""
    return "#" + bytes(5 * part // 8 for part in bytes.fromhex(color(method)[1:])).hex()


# ---- 1. Profiles and planned runs ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Search:
    """A profile's search for alpha, beta and gamma on the baseline at phi = 1, as 03_coefficient_search does it."""

    step: float = 0.1  # of the grid over the three, each at least 1
    low: float = 1.9  # bounds of alpha * beta^2 * gamma^2
    high: float = 2.1
    max_flops: float = math.inf  # of a candidate, as a multiple of the baseline's, counted exactly
    seeds: tuple[int, ...] = (0,)  # the first of all candidates, further ones of those that were not pruned
    halving: int = 0  # reduction factor of Optuna's successive halving, by minival after each epoch; 0: none is pruned
    train: Mapping = field(default_factory=dict)  # what differs from the profile's recipe

    def __post_init__(self) -> None:
        for name in ("step", "low", "high", "max_flops"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{name}: expected a number, got {value!r}")
        if not self.max_flops >= 1:
            raise ValueError(f"max_flops: expected a multiple of the baseline's of at least 1, got {self.max_flops!r}")
        if not math.isfinite(self.high):
            raise ValueError(f"high: expected a finite number, got {self.high!r}")
        halving = self.halving
        if isinstance(halving, bool) or not isinstance(halving, int) or halving < 0 or halving == 1:
            raise ValueError(f"halving: expected 0, or a factor of at least 2, got {self.halving!r}")
        if (
            not isinstance(self.seeds, list | tuple)
            or not self.seeds
            or len(set(map(str, self.seeds))) < len(self.seeds)
        ):
            raise ValueError(f"seeds: expected a list without repetitions, got {self.seeds!r}")
        if not isinstance(self.train, Mapping):
            raise ValueError(f"train: expected settings of the recipe, got {self.train!r}")
        coefficient_grid(self.step, self.low, self.high)  # refuses one that has no candidates

    def settings(self) -> dict:
        """What coefficients.json says of the search that made it."""
        settings = {**dataclasses.asdict(self), "seeds": list(self.seeds), "train": dict(self.train)}
        return settings | {"max_flops": self.max_flops if self.max_flops < math.inf else None}


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
    retry_lr: float | None = None  # a diverged run is run once more, with its LR times this; both are reported
    search: Search | None = None  # for the coefficients of compound_searched
    ablation_of: str | None = (
        None  # another profile, whose recipe this one changes: all that `train` does not say is its
    )
    source: str | None = None  # how it was asked for, if not by its name: the path of a file

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

    def scaling(self, method: str, searched: tuple[float, float, float] | None = None) -> Scaling:
        """The method's coefficients (d, w, r).

        The paper's; for NAME_matched those that cost as much as compound; for compound_searched those of the searched
        alpha, beta and gamma at the phi whose FLOPs come nearest to compound's; both at any phi as NAME_phi2.5; and for
        NAME_x8 those that come nearest to 8 times the baseline's FLOPs. FLOPs here are the paper's network's, whatever
        the recipe makes of it.
        """
        phi, times = PHI.fullmatch(method), TIMES.fullmatch(method)
        compound = compound_scaling(float(phi[2])) if phi else TABLE7["compound"]
        axis, _, kind = family(method).partition("_")
        if not kind and not times:
            return compound if axis == "compound" else TABLE7[axis]
        here = (self.base_resolution, self.num_classes, self.stem_stride)
        flops = float(times[2]) * scaled_cost(Scaling(), *here).flops if times else scaled_cost(compound, *here).flops
        return _matched(axis, round(flops), searched if kind == "searched" else (1.2, 1.1, 1.15), *here)

    def command(self, words: str, results: str | Path | None = None) -> str:
        """What to type in a shell for `effnet WORDS` on this profile, such as study, with results where they are."""
        place = None if results is None else Path(results).absolute()
        elsewhere = "" if place in (None, RESULTS) else f" --results {shlex.quote(str(place))}"
        return f"effnet {words} {shlex.quote(self.source or self.name)}{elsewhere}"

    def cost(self, scaling: Scaling) -> Cost:
        """Parameters, FLOPs and activations of B0 scaled so, in this study."""
        se_expanded = self.train.get("se_expanded", False)
        return scaled_cost(scaling, self.base_resolution, self.num_classes, self.stem_stride, se_expanded)


@cache
def _matched(axis, flops: int, coefficients, base_resolution: int, num_classes: int, stem_stride: int) -> Scaling:
    options = {"num_classes": num_classes, "stem_stride": stem_stride, "coefficients": coefficients}
    return match_flops(axis, flops, base_resolution, **options).scaling


def profile_names() -> list[str]:
    return sorted(path.stem for path in (NOTEBOOKS / "profiles").glob("*.yaml"))


def load_profile(name: str | Path) -> Profile:
    """A profile by name (notebooks/profiles/NAME.yaml) or by path (any file that ends in .yaml).

    Raises ValueError naming the file, the key, what was expected and what was found.
    """
    path, values = _read_profile(name)
    try:
        profile = _checked_profile(path, values)
    except ValueError as error:
        raise ValueError(f"profile {path.name}: {error}") from None
    return dataclasses.replace(profile, source=str(name) if Path(name).suffix == ".yaml" else None)


def _read_profile(name: str | Path) -> tuple[Path, dict]:
    """A profile's file and what it says."""
    path = Path(name)
    if path.suffix != ".yaml":
        if str(name) not in profile_names():
            raise unknown_name("profile", str(name), profile_names())
        path = NOTEBOOKS / "profiles" / f"{name}.yaml"
    try:
        values = yaml.safe_load(path.read_text())
    except Exception as error:  # yaml lets many kinds through
        raise ValueError(f"profile {path}: cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"profile {path.name}: expected keys and values, got {values!r}")
    return path, values


def _as_changed(path: Path, values: dict) -> dict:
    """An ablation's file laid over the profile whose recipe it changes. It decides no claim, and so is no evidence."""
    other, own = values["ablation_of"], ("ablation_of", "title", "purpose", "methods", "seeds", "train")
    for key in values:
        if key not in own:
            raise ValueError(f"{key}: an ablation has that of {other}; it may change {', '.join(own[1:])}")
    file, whole = _read_profile(path.parent / other if other.endswith(".yaml") else other)
    if whole.get("ablation_of") is not None:
        raise ValueError(f"ablation_of: {other} is itself an ablation; name the profile that it changes")
    if values.get("purpose") == "evidence":
        raise ValueError("purpose: an ablation decides no claim; expected exploratory or check, got 'evidence'")
    _checked_profile(file, whole)
    kept = {key: value for key, value in whole.items() if key not in ("title", "methods", "search")}
    kept["purpose"] = "check" if whole["purpose"] == "check" else "exploratory"
    train = values.get("train")
    changed = {"train": kept["train"] | train} if isinstance(train, dict) else {}
    return kept | values | changed | {"ablation_of": str(file) if other.endswith(".yaml") else other}


def _checked_profile(path: Path, values: dict) -> Profile:
    name = path.stem
    kinds = {"title": str, "purpose": str, "data": dict, "base_resolution": int, "stem_stride": int}
    kinds |= {"methods": list, "seeds": list, "train": dict, "devices": int | str, "retry_lr": float | None}
    kinds |= {"search": dict | None, "ablation_of": str | None}
    if isinstance(values.get("ablation_of"), str):
        values = _as_changed(path, values)
    values = {"devices": 1, "retry_lr": None, "search": None, "ablation_of": None, **values}
    for key in [*values, *kinds]:
        if key not in kinds:
            raise unknown_name("key", key, kinds)
        if key not in values:
            raise ValueError(f"{key} is missing")
        if not isinstance(values[key], kinds[key]) or isinstance(values[key], bool):
            raise ValueError(f"{key}: expected {getattr(kinds[key], '__name__', kinds[key])}, got {values[key]!r}")
    if values["devices"] != "auto" and not (isinstance(values["devices"], int) and values["devices"] >= 1):
        raise ValueError(f"devices: expected auto, or a whole number of at least 1, got {values['devices']!r}")
    if values["retry_lr"] is not None and not 0 < values["retry_lr"] < 1:
        raise ValueError(f"retry_lr: expected a factor above 0 and below 1, got {values['retry_lr']!r}")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(f"its name {name!r} names a results folder: use letters, digits, '.', '_' and '-'")
    if values["purpose"] not in PURPOSES:
        raise unknown_name("purpose", values["purpose"], PURPOSES)
    arguments = ("name", "size", "classes", "train_per_class", "minival", "test", "split_seed", "title")
    for key in values["data"]:
        if key not in arguments:
            raise unknown_name("data setting", key, arguments)
    if "name" not in values["data"]:
        raise ValueError("data: name is missing")
    check_settings(**values["data"])
    if values["base_resolution"] < 8:
        raise ValueError(f"base_resolution: expected at least 8 px, got {values['base_resolution']!r}")
    if values["stem_stride"] not in (1, 2):
        raise ValueError(f"stem_stride: expected 1 or 2, got {values['stem_stride']!r}")
    for key in ("methods", "seeds"):
        if not values[key] or len(set(map(str, values[key]))) < len(values[key]):
            raise ValueError(f"{key}: expected a list without repetitions, got {values[key]!r}")
    for method in values["methods"]:
        if family(str(method)) == "compound_searched" and values["search"] is None:
            raise ValueError(f"methods: {method} needs a search for its coefficients; add search: {{step: 0.1}}")
    for key in ("resolution", "seed"):
        if key in values["train"]:
            raise ValueError(f"train: {key} follows from method and seeds; remove it")
    for seed in values["seeds"]:
        TrainConfig.from_dict({**values["train"], "seed": seed})
    checked = {key: tuple(values[key]) for key in ("methods", "seeds")}
    if values["search"] is not None:
        try:
            checked["search"] = _checked_search(values["search"], values["train"])
        except ValueError as error:
            raise ValueError(f"search: {error}") from None
    return Profile(name=name, **{**values, **checked})


def _checked_search(values: dict, train: dict) -> Search:
    names = [f.name for f in dataclasses.fields(Search)]
    for key in values:
        if key not in names:
            raise unknown_name("key", key, names)
    search = Search(**values)
    for key in ("resolution", "seed"):
        if key in search.train:
            raise ValueError(f"train: {key} follows from candidate and seeds; remove it")
    for seed in search.seeds:
        config = TrainConfig.from_dict({**train, **search.train, "seed": seed})
    if config.pretrained:
        raise ValueError("train: most candidates have no pretrained weights; set pretrained: false for the search")
    return dataclasses.replace(search, seeds=tuple(search.seeds))


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
        run.config  # noqa: B018 - refuses an unknown method, one not searched for, or an impossible seed
        return run

    @cached_property
    def scaling(self) -> Scaling:
        """FileNotFoundError if its coefficients have not been searched for."""
        if self.waiting:
            raise FileNotFoundError(
                f"{self.folder / COEFFICIENTS} is not there, or of another search than this profile's; search for "
                f"{self.method}'s coefficients first: {self.command('search')}"
            )
        return self.profile.scaling(self.method, searched_coefficients(self.profile, self.folder))

    @property
    def waiting(self) -> bool:
        """Whether its coefficients are still to be searched for."""
        searched = family(self.method) == "compound_searched"
        return searched and searched_coefficients(self.profile, self.folder) is None

    @property
    def config(self) -> TrainConfig:
        """The recipe, the same for every method but for its resolution."""
        resolution = round_resolution(self.scaling.resolution, self.profile.base_resolution)
        config = TrainConfig.from_dict({**self.profile.train, "resolution": resolution, "seed": self.seed})
        return dataclasses.replace(config, lr=config.lr * self.profile.retry_lr) if self._retrying else config

    @property
    def _retrying(self) -> bool:
        return self.profile.retry_lr is not None and (self.directory / DIVERGED).exists()

    @property
    def to_retry(self) -> bool:
        """Whether it is to be run once more if it diverges, or has diverged."""
        return self.profile.retry_lr is not None and not self._retrying

    @cached_property
    def cost(self) -> Cost:
        """Parameters, FLOPs and activations at its resolution."""
        return self.profile.cost(self.scaling)

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
        return self.folder / "notebooks" / f"{TRAINED_BY[family(self.method)]}_{self.method}_seed{self.seed}.ipynb"

    @property
    def about(self) -> dict:
        """What the run record says beyond what the trainer knows."""
        names = {"profile": self.profile.name, "purpose": self.profile.purpose, "method": self.method}
        retried = {"retried": read_record(self.directory, DIVERGED)["diverged"]} if self._retrying else {}
        return names | self._setting | retried

    @property
    def _setting(self) -> dict:
        """What makes this run the profile's, beside the recipe."""
        profile, coefficients = self.profile, dataclasses.asdict(self.scaling)
        return {"coefficients": coefficients, "stem_stride": profile.stem_stride, "data": profile.data}

    def model(self, num_classes: int) -> torch.nn.Module:
        """The untrained network, its initial weights drawn by the run's seed, or pretrained as the recipe says."""
        return network(self.scaling, num_classes, self.profile.stem_stride, self.config)

    def train(
        self, data: ImageData, device: str | None = None, each_epoch: Callable[[dict], bool | None] | None = None
    ) -> dict:
        """Train (or continue, or find finished) and return the record. RuntimeError if the run failed or diverged.

        Several devices have a process each, by torch's elastic launcher, or by torchrun, of whose this is then one.
        each_epoch: as in effnet_lib.train; on one device only.
        """
        if self.config.pretrained:
            mean, std = (255 * torch.tensor(values, device=data.device) for values in (IMAGENET_MEAN, IMAGENET_STD))
            data = dataclasses.replace(data, mean=mean, std=std)
        alone = not torch.distributed.is_torchelastic_launched()
        processes, record = self._processes(device), read_record(self.directory)
        if processes > 1 and each_epoch is not None:
            raise ValueError(f"each_epoch: works with devices: 1 only, got {processes}")
        if record is not None and (differences := self.differences(record)):
            raise Mismatch(
                f"{self.directory / 'run.json'} was made with {'; '.join(differences)}; delete {self.directory} to run "
                "anew, or keep it and give another results folder (results, --results)"
            )
        if processes > 1 and alone and record is None:
            if (holder := holder_of(self.directory)) is not None:
                raise Held(f"{self.directory} is held by another process, which is training this run now: {holder}")
            error = launch(processes, _train_share, (self, device), self.directory)
            if error is not None and read_record(self.directory) is None:  # else they have told it themselves
                record = {"status": "failed", **self.about, "seed": self.seed, "dataset": data.describe()}
                record |= {"config": dataclasses.asdict(self.config), "cost": dataclasses.asdict(self.cost)}
                write_record(self.directory, record | {"error": error})
            record = read_record(self.directory)
        else:
            model = self.model(len(data.classes))
            options = {"about": self.about, "device": device, "each_epoch": each_epoch}
            record = train(model, data, self.config, self.directory, **options)
        if record["status"] == "diverged" and self.to_retry and alone:
            for name in CHECKPOINTS:  # of the other rate
                (self.directory / name).unlink(missing_ok=True)
            (self.directory / "run.json").replace(self.directory / DIVERGED)
            print(f"{self.directory.name} {ending(record)}: once more, with LR {self.config.lr:.3g}", flush=True)
            return self.train(data, device, each_epoch)
        if record["status"] not in ("finished", "pruned"):
            raise RuntimeError(f"{self.directory.name} {ending(record)}; {self.again}")
        return record

    def command(self, words: str) -> str:
        """What to type in a shell for `effnet WORDS` on its profile."""
        return self.profile.command(words, self.results)

    @property
    def again(self) -> str:
        """How it is run again after it failed or diverged."""
        return f"run again with: {self.command('study')} --retry"

    def set_aside(self) -> None:
        """Make room for another attempt, which goes on from the last checkpoint, or anew if the run diverged; the last
        one's record stays as run.earlier.json."""
        diverged = read_record(self.directory)["status"] == "diverged"
        (self.directory / "run.json").replace(self.directory / "run.earlier.json")
        for checkpoint in CHECKPOINTS if diverged else ():
            (self.directory / checkpoint).unlink(missing_ok=True)

    def _processes(self, device: str | None) -> int:
        """The profile's devices, counted. ValueError if this machine has fewer GPUs."""
        wanted, gpus = self.profile.devices, gpu_count(device)
        if wanted == "auto":
            return max(1, gpus)
        if 0 < gpus < wanted:
            raise ValueError(f"devices: profile {self.profile.name} asks for {wanted}, torch finds {gpus}; use auto")
        return wanted

    def differences(self, record: Mapping) -> list[str]:
        """In what a record's settings are not those of this run, as the profile is now."""
        then = {key: record.get(key, now) for key, now in self._setting.items()} | recipe(record["config"])
        now = self._setting | recipe(dataclasses.asdict(self.config))
        for settings in (then, now):  # a title changes nothing
            settings["data"] = {key: value for key, value in settings["data"].items() if key != "title"}
        return [f"{key} = {then[key]!r}, now {now[key]!r}" for key in now if then.get(key) != now[key]]

    def state(self) -> str:
        """finished, failed, diverged, pruned (of a search), stale (the profile has changed since), damaged (its record
        cannot be trusted), running, interrupted, missing, or waiting (for its coefficients to be searched)."""
        if self.waiting:
            return "waiting"
        try:
            record = read_record(self.directory)
        except ValueError:
            return "damaged"
        if record is not None:
            return "stale" if self.differences(record) else record["status"]
        if holder_of(self.directory) is not None:
            return "running"
        return "interrupted" if any((self.directory / name).exists() for name in CHECKPOINTS) else "missing"


@dataclass(frozen=True)
class Candidate(Run):
    """A network of the coefficient search: the baseline scaled by `coefficients` (alpha, beta, gamma) at phi = 1.

    Scored on minival alone: what the record has under "test" is minival, too.
    """

    coefficients: tuple[float, float, float] = (1.2, 1.1, 1.15)

    @cached_property
    def scaling(self) -> Scaling:
        return compound_scaling(1, *self.coefficients)

    @property
    def name(self) -> str:
        a, b, g = (f"{c:.2f}" if round(c, 2) == c else f"{c:g}" for c in self.coefficients)
        return f"a{a}_b{b}_g{g}"

    @property
    def directory(self) -> Path:
        return self.folder / "search" / f"{self.name}_seed{self.seed}"

    @property
    def about(self) -> dict:
        return super().about | {"method": self.name, "scored": "minival"}

    @property
    def again(self) -> str:
        return f"run again with: {self.command('search')} --retry"

    def train(self, data: ImageData, *arguments, **options) -> dict:
        return super().train(_without_test(data), *arguments, **options)


def plan_search(profile: Profile, results: str | Path | None = None) -> tuple[pd.DataFrame, list[Candidate]]:
    """What a profile's search compares: all of the grid and the published coefficients as a table, a row each, and the
    candidates that are trained, with the search's first seed.

    Rounding makes one network of several coefficients: the first of them is trained, `same_as` names it for the
    others. Those above max_flops are not trained. ValueError if the profile has no search, or none is left.
    """
    search = profile.search
    if search is None:
        raise ValueError(f"profile {profile.name} has no search; add search: {{step: 0.1}} to it")
    # Each in one process and once, for what it is judged by is the scores of one attempt
    once = {"train": {**profile.train, **search.train}, "devices": 1, "retry_lr": None}
    study = dataclasses.replace(profile, **once)
    baseline, results = profile.cost(Scaling()), Path(results or RESULTS).absolute()
    rows, networks = [], {}
    for coefficients in dict.fromkeys([(1.2, 1.1, 1.15), *coefficient_grid(search.step, search.low, search.high)]):
        candidate = Candidate(study, "compound_phi1", search.seeds[0], results, coefficients)
        cost, scaling = candidate.cost, candidate.scaling
        names = dict(zip(("alpha", "beta", "gamma"), coefficients, strict=True))
        row = {"candidate": candidate.name, **names, "product": math.prod((*coefficients, *coefficients[1:]))}
        row |= {"px": candidate.config.resolution, **dataclasses.asdict(cost)}
        row |= {"flops_ratio": cost.flops / baseline.flops, "published": coefficients == (1.2, 1.1, 1.15)}
        row["affordable"] = row["flops_ratio"] <= search.max_flops
        network = (
            row["px"],
            tuple(round_repeats(stage.layers, scaling.depth) for stage in STAGES),
            tuple(
                round_filters(c, scaling.width) for c in (STEM_CHANNELS, HEAD_CHANNELS, *(s.channels for s in STAGES))
            ),
        )
        first = networks.setdefault(network, candidate)
        rows.append(row | {"same_as": None if first is candidate else first.name})
    table = pd.DataFrame(rows)
    trained = set(table["candidate"][table["affordable"] & table["same_as"].isna()])
    if not trained:
        least = table["flops_ratio"].min()
        raise ValueError(
            f"search: max_flops: {search.max_flops!r} leaves none of {len(table)} candidates, the cheapest of which "
            f"costs {least:.2f} times the baseline"
        )
    return table, [candidate for candidate in networks.values() if candidate.name in trained]


COEFFICIENTS = "coefficients.json"  # the outcome of a profile's search, in its folder


def searched_coefficients(profile: Profile, folder: Path) -> tuple[float, float, float] | None:
    """alpha, beta, gamma that the profile's search found; None if it has not been made, or not as the profile is now.
    ValueError if the file is damaged."""
    path = folder / COEFFICIENTS
    if profile.search is None or not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
        coefficients = tuple(float(found[name]) for name in ("alpha", "beta", "gamma"))
        compound_scaling(1, *coefficients)
    except (ValueError, KeyError, TypeError) as error:
        again = profile.command("search", folder.parent)
        raise ValueError(f"{path} is damaged ({error!r}); delete it, then: {again}") from None
    return coefficients if found.get("made_by") == made_by(profile) else None


def made_by(profile: Profile) -> dict:
    """All of a profile that its search's outcome depends on, as coefficients.json keeps it."""
    data = {key: value for key, value in profile.data.items() if key != "title"}
    network = {"base_resolution": profile.base_resolution, "stem_stride": profile.stem_stride}
    return {"search": profile.search.settings(), "recipe": dict(profile.train), "data": data, **network}


def describe_search(found: Mapping) -> str:
    """What coefficients.json says, in words."""
    words = "alpha {alpha:g}, beta {beta:g}, gamma {gamma:g}, with {minival_top1:.2f} % of minival, did best of "
    words += "{candidates} candidates. "
    if found["finished"] == 1:
        words += "No other was trained to its end, so how sure that is cannot be said."
    else:
        words += (
            "It is the best in {best_in_percent_of_draws:.0f} % of the draws of {drawn}; of the {others} others that "
        )
        words += "were trained to the end {equal} cannot be told from it."
    if found["pruned"]:
        words += " {pruned} were pruned by their early scores."
    drawn = "images and seeds" if found["seeds"] > 1 else "images, with one seed"
    return words.format(drawn=drawn, others=found["finished"] - 1, equal=len(found["not_told_apart"]), **found)


@dataclass(frozen=True)
class ModelRun(Run):
    """A network by its own name (`method`: b0 to b7, or one of NEIGHBOURS), trained on a profile's images by its
    recipe.

    It is no part of the profile's study, and lies in models/ beside its runs.
    """

    pixels: int | None = None  # default: the profile's, scaled as the variant is
    waiting = False
    again = "to run it again, delete its folder"

    @cached_property
    def scaling(self) -> Scaling:
        if self.method not in (*VARIANTS, *NEIGHBOURS):
            raise unknown_name("model", self.method, [*VARIANTS, *NEIGHBOURS])
        return VARIANTS.get(self.method, Scaling())

    @property
    def config(self) -> TrainConfig:
        config = super().config
        return dataclasses.replace(config, resolution=self.pixels or config.resolution)

    @cached_property
    def cost(self) -> Cost:
        with torch.device("meta"):
            options = {"stem_stride": self.profile.stem_stride, "se_expanded": self.config.se_expanded}
            model = create_model(self.method, self.profile.num_classes, **options)
        return count_cost(model, self.config.resolution)

    @property
    def directory(self) -> Path:
        start = "_pretrained" * self.config.pretrained + "_frozen" * self.config.freeze
        return self.folder / "models" / f"{self.method}{start}_{self.config.resolution}px_seed{self.seed}"

    @property
    def about(self) -> dict:
        return super().about | {"model": self.method}

    def model(self, num_classes: int) -> torch.nn.Module:
        return network(self.scaling, num_classes, self.profile.stem_stride, self.config, self.method)


def plan_model(
    model: str,
    dataset: str,
    results: str | Path | None = None,
    *,
    seed: int = 0,
    pixels: int | None = None,
    changes: Mapping[str, object] | None = None,
) -> ModelRun:
    """A network by name on a data set, by the recipe of a profile with some settings changed.

    dataset: a profile, whose data and recipe are taken, or the name of a data set (as in load_data), for which the
    recipe is PLAIN_RECIPE. pixels: of the network's input. Raises ValueError for anything unknown.
    """
    if dataset in profile_names() or dataset.endswith(".yaml"):
        profile = load_profile(dataset)
    else:
        check_settings(dataset)
        # A folder's images are stored as large as the network wants them: weights of ImageNet are used to 224 px
        base = SIZES.get(dataset) or pixels or (224 if (changes or {}).get("pretrained") else 64)
        size = SIZES.get(dataset) or pixels or round_resolution(VARIANTS.get(model, Scaling()).resolution, base)
        data = {"name": dataset, "size": size, "classes": class_count(dataset)}
        name = Path(dataset.partition(":")[2] or dataset).expanduser().absolute().name
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", name)
        about = {"title": name, "purpose": "exploratory", "methods": (), "seeds": (seed,), "train": PLAIN_RECIPE}
        profile = Profile(name, data=data, base_resolution=base, stem_stride=1 if base <= 64 else 2, **about)
    for key, option in (("resolution", "--resolution"), ("seed", "--seed")):
        if key in (changes or {}):
            raise ValueError(f"{key} is no setting of the recipe; give it by {option}")
    profile = dataclasses.replace(profile, train={**profile.train, **(changes or {})}, retry_lr=None)
    run = ModelRun(profile, model, seed, Path(results or RESULTS).absolute(), pixels)
    run.config  # noqa: B018 - refuses what cannot be
    return run


def network(
    scaling: Scaling, num_classes: int, stem_stride: int, config: TrainConfig, name: str | None = None
) -> torch.nn.Module:
    """The network of a run: B0 scaled, or one by its name; with ImageNet's weights and frozen as the config says."""
    torch.manual_seed(config.seed)
    options = {"stem_stride": stem_stride, **config.model_options()}
    if config.pretrained and name is None:
        name = next((n for n, s in VARIANTS.items() if (s.depth, s.width) == (scaling.depth, scaling.width)), None)
        if name is None:
            raise ValueError(f"pretrained: there are no ImageNet weights of {scaling}, only of b0 to b7 and neighbours")
    if name is None:
        return EfficientNet(scaling, num_classes, **options)
    model = create_model(name, num_classes, pretrained=config.pretrained, new_head=config.pretrained, **options)
    return freeze_backbone(model) if config.freeze else model


@elastic_record
def _train_share(run: Run, device: str | None) -> str | None:
    """One of the processes that train a run together. Returns why it was interrupted, if it was."""
    try:
        run.train(load_data(**run.profile.data), device)
    except Interrupted as reason:
        return str(reason)


def ending(record: Mapping) -> str:
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
    data = _without_test(load_data(**profile.data))
    label = "_".join(f"{key}={value}" for key, value in sorted(changes.items())) or "as_it_is"
    about = run.about | {"pilot": dict(changes), "scored": "minival"}
    return train(
        run.model(len(data.classes)), data, run.config, run.folder / "pilots" / label, about=about, device=device
    )


def _without_test(data: ImageData) -> ImageData:
    """The same images with minival in the place of test."""
    return dataclasses.replace(data, indices=data.indices | {"test": data.indices["minival"]})


def rerun(path: str | Path, results: str | Path = "rerun", device: str | None = None) -> pd.DataFrame:
    """Train again what a run.json describes, from its words alone, in RESULTS/NAME-OF-ITS-FOLDER; the scores then and
    now. ValueError if the record does not say enough, or if the images here are others."""
    path = Path(path)
    record = read_record(path.parent if path.name == "run.json" else path)
    if record is None:
        raise FileNotFoundError(f"{path}: expected a run.json, or a folder with one")
    for part in ("data", "coefficients", "stem_stride", "dataset"):
        if part not in record:
            raise ValueError(
                f"{path} does not say its {part}: it is of an older version, or of a run without a profile"
            )
    config, data = TrainConfig.from_dict(record["config"]), load_data(**record["data"])
    data = _without_test(data) if record.get("scored") == "minival" else data
    if data.fingerprint != record["dataset"]["fingerprint"]:
        raise ValueError(f"{path} was trained on other images than those of {record['data']} here")
    if config.pretrained:
        raise ValueError(f"{path} began with pretrained weights; repeat it with effnet train --pretrained")
    scaling, name = Scaling(**record["coefficients"]), record.get("model")
    model = network(scaling, len(data.classes), record["stem_stride"], config, name)
    kept = ("profile", "purpose", "method", "model", "coefficients", "stem_stride", "data", "pilot", "scored", "git")
    about = {key: record[key] for key in kept if key in record}
    about["rerun_of"] = about.pop("git", {}).get("commit")
    folder = Path(results) / (path.parent if path.name == "run.json" else path).resolve().name
    if (folder / "run.json").exists():
        raise ValueError(f"{folder} holds a run already: delete it, or give another results folder")
    now = train(model, data, config, folder, about=about, device=device)
    scores = {when: {"status": r["status"], **r.get("test", {})} for when, r in (("then", record), ("now", now))}
    return pd.DataFrame(scores).T


# ---- 2. Records as tables ------------------------------------------------------------------------------------------


def load_runs(profile: str | Path | Profile, results: str | Path | None = None) -> pd.DataFrame:
    """The runs of a profile, a row each, in the profile's order. Unfinished ones have a status and no scores.

    top1, top5 are percentages, flops multiply-adds, seconds the whole run's, peak_memory_bytes torch's on a GPU
    and the process's on a CPU.
    """
    profile = profile if isinstance(profile, Profile) else load_profile(profile)
    rows = []
    for run in plan_runs(profile, results):
        row = {"method": run.method, "seed": run.seed, "status": run.state()}
        if row["status"] == "waiting":
            rows.append(row | dict.fromkeys(("directory", "d", "w", "r", "resolution")))
            continue
        row |= {"directory": run.directory}
        row |= {"d": run.scaling.depth, "w": run.scaling.width, "r": run.scaling.resolution}
        row |= {"resolution": run.config.resolution}
        if row["status"] == "finished":
            record = read_record(run.directory)
            row |= {**record["cost"], **record["test"], "raw_top1": record["test_raw"]["top1"]}
            row |= {"minival_top1": record["minival"]["top1"], "device": record["device"]["name"]}
            row |= {"commit": record["git"]["commit"], "data": record["dataset"]["title"]}
            row |= {"retried": "retried" in record}
            kept = ("seconds", "images_per_second", "peak_memory_bytes", "micro_batch", "started", "ended")
            row |= {name: record[name] for name in kept}
        rows.append(row)
    return pd.DataFrame(rows)


def load_pilots(profile: str | Path | Profile, results: str | Path | None = None) -> pd.DataFrame:
    """The pilots of a profile, a row each, best first: the settings in which they differ, and their minival scores."""
    profile = profile if isinstance(profile, Profile) else load_profile(profile)
    rows, configs = [], []
    for path in sorted((Path(results or RESULTS) / profile.name / "pilots").glob("*/run.json")):
        try:
            record = read_record(path.parent)
        except ValueError as error:
            print(error)
            continue
        scores = {f"minival_{name}": record.get("minival", {}).get(name) for name in ("top1", "top5", "loss")}
        rows.append({"pilot": path.parent.name, "status": record["status"], **scores, "seconds": record.get("seconds")})
        configs.append(recipe(record["config"]))
    if not rows:
        return pd.DataFrame()
    settings = pd.DataFrame(configs)
    table = pd.concat([pd.DataFrame(rows), settings.loc[:, settings.nunique() > 1]], axis="columns")
    return table.sort_values("minival_top1", ascending=False, ignore_index=True)


def load_history(directory: str | Path) -> pd.DataFrame:
    """history.jsonl of a run: a row per epoch, minival scored with the EMA weights."""
    return pd.read_json(Path(directory) / "history.jsonl", lines=True)
