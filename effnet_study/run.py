"""Runs: one network of a study, a method and a seed. Where its results go, its state, and how it is trained.

At the end also a study's other kinds of run: pilots, which choose a recipe, and reruns of a record.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd
import torch
from torch import distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record as elastic_record

from effnet_lib import VARIANTS, Cost, EfficientNet, Scaling, TrainConfig, round_resolution, unknown_name
from effnet_study.coefficients import COEFFICIENTS, searched_coefficients
from effnet_study.data.dataset import ImageData
from effnet_study.data.load import load_data
from effnet_study.files import CHECKPOINTS, RESULTS, RunMismatch, holder_of, remove_checkpoints
from effnet_study.machine import choose_device, gpu_count
from effnet_study.methods import HEADLINE_METHODS, TRAINED_BY, base_method
from effnet_study.parallel import check_shares, launch
from effnet_study.pretrained import IMAGENET_MEAN, IMAGENET_STD, create_model, freeze_backbone
from effnet_study.profile import Profile, load_profile
from effnet_study.record import (
    assemble,
    baseline_coefficients,
    ending,
    read_record,
    recipe,
    recorded_scaling,
    write_record,
)
from effnet_study.stop import Interrupted
from effnet_study.training import train

ENDED = ("finished", "failed", "diverged")


def _as_expected(data: ImageData, config: TrainConfig) -> ImageData:
    """Return the data, normalised by ImageNet's mean and std if training begins with ImageNet's weights."""
    if not config.pretrained:
        return data
    mean, std = (255 * torch.tensor(values, device=data.device) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return dataclasses.replace(data, mean=mean, std=std)


@dataclass(frozen=True)
class Run:
    """One planned network: a method and a seed of a profile, and where its results go."""

    profile: Profile
    method: str
    seed: int
    results: Path = RESULTS  # holds a folder per profile

    @classmethod
    def plan(cls, profile: str | Path | Profile, method: str, seed: int, results: str | Path | None = None) -> "Run":
        """Return the run that a notebook's parameters name, after checking them."""
        profile = profile if isinstance(profile, Profile) else load_profile(profile)
        run = cls(profile, method, seed, Path(results or RESULTS).absolute())
        run.config  # noqa: B018 - refuses an unknown method, one not searched for, or an impossible seed
        return run

    @cached_property
    def scaling(self) -> Scaling:
        """The method's coefficients. FileNotFoundError if they have not been searched for."""
        if self.waiting:
            raise FileNotFoundError(
                f"{self.study_dir / COEFFICIENTS} does not exist, or belongs to another search; search for "
                f"{self.method}'s coefficients first: {self.command('search')}"
            )
        return self.profile.scaling(self.method, searched_coefficients(self.profile, self.study_dir))

    @property
    def waiting(self) -> bool:
        """Whether its coefficients have not been searched yet."""
        searched = base_method(self.method) == "compound_searched"
        return searched and searched_coefficients(self.profile, self.study_dir) is None

    @property
    def config(self) -> TrainConfig:
        """The recipe. Only the resolution differs between methods."""
        resolution = round_resolution(self.scaling.resolution, self.profile.base_resolution)
        return self.profile.config(resolution=resolution, seed=self.seed)

    @cached_property
    def cost(self) -> Cost:
        return self.profile.cost(self.scaling)

    @property
    def study_dir(self) -> Path:
        """The study's folder: runs/, notebooks/, tables/, figures/."""
        return self.results / self.profile.name

    @property
    def run_dir(self) -> Path:
        return self.study_dir / "runs" / f"{self.method}_{self.scaling}_seed{self.seed}"

    @property
    def executed(self) -> Path:
        """The executed notebook."""
        name = f"{TRAINED_BY[base_method(self.method)]}_{self.method}_seed{self.seed}.ipynb"
        return self.study_dir / "notebooks" / name

    @property
    def about(self) -> dict:
        """Entries of the record that the trainer does not know: profile, method, coefficients, data."""
        return {
            "profile": self.profile.name,
            "purpose": self.profile.purpose,
            "method": self.method,
            "coefficients": dataclasses.asdict(self.scaling),
            "baseline": baseline_coefficients(self.profile.baseline),
            "stem_stride": self.profile.stem_stride,
            "data": self.profile.data.given(),
        }

    def model(self, num_classes: int) -> torch.nn.Module:
        """Build the untrained network. The run's seed draws its weights, unless the recipe says pretrained."""
        return build_network(self.scaling * self.profile.baseline, num_classes, self.profile.stem_stride, self.config)

    def train(
        self, data: ImageData, device: str | None = None, deadline: float | None = None, tensorboard: bool | None = None
    ) -> dict:
        """Train (or continue, or find finished) and return the record. RuntimeError if the run failed or diverged.

        With several devices, each has a process: torch's elastic launcher starts them here, or torchrun has started
        this one. deadline, tensorboard: as in `training.train`.
        """
        data, record = _as_expected(data, self.config), read_record(self.run_dir)
        processes = self._processes(device) if record is None else 1
        if record is not None and (differences := self.differences(record)):
            raise RunMismatch(
                f"{self.run_dir / 'run.json'} was made with {'; '.join(differences)}; delete {self.run_dir} to start "
                "again, or keep it and give another folder for results (results, --results)"
            )
        options = {"deadline": deadline, "tensorboard": tensorboard}
        if processes > 1 and not dist.is_torchelastic_launched():
            error = launch(processes, _train_share, (self, device, options), self.run_dir)
            if error is not None and read_record(self.run_dir) is None:
                known = (self.config, self.cost, data.describe(), choose_device(device))
                write_record(self.run_dir, assemble(self.about, *known, {"error": error}))
            record = read_record(self.run_dir)
        else:
            model = self.model(len(data.classes))
            record = train(model, data, self.config, self.run_dir, about=self.about, device=device, **options)
        if record["status"] != "finished":
            raise RuntimeError(f"{self.run_dir.name} {ending(record)}; {self.again}")
        return record

    def command(self, words: str) -> str:
        return self.profile.command(words, self.results)

    @property
    def again(self) -> str:
        """How to run it again after it failed or diverged."""
        return f"run again with: {self.command('study')} --retry"

    def set_aside(self) -> None:
        """Prepare another attempt at a run that failed or diverged: rename its record to run.earlier.json. The new
        attempt continues from the last checkpoint, or starts again if the run diverged."""
        state = self.state()
        if state in ("failed", "diverged"):
            (self.run_dir / "run.json").replace(self.run_dir / "run.earlier.json")
        if state == "diverged":
            remove_checkpoints(self.run_dir)

    def _processes(self, device: str | None) -> int:
        """Count the profile's devices. ValueError if this machine has fewer GPUs, or they cannot share a batch."""
        wanted, gpus = self.profile.devices, gpu_count(device)
        if wanted == "auto":
            wanted = max(1, gpus)
        elif 0 < gpus < wanted:
            raise ValueError(f"devices: profile {self.profile.name} asks for {wanted}, torch finds {gpus}; use auto")
        check_shares(self.config.batch_size, wanted)
        return wanted

    def differences(self, record: Mapping) -> list[str]:
        """List the settings in which a record differs from this run, as the profile is now."""
        now = {key: self.about[key] for key in ("coefficients", "baseline", "stem_stride", "data")}
        then = {key: record.get(key, now[key]) for key in now} | recipe(record["config"])
        now |= recipe(dict(self.config))
        for settings in (then, now):  # a title changes nothing
            settings["data"] = {key: value for key, value in settings["data"].items() if key != "title"}
        return [f"{key} = {then[key]!r}, now {now[key]!r}" for key in now if then[key] != now[key]]

    def is_to_do(self, retry: bool = False) -> bool:
        """Tell whether the run is still to be trained. A run with a damaged record is not, because its result may still
        be recoverable; a failed or diverged run is trained only with `retry`."""
        state = self.state()
        return retry if state in ("failed", "diverged") else state not in ("finished", "damaged")

    def state(self) -> str:
        """Return finished, failed, diverged, stale (the profile has changed since), damaged (its record cannot be
        trusted), running, interrupted, missing, or waiting (for its coefficients to be searched)."""
        if self.waiting:
            return "waiting"
        try:
            record = read_record(self.run_dir)
        except ValueError:
            return "damaged"
        if record is not None:
            return "stale" if self.differences(record) else record["status"]
        if holder_of(self.run_dir) is not None:
            return "running"
        return "interrupted" if any((self.run_dir / name).exists() for name in CHECKPOINTS) else "missing"


@elastic_record
def _train_share(run: Run, device: str | None, options: Mapping) -> str | None:
    """Train as one of several processes. Return why it was interrupted, if it was."""
    try:
        run.train(load_data(**run.profile.data.given()), device, **options)
        dist.destroy_process_group()
    except Interrupted as reason:
        return str(reason)


def build_network(
    scaling: Scaling, num_classes: int, stem_stride: int, config: TrainConfig, name: str | None = None
) -> torch.nn.Module:
    """Build a run's network: B0 scaled, or one by its name, with ImageNet's weights and frozen as the config says."""
    torch.manual_seed(config.seed)
    options = {"stem_stride": stem_stride, **config.model_options()}
    if name is None and not config.pretrained:
        return EfficientNet(scaling, num_classes, **options)
    if name is None:
        name = next((n for n, s in VARIANTS.items() if (s.depth, s.width) == (scaling.depth, scaling.width)), None)
    if name is None:
        raise ValueError(f"pretrained: there are no ImageNet weights of {scaling}, only of b0 to b7 and others by name")
    model = create_model(name, num_classes, pretrained=config.pretrained, new_head=config.pretrained, **options)
    return freeze_backbone(model) if config.freeze else model


def plan_runs(
    profile: Profile, results: str | Path | None = None, methods: Iterable | None = None, seeds: Iterable | None = None
) -> list[Run]:
    """Return the profile's runs of these methods and seeds (default: all), in the order of `Profile.planned`."""
    all_seeds = (*profile.seeds, *(profile.more_seeds or ()))
    methods, seeds = methods or profile.methods, seeds or all_seeds
    for kind, asked, valid in (("method", methods, profile.methods), ("seed", seeds, all_seeds)):
        for value in asked:
            if value not in valid:
                raise unknown_name(f"{kind} of profile {profile.name}", value, valid)
    planned = [(method, seed) for method, seed in profile.planned if method in methods and seed in seeds]
    if not planned:
        asked = f"method {', '.join(methods)} with seed {', '.join(map(str, seeds))}"
        raise ValueError(
            f"profile {profile.name} plans no run of {asked}; more_seeds are of {', '.join(HEADLINE_METHODS)} alone"
        )
    return [Run(profile, method, seed, Path(results or RESULTS).absolute()) for method, seed in planned]


def load_runs(profile: Profile, results: str | Path | None = None) -> pd.DataFrame:
    """Return the runs of a profile, a row each, in the profile's order. Unfinished ones have a status and no scores.
    peak_memory_bytes is torch's on a GPU and the process's on a CPU."""
    rows = []
    for run in plan_runs(profile, results):
        row = {"method": run.method, "seed": run.seed, "status": run.state()}
        row |= dict.fromkeys(("run_dir", "resolution", "d", "w", "r"))
        if row["status"] != "waiting":
            row |= {"run_dir": run.run_dir, "resolution": run.config.resolution}
            row |= dict(zip("dwr", vars(run.scaling).values(), strict=True))
        if row["status"] == "finished":
            record = read_record(run.run_dir)
            row |= {**record["cost"], **record["test"], "raw_top1": record["test_raw"]["top1"]}
            row |= {"minival_top1": record["minival"]["top1"], "device": record["device"]["name"]}
            row |= {"commit": record["git"]["commit"], "data": record["dataset"]["title"]}
            kept = ("seconds", "images_per_second", "peak_memory_bytes", "micro_batch", "started", "ended")
            row |= {name: record[name] for name in kept} | {"devices": record.get("devices", 1)}
        rows.append(row)
    return pd.DataFrame(rows)


# ---- Pilots and reruns ---------------------------------------------------------------------------------------------


def pilot(
    profile: Profile, changes: Mapping, results: str | Path | None = None, device: str | None = None, seed: int = 0
) -> dict:
    """Train a profile's baseline with some settings of its recipe changed, or its `baseline` ({depth: 1, width: 0.35})
    or `base_resolution`, to choose these settings. No test image is read: the record, in
    RESULTS/PROFILE/pilots/CHANGES_seedN/, has minival's scores under "test" too."""
    outside = {key: changes[key] for key in ("baseline", "base_resolution") if key in changes}
    inside = {key: value for key, value in changes.items() if key not in outside}
    profile = profile.replace(train=profile.train | inside, **outside)
    run = Run(profile, "baseline", seed, Path(results or RESULTS))
    data = load_data(**profile.data.given()).without_test()
    words = {**changes, **({"baseline": str(profile.baseline)[:11]} if "baseline" in changes else {})}
    label = "_".join(f"{key}={value}" for key, value in sorted(words.items())) or "as_it_is"
    about = run.about | {"purpose": "exploratory", "pilot": dict(changes), "scored": "minival"}
    run_dir = run.study_dir / "pilots" / f"{label}_seed{seed}"
    data = _as_expected(data, run.config)
    return train(run.model(len(data.classes)), data, run.config, run_dir, about=about, device=device)


def rerun(path: str | Path, results: str | Path = "rerun", device: str | None = None) -> pd.DataFrame:
    """Train again what a run.json describes, in RESULTS/NAME-OF-ITS-FOLDER and in one process. Return the scores then
    and now, a row each, with the micro-batches that batch norm saw, which several processes make smaller.

    ValueError if the record does not say enough, or if the images here differ from the recorded ones."""
    source = Path(path).parent if Path(path).name == "run.json" else Path(path)
    record, run_dir = read_record(source), Path(results) / source.resolve().name
    if record is None:
        raise FileNotFoundError(f"{path}: expected a run.json, or a folder with one")
    for part in ("data", "coefficients", "stem_stride", "dataset"):
        if part not in record:
            raise ValueError(f"{path} does not say its {part}: it is of an older version, or without a profile")
    config, data = TrainConfig(**record["config"]), load_data(**record["data"])
    data = data.without_test() if record.get("scored") == "minival" else data
    if data.fingerprint != record["dataset"]["fingerprint"]:
        raise ValueError(f"{path} was trained on other images than those of {record['data']} here")
    if config.pretrained:
        raise ValueError(f"{path} began with pretrained weights; repeat it with effnet train --pretrained")
    if (run_dir / "run.json").exists():
        raise ValueError(f"{run_dir} holds a run already: delete it, or give another folder for results")
    scaling = recorded_scaling(record)
    model = build_network(scaling, len(data.classes), record["stem_stride"], config, record.get("model"))
    kept = ("profile", "purpose", "method", "model", "coefficients", "baseline", "stem_stride", "data")
    kept += ("pilot", "scored")
    about = {key: record[key] for key in kept if key in record} | {"rerun_of": record.get("git", {}).get("commit")}
    now = train(model, data, config, run_dir, about=about, device=device)
    both = (("then", record), ("now", now))
    scores = {
        when: {"status": r["status"], **r.get("test", {}), "micro_batch": r.get("micro_batch")} for when, r in both
    }
    return pd.DataFrame(scores).T
