"""What results/ holds, as report, poster and page tell it.

All three read tables and figures under results/NAME themselves; what they share is here: which studies there are, what
is missing of each, and the outcome in words, which follows from results/NAME/tables/{verdict.json,contrasts.csv}.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

import effnet_study as study

NOT_KEPT = ("quick",)  # profiles whose results are not committed: left out unless asked for
CLAIMS = (  # that compound scaling wins; the first one that a study has decides its outcome
    "compound scaling beats each single axis at equal FLOPs",
    "compound scaling beats each single axis at the published coefficients",
)
EXPECTED = {  # what every finished study has: file to what it is
    "tables/table7.csv": "Table 7",
    "tables/contrasts.csv": "the differences between methods",
    "tables/verdict.json": "the verdict",
    "figures/figure8.pdf": "Figure 8",
}


@dataclass(frozen=True)
class Study:
    """The results of one profile. `runs` is that of effnet_study.load_runs: a row per planned run."""

    name: str
    folder: Path
    profile: study.Profile | None = None  # None: there is no such profile
    runs: pd.DataFrame | None = None

    @cached_property
    def finished(self) -> pd.DataFrame:
        return pd.DataFrame() if self.runs is None else self.runs[self.runs["status"] == "finished"]

    @property
    def title(self) -> str:
        return self.profile.title if self.profile else self.name

    @property
    def data(self) -> str:
        """The data set's title, as the records of its runs have it."""
        return self.title if self.finished.empty else self.finished["data"].iloc[0]

    def has(self, file: str) -> bool:
        """Whether FOLDER/file is there: `study.has("tables/table7.csv")`."""
        return (self.folder / file).is_file()

    def table(self, name: str) -> pd.DataFrame | None:
        """tables/NAME.csv, or None if it is not there or has no rows."""
        if not self.has(f"tables/{name}.csv"):
            return None
        table = pd.read_csv(self.folder / "tables" / f"{name}.csv")
        return None if table.empty else table

    @cached_property
    def verdict(self) -> dict | None:
        """tables/verdict.json, or None."""
        path = self.folder / "tables" / "verdict.json"
        return json.loads(path.read_text()) if path.is_file() else None

    @property
    def claim(self) -> str | None:
        """The claim that decides the outcome, of those that the verdict speaks of."""
        claims = (self.verdict or {}).get("claims", {})
        return next((claim for claim in CLAIMS if claim in claims), None)

    @property
    def notebooks(self) -> list[Path]:
        """Its executed notebooks about the whole study, not those of single runs."""
        paths = sorted((self.folder / "notebooks").glob("*.ipynb"))
        return [path for path in paths if "_seed" not in path.stem and not path.name.endswith(".partial.ipynb")]

    @cached_property
    def missing(self) -> list[str]:
        """What a reader would expect and does not find, in words; the report prints it."""
        if self.profile is None:
            known = ", ".join(study.profile_names())
            return [f"There is no profile {self.name}. Those there are: {known}"]
        command = f"make study PROFILE={self.name}"
        if self.finished.empty:
            return [f"No run of {self.name} is finished. To run it: {command}"]
        gaps = [
            f"{what} ({file}) is not there. To make it: {command}"
            for file, what in EXPECTED.items()
            if not self.has(file)
        ]
        open_runs = self.runs[self.runs["status"] != "finished"]
        for method, group in open_runs.groupby("method", sort=False):
            seeds = f"seed{'s' * (len(group) > 1)} {listed(group['seed'].astype(str))}"
            gaps.append(f"{spoken(method)}, {seeds}: {listed(dict.fromkeys(group['status']))}")
        single = [m for m, group in self.finished.groupby("method", sort=False) if len(group) < 2]
        if single:
            gaps.append(f"One seed alone, so no interval: {listed(map(spoken, single))}")
        return gaps


def spoken(method: str) -> str:
    """A method's name in running text."""
    return method.replace("_", " ")


def listed(names: Sequence[str]) -> str:
    """a; a and b; a, b and c."""
    names = list(names)
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def find_studies(names: Sequence[str] | None = None, results: Path = study.RESULTS) -> list[Study]:
    """Studies under results/, the strongest evidence first, then those with more finished runs. `names`: these alone,
    also if nothing is there of them."""
    known = study.profile_names()
    if names is None:
        names = [name for name in known if name not in NOT_KEPT and (results / name / "runs").is_dir()]
    found = []
    for name in names:
        profile = study.load_profile(name) if name in known else None
        found.append(Study(name, results / name, profile, study.load_runs(profile, results) if profile else None))
    strength = list(study.PURPOSES)
    return sorted(found, key=lambda s: (-(strength.index(s.profile.purpose) if s.profile else -1), -len(s.finished)))


def outcome(studies: Sequence[Study]) -> dict[str, str | None]:
    """The outcome of the strongest study that has one, for title and poster.

    prefix: [Re], [¬Re] as in ReScience C, or [Re: undecided], which is all that anything below evidence can be;
    headline: one sentence; study: name of the study that decides, or None; claim and verdict: its.
    """
    for one in studies:
        if one.claim and (contrasts := one.table("contrasts")) is not None:
            verdict = one.verdict["claims"][one.claim]
            rows = contrasts[contrasts["claim"] == one.claim]
            counts = one.profile.purpose == "evidence" and verdict in DECIDED
            lead, prefix = DECIDED[verdict] if counts else ("Undecided", "[Re: undecided]")
            return {
                "prefix": prefix,
                "headline": f"{lead} on {one.data}: compound scaling {_sides(rows)}.",
                "study": one.name,
                "claim": one.claim,
                "verdict": verdict,
            }
    headline = "No study has finished two networks that the claim compares, so there is nothing to decide yet."
    return {"prefix": "[Re: undecided]", "headline": headline, "study": None, "claim": None, "verdict": None}


DECIDED = {
    "reproduced": ("Compound scaling wins", "[Re]"),
    "not reproduced": ("Compound scaling does not win", "[¬Re]"),
}


def _sides(rows: pd.DataFrame) -> str:
    """beats depth, and cannot be told from width and resolution."""
    words = {
        "reproduced": "beats",
        "not reproduced": "does not beat",
        "inconclusive": "cannot be told from",
    }
    others = rows["contrast"].str.split(" - ").str[1].map(spoken)
    return ", and ".join(
        f"{word} {listed(others[rows['verdict'] == verdict])}"
        for verdict, word in words.items()
        if (rows["verdict"] == verdict).any()
    )
