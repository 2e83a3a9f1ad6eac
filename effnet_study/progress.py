"""Progress of runs, read from files: as a table, in the terminal, and below a notebook's cell."""

import base64
import contextlib
import contextvars
import io
import math
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from functools import lru_cache
from html import escape
from pathlib import Path

import pandas as pd
from rich import box
from rich.console import Console
from rich.live import Live as RichLive
from rich.table import Table
from rich.text import Text

from effnet_study.files import HISTORY, holder_of, load_history, plain, read_progress
from effnet_study.record import ending, read_record
from effnet_study.run import Run

STYLES = {"finished": "green", "running": "cyan", "interrupted": "yellow", "failed": "red", "diverged": "red"}
STYLES |= {"damaged": "red", "stale": "magenta"}
PLAIN_WIDTH = 140  # characters of the table where there is no terminal
OPTIONAL = ("top-5 %", "time", "images/s", "seed")  # columns left out of a narrow table, the first one first
SETTLED = ("finished", "failed", "diverged", "stale", "damaged")  # states whose rows do not change any more
UNDER_WAY = ("running", "interrupted")

# ---- 1. As a table -------------------------------------------------------------------------------------------------


def progress(runs: Sequence[Run], known: dict | None = None) -> pd.DataFrame:
    """Return the progress of runs, one row per run.

    state; done epochs (with a fraction) and epochs in all; step and steps of the epoch that is under way; train_loss;
    minival_top1 of the last epoch; top1 and top5 of a finished run; images_per_second; seconds trained, and left. A run
    that has not started will take the seconds of another seed of its method; if there is none, left is NaN.

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
    names = ("epochs", "step", "steps", "train_loss", "minival_top1", "top1", "top5", "images_per_second", "seconds")
    row = {"method": getattr(run, "name", run.method), "seed": run.seed, "state": state, **dict.fromkeys(names)}
    row |= {"on_minival": False, "done": 0.0, "left": 0.0 if state in SETTLED else None}
    if state == "waiting":
        return row
    row["epochs"] = run.config.epochs
    if state in ("damaged", "stale"):
        return row
    with contextlib.suppress(FileNotFoundError, ValueError):
        history = load_history(run.run_dir)
        if len(history):
            row |= history.iloc[-1][["train_loss", "minival_top1", "images_per_second"]].to_dict()
            row |= {"done": float(len(history)), "seconds": float(history["seconds"].sum())}
    if state == "finished":
        record = read_record(run.run_dir)
        row |= {"top1": record["test"]["top1"], "top5": record["test"]["top5"], "done": float(row["epochs"])}
        row |= {"seconds": record["seconds"], "images_per_second": record["images_per_second"]}
        row["on_minival"] = run.about.get("scored") == "minival"
    now = read_progress(run.run_dir) if state in UNDER_WAY else None
    if now is not None and now["epoch"] > row["done"]:
        step = now["step"] if state == "running" else now.get("saved", 0)  # an interrupted run continues where it saved
        row |= {"step": step, "steps": now["steps"], "done": now["epoch"] - 1 + step / now["steps"]}
        row["seconds"] = (row["seconds"] or 0.0) + now["seconds"] * step / max(1, now["step"])
        row["images_per_second"] = now["images_per_second"] or row["images_per_second"]
        row["train_loss"] = row["train_loss"] if now["loss"] is None else now["loss"]
    if state in UNDER_WAY and row["done"] and row["seconds"]:
        row["left"] = row["seconds"] / row["done"] * (row["epochs"] - row["done"])
    return row


# ---- 2. In the terminal --------------------------------------------------------------------------------------------


def status_table(runs: Sequence[Run], console: Console, lines: int | None = None, known: dict | None = None) -> Table:
    """Return `progress` as a table for people, without some columns where the console is narrow.

    lines: show at most so many runs, first those that are under way.
    """
    rows, profile = progress(runs, known), runs[0].profile
    count = rows["state"].value_counts(sort=False)
    title = f"{plain(profile.title)} ({profile.stamp})\n" + ", ".join(f"{n} {state}" for state, n in count.items())
    left = rows["left"][~rows["state"].isin(SETTLED)]
    if len(left) and left.notna().all():
        title += f"; about {_time(max(left.max(), left.sum() / max(1, count.get('running', 1))))} left"
    if lines is not None and len(rows) > lines:
        order = rows["state"].map({"running": 0, "interrupted": 1}).fillna(2)
        rows = rows.loc[order.sort_values(kind="stable").index[: max(1, lines)].sort_values()]
    cells = [_cells(row) for row in rows.itertuples()]
    names = list(cells[0])
    for left_out in (None, *OPTIONAL):
        names = [name for name in names if name != left_out]
        heading = Text(title, "table.title")  # as text, since brackets in a title are no markup
        table = Table(title=heading, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False, collapse_padding=True)
        for name in names:
            table.add_column(name, justify="left" if name in ("method", "state") else "right", no_wrap=True)
        for row in cells:
            table.add_row(*(row[name] for name in names))
        if console.measure(table, options=console.options.update(max_width=1000)).maximum <= console.width:
            break
    return table


def _cells(row) -> dict[str, str | Text]:
    """Return a run's line of the table, by column."""
    return {
        "method": row.method,
        "seed": str(row.seed),
        "state": Text(row.state, STYLES.get(row.state, "dim")),
        "epochs": "" if pd.isna(row.epochs) else f"{int(row.done)}/{int(row.epochs)}",
        "minival %": _number(row.minival_top1, ".2f"),
        "top-1 %": _number(row.top1, ".2f"),
        "top-5 %": _number(row.top5, ".2f"),
        "images/s": _number(row.images_per_second, ",.0f"),
        "time": _time(row.seconds),
        "left": "" if row.left == 0 else _time(row.left),
    }


def _time(seconds: float | None) -> str:
    return "" if pd.isna(seconds) else str(timedelta(seconds=round(seconds)))


def _number(value: float | None, form: str) -> str:
    return "" if pd.isna(value) else format(value, form)


def _console() -> Console:
    """Return the terminal; elsewhere, such as in a log, a console so wide that no table is cut."""
    return Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)


def print_status(runs: Sequence[Run]) -> None:
    """Print the table of runs, and advice for each run that needs attention."""
    print()
    console = _console()
    console.print(status_table(runs, console))
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


class Live:
    """Show below a notebook's cell, while it trains, a bar for each run, and the curve if there is one run.

        with Live(run):
            record = run.train(data)

    It is HTML without widgets, so JupyterLab, VS Code, nbclient and papermill all show and save it. Nothing is shown
    outside notebooks, or when `effnet study` executes the notebook: there a line per epoch suffices. seconds: between
    two updates. curve: keep the curve once the run is finished.
    """

    def __init__(self, *runs: Run, seconds: float = 1.0, curve: bool = True):
        self.runs, self.seconds, self.curve, self.known = runs, seconds, curve, {}
        self.ended, self.handle = threading.Event(), None

    def __enter__(self) -> "Live":
        from IPython import display, get_ipython

        if "EFFNET_STOP" not in os.environ and get_ipython() is not None:
            self.handle = display.display({"text/plain": ""}, raw=True, display_id=True)
            self.show("waiting")
            target = contextvars.copy_context().run  # so that the kernel knows to which cell the output belongs
            self.thread = threading.Thread(target=target, args=(self._follow,), daemon=True)
            self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self.handle is not None:
            self.ended.set()
            self.thread.join()
            stopped = isinstance(error, KeyboardInterrupt)
            self.show("finished" if error is None else "stopped" if stopped else "failed")

    def _follow(self) -> None:
        while not self.ended.wait(self.seconds):
            self.show("running")

    def show(self, state: str) -> None:
        """Update the output. An error in it must not end the training, so there is no output then."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            rows = list(progress(self.runs, self.known).itertuples())
            lines = [f"{row.method}, seed {row.seed}: {_sentence(row)}" for row in rows]
            body = "<br>".join(f"{_bar(row)} {escape(line)}" for row, line in zip(rows, lines, strict=True))
            if len(rows) == 1 and (self.curve or state in ("running", "stopped", "failed")):
                history = self.runs[0].run_dir / HISTORY
                body += _curve(history, history.stat().st_mtime_ns, int(rows[0].epochs)) if history.exists() else ""
            html = f'<div class="effnet-live" data-state="{state}">{body}</div>'
            self.handle.update({"text/plain": "\n".join(lines), "text/html": html}, raw=True)


def _bar(row) -> str:
    epochs = 1 if pd.isna(row.epochs) else int(row.epochs)
    return f'<progress max="{epochs}" value="{row.done:.3f}" style="width:14em"></progress>'


def _sentence(row) -> str:
    """Describe how far a run is."""
    if row.state == "finished":
        epochs, scored = int(row.epochs), "minival " * row.on_minival
        scores = f"{scored}top-1 {row.top1:.2f} %, {row.images_per_second:,.0f} images/s, {_time(row.seconds)}"
        return f"finished after {epochs} epoch{'s' * (epochs > 1)}: {scores}"
    words, in_epoch = [row.state], not pd.isna(row.step)
    scoring = in_epoch and row.step == row.steps
    if row.done or in_epoch:
        epoch = math.ceil(row.done) if scoring else int(row.done) + 1
        words.append(f"epoch {min(epoch, int(row.epochs))} of {int(row.epochs)}")
    if in_epoch:
        words.append("scoring" if scoring else f"step {int(row.step)} of {int(row.steps)}")
    pairs = (("loss {:.3f}", row.train_loss), ("minival top-1 {:.2f} %", row.minival_top1))
    pairs += (("{:,.0f} images/s", row.images_per_second),)
    words += [form.format(value) for form, value in pairs if not pd.isna(value)]
    words += [f"about {_time(row.left)} left"] if row.left > 0 and row.state in UNDER_WAY else []
    return ", ".join(words)


@lru_cache(maxsize=1)
def _curve(path: Path, changed: int, epochs: int) -> str:
    """Return training loss and minival top-1 by epoch as an HTML image. It is drawn again when history.jsonl at `path`
    has changed (its time of change, in ns), which happens at the end of an epoch."""
    from matplotlib.figure import Figure

    history = load_history(path.parent)
    figure = Figure(figsize=(6.4, 2.2), layout="constrained", facecolor="white")  # pyplot belongs to the notebook
    titles = {"train_loss": "training loss", "minival_top1": "minival top-1 (%)"}
    for ax, (name, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        ax.plot(history["epoch"], history[name], color="black", marker="." if len(history) < 30 else None)
        ax.set(title=title, xlabel="epoch", xlim=(0, epochs + 0.5))
        ax.xaxis.get_major_locator().set_params(integer=True)
    body = io.BytesIO()
    figure.savefig(body, format="png", dpi=100)
    image = base64.b64encode(body.getvalue()).decode()
    words = f"Training loss and minival top-1 after {len(history)} of {epochs} epochs"
    return f'<br><img alt="{words}" src="data:image/png;base64,{image}">'
