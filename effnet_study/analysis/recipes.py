"""Tables about recipes: common mistakes, ablations, pilots."""

from pathlib import Path

import numpy as np
import pandas as pd

from effnet_study.analysis.statistics import contrast_interval, half_up
from effnet_study.analysis.tables import changes_in_words, finished_runs, scores_by_method
from effnet_study.files import RESULTS, load_history
from effnet_study.methods import scaled_cost, spoken
from effnet_study.profile import Profile
from effnet_study.record import baseline_coefficients, read_record, recipe


def mistakes(profile: Profile, done: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Return what common mistakes would have changed, as far as these runs show it without further training: a row each
    with a measure, its value here and with the mistake, in words. table: of `contrasts`."""
    rows = []
    if len(seeded := table[table["low"].notna()]):
        nearest, scores = seeded.loc[seeded["difference"].abs().idxmin()], scores_by_method(done)
        pair = f"{spoken(nearest['target'])} minus {spoken(nearest['other'])}"
        here = f"{half_up(nearest['difference']):+.2f} points, {nearest['low']:+.2f} to {nearest['high']:+.2f}"
        single = np.subtract.outer(scores[nearest["target"]], scores[nearest["other"]])  # of all pairs of seeds
        wrong = f"{single.min():+.2f} to {single.max():+.2f} points, by the choice of seeds"
        rows.append(("one seed", pair, here, wrong))
    histories = [load_history(run_dir) for run_dir in done["run_dir"]]
    last = [history["minival_top1"].iloc[-1] for history in histories]
    best = [history["minival_top1"].max() for history in histories]
    for mistake, measure, right, wrong in (
        ("weights of the last step scored", "top-1", [*done["top1"]], [*done["raw_top1"]]),
        ("best epoch by the scored images", "top-1 on minival", last, best),
    ):
        run = np.abs(np.subtract(right, wrong)).argmax()
        rows.append((mistake, f"{measure}, where it differs most", f"{right[run]:.2f} %", f"{wrong[run]:.2f} %"))
    annealed = max(history["lr"].iloc[-1] for history in histories) / profile.config().lr
    # An earlier reproduction: 35 epochs, of which 10 warm up; then the paper's decay, 0.97 every 2.4 of 350 epochs
    barely = 0.97 ** ((34 - 10) / 2.4)
    shares = f"{100 * annealed:.2f} %", f"{100 * barely:.0f} %"
    here = (profile.base_resolution, profile.num_classes, profile.stem_stride)
    params = [f"{scaled_cost(profile.baseline, *here, se_expanded=wrong).params:,}" for wrong in (False, True)]
    rows += [
        ("learning rate not annealed", "the last rate as a share of the peak", *shares),
        ("squeeze-and-excitation of expanded channels", "parameters of the baseline", *params),
    ]
    return pd.DataFrame(rows, columns=["mistake", "measure", "here", "with the mistake"])


def ablation(profile: Profile, results: str | Path | None = None) -> pd.DataFrame:
    """Compare a profile that changes the recipe with the one that it extends, by the seeds that have finished in both.

    The table has a row per method, and a row for each method's lead over the baseline: the mean top-1 as it is and
    changed, their difference with Welch's 95 % interval, and the mean of all seeds as it is, from which a few seeds may
    be far. All rows come first with the moving average of the weights, which a study scores, then with the weights of
    the last step.
    """
    finished, rows = [finished_runs(each, results) for each in (profile.parent, profile)], []
    if any(runs.empty for runs in finished):
        return pd.DataFrame()
    for weights, score in (("moving average", "top1"), ("last step", "raw_top1")):
        before, after = (runs.pivot(index="seed", columns="method", values=score) for runs in finished)
        methods = [method for method in profile.methods if method in before and method in after]
        leads = [[method, "baseline"] for method in methods if "baseline" in methods and method != "baseline"]
        for pair in [*([method] for method in methods), *leads]:
            then, now = (table[pair].dropna() for table in (before, after))
            seeds, signs = then.index.intersection(now.index), (1, -1)[: len(pair)]
            if seeds.empty:
                continue
            then, now = then.loc[seeds], now.loc[seeds]
            row = {"weights": weights, "what": " - ".join(pair), "n": len(seeds)}
            row |= {"as_it_is": then.mean() @ signs, "changed": now.mean() @ signs}
            row["all_seeds_as_it_is"] = before[pair].mean() @ signs
            terms = [(-sign, then[method]) for sign, method in zip(signs, pair, strict=True)]
            terms += [(sign, now[method]) for sign, method in zip(signs, pair, strict=True)]
            row["difference"], row["low"], row["high"] = contrast_interval(terms)
            rows.append(row)
    return pd.DataFrame(rows).assign(change=changes_in_words(profile), purpose=profile.purpose)


def load_pilots(profile: Profile, results: str | Path | None = None) -> pd.DataFrame:
    """Return the pilots of a profile, a row each, by question, the best first: what they choose between (baseline or
    recipe), whether the profile took this one, baseline, FLOPs, minival scores, and the settings that differ."""
    rows, configs = [], []
    now = {**recipe(profile.train), "resolution": profile.base_resolution, **baseline_coefficients(profile.baseline)}
    for path in sorted((Path(results or RESULTS) / profile.name / "pilots").glob("*/run.json")):
        try:
            record = read_record(path.parent)
        except ValueError as error:
            print(error)
            continue
        config, baseline = recipe(record["config"]), record["baseline"]
        then = config | baseline
        asks = "baseline" if "baseline" in record.get("pilot", {}) else "recipe"
        decided = ("depth", "width", "resolution") if asks == "baseline" else now.keys() - {"epochs", "seed"}
        row = {"asks": asks, "taken": all(then[name] == now[name] for name in decided)}
        row |= {"pilot": path.parent.name, "status": record["status"], **baseline, "flops": record["cost"]["flops"]}
        row |= {f"minival_{name}": record.get("minival", {}).get(name) for name in ("top1", "top5", "loss")}
        rows.append(row | {"seconds": record.get("seconds")})
        configs.append(config)
    if not rows:
        return pd.DataFrame()
    settings = pd.DataFrame(configs)
    table = pd.concat([pd.DataFrame(rows), settings.loc[:, settings.nunique() > 1]], axis="columns")
    return table.sort_values(["asks", "minival_top1"], ascending=[True, False], ignore_index=True)
