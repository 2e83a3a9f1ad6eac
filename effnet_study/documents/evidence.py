"""The results of a study as report, poster, page and README present them.

The documents read most tables and figures under results/NAME themselves. This module has what they share: the study and
its extensions, what is missing, and the outcome in words (from tables/verdict.json and tables/contrasts.csv).
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import nbformat
import pandas as pd

from effnet_study.analysis.claims import COMPARED, HEADLINE, Claim, claim_runs, planned_claims
from effnet_study.analysis.recipes import load_pilots
from effnet_study.analysis.statistics import SAME, half_up
from effnet_study.analysis.summary import unfinished_runs
from effnet_study.analysis.tables import extensions, kind_of
from effnet_study.documents.templates import capital
from effnet_study.files import NOTEBOOKS, RESULTS, plain, read_table
from effnet_study.methods import listed, spoken
from effnet_study.profile import Profile
from effnet_study.record import read_record
from effnet_study.run import ENDED, load_runs

# Claims that titles tell, and in which words. The first that a study plans decides
TOLD = {HEADLINE: "at matched FLOPs", "compound_published": "at the published coefficients"}
# The title's prefix by the outcome of the claim that decides, as in ReScience C
PREFIXES = {"reproduced": "[Re]", "contradicted": "[¬Re]"}
UNDECIDED = "[Re: undecided]"
EXPECTED = {  # files of every study with finished runs, and what they are
    "tables/table7.csv": "Table 7",
    "tables/contrasts.csv": "the differences between methods",
    "tables/verdict.json": "the verdict",
    "figures/figure8.pdf": "Figure 8",
}
# The text of the one figure that no notebook draws
ABLATION = "Test top-1 of each method as it is and with the recipe changed, a dot per seed: "
ABLATION += "scored by the moving average, and by the weights of the last step."


@dataclass(frozen=True)
class Study:
    """The results of one profile, and of the profiles that extend it."""

    profile: Profile
    results: Path  # holds a folder for each profile
    runs: pd.DataFrame  # as `load_runs` returns them: a row for each planned run
    extensions: tuple["Study", ...] = ()
    failure: str | None = None  # why the analysis of these runs failed, if it did

    @property
    def name(self) -> str:
        return self.profile.name

    @property
    def kind(self) -> str | None:
        return kind_of(self.profile)

    @property
    def study_dir(self) -> Path:
        return self.results / self.name

    @cached_property
    def finished(self) -> pd.DataFrame:
        """The rows of `runs` that are finished."""
        return self.runs[self.runs["status"] == "finished"]

    @property
    def data(self) -> str:
        """The title of the data set, from the records of the runs."""
        return plain(self.profile.title if self.finished.empty else self.finished["data"].iloc[0])

    def has(self, file: str) -> bool:
        """Tell whether the study has a file, for example "tables/table7.csv"."""
        return (self.study_dir / file).is_file()

    def table(self, name: str) -> pd.DataFrame | None:
        """Return tables/NAME.csv. None if it is missing or without rows."""
        path = self.study_dir / "tables" / f"{name}.csv"
        table = read_table(path) if path.is_file() else pd.DataFrame()
        return None if table.empty else table

    @property
    def stale(self) -> bool:
        """Whether Table 7 is about other runs than the finished ones."""
        table, counts = self.table("table7"), self.finished["method"].value_counts()
        return table is not None and dict(zip(table["method"], table["n"], strict=True)) != counts.to_dict()

    @cached_property
    def claims(self) -> list[dict]:
        """The claims of tables/verdict.json, and in a study of evidence those that no finished runs compare yet.
        `status` is the outcome, at which scale, and why it is open; of a claim that decides nothing, what was found."""
        path = self.study_dir / "tables" / "verdict.json"
        if not path.is_file():
            return []
        found = {claim["key"]: claim for claim in json.loads(path.read_text(encoding="utf-8"))["claims"]}
        claims = []
        for planned in planned_claims(self.profile.methods):
            claim = found.get(planned.key)
            if claim is not None:
                told, still = claim["outcome"] or COMPARED, f" ({claim['open']})" if claim["open"] else ""
                if claim["outcome"] in PREFIXES:
                    told += (self.profile.scale and f" at {self.profile.scale}") + self._mixed_words(planned)
                if not planned.decides:
                    told = listed(claim["sentences"]).replace(" -", " −")
                    still = f"; {claim['open']}" if claim["open"] else ""
                claims.append(claim | {"status": told + still})
            elif self.profile.purpose == "evidence":
                claim = {"key": planned.key, "title": planned.title, "sentences": []}
                claims.append(claim | {"open": "no runs", "seeds": 0, "outcome": None, "status": "not tested yet"})
        return claims

    def _mixed_words(self, claim: Claim) -> str:
        """Say the words of a claim's contrasts, if they differ: " (above depth and width, below resolution)"."""
        table = self.table("contrasts")
        rows = () if table is None else table[(table["claim"] == claim.key) & (table["outcome"] != SAME)]
        if len(rows) == 0 or rows["outcome"].nunique() == 1 or rows["target"].nunique() > 1:
            return ""
        others = rows.groupby("outcome", sort=False)["other"]
        said = {"equal": "equal to", "unclear": "unclear against"}
        words = (
            f"{said.get(word, word)} {listed(spoken(name.removesuffix('_matched')) for name in names)}"
            for word, names in others
        )
        return f" ({', '.join(words)})"

    def open_runs(self, claim: Claim) -> pd.DataFrame:
        """Return the rows of the claim's planned runs that have not ended."""
        own = claim_runs(claim, self.profile, self.runs)
        return own[~own["status"].isin(ENDED)]

    @property
    def unfinished(self) -> str:
        """What every document says while planned runs are open. Empty once all have ended."""
        ended = self.runs["status"].isin(ENDED).sum()
        if ended == len(self.runs):
            return ""
        words = f"Unfinished: {ended} of {len(self.runs)} planned runs have ended. A claim is decided when all of its "
        more = "; more seeds can still change its numbers" if self.profile.more_seeds else ""
        return f"{words}own runs have ended{more}."

    @property
    def missing(self) -> list[str]:
        """What a reader would expect and does not find. The documents print it."""
        failed = [] if self.failure is None else [f"an analysis of these runs: {self.failure}"]
        if self.finished.empty:
            command = self.profile.command("study", self.results)
            return [f"no run of {self.name} is finished; to run it: {command}", *failed]
        changed = {"tables/ablation.csv": "what the change does"} if self.kind == "ablation" else {}
        expected = EXPECTED if self.kind is None else changed
        gaps = [f"{what} ({file}); to make it: make report" for file, what in expected.items() if not self.has(file)]
        gaps += ["tables of the runs as they are now; to make them: make report"] * self.stale
        return [*gaps, *unfinished_runs(self.runs), *failed]


def load_study(profile: Profile, results: Path = RESULTS, failures: Mapping[str, str] | None = None) -> Study:
    """Load the results of a profile and of the profiles that extend it, these in the order of epochs and name.

    failures: why the analysis of a study failed, by the study's name.
    """
    others = extensions(profile) if profile.parent is None else []
    others = sorted(others, key=lambda other: (other.config().epochs, other.name))
    studies = tuple(load_study(other, results, failures) for other in others)
    return Study(profile, results, load_runs(profile, results), studies, (failures or {}).get(profile.name))


def outcome(study: Study) -> dict[str, str]:
    """Return the outcome for titles: prefix ([Re], [¬Re] or [Re: undecided]); lead, which answers the question; detail,
    the differences in a sentence; headline, both together; unfinished.

    The first of TOLD that the study plans decides. While it is open, the one with most seeds is told.
    """
    planned = {claim.key: claim for claim in planned_claims(study.profile.methods) if claim.key in TOLD}
    claims, contrasts = {claim["key"]: claim for claim in study.claims}, study.table("contrasts")
    told, decisive = [], next(iter(planned), None)
    if contrasts is not None and not study.stale:
        contrasts = contrasts[contrasts["outcome"] != SAME]
        told = [key for key in planned if key in claims and (contrasts["claim"] == key).any()]
    lead, prefix = "Undecided", UNDECIDED
    if study.finished.empty:
        detail = "no run of the study is finished yet."
    elif study.stale:
        detail = "the tables are of other runs than those that are finished; to make them anew: make report."
    elif decisive is None:
        detail = "the study does not compare compound scaling with single axes."
    elif not told:
        detail = f"the networks that the claim compares {_state(study, planned[decisive])}."
    else:
        settled = decisive in told and not claims[decisive]["open"]
        key = decisive if settled else max(told, key=lambda key: claims[key]["seeds"])  # of equals the first, decisive
        rows, claim = contrasts[contrasts["claim"] == key], claims[key]
        if key == decisive and claim["outcome"] in PREFIXES:
            lead, prefix = _lead(rows), PREFIXES[claim["outcome"]]
        seeds = _seeds(study, planned[key], rows)
        detail = f"{TOLD[key]} on {study.data}, {_differences(rows)}{seeds}."
        if key != decisive:
            state = _state(study, planned[decisive])
            detail = f"the networks {TOLD[decisive]}, which decide, {state}. {capital(detail)}"
        elif claim["open"] and study.open_runs(planned[decisive]).empty:
            detail += f" {capital(claim['open'])}."
    lead += f" at {study.profile.scale}" if study.profile.scale else ""
    words = {"prefix": prefix, "lead": lead, "detail": detail, "headline": f"{lead}: {detail}"}
    return words | {"unfinished": study.unfinished}


def _state(study: Study, claim: Claim) -> str:
    """Say of a claim that cannot be told why not."""
    if not study.open_runs(claim).empty:
        return "are not finished yet"
    states = claim_runs(claim, study.profile, study.runs)["status"]
    return "have not been compared" if (states == "finished").all() else "have no scores, because their runs failed"


def _lead(rows: pd.DataFrame) -> str:
    """Answer the question by the contrasts of a claim that is decided."""
    words, axes = rows["outcome"], rows["other"].str.removesuffix("_matched")
    beaten, others = axes[words == "above"], listed(axes[words.isin(["below", "equal"])], "or")
    if not others:
        return "Compound scaling beats each single axis"
    if beaten.empty or "unclear" in set(words):
        return f"Compound scaling does not beat {others}"
    return f"Compound scaling beats {listed(beaten)}, but not {others}"


def _differences(rows: pd.DataFrame) -> str:
    """Say the contrasts of compound scaling in words."""
    parts = []
    for row in rows.itertuples():
        low, high, difference = (f"{half_up(value):+.2f}" for value in (row.low, row.high, row.difference))
        interval = f"{'' if parts else 'interval '}{low} to {high}: {row.outcome}" if row.n > 1 else "one seed"
        other = spoken(row.other.removesuffix("_matched"))
        parts.append(f"minus {other}{'' if parts else ' is'} {difference}{'' if parts else ' points'} ({interval})")
    return f"compound {listed(parts)}".replace("-", "−")


def _seeds(study: Study, claim: Claim, rows: pd.DataFrame) -> str:
    """Say how many seeds there are if these are fewer than planned."""
    own = claim_runs(claim, study.profile, study.runs)
    planned, counts = own["method"].value_counts().min(), own.loc[own["status"] == "finished", "method"].value_counts()
    if counts.min() >= planned:
        return ""
    seeds = " to ".join(dict.fromkeys(f"{count}" for count in (counts.min(), counts.max())))
    of = (
        f"the {planned} seeds for which wide intervals ask"
        if planned > len(study.profile.seeds)
        else f"{planned} seeds"
    )
    return f", {'with only' if study.open_runs(claim).empty else 'so far with'} {seeds} of {of}"


def pilot_table(study: Study) -> list[dict]:
    """Return the finished pilots, a row for each choice of settings, the best first: what they choose (`asks`: baseline
    or recipe), the settings in words, FLOPs, whether the profile took them, minival top-1 of each seed, their mean."""
    pilots = load_pilots(study.profile, study.results)
    if pilots.empty:
        return []
    pilots = pilots[pilots["status"] == "finished"].sort_values("pilot")
    words = []
    for name in pilots["pilot"]:
        changes = read_record(study.study_dir / "pilots" / name)["pilot"]
        settings = changes.pop("baseline", {}) | dict(sorted(changes.items()))
        words.append(", ".join(f"{spoken(key)} {value}" for key, value in settings.items()) or "the recipe as it is")
    columns = {"flops": ("flops", "first"), "taken": ("taken", "first"), "scores": ("minival_top1", list)}
    groups = pilots.assign(words=words).groupby(["asks", "words"], sort=False)
    table = groups.agg(**columns, mean=("minival_top1", "mean")).reset_index()
    return table.sort_values(["asks", "mean"], ascending=[True, False], ignore_index=True).to_dict("records")


@cache
def alternative_texts() -> dict[str, str]:
    """Return the text of each figure for people who do not see it, from the notebook cell that draws the figure."""
    texts = {"ablation": ABLATION}
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            if name := re.search(r'"figures" / "(\w+)"', cell.source):
                texts[name[1]] = cell.metadata.get("alt", "")
    return texts
