"""Profiles: a study as notebooks/profiles/NAME.yaml describes it: methods, images, recipe, seeds."""

import contextlib
import re
import reprlib
import shlex
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, Strict, model_validator

from effnet_lib import TABLE7, Cost, Positive, Scaling, Seed, Settings, TrainConfig, compound_scaling, unknown_name
from effnet_study.data.sources import CLASS_COUNTS, DataSettings
from effnet_study.files import NOTEBOOKS, RESULTS, ROOT
from effnet_study.machine import git
from effnet_study.methods import (
    HEADLINE_METHODS,
    PUBLISHED,
    coefficient_grid,
    match_flops,
    parse_method,
    rounded_network,
    scaled_cost,
)

PURPOSES = {
    "check": "pipeline check, not evidence",
    "exploratory": "exploratory: fewer seeds, data or epochs than a claim needs",
    "evidence": "evidence, judged by the rules of the protocol",
}
OWN = ("extends", "title", "purpose", "methods", "seeds", "train")  # keys of a profile that extends another
NOT_INHERITED = ("title", "methods", "more_seeds", "search", "protocol")  # keys that it does not inherit


# ---- 1. Keys of a profile ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _naming(part: str) -> Iterator[None]:
    """Begin the message of a ValueError with the part of the profile that is wrong."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{part}: {error}") from None


def _distinct(values: tuple) -> tuple:
    if not values or len(set(values)) < len(values):
        raise ValueError(f"expected a list without repetitions, got {list(values)!r}")
    return values


def _read_groups(methods: object) -> object:
    """Return the groups of a list of methods, or of a list of lists."""
    if not isinstance(methods, list):
        return methods
    groups = methods if methods and all(isinstance(group, list) for group in methods) else [methods]
    _distinct([str(method) for group in groups for method in group])
    return tuple(tuple(map(str, group)) for group in groups)


def _read_baseline(value: object) -> Scaling:
    return value if isinstance(value, Scaling) else Scaling(**dict(Baseline.model_validate(value)))


def _check_recipe(train: Mapping[str, object]) -> None:
    for key, source in (("resolution", "base_resolution and the method"), ("seed", "seeds, or --seed")):
        if key in train:
            raise ValueError(f"{key} follows from {source}; {key} is not part of a recipe")
    TrainConfig(**train)


class Baseline(Settings):
    """What of B0 is a study's baseline."""

    depth: Positive = 1.0
    width: Positive = 1.0


Seeds = Annotated[tuple[Seed, ...], Strict(False), AfterValidator(_distinct)]


class Search(Settings):
    """A search for alpha, beta and gamma on the baseline at phi = 1, as 03_coefficient_search makes it."""

    step: float = 0.1  # of the grid over the three, each at least 1
    low: float = 1.9  # bounds of alpha * beta^2 * gamma^2
    high: float = 2.1
    max_flops: Annotated[float, Field(ge=1)] | None = None  # of a candidate, in multiples of the baseline's
    seeds: Seeds = (0,)
    train: dict[str, Any] = Field(default={})  # settings that differ from the profile's recipe

    @model_validator(mode="after")
    def _check(self) -> "Search":
        coefficient_grid(self.step, self.low, self.high)  # refuses a grid without candidates
        return self


class Protocol(Settings):
    """The section of report/PROTOCOL.md that fixes a study of evidence, and the commit that fixed it. ValueError unless
    report/PROTOCOL.md says, now and at that commit, that the section is fixed."""

    section: str
    commit: str

    @model_validator(mode="after")
    def _check(self) -> "Protocol":
        place = "report/PROTOCOL.md"
        for commit, where in ((None, place), (self.commit, f"{place} of commit {self.commit}")):
            text = protocol_text(commit)
            if text is None:
                raise ValueError(f"{where} is not in this repository; name the commit that fixed {self.section!r}")
            found = re.search(rf"^## Study `{re.escape(self.section)}`\n+(.*)", text, re.MULTILINE)
            if found is None:
                raise ValueError(f"{where} has no section '## Study `{self.section}`'")
            if not found[1].startswith("*Fixed"):
                raise ValueError(f"{where} does not say that {self.section!r} is fixed (*Fixed ...*): {found[1]!r}")
        return self


@cache
def protocol_text(commit: str | None) -> str | None:
    """Read report/PROTOCOL.md as it is now, or at a commit. None if it is not there. Without Git, or in a shallow clone
    that lacks the commit, the present text serves for both."""
    path = ROOT / "report" / "PROTOCOL.md"
    now = path.read_text(encoding="utf-8") if path.exists() else None
    if commit is None:
        return now
    try:
        shown = git("show", f"{commit}:report/PROTOCOL.md", root=ROOT)
        shallow = git("rev-parse", "--is-shallow-repository", root=ROOT).stdout.strip() != "false"
    except FileNotFoundError:  # no git
        return now
    if shown.returncode != 0:
        return now if shallow else None
    return shown.stdout


class Profile(Settings):
    """One study. `load_profile` makes it from a file."""

    model_config = ConfigDict(populate_by_name=True)

    name: str
    title: str
    purpose: Literal["check", "exploratory", "evidence"]
    data: DataSettings
    base_resolution: Annotated[int, Field(ge=8)]  # pixels at resolution coefficient 1
    stem_stride: Literal[1, 2]
    # Groups of methods; all seeds of a group run before the next group
    groups: Annotated[tuple[tuple[str, ...], ...], BeforeValidator(_read_groups), Field(alias="methods")]
    seeds: Seeds
    more_seeds: Seeds | None = None  # of HEADLINE_METHODS alone, where the protocol's rule *More seeds* asks for them
    train: dict[str, Any]  # settings of TrainConfig, without resolution and seed
    devices: Any = 1  # processes that share each batch of a run, or "auto": one for every GPU
    search: Search | None = None  # for the coefficients of compound_searched
    parent: "Profile | None" = None  # the profile that this one extends
    baseline: Annotated[Scaling, BeforeValidator(_read_baseline)] = TABLE7["baseline"]  # methods multiply it
    protocol: Protocol | None = None  # of a study whose purpose is evidence
    source: str | None = None  # the path of the profile's file, if it is not in notebooks/profiles

    @model_validator(mode="after")
    def _check(self) -> "Profile":
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise ValueError(f"its name {self.name!r} names a results folder: use letters, digits, '.', '_' and '-'")
        if self.devices != "auto" and (type(self.devices) is not int or self.devices < 1):
            raise ValueError(f"devices: expected auto, or a whole number of at least 1, got {self.devices!r}")
        if known := set(self.seeds) & set(self.more_seeds or ()):
            raise ValueError(f"more_seeds: expected other seeds than those of seeds:, got {sorted(known)}")
        if self.more_seeds and (missing := set(HEADLINE_METHODS) - set(self.methods)):
            raise ValueError(f"more_seeds: they are of {', '.join(HEADLINE_METHODS)}; add {', '.join(sorted(missing))}")
        with _naming("train"):
            _check_recipe(self.train)
        if "compound_searched" in [parse_method(method).base for method in self.methods] and self.search is None:
            raise ValueError("methods: compound_searched needs a search for its coefficients; add search: {step: 0.1}")
        if self.search is not None:
            with _naming("search: train"):
                _check_recipe(self.train | self.search.train)
        if (self.purpose == "evidence") != (self.protocol is not None):
            raise ValueError(
                "purpose: evidence needs protocol: {section: NAME, commit: HASH}, the section of report/PROTOCOL.md "
                f"that fixes this study, and no other purpose has one; got {self.purpose!r}"
            )
        return self

    def config(self, **changes: object) -> TrainConfig:
        """Return the recipe with some settings changed."""
        return TrainConfig(**{**self.train, **changes})

    @property
    def methods(self) -> tuple[str, ...]:
        return tuple(method for group in self.groups for method in group)

    @property
    def planned(self) -> list[tuple[str, int]]:
        """(method, seed) of each run, in the order of the runs: a study that is stopped early is as complete as it can
        be."""
        more = [
            (method, seed) for seed in self.more_seeds or () for method in self.methods if method in HEADLINE_METHODS
        ]
        return [(method, seed) for group in self.groups for seed in self.seeds for method in group] + more

    @property
    def stamp(self) -> str:
        """The words that every table and figure of this study carries."""
        return PURPOSES[self.purpose]

    @property
    def scale(self) -> str:
        """The words that headings of results carry: "pocket scale" if the baseline is smaller than B0."""
        return "pocket scale" if self.baseline.depth * self.baseline.width**2 < 1 else ""

    @property
    def num_classes(self) -> int:
        known = self.data.classes or CLASS_COUNTS.get(self.data.name)
        if known is None:
            raise ValueError(f"{self.name}: data: say how many classes {self.data.name} has (classes: N)")
        return known

    def scaling(self, method: str, searched: tuple[float, float, float] | None = None) -> Scaling:
        """Return the method's coefficients (d, w, r), which multiply the baseline's: see `methods.parse_method`. FLOPs
        are counted without `se_expanded`. searched: alpha, beta, gamma of this profile's search."""
        parsed = parse_method(method)
        compound = compound_scaling(parsed.phi) if parsed.phi is not None else TABLE7["compound"]
        if parsed.times is None and not parsed.matched:
            return compound if parsed.way == "compound" else TABLE7[parsed.way]
        here = (self.base_resolution, self.num_classes, self.stem_stride)
        target, times = (compound, 1) if parsed.times is None else (Scaling(), parsed.times)
        flops = round(times * scaled_cost(target * self.baseline, *here).flops)
        coefficients = searched if parsed.base == "compound_searched" else PUBLISHED
        return match_flops(parsed.way, flops, *here, coefficients=coefficients, baseline=self.baseline).scaling

    def network(self, scaling: Scaling) -> tuple:
        """Return pixels, layers of each stage and channels of the scaled baseline, after rounding."""
        return rounded_network(scaling * self.baseline, self.base_resolution)

    def cost(self, scaling: Scaling) -> Cost:
        """Count parameters, FLOPs and activations of the scaled baseline, with this study's settings."""
        here = (self.base_resolution, self.num_classes, self.stem_stride)
        return scaled_cost(scaling * self.baseline, *here, self.train.get("se_expanded", False))

    def command(self, words: str, results: str | Path | None = None) -> str:
        """Return the shell command `effnet WORDS PROFILE`, with --results if results lie elsewhere."""
        place = None if results is None else Path(results).absolute()
        elsewhere = "" if place in (None, RESULTS) else f" --results {shlex.quote(str(place))}"
        return f"effnet {words} {shlex.quote(self.source or self.name)}{elsewhere}"


# ---- 2. Loading ----------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML in which only true and false are truth values, and decimal numbers are numbers: in YAML 1.1, no is false,
    010 is 8, 1:30 is 90, and 1e-3 is text. Keys are text, and may be given once."""

    def construct_mapping(self, node, deep=False):
        given = set()
        for key, _ in node.value:
            if str(key.value) in given:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
            given.add(str(key.value))
        return {str(key): value for key, value in super().construct_mapping(node, deep).items()}


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag.endswith((":null", ":merge"))]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("(?:true|True|TRUE|false|False|FALSE)$"), [*"tTfF"])
_FLOAT = r"[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.inf)|\.nan"
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"(?:{_FLOAT})$"), [*"-+.0123456789"])
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile("[-+]?(?:0|[1-9][0-9_]*)$"), [*"-+0123456789"])


def read_yaml(text: str, name: str) -> object:
    """Read YAML. ValueError has the name, the problem and its line."""
    try:
        return yaml.load(text, _Loader)
    except Exception as error:  # yaml lets many kinds through
        raise ValueError(f"{name}: cannot be read: {' '.join(str(error).split())}") from None


def profile_names() -> list[str]:
    """List the profiles of notebooks/profiles."""
    return sorted(path.stem for path in (NOTEBOOKS / "profiles").glob("*.yaml"))


def load_profile(name: str | Path) -> Profile:
    """Load a profile by its name (notebooks/profiles/NAME.yaml) or by the path of a file that ends in .yaml. A
    ValueError names the file, the key, what was expected and what was found."""
    path, values = _read(name)
    with _naming(f"profile {path.name}"):
        return _build(path, values, str(name) if Path(name).suffix == ".yaml" else None)


def _read(name: str | Path) -> tuple[Path, dict]:
    path = Path(name)
    if path.suffix != ".yaml":
        if path.suffix == ".yml":
            raise ValueError(f"profile {name}: expected a profile's name, or a file that ends in .yaml; rename it")
        if str(name) not in profile_names():
            raise unknown_name("profile", str(name), profile_names())
        path = NOTEBOOKS / "profiles" / f"{name}.yaml"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"profile {path}: cannot be read: {error}") from None
    values = read_yaml(text, f"profile {path}")
    if not isinstance(values, dict):
        raise ValueError(f"profile {path}: expected keys and values, got {reprlib.repr(values)}")
    return path, values


def _build(path: Path, values: dict, source: str | None) -> Profile:
    valid = {"methods", "extends", *Profile.model_fields} - {"name", "groups", "parent", "source"}
    for key in values:
        if key not in valid:
            raise unknown_name("key", key, sorted(valid))
    if values.get("extends") is not None:
        values = _extended(path, values)
    return Profile(**{"name": path.stem, "source": source, **values})


def _extended(path: Path, values: dict) -> dict:
    """Merge a file with the profile that it extends. Alone it decides no claim, so it cannot be evidence."""
    other = values["extends"]
    if not isinstance(other, str):
        raise ValueError(f"extends: expected a profile's name or path, got {other!r}")
    for key in values:
        if key not in OWN:
            raise ValueError(f"{key}: a profile that extends {other} inherits this key; it can set {', '.join(OWN)}")
    with _naming("extends"):
        file, whole = _read(path.parent / other if other.endswith(".yaml") else other)
        if whole.get("extends") is not None:
            raise ValueError(f"{other} itself extends {whole['extends']}; name that profile")
    if values.get("purpose") == "evidence":
        raise ValueError(f"purpose: {path.stem} by itself decides no claim; expected exploratory or check")
    parent = _build(file, whole, str(file) if other.endswith(".yaml") else None)
    kept = {key: value for key, value in whole.items() if key not in NOT_INHERITED}
    kept["purpose"] = "check" if whole["purpose"] == "check" else "exploratory"
    if isinstance(values.get("train"), dict):
        values = values | {"train": kept["train"] | values["train"]}
    del values["extends"]
    return kept | values | {"parent": parent}
