"""The figures of the notebooks, drawn from tables. Dots are seeds, a tick is their mean, a bar its 95 % interval.

TO ADD A FIGURE, write a function here, and a cell in notebooks/05_analysis.ipynb that calls it and saves the figure as
folder / "figures" / "NAME"; the cell's metadata needs "alt", its text for people who do not see it. Then name it in
FIGURES of summary.py for the results' README.md, in FIGURES of documents/page.py for the page, in report/report.typ.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.patches import Polygon
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from effnet_study.analysis.statistics import MARGIN, t_interval
from effnet_study.files import drawn, load_history
from effnet_study.methods import PAPER_TABLE7, color, figure8_lines, parse_method, spoken, text_color
from effnet_study.profile import Profile
from effnet_study.run import Run

GREY, PALE = "#999999", "#e6e6e6"
UNITS = {"million": 1e6, "billion": 1e9}
CORNERS = {"depth": (0, 0), "width": (1, 0), "resolution": (0.5, math.sqrt(3) / 2)}  # of the search's triangle


def label_ends(ax, points: Sequence[tuple[float, float, str]]) -> None:
    """Name points (x, y, method): the baseline below its point, the others in a column, apart from each other."""
    low, high = ax.get_ylim()
    ax.set_ylim(low - 0.08 * (high - low), high)
    gap, last, column = (high - low) * 0.06, -math.inf, max(x for x, *_ in points) * 1.08
    for x, y, method in sorted(points, key=lambda point: point[1]):
        style = {"color": text_color(method), "va": "center", "annotation_clip": False}
        if method == "baseline":
            ax.annotate(method, (x, y), (0, -12), textcoords="offset points", ha="center", **style)
        else:
            last = max(y, last + gap)
            ax.annotate(spoken(method), (x, y), (column, last), **style)


def draw_against_cost(ax, points: Mapping[str, tuple[float, Sequence[float]]], unit: str) -> None:
    """Draw (FLOPs, top-1 over seeds) of methods: a dot per seed, a tick at the mean, a bar for the 95 % interval, a
    line for each way of scaling. A single axis at compound's FLOPs is hollow; a single seed is a cross alone, because
    nothing is known of its spread. The x axis is logarithmic, in millions or billions of FLOPs; ways of scaling stand
    2.5 % apart on it, in the order of their cost, so that bars of one budget do not cover each other."""
    lines = figure8_lines({method: flops for method, (flops, _) in points.items()})
    lines.sort(key=lambda line: points[line[-1]][0])
    places = {method: flops / UNITS[unit] for method, (flops, _) in points.items()}
    for i, line in enumerate(lines):
        places |= {m: places[m] * 1.025 ** (i - (len(lines) - 1) / 2) for m in line if m != "baseline"}
    means = {method: t_interval(scores) for method, (_, scores) in points.items()}
    for line in lines:
        ax.plot([places[m] for m in line], [means[m][0] for m in line], color=color(line[-1]), lw=1, alpha=0.6)
    # Only the last budget of each line gets a label
    unnamed, ends = {method for line in lines for method in line[:-1] if parse_method(method).times}, []
    single = [method for method, (_, scores) in points.items() if len(scores) == 1]
    for method, (mean, low, high) in means.items():
        x, scores, shade = places[method], points[method][1], color(method)
        if method in single:
            ax.plot(x, mean, "x", color=shade)
        else:
            face = {"mfc": "white"} if method.endswith("_matched") else {"alpha": 0.5, "mew": 0}
            ax.plot([x, x], [low, high], color=shade)
            ax.plot([x] * len(scores), scores, "o", color=shade, **face)
            ax.plot(x, mean, "_", color=shade, ms=12, mew=2)
        if method not in unnamed:
            below = method == "baseline" and method not in single  # its label goes below its bar
            ends.append((x, low if below else mean, method))
    least, most = min(places.values()), max(places.values())
    ax.set(xscale="log", xlim=(least * 0.75, most * (1.3 * most / least) ** 0.4))
    ax.set_xlabel(f"FLOPs ({unit} multiply-adds){'; cross: one seed' if single else ''}")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    label_ends(ax, ends)


def line_styles(methods: Iterable[str]) -> dict[str, str]:
    """Return dashes with which methods of one colour differ. Single axes at compound's FLOPs are always dashed."""
    styles = {}
    for method in methods:
        same = sum(color(other) == color(method) for other in styles)
        styles[method] = "--" if method.endswith("_matched") else ("-", "--", ":", "-.")[same % 4]
    return styles


def _draw_by_epochs(ax, table: pd.DataFrame, by: str, value: str, apart: float) -> None:
    """Draw a value with its interval by epochs of training, a line for each method of the column `by`. Bars stand side
    by side, each by the factor `apart` to the right of the one before."""
    groups = table.groupby(by, sort=False)
    for i, (method, group) in enumerate(groups):
        x = group["epochs"] * apart ** (i - (len(groups) - 1) / 2)
        bars = [group[value] - group["low"], group["high"] - group[value]]
        ax.errorbar(x, group[value], bars, color=color(method), marker="o", label=spoken(method))
    ax.set_xscale("log", base=2)
    ax.set_xlabel("epochs of training")


def _heading(profile: Profile, points: Iterable[str], done: pd.DataFrame) -> str:
    extended = set(points) - set(profile.methods) and profile.purpose == "evidence"  # by profiles that decide nothing
    stamp = f"{profile.stamp}\nother budgets: exploratory" if extended else profile.stamp
    return f"{drawn(done['data'].iloc[0], 80)}, base {profile.base_resolution} px\n{stamp}"


def draw_figure8(profile: Profile, points: Mapping[str, tuple[float, Sequence[float]]], done: pd.DataFrame):
    """Draw Figure 8, ours beside the paper's. points: of `tables.figure8_points`; matched single axes are left
    to `draw_matched`."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8))
    unmatched = {method: point for method, point in points.items() if not method.endswith("_matched")} or points
    draw_against_cost(left, unmatched, "million")
    left.set(ylabel="test top-1 (%)", title=_heading(profile, unmatched, done))
    paper = {method: (flops, [top1]) for method, (flops, top1) in PAPER_TABLE7.items()}
    draw_against_cost(right, paper, "billion")
    title = "The paper's Table 7\nas published, one network each"
    right.set(xlabel="FLOPs (billion multiply-adds)", ylabel="ImageNet top-1 (%)", title=title)
    return fig


def draw_matched(profile: Profile, points: Mapping[str, tuple[float, Sequence[float]]], done: pd.DataFrame):
    """Draw the baseline and the networks at compound's FLOPs, the single axes hollow. points: of
    `tables.figure8_points`."""
    at_compound = {m: point for m, point in points.items() if m.endswith(("_matched", "baseline", "compound"))}
    fig, ax = plt.subplots(figsize=(5, 3.8))
    draw_against_cost(ax, at_compound, "million")
    ax.set(ylabel="test top-1 (%)", title=_heading(profile, at_compound, done))
    return fig


def draw_all_curves(profile: Profile, table: pd.DataFrame, done: pd.DataFrame):
    """Draw minival top-1 by epoch, a panel for each way of scaling beside the baseline: the mean over seeds, and a band
    from the lowest to the highest seed. table: of `tables.table7`."""
    lines = figure8_lines(table.set_index("method")["flops"].to_dict()) or [["baseline"]]
    fig, axes = plt.subplots(1, len(lines), figsize=(1 + 2 * len(lines), 2.8), sharey=True, squeeze=False)
    styles = line_styles(table["method"])
    for ax, line in zip(axes[0], lines, strict=True):
        for method in line:
            runs = pd.concat(load_history(run_dir) for run_dir in done.loc[done["method"] == method, "run_dir"])
            top1 = runs.groupby("epoch")["minival_top1"].agg(["mean", "min", "max"])
            ax.fill_between(top1.index, top1["min"], top1["max"], color=color(method), alpha=0.2, lw=0)
            style = {"color": color(method), "ls": styles[method], "marker": "." if len(top1) == 1 else None}
            ax.plot(top1["mean"], label=spoken(method), **style)
        ax.set_xlabel("epoch")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.legend(loc="lower right", fontsize=7)
    axes[0, 0].set_ylabel("minival top-1 (%)")
    fig.suptitle(f"EMA weights, mean over seeds; {profile.stamp}", fontsize=9)
    return fig


def draw_learning_curves(*runs: Run):
    """Draw minival top-1 by epoch, a line for each of these runs that is finished."""
    fig, ax = plt.subplots(figsize=(5.5, 3))
    for run in runs:
        if run.state() == "finished":
            history = load_history(run.run_dir)
            style = {"color": color(run.method), "marker": "." if len(history) == 1 else None}
            ax.plot(history["epoch"], history["minival_top1"], label=run.method, **style)
    ax.set(xlabel="epoch", ylabel="top-1 (%)", title="minival, EMA weights")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend()
    return fig


def draw_activation_maps(images: Sequence[np.ndarray], truth: Sequence[str], maps: Mapping[str, tuple], title: str):
    """Draw Figure 7: a row for each image (H, W, 3) of class `truth`, then each method's map under its prediction.
    maps: by method the maps (N, H, W) in [0, 1], and the names of the predicted classes (N,)."""
    columns = len(maps) + 1
    fig, axes = plt.subplots(len(images), columns, figsize=(1.3 * columns, 1.5 * len(images)), squeeze=False)
    for ax, image, name in zip(axes[:, 0], images, truth, strict=True):
        ax.imshow(image)
        ax.set_title(drawn(name, 14), fontsize=7, loc="center", fontweight="bold")
    for column, (method, (heat, predicted)) in zip(axes.T[1:], maps.items(), strict=True):
        for ax, image, name, each, guess in zip(column, images, truth, heat, predicted, strict=True):
            ax.imshow(image, alpha=0.45)
            ax.imshow(each, cmap="inferno", alpha=0.6, vmin=0, vmax=1)
            ax.set_title(f"{'' if guess == name else 'not '}{drawn(guess, 14)}", fontsize=7, loc="center")
        column[-1].set_xlabel(method.replace("_", "\n"), color=text_color(method), fontsize=8)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[], frame_on=False)
    fig.suptitle(drawn(title), fontsize=8)
    return fig


def draw_per_class(profile: Profile, table: pd.DataFrame):
    """Draw the difference of each class's top-1 to the baseline's, a row for each method. table: of `per_class`."""
    gains = table.drop(columns=["class", "baseline"]).sub(table["baseline"], axis="index")
    fig, ax = plt.subplots(figsize=(9, 1 + 0.5 * gains.shape[1]))
    ax.axvline(0, color="black", lw=0.8)
    for y, (method, gain) in enumerate(gains.items()):
        ax.plot(gain, y + np.linspace(-0.2, 0.2, len(gain)), "o", color=color(method), ms=4, alpha=0.6, mew=0)
        for index, align, shift in ((gain.idxmin(), "right", -6), (gain.idxmax(), "left", 6)):
            style = {"textcoords": "offset points", "ha": align, "va": "center", "fontsize": 7}
            ax.annotate(drawn(table["class"][index], 16), (gain[index], y), (shift, 0), **style)
    ax.set_yticks(range(gains.shape[1]), [spoken(method) for method in gains])
    ax.invert_yaxis()
    ax.margins(x=0.15)
    ax.set(xlabel="difference to the baseline (points)", title=f"Top-1 by class\n{profile.stamp}")
    return fig


def draw_calibration(profile: Profile, curves: Mapping[str, pd.DataFrame]):
    """Draw accuracy against confidence, a line for each method. curves: of `calibration_table`."""
    fig, ax = plt.subplots(figsize=(4.6, 4))
    ax.plot([0, 100], [0, 100], color=GREY, lw=0.8, ls=":")
    for method, dashes in line_styles(curves).items():
        style = {"color": color(method), "label": spoken(method), "ls": dashes, "marker": "."}
        ax.plot(curves[method]["confidence"], curves[method]["accuracy"], **style)
    ax.set(xlabel="confidence (%)", ylabel="accuracy (%)", xlim=(0, 100), ylim=(0, 100))
    ax.set_title(f"Reliability, mean over seeds\n{profile.stamp}")
    ax.legend(loc="upper left", bbox_to_anchor=(1.02, 1))
    return fig


def draw_contrasts(profile: Profile, contrasts: pd.DataFrame, done: pd.DataFrame):
    """Draw differences of top-1 with their intervals, a group for each claim about compound scaling, the margin of
    equality in grey."""
    if (compared := ~contrasts["claim"].isin(("axes_help", "fast_compound"))).any():
        contrasts = contrasts[compared].reset_index(drop=True)
    places = contrasts.index + 0.6 * pd.factorize(contrasts["claim"])[0]  # a gap between claims
    fig, ax = plt.subplots(figsize=(6.4, 1 + 0.34 * (places[-1] + 1)))
    ax.axvspan(-MARGIN, MARGIN, color=PALE, lw=0)
    ax.axvline(0, color="black", lw=0.8)
    for y, row in zip(places, contrasts.itertuples(), strict=True):
        shade = color(row.target)
        ax.plot([row.low, row.high], [y, y], color=shade)
        ax.plot(row.difference, y, "o", color=shade, ms=7)
        ax.plot(row.paper_difference, y, "D", color=shade, mfc="white")
        ax.annotate(row.outcome, (1.02, y), xycoords=("axes fraction", "data"), va="center")
    ax.set_yticks(places, [f"{spoken(row.target)} - {spoken(row.other)}" for row in contrasts.itertuples()])
    ax.set(ylim=(places[-1] + 0.5, -0.5), xlabel="difference of test top-1 (points)")
    seeds = " to ".join(str(n) for n in sorted({contrasts["n"].min(), contrasts["n"].max()}))
    ax.set_title(f"{drawn(done['data'].iloc[0], 80)}, n = {seeds}\n{profile.stamp}")
    return fig


def draw_lengths(profile: Profile, lengths: pd.DataFrame, contrasts: pd.DataFrame, done: pd.DataFrame):
    """Draw top-1 against epochs of training, a line for each method; beside it the contrasts at each length."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    right.axhspan(-MARGIN, MARGIN, color=PALE, lw=0)
    right.axhline(0, color="black", lw=0.8)
    _draw_by_epochs(left, lengths, "method", "top1", 1.03)
    _draw_by_epochs(right, contrasts, "other", "difference", 1.06)
    epochs = sorted(lengths["epochs"].unique())
    for ax in (left, right):
        ax.set_xticks(epochs, epochs)
    stamp = f"{profile.stamp}\nother lengths: exploratory" if profile.purpose == "evidence" else profile.stamp
    left.set(ylabel="test top-1 (%)", title=f"{drawn(done['data'].iloc[0], 80)}\n{stamp}")
    title = "compound minus each matched axis\nintervals of one length: 95 % together"
    right.set(ylabel="difference (points)", title=title)
    fig.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return fig


def draw_ablation(profile: Profile, change: str, methods: Iterable[str], whole: pd.DataFrame, done: pd.DataFrame):
    """Draw top-1 of each method as it is (runs `whole`) and changed (runs `done`), a dot per seed of `done`: scored by
    the moving average of the weights, and by the weights of the last step."""
    methods = [method for method in done["method"].unique() if method in set(methods)]
    fig, axes = plt.subplots(1, 2, figsize=(9, 1.3 + 0.6 * len(methods)), sharey=True, sharex=True)
    for ax, weights, score in zip(axes, ("moving average", "last step"), ("top1", "raw_top1"), strict=True):
        for y, method in enumerate(methods):
            shade, seeds = color(method), set(done.loc[done["method"] == method, "seed"])
            for table, shift, face in ((whole, -0.13, "white"), (done, 0.13, shade)):
                values = table.loc[(table["method"] == method) & table["seed"].isin(seeds), score]
                ax.plot(values, [y + shift] * len(values), "o", color=shade, mfc=face, alpha=0.8)
                ax.plot(values.mean(), y + shift, "|", color=shade, ms=14, mew=2)
        ax.set(xlabel="test top-1 (%)", title=f"weights: {weights}")
    axes[0].set_yticks(range(len(methods)), [spoken(method) for method in methods])
    axes[0].set_ylim(len(methods) - 0.5, -0.5)
    key = f"open: as it is; filled: changed. {profile.stamp.capitalize()}"
    fig.suptitle(f"{drawn(done['data'].iloc[0], 80)}: {change}\n{key}", fontsize=8)
    return fig


def draw_search(outcome: pd.DataFrame, title: str):
    """Draw the candidates' minival top-1 on the constraint surface, a triangle whose corners are the single axes: each
    lies at the mean of the corners, weighted by what each axis costs. Candidates without a score are grey.

    outcome: of `tables.search_outcome`.
    """
    fig, ax = plt.subplots(figsize=(5, 4.4))
    ax.add_patch(Polygon(list(CORNERS.values()), fill=False, ec=GREY, lw=0.8))
    for axis, (x, y) in CORNERS.items():
        style = {"textcoords": "offset points", "ha": "center", "va": "bottom" if y else "top"}
        ax.annotate(f"{axis} alone", (x, y), (0, 22 if y else -22), color=text_color(axis), **style)
    shares = np.log(outcome[["alpha", "beta", "gamma"]].to_numpy()) * [1, 2, 2]  # what each axis costs
    x, y = (shares @ np.array(list(CORNERS.values())) / shares.sum(1, keepdims=True)).T
    outcome, scored = outcome.assign(x=x, y=y), outcome["status"] == "finished"
    known, unknown = outcome[scored], outcome[outcome["same_as"].isna() & ~scored]
    ax.plot(unknown["x"], unknown["y"], "o", color="#bbbbbb", mfc="white", ms=5)
    dots = ax.scatter(known["x"], known["y"], c=known["top1"], s=110, cmap="viridis", zorder=3, ec="black", lw=0.5)
    style = {"textcoords": "offset points", "ha": "center", "fontsize": 7}
    for row in known.itertuples():
        ax.annotate(f"{row.top1:.1f}", (row.x, row.y), (0, 8), **style)
    for row in outcome.itertuples():
        marks = {"published": row.published, "best": row.Index == known["top1"].idxmax()}
        text = ", ".join(mark for mark, applies in marks.items() if applies)
        ax.annotate(text, (row.x, row.y), (0, -7), va="top", fontweight="bold", **style)
    fig.colorbar(dots, label="minival top-1 (%)", shrink=0.6)
    ax.set(xlim=(-0.2, 1.2), ylim=(-0.15, 1.05), aspect="equal")
    ax.set_axis_off()
    fig.suptitle(drawn(title) + (" (mean over seeds)" if known["n"].max() > 1 else ""), fontsize=8)
    return fig
