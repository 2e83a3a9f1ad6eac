"""Statistics over seeds and test images: intervals, planned contrasts, the rule for a verdict, calibration."""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
import scipy

MARGIN = 0.5  # points of top-1 within which two methods count as equal


def t_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean, low, high of Student's t interval over seeds (n,). Below two values low and high are NaN."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return float(values.mean()), math.nan, math.nan
    half = scipy.stats.t.ppf((1 + confidence) / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)


def contrast_interval(
    terms: Sequence[tuple[float, Sequence[float]]], confidence: float = 0.95
) -> tuple[float, float, float]:
    """Sum of weight * mean over groups of seeds (weight, values), and its interval by Welch and Satterthwaite.

    [(1, a), (-1, b)] is a difference of means. With fewer than two values in a group low and high are NaN.
    """
    groups = [(weight, np.asarray(values, float)) for weight, values in terms]
    value = float(sum(weight * values.mean() for weight, values in groups))
    if min(len(values) for _, values in groups) < 2:
        return value, math.nan, math.nan
    parts = np.array([weight**2 * values.var(ddof=1) / len(values) for weight, values in groups])
    freedom = np.array([len(values) - 1 for _, values in groups])
    if not parts.any():
        return value, value, value
    freedom = parts.sum() ** 2 / (parts**2 / freedom).sum()
    half = scipy.stats.t.ppf((1 + confidence) / 2, freedom) * math.sqrt(parts.sum())
    return value, value - half, value + half


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
            test = scipy.stats.ttest_ind(a, b, equal_var=False)
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


def bootstrap(correct: Sequence[np.ndarray], draws: int = 2000, seed: int = 0) -> np.ndarray:
    """Top-1 in percent (draws, methods) of several methods when seeds and test images are both drawn anew.

    correct: right answers (seeds, images), bool, of each; an image drawn counts for all, seeds are drawn apart.
    """
    counts = sorted({c.shape[1] for c in correct})
    if len(counts) > 1:
        raise ValueError(f"expected the same test images, got {' and '.join(map(str, counts))}")
    rng, images = np.random.default_rng(seed), counts[0]
    means = []
    for _ in range(draws):
        weights = rng.multinomial(images, np.full(images, 1 / images)) / images
        means.append([(c[rng.integers(len(c), size=len(c))] @ weights).mean() for c in correct])
    return 100 * np.array(means)


def paired_bootstrap(target: np.ndarray, other: np.ndarray, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the difference in top-1 (points) when seeds and test images are both drawn anew."""
    means = bootstrap([target, other], draws, seed)
    low, high = np.quantile(means[:, 0] - means[:, 1], [0.025, 0.975])
    return float(low), float(high)


def calibration(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> tuple[float, pd.DataFrame]:
    """Expected calibration error in points (Guo et al. 2017), and its bins: confidence, accuracy (percent), images.

    confidence: probability (images,) of the predicted class; correct: whether it was right. Bins are of equal width.
    """
    index = np.clip(np.ceil(np.asarray(confidence, float) * bins).astype(int) - 1, 0, bins - 1)
    table = pd.DataFrame({"bin": index, "confidence": 100.0 * confidence, "accuracy": 100.0 * np.asarray(correct)})
    table = table.groupby("bin").agg(
        confidence=("confidence", "mean"), accuracy=("accuracy", "mean"), images=("accuracy", "size")
    )
    gap = (table["confidence"] - table["accuracy"]).abs()
    return float((gap * table["images"]).sum() / table["images"].sum()), table


def number(value: object) -> str:
    """A cell of a table for people: whole numbers whole, others with two decimals, words as they are."""
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.2f}"
