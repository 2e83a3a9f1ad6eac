"""The coefficient search: candidates for alpha, beta and gamma at phi = 1, as 03_coefficient_search compares them."""

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from effnet_lib import Scaling, compound_scaling
from effnet_study.data.dataset import ImageData
from effnet_study.files import RESULTS
from effnet_study.methods import PUBLISHED, coefficient_grid
from effnet_study.profile import Profile
from effnet_study.run import Run


@dataclass(frozen=True)
class Candidate(Run):
    """A network of the search: the baseline scaled by `coefficients` (alpha, beta, gamma) at phi = 1. It is scored on
    minival alone: what the record has under "test" is minival, too."""

    coefficients: tuple[float, float, float] = PUBLISHED

    @cached_property
    def scaling(self) -> Scaling:
        return compound_scaling(1, *self.coefficients)

    @property
    def name(self) -> str:
        a, b, g = (f"{c:.2f}" if round(c, 2) == c else f"{c:g}" for c in self.coefficients)
        return f"a{a}_b{b}_g{g}"

    @property
    def run_dir(self) -> Path:
        return self.study_dir / "search" / f"{self.name}_seed{self.seed}"

    @property
    def about(self) -> dict:
        return super().about | {"method": self.name, "scored": "minival"}

    @property
    def again(self) -> str:
        return f"run again with: {self.command('search')} --retry"

    def train(self, data: ImageData, *arguments, **options) -> dict:
        return super().train(data.without_test(), *arguments, **options)


def plan_search(profile: Profile, results: str | Path | None = None) -> tuple[pd.DataFrame, list[Candidate]]:
    """Return what a profile's search compares: the grid and the published coefficients as a table, a row each, and the
    candidates that are trained, with the search's first seed.

    Rounding makes one network of several coefficients: the first of them is trained, and `same_as` names it for the
    others. Those above max_flops are not trained. ValueError if the profile has no search, or none is left.
    """
    search = profile.search
    if search is None:
        raise ValueError(f"profile {profile.name} has no search; add search: {{step: 0.1}} to it")
    # Each candidate is trained in one process
    study = profile.replace(train=profile.train | search.train, devices=1)
    if study.config().pretrained:
        raise ValueError("search: train: most candidates have no pretrained weights; set pretrained: false")
    baseline, results = profile.cost(Scaling()), Path(results or RESULTS).absolute()
    rows, networks = [], {}
    for coefficients in dict.fromkeys([PUBLISHED, *coefficient_grid(search.step, search.low, search.high)]):
        candidate = Candidate(study, "compound_phi1", search.seeds[0], results, coefficients)
        alpha, beta, gamma = coefficients
        row = {"candidate": candidate.name, "alpha": alpha, "beta": beta, "gamma": gamma}
        row |= {"product": alpha * beta**2 * gamma**2, "px": candidate.config.resolution, **vars(candidate.cost)}
        row |= {"flops_ratio": candidate.cost.flops / baseline.flops, "published": coefficients == PUBLISHED}
        row["affordable"] = row["flops_ratio"] <= (search.max_flops or math.inf)
        first = networks.setdefault(study.network(candidate.scaling), candidate)
        rows.append(row | {"same_as": None if first is candidate else first.name})
    table = pd.DataFrame(rows)
    trained = set(table["candidate"][table["affordable"] & table["same_as"].isna()])
    if not trained:
        raise ValueError(
            f"search: max_flops: {search.max_flops!r} leaves none of {len(table)} candidates, the cheapest of which "
            f"costs {table['flops_ratio'].min():.2f} times the baseline"
        )
    return table, [candidate for candidate in networks.values() if candidate.name in trained]


def all_candidates(profile: Profile, results: str | Path | None = None) -> list[Candidate]:
    """Return all networks that a profile's search trains, with each of its seeds."""
    _, candidates = plan_search(profile, results)
    return [dataclasses.replace(c, seed=seed) for seed in profile.search.seeds for c in candidates]
