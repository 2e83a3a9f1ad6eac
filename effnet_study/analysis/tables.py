"""The tables of the analysis, made from the records of runs: Table 7, contrasts, training lengths, single
images, the search. Scores are top-1 in percent, differences in points, FLOPs multiply-adds.
"""

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from effnet_lib import Scaling
from effnet_study.analysis.claims import HEADLINE_PAIRS, planned_claims
from effnet_study.analysis.statistics import SAME, calibration, contrast_interval, contrast_rows, t_interval, word
from effnet_study.files import PREDICTIONS, RESULTS, load_history, plain
from effnet_study.methods import PAPER_TABLE7
from effnet_study.profile import Profile, load_profile, profile_names
from effnet_study.record import read_record, recipe
from effnet_study.run import Run, load_runs


def study_runs(profile: Profile, results: str | Path | None = None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return all planned runs of a profile (as `load_runs`), and those that are finished. ValueError if none is."""
    runs = load_runs(profile, results)
    done = runs[runs["status"] == "finished"]
    if done.empty:
        place, command = Path(results or RESULTS) / profile.name, profile.command("study", results)
        raise ValueError(f"no run of {profile.name!r} is finished under {place}; run {command}")
    return runs, done


def finished_runs(profile: Profile, results: str | Path | None = None) -> pd.DataFrame:
    """Return the finished runs of a profile, as `load_runs`. There may be none."""
    return load_runs(profile, results).query("status == 'finished'")


def scores_by_method(done: pd.DataFrame) -> dict[str, np.ndarray]:
    """Return test top-1 (n,) over seeds of each method with finished runs, in the profile's order."""
    return {method: group["top1"].to_numpy() for method, group in done.groupby("method", sort=False)}


def networks(profile: Profile, runs: pd.DataFrame) -> dict[str, tuple]:
    """Return what rounding makes of each method's network; equal ones are the same network. Methods that wait for
    searched coefficients are left out."""
    rows = runs.drop_duplicates("method").dropna(subset=["d", "w", "r"])
    return {row.method: profile.network(Scaling(row.d, row.w, row.r)) for row in rows.itertuples()}


def recipe_changes(profile: Profile) -> dict[str, tuple]:
    """Return (old, new) of each setting that a profile changes in the recipe it extends. Empty if it extends none."""
    if profile.parent is None:
        return {}
    then, now = (recipe(dict(each.config())) for each in (profile.parent, profile))
    return {name: (then[name], now[name]) for name in now if then[name] != now[name]}


def changes_in_words(profile: Profile) -> str:
    """Return `recipe_changes` in words, for example "lr 0.2 to 0.1, epochs 16 to 8"."""

    def short(value: object) -> str:
        return f"{value:g}" if isinstance(value, float) else str(value)

    return ", ".join(f"{name} {short(old)} to {short(new)}" for name, (old, new) in recipe_changes(profile).items())


def kind_of(profile: Profile) -> str | None:
    """Return what a profile changes of the one that it extends: "length" (only the epochs), "budget" (the methods, with
    the same recipe) or "ablation" (anything else of the recipe). None if it extends none."""
    if profile.parent is None:
        return None
    changed = set(recipe_changes(profile))
    if not changed:
        return "budget"
    return "length" if changed == {"epochs"} else "ablation"


def extensions(profile: Profile) -> list[Profile]:
    """Return the profiles that extend this one. They are searched in notebooks/profiles, or, if this profile was given
    as a path, in its folder. Invalid files are skipped."""
    names = profile_names() if profile.source is None else sorted(Path(profile.source).parent.glob("*.yaml"))
    found = []
    for name in names:
        with contextlib.suppress(ValueError):  # unfinished, or another program's
            found.append(load_profile(name))
    return [other for other in found if other.parent is not None and other.parent.name == profile.name]


def table7(profile: Profile, done: pd.DataFrame) -> pd.DataFrame:
    """Return our Table 7, a row per method with finished runs: means over n seeds, with low and high of Student's 95 %
    interval and, for top1, the standard deviation. same_as names an earlier method that is by rounding the same
    network."""
    known, rows, first = networks(profile, done), [], {}
    for method, group in done.groupby("method", sort=False):
        row = {"method": method, **group[["d", "w", "r"]].iloc[0]}
        row |= group[["resolution", "params", "flops", "activations"]].iloc[0].astype(int)
        row["n"] = len(group)
        for score in ("top1", "top5"):
            row[score], row[f"{score}_low"], row[f"{score}_high"] = t_interval(group[score])
        row["top1_sd"] = group["top1"].std()
        row |= group[["seconds", "images_per_second", "peak_memory_bytes"]].mean()
        earlier = first.setdefault(known[method], method)
        row["same_as"] = None if earlier == method else earlier
        row["paper_flops"], row["paper_top1"] = PAPER_TABLE7.get(method, (math.nan, math.nan))
        rows.append(row)
    return pd.DataFrame(rows).assign(purpose=profile.purpose)


def contrasts(profile: Profile, runs: pd.DataFrame) -> pd.DataFrame:
    """Return the contrasts of the profile's claims, a row for each with finished runs of both sides. low, high and
    half_width are those of Welch's interval at `confidence`, with which the intervals of one claim hold together at
    95 %. image_se: of `image_error`. paper_difference is that of the paper's Table 7."""
    done = runs[runs["status"] == "finished"]
    scores, known = scores_by_method(done), networks(profile, runs)
    flops, folders, rows = done.groupby("method")["flops"].first(), done.groupby("method")["run_dir"], []
    for claim in planned_claims(profile.methods):
        for row in contrast_rows(scores, claim.pairs, known):
            row["claim"], row["flops_ratio"] = claim.key, flops[row["target"]] / flops[row["other"]]
            target, other = (PAPER_TABLE7.get(row[side], (math.nan, math.nan))[1] for side in ("target", "other"))
            error = image_error(*(folders.get_group(row[side]) for side in ("target", "other")))
            rows.append(row | {"image_se": error, "paper_difference": target - other})
    columns = ["claim", "target", "other", "difference", "n", "low", "high", "half_width", "sd_target", "sd_other"]
    columns += ["image_se", "flops_ratio", "same_as", "outcome", "paper_difference", "confidence"]
    return pd.DataFrame(rows, columns=columns)


def image_error(target: Iterable[Path], other: Iterable[Path]) -> float:
    """Return the standard error over test images of the difference of two methods' mean top-1, in points: how much
    other images would change it, for the networks as they are. NaN if a run did not keep its answers.

    target, other: the folders of each method's runs.
    """
    with contextlib.suppress(FileNotFoundError):
        right = [np.mean([np.load(each / "test_correct.npy") for each in runs], axis=0) for runs in (target, other)]
        gaps = 100 * np.subtract(*right)
        return gaps.std(ddof=1) / math.sqrt(len(gaps))
    return math.nan


def compare_costs(baseline: Run, run: Run) -> pd.DataFrame:
    """Return coefficients, pixels and cost of a run's network beside the baseline's, and their ratio."""
    columns = {}
    for each in (baseline, run):
        columns[each.method] = {**vars(each.scaling), "px": each.config.resolution, **vars(each.cost)}
    table = pd.DataFrame(columns)
    return table.assign(ratio=table[run.method] / table["baseline"])


def length_profiles(profile: Profile) -> list[Profile]:
    """Return the profile and those that extend it and change the epochs alone, the shortest first. Empty if there is
    one length only."""
    others = [other for other in extensions(profile) if kind_of(other) == "length"]
    return sorted([profile, *others], key=lambda one: one.config().epochs) if others else []


def lengths(profile: Profile, results: str | Path | None = None) -> pd.DataFrame:
    """Return test top-1 by training length: a row per profile and method, with Student's 95 % interval over n seeds.
    Empty unless two lengths have finished runs."""
    profiles, rows = length_profiles(profile), []
    compared = {method for other in profiles if other is not profile for method in other.methods}
    for one in profiles:
        for method, scores in scores_by_method(finished_runs(one, results)).items():
            if method in compared:
                rows.append((one.name, one.config().epochs, method, len(scores), *t_interval(scores)))
    table = pd.DataFrame(rows, columns=["profile", "epochs", "method", "n", "top1", "low", "high"])
    return table if table["epochs"].nunique() > 1 else table[:0]


def length_contrasts(
    profile: Profile, results: str | Path | None = None, pairs: Sequence[tuple[str, str]] = HEADLINE_PAIRS
) -> pd.DataFrame:
    """Return the contrasts of `pairs` at each training length, and by how much each differs from the profile's own
    length (`change`, its interval and word). The intervals of one length hold together at 95 %, as do its changes."""
    rows, usual = [], scores_by_method(finished_runs(profile, results))
    for one in length_profiles(profile):
        done = finished_runs(one, results)
        scores = scores_by_method(done)
        for row in contrast_rows(scores, pairs, networks(one, done)):
            sides = row["target"], row["other"]
            if one is not profile and row["outcome"] != SAME and all(method in usual for method in sides):
                terms = [
                    (sign * weight, group[method])
                    for sign, group in ((1, scores), (-1, usual))
                    for weight, method in zip((1, -1), sides, strict=True)
                ]
                change, low, high = contrast_interval(terms, row["confidence"])
                row |= {"change": change, "change_low": low, "change_high": high, "change_word": word(low, high)}
            rows.append({"epochs": one.config().epochs, **row})
    columns = ["epochs", "target", "other", "n", "difference", "low", "high", "outcome"]
    return pd.DataFrame(rows, columns=[*columns, "change", "change_low", "change_high", "change_word"])


def figure8_points(
    profile: Profile, done: pd.DataFrame, results: str | Path | None = None
) -> dict[str, tuple[float, np.ndarray]]:
    """Return (flops, top-1 over seeds) by method: of the study's own finished runs, and of profiles that extend it with
    the same recipe."""
    others = [finished_runs(other, results) for other in extensions(profile) if kind_of(other) == "budget"]
    points = {}
    for table in [done, *others]:
        for method, group in table.groupby("method", sort=False):
            points.setdefault(method, (group["flops"].iloc[0], group["top1"].to_numpy()))
    return points


def load_answers(done: pd.DataFrame) -> dict[str, list[Mapping[str, np.ndarray]]]:
    """Return label, predicted and confidence (images,) of each seed's test images, by method. A method is left out if a
    run of it did not keep its answers."""
    answers = {}
    for method, group in done.groupby("method", sort=False):
        paths = [run_dir / PREDICTIONS for run_dir in group["run_dir"]]
        if all(path.exists() for path in paths):
            answers[method] = [np.load(path) for path in paths]
    return answers


def per_class(answers: Mapping[str, Sequence[Mapping]], done: pd.DataFrame) -> pd.DataFrame:
    """Return the top-1 of each class, a column per method, mean over seeds; empty without the baseline's answers."""
    if "baseline" not in answers:
        return pd.DataFrame()
    columns = {}
    for method, seeds in answers.items():
        hits = [pd.Series(seed["predicted"] == seed["label"]).groupby(seed["label"]).mean() for seed in seeds]
        columns[method] = 100 * pd.concat(hits, axis="columns").mean(axis="columns")
    table = pd.DataFrame(columns)
    names = read_record(done["run_dir"].iloc[0])["dataset"].get("class_names", [])
    table.insert(0, "class", [plain(names[i]) if i < len(names) else i for i in table.index])
    return table


def calibration_table(
    profile: Profile, answers: Mapping[str, Sequence[Mapping]], table: pd.DataFrame
) -> tuple[pd.DataFrame, dict[str, pd.DataFrame]]:
    """Return the calibration error of each method, the mean over seeds with Student's 95 % interval, and by method
    its curve, accuracy by confidence, in bins of ten images at least. table: of `table7`."""
    rows, curves, top1 = [], {}, table.set_index("method")["top1"]
    for method, seeds in answers.items():
        found = [calibration(seed["confidence"], seed["predicted"] == seed["label"]) for seed in seeds]
        row = {"method": method, "n": len(seeds)}
        row["ece"], row["ece_low"], row["ece_high"] = t_interval([error for error, _ in found])
        row["mean_confidence"] = np.mean([100 * seed["confidence"].mean(dtype=float) for seed in seeds])
        rows.append(row | {"top1": top1[method], "purpose": profile.purpose})
        curves[method] = pd.concat(bins[bins["images"] >= 10] for _, bins in found).groupby("bin").mean()
    return pd.DataFrame(rows), curves


def search_outcome(profile: Profile, table: pd.DataFrame, candidates: Sequence[Run]) -> pd.DataFrame:
    """Return the table of `search.plan_search` with what each candidate scored: status, n seeds, epochs, seconds, and
    minival top-1 with Student's 95 % interval. candidates: those of the search's first seed and of all others."""
    rows = []
    for first in (each for each in candidates if each.seed == profile.search.seeds[0]):
        runs = [each for each in candidates if each.name == first.name and each.state() == "finished"]
        records = [read_record(run.run_dir) for run in runs]
        row = {"candidate": first.name, "status": first.state(), "n": len(records)}
        scores = t_interval([r["minival"]["top1"] for r in records]) if records else [math.nan] * 3
        row["top1"], row["low"], row["high"] = scores
        row["epochs"] = len(load_history(first.run_dir)) if row["status"] == "finished" else 0
        rows.append(row | {"seconds": sum(record["seconds"] for record in records)})
    return table.merge(pd.DataFrame(rows), on="candidate", how="left").assign(purpose=profile.purpose)
