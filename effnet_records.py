"""What a run leaves behind: files that are whole or not there, the run record, and what a machine says of itself.

Nothing here knows of networks or of training. effnet_lib and effnet_study pass its names on.
"""

import importlib.metadata
import json
import os
import platform
import re
import resource
import subprocess
from functools import partial
from pathlib import Path

import pandas as pd
import torch

SCHEMA_VERSION = 1  # of run.json


def replace_file(path: Path, write) -> None:
    """Call write(file) on a file beside `path`, flush it to the disk, rename it over `path`: old or new, never half."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(unfinished)
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Write JSON, whole or not at all."""
    replace_file(path, lambda file: file.write_text(json.dumps(value, indent=2) + "\n"))


def write_torch(path: Path, value: object) -> None:
    """torch.save, whole or not at all."""
    replace_file(path, partial(torch.save, value))


def read_record(run_dir: str | Path) -> dict | None:
    """A run's record, or None if the run has not ended. Raises ValueError for a damaged file."""
    path = Path(run_dir) / "run.json"
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text())
        if record["schema"] == SCHEMA_VERSION:
            return record
        raise ValueError(f"schema {record['schema']!r}, expected {SCHEMA_VERSION}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); restore it, or delete it to run again") from None


def read_checkpoint(path: Path) -> dict | None:
    """A checkpoint, or None if there is none; one that cannot be read is told and counts as none."""
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a torn or foreign file
        print(f"{path} is unreadable ({type(error).__name__}: {error}); starting this run anew", flush=True)
        return None


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with the threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        name = found[1] if found else name
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def environment(device: torch.device) -> dict:
    """What a run ran on: device, versions, commit."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions["torchvision"] = importlib.metadata.version("torchvision")
    versions["cuda"] = torch.version.cuda if device.type == "cuda" else None
    return {"device": {"type": device.type, "name": device_name(device)}, "versions": versions, "git": git_state()}


def peak_memory(device: torch.device) -> int:
    """Bytes: torch's peak on a GPU (since its last reset), on a CPU that of the whole process since it started."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if os.path.exists("/proc/self/status"):  # Linux, whose getrusage also counts what the parent held at the fork
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def git_state() -> dict:
    """Commit of this project's checkout, and whether its code differs; $EFFNET_COMMIT where there is no checkout."""
    git, ran = ["git", "-C", str(Path(__file__).parent)], {"capture_output": True, "text": True, "check": True}
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], **ran).stdout.strip()
        changes = [*git, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!results"]
        return {"commit": commit, "dirty": bool(subprocess.run(changes, **ran).stdout)}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": os.environ.get("EFFNET_COMMIT"), "dirty": None}


def save_figure(figure, path: str | Path) -> None:
    """Write a figure as path.svg, .pdf and .png, the same bytes for the same figure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {"Software": None}}
    for suffix, metadata in undated.items():
        figure.savefig(path.with_suffix(f".{suffix}"), metadata=metadata)


def save_table(table: pd.DataFrame, path: str | Path) -> None:
    """Write a table as CSV, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda file: table.to_csv(file, index=False, float_format="%.10g"))
