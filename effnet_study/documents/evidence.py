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

from effnet_study.analysis.recipes import load_pilots
from effnet_study.analysis.statistics import SAME, SEEDS_TO_DECIDE
from effnet_study.analysis.tables import extensions, kind_of
from effnet_study.documents.templates import listed
from effnet_study.files import NOTEBOOKS, RESULTS, plain, read_table
from effnet_study.methods import spoken
from effnet_study.profile import Profile
from effnet_study.record import read_record
from effnet_study.run import ENDED, load_runs

HEADLINES = ("compound_matched", "compound_published")  # keys of claims: the first that a study has is its headline
BUDGETS = {"matched": "at matched FLOPs", "published": "at the published coefficients"}
DECIDED = {  # outcome of a claim: how the headline begins, and the title's prefix as in ReScience C
    "reproduced": ("Compound scaling wins", "[Re]"),
    "contradicted": ("Compound scaling does not beat each single axis", "[¬Re]"),
}
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

    @property
    def scale(self) -> str:
        """The words that headings of results carry: "pocket scale" if the baseline is smaller than B0."""
        baseline = self.profile.baseline
        return "pocket scale" if baseline.depth * baseline.width**2 < 1 else ""

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

    @property
    def claims(self) -> list[dict]:
        """The claims of tables/verdict.json. `status` is the outcome, or says that there is none."""
        path = self.study_dir / "tables" / "verdict.json"
        found = json.loads(path.read_text(encoding="utf-8"))["claims"] if path.is_file() else []
        for claim in found:
            still_open = "" if claim["complete"] else ", until all of its planned runs have ended"
            claim["status"] = claim["outcome"] + still_open if claim["outcome"] else "compared, without a verdict"
        return found

    @property
    def unfinished(self) -> str:
        """What every document says while planned runs are open. Empty once all have ended."""
        ended = self.runs["status"].isin(ENDED).sum()
        if ended == len(self.runs):
            return ""
        words = f"Unfinished: {ended} of {len(self.runs)} planned runs have ended. "
        return words + "Until five seeds are in, nothing is decided."

    @property
    def missing(self) -> list[str]:
        """What a reader would expect and does not find. The documents print it."""
        failed = [] if self.failure is None else [f"an analysis of these runs: {self.failure}"]
        if self.finished.empty:
            return [f"no run of {self.name} is finished; to run it: {self.profile.command('study')}", *failed]
        changed = {"tables/ablation.csv": "what the change does"} if self.kind == "ablation" else {}
        expected = EXPECTED if self.kind is None else changed
        gaps = [f"{what} ({file}); to make it: make report" for file, what in expected.items() if not self.has(file)]
        gaps += ["tables of the runs as they are now; to make them: make report"] * self.stale
        open_runs = {}  # seeds and states, and the methods that lack the same ones
        for method, group in self.runs[self.runs["status"] != "finished"].groupby("method", sort=False):
            seeds, states = listed(group["seed"].astype(str)), listed(dict.fromkeys(group["status"]))
            open_runs.setdefault(f"seed{'s' * (len(group) > 1)} {seeds} ({states})", []).append(spoken(method))
        return [*gaps, *(f"{listed(methods)}: {which}" for which, methods in open_runs.items()), *failed]


def load_study(profile: Profile, results: Path = RESULTS, failures: Mapping[str, str] | None = None) -> Study:
    """Load the results of a profile and of the profiles that extend it, these in the order of epochs and name.

    failures: why the analysis of a study failed, by the study's name.
    """
    others = extensions(profile) if profile.parent is None else []
    others = sorted(others, key=lambda other: (other.config().epochs, other.name))
    studies = tuple(load_study(other, results, failures) for other in others)
    return Study(profile, results, load_runs(profile, results), studies, (failures or {}).get(profile.name))


def outcome(study: Study) -> dict[str, str]:
    """Return the outcome for titles: prefix ([Re], [¬Re] or [Re: undecided]), headline (a sentence), unfinished."""
    scale = f" at {study.scale}" if study.scale else ""
    found = {"prefix": UNDECIDED, "unfinished": study.unfinished}
    if study.finished.empty:
        return found | {"headline": f"Undecided{scale}: no run of the study is finished yet."}
    claims, contrasts, parts = {claim["key"]: claim for claim in study.claims}, study.table("contrasts"), []
    claim = next((claims[key] for key in HEADLINES if key in claims), None)
    if claim is not None and contrasts is not None and not study.stale:
        for row in contrasts[(contrasts["claim"] == claim["key"]) & (contrasts["outcome"] != SAME)].itertuples():
            unit, side = "" if parts else " points", "higher" if row.difference > 0 else "lower"
            parts.append(f"{abs(row.difference):.1f}{unit} {side} than {spoken(row.other.removesuffix('_matched'))}'s")
    if not parts:
        return found | {"headline": f"Undecided{scale}: the networks that the claim compares are not finished yet."}
    decided = claim["outcome"] in DECIDED and claim["complete"] and claim["seeds"] >= SEEDS_TO_DECIDE
    lead, found["prefix"] = DECIDED[claim["outcome"]] if decided else ("Undecided", UNDECIDED)
    subject = "its mean is" if decided else "the mean of compound scaling is so far"
    where = f"{scale}, on {study.data}" if scale else f" on {study.data}"
    return found | {"headline": f"{lead}{where} {BUDGETS[claim['budget']]}: {subject} {listed(parts)}."}


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
