"""The study's claims: which contrasts each one needs, its outcome, and its words in English."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from effnet_study.analysis.statistics import CONFIDENCE, MARGIN, SAME, SEEDS_TO_DECIDE, WIDE, claim_outcome, half_up
from effnet_study.methods import HEADLINE_METHODS, parse_method, spoken
from effnet_study.profile import Profile
from effnet_study.run import ENDED

AXES = ("depth", "width", "resolution")
HEADLINE = "compound_matched"  # the claim that decides
HEADLINE_PAIRS = tuple((HEADLINE_METHODS[0], other) for other in HEADLINE_METHODS[1:])
COMPARED = "compared, without a verdict"  # said of a claim without an outcome


@dataclass(frozen=True)
class Claim:
    """A statement about methods, and the contrasts (target, other) that it needs."""

    key: str
    title: str
    pairs: tuple[tuple[str, str], ...]
    decides: bool = True  # "target beats other"; else methods are only compared

    @property
    def methods(self) -> set[str]:
        return {method for pair in self.pairs for method in pair}


def planned_claims(methods: Iterable[str]) -> list[Claim]:
    """Return the claims that these methods can say something about, the headline first."""
    methods = set(methods)
    times = sorted({m.rpartition("_x")[2] for m in methods if parse_method(m).times}, key=float)
    compound = "compound scaling beats each single axis"
    searched = "compound scaling with searched coefficients beats each single axis"
    fast = "fast compound scaling compared with compound scaling at matched FLOPs"
    better = "the searched coefficients beat the published ones"
    about = "at about {} times the baseline's FLOPs"
    claims = [
        Claim(HEADLINE, f"{compound} at matched FLOPs", HEADLINE_PAIRS),
        Claim("compound_published", f"{compound} at the published coefficients", _against("compound")),
        *(Claim(f"compound_x{n}", f"{compound} {about.format(n)}", _against("compound", n)) for n in times),
        Claim("fast_compound", fast, (("fast_compound", "compound"),), decides=False),
        Claim("axes_help", "each single axis improves on the baseline", tuple((axis, "baseline") for axis in AXES)),
        Claim("searched", searched, _against("compound_searched")),
        *(Claim(f"searched_x{n}", f"{searched} {about.format(n)}", _against("compound_searched", n)) for n in times),
        Claim("searched_vs_published", better, (("compound_searched", "compound"),)),
    ]
    return [claim for claim in claims if any(set(pair) <= methods for pair in claim.pairs)]


def _against(target: str, times: str | None = None) -> tuple[tuple[str, str], ...]:
    """Return the contrasts of a target with the three axes, at so many times the baseline's FLOPs."""
    end = f"_x{times}" if times else ""
    return tuple((target + end, axis + end) for axis in AXES)


def claim_runs(claim: Claim, profile: Profile, runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs for which a claim waits. Only the headline waits for `more_seeds`."""
    own = runs[runs["method"].isin(claim.methods)]
    return own if claim.key == HEADLINE else own[own["seed"].isin(profile.seeds)]


def verdict(profile: Profile, runs: pd.DataFrame, table: pd.DataFrame, searched: Sequence[float] | None = None) -> dict:
    """Return the content of verdict.json: for each claim, why it is still open ("" if it is not), the fewest seeds, the
    outcome and a sentence per contrast.

    table: of `tables.contrasts`. searched: alpha, beta, gamma that the profile's search found. The outcome is None
    unless the profile's purpose is evidence and the claim says that one method beats others.
    """
    claims = []
    for claim in planned_claims(profile.methods):
        rows = table[table["claim"] == claim.key]
        if rows.empty:
            continue
        seeds = int(rows["n"].min()) if len(rows) == len(claim.pairs) else 0
        still_open, outcome = _why_open(claim, profile, claim_runs(claim, profile, runs), rows), None
        if profile.purpose == "evidence" and profile.parent is None and claim.decides:
            outcome = claim_outcome(rows.loc[rows["same_as"].isna(), "outcome"].tolist(), seeds, not still_open)
        sentences = [sentence(row) for row in rows.itertuples()]
        grown = [axis for axis, factor in zip(AXES, searched or (), strict=False) if factor > 1]
        if claim.key == "searched" and len(grown) == 1:  # the grid holds such points too
            sentences.append(f"The search gave everything to {grown[0]}, so this is not compound scaling")
        entry = {"key": claim.key, "title": claim.title, "open": still_open}
        claims.append(entry | {"seeds": seeds, "outcome": outcome, "sentences": sentences})
    head = {"profile": profile.name, "purpose": profile.purpose, "stamp": profile.stamp}
    return head | {"confidence": CONFIDENCE, "margin": MARGIN, "claims": claims}


def _why_open(claim: Claim, profile: Profile, own: pd.DataFrame, rows: pd.DataFrame) -> str:
    """Say what a claim waits for. own: its runs; rows: its contrasts."""
    ended = own["status"].isin(ENDED)
    if not ended.all():
        return f"{ended.sum()} of its {len(own)} planned runs have ended"
    if set(own["method"]) != claim.methods:
        return "methods that it needs are not planned"
    widest, enough = rows["half_width"].max(), rows["n"].min() == SEEDS_TO_DECIDE
    if claim.key == HEADLINE and profile.protocol is not None and enough and widest > WIDE:
        return f"half the width of an interval is {half_up(widest):.2f} points, so the protocol asks for more seeds"
    return ""


def sentence(row) -> str:
    """Say one row of `tables.contrasts` (a named tuple) in words."""
    target, other = spoken(row.target), spoken(row.other)
    if row.outcome == SAME:
        return f"{target} and {other} are by rounding the same network: nothing is compared"
    cost, percent = "as many FLOPs", abs(100 * (row.flops_ratio - 1))
    if percent > 0:
        cost = f"{percent:.{0 if percent >= 1 else 2}f} % {'more' if row.flops_ratio > 1 else 'fewer'} FLOPs"
    points = f"{abs(half_up(row.difference)):.2f}"
    place = f"is {points} points {'higher' if row.difference > 0 else 'lower'} than {other}"
    if points == "0.00":
        place = f"scores the same as {other} to 0.01 points"
    interval = f"n = {row.n}, {100 * row.confidence:.3g} % interval {row.low:+.2f} to {row.high:+.2f}"
    words = f"{target} {place}, with {cost}: {row.outcome} ({interval if row.n > 1 else 'one seed'})"
    if isinstance(row.same_as, str):
        words += f". After rounding, these are the same two networks as {spoken(row.same_as)}, compared once"
    if not math.isnan(row.paper_difference):
        words += f". The paper's networks: {row.paper_difference:+.1f}"
    return words


def verdict_lines(found: Mapping) -> list[str]:
    """Return the claims of verdict.json in Markdown."""
    if not found["claims"]:
        return ["No claim has finished runs of two methods that it compares, so there is nothing to decide."]
    lines = [
        "Differences of mean test top-1 with Welch's intervals over seeds; those of one claim hold together at 95 %. "
        "n is the number of seeds of the method that has fewer."
    ]
    lines.append("")
    for claim in found["claims"]:
        still = f" ({claim['open']})" if claim.get("open") else ""  # files of earlier versions do not say
        lines.append(f"- **{claim['title']}: {claim['outcome'] or COMPARED}**{still}")
        lines += [f"  - {words}." for words in claim["sentences"]]
    return lines
