"""coefficients.json, the outcome of a profile's search: alpha, beta and gamma."""

import json
from collections.abc import Mapping
from pathlib import Path

from effnet_lib import compound_scaling
from effnet_study.profile import Profile
from effnet_study.record import baseline_coefficients, recipe

COEFFICIENTS = "coefficients.json"  # in the study's folder


def load_coefficients(profile: Profile, study_dir: Path) -> dict | None:
    """Read coefficients.json of a study's folder. None if there is none; ValueError if it is damaged."""
    path = study_dir / COEFFICIENTS
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        compound_scaling(1, *(float(found[name]) for name in ("alpha", "beta", "gamma")))
    except (ValueError, KeyError, TypeError) as error:
        again = profile.command("search", study_dir.parent)
        raise ValueError(f"{path} is damaged ({error!r}); delete it, then: {again}") from None
    return found


def searched_coefficients(profile: Profile, study_dir: Path) -> tuple[float, float, float] | None:
    """Return alpha, beta, gamma that the profile's search found. None if none was made with the present settings."""
    found = load_coefficients(profile, study_dir) if profile.search is not None else None
    if found is None:
        return None
    settings = found.get("made_by", {})
    recipes = {part: recipe(settings[part]) for part in ("recipe", "candidates") if part in settings}
    if settings | recipes != made_by(profile):
        return None
    return tuple(float(found[name]) for name in ("alpha", "beta", "gamma"))


def made_by(profile: Profile) -> dict:
    """Return the settings that decide the outcome of a profile's search, as coefficients.json keeps them."""
    network = {"base_resolution": profile.base_resolution, "stem_stride": profile.stem_stride}
    network["baseline"] = baseline_coefficients(profile.baseline)
    data = {key: value for key, value in profile.data.given().items() if key != "title"}
    search = profile.search.model_dump(mode="json", exclude={"train"})
    recipes = {"recipe": recipe(profile.train), "candidates": recipe(profile.train | profile.search.train)}
    return {"search": search, **recipes, "data": data, **network}


def describe_search(found: Mapping) -> str:
    """Describe what coefficients.json says."""
    best = "alpha {alpha:g}, beta {beta:g}, gamma {gamma:g} has the highest minival score, {minival_top1:.2f} %"
    words = f"{best.format(**found)}, of {found['finished']} candidates. "
    if found["finished"] == 1:
        return words + "No other candidate has finished, so nothing can be said of its certainty."
    words += f"It ranks first in {found['best_in_percent_of_draws']:.0f} % of resampled validation sets; "
    words += f"{len(found['not_told_apart'])} of the other candidates cannot be distinguished from it."
    return words if found["seeds"] > 1 else f"{words} Differences between seeds are not included."
