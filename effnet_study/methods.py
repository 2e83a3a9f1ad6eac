"""Methods of scaling: what a method's name means, its cost, FLOPs matching, and its colour in every figure.

TO ADD A METHOD at compound's FLOPs, name it in TRAINED_BY, at the end of COLORS, and in SHAPES of documents/charts.py,
all without an ending _matched. Add a line to `match_flops` and, unless it ends in _matched, its name to `matched` in
`parse_method`. effnet_lib.TABLE7 is for the paper's own rows alone. Contrasts need a Claim in analysis/claims.py,
readers a row in docs/profiles.md. Then name it in a profile's `methods`.
"""

import copy
import dataclasses
import math
import re
from bisect import bisect_left
from collections import Counter, namedtuple
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import nn

import effnet_lib as lib
from effnet_lib import STAGES, TABLE7, VARIANTS, Cost, EfficientNet, Scaling, compound_scaling, count_cost, unknown_name
from effnet_study.pretrained import TORCHVISION_MODELS, create_model

# ---- 1. Names ------------------------------------------------------------------------------------------------------

PUBLISHED = (1.2, 1.1, 1.15)  # alpha, beta, gamma of the paper
# The notebook that trains each method, and the method's colour (Okabe and Ito's, distinct for the colour-blind)
TRAINED_BY = {
    "baseline": "01_baseline_b0",
    **dict.fromkeys(["depth", "width", "resolution"], "02_single_axis_scaling"),
    **dict.fromkeys(["depth_matched", "width_matched", "resolution_matched"], "02_single_axis_scaling"),
    **dict.fromkeys(["compound", "compound_searched", "fast_compound"], "04_compound_scaling"),
}
COLORS = {
    "baseline": "#000000",
    **dict.fromkeys(["depth", "depth_matched"], "#0072B2"),
    **dict.fromkeys(["width", "width_matched"], "#E69F00"),
    **dict.fromkeys(["resolution", "resolution_matched"], "#009E73"),
    "compound": "#D55E00",
    "compound_searched": "#CC79A7",
    "fast_compound": "#56B4E9",
}
# Table 7 as published: FLOPs (multiply-adds) and ImageNet top-1 in percent. arXiv 1905.11946v5.
PAPER_TABLE7 = {
    "baseline": (0.4e9, 77.3),
    "depth": (1.8e9, 79.0),
    "width": (1.8e9, 78.9),
    "resolution": (1.9e9, 79.1),
    "compound": (1.8e9, 81.1),
}
HEADLINE_METHODS = ("compound", "depth_matched", "width_matched", "resolution_matched")
PHI = re.compile(r"(compound|compound_searched)_phi(\d+(?:\.\d+)?)")
TIMES = re.compile(r"(depth|width|resolution|compound|compound_searched)_x([1-9]\d*(?:\.\d*[1-9])?)")
METHOD_NAMES = (*TRAINED_BY, "compound_phi2.5", "depth_x8")  # for messages; the last two stand for PHI and TIMES


class Method(NamedTuple):
    """What a method's name means."""

    base: str  # its name in TRAINED_BY and COLORS
    way: str  # of scaling: baseline, depth, width, resolution, compound or fast_compound
    matched: bool  # whether its FLOPs match compound's
    phi: float | None = None  # of compound scaling, if it is not the paper's row
    times: float | None = None  # its FLOPs as a multiple of the baseline's


def parse_method(name: str) -> Method:
    """Read a method's name; ValueError if there is no such method.

    depth, width, resolution, compound: the paper's rows. depth_matched, fast_compound, compound_searched and so on:
    matched to compound's FLOPs. compound_phi3.0: Equation 3 at another phi. depth_x8: 8 times the baseline's FLOPs.
    """
    phi, times = PHI.fullmatch(name), TIMES.fullmatch(name)
    if not (name in TRAINED_BY or phi or times):
        raise unknown_name("method", name, METHOD_NAMES)
    base = (phi or times)[1] if phi or times else name
    way = base.removesuffix("_matched").removesuffix("_searched")
    matched = times is None and (way != base or way == "fast_compound")
    return Method(base, way, matched, float(phi[2]) if phi else None, float(times[2]) if times else None)


def base_method(name: str) -> str:
    """Return a method's name in TRAINED_BY and COLORS: compound for compound_phi3.0."""
    return parse_method(name).base


def color(method: str) -> str:
    return COLORS[base_method(method)]


def text_color(method: str) -> str:
    """Return the method's colour, dark enough for words on white: a contrast of 4.5 at least, as WCAG asks."""
    return "#" + bytes(5 * part // 8 for part in bytes.fromhex(color(method)[1:])).hex()


def spoken(method: str) -> str:
    """Return a method's name in words: compound_searched becomes compound searched."""
    return method.replace("_", " ")


def listed(names: Iterable[str], last: str = "and") -> str:
    """Join names as in a sentence: a; a and b; a, b and c."""
    names = list(names)
    return f" {last} ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def figure8_lines(costs: Mapping[str, float]) -> list[list[str]]:
    """Return Figure 8's lines: methods that scale the same way, by their cost, from the baseline if that is there."""
    methods = sorted(costs, key=costs.__getitem__)
    start = [method for method in methods if method == "baseline"]
    names = {method: base_method(method).removesuffix("_matched") for method in methods if method not in start}
    return [start + [m for m, name in names.items() if name == way] for way in dict.fromkeys(names.values())]


# ---- 2. Coefficients -----------------------------------------------------------------------------------------------


def coefficient_grid(step: float = 0.05, low: float = 1.9, high: float = 2.1) -> list[tuple[float, float, float]]:
    """List (alpha, beta, gamma) on a grid of `step`, each at least 1, with low <= alpha * beta^2 * gamma^2 <= high."""
    if not 0 < step <= 1 <= low <= high:
        raise ValueError(f"expected 0 < step <= 1 <= low <= high, got step {step!r}, low {low!r}, high {high!r}")
    axis = [round(1 + i * step, 6) for i in range(int((high - 1) / step + 1e-9) + 1)]
    grid = [(a, b, g) for a in axis for b in axis for g in axis if low <= a * b**2 * g**2 <= high]
    if not grid:
        raise ValueError(
            f"step: on a grid of {step!r} no alpha * beta^2 * gamma^2 lies in [{low!r}, {high!r}]; take a smaller "
            "step, or wider bounds"
        )
    return grid


# The scaling found, its FLOPs, and the residual flops / target - 1 that rounding leaves
FlopsMatch = namedtuple("FlopsMatch", "scaling flops residual")


@cache
def match_flops(
    way: str,
    target: int,
    base_resolution: int = 224,
    num_classes: int = 1000,
    stem_stride: int = 2,
    *,
    coefficients: tuple[float, float, float] = PUBLISHED,
    baseline: Scaling = TABLE7["baseline"],
) -> FlopsMatch:
    """Solve one coefficient so that the FLOPs come as near `target` as rounding permits.

    way: depth, width, resolution, compound (phi at `coefficients` alpha, beta, gamma), or fast_compound (Dollar, Singh
    and Girshick, CVPR 2021, arXiv 2103.06877): of a growth s of FLOPs, depth gets s^0.1, width s^0.4 and resolution
    s^0.05, so that activations grow by about s^0.6 alone. Depth, width, phi and s are searched in steps of 0.01,
    resolution in pixels. The scaling found multiplies `baseline`. Look at its residual before you call two equal.
    """
    if way == "compound" and max(coefficients) == 1:
        raise ValueError(f"coefficients: expected one above 1, or FLOPs never grow; got {coefficients!r}")
    candidates = {  # a whole number to a scaling, increasing in FLOPs
        "depth": lambda i: Scaling(depth=1 + i / 100),
        "width": lambda i: Scaling(width=1 + i / 100),
        "resolution": lambda i: Scaling(resolution=(base_resolution + i) / base_resolution),
        "compound": lambda i: compound_scaling(i / 100, *coefficients),
        "fast_compound": lambda i: Scaling(*((1 + i / 100) ** share for share in (0.1, 0.4, 0.05))),
    }

    def flops(i: int) -> int:
        return scaled_cost(candidates[way](i) * baseline, base_resolution, num_classes, stem_stride).flops

    if target < flops(0):
        raise ValueError(f"target: expected at least the baseline's {flops(0):,} FLOPs, got {target:,}")
    enough = 64
    while flops(enough) < target:
        enough *= 2
    above = bisect_left(range(enough), target, key=flops)  # the first with at least `target`
    best = min(max(above - 1, 0), above, key=lambda i: abs(flops(i) - target))
    return FlopsMatch(candidates[way](best), flops(best), flops(best) / target - 1)


# ---- 3. Cost -------------------------------------------------------------------------------------------------------


def rounded_network(scaling: Scaling, base_resolution: int) -> tuple:
    """Return pixels, layers of each stage and channels of B0 scaled by `scaling`, after rounding."""
    channels = (lib.STEM_CHANNELS, *(stage.channels for stage in STAGES), lib.HEAD_CHANNELS)
    return (
        lib.round_resolution(scaling.resolution, base_resolution),
        tuple(lib.round_repeats(stage.layers, scaling.depth) for stage in STAGES),
        tuple(lib.round_filters(c, scaling.width) for c in channels),
    )


def scaled_cost(
    scaling: Scaling,
    base_resolution: int = 224,
    num_classes: int = 1000,
    stem_stride: int = 2,
    se_expanded: bool = False,
) -> Cost:
    """Count the cost of B0 scaled by `scaling`, at its own resolution. The same numbers as `count_cost`, in less time
    for deep networks: a stage's layers after the first all cost the same."""
    pixels, layers, _ = rounded_network(scaling, base_resolution)
    costs = _layer_costs(scaling.width, pixels, num_classes, stem_stride, se_expanded)
    return Cost(*(np.array([1, *(count - 1 for count in layers)]) @ costs).tolist())


@cache
def _layer_costs(width: float, pixels: int, num_classes: int, stem_stride: int, se_expanded: bool) -> np.ndarray:
    """Return the costs (8, 3) of the network with one layer in each stage, and of one further layer of each stage."""
    with torch.device("meta"):
        model = EfficientNet(Scaling(1e-6, width), num_classes, stem_stride=stem_stride, se_expanded=se_expanded)
        costs, side = [count_cost(model, pixels)], math.ceil(pixels / stem_stride)
        for stage in STAGES:
            side, channels = math.ceil(side / stage.stride), lib.round_filters(stage.channels, width)
            layer = lib.MBConv(channels, channels, stage.expand, stage.kernel, 1, 0.0, se_expanded)
            costs.append(count_cost(layer, side, channels))
    return np.array([dataclasses.astuple(cost) for cost in costs])


def cost_by_stage(model: nn.Module, resolution: int) -> dict[str, Cost]:
    """Count the cost of each part of `model`: stem, stage 1 to stage 7, head and classifier of an EfficientNet. They
    add up to `count_cost`."""
    model = copy.deepcopy(model).to("meta").eval()
    params, flops, activations = Counter(), Counter(), Counter()
    for path, values in model.named_parameters():
        params[_part(path)] += values.numel()

    def count(layer: nn.Module, path: str, output: torch.Tensor) -> None:
        flops[_part(path)] += output.numel() * layer.weight[0].numel()
        activations[_part(path)] += output.numel()

    for path, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(lambda layer, inputs, output, path=path: count(layer, path, output))
    with torch.no_grad():
        model(torch.empty(1, 3, resolution, resolution, device="meta"))
    return {part: Cost(params[part], flops[part], activations[part]) for part in params}


def _part(path: str) -> str:
    """Return the part of a network to which the parameter or layer at `path` belongs."""
    first, second = [*path.split("."), ""][:2]
    if first == "stages":
        return f"stage {int(second) + 1}"
    return second if first == "features" else first


def network_costs(names: Sequence[str], by_stage: bool = False) -> pd.DataFrame:
    """Return a row for each network with ImageNet's classes: network, px, params, flops, activations.

    names: b0 to b7, rows of Table 7, or names of TORCHVISION_MODELS. by_stage: a row for each part of a network too,
    named in the column `part`; the last part is the total. ValueError for an unknown name.
    """
    rows, known = [], {**VARIANTS, **TABLE7, **dict.fromkeys(TORCHVISION_MODELS, Scaling())}
    for name in names:
        if name not in known:
            raise unknown_name("network", name, known)
        pixels = lib.round_resolution(known[name].resolution)
        with torch.device("meta"):
            model = create_model(name) if name in TORCHVISION_MODELS else EfficientNet(known[name])
        parts = cost_by_stage(model, pixels) if by_stage else {}
        parts["total"] = count_cost(model, pixels)
        rows += [{"network": name, "px": pixels, "part": part, **vars(cost)} for part, cost in parts.items()]
    table = pd.DataFrame(rows)
    return table if by_stage else table.drop(columns="part")
