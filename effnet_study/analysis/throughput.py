"""Tables and figures of 06_throughput, made of what effnet_study.speed has measured."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from effnet_study.methods import color

GREY = "#999999"


def relative_times(times: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Return a row per network: relative_time is the median over the rounds of its time divided by the reference's in
    the same round, with quartiles ratio_q25 and ratio_q75. times: as `measure` returns them."""
    seconds = times.pivot(index="round", columns="contender", values="seconds")
    ratio = seconds.div(seconds[reference], axis=0).quantile([0.5, 0.25, 0.75]).T
    return ratio.set_axis(["relative_time", "ratio_q25", "ratio_q75"], axis="columns")


def peers_table(times: pd.DataFrame, about: pd.DataFrame, batch_size: int) -> pd.DataFrame:
    """Return a row per network. ours_is_faster and its quartiles are `relative_times` to the network "ours". times,
    about: as `measure` returns them."""
    seconds = times.pivot(index="round", columns="contender", values="seconds")
    table = pd.DataFrame({"images_per_second": batch_size / seconds.median(), "ms_per_step": 1000 * seconds.median()})
    table[["ours_is_faster", "ratio_q25", "ratio_q75"]] = relative_times(times, "ours")
    return table.loc[about.index].join(about).rename_axis("network").reset_index()


def steps_table(times: pd.DataFrame, about: pd.DataFrame, data: Mapping[str, float], batch_size: int) -> pd.DataFrame:
    """Return where a training step's time goes, a row per network, in milliseconds. data: by network, the seconds of
    making a batch, which is no part of the measured step. times, about: as `measure` returns them."""
    seconds = times.pivot(index=["contender", "round"], columns="part", values="seconds")
    seconds["backward"] = seconds["gradient"] - seconds["forward"]
    seconds["optimizer"] = seconds["step"] - seconds["gradient"]
    median = seconds.groupby("contender").median().assign(data=pd.Series(data)).loc[about.index]
    table = pd.DataFrame({"images_per_second": batch_size / median["step"], "data_ms": 1000 * median["data"]})
    table["data_percent"] = 100 * median["data"] / (median["data"] + median["step"])
    for part in ("forward", "backward", "optimizer"):
        table[f"{part}_ms"] = 1000 * median[part]
    return table.join(about).rename_axis("network").reset_index()


def input_table(measured: pd.DataFrame) -> pd.DataFrame:
    """Return a row per path of input. over_files and over_memory are the medians over the rounds of its speed divided
    by PIL's from files and from memory. measured: as `measure_input` returns it."""
    speed = measured.pivot(index="round", columns="path", values="images_per_second")
    files, memory = sorted(path for path in speed if path.startswith("PIL, "))  # "PIL, JPEG files, ..." is the first
    table = pd.DataFrame({"images_per_second": speed.median()})
    table["over_files"] = speed.div(speed[files], axis=0).median()
    table["over_memory"] = speed.div(speed[memory], axis=0).median()
    return table.reset_index()


def time_spread(steps: pd.DataFrame, count: str) -> float:
    """Return by what factor the time per FLOP or activation (the column `count`) differs among networks."""
    rate = 1 / (steps["images_per_second"] * steps[count])
    return rate.max() / rate.min()


def draw_rounds(speeds: Mapping[str, pd.DataFrame], xlabel: str):
    """Draw images per second: a dot for each round, a tick at the median, a panel for each of the tables `speeds`
    (rounds, names), whose key is its title."""
    fig, axes = plt.subplots(1, len(speeds), figsize=(4.2 * len(speeds), 3.2), sharey=True, squeeze=False)
    for ax, (title, speed) in zip(axes[0], speeds.items(), strict=True):
        for y, name in enumerate(speed):
            shade = color("compound" if name == "ours" or name.startswith("ours:") else "baseline")
            ax.plot(speed[name], np.full(len(speed), y), "o", color=shade, alpha=0.35, mew=0)
            ax.plot(speed[name].median(), y, "|", color=shade, ms=16, mew=2)
        ax.set(title=title, xlabel=xlabel, xlim=(0, None), yticks=range(speed.shape[1]), yticklabels=speed.columns)
        ax.locator_params(axis="x", nbins=4)
    axes[0, 0].invert_yaxis()
    return fig


def draw_steps(steps: pd.DataFrame, batch_size: int, title: str):
    """Draw the parts of a training step, in milliseconds per image. A negative time is drawn as none."""
    shades = {"data_ms": GREY, "forward_ms": "#56B4E9", "backward_ms": "#0072B2", "optimizer_ms": "#E69F00"}
    times = steps.set_index("network")[list(shades)].fillna(0).clip(lower=0) / batch_size
    ax = times.plot.barh(stacked=True, color=shades, width=0.6, figsize=(6.4, 3), title=title, ylabel="")
    ax.set(xlabel="milliseconds per image")
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.legend([name.removesuffix("_ms") for name in shades], loc="center left", bbox_to_anchor=(1, 0.5))
    return ax.figure


def draw_predictors(steps: pd.DataFrame):
    """Draw the time of a step against FLOPs and against activations, with the lines of proportional time."""
    fig, axes = plt.subplots(1, 2, figsize=(7.6, 3.2), sharey=True)
    milliseconds = 1000 / steps["images_per_second"]
    for ax, count, name in zip(axes, ("flops", "activations"), ("FLOPs", "activations"), strict=True):
        millions = steps[count] / 1e6
        end, slope = 1.25 * millions.max(), np.exp(np.log(milliseconds / millions).mean())
        ax.plot([0, end], [0, slope * end], color=GREY, lw=1)
        for method, x, y in zip(steps["network"], millions, milliseconds, strict=True):
            ax.plot(x, y, "o", color=color(method))
            side, align = (-6, "right") if method in ("depth", "resolution") else (6, "left")
            ax.annotate(method, (x, y), (side, -3), textcoords="offset points", ha=align, color=color(method))
        ax.set(xlim=(0, end), ylim=(0, None), xlabel=f"{name} per image (millions)")
    axes[0].set_ylabel("milliseconds per image, training")
    return fig
