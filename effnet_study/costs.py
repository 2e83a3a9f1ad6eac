"""Tables of what networks cost: parameters, FLOPs (multiply-adds) and activations. `effnet cost` prints them."""

from collections.abc import Sequence

import pandas as pd
import torch

from effnet_lib import TABLE7, VARIANTS, EfficientNet, Scaling, count_cost, round_resolution, unknown_name
from effnet_study.methods import cost_by_stage
from effnet_study.pretrained import TORCHVISION_MODELS, create_model
from effnet_study.profile import Profile
from effnet_study.run import plan_runs


def network_costs(
    names: Sequence[str], resolution: int = 224, classes: int = 1000, stem_stride: int = 2, by_stage: bool = False
) -> pd.DataFrame:
    """Return a row for each network: network, px, params, flops, activations. ValueError for an unknown name.

    names: b0 to b7, rows of Table 7, or names of TORCHVISION_MODELS. resolution: pixels at resolution coefficient 1.
    by_stage: a row for each part of a network too, named in the column `part`; the last part is the total.
    """
    rows, known = [], {**VARIANTS, **TABLE7, **dict.fromkeys(TORCHVISION_MODELS, Scaling())}
    for name in names:
        if name not in known:
            raise unknown_name("network", name, known)
        pixels = round_resolution(known[name].resolution, resolution)
        with torch.device("meta"):
            if name in TORCHVISION_MODELS:
                model = create_model(name, classes, stem_stride=stem_stride)
            else:
                model = EfficientNet(known[name], classes, stem_stride=stem_stride)
        parts = cost_by_stage(model, pixels) if by_stage else {}
        parts["total"] = count_cost(model, pixels)
        rows += [{"network": name, "px": pixels, "part": part, **vars(cost)} for part, cost in parts.items()]
    table = pd.DataFrame(rows)
    return table if by_stage else table.drop(columns="part")


def method_costs(profile: Profile, methods: Sequence[str] | None = None) -> pd.DataFrame:
    """Return a row for each of a profile's methods (default: all): method, d, w, r, px, params, flops, activations, and
    the FLOPs as multiples of the baseline's and of compound's. Methods that wait for a search are printed instead."""
    rows, targets = [], {"x baseline": Scaling(), "x compound": TABLE7["compound"]}
    for run in plan_runs(profile, methods=methods, seeds=profile.seeds[:1]):
        if run.waiting:
            print(f"{run.method} is not counted until its coefficients are known: {run.command('search')}")
            continue
        row = {"method": run.method, **dict(zip("dwr", vars(run.scaling).values(), strict=True))}
        row |= {"px": run.config.resolution, **vars(run.cost)}
        rows.append(row | {name: run.cost.flops / profile.cost(of).flops for name, of in targets.items()})
    return pd.DataFrame(rows)
