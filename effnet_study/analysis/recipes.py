"""Tables about recipes: common mistakes, ablations, pilots."""

from pathlib import Path

import numpy as np
import pandas as pd

from effnet_study.analysis.statistics import contrast_interval
from effnet_study.analysis.tables import changes_in_words, finished_runs, scores_by_method
from effnet_study.files import RESULTS, load_history
from effnet_study.methods import scaled_cost, spoken
from effnet_study.profile import Profile
from effnet_study.record import baseline_coefficients, read_record, recipe


def mistakes(profile: Profile, done: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Return what common mistakes would have changed, as far as these runs show it without further training: a row each
    with a measure, its value here and with the mistake, in words. table: of `contrasts`."""
    rows, seeded = [], table[table["low"].notna()]
    if len(seeded):
        nearest, scores = seeded.loc[seeded["difference"].abs().idxmin()], scores_by_method(done)
        pair = f"{spoken(nearest['target'])} minus {spoken(nearest['other'])}"
        here = "{difference:+.2f} points, {low:+.2f} to {high:+.2f}".format(**nearest)
        single = np.subtract.outer(scores[nearest["target"]], scores[nearest["other"]])  # of all pairs of seeds
        wrong = f"{single.min():+.2f} to {single.max():+.2f} points, by the choice of seeds"
        rows.append(("one seed", pair, here, wrong))
    histories = [load_history(run_dir) for run_dir in done["run_dir"]]
    last = pd.Series([history["minival_top1"].iloc[-1] for history in histories])
    best = pd.Series([history["minival_top1"].max() for history in histories])
    annealed = max(h["lr"].iloc[-1] for h in histories) / profile.config().lr
    # An earlier reproduction: 35 epochs, of which 10 warm up; then the paper's decay, 0.97 every 2.4 epochs, which was
    # made for 350 epochs
    barely = 0.97 ** ((34 - 10) / 2.4)
    shares = f"{100 * annealed:.5f} %", f"{100 * barely:.0f} %"
    here = (profile.base_resolution, profile.num_classes, profile.stem_stride)
    params = [f"{scaled_cost(profile.baseline, *here, se_expanded=wrong).params:,}" for wrong in (False, True)]
    rows += [
        ("weights of the last step scored", "top-1, where it differs most", *_largest(done["top1"], done["raw_top1"])),
        ("best epoch by the scored images", "minival top-1, where it differs most", *_largest(last, best)),
        ("learning rate not annealed", "the last one, of the highest", *shares),
        ("squeeze-and-excitation of expanded channels", "parameters of the baseline", *params),
    ]
    return pd.DataFrame(rows, columns=["mistake", "measure", "here", "with the mistake"])


def _largest(right: pd.Series, wrong: pd.Series) -> tuple[str, str]:
    """Return the two values (percent) of the run in which they differ most, in words."""
    run = (right - wrong).abs().idxmax()
    return f"{right[run]:.2f} %", f"{wrong[run]:.2f} %"


def ablation(profile: Profile, results: str | Path | None = None) -> tuple[str, pd.DataFrame]:
    """Compare a profile that changes the recipe with the one that it extends: the change in words, and a table.

    The table has a row per method, and a row for each method's lead over the baseline: the mean top-1 as it is and
    changed, their difference with Welch's 95 % interval, and the mean of all seeds as it is, from which a few seeds may
    be far. All rows come first with the moving average of the weights, which a study scores, then with the weights of
    the last step. If the profile has no baseline, the lead is over the baseline as it is, and the words say so. Only
    seeds are compared that have finished in both profiles.
    """
    change, own = changes_in_words(profile), profile.methods
    if "baseline" not in own:
        change += f" of {', '.join(own)} alone"
    finished, rows = [finished_runs(each, results) for each in (profile.parent, profile)], []
    if any(runs.empty for runs in finished):
        return change, pd.DataFrame()
    for weights, score in (("moving average", "top1"), ("last step", "raw_top1")):
        before, after = (runs.pivot(index="seed", columns="method", values=score) for runs in finished)
        methods = [method for method in own if method in before and method in after]
        if "baseline" not in own and "baseline" in before:
            after["baseline"] = before["baseline"]
        signs = [{method: 1} for method in methods]
        if "baseline" in before and "baseline" in after:
            signs += [{method: 1, "baseline": -1} for method in methods if method != "baseline"]
        for sign in map(pd.Series, signs):
            then, now = (table[sign.index].dropna() for table in (before, after))
            seeds = then.index.intersection(now.index)
            if seeds.empty:
                continue
            then, now = then.loc[seeds], now.loc[seeds]
            row = {"weights": weights, "what": " - ".join(sign.index), "n": len(seeds)}
            row |= {"as_it_is": then.mean() @ sign, "changed": now.mean() @ sign}
            row["all_seeds_as_it_is"] = before[sign.index].mean() @ sign
            terms = [(-sign[m], then[m]) for m in sign.index if m in own]
            terms += [(sign[m], now[m]) for m in sign.index if m in own]
            row["difference"], row["low"], row["high"] = contrast_interval(terms)
            rows.append(row)
    return change, pd.DataFrame(rows)


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
