"""What is under way is seen: progress from files, a table in the terminal, a bar and curve in notebooks, events."""

import fcntl
import io
import os
import re
import time

import IPython
import IPython.display
import pytest
from conftest import Disturbed, write_record
from rich.console import Console

import effnet_study as study
from effnet_lib import Interrupted
from effnet_live import Live, progress, status_table
from effnet_records import hold, holder_of, read_progress, tell

TRAIN = {"epochs": 3, "batch_size": 20, "optimizer": "sgd", "lr": 0.05, "norm_momentum": 0.1}


class Handle:
    """What IPython's display returns; it keeps all that was shown."""

    def __init__(self):
        self.shown = []

    def update(self, bundle, raw):
        assert raw
        self.shown.append(bundle)

    def states(self):
        return [re.search('data-state="(.*?)"', bundle["text/html"])[1] for bundle in self.shown if len(bundle) > 1]


@pytest.fixture
def handle(monkeypatch):
    monkeypatch.delenv("EFFNET_STOP", raising=False)
    made = Handle()

    def display(bundle, raw, display_id):
        made.update(bundle, raw)
        return made

    monkeypatch.setattr(IPython, "get_ipython", object)
    monkeypatch.setattr(IPython.display, "display", display)
    return made


def test_a_run_says_how_far_it_is(profile_file, tmp_path):
    run = study.Run.plan(profile_file(train=TRAIN), "baseline", 0, tmp_path)
    seen = []

    def look(images):
        seen.append(progress([run]).iloc[0])
        return images

    run.train(Disturbed(study.load_data(**run.profile.data), look, epoch=1, step=1), "cpu")
    row = seen[0]
    assert row["state"] == "running" and 1 <= row["done"] < 2 and row["epochs"] == 3
    assert row["minival_top1"] == study.load_history(run.directory)["minival_top1"][0]
    assert row["left"] == pytest.approx(row["seconds"] / row["done"] * (3 - row["done"]))
    assert row["images_per_second"] > 0
    row = progress([run]).iloc[0]
    assert (
        row["state"] == "finished"
        and row["left"] == 0
        and row["top1"] == study.load_runs(run.profile, tmp_path)["top1"][0]
    )
    assert read_progress(run.directory) is None  # a finished run has no other traces


def test_what_is_left_of_a_run_that_has_not_started_is_what_another_seed_took(profile_file, tmp_path):
    profile = study.load_profile(profile_file(methods=["baseline", "width"], seeds=[0, 1]))
    runs = study.plan_runs(profile, tmp_path)
    write_record(runs[0], seconds=61.0)
    rows = progress(runs).set_index(["method", "seed"])
    assert rows["left"]["baseline", 1] == 61 and rows["left"].isna()["width", 0]


def test_progress_that_cannot_be_written_or_read_is_no_matter(tmp_path):
    tell(tmp_path / "not there", step=1)
    assert read_progress(tmp_path / "not there") is None
    (tmp_path / ".progress.json").write_text('{"epo')
    assert read_progress(tmp_path) is None


@pytest.mark.parametrize("width", [72, 80, 100, 120, 140])
def test_the_status_table_fits_the_terminal(profile_file, tmp_path, width):
    profile = study.load_profile(profile_file(methods=["baseline", "resolution_matched"]))
    runs = study.plan_runs(profile, tmp_path)
    write_record(runs[0], top1=61.25, seconds=12345.0)
    runs[1].directory.mkdir(parents=True)
    with hold(runs[1].directory):
        tell(runs[1].directory, epoch=1, step=7, steps=10, seconds=4000.0, images_per_second=12345.6, loss=1.0)
        console = Console(width=width, file=io.StringIO())
        console.print(status_table(profile, runs, console))
    said = console.file.getvalue()
    assert "…" not in said and re.search(r"baseline .*finished .*61\.25", said) and "1 finished, 1 running" in said
    assert ("top-5" in said) == (width == 140) and "0:28:34" in said  # left: three tenths of an epoch


def test_of_many_runs_those_under_way_are_shown(profile_file, tmp_path):
    profile = study.load_profile(profile_file(seeds=[0, 1, 2, 3]))
    runs = study.plan_runs(profile, tmp_path)
    runs[-1].directory.mkdir(parents=True)
    with hold(runs[-1].directory):
        table = status_table(profile, runs, lines=4)
    assert table.row_count == 4 and list(table.columns[2].cells)[-1].plain == "running"
    assert "1 running" in table.title and "19 missing" in table.title


def test_runs_that_have_ended_are_not_read_again(profile_file, tmp_path, monkeypatch):
    run = study.Run.plan(profile_file(), "baseline", 0, tmp_path)
    write_record(run, top1=61.25)
    known = {}
    assert progress([run], known)["top1"][0] == 61.25
    monkeypatch.setattr("effnet_live.read_record", None)
    assert progress([run], known)["top1"][0] == 61.25
    (run.directory / "run.json").unlink()
    assert progress([run], known)["state"][0] == "missing"


def test_a_second_attempt_does_not_show_the_firsts_progress(profile_file, tmp_path):
    run = study.Run.plan(profile_file(train=TRAIN), "baseline", 0, tmp_path)
    data, seen = study.load_data(**run.profile.data), []
    run.train(data, "cpu")
    run.set_aside()

    def look(images):
        seen.append(progress([run]).iloc[0])
        return images

    run.train(Disturbed(data, look, epoch=0, step=1), "cpu")
    assert seen[0]["state"] == "running" and seen[0]["done"] < 1 and seen[0]["minival_top1"] is None


def test_who_looks_is_not_taken_for_who_trains(tmp_path):
    with hold(tmp_path):
        assert f"process {os.getpid()}" in holder_of(tmp_path)
    with open(tmp_path / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # another who looks
        assert holder_of(tmp_path) is None


def test_status_is_watched_until_interrupted_or_without_a_terminal_told_once(profile_file, tmp_path, capsys):
    path = profile_file(methods=["baseline", "width"])
    assert study.main(["status", str(path), "--watch", "--results", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("2 missing") == 1


def test_a_notebooks_cell_shows_a_bar_and_a_curve_in_place(profile_file, tmp_path, handle):
    run = study.Run.plan(profile_file(train=TRAIN), "baseline", 0, tmp_path)
    live = Live(run, seconds=0.01)

    def wait(images):  # for the curve of the first epoch
        until = time.monotonic() + 60
        while "<img" not in handle.shown[-1]["text/html"] and time.monotonic() < until:
            live.ended.wait(0.01)
        return images

    with live:
        run.train(Disturbed(study.load_data(**run.profile.data), wait, epoch=1, step=1), "cpu")
    states = handle.states()
    assert states[0] == "waiting" and set(states[1:-1]) == {"running"} and states[-1] == "finished"
    running, last = (bundle["text/html"] for bundle in (handle.shown[-2], handle.shown[-1]))
    assert '<progress max="3"' in running and 'alt="Training loss and minival top-1 after' in running
    assert 'value="3.000"' in last and "after 3 of 3 epochs" in last and "finished after 3 epochs" in last
    assert "baseline, seed 0: finished after 3 epochs" in handle.shown[-1]["text/plain"]
    assert not any("about  left" in b["text/html"] or "about left" in b["text/html"] for b in handle.shown[1:])
    with Live(run, curve=False):
        pass
    assert "finished" in handle.shown[-1]["text/html"] and "<img" not in handle.shown[-1]["text/html"]


def test_a_cell_that_is_stopped_keeps_its_curve_and_says_how_to_go_on(profile_file, tmp_path, handle):
    run = study.Run.plan(profile_file(train=TRAIN), "baseline", 0, tmp_path)

    def stop(images):
        import signal

        signal.raise_signal(signal.SIGINT)
        return images

    with pytest.raises(Interrupted) as raised, Live(run):
        run.train(Disturbed(study.load_data(**run.profile.data), stop, epoch=1, step=0), "cpu")
    last = handle.shown[-1]["text/html"]
    assert handle.states()[-1] == "stopped" and "<img" in last
    assert re.search(r"interrupted, epoch 2 of 3, step [1-9]\d* of", last)  # where it goes on, by its checkpoint
    (line,) = raised.value._render_traceback_()
    assert "stopped by SIGINT in epoch 2" in line and line.endswith("Run the cell again to go on.")


def test_while_it_scores_a_run_says_so(profile_file, tmp_path, handle):
    run = study.Run.plan(profile_file(train=TRAIN), "baseline", 0, tmp_path)
    run.directory.mkdir(parents=True)
    at = {"steps": 7, "seconds": 1.0, "images_per_second": 3.0, "loss": None, "saved": 0}
    with hold(run.directory), Live(run) as live:
        tell(run.directory, epoch=1, step=7, **at)
        live._show("running")
        assert "running, epoch 1 of 3, scoring" in handle.shown[-1]["text/plain"]
        tell(run.directory, epoch=1, step=3, **at)
        live._show("running")
        assert "running, epoch 1 of 3, step 3 of 7" in handle.shown[-1]["text/plain"]


def test_several_runs_are_a_table_and_a_study_shows_nothing(profile_file, tmp_path, handle, monkeypatch):
    runs = study.plan_runs(study.load_profile(profile_file(methods=["baseline", "width"])), tmp_path)
    with Live(*runs):
        write_record(runs[1])
    assert handle.shown[-1]["text/html"].count("<tr>") == 2 and "width, seed 0" in handle.shown[-1]["text/html"]
    before = len(handle.shown)
    with monkeypatch.context() as patch:
        patch.setenv("EFFNET_STOP", str(tmp_path / "stop"))
        with Live(*runs):
            pass
    monkeypatch.setattr(IPython, "get_ipython", lambda: None)  # a script
    with Live(*runs):
        pass
    assert len(handle.shown) == before


def test_event_files_have_every_epoch_once(profile_file, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("EFFNET_TENSORBOARD", "1")
    run = study.Run.plan(profile_file(train=TRAIN), "baseline", 0, tmp_path)
    data = study.load_data(**run.profile.data)
    with pytest.raises(KeyboardInterrupt):
        run.train(data, "cpu", each_epoch=lambda row: (_ for _ in ()).throw(KeyboardInterrupt))
    run.train(data, "cpu")
    events = EventAccumulator(str(run.directory / "tensorboard"))
    events.Reload()
    history = study.load_history(run.directory)
    assert {"loss/train", "loss/minival", "top1/minival", "lr", "images_per_second"} <= set(events.Tags()["scalars"])
    points = events.Scalars("top1/minival")
    assert [(p.step, pytest.approx(p.value)) for p in points] == list(
        zip(history["epoch"], history["minival_top1"], strict=True)
    )


def test_without_the_wish_there_are_no_event_files(profile_file, tmp_path, monkeypatch):
    monkeypatch.delenv("EFFNET_TENSORBOARD", raising=False)
    run = study.Run.plan(profile_file(), "baseline", 0, tmp_path)
    run.train(study.load_data(**run.profile.data), "cpu")
    assert not (run.directory / "tensorboard").exists()
