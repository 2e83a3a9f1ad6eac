"""report/scale.md: estimate how long the study `imagenet` takes on some numbers of GPUs, and what it costs.

Nothing is run. report/scale.yaml has the published time of one training of B0. Other networks are estimated from it, in
proportion to their activations and in proportion to their FLOPs.
"""

import heapq
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import pandas as pd
from pydantic import Field

from effnet_lib import VARIANTS, Count, Positive, Settings
from effnet_study.documents.templates import fill_in
from effnet_study.files import ROOT
from effnet_study.profile import Profile, read_yaml

FACTS = ROOT / "report" / "scale.yaml"
MEASURES = ["activations", "flops"]  # what the time of a run is taken as proportional to


class Facts(Settings):
    """The keys of scale.yaml, which says what they mean."""

    usd_per_gpu_hour: Positive
    gpus: Annotated[list[Count], Field(min_length=1)]
    source: str
    address: str
    gpu: str
    b0_epochs: Positive
    b0_gpus: Count
    b0_hours: Positive
    b0_speed: Positive
    b4_speed: Positive


def load_facts(path: Path = FACTS) -> Facts:
    """Load scale.yaml. ValueError names the file, the key, what was expected and what was found."""
    facts = read_yaml(path.read_text(encoding="utf-8"), str(path))
    try:
        return Facts(**facts)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def wall_time(gpu_hours: Sequence[float], gpus: int, per_run: int) -> float:
    """Return the hours until the last run ends on `gpus` GPUs, of which each run takes `per_run` at most. The longest
    waiting run takes the first GPUs that are free. gpu_hours: of each run."""
    per_run = min(per_run, gpus)
    busy = [0.0] * (gpus // per_run)
    for hours in sorted(gpu_hours, reverse=True):
        heapq.heapreplace(busy, busy[0] + hours / per_run)
    return max(busy)


def describe_scale(facts: Facts, profile: Profile) -> str:
    """Return the text of scale.md for a profile of ImageNet."""
    costs = pd.DataFrame({method: vars(profile.cost(profile.scaling(method))) for method in profile.methods}).T
    ratios, b4 = costs / costs.loc["baseline"], pd.Series(vars(profile.cost(VARIANTS["b4"]))) / costs.loc["baseline"]
    epochs, seeds = profile.config().epochs, len(profile.seeds)
    baseline = facts.b0_gpus * facts.b0_hours * epochs / facts.b0_epochs  # GPU-hours
    rows = []
    for count in (1, seeds):
        runs = [[*(baseline * ratios[measure])] * count for measure in MEASURES]
        times = [[wall_time(hours, gpus, facts.b0_gpus) for hours in runs] for gpus in facts.gpus]
        rows.append({"seeds": count, "runs": len(runs[0]), "times": times, "gpu_hours": [sum(hours) for hours in runs]})
    values = {"facts": facts, "networks": len(costs), "seeds": seeds, "epochs": epochs, "baseline": baseline}
    return fill_in("scale-template.md", rows=rows, totals=ratios.sum(), b4=b4, **values) + "\n"
