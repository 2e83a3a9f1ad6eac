"""Progress of runs, read from files: as a table in the terminal, and below a notebook's cell."""

import contextlib
import contextvars
import html
import io
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta

import pandas as pd
from rich import box
from rich.console import Console
from rich.live import Live as RichLive
from rich.table import Table
from rich.text import Text

from effnet_study.files import holder_of, load_history, plain, read_progress
from effnet_study.record import ending, read_record
from effnet_study.run import Run

STYLES = {"finished": "green", "running": "cyan", "interrupted": "yellow", "failed": "red", "diverged": "red"}
STYLES |= {"damaged": "red", "stale": "magenta"}
WIDE, PLAIN_WIDTH = 120, 140  # characters: of a terminal for all columns, and where there is no terminal
OPTIONAL = ("seed", "loss", "top-5 %", "images/s", "time")  # columns that only a wide terminal shows
SETTLED = ("finished", "failed", "diverged", "stale", "damaged")  # states whose rows do not change any more
UNDER_WAY = ("running", "interrupted")

# ---- 1. As a table -------------------------------------------------------------------------------------------------


def progress(runs: Sequence[Run], known: dict | None = None) -> pd.DataFrame:
    """Return the progress of runs, a row each: method, seed, state; done epochs (with a fraction) and epochs in all;
    train_loss, and minival_top1 of the last epoch; top1 and top5 on test; images_per_second; seconds trained, and left.
    A run that has not started will take the seconds of another seed of its method; if there is none, left is NaN.

    known: kept from call to call, it holds the rows of ended runs, whose files are not read again.
    """
    known, rows = {} if known is None else known, []
    for run in runs:
        path = None if run.waiting else run.run_dir / "run.json"
        key = (path, path.stat().st_mtime_ns) if path is not None and path.exists() else None
        row = known.get(key) or _row(run)
        if key is not None and row["state"] in SETTLED:
            known[key] = row
        rows.append(row)
    table = pd.DataFrame(rows).astype(dict.fromkeys(("seconds", "left", "images_per_second"), float))
    whole = (table["seconds"] + table["left"]).where(table["state"].isin(("running", "finished")))
    of_another_seed = whole.groupby(table["method"]).transform("first")
    table["left"] = table["left"].mask(table["state"].isin(("missing", "waiting")), of_another_seed)
    return table


def _row(run: Run) -> dict:
    state = run.state()
    row = {"method": getattr(run, "name", run.method), "seed": run.seed, "state": state}
    row |= dict.fromkeys(["epochs", "train_loss", "minival_top1", "top1", "top5", "images_per_second", "seconds"])
    row |= {"done": 0.0, "left": 0.0 if state in SETTLED else None}
    if state == "waiting":
        return row
    row["epochs"] = run.config.epochs
    if state in ("damaged", "stale"):
        return row
    with contextlib.suppress(FileNotFoundError, ValueError):
        history = load_history(run.run_dir)
        row |= history.iloc[-1][["train_loss", "minival_top1", "images_per_second"]].to_dict()
        row |= {"done": float(len(history)), "seconds": float(history["seconds"].sum())}
    if state == "finished":
        record = read_record(run.run_dir)
        row |= {key: record[key] for key in ("seconds", "images_per_second")} | {"done": float(row["epochs"])}
        if run.about.get("scored") != "minival":
            row |= {key: record["test"][key] for key in ("top1", "top5")}
    now = read_progress(run.run_dir) if state in UNDER_WAY else None
    if now is not None and now["epoch"] > row["done"]:
        step = now["step"] if state == "running" else now.get("saved", 0)  # an interrupted run continues where it saved
        row["done"] = now["epoch"] - 1 + step / now["steps"]
        row["seconds"] = (row["seconds"] or 0.0) + now["seconds"] * step / max(1, now["step"])
        row["images_per_second"] = now["images_per_second"] or row["images_per_second"]
        row["train_loss"] = row["train_loss"] if now["loss"] is None else now["loss"]
    if state in UNDER_WAY and row["done"] and row["seconds"]:
        row["left"] = row["seconds"] / row["done"] * (row["epochs"] - row["done"])
    return row


# ---- 2. In the terminal --------------------------------------------------------------------------------------------


def status_table(runs: Sequence[Run], console: Console, lines: int | None = None, known: dict | None = None) -> Table:
    """Return `progress` as a table for people. Of more runs than `lines`, it shows those that are under way."""
    rows, profile = progress(runs, known), runs[0].profile
    count = rows["state"].value_counts(sort=False)
    title = f"{plain(profile.title)} ({profile.stamp})\n" + ", ".join(f"{n} {state}" for state, n in count.items())
    left = rows["left"][~rows["state"].isin(SETTLED)]
    if len(left) and left.notna().all():
        title += f"; about {_time(max(left.max(), left.sum() / max(1, count.get('running', 1))))} left"
    if lines is not None and len(rows) > lines:
        rows = rows[rows["state"].isin(UNDER_WAY)]
    heading = Text(title, "table.title")  # as text, since brackets in a title are no markup
    table = Table(title=heading, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False, collapse_padding=True)
    names = [name for name in CELLS if console.width >= WIDE or name not in OPTIONAL]
    for name in names:
        table.add_column(name, justify="left" if name in ("method", "state") else "right", no_wrap=True)
    for row in rows.itertuples():
        table.add_row(*(CELLS[name](row) for name in names))
    return table


def _time(seconds: float | None) -> str:
    return "" if pd.isna(seconds) else str(timedelta(seconds=round(seconds)))


def _number(value: float | None, form: str) -> str:
    return "" if pd.isna(value) else format(value, form)


CELLS = {  # the columns of the table, each as a function of a row of `progress`
    "method": lambda row: row.method,
    "seed": lambda row: str(row.seed),
    "state": lambda row: Text(row.state, STYLES.get(row.state, "")),
    "epochs": lambda row: "" if pd.isna(row.epochs) else f"{row.done:.4g}/{row.epochs:.0f}",
    "loss": lambda row: _number(row.train_loss, ".3f"),
    "minival %": lambda row: _number(row.minival_top1, ".2f"),
    "top-1 %": lambda row: _number(row.top1, ".2f"),
    "top-5 %": lambda row: _number(row.top5, ".2f"),
    "images/s": lambda row: _number(row.images_per_second, ",.0f"),
    "time": lambda row: _time(row.seconds),
    "left": lambda row: "" if row.left == 0 else _time(row.left),
}


def _console() -> Console:
    """Return the terminal; elsewhere, such as in a log, a console so wide that no table is cut."""
    return Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)


def print_status(runs: Sequence[Run]) -> None:
    """Print the table of runs, and advice for each run that needs attention."""
    console = _console()
    console.print("", status_table(runs, console), sep="\n")
    for run in runs:
        if advice := _advice(run):
            print(advice, flush=True)


def _advice(run: Run) -> str | None:
    """Return what to do about a run, if anything."""
    state = run.state()
    if state == "waiting":
        return f"{run.method} seed {run.seed} waits for its coefficients: {run.command('search')}"
    if state == "running":
        return f"{run.run_dir.name} is trained by {holder_of(run.run_dir)}"
    try:
        record = read_record(run.run_dir)
    except ValueError as error:  # it is damaged
        return str(error)
    if state in ("failed", "diverged"):
        return f"{run.run_dir.name} {ending(record)}; {run.again}"
    if state == "stale":
        differences = "; ".join(run.differences(record))
        return f"{run.run_dir.name} was made with {differences}; delete its folder to run it again"


@contextlib.contextmanager
def live_table(runs: Sequence[Run]) -> Iterator[None]:
    """Keep the table of `runs` at the foot of the terminal, below what is printed meanwhile. Without a terminal this
    does nothing."""
    console, known = _console(), {}
    if not console.is_terminal:
        yield
        return

    def draw() -> Table | str:
        try:  # an error, for example of a file system that is gone, would end rich's thread
            return status_table(runs, console, console.height - 8, known)
        except (OSError, ValueError, TypeError) as error:
            return f"no status: {error}"

    # transient: whoever called this prints the final table
    with RichLive(console=console, get_renderable=draw, refresh_per_second=0.5, transient=True):
        yield


def watch(runs: Sequence[Run]) -> None:
    """Show the table until every run has ended, or until interrupted."""
    with contextlib.suppress(KeyboardInterrupt), live_table(runs):
        while any(run.state() not in SETTLED for run in runs) and sys.stdout.isatty():
            time.sleep(1)
    print_status(runs)


# ---- 3. Below a notebook's cell ------------------------------------------------------------------------------------


@contextlib.contextmanager
def live(*runs: Run, seconds: float = 1.0) -> Iterator[Callable[[str], None] | None]:
    """Show below a notebook's cell a bar and the table of runs, while the block trains them.

    It is HTML without widgets, so JupyterLab, VS Code, nbclient and papermill all show and save it. Nothing is shown
    outside notebooks, or when `effnet study` executes the notebook: there a line per epoch suffices. seconds: between
    two updates. Yields the function that updates the output.
    """
    from IPython import display, get_ipython

    if "EFFNET_STOP" in os.environ or get_ipython() is None:
        yield None
        return
    handle, known, ended = display.display({"text/plain": ""}, raw=True, display_id=True), {}, threading.Event()

    def show(state: str) -> None:
        with contextlib.suppress(OSError, ValueError, TypeError):  # an error in it must not end the training
            console = Console(file=io.StringIO(), width=PLAIN_WIDTH, force_jupyter=False)  # or rich shows it itself
            console.print(status_table(runs, console, known=known))
            text, rows = console.file.getvalue(), progress(runs, known)
            bar = f'<progress max="{rows["epochs"].sum():.0f}" value="{rows["done"].sum():.3f}"></progress>'
            page = f'<div class="effnet-live" data-state="{state}">{bar}<pre>{html.escape(text)}</pre></div>'
            handle.update({"text/plain": text, "text/html": page}, raw=True)

    def follow() -> None:
        while not ended.wait(seconds):
            show("running")

    show("running")
    in_context = contextvars.copy_context().run  # so that the kernel knows to which cell the output belongs
    thread = threading.Thread(target=in_context, args=(follow,), daemon=True)
    thread.start()
    state = "stopped"
    try:
        yield show
        state = "finished"
    finally:
        ended.set()
        thread.join()
        show(state)
