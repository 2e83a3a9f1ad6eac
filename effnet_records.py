"""What a run leaves behind: files that are whole or not there, the run record, and what a machine says of itself.

Nothing here knows of networks or of training. effnet_lib and effnet_study pass its names on.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import re
import reprlib
import resource
import shutil
import subprocess
import sysconfig
import zipfile
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

import fastjsonschema
import filelock
import pandas as pd
import safetensors.torch
import torch

SCHEMA_VERSION = 2  # of run.json; 1 had no digest
CHECKPOINTS = ("checkpoint.pt", "checkpoint.previous.pt")  # newest first
PROGRESS = ".progress.json"
WEIGHTS, PREDICTIONS = "weights.safetensors", "test_predictions.npz"


def _has(**kinds: object) -> dict:
    """JSON schema of an object that has at least these entries."""
    properties = {name: kind if isinstance(kind, dict) else {"type": kind} for name, kind in kinds.items()}
    return {"type": "object", "required": list(properties), "properties": properties}


_SCORES, _POSITIVE = _has(top1="number", top5="number", loss="number"), {"type": "number", "exclusiveMinimum": 0}
_COUNT = {"type": "integer", "minimum": 0}
_BY_STATUS = {
    "finished": _has(
        cost=_has(params=_COUNT, flops=_COUNT, activations=_COUNT),
        dataset=_has(title="string", classes=_COUNT, counts=_has(train=_COUNT, minival=_COUNT, test=_COUNT)),
        device=_has(name="string"),
        versions=_has(python="string", torch="string"),
        git=_has(commit=["string", "null"]),
        test=_SCORES,
        test_raw=_has(top1="number"),
        minival=_has(top1="number"),
        **dict.fromkeys(("seconds", "images_per_second"), _POSITIVE),
        **dict.fromkeys(("peak_memory_bytes", "micro_batch"), _COUNT),
        **dict.fromkeys(("started", "ended"), "string"),
    ),
    "diverged": _has(diverged=_has(epoch=_COUNT, step=_COUNT, lr="number")),
    "failed": _has(error="string"),
    "pruned": _has(minival=_has(top1="number"), seconds=_POSITIVE),  # in a search, for others did better
}
# What every reader of run.json may rely on, in both versions; more entries are welcome
RUN_SCHEMA = _has(status={"enum": list(_BY_STATUS)}, seed=_COUNT, config="object")
RUN_SCHEMA["allOf"] = [
    {"if": _has(status={"const": status}), "then": entries} for status, entries in _BY_STATUS.items()
]
_check = fastjsonschema.compile(RUN_SCHEMA, use_default=False)


def replace_file(path: Path, write: Callable[[Path], object], keep: Path | None = None) -> None:
    """Call write(file) on a file beside `path`, flush it to the disk, rename it over `path`: old or new, never half.

    keep: where the old one goes.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        try:
            write(unfinished)
        except OSError as error:  # of a full disk it does not say which file
            raise OSError(error.errno, error.strerror, str(error.filename or path)) from None
        _flush(unfinished)
        if keep is not None and path.exists():
            path.replace(keep)
        unfinished.replace(path)
        _flush(path.parent)  # the names too
    finally:
        unfinished.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: object) -> None:
    """Write JSON, whole or not at all."""
    replace_file(path, lambda file: file.write_text(json.dumps(value, indent=2) + "\n"))


# ---- Who is at it


class Held(RuntimeError):
    """Another process trains this run now."""


@contextlib.contextmanager
def hold(run_dir: Path) -> Iterator[None]:
    """Hold a run's folder, alone; what a killed holder left unfinished is removed. Held names another holder.

    The lock is the operating system's, so that of a process that died is free; .holder only says whose it is.
    """
    try:
        with filelock.FileLock(run_dir / ".lock", timeout=1):  # longer than holder_of takes
            for unfinished in run_dir.glob(".*.partial"):
                unfinished.unlink(missing_ok=True)
            since = datetime.now(UTC).isoformat(timespec="seconds")
            with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
                (run_dir / ".holder").write_text(f"process {os.getpid()} on {platform.node()}, since {since}")
            yield
    except filelock.Timeout:
        holder = holder_of(run_dir)
        raise Held(f"{run_dir} is held by another process, which is training this run now: {holder}") from None


def holder_of(run_dir: Path) -> str | None:
    """Who trains a run now, in words; None if nobody does."""
    try:
        with open(run_dir / ".lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared, that others who look are not taken for a holder
            return None
    except FileNotFoundError:
        return None
    except BlockingIOError:
        path = run_dir / ".holder"
        return path.read_text() if path.exists() else "unknown"


# ---- How far it is


def tell(run_dir: Path, **progress: object) -> None:
    """Say how far a run is, for those who look on. Nothing depends on it: it is not flushed to the disk, and one that
    is full is no matter."""
    unfinished = run_dir / f".progress.{os.getpid()}.partial"
    with contextlib.suppress(OSError):
        unfinished.write_text(json.dumps(progress))
        unfinished.replace(run_dir / PROGRESS)


def read_progress(run_dir: Path) -> dict | None:
    """What `tell` said last; None if there is nothing."""
    try:
        return json.loads((run_dir / PROGRESS).read_text())
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def event_writer(run_dir: Path | None) -> Iterator[Callable[[Mapping], None]]:
    """A function that adds an epoch's row of the history to event files for TensorBoard, in run_dir/tensorboard, which
    are begun anew; it does nothing without a folder, or unless $EFFNET_TENSORBOARD is set."""
    if run_dir is None or not os.environ.get("EFFNET_TENSORBOARD"):
        yield lambda row: None
        return
    from torch.utils.tensorboard import SummaryWriter

    folder = run_dir / "tensorboard"
    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    writer = SummaryWriter(folder)

    def write(row: Mapping) -> None:
        for name, value in row.items():
            if name != "epoch":
                split, _, kind = name.rpartition("_") if name.startswith(("train_", "minival_")) else ("", "", name)
                writer.add_scalar(f"{kind}/{split}" if split else kind, value, row["epoch"])
        writer.flush()

    with writer:
        yield write


# ---- run.json


def _digest(record: Mapping) -> str:
    entries = {name: value for name, value in record.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def write_record(run_dir: Path, record: Mapping) -> None:
    """Write run.json with its schema's version and a digest of all it says."""
    record = {"schema": SCHEMA_VERSION, **record}
    write_json(run_dir / "run.json", record | {"sha256": _digest(record)})


def read_record(run_dir: str | Path, name: str = "run.json") -> dict | None:
    """A run's record, or None if the run has not ended. Raises ValueError for one that is damaged or was edited."""
    path = Path(run_dir) / name
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text())
        if isinstance(record, dict) and record.get("schema") not in (1, SCHEMA_VERSION):
            raise ValueError(f"schema {record.get('schema')!r}, expected 1 or {SCHEMA_VERSION}")
        try:
            _check(record, name_prefix="run")
        except fastjsonschema.JsonSchemaValueException as error:
            got = "" if isinstance(error.value, dict) else f", got {reprlib.repr(error.value)}"
            raise ValueError(f"{error.message}{got}") from None
        if (record["schema"] > 1 or "sha256" in record) and record.get("sha256") != _digest(record):
            raise ValueError("its digest does not match: it was changed after it was written")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); restore it, or delete it to run again") from None
    return record


# ---- Checkpoints and weights


class Mismatch(ValueError):
    """A record or checkpoint is that of another run."""


def write_checkpoint(run_dir: Path, state: Mapping) -> None:
    """Write checkpoint.pt with torch.save, and keep the one before it. A zip archive, its entries have checksums."""
    body = io.BytesIO()  # torch's own writer to a file makes an unnamed error of a full disk
    torch.save(dict(state), body)
    newest, previous = (run_dir / name for name in CHECKPOINTS)
    replace_file(newest, lambda file: file.write_bytes(body.getbuffer()), keep=previous)


def read_checkpoint(run_dir: Path, check: Callable[[Path, dict], None]) -> dict | None:
    """The newest checkpoint that is whole and that `check` does not refuse; None if there is none, or none is whole.

    Those passed over are told with the reason, and put aside if an older one is used, so that they never take its
    place. Raises check's Mismatch if it refused all that are whole.
    """
    refused, passed = None, []
    for path in (run_dir / name for name in CHECKPOINTS):
        if not path.exists():
            continue
        try:
            with zipfile.ZipFile(path) as archive:
                if (entry := archive.testzip()) is not None:
                    raise ValueError(f"the checksum of {entry} is wrong")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # never unpickles code
            checkpoint["model"], checkpoint["progress"]
            check(path, checkpoint)
        except Mismatch as error:
            print(f"{path} is not used: {error}", flush=True)
            refused = refused or error
            passed.append(path)
            continue
        except Exception as error:  # torch raises many kinds for a torn or foreign file
            print(f"{path} is not used: unreadable ({type(error).__name__}: {error})", flush=True)
            passed.append(path)
            continue
        for other in passed:
            other.replace(other.with_suffix(".refused.pt"))
        return checkpoint
    if refused is not None:
        raise refused
    return None


def write_weights(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors as safetensors, whole or not at all."""
    body = safetensors.torch.save({name: tensor.contiguous().cpu() for name, tensor in tensors.items()})
    replace_file(path, lambda file: file.write_bytes(body))


# ---- What a machine says of itself


def gpu_count(device: str | torch.device | None = None) -> int:
    """How many GPUs there are to train on; none if `device` is the CPU, or the driver is too old for torch."""
    return 0 if str(device) == "cpu" or not torch.cuda.is_available() else torch.cuda.device_count()


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """`device`, or a GPU if there is one. ValueError if a GPU is asked for and torch finds none."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {str(device)!r} was asked for, but torch finds no CUDA GPU; use 'cpu'")
    return device


def keep_freed_memory() -> None:
    """Have glibc keep what this process frees for its next step, where by default it hands large blocks back to the
    system and fetches them again at a page fault each 4 KiB. Does nothing where there is no glibc."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        for threshold in (-1, -3):  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD, to their greatest value
            ctypes.CDLL(None).mallopt(threshold, 2**31 - 1)


def can_compile() -> bool:
    """Whether torch.compile can make code for a GPU: Triton wants a C compiler and Python's headers. Says so if not."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler and (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return True
    print("not compiled, and so slower: torch.compile needs a C compiler and Python's headers (gcc, python3-dev)")
    return False


def out_of_memory(error: Exception) -> bool:
    """A GPU's allocator has an exception of its own; its libraries, torch's allocator on a CPU and oneDNN only words,
    which may mean something else: then even one image does not fit, and the error is raised after all."""
    words = ("can't allocate memory", "could not create a primitive", "could not create a memory object")
    words += ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def machine_gave_way(error: Exception) -> bool:
    """Whether a GPU, its libraries or the link between processes failed. Another process may go on, this one cannot."""
    words = ("CUDA error", "CUDNN_STATUS", "CUBLAS_STATUS", "NCCL")
    return isinstance(error, torch.AcceleratorError) or any(word in str(error) for word in words)


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
        return {"commit": os.environ.get("EFFNET_COMMIT") or None, "dirty": None}


# ---- Figures and tables


def save_figure(figure, path: str | Path) -> None:
    """Write a figure as path.svg, .pdf and .png, the same bytes for the same figure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {"Software": None}}
    for suffix, metadata in undated.items():
        options = {"format": suffix, "metadata": metadata}
        replace_file(path.with_suffix(f".{suffix}"), lambda file, options=options: figure.savefig(file, **options))


def save_table(table: pd.DataFrame, path: str | Path) -> None:
    """Write a table as CSV, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda file: table.to_csv(file, index=False, float_format="%.10g"))
