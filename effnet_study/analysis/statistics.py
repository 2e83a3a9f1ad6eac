"""Statistics over seeds and test images, by the rules of report/PROTOCOL.md. All functions are pure.

Networks of one seed share splits but not weights, so seeds are not paired: pairing would gain little and halve the
degrees of freedom.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import scipy

CONFIDENCE = 0.95  # of one mean, and of all contrasts of a claim together
MARGIN = 0.5  # points of top-1 within which two methods count as equal
SEEDS_TO_DECIDE = 5  # a claim with fewer finished seeds of any method stays inconclusive
WIDE = 1.0  # points: a headline whose intervals have a greater half width at five seeds gets more seeds
SAME = "same network"  # the word of a contrast whose two methods are by rounding one network


def t_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return mean, low and high of Student's 95 % interval over seeds (n,). Below two values low and high are NaN."""
    return contrast_interval([(1, values)])


def contrast_interval(
    terms: Sequence[tuple[float, np.ndarray]], confidence: float = CONFIDENCE
) -> tuple[float, float, float]:
    """Return the sum of weight * mean over groups of seeds, and low and high of its interval.

    terms: (weight, values) of each group, values of shape (..., n) with seeds last; the three results have shape (...).
    [(1, a), (-1, b)] is a difference of means. Welch (1947), degrees of freedom by Satterthwaite (1946). With fewer
    than two values in a group low and high are NaN.
    """
    groups = [(weight, np.asarray(values, float)) for weight, values in terms]
    counts = [values.shape[-1] for _, values in groups]
    value = sum(weight * values.mean(-1) for weight, values in groups)
    if min(counts) < 2:
        return value, value * math.nan, value * math.nan
    parts = [weight**2 * values.var(-1, ddof=1) / values.shape[-1] for weight, values in groups]
    variance = sum(parts)
    with np.errstate(invalid="ignore"):  # 0 / 0 where the values of every group are all the same
        freedom = variance**2 / sum(part**2 / (n - 1) for part, n in zip(parts, counts, strict=True))
    half = np.where(variance > 0, scipy.stats.t.ppf((1 + confidence) / 2, freedom) * np.sqrt(variance), 0.0)
    return value, value - half, value + half


def joint_confidence(contrasts: int) -> float:
    """Return the confidence of each interval with which several hold together at 95 % (Bonferroni): 0.983 for three."""
    return 1 - (1 - CONFIDENCE) / max(contrasts, 1)


def word(low: float, high: float) -> str:
    """Return one word for a contrast's interval (points): above, below, equal (inside the margin) or unclear.

    An interval both above 0 and inside the margin is above. NaN, as below two seeds, is unclear.
    """
    if low > 0:
        return "above"
    if high < 0:
        return "below"
    return "equal" if low > -MARGIN and high < MARGIN else "unclear"


def contrast(target: Sequence[float], other: Sequence[float], contrasts: int = 1) -> dict[str, float | int | str]:
    """Compare the top-1 (percent) of two methods over their seeds, (n,) each: the difference of means in points.

    contrasts: how many intervals must hold together at 95 %. half_width is about the smallest visible difference.
    """
    difference, low, high = contrast_interval([(1, target), (-1, other)], joint_confidence(contrasts))
    row = {"difference": difference, "n": min(len(target), len(other)), "low": low, "high": high}
    row |= {"half_width": (high - low) / 2, "sd_target": pd.Series(target).std(), "sd_other": pd.Series(other).std()}
    return row | {"outcome": word(low, high)}


def contrast_rows(
    scores: Mapping[str, Sequence[float]], pairs: Sequence[tuple[str, str]], networks: Mapping[str, object]
) -> list[dict]:
    """Compare the pairs (target, other) of one claim: a row, as of `contrast`, for each whose two methods have scores.

    scores: top-1 by method over seeds, (n,) each. networks: by method something that is equal where two methods are the
    same network. A network is never compared with itself: outcome "same network", no interval. A pair that repeats the
    two networks of an earlier one has that one's numbers, and its names under same_as. Neither kind counts among the
    contrasts whose intervals hold together; pairs without scores count too, so that intervals do not change later.
    """
    compared = {pair: tuple(networks.get(method, method) for method in pair) for pair in pairs}
    together = len({(a, b) for a, b in compared.values() if a != b})
    rows, first = [], {}  # first: of each two networks, the first row
    for (target, other), key in compared.items():
        if target not in scores or other not in scores:
            continue
        row = contrast(scores[target], scores[other], together) | {"same_as": None}
        if key[0] == key[1]:
            row |= {"low": math.nan, "high": math.nan, "half_width": math.nan, "outcome": SAME}
        if earlier := first.get(key):
            row = earlier | {"same_as": f"{earlier['target']} - {earlier['other']}"}
        rows.append(row | {"target": target, "other": other, "confidence": joint_confidence(together)})
        first.setdefault(key, rows[-1])
    return rows


def claim_outcome(words: Sequence[str], seeds: int, complete: bool) -> str:
    """Return the outcome of "the target beats each other": reproduced, contradicted or inconclusive.

    words: of all its contrasts. seeds: the fewest of any. complete: whether all planned runs have ended (or failed).
    """
    if not words or seeds < SEEDS_TO_DECIDE or not complete:
        return "inconclusive"
    if {"below", "equal"} & set(words):
        return "contradicted"
    return "reproduced" if set(words) == {"above"} else "inconclusive"


def bootstrap(correct: Sequence[np.ndarray], draws: int = 2000) -> np.ndarray:
    """Resample seeds and images, and return the top-1 in percent (draws, methods) of several methods. A draw uses the
    same images for all methods, and seeds of its own for each. correct: right answers (seeds, images) of each method.
    """
    rng, images = np.random.default_rng(0), correct[0].shape[1]
    means = []
    for _ in range(draws):
        weights = rng.multinomial(images, np.full(images, 1 / images)) / images
        means.append([(c[rng.integers(len(c), size=len(c))] @ weights).mean() for c in correct])
    return 100 * np.array(means)


def calibration(confidence: np.ndarray, correct: np.ndarray) -> tuple[float, pd.DataFrame]:
    """Return the expected calibration error in points (Guo et al. 2017), and its 15 bins of equal width: confidence,
    accuracy, images, without empty bins. confidence: probability (images,) of the predicted class.
    """
    index = np.ceil(15 * np.asarray(confidence, float)).clip(1, 15).astype(int) - 1
    answers = pd.DataFrame({"bin": index, "confidence": 100.0 * confidence, "accuracy": 100.0 * np.asarray(correct)})
    bins = answers.groupby("bin").mean().assign(images=answers["bin"].value_counts())
    gaps = (bins["confidence"] - bins["accuracy"]).abs()
    return float(np.average(gaps, weights=bins["images"])), bins


def half_up(value: float) -> float:
    """Return a number for printing, so that Python rounds a tie away from zero, as typst and browsers do: means over
    seeds are often ties, such as 45.855, whose binary number lies below."""
    return round(value, 9) * (1 + 1e-12)


def number(value: object) -> str:
    """Format a table's cell: whole numbers whole, others with two decimals, words as they are."""
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.2f}"
