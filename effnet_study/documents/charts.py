"""The page's charts: tables to Vega-Lite specifications, by Altair. Methods have the colours of the figures.

`what` in each function begins the words for readers who do not see the chart.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise

import altair as alt
import numpy as np
import pandas as pd

from effnet_study.analysis.statistics import half_up, t_interval
from effnet_study.methods import base_method, color, figure8_lines

INK = "#000000"  # on a dark screen the page's script replaces it by its own
# Colour is not the only cue: each way of scaling has a shape, an SVG path within [-1, 1], which Vega and the legend in
# HTML understand.
SHAPES = {
    "baseline": "M-.85,0A.85,.85,0,1,1,.85,0A.85,.85,0,1,1,-.85,0Z",
    "depth": "M-1,-.8L1,-.8L0,1Z",
    "width": "M-.8,-1L-.8,1L1,0Z",
    "resolution": "M-.8,-.8L.8,-.8L.8,.8L-.8,.8Z",
    "compound": "M-.35,-1L.35,-1L.35,-.35L1,-.35L1,.35L.35,.35L.35,1L-.35,1L-.35,.35L-1,.35L-1,-.35L-.35,-.35Z",
    "fast_compound": "M-.85,-.85L0,-.3L.85,-.85L.3,0L.85,.85L0,.3L-.85,.85L-.3,0Z",
    "compound_searched": "M0,.55L.7,1L.5,.15L1.1,-.4L.35,-.45L0,-1.15L-.35,-.45L-1.1,-.4L-.5,.15L-.7,1Z",
}
MATCHED = "test(/_matched$/, datum.method)"  # single axes at compound's FLOPs: hollow dots, dashed
# The tooltips: "title" of a column, or "title|number format"
TIPS = {"label": "method", "seed": "seed", "epoch": "epoch", "flops": "FLOPs|,", "resolution": "pixels"}
TIPS |= {"top1": "top-1 (%)|.2f", "train_loss": "training loss|.4f", "minival_top1": "minival top-1 (%)|.2f"}
TIPS |= {"minutes": "minutes|,.1f", "device": "device"}
HEIGHT, LABEL = 300, 17  # of a chart and of a label in it, in pixels


def shape(method: str) -> str:
    """Return the method's shape."""
    return SHAPES[base_method(method).removesuffix("_matched")]


def style(methods: Iterable[str]) -> dict:
    """Return encodings of the field `method` as colour and shape."""
    methods = list(dict.fromkeys(methods))
    colors = alt.Scale(domain=methods, range=[color(m) for m in methods])
    return {
        "fill": alt.Fill("method:N", scale=colors, legend=None),
        "stroke": alt.Stroke("method:N", scale=colors, legend=None),
        "shape": alt.Shape("method:N", scale=alt.Scale(domain=methods, range=list(map(shape, methods))), legend=None),
        "fillOpacity": alt.when(MATCHED).then(alt.value(0)).otherwise(alt.value(0.75)),
    }


def spread(values: Sequence[float], gap: float, low: float, high: float) -> np.ndarray:
    """Move `values` (k,) apart: `gap` from each other, and between low and high if there is room for all."""
    order, placed = np.argsort(values, kind="stable"), np.array(values, float)
    bound = low
    for index in order:
        placed[index] = max(placed[index], bound)
        bound = placed[index] + gap
    bound = high
    for index in order[::-1]:
        placed[index] = min(placed[index], bound)
        bound = placed[index] - gap
    return placed


def tips(table: pd.DataFrame) -> list[alt.Tooltip]:
    """Return tooltips of the table's columns that TIPS has."""
    found = []
    for column in filter(table.columns.__contains__, TIPS):
        title, _, form = TIPS[column].partition("|")
        number = {"type": "quantitative", "format": form} if form else {"type": "nominal"}
        found.append(alt.Tooltip(column, title=title, **number))
    return found


def finish(layers: Sequence[alt.Chart], description: str) -> dict:
    """Return the specification of a chart that is as wide as its container, axes and labels included."""
    fit = {"autosize": alt.AutoSizeParams(type="fit", contains="padding"), "padding": 5, "width": "container"}
    return alt.layer(*layers).properties(height=HEIGHT, description=description, **fit).to_dict()


def figure8(dots: pd.DataFrame, x: str, y: str, what: str) -> dict:
    """Draw accuracy against FLOPs: dots, a tick at each method's mean, a bar for the interval, Figure 8's lines.

    dots: method, label, x, top1 of each run, and more columns for tooltips. x, y: the titles of the axes.
    """
    groups = dots.groupby(["method", "label", "x"], sort=False)["top1"]
    means = groups.apply(t_interval).rename("interval").reset_index()
    means[["mean", "low", "high"]] = means["interval"].tolist()
    extent = pd.concat([means["low"], means["high"], dots["top1"]])
    room = max(0.08 * (extent.max() - extent.min()), 0.5)
    bottom, top = float(extent.min() - room), float(extent.max() + room)
    means["place"] = spread(means["mean"], LABEL * (top - bottom) / HEIGHT, bottom + room / 2, top - room / 2)
    by_method = means.set_index("method")
    steps = [step for line in figure8_lines(by_method["x"].to_dict()) for step in pairwise(line)]
    starts, ends = (by_method.loc[[step[i] for step in steps]].reset_index() for i in (0, 1))
    joined = ends.assign(x0=starts["x"], y0=starts["mean"])[["method", "x0", "y0", "x", "mean"]]

    looks, data = style(means["method"]), means.drop(columns="interval")
    wide = alt.Scale(domain=[0, 1.08 * float(dots["x"].max())], nice=False)
    upright = alt.Y("top1:Q", title=y, scale=alt.Scale(domain=[bottom, top], nice=False, zero=False))
    at = alt.X("x:Q", title=x, scale=wide, axis=alt.Axis(tickCount=4, grid=False))
    several = alt.Chart(data.dropna()).encode(x=at)
    names = alt.Chart(data).encode(x=alt.value("width"), y="place:Q")
    layers = [
        alt.Chart(joined).mark_rule(opacity=0.55).encode(x="x0:Q", y="y0:Q", x2="x", y2="mean", stroke=looks["stroke"]),
        several.mark_rule(strokeWidth=2).encode(y="low:Q", y2="high", stroke=looks["stroke"]),
        several.mark_tick(orient="horizontal", size=24, thickness=3).encode(y="mean:Q", fill=looks["fill"]),
        alt.Chart(dots).mark_point(size=90).encode(x=at, y=upright, tooltip=tips(dots), **looks),
        names.mark_point(size=70, xOffset=14).encode(**looks),
        names.mark_text(align="left", dx=24, fontSize=12, color=INK).encode(text="label:N"),
    ]
    text = "; ".join(f"{row.label} {half_up(row.mean):.2f} % at {row.x:,.1f}" for row in means.itertuples())
    return finish(layers, f"{what}. {y} by {x}: {text}.")


def curves(epochs: pd.DataFrame, column: str, what: str) -> dict:
    """Draw a line for each run over epochs. The chart's parameter `run` is the name of one run, or "" for all.

    epochs: a row for each epoch of each run: epoch, `column`, run, method, label, seed.
    """
    table = epochs[["run", "method", "label", "seed", "epoch", column]].round(4)
    looks, shown = style(table["method"]), alt.when("run == '' || datum.run == run")
    base = alt.Chart(table).encode(
        x=alt.X("epoch:Q", title="epoch", axis=alt.Axis(tickMinStep=1, tickCount=6, format="d", grid=False)),
        y=alt.Y(f"{column}:Q", title=TIPS[column].partition("|")[0], scale=alt.Scale(zero=False)),
        opacity=shown.then(alt.value(0.9)).otherwise(alt.value(0.1)),
    )
    dashes = alt.when(MATCHED).then(alt.value([5, 3])).otherwise(alt.value([1, 0]))
    lines = base.mark_line(strokeWidth=1.8).encode(detail="run:N", stroke=looks["stroke"], strokeDash=dashes)
    dots = base.mark_point(size=30).encode(tooltip=tips(table), **looks)
    chart = alt.layer(lines, dots).add_params(alt.param(name="run", value=""))
    return finish([chart], f"{what}, a line for each of {table['run'].nunique()} runs.")
