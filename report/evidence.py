"""What results/ holds, as report, poster and page tell it.

All three read tables and figures under results/NAME themselves; what they share is here: which studies there are, what
is missing of each, and the outcome in words, which follows from results/NAME/tables/{verdict.json,contrasts.csv}.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

import effnet_study as study

NOT_KEPT = ("quick",)  # profiles whose results are not committed: left out unless asked for
ENOUGH = 5  # seeds that a claim needs, by the protocol
CLAIM = "compound scaling beats each single axis "  # how the claims begin that are about the outcome; then at what cost
COSTS = ("at matched FLOPs", "at the published coefficients")  # the first one that a study has decides, then any other
DECIDED = {  # verdict: how the headline begins, and the title's prefix as in ReScience C
    "reproduced": ("Compound scaling wins", "[Re]"),
    "not reproduced": ("Compound scaling does not win", "[¬Re]"),
}
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
    troubles: tuple[str, ...] = ()  # what else is to be told as missing
    source: str = ""  # name or file of the profile

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

    @cached_property
    def damaged(self) -> dict[str, str]:
        """Tables and JSON files of the study that cannot be read, and why."""
        found = {}
        for path in sorted([*self.folder.glob("tables/*"), *self.folder.glob("*.json")]):
            try:
                if path.suffix == ".csv":
                    pd.read_csv(path)
                elif path.suffix == ".json":
                    json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:  # pandas' and json's errors are such
                found[path.relative_to(self.folder).as_posix()] = str(error).splitlines()[0]
        return found

    def has(self, file: str) -> bool:
        """Whether FOLDER/file is there and can be read: `study.has("tables/table7.csv")`."""
        return (self.folder / file).is_file() and file not in self.damaged

    def table(self, name: str) -> pd.DataFrame | None:
        """tables/NAME.csv, or None if it is not there or has no rows."""
        if not self.has(f"tables/{name}.csv"):
            return None
        table = pd.read_csv(self.folder / "tables" / f"{name}.csv")
        return None if table.empty else table

    @cached_property
    def verdict(self) -> dict | None:
        """tables/verdict.json, or None."""
        file = "tables/verdict.json"
        return json.loads((self.folder / file).read_text(encoding="utf-8")) if self.has(file) else None

    @property
    def claim(self) -> str | None:
        """The claim that decides the outcome, of those that the verdict speaks of."""
        costs = [
            claim.removeprefix(CLAIM) for claim in (self.verdict or {}).get("claims", {}) if claim.startswith(CLAIM)
        ]
        return next((CLAIM + cost for cost in (*COSTS, *reversed(costs)) if cost in costs), None)

    @cached_property
    def differences(self) -> pd.DataFrame:
        """The rows of contrasts.csv that decide `claim`; none if there is no claim, or the tables are of other runs."""
        contrasts = self.table("contrasts")
        if self.claim is None or contrasts is None or self.stale or self.finished.empty:
            return pd.DataFrame()
        return contrasts[contrasts["claim"] == self.claim]

    @cached_property
    def stale(self) -> bool:
        """Whether Table 7 speaks of other runs than those that are finished."""
        table = self.table("table7")
        if table is None:
            return False
        counts = {} if self.finished.empty else self.finished["method"].value_counts().to_dict()
        return dict(zip(table["method"], table["n"], strict=True)) != counts

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
            return [f"there is no profile {self.name}; those there are: {known}"]
        command = f"make study PROFILE={self.name}"
        if self.finished.empty:
            return [f"no run of {self.name} is finished; to run it: {command}"]
        gaps = [f"{what} ({file}); to make it: {command}" for file, what in EXPECTED.items() if not self.has(file)]
        gaps += [f"{file}, which is damaged: {why}" for file, why in self.damaged.items()]
        gaps += ["tables of these very runs; to make them: make report"] if self.stale else []
        open_runs = self.runs[self.runs["status"] != "finished"]
        for method, group in open_runs.groupby("method", sort=False):
            seeds = f"seed{'s' * (len(group) > 1)} {listed(group['seed'].astype(str))}"
            gaps.append(f"{spoken(method)}, {seeds} ({listed(dict.fromkeys(group['status']))})")
        single = [m for m, group in self.finished.groupby("method", sort=False) if len(group) < 2]
        if single:
            gaps.append(f"an interval, for want of a second seed: {listed(map(spoken, single))}")
        return [*gaps, *self.troubles]


def spoken(method: str) -> str:
    """A method's name in running text."""
    return method.replace("_", " ")


def listed(names: Iterable[str]) -> str:
    """a; a and b; a, b and c."""
    names = list(names)
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def find_studies(names: Sequence[str] | None = None, results: Path = study.RESULTS) -> list[Study]:
    """Studies under results/, the strongest evidence first, then those with more finished runs. `names`: these alone,
    also if nothing is there of them; the path of a profile will do as its name."""
    known = study.profile_names()
    if names is None:
        names = [name for name in known if name not in NOT_KEPT and (results / name / "runs").is_dir()]
    found = []
    for name in names:
        profile = study.load_profile(name) if name in known or Path(name).is_file() else None
        folder = results / (profile.name if profile else name)
        runs = study.load_runs(profile, results) if profile else None
        found.append(Study(folder.name, folder, profile, runs, source=str(name)))
    strength = list(study.PURPOSES)
    return sorted(found, key=lambda s: (-(strength.index(s.profile.purpose) if s.profile else -1), -len(s.finished)))


def unknown_results(results: Path) -> list[str]:
    """Folders with runs that no profile of the repository belongs to."""
    return sorted({path.parent.name for path in results.glob("*/runs")} - set(study.profile_names()))


def outcome(studies: Sequence[Study]) -> dict[str, str | None]:
    """The outcome for title and poster, of the studies that decide it, else of the strongest that compares anything.

    prefix: [Re] or [¬Re]; [Re: mixed] if studies disagree; [Re: undecided] as long as no study of evidence has five
    seeds and a verdict. headline: a sentence or two; study: name of the one that is shown first, or None; verdict: its.
    """
    compared = [one for one in studies if not one.differences.empty and not one.profile.ablation_of]
    deciding = [one for one in compared if _decides(one)]
    first = next(iter(deciding or compared), None)
    if first is None:
        headline = "No study has finished two networks that the claim compares, so there is nothing to decide yet."
        return {"prefix": "[Re: undecided]", "headline": headline, "study": None, "verdict": None}
    prefixes = {DECIDED[one.verdict["claims"][one.claim]][1] for one in deciding}
    prefix = prefixes.pop() if len(prefixes) == 1 else "[Re: mixed]" if prefixes else "[Re: undecided]"
    headline = " ".join(map(_headline, deciding if prefix == "[Re: mixed]" else [first]))
    verdict = first.verdict["claims"][first.claim]
    return {"prefix": prefix, "headline": headline, "study": first.name, "verdict": verdict}


def _decides(one: Study) -> bool:
    enough = one.differences["n"].min() >= ENOUGH
    return one.profile.purpose == "evidence" and enough and one.verdict["claims"][one.claim] in DECIDED


def _headline(one: Study) -> str:
    """Compound scaling wins on Images at matched FLOPs: it is 3.0 points above depth, 2.0 above width and ..."""
    lead = DECIDED[one.verdict["claims"][one.claim]][0] if _decides(one) else "Undecided"
    parts = []
    for row in one.differences.itertuples():
        unit = " points" if not parts else ""
        side = "above" if row.difference > 0 else "below"
        parts.append(f"{abs(row.difference):.1f}{unit} {side} {spoken(row.contrast.split(' - ')[1])}")
    subject = "it" if lead != "Undecided" else "compound scaling"
    return f"{lead} on {one.data} {one.claim.removeprefix(CLAIM)}: {subject} is {listed(parts)}."
