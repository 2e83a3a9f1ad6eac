"""A study that never took place: records, tables and figures in the formats that the analysis writes.

The documents read nothing else, so their tests need neither training nor committed results.
"""

import json
import math
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import scipy
import yaml

from effnet_study.analysis.statistics import t_interval
from effnet_study.files import NOTEBOOKS, RESULTS, save_figure, save_table
from effnet_study.methods import PAPER_TABLE7
from effnet_study.profile import load_profile
from effnet_study.record import write_record
from effnet_study.run import Run, load_runs, plan_runs

AXES = ("depth", "width", "resolution")
MATCHED = tuple(f"{axis}_matched" for axis in AXES)
RECIPE = {
    "epochs": 8,
    "batch_size": 25,
    "optimizer": "sgd",
    "lr": 0.2,
    "norm_momentum": 0.1,
    "zero_init_residual": True,
}
PROFILES = {
    "mini": {
        "title": "Mini, made up",
        "purpose": "exploratory",
        "data": {"name": "digits", "size": 48},
        "baseline": {"depth": 0.5, "width": 0.5},
        "base_resolution": 24,
        "stem_stride": 1,
        "methods": [["baseline", *AXES, "compound"], [*MATCHED], ["fast_compound"]],
        "train": RECIPE,
    },
    "mini-half": {
        "title": "Mini, half of the epochs",
        "methods": ["baseline", *MATCHED, "compound"],
        "train": {"epochs": 4},
    },
    "mini-x2": {"title": "Mini, twice the FLOPs", "methods": ["width_x2", "compound_x2"]},
    "mini-low-lr": {"title": "Mini, half the rate", "methods": ["baseline", "compound"], "train": {"lr": 0.1}},
}
# Mean top-1 by method; seeds lie around it
MEANS = {"baseline": 40, "depth": 44.4, "width": 45.1, "resolution": 44.7, "compound": 47.6}
MEANS |= {"depth_matched": 44.9, "width_matched": 45.9, "resolution_matched": 46.2, "fast_compound": 47.4}
MEANS |= {"width_x2": 43.1, "compound_x2": 44.2}
CLAIMS = {  # key: title, contrasts
    "compound_matched": (
        "compound scaling beats each single axis at matched FLOPs",
        [("compound", axis) for axis in MATCHED],
    ),
    "compound_published": (
        "compound scaling beats each single axis at the published coefficients",
        [("compound", axis) for axis in AXES],
    ),
    "fast_compound": (
        "fast compound scaling compared with compound scaling at matched FLOPs",
        [("fast_compound", "compound")],
    ),
    "axes_help": ("each single axis improves on the baseline", [(axis, "baseline") for axis in AXES]),
}
# As 00_architecture counts them
TABLE7_COST = """method,d,w,r,params,flops,activations,paper_flops,compound_extra_percent,matched_coefficient,\
matched_flops,matched_residual_percent
baseline,1,1,1,5288548,385814752,6748036,400000000,366.5688055,,,
depth,4,1,1,20091856,1575132640,22784704,1800000000,14.28188549,4.33,1782167392,-0.9957210614
width,1,2,1,18122720,1449958848,13495072,1800000000,24.14774961,2.23,1835760048,1.981497738
resolution,1,1,2,5288548,1537537408,26961124,1900000000,17.07625913,2.142857143,1764748000,-1.963415989
compound,1.4,1.2,1.3,12233232,1800091280,22992432,1800000000,0,,,
"""


def write_profiles(folder: Path, seeds: int) -> Path:
    """Write mini.yaml and the profiles that extend it; return the path of mini.yaml."""
    folder.mkdir(parents=True)
    for name, values in PROFILES.items():
        extends = {} if name == "mini" else {"extends": "mini.yaml"}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values | extends | {"seeds": [*range(seeds)]}))
    return folder / "mini.yaml"


def score(method: str, seed: int, shift: float = 0.0) -> float:
    """Top-1 of a run that never took place, in percent."""
    return MEANS[method] + shift + 0.4 * math.sin(2.1 * seed + len(method))


def write_finished(run: Run, folder: Path, top1: float, **changes) -> None:
    """Write the record of a finished run of these settings, with some entries changed."""
    counts = {"train": 1200, "minival": 200, "test": 500}
    dataset = {
        "name": "digits",
        "title": "Digits (made up)",
        "classes": 10,
        "counts": counts,
        "fingerprint": "abc" * 11,
    }
    dataset |= {"stored_pixels": [48, 48], "class_names": [*"0123456789"]}
    scores = {"top1": top1, "top5": 80 + top1 / 10, "loss": 2.0}
    record = {"status": "finished", **run.about, "seed": run.seed, "config": dict(run.config), "cost": vars(run.cost)}
    record |= {"dataset": dataset, "test": scores, "test_raw": scores, "minival": scores, "micro_batch": 25}
    record |= {
        "versions": {"python": "3.12", "torch": "2.9"},
        "git": {"commit": "abcdef012345"},
        "device": {"name": "box"},
    }
    record |= {"seconds": 360.0, "images_per_second": 700.0, "peak_memory_bytes": 5}
    record |= {"started": "2026-01-02T03:04:05+00:00", "ended": "2026-01-02T04:04:05+00:00"}
    folder.mkdir(parents=True)
    write_record(folder, record | changes)


def finish(run: Run, top1: float) -> None:
    """Write the record and the files of a finished run."""
    rng, epochs = np.random.default_rng(run.seed), run.config.epochs
    write_finished(run, run.run_dir, top1)
    lines = []
    for epoch in range(1, epochs + 1):
        minival = {"minival_top1": top1 * epoch / epochs, "minival_loss": 3 / epoch}
        lines.append({"epoch": epoch, "lr": 0.1, "train_loss": 4 / epoch, **minival})
    (run.run_dir / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    right = rng.random(500) < top1 / 100
    np.save(run.run_dir / "test_correct.npy", right)
    labels = rng.integers(0, 10, 500)
    answers = {
        "label": labels,
        "predicted": np.where(right, labels, (labels + 1) % 10),
        "confidence": np.full(500, 0.5),
    }
    np.savez(run.run_dir / "test_predictions.npz", **answers)


def welch(a: np.ndarray, b: np.ndarray, confidence: float) -> tuple[float, float]:
    """Welch's interval of the difference of means, NaN below two values."""
    if min(len(a), len(b)) < 2:
        return math.nan, math.nan
    interval = scipy.stats.ttest_ind(a, b, equal_var=False).confidence_interval(confidence)
    return float(interval.low), float(interval.high)


def word(low: float, high: float) -> str:
    if math.isnan(low):
        return "unclear"
    return "above" if low > 0 else "below" if high < 0 else "equal" if low > -0.5 and high < 0.5 else "unclear"


def contrast(scores: dict, target: str, other: str, k: int) -> dict:
    """What the tables have of a contrast, one of k."""
    a, b = scores[target], scores[other]
    low, high = welch(a, b, 1 - 0.05 / k)
    row = {"target": target, "other": other, "difference": a.mean() - b.mean(), "n": min(len(a), len(b))}
    return row | {"low": low, "high": high, "outcome": word(low, high)}


def write_tables(name: Path, results: Path, purpose: str = "exploratory") -> None:
    """Write the tables of the study `mini` and of its ablation, from the records that are there."""
    profile = load_profile(name)
    tables, done = results / "mini" / "tables", load_runs(profile, results).query("status == 'finished'")
    scores = {method: group["top1"].to_numpy() for method, group in done.groupby("method", sort=False)}
    rows = []
    for method, group in done.groupby("method", sort=False):
        first = group.iloc[0]
        row = {
            "method": method,
            **first[["d", "w", "r", "resolution", "params", "flops", "activations"]],
            "n": len(group),
        }
        for part in ("top1", "top5"):
            row |= dict(zip((part, f"{part}_low", f"{part}_high"), t_interval(group[part]), strict=True))
        flops, top1 = PAPER_TABLE7.get(method, (math.nan, math.nan))
        row |= {"top1_sd": group["top1"].std(), "same_as": "", "seconds": 360, "images_per_second": 700}
        rows.append(row | {"paper_flops": flops, "paper_top1": top1, "purpose": purpose})
    save_table(pd.DataFrame(rows), tables / "table7.csv")
    flops, contrasts, claims = done.groupby("method")["flops"].first(), [], []
    for key, (title, pairs) in CLAIMS.items():
        pairs = [pair for pair in pairs if set(pair) <= set(scores)]
        for target, other in pairs:
            row = {"claim": key, **contrast(scores, target, other, len(pairs)), "same_as": ""}
            row |= {"half_width": (row["high"] - row["low"]) / 2, "flops_ratio": flops[target] / flops[other]}
            row |= {"sd_target": scores[target].std(ddof=1), "sd_other": scores[other].std(ddof=1)}
            published = [PAPER_TABLE7.get(method, (0, math.nan))[1] for method in (target, other)]
            contrasts.append(row | {"paper_difference": published[0] - published[1]})
        if pairs:
            mine = [row for row in contrasts if row["claim"] == key]
            sentences = [
                f"{r['target']} is {r['difference']:+.2f} points from {r['other']}: {r['outcome']}".replace("_", " ")
                for r in mine
            ]
            about = {"key": key, "title": title, "open": "", "sentences": sentences}
            claims.append(about | {"seeds": min(row["n"] for row in mine), "outcome": None})
    save_table(pd.DataFrame(contrasts), tables / "contrasts.csv")
    verdict = {"profile": "mini", "purpose": purpose, "stamp": profile.stamp, "confidence": 0.95, "margin": 0.5}
    (tables / "verdict.json").write_text(json.dumps(verdict | {"claims": claims}))
    (tables / "table7_cost.csv").write_text(TABLE7_COST)
    norms = [(d, 6 * d, zero, 1.8 if zero else 3.5 * d**1.7) for d in (1, 2, 3, 4) for zero in (False, True)]
    columns = ["depth", "blocks", "zero_init_residual", "gradient_norm"]
    save_table(pd.DataFrame(norms, columns=columns), tables / "zero_init.csv")
    mistakes = [("one seed", "compound minus width", "+2.50 points", "+1.90 to +3.10 points")]
    save_table(pd.DataFrame(mistakes, columns=["mistake", "measure", "here", "with it"]), tables / "mistakes.csv")
    write_budget_tables(name, results)
    write_extended_tables(name, results, scores)


def write_budget_tables(name: Path, results: Path) -> None:
    """Write contrasts.csv and verdict.json of `mini-x2`."""
    runs = load_runs(load_profile(name.with_name("mini-x2.yaml")), results).query("status == 'finished'")
    if runs.empty:
        return
    scores = {method: group["top1"].to_numpy() for method, group in runs.groupby("method", sort=False)}
    row = {"claim": "compound_x2", **contrast(scores, "compound_x2", "width_x2", 3), "same_as": "", "flops_ratio": 1.1}
    row |= {"half_width": (row["high"] - row["low"]) / 2, "sd_target": 0.3, "sd_other": 0.4, "paper_difference": None}
    save_table(pd.DataFrame([row]), results / "mini-x2" / "tables" / "contrasts.csv")
    claim = {
        "key": "compound_x2",
        "title": "compound scaling beats each single axis at about 2 times the baseline's FLOPs",
    }
    claim |= {"open": "methods that it needs are not planned", "seeds": 0, "outcome": None}
    verdict = {"claims": [claim | {"sentences": ["compound x2 is higher than width x2"]}]}
    (results / "mini-x2" / "tables" / "verdict.json").write_text(json.dumps(verdict))


def write_extended_tables(name: Path, results: Path, scores: dict) -> None:
    """Write lengths.csv and length_contrasts.csv of the study `mini`, and ablation.csv of `mini-low-lr`."""
    runs = {
        other: load_runs(load_profile(name.with_name(f"{other}.yaml")), results)
        for other in ("mini-half", "mini-low-lr")
    }
    runs = {other: table.query("status == 'finished'") for other, table in runs.items()}
    if runs["mini-half"].empty:
        return
    half = {method: group["top1"].to_numpy() for method, group in runs["mini-half"].groupby("method", sort=False)}
    lengths, contrasts = [], []
    for profile, epochs, found in (("mini-half", 4, half), ("mini", 8, scores)):
        for method in half:
            top1, low, high = t_interval(found[method])
            row = {"profile": profile, "epochs": epochs, "method": method, "n": len(found[method]), "top1": top1}
            lengths.append(row | {"low": low, "high": high})
        changes = (
            {"change": 0.7, "change_low": -1.3, "change_high": 2.7, "change_word": "unclear"} if epochs == 4 else {}
        )
        contrasts += [{"epochs": epochs, **contrast(found, "compound", axis, 3), **changes} for axis in MATCHED]
    save_table(pd.DataFrame(lengths), results / "mini" / "tables" / "lengths.csv")
    save_table(pd.DataFrame(contrasts), results / "mini" / "tables" / "length_contrasts.csv")
    rows = []
    for method, group in runs["mini-low-lr"].groupby("method", sort=False):
        row = {"weights": "moving average", "what": method, "n": len(group), "as_it_is": scores[method].mean()}
        low, high = welch(group["top1"].to_numpy(), scores[method], 0.95)
        row |= {"changed": group["top1"].mean(), "all_seeds_as_it_is": scores[method].mean(), "low": low, "high": high}
        rows.append(row | {"difference": group["top1"].mean() - scores[method].mean(), "change": "lr 0.2 to 0.1"})
    save_table(pd.DataFrame(rows).assign(purpose="exploratory"), results / "mini-low-lr" / "tables" / "ablation.csv")


def write_figures(folder: Path, names: list[str]) -> None:
    """Write FOLDER/NAME.{pdf,svg,png}, small pictures without meaning."""
    for name in names:
        fig, ax = plt.subplots(figsize=(4, 2))
        ax.plot([1, 2, 3], [1, 3, 2])
        ax.set_title(f"{name}, made up")
        save_figure(fig, folder / name)
        plt.close(fig)


def write_pilots(results: Path, name: Path) -> None:
    """Write the records of pilots, as `effnet pilot` does."""
    profile = load_profile(name)
    run = plan_runs(profile, results)[0]
    baseline = {"depth": 0.5, "width": 0.5}
    asked = [({"base_resolution": p, "baseline": baseline}, s, 20 + p / 8 + s) for p in (24, 32) for s in (0, 1)]
    asked += [({"lr": lr}, 0, 30 + lr) for lr in (0.1, 0.4)]
    asked += [({"optimizer": "rmsprop", "weight_decay": 1e-5}, 0, 25)]
    for changes, seed, top1 in asked:
        words = {key: "d0.50_w0.50" if key == "baseline" else value for key, value in changes.items()} | {"epochs": 2}
        settings = {key: value for key, value in changes.items() if not key.startswith("base")}
        config = dict(run.config) | settings | {"epochs": 2, "seed": seed}
        config["resolution"] = changes.get("base_resolution", 24)
        label = "_".join(f"{key}={words[key]}" for key in sorted(words))
        about = {"config": config, "seed": seed, "pilot": changes | {"epochs": 2}, "scored": "minival"}
        write_finished(run, results / "mini" / "pilots" / f"{label}_seed{seed}", top1, **about)


def write_study(folder: Path, seeds: int = 2, planned: int | None = None) -> tuple[Path, Path]:
    """Write the study `mini` with so many finished seeds of the planned ones under `folder`; return the path of its
    profile and the folder of results."""
    name, results = write_profiles(folder / "profiles", planned or seeds), folder / "results"
    for kind, shift in (("mini", 0), ("mini-half", -6), ("mini-x2", 0), ("mini-low-lr", -1.5)):
        for run in plan_runs(load_profile(name.with_name(f"{kind}.yaml")), results):
            if run.seed < seeds:
                finish(run, score(run.method, run.seed, shift))
    write_pilots(results, name)
    write_tables(name, results)
    drawn = ["figure8", "contrasts", "lengths", "learning_curves", "zero_init", "flops_mismatch", "five_networks"]
    write_figures(results / "mini" / "figures", drawn)
    books = results / "mini" / "notebooks"
    books.mkdir()
    for book in ("00_architecture", "05_analysis"):
        shutil.copy(NOTEBOOKS / f"{book}.ipynb", books)
    for device in ("amd-epyc-2-threads", "intel-r-xeon-r-processor-2-threads"):
        shutil.copytree(RESULTS / "throughput" / device, results / "throughput" / device)
    return name, results
