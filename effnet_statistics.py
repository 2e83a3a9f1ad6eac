"""Statistics of few seeds: intervals, planned contrasts, and the rule that turns them into a verdict.

Scores are top-1 in percent, one number per trained network; differences are in points.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from scipy import stats

MARGIN = 0.5  # points of top-1 within which two methods count as equal


def t_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean, low, high of Student's t interval over seeds (n,). Below two values low and high are NaN."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return float(values.mean()), math.nan, math.nan
    half = stats.t.ppf((1 + confidence) / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)


def holm(p: Sequence[float]) -> np.ndarray:
    """Holm's step-down adjustment of p values (k,): each is compared with alpha afterwards."""
    p = np.asarray(p, float)
    order = np.argsort(p)
    adjusted = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return np.minimum(adjusted, 1)[np.argsort(order)]


def welch_holm(scores: Mapping[str, Sequence[float]], contrasts: Sequence[tuple[str, str]]) -> pd.DataFrame:
    """Planned contrasts (target, other) of one family, scores by method over seeds: a row each with the difference
    target - other, Welch's 95 % interval and p, Holm's p over the family, and the verdict on "target beats other"."""
    rows = []
    for target, other in contrasts:
        a, b = np.asarray(scores[target], float), np.asarray(scores[other], float)
        row = {"contrast": f"{target} - {other}", "n": min(len(a), len(b)), "difference": a.mean() - b.mean()}
        if row["n"] >= 2:
            test = stats.ttest_ind(a, b, equal_var=False)
            interval = test.confidence_interval(0.95)
            row |= {"low": interval.low, "high": interval.high, "p": test.pvalue}
        rows.append({"low": math.nan, "high": math.nan, "p": math.nan} | row)
    table = pd.DataFrame(rows)
    table["p_holm"] = holm(table["p"]) if table["p"].notna().all() else math.nan
    columns = ("difference", "low", "high", "p_holm", "n")
    table["verdict"] = [verdict(*row) for row in table[list(columns)].itertuples(index=False)]
    return table[["contrast", "n", "difference", "low", "high", "p", "p_holm", "verdict"]]


def verdict(
    difference: float, low: float, high: float, p_holm: float, n: int, margin: float = MARGIN, alpha: float = 0.05
) -> str:
    """The rule for "target beats other by top-1", fixed before the runs.

    reproduced: Holm's p below alpha and the difference positive. not reproduced: p below alpha and the
    difference negative, or the whole interval within +- margin (equivalent). inconclusive: anything else, and always
    below three seeds.
    """
    if n < 3 or not math.isfinite(p_holm):
        return "inconclusive"
    if p_holm < alpha:
        return "reproduced" if difference > 0 else "not reproduced"
    return "not reproduced" if -margin < low and high < margin else "inconclusive"


def overall(verdicts: Iterable[str]) -> str:
    """The verdict of a claim that needs all its contrasts: the weakest of theirs."""
    verdicts = list(verdicts) or ["inconclusive"]
    return next((v for v in ("not reproduced", "inconclusive") if v in verdicts), "reproduced")


def paired_bootstrap(target: np.ndarray, other: np.ndarray, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the difference in top-1 (points) when seeds and test images are both drawn anew.

    target, other: correct answers (seeds, images), bool; an image drawn counts for both, seeds are drawn apart.
    """
    if target.shape[1] != other.shape[1]:
        raise ValueError(f"expected the same test images, got {target.shape[1]} and {other.shape[1]}")
    rng, images = np.random.default_rng(seed), target.shape[1]
    differences = []
    for _ in range(draws):
        weights = rng.multinomial(images, np.full(images, 1 / images)) / images
        means = [(c[rng.integers(len(c), size=len(c))] @ weights).mean() for c in (target, other)]
        differences.append(100 * (means[0] - means[1]))
    low, high = np.quantile(differences, [0.025, 0.975])
    return float(low), float(high)
