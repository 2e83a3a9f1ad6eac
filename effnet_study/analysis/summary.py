"""Text for readers: a run in a sentence, and the README.md of a study's results, all in Markdown."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from effnet_study.analysis.claims import AXES, verdict_lines
from effnet_study.analysis.figures import draw_ablation
from effnet_study.analysis.recipes import ablation, load_pilots, mistakes
from effnet_study.analysis.statistics import half_up
from effnet_study.analysis.tables import changes_in_words, contrasts, finished_runs, kind_of, study_runs, table7
from effnet_study.coefficients import describe_search, load_coefficients, searched_coefficients
from effnet_study.files import RESULTS, in_markdown, replace_file, save_figure, save_table
from effnet_study.methods import listed, spoken
from effnet_study.profile import Profile
from effnet_study.record import read_record

FIGURES = ("ablation", "figure8", "figure8_matched", "learning_curves", "search", "figure7", "per_class", "calibration")
# Columns of Table 7 in Markdown: a title, and the name and format of the value
IN_RESULTS = {
    "method": ("name", "{}"),
    **{coefficient: (coefficient, "{:.2f}") for coefficient in "dwr"},
    "px": ("resolution", "{}"),
    "params": ("params", "{:,}"),
    "FLOPs": ("flops", "{:,}"),
    "activations": ("activations", "{:,}"),
    "n": ("n", "{}"),
    "top-1 %": ("top1", "{:.2f}"),
    "95 % interval": ("interval", "{}"),
    "sd": ("top1_sd", "{:.2f}"),
    "paper %": ("paper_top1", "{:.1f}"),
}
IN_README = {
    "method": ("name", "{}"),
    "FLOPs": ("flops", "{:,}"),
    "seeds": ("n", "{}"),
    "top-1 (%)": ("top1", "{:.2f}"),
    "95 % interval": ("interval", "{}"),
    "SD": ("top1_sd", "{:.2f}"),
    "gain": ("gain", "{:+.2f}"),
    "paper's top-1 (%)": ("paper_top1", "{:.1f}"),
    "paper's gain": ("paper_gain", "{:+.2f}"),
}


def describe_run(profile: Profile, record: Mapping) -> str:
    """Return what a finished run's record says of its scores and its time."""
    test, title = record["test"], in_markdown(profile.title)
    return (
        f"**{title}, {record['method']}, seed {record['seed']}:** test top-1 **{test['top1']:.2f} %**, "
        f"top-5 {test['top5']:.2f} % with the EMA weights after the last epoch "
        f"({record['test_raw']['top1']:.2f} % with the raw weights), {record['seconds']:,.0f} s at "
        f"{record['images_per_second']:,.0f} images/s on {record['device']['name']}. *{profile.stamp.capitalize()}. "
        "One run alone shows nothing, and other work on the machine makes its time longer.*"
    )


def write_page(profile: Profile, found: Mapping, results: str | Path | None = None) -> None:
    """Write README.md for the results folder of a profile: what was run, on what, what came out, how to repeat it. With
    it write the tables that 05_analysis does not show: mistakes, pilots, ablation. found: of `verdict`."""
    study_dir = Path(results or RESULTS) / profile.name
    runs, done = study_runs(profile, results)
    if profile.parent is None:
        save_table(mistakes(profile, done, contrasts(profile, runs)), study_dir / "tables" / "mistakes.csv")
    if len(pilots := load_pilots(profile, results)):
        save_table(pilots, study_dir / "tables" / "pilots.csv")
    sections = [f"# {in_markdown(profile.title)}", "", *_about(profile, runs), ""]
    if kind_of(profile) == "ablation":
        table = ablation(profile, results)
        _save_ablation(profile, table, done, results)
        sections += ["## What the change does", "", *ablation_lines(profile, table), ""]
    title, scale = "Verdict" if profile.purpose == "evidence" else "Contrasts", profile.scale and f", {profile.scale}"
    sections += [f"## {title}{scale}", "", *verdict_lines(found), ""]
    sections += _pictures(study_dir, ["contrasts", "lengths"])
    sections += [f"## Table 7{scale}", "", _in_markdown(table7(profile, done), IN_RESULTS, str), ""]
    if searched_coefficients(profile, study_dir):
        sections += ["## Coefficient search", "", describe_search(load_coefficients(profile, study_dir)), ""]
    if unplanned := [*unfinished_runs(runs), *_split_batches(profile, runs)]:
        sections += ["## Not finished, or not as planned", "", *(f"- {line}" for line in unplanned), ""]
    sections += _pictures(study_dir, FIGURES)
    replace_file(study_dir / "README.md", "\n".join(sections).rstrip("\n") + "\n")


def _save_ablation(profile: Profile, table: pd.DataFrame, done: pd.DataFrame, results: str | Path | None) -> None:
    """Write table and figure of an ablation in place of the old ones."""
    study_dir = Path(results or RESULTS) / profile.name
    for path in (study_dir / "tables" / "ablation.csv", *(study_dir / "figures").glob("ablation.*")):
        path.unlink(missing_ok=True)
    if len(table):
        save_table(table, study_dir / "tables" / "ablation.csv")
        whole = finished_runs(profile.parent, results)
        fig = draw_ablation(profile, changes_in_words(profile), table["what"], whole, done)
        save_figure(fig, study_dir / "figures" / "ablation")
        plt.close(fig)  # the notebook does not show it


def _about(profile: Profile, runs: pd.DataFrame) -> list[str]:
    """Say what was run, on which images and machines, by which code, and how to repeat it."""
    done = runs[runs["status"] == "finished"]
    record = read_record(done["run_dir"].iloc[0])
    data, versions = record["dataset"], record["versions"]
    counts = "{train:,} training, {minival:,} minival and {test:,} test images".format(**data["counts"])
    begin, end = pd.to_datetime(done["started"]).min(), pd.to_datetime(done["ended"]).max()
    hours, within = done["seconds"].sum() / 3600, (end - begin).total_seconds() / 3600
    uneven = "; times cannot be compared between processors" if done["device"].nunique() > 1 else ""
    purpose = f"Purpose: **{profile.stamp}**. {len(done)} of {len(runs)} planned runs are finished."
    if (parent := profile.parent) is not None:
        changes = changes_in_words(profile) or "the same recipe"
        purpose += f" It extends [{in_markdown(parent.title)}](../{parent.name}/README.md) ({changes}) and "
        purpose += "decides no claim by itself."
    if (protocol := (parent or profile).protocol) is not None:
        purpose += f" Rules: [protocol](../../report/PROTOCOL.md), study `{protocol.section}`, as commit "
        purpose += f"{protocol.commit[:10]} has it; see *Clarifications* and *Deviations* there."
    return [
        purpose,
        "",
        f"- Data: {in_markdown(data['title'])}, {counts} of {data['classes']} classes.",
        f"- Machine: {devices(done)}; {hours:.1f} hours of computing within {within:.1f} hours,",
        f"  {begin:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M} UTC.",
        f"  Other work on the machine makes times longer{uneven}.",
        f"- Code: {', '.join(str(commit)[:10] for commit in done['commit'].unique())}, Python {versions['python']}, "
        f"torch {versions['torch']}.",
        f"- Repeat it: `{profile.command('study')} --results DIR`. {_how_long(runs, done, record)}",
    ]


def _how_long(runs: pd.DataFrame, done: pd.DataFrame, record: Mapping) -> str:
    """Say how long all planned runs take at the speed of those that are finished."""
    each = done.groupby("method")["seconds"].mean()
    hours = runs["method"].map(each).fillna(each.mean()).sum() / 3600
    if record["device"].get("type") == "cuda" or record["device"]["name"].endswith(" threads"):
        return f"All {len(runs)} runs take about {hours:.3g} hours of one device like this one."
    shared = " and ".join(f"{hours / cores:.3g} hours on {cores} cores" for cores in (4, 8))
    return f"At this speed all {len(runs)} runs take about {hours:.3g} core-hours: {shared}, a run on each."


def ablation_lines(profile: Profile, table: pd.DataFrame) -> list[str]:
    """Return the table of `ablation` as a Markdown list."""
    whole = profile.parent
    if table.empty:
        return [f"There is nothing to compare: no seed is finished both here and in {whole.name}."]
    link = f"[{in_markdown(whole.title)}](../{whole.name}/README.md)"
    lines = [f"Changed in comparison with {link}: {changes_in_words(profile)}.", ""]
    for row in table.itertuples():
        interval = f"95 % interval {row.low:+.2f} to {row.high:+.2f}"
        alone = f"one seed; all seeds as it is: {row.all_seeds_as_it_is:.2f}"
        before, after, difference = map(half_up, (row.as_it_is, row.changed, row.difference))
        lines.append(
            f"- {spoken(row.what)}, {row.weights}: {before:.2f} as it is, {after:.2f} changed: "
            f"{difference:+.2f} points ({interval if row.n > 1 else alone})"
        )
    return lines


def short_table7(rows: pd.DataFrame) -> str:
    """Return Table 7 in Markdown as the project's README shows it, ours beside the paper's. A gain is the difference to
    the baseline in points. rows: of `table7`."""
    return _in_markdown(rows, IN_README, spoken, colalign=("left", *["right"] * 8))


def _in_markdown(rows: pd.DataFrame, columns: Mapping, name: Callable[[str], str], **options: object) -> str:
    """Return Table 7 in Markdown. columns: as IN_RESULTS. name: how a method is written."""
    pairs = zip(rows["method"], rows["same_as"], strict=True)
    names = [name(m) + (f" (same network as {name(same)})" if isinstance(same, str) else "") for m, same in pairs]
    intervals = [f"{r.top1_low:.2f} to {r.top1_high:.2f}" if r.n > 1 else "one seed" for r in rows.itertuples()]
    values = rows.assign(name=names, interval=intervals)
    scaled, baseline = rows["method"] != "baseline", rows[rows["method"] == "baseline"]
    for score, gain in (("top1", "gain"), ("paper_top1", "paper_gain")):
        values[gain] = (rows[score] - baseline[score].max()).where(scaled)  # NaN without a baseline
    texts = pd.DataFrame()
    for title, (column, form) in columns.items():
        cells = [half_up(value) if isinstance(value, float) else value for value in values[column]]
        texts[title] = [form.format(value) if pd.notna(value) else "" for value in cells]
    return texts.to_markdown(index=False, disable_numparse=True, **options)


def surplus(rows: pd.DataFrame, costs: pd.DataFrame | None) -> str:
    """Say how much more FLOPs compound has than the published single axes, here and at the paper's size. rows: of
    `table7`; costs: table7_cost.csv."""
    flops = rows.set_index("method")["flops"]
    others = [axis for axis in AXES if axis in flops]
    if not others or "compound" not in flops:
        return ""
    here = _span(flops["compound"] / flops[others])
    words = f"In FLOPs compound differs from the published single axes by {here} here"
    if costs is not None:
        flops = costs.set_index("method")["flops"]
        words += f", and by {_span(flops['compound'] / flops[[*AXES]])} at the paper's 224 px"
    return f"{words}. Networks of matched FLOPs are without this difference, as far as rounding permits."


def _span(ratios: pd.Series) -> str:
    percent = 100 * (ratios - 1)
    return " to ".join(dict.fromkeys(f"{value:+.0f} %" for value in (percent.min(), percent.max()))).replace("-", "−")


def devices(done: pd.DataFrame) -> str:
    """Name the devices of finished runs: AMD EPYC (1 thread) and some GPU."""
    return listed(re.sub(r", (\d+ threads?)$", r" (\1)", name) for name in sorted(done["device"].unique()))


def unfinished_runs(runs: pd.DataFrame) -> list[str]:
    """Name the runs that have not finished, those of one state and the same seeds together. runs: of `load_runs`."""
    alike = {}  # seeds and their state: the methods of which just these have it
    for (method, status), group in runs[runs["status"] != "finished"].groupby(["method", "status"], sort=False):
        seeds = f"seed{'s' * (len(group) > 1)} {listed(group['seed'].astype(str))} ({status})"
        alike.setdefault(seeds, []).append(spoken(method))
    return [f"{listed(methods)}: {seeds}" for seeds, methods in alike.items()]


def _split_batches(profile: Profile, runs: pd.DataFrame) -> list[str]:
    """Name the runs that had to split their batches."""
    lines, config = [], profile.config()
    shares = np.minimum(np.ceil(config.batch_size / config.accumulation), config.batch_size // runs["devices"])
    for run in runs.assign(share=shares)[runs["micro_batch"] < shares].itertuples():
        sizes = f"{run.micro_batch:.0f} images at a time instead of {run.share:.0f}"
        lines.append(f"{spoken(run.method)}, seed {run.seed}: memory was short, so batch norm saw {sizes}")
    return lines


def _pictures(study_dir: Path, names: Sequence[str]) -> list[str]:
    there = [name for name in names if (study_dir / "figures" / f"{name}.png").exists()]
    return [line for name in there for line in (f"![{name}](figures/{name}.png)", "")]
