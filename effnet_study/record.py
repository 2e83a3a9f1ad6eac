"""run.json, the record of a run: its schema, how it is assembled, written and read."""

import hashlib
import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model

from effnet_lib import Cost, Scaling, TrainConfig
from effnet_study.files import RunMismatch, write_json
from effnet_study.machine import environment

SCHEMA_VERSION = 3  # 2 had settings under other names, one that is gone, and no baseline other than B0
GONE = ("checkpointing",)  # settings that no longer exist, and never changed a result
RENAMED = {"warmup": "warmup_fraction", "final_lr": "final_lr_fraction"}  # settings, since schema 3
EXECUTION = ("compile", "deterministic", "save_seconds", "save_steps")  # settings that do not change the result

# ---- 1. Schema -----------------------------------------------------------------------------------------------------
# What every reader may rely on. Records have further entries.

Whole = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]

FINISHED = {
    "status": Literal["finished"],
    "seed": Whole,
    "config": dict,
    "cost": {"params": Whole, "flops": Whole, "activations": Whole},
    "dataset": {"title": str, "classes": Whole, "counts": {"train": Whole, "minival": Whole, "test": Whole}},
    "device": {"name": str},
    "versions": {"python": str, "torch": str},
    "git": {"commit": str | None},
    "test": {"top1": float, "top5": float, "loss": float},
    "test_raw": {"top1": float},
    "minival": {"top1": float},
    "seconds": Positive,
    "images_per_second": Positive,
    "peak_memory_bytes": Whole,
    "micro_batch": Whole,
    "started": str,
    "ended": str,
}
DIVERGED = {
    "status": Literal["diverged"],
    "seed": Whole,
    "config": dict,
    "diverged": {"epoch": Whole, "step": Whole, "lr": float},
}
FAILED = {"status": Literal["failed"], "seed": Whole, "config": dict, "error": str}


def _model(name: str, entries: Mapping) -> type[BaseModel]:
    """Return a pydantic model that requires these entries and accepts further ones."""
    fields = {key: (_model(key, kind) if isinstance(kind, dict) else kind, ...) for key, kind in entries.items()}
    return create_model(name, __config__=ConfigDict(strict=True, extra="allow"), **fields)


_ANY = _model("finished", FINISHED) | _model("diverged", DIVERGED) | _model("failed", FAILED)
_SCHEMA = TypeAdapter(Annotated[_ANY, Field(discriminator="status")])

# ---- 2. Assembling, writing, reading -------------------------------------------------------------------------------


def assemble(
    about: Mapping, config: TrainConfig, cost: Cost, dataset: Mapping, device: torch.device, outcome: Mapping
) -> dict:
    """Return a run's record. about: the plan (profile, method, coefficients); outcome: status, scores, times."""
    head = {"schema": SCHEMA_VERSION, "status": "failed", **about, "seed": config.seed, "config": dict(config)}
    return head | {"cost": vars(cost), "dataset": dict(dataset)} | environment(device) | dict(outcome)


def write_record(run_dir: Path, record: Mapping) -> None:
    """Write run.json with a digest of all its entries."""
    record = {"schema": SCHEMA_VERSION, **record}
    write_json(run_dir / "run.json", record | {"sha256": _digest(record)})


def read_record(run_dir: str | Path, name: str = "run.json") -> dict | None:
    """Read a run's record. None if the run has not ended; ValueError if the record is damaged or was edited."""
    path = Path(run_dir) / name
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(record, dict) and record.get("schema") not in (2, SCHEMA_VERSION):
            raise ValueError(f"schema {record.get('schema')!r}, expected 2 or {SCHEMA_VERSION}")
        try:
            _SCHEMA.validate_python(record)
        except ValidationError as error:
            first = error.errors()[0]
            got = "" if isinstance(first["input"], dict) else f", got {reprlib.repr(first['input'])}"
            raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}{got}") from None
        if record.get("sha256") != _digest(record):
            raise ValueError("its digest does not match: it was changed after it was written")
    except (IsADirectoryError, ValueError) as error:  # another OSError says nothing about the record
        raise ValueError(f"{path} is damaged ({error}); restore it, or delete it to run again") from None
    return {"baseline": {"depth": 1.0, "width": 1.0}, **record, "config": upgrade_config(record["config"])}


def upgrade_config(config: Mapping) -> dict:
    """Return the settings of a record or checkpoint under their present names."""
    return {RENAMED.get(name, name): value for name, value in config.items() if name not in GONE}


def _digest(record: Mapping) -> str:
    entries = {name: value for name, value in record.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


# ---- 3. What a record says -----------------------------------------------------------------------------------------


def recipe(config: Mapping) -> dict:
    """Return the settings of a config that decide a run's result. Settings that the config lacks have their default."""
    settings = {**dict(TrainConfig()), **upgrade_config(config)}
    return {name: value for name, value in settings.items() if name not in EXECUTION}


def identity_of(config: TrainConfig, cost: Cost, dataset: Mapping) -> dict:
    """Return the entries that identify a run in records and checkpoints: recipe, cost of the network, images."""
    return {"config": recipe(dict(config)), "cost": vars(cost), "dataset": {"fingerprint": dataset["fingerprint"]}}


def check_identity(path: Path, found: Mapping, expected: Mapping) -> None:
    """Raise RunMismatch for a record or checkpoint that was made with another config, network or data set."""
    for part, wanted in expected.items():
        made = recipe(found["config"]) if part == "config" else found.get(part, {})
        for key, new in wanted.items():
            if (old := made.get(key)) != new:
                raise RunMismatch(
                    f"{path} was made with {part} {key} = {old!r}, now {new!r} is asked for; delete {path.parent} to "
                    "start again, or keep it and give another folder for results"
                )


def baseline_coefficients(baseline: Scaling) -> dict[str, float]:
    """Return a study's baseline as its records contain it."""
    return {"depth": baseline.depth, "width": baseline.width}


def recorded_scaling(record: Mapping) -> Scaling:
    """Return how a record's network scales B0: the method's coefficients times the baseline's."""
    return Scaling(**record["coefficients"]) * Scaling(**record["baseline"])


def ending(record: Mapping) -> str:
    """Describe how a run that did not finish ended."""
    if record["status"] == "diverged":
        return "diverged in epoch {epoch}, step {step}, at LR {lr:.3g}".format(**record["diverged"])
    return f"failed ({record.get('error')})"
