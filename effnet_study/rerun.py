"""Reruns: train again what a run.json describes, and compare."""

from pathlib import Path

import pandas as pd

from effnet_lib import TrainConfig
from effnet_study.data.load import load_data
from effnet_study.record import read_record, recorded_scaling
from effnet_study.run import build_network
from effnet_study.training import train


def rerun(path: str | Path, results: str | Path = "rerun", device: str | None = None) -> pd.DataFrame:
    """Train again what a run.json describes, in RESULTS/NAME-OF-ITS-FOLDER. Return the scores then and now, a row each.

    ValueError if the record does not say enough, or if the images here differ from the recorded ones."""
    path = Path(path)
    source = path.parent if path.name == "run.json" else path
    record = read_record(source)
    if record is None:
        raise FileNotFoundError(f"{path}: expected a run.json, or a folder with one")
    for part in ("data", "coefficients", "stem_stride", "dataset"):
        if part not in record:
            raise ValueError(
                f"{path} does not say its {part}: it is of an older version, or of a run without a profile"
            )
    config, data = TrainConfig(**record["config"]), load_data(**record["data"])
    data = data.without_test() if record.get("scored") == "minival" else data
    if data.fingerprint != record["dataset"]["fingerprint"]:
        raise ValueError(f"{path} was trained on other images than those of {record['data']} here")
    if config.pretrained:
        raise ValueError(f"{path} began with pretrained weights; repeat it with effnet train --pretrained")
    scaling, name = recorded_scaling(record), record.get("model")
    model = build_network(scaling, len(data.classes), record["stem_stride"], config, name)
    kept = ("profile", "purpose", "method", "model", "coefficients", "baseline", "stem_stride", "data", "pilot")
    about = {key: record[key] for key in (*kept, "scored") if key in record}
    about["rerun_of"] = record.get("git", {}).get("commit")
    run_dir = Path(results) / source.resolve().name
    if (run_dir / "run.json").exists():
        raise ValueError(f"{run_dir} holds a run already: delete it, or give another folder for results")
    now = train(model, data, config, run_dir, about=about, device=device)
    scores = {when: {"status": r["status"], **r.get("test", {})} for when, r in (("then", record), ("now", now))}
    return pd.DataFrame(scores).T
