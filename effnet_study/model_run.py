"""Runs of networks by their own names: B0 to B7 and torchvision's, on a profile's images or on any data set."""

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from effnet_lib import TABLE7, VARIANTS, Cost, Scaling, TrainConfig, count_cost, round_resolution
from effnet_study.data.load import data_root, find_source
from effnet_study.data.sources import CLASS_COUNTS, SIZES, DataSettings
from effnet_study.files import RESULTS, plain
from effnet_study.pretrained import check_name, create_model
from effnet_study.profile import Profile, load_profile, profile_names
from effnet_study.run import Run, build_network

# For data sets without a profile: `effnet train --model b0 --dataset folder:PATH`
PLAIN_RECIPE = {"epochs": 10, "batch_size": 32, "optimizer": "sgd", "lr": 0.05, "weight_decay": 1e-4}
PLAIN_RECIPE |= {"norm_momentum": 0.1, "ema_decay": 0.99}


@dataclass(frozen=True)
class ModelRun(Run):
    """A network by its own name (`method`: b0 to b7, or a name of TORCHVISION_MODELS) on a profile's images.

    It does not belong to the profile's study. Its folder is in models/, beside runs/."""

    pixels: int | None = None  # of the network's input; by default the profile's, scaled as the variant is
    waiting = False
    again = "to run it again, delete its folder"

    @cached_property
    def scaling(self) -> Scaling:
        check_name(self.method)
        return VARIANTS.get(self.method, Scaling())

    @property
    def config(self) -> TrainConfig:
        config = super().config
        return config if self.pixels is None else config.replace(resolution=self.pixels)

    @cached_property
    def cost(self) -> Cost:
        with torch.device("meta"):
            options = {"stem_stride": self.profile.stem_stride, "se_expanded": self.config.se_expanded}
            model = create_model(self.method, self.profile.num_classes, **options)
        return count_cost(model, self.config.resolution)

    @property
    def run_dir(self) -> Path:
        start = "_pretrained" * self.config.pretrained + "_frozen" * self.config.freeze
        return self.study_dir / "models" / f"{self.method}{start}_{self.config.resolution}px_seed{self.seed}"

    @property
    def about(self) -> dict:
        return super().about | {"purpose": "exploratory", "model": self.method}

    def model(self, num_classes: int) -> torch.nn.Module:
        return build_network(self.scaling, num_classes, self.profile.stem_stride, self.config, self.method)


def plan_model(
    model: str,
    dataset: str,
    results: str | Path | None = None,
    *,
    seed: int = 0,
    pixels: int | None = None,
    changes: Mapping[str, object] | None = None,
) -> ModelRun:
    """Plan a network by name on a data set. ValueError for anything unknown.

    dataset: a profile, for its data and recipe, or the name of a data set (as in load_data), for which the recipe is
    PLAIN_RECIPE. pixels: of the network's input. changes: to the recipe, or to the data, such as minival and test.
    """
    changes = dict(changes or {})
    images = {key: changes.pop(key) for key in DataSettings.model_fields.keys() - {"name"} if key in changes}
    for key in ("resolution", "seed"):
        if key in changes:
            argument = "pixels" if key == "resolution" else key
            raise ValueError(f"{key} is no setting of the recipe; give it by --{key}, or as the argument {argument}")
    if dataset in profile_names() or dataset.endswith((".yaml", ".yml")):
        profile = load_profile(dataset)
        profile = profile.replace(train=profile.train | changes, baseline=TABLE7["baseline"])
    else:
        profile = _plain_profile(model, dataset, seed, pixels, PLAIN_RECIPE | changes)
    if images:
        profile = profile.model_copy(update={"data": DataSettings(**profile.data.given() | images)})
    run = ModelRun(profile, model, seed, Path(results or RESULTS).absolute(), pixels)
    run.config  # noqa: B018 - raises ValueError for invalid settings
    return run


def _plain_profile(model: str, dataset: str, seed: int, pixels: int | None, train: dict) -> Profile:
    """Return a profile for a data set that has none. Its name is the data set's; a folder's has letters of any script,
    and a digest of its path, since two folders may have one name."""
    # A folder's images are stored as large as the network needs them; ImageNet's weights expect 224 px
    base = SIZES.get(dataset) or pixels or (224 if train.get("pretrained") else 64)
    size = SIZES.get(dataset) or pixels or round_resolution(VARIANTS.get(model, Scaling()).resolution, base)
    title, name, classes = dataset, dataset, CLASS_COUNTS.get(dataset)
    if dataset not in SIZES:
        source = find_source(DataSettings(name=dataset), data_root())
        path, classes = source.folder.resolve(), len(source.classes)
        title = plain(path.name) or "folder"
        name = re.sub(r"[^\w.\x80-\U0010ffff-]+", "-", title).lstrip("-._") or "folder"
        place = hashlib.blake2b(os.fsencode(path), digest_size=4).hexdigest()
        name = f"{name.encode()[:200].decode(errors='ignore')}-{place}"
    profile = Profile(
        name="folder",
        title=title,
        purpose="exploratory",
        data=DataSettings(name=dataset, size=size, classes=classes),
        base_resolution=base,
        stem_stride=1 if base <= 64 else 2,
        groups=(),
        seeds=(seed,),
        train=train,
    )
    return profile.model_copy(update={"name": name})  # a profile's file has no such name
