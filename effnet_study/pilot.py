"""Pilots: the baseline trained with changed settings and scored on minival alone, to choose settings by."""

from collections.abc import Mapping
from pathlib import Path

from effnet_study.data.load import load_data
from effnet_study.files import RESULTS
from effnet_study.profile import Profile
from effnet_study.run import Run
from effnet_study.training import train


def pilot(
    profile: Profile,
    changes: Mapping[str, object],
    results: str | Path | None = None,
    device: str | None = None,
    seed: int = 0,
) -> dict:
    """Train a profile's baseline with some settings of its recipe changed, or its `baseline` ({depth: 1, width: 0.35})
    or `base_resolution`. Pilots serve to choose these settings.

    No test image is read: the record, in RESULTS/PROFILE/pilots/CHANGES_seedN/, has minival's scores under "test" too.
    """
    outside = {key: changes[key] for key in ("baseline", "base_resolution") if key in changes}
    recipe = {key: value for key, value in changes.items() if key not in outside}
    profile = profile.replace(train=profile.train | recipe, **outside)
    run = Run(profile, "baseline", seed, Path(results or RESULTS))
    data = load_data(**profile.data.given()).without_test()
    words = {**changes, **({"baseline": str(profile.baseline)[:11]} if "baseline" in changes else {})}
    label = "_".join(f"{key}={value}" for key, value in sorted(words.items())) or "as_it_is"
    about = run.about | {"pilot": dict(changes), "scored": "minival"}
    run_dir = run.study_dir / "pilots" / f"{label}_seed{seed}"
    return train(run.model(len(data.classes)), data, run.config, run_dir, about=about, device=device)
