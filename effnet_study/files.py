"""Files that are complete or absent: atomic writes, the lock of a run, its progress, its checkpoints. And how names of
classes, data sets and profiles, which may have any characters, are escaped for figures, Markdown and a terminal.

Nothing here knows of networks or of training. ROOT is the project's folder, whose results/ is the default for results.
"""

import contextlib
import errno
import fcntl
import io
import json
import os
import platform
import re
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import filelock
import pandas as pd
import torch

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS, RESULTS = ROOT / "notebooks", ROOT / "results"
CHECKPOINTS = ("checkpoint.pt", "checkpoint.previous.pt")  # the newest first
PROGRESS, HISTORY = ".progress.json", "history.jsonl"
WEIGHTS, HALF_WEIGHTS, PREDICTIONS = "weights.safetensors", "weights_half.safetensors", "test_predictions.npz"
# Errors of flushing a folder on file systems that cannot do it, or let nobody open it
UNFLUSHABLE = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EACCES, errno.EPERM, errno.EBADF)


# ---- 1. Writing ----------------------------------------------------------------------------------------------------


def replace_file(path: Path, content: str | bytes | Callable[[Path], object], keep: Path | None = None) -> None:
    """Write a new file beside `path`, flush it to the disk, and rename it to `path`.

    So `path` is always the whole old file or the whole new one. content: what to write, or a function that writes the
    file whose path it gets. keep: the path to move the old file to.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        try:
            if callable(content):
                content(unfinished)
            elif isinstance(content, str):
                unfinished.write_text(content, encoding="utf-8")
            else:
                unfinished.write_bytes(content)
            _flush(unfinished)
        except OSError as error:  # the error of a full disk does not name the file
            raise OSError(error.errno, error.strerror, str(error.filename or path)) from None
        if keep is not None and path.exists():
            path.replace(keep)
        unfinished.replace(path)
        try:
            _flush(path.parent)  # the names too
        except OSError as error:
            if error.errno not in UNFLUSHABLE:
                raise OSError(error.errno, error.strerror, str(path.parent)) from None
    finally:
        unfinished.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: object) -> None:
    """Write JSON atomically."""
    replace_file(path, json.dumps(value, indent=2) + "\n")


def save_figure(figure, path: str | Path) -> None:
    """Write a matplotlib figure as path.svg, .pdf and .png. The same figure gives the same bytes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix, dated in {"svg": "Date", "pdf": "CreationDate", "png": "Software"}.items():
        save = partial(figure.savefig, format=suffix, metadata={dated: None})
        replace_file(path.with_suffix(f".{suffix}"), save)


def save_table(table: pd.DataFrame, path: str | Path) -> None:
    """Write a table as CSV, atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, table.to_csv(index=False, float_format="%.10g").encode())


def read_table(path: Path) -> pd.DataFrame:
    """Read what `save_table` wrote. ValueError names a damaged file."""
    try:
        return pd.read_csv(path)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it, then run make report") from None


# ---- 2. Names ------------------------------------------------------------------------------------------------------


def plain(name: object, length: int | None = None) -> str:
    """Return a name on one line, cut after `length` characters: spaces for control characters, and \\xe9 for a byte
    that is not UTF-8, as Python reads it from a folder's name."""
    escapes = re.sub("[\ud800-\udc7f\udd00-\udfff]", "\ufffd", str(name)).encode("utf-8", "surrogateescape")
    text = escapes.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() or c in "\u200c\u200d" else " " for c in text)[:length]  # joiners are spelling


def drawn(name: object, length: int | None = None) -> str:
    """Return a name for matplotlib, which takes what is between two dollar signs for mathematics."""
    return plain(name, length).replace("$", r"\$")


def in_markdown(name: object) -> str:
    """Return a name for Markdown, in which none of its characters is markup."""
    return re.sub(r"([\\`*_\[\]{}<>|$&~#])", r"\\\1", plain(name))


def print_any_text() -> None:
    """Let stdout and stderr print characters that the terminal's encoding lacks: as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not a notebook's
            stream.reconfigure(errors="backslashreplace")


# ---- 3. The lock of a run, and its progress ------------------------------------------------------------------------


class RunLocked(RuntimeError):
    """Another process trains this run now."""


@contextlib.contextmanager
def hold(run_dir: Path) -> Iterator[None]:
    """Lock a run's folder, and remove what a killed process left unfinished in it.

    Raises RunLocked, which names the process that has the lock. The lock is the operating system's, so it ends with
    its process. The file .holder only says whose it is. A run that has ended needs no lock where none can be had, as in
    another user's folder.
    """
    lock = filelock.FileLock(run_dir / ".lock", timeout=1)  # longer than holder_of takes
    try:
        lock.acquire()
    except filelock.Timeout:
        raise run_locked(run_dir, holder_of(run_dir)) from None
    except OSError as error:
        if not (run_dir / "run.json").exists():
            raise OSError(error.errno, error.strerror, str(run_dir / ".lock")) from None
        yield
        return
    try:
        for unfinished in run_dir.glob(".*.partial"):
            unfinished.unlink(missing_ok=True)
        since = datetime.now(UTC).isoformat(timespec="seconds")
        words = f"process {os.getpid()} on {platform.node()}, since {since}"
        with contextlib.suppress(OSError):  # on a full disk the lock holds too
            (run_dir / ".holder").write_text(words, encoding="utf-8")
        yield
    finally:
        lock.release()


def run_locked(run_dir: Path, holder: str | None) -> RunLocked:
    """Return the error that names the process which trains a run."""
    return RunLocked(f"{run_dir} is held by another process, which is training this run now: {holder}")


def holder_of(run_dir: Path) -> str | None:
    """Describe the process that trains a run now. None if there is none, or its lock may not be read."""
    try:
        with open(run_dir / ".lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared, so that two readers do not disturb each other
            return None
    except (FileNotFoundError, PermissionError):
        return None
    except BlockingIOError:
        path = run_dir / ".holder"
        return path.read_text(encoding="utf-8") if path.exists() else "unknown"


def write_progress(run_dir: Path, **progress: object) -> None:
    """Write a run's progress for status displays. A full disk is no error here, because no result depends on it."""
    unfinished = run_dir / f".progress.{os.getpid()}.partial"
    with contextlib.suppress(OSError):
        unfinished.write_text(json.dumps(progress), encoding="utf-8")
        unfinished.replace(run_dir / PROGRESS)


def read_progress(run_dir: Path) -> dict | None:
    """Read what `write_progress` wrote last. None if there is nothing."""
    try:
        return json.loads((run_dir / PROGRESS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_history(run_dir: Path, history: list[dict]) -> None:
    """Write history.jsonl, a line for each epoch."""
    replace_file(run_dir / HISTORY, "".join(json.dumps(row) + "\n" for row in history))


def load_history(run_dir: str | Path) -> pd.DataFrame:
    """Read history.jsonl of a run: a row per epoch, minival scored with the EMA weights. ValueError names a damaged
    one."""
    path = Path(run_dir) / HISTORY
    try:
        return pd.read_json(path, lines=True)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); restore it, or delete its folder to run again") from None


# ---- 4. Checkpoints ------------------------------------------------------------------------------------------------


class RunMismatch(ValueError):
    """A record or checkpoint belongs to another run."""


def write_checkpoint(run_dir: Path, state: Mapping) -> None:
    """Write checkpoint.pt with torch.save, and keep the one before. It is a zip archive with checksums."""
    body = io.BytesIO()  # on a full disk torch's own writer raises an error that does not name the file
    torch.save(dict(state), body)
    newest, previous = (run_dir / name for name in CHECKPOINTS)
    replace_file(newest, body.getbuffer(), keep=previous)


def read_checkpoint(run_dir: Path, check: Callable[[Path, dict], None]) -> dict | None:
    """Read the newest checkpoint that is whole and that `check` accepts. None if no checkpoint is whole.

    Checkpoints that are not used are printed with the reason. If an older one is used, they are renamed, so that they
    never take its place. Raises check's RunMismatch if it refused all whole ones.
    """
    refused, unused = None, []
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
        except RunMismatch as error:
            refused = refused or error
            reason = str(error)
        except Exception as error:  # torch raises many kinds for a torn or foreign file
            reason = f"unreadable ({type(error).__name__}: {error})"
        else:
            for other in unused:
                with contextlib.suppress(FileNotFoundError):  # another process of the run has renamed it
                    other.replace(refused_name(other))
            return checkpoint
        print(f"{path} is not used: {reason}", flush=True)
        unused.append(path)
    if refused is not None:
        raise refused
    return None


def refused_name(checkpoint: Path) -> Path:
    """Return the name under which a checkpoint is kept that was not used."""
    return checkpoint.with_suffix(".refused.pt")


def remove_checkpoints(run_dir: Path) -> None:
    """Remove a run's checkpoints, also those that were not used."""
    checkpoints = [run_dir / name for name in CHECKPOINTS]
    for path in (*checkpoints, *map(refused_name, checkpoints)):
        if path.exists():  # a read-only file system refuses also what is not there
            path.unlink(missing_ok=True)
