"""A study under way, as its files tell it: a table of runs in the terminal, a bar and a curve below a notebook's cell.

Whoever trains says every second or two how far it is (`tell` in effnet_records) and adds a line to history.jsonl after
each epoch. All here only reads that, so that it looks the same from another terminal, another notebook, or another
machine that shares the results.
"""

import base64
import contextlib
import contextvars
import io
import math
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from html import escape
from pathlib import Path

import pandas as pd
from rich import box
from rich.console import Console, RenderableType
from rich.live import Live as RichLive
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from effnet_lib import holder_of, read_record
from effnet_records import read_progress
from effnet_runs import Profile, Run, ending, load_history, plan_runs

STYLES = {"finished": "green", "running": "cyan", "interrupted": "yellow", "failed": "red", "diverged": "red"}
STYLES |= {"damaged": "red", "stale": "magenta"}
PLAIN_WIDTH = 140  # characters of the table where there is no terminal
ENDED = ("finished", "failed", "diverged", "pruned", "stale", "damaged")


# ---- 1. How far runs are -------------------------------------------------------------------------------------------


def progress(runs: Sequence[Run], known: dict | None = None) -> pd.DataFrame:
    """How far runs are, a row each: state, epochs done (with a fraction) and in all, step and steps of the epoch that
    is under way, training loss, minival top-1 of the last epoch, test top1 and top5 of a finished one,
    images_per_second, seconds trained, and seconds left, as far as that can be told: those of a run that has not
    started are the seconds of another seed of its method.

    known: kept from call to call, the rows of runs that have ended, which are not read anew.
    """
    known, rows = {} if known is None else known, []
    for run in runs:
        path = run.directory / "run.json" if not run.waiting else None
        ended = path.stat().st_mtime_ns if path is not None and path.exists() else None
        if ended is None or (path, ended) not in known:
            row = _row(run)
            if ended is not None and row["state"] in ENDED:
                known[path, ended] = row
        else:
            row = known[path, ended]
        rows.append(dict(row))
    whole = {}
    for row in rows:
        if row["state"] in ("running", "finished") and row["seconds"] and row["left"] is not None:
            whole.setdefault(row["method"], row["seconds"] + row["left"])
    for row in rows:
        if row["state"] in ("missing", "waiting"):
            row["left"] = whole.get(row["method"])
    return pd.DataFrame(rows).astype({"left": float, "images_per_second": float})


def _row(run: Run) -> dict:
    state = run.state()
    names = ("px", "flops", "epochs", "step", "steps", "train_loss", "minival_top1", "top1", "top5")
    row = {"method": getattr(run, "name", run.method), "seed": run.seed, "state": state, **dict.fromkeys(names)}
    row["on_minival"] = run.about.get("scored") == "minival" if state == "finished" else False
    row |= {"done": 0.0, "images_per_second": None, "seconds": None, "left": None}
    if state == "waiting":
        return row
    row |= {"px": run.config.resolution, "epochs": run.config.epochs}
    if state in ENDED:
        row["left"] = 0.0
    if state in ("damaged", "stale"):
        return row
    with contextlib.suppress(FileNotFoundError, ValueError):
        history = load_history(run.directory)
        if len(history):
            last = history.iloc[-1]
            row |= {name: float(last[name]) for name in ("train_loss", "minival_top1", "images_per_second")}
            row |= {"done": float(len(history)), "seconds": float(history["seconds"].sum())}
    record = read_record(run.directory) if state == "finished" else None
    if record is not None:
        row |= {"flops": record["cost"]["flops"], **{name: record["test"][name] for name in ("top1", "top5")}}
        row |= {"done": float(row["epochs"]), "seconds": record["seconds"]}
        row["images_per_second"] = record["images_per_second"]
    now = read_progress(run.directory) if state in ("running", "interrupted") else None
    if now is not None and now["epoch"] > row["done"]:
        step = now["step"] if state == "running" else now.get("saved", 0)  # where it goes on
        row |= {"step": step, "steps": now["steps"]}
        row["done"] = now["epoch"] - 1 + step / now["steps"]
        row["seconds"] = (row["seconds"] or 0.0) + now["seconds"] * step / max(1, now["step"])
        row["images_per_second"] = now["images_per_second"] or row["images_per_second"]
        row["train_loss"] = row["train_loss"] if now["loss"] is None else now["loss"]
    if state in ("running", "interrupted") and row["done"] and row["seconds"]:
        row["left"] = row["seconds"] / row["done"] * (row["epochs"] - row["done"])
    return row


def _time(seconds: float | None) -> str:
    return "" if seconds is None or pd.isna(seconds) else str(timedelta(seconds=round(seconds)))


def _number(value: float | None, form: str) -> str:
    return "" if value is None or pd.isna(value) else format(value, form)


# ---- 2. In the terminal --------------------------------------------------------------------------------------------


SPARED = ("top-5 %", "px", "FLOPs (B)", "time", "", "images/s", "seed")  # columns, the first to go first


def status_table(
    profile: Profile, runs: Sequence[Run], console: Console | None = None, lines: int | None = None, known=None
) -> Table:
    """`progress` for people: method, seed, state, cost, epochs, scores, images/s, time taken and left; without what can
    best be spared where the console is too narrow. lines: at most so many runs, those that are under way first."""
    console, rows = console or _console(), progress(runs, known)
    count = rows["state"].value_counts()
    counted = ", ".join(f"{count[state]} {state}" for state in dict.fromkeys(rows["state"]))
    under_way = rows["left"][rows["state"].isin(["running", "interrupted", "missing", "waiting"])]
    if len(under_way) and under_way.notna().all():
        at_a_time = max(1, count.get("running", 1))
        counted += f"; about {_time(max(under_way.max(), under_way.sum() / at_a_time))} left"
    if lines is not None and len(rows) > lines:
        order = rows["state"].map({"running": 0, "interrupted": 1}).fillna(2)
        rows = rows.loc[order.sort_values(kind="stable").index[: max(1, lines)].sort_values()]
    names = ["method", "seed", "state", "px", "FLOPs (B)", "epochs", "", "minival %", "top-1 %", "top-5 %", "images/s"]
    names, spared = [*names, "time", "left"], list(reversed(SPARED))
    while True:
        title = f"{profile.title} ({profile.stamp})\n{counted}"
        table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False, collapse_padding=True)
        for name in names:
            table.add_column(name, justify="left" if name in ("method", "state", "") else "right", no_wrap=True)
        for row in rows.itertuples():
            table.add_row(*(cell for name, cell in _cells(row).items() if name in names))
        needed = Measurement.get(console, console.options.update(max_width=1000), table).maximum
        if not spared or needed <= console.width:
            return table
        names.remove(spared.pop())


def _cells(row) -> dict[str, RenderableType]:
    """A run's line of the table, by column."""
    known = not pd.isna(row.epochs)
    bar = ProgressBar(row.epochs, row.done, width=8) if known and row.state in ("running", "interrupted") else ""
    return {
        "method": row.method,
        "seed": str(row.seed),
        "state": Text(row.state, STYLES.get(row.state, "dim")),
        "px": _number(row.px, ".0f"),
        "FLOPs (B)": _number(row.flops and row.flops / 1e9, ".4f"),
        "epochs": f"{int(row.done)}/{int(row.epochs)}" if known else "",
        "": bar,
        "minival %": _number(row.minival_top1, ".2f"),
        "top-1 %": _number(row.top1, ".2f"),
        "top-5 %": _number(row.top5, ".2f"),
        "images/s": _number(row.images_per_second, ",.0f"),
        "time": _time(row.seconds),
        "left": "" if row.left == 0 else _time(row.left),
    }


def _console() -> Console:
    """The terminal; elsewhere, such as in a log, lines so wide that no table is cut."""
    return Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)


def print_status(profile: Profile, results: str | Path | None = None, methods=None, seeds=None) -> None:
    """A line per run: state, cost, epochs, scores, speed; and what to do about those that need something."""
    runs = plan_runs(profile, results, methods, seeds)
    print()
    console = _console()
    console.print(status_table(profile, runs, console))
    for run in runs:
        state = run.state()
        if state in ("failed", "diverged"):
            print(f"{run.directory.name} {ending(read_record(run.directory))}; {run.again}")
        elif state == "waiting":
            print(f"{run.method} seed {run.seed} waits for its coefficients: {run.command('search')}")
        elif state == "running":
            print(f"{run.directory.name} is trained by {holder_of(run.directory)}")
        elif state == "stale":
            differences = "; ".join(run.differences(read_record(run.directory)))
            print(f"{run.directory.name} was made with {differences}; delete its folder to run it anew")
        elif state == "damaged":
            try:
                read_record(run.directory)
            except ValueError as error:
                print(error)
    sys.stdout.flush()


@contextlib.contextmanager
def live_table(profile: Profile, runs: Sequence[Run]) -> Iterator[None]:
    """Keep the table of `runs` at the foot of the terminal, below what is printed meanwhile. Without one: nothing."""
    console = _console()
    if not console.is_terminal:
        yield
        return
    known, options = {}, {"refresh_per_second": 0.5, "transient": True}  # who comes next prints how it is in the end

    def draw() -> Table | str:
        try:  # in rich's thread, which an error, of a file system that is gone, would end
            return status_table(profile, runs, console, console.height - 8, known)
        except (OSError, ValueError, TypeError) as error:
            return f"no status: {error}"

    with RichLive(console=console, get_renderable=draw, **options):
        yield


def watch(profile: Profile, results: str | Path | None = None) -> None:
    """Show the table until every run has ended, or until interrupted."""
    runs = plan_runs(profile, results)
    with contextlib.suppress(KeyboardInterrupt), live_table(profile, runs):
        while any(run.state() not in ENDED for run in runs) and sys.stdout.isatty():
            time.sleep(1)
    print_status(profile, results)


# ---- 3. In a notebook ----------------------------------------------------------------------------------------------


class Live:
    """Below a notebook's cell, while it trains: how far the run is and its curve, or a table of several runs, in place.

        with Live(run):
            record = run.train(data)

    HTML alone, which JupyterLab, VS Code, nbclient and papermill all show and save; no widgets. Where nobody looks on,
    because `effnet study` executes the notebook, and outside notebooks a line per epoch suffices: nothing is shown.
    seconds: between two looks. curve: whether it stays once the run is finished.
    """

    def __init__(self, *runs: Run, seconds: float = 1.0, curve: bool = True):
        self.runs, self.seconds, self.curve, self.known, self.drawn = runs, seconds, curve, {}, (0, "")
        self.ended, self.handle = threading.Event(), None

    def __enter__(self) -> "Live":
        from IPython import display, get_ipython

        if "EFFNET_STOP" not in os.environ and get_ipython() is not None:
            self.handle = display.display({"text/plain": ""}, raw=True, display_id=True)
            self._show("waiting")
            target = contextvars.copy_context().run  # so that the kernel knows whose output it is
            self.thread = threading.Thread(target=target, args=(self._follow,), daemon=True)
            self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self.handle is not None:
            self.ended.set()
            self.thread.join()
            stopped = kind is not None and issubclass(kind, KeyboardInterrupt)
            self._show("finished" if kind is None else "stopped" if stopped else "failed")

    def _follow(self) -> None:
        while not self.ended.wait(self.seconds):
            self._show("running")

    def _show(self, state: str) -> None:
        with contextlib.suppress(OSError, ValueError, TypeError):  # what is only seen must not end what is trained
            self.handle.update(self._bundle(state), raw=True)

    def _bundle(self, state: str) -> Mapping[str, str]:
        rows = progress(self.runs, self.known)
        text = "\n".join(f"{row.method}, seed {row.seed}: {_sentence(row)}" for row in rows.itertuples())
        if len(rows) > 1:
            body = "".join(
                f"<tr><td style='text-align:left'>{escape(row.method)}, seed {row.seed}</td><td>{_bar(row)}</td>"
                f"<td style='text-align:left'>{escape(_sentence(row))}</td></tr>"
                for row in rows.itertuples()
            )
            body = f"<table>{body}</table>"
        else:
            row = next(rows.itertuples())
            body = f"{_bar(row)} {escape(_sentence(row))}"
            body += self._curve() if self.curve or state in ("running", "stopped", "failed") else ""
        return {"text/plain": text, "text/html": f'<div class="effnet-live" data-state="{state}">{body}</div>'}

    def _curve(self) -> str:
        """Training loss and minival top-1 by epoch, as an image; drawn anew when an epoch has ended."""
        path = self.runs[0].directory / "history.jsonl"
        history = load_history(path.parent) if path.exists() else ()
        if len(history) > self.drawn[0]:
            self.drawn = (len(history), _drawn(history, self.runs[0].config.epochs))
        return self.drawn[1]


def _bar(row) -> str:
    epochs = 1 if pd.isna(row.epochs) else int(row.epochs)
    return f'<progress max="{epochs}" value="{row.done:.3f}" style="width:14em"></progress>'


def _sentence(row) -> str:
    """How far a run is, in words."""
    if row.state == "finished":
        epochs, scored = int(row.epochs), "minival " * row.on_minival
        scores = f"{scored}top-1 {row.top1:.2f} %, {row.images_per_second:,.0f} images/s, {_time(row.seconds)}"
        return f"finished after {epochs} epoch{'s' * (epochs > 1)}: {scores}"
    words = [row.state]
    scoring = not pd.isna(row.step) and row.step == row.steps
    if row.done or not pd.isna(row.step):
        words.append(
            f"epoch {min(math.ceil(row.done) if scoring else int(row.done) + 1, int(row.epochs))} of {int(row.epochs)}"
        )
    if not pd.isna(row.step):
        words.append("scoring" if scoring else f"step {int(row.step)} of {int(row.steps)}")
    pairs = (("loss {:.3f}", row.train_loss), ("minival top-1 {:.2f} %", row.minival_top1))
    pairs += (("{:,.0f} images/s", row.images_per_second),)
    words += [form.format(value) for form, value in pairs if not pd.isna(value)]
    words += [f"about {_time(row.left)} left"] if row.left > 0 and row.state in ("running", "interrupted") else []
    return ", ".join(words)


def _drawn(history: pd.DataFrame, epochs: int) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 2.2), layout="constrained", facecolor="white")  # pyplot belongs to the notebook
    left, right = figure.subplots(1, 2)
    for ax, name, title in ((left, "train_loss", "training loss"), (right, "minival_top1", "minival top-1 (%)")):
        ax.plot(history["epoch"], history[name], color="black", marker="." if len(history) < 30 else None)
        ax.set(title=title, xlabel="epoch", xlim=(0, epochs + 0.5))
        ax.xaxis.get_major_locator().set_params(integer=True)
    body = io.BytesIO()
    figure.savefig(body, format="png", dpi=100)
    image = base64.b64encode(body.getvalue()).decode()
    words = f"Training loss and minival top-1 after {len(history)} of {epochs} epochs"
    return f'<br><img alt="{words}" src="data:image/png;base64,{image}">'
