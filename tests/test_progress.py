"""What is under way is seen: progress from files, a table in the terminal, a bar and curve in notebooks, events."""

import fcntl
import io
import os
import re
import signal
import sys
import time

import IPython
import IPython.display
import pytest
from conftest import Disturbed, write_record
from rich.console import Console

from effnet_study.cli import main
from effnet_study.data.load import load_data
from effnet_study.files import hold, holder_of, load_history, read_progress, write_history, write_progress
from effnet_study.profile import load_profile
from effnet_study.progress import live, progress, status_table
from effnet_study.run import Run, plan_runs
from effnet_study.search import all_candidates
from effnet_study.stop import Interrupted

TRAIN = {"epochs": 3, "batch_size": 20, "optimizer": "sgd", "lr": 0.05, "norm_momentum": 0.1}
SMALL = {"train": TRAIN, "baseline": {"depth": 0.3, "width": 0.25}}


def begin(run, **changes):
    """Write what a run has on disk in its second of four epochs, after 5 of 20 steps."""
    run.run_dir.mkdir(parents=True, exist_ok=True)
    row = {"epoch": 1, "train_loss": 2.0, "minival_top1": 12.5, "images_per_second": 9.0, "seconds": 60.0}
    write_history(run.run_dir, [row])
    at = {"epoch": 2, "step": 5, "steps": 20, "seconds": 10.0, "images_per_second": 8.0, "loss": 1.25, "saved": 2}
    write_progress(run.run_dir, **at | changes)


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
    run = Run.plan(profile_file(train=TRAIN | {"epochs": 4}), "baseline", 0, tmp_path)
    begin(run)
    with hold(run.run_dir):
        row = progress([run]).iloc[0].to_dict()
    expected = {"state": "running", "epochs": 4, "done": 1.25, "train_loss": 1.25}
    expected |= {"minival_top1": 12.5, "images_per_second": 8, "top1": None, "top5": None}
    expected |= {"seconds": 70, "left": 154}  # 70 s for 1.25 epochs, so 56 s for each of the 2.75 others
    assert {name: row[name] for name in expected} == expected
    (run.run_dir / "checkpoint.pt").touch()  # no process trains it now, so it goes on after step 2, 4 s into the epoch
    row = progress([run]).iloc[0]
    assert (row["state"], row["done"], row["seconds"]) == ("interrupted", 1.1, 64)
    assert row["left"] == pytest.approx(64 / 1.1 * 2.9)
    begin(run, epoch=1)  # left by a process that was killed after it had written the first epoch
    row = progress([run]).iloc[0]
    assert (row["done"], row["seconds"], row["left"]) == (1, 60, 180)
    write_record(run, top1=61.25, seconds=300.0, images_per_second=7.5)
    row = progress([run]).iloc[0]
    assert (row["state"], row["done"], row["left"], row["seconds"]) == ("finished", 4, 0, 300)
    assert (row["top1"], row["top5"], row["images_per_second"], row["minival_top1"]) == (61.25, 90, 7.5, 12.5)


def test_what_is_left_of_a_run_that_has_not_started_is_what_another_seed_takes(profile_file, tmp_path):
    train = TRAIN | {"epochs": 4}
    profile = load_profile(profile_file(methods=["baseline", "width", "depth"], seeds=[0, 1], train=train))
    runs = plan_runs(profile, tmp_path)
    write_record(runs[0], seconds=61.0)
    begin(runs[1])
    with hold(runs[1].run_dir):
        rows = progress(runs).set_index(["method", "seed"])
        title = status_table([runs[0], runs[1], runs[3], runs[4]], Console(width=140, file=io.StringIO())).title
        assert "left" not in status_table(runs, Console(width=140, file=io.StringIO())).title  # depth's is not known
    assert rows["left"]["baseline", 1] == 61 and rows["left"]["width", 1] == 70 + 154
    assert rows["left"].isna()["depth", 0] and rows["left"]["width", 0] == 154
    assert "1 finished, 1 running, 2 missing; about 0:07:19 left" in title  # 154 + 61 + 224 s, one after the other


def test_progress_that_cannot_be_written_or_read_is_no_matter(tmp_path):
    write_progress(tmp_path / "not there", step=1)
    assert read_progress(tmp_path / "not there") is None
    (tmp_path / ".progress.json").write_text('{"epo')
    assert read_progress(tmp_path) is None


@pytest.mark.parametrize("width", [72, 119, 120])
def test_the_status_table_fits_the_terminal(profile_file, tmp_path, width):
    profile = load_profile(profile_file(methods=["baseline", "resolution_matched"]))
    runs = plan_runs(profile, tmp_path)
    write_record(runs[0], top1=61.25, seconds=12345.0)
    runs[1].run_dir.mkdir(parents=True)
    with hold(runs[1].run_dir):
        write_progress(runs[1].run_dir, epoch=1, step=7, steps=10, seconds=4000.0, images_per_second=12345.6, loss=1.0)
        console = Console(width=width, file=io.StringIO())
        console.print(status_table(runs, console))
    said = console.file.getvalue()
    assert "…" not in said and re.search(r"baseline .*finished .*61\.25", said) and "1 finished, 1 running" in said
    assert "0:28:34" in said  # left: three tenths of an epoch
    optional = ["top-5", "3:25:45", "images/s", "seed"]  # a header, or the time of the finished run
    assert [name for name in optional if name in said] == (optional if width >= 120 else [])


def test_of_many_runs_those_under_way_are_shown(profile_file, tmp_path):
    profile = load_profile(profile_file(seeds=[0, 1, 2, 3]))
    runs = plan_runs(profile, tmp_path)
    runs[-1].run_dir.mkdir(parents=True)
    with hold(runs[-1].run_dir):
        table = status_table(runs, Console(width=140), lines=4)
    assert table.row_count == 1 and next(iter(table.columns[2].cells)).plain == "running"
    assert "1 running" in table.title and "19 missing" in table.title


def test_runs_that_have_ended_are_not_read_again(profile_file, tmp_path, monkeypatch):
    run = Run.plan(profile_file(), "baseline", 0, tmp_path)
    write_record(run, top1=61.25)
    known = {}
    assert progress([run], known)["top1"][0] == 61.25
    with monkeypatch.context() as patch:
        patch.setattr("effnet_study.progress.read_record", None)
        assert progress([run], known)["top1"][0] == 61.25
    write_record(run, top1=62.5)  # another attempt
    os.utime(run.run_dir / "run.json", (1, 1))
    assert progress([run], known)["top1"][0] == 62.5
    (run.run_dir / "run.json").unlink()
    assert progress([run], known)["state"][0] == "missing"


def test_a_second_attempt_does_not_show_the_firsts_progress(profile_file, tmp_path):
    run, seen = Run.plan(profile_file(**SMALL), "baseline", 0, tmp_path), []
    write_record(run, status="failed", error="no", **run.about)
    begin(run)
    run.set_aside()

    def look(images):
        seen.append(progress([run]).iloc[0])
        signal.raise_signal(signal.SIGINT)
        return images

    with pytest.raises(Interrupted):
        run.train(Disturbed(load_data(**run.profile.data.given()), look, epoch=0, step=1), "cpu")
    assert seen[0]["state"] == "running" and seen[0]["done"] < 1 and seen[0]["minival_top1"] is None


def test_who_looks_is_not_taken_for_who_trains(tmp_path):
    with hold(tmp_path):
        assert f"process {os.getpid()}" in holder_of(tmp_path)
    with open(tmp_path / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # another who looks
        assert holder_of(tmp_path) is None


def test_status_is_watched_until_interrupted_or_without_a_terminal_told_once(profile_file, tmp_path, capsys):
    path = profile_file(methods=["baseline", "width"])
    assert main(["status", str(path), "--watch", "--results", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("2 missing") == 1


def test_a_notebooks_cell_shows_a_bar_and_a_table_in_place(profile_file, tmp_path, handle, monkeypatch):
    monkeypatch.delenv("EFFNET_TENSORBOARD", raising=False)
    run = Run.plan(profile_file(**SMALL), "baseline", 0, tmp_path)
    seen = []

    def wait(images):  # for the score of the first epoch
        until = time.monotonic() + 60
        while not re.search("running +1.*/3", handle.shown[-1]["text/plain"]) and time.monotonic() < until:
            time.sleep(0.01)
        seen.append(progress([run]).iloc[0])
        return images

    with live(run, seconds=0.01):
        run.train(Disturbed(load_data(**run.profile.data.given()), wait, epoch=1, step=1), "cpu")
    assert seen[0]["state"] == "running" and 1 <= seen[0]["done"] < 2
    assert seen[0]["minival_top1"] == load_history(run.run_dir)["minival_top1"][0]
    states = handle.states()
    assert set(states[:-1]) == {"running"} and states[-1] == "finished"
    assert '<progress max="3" value="3.000"' in handle.shown[-1]["text/html"]
    assert re.search(r"baseline +0 +finished +3/3 ", handle.shown[-1]["text/plain"])
    assert read_progress(run.run_dir) is None  # a finished run has no other traces
    assert not (run.run_dir / "tensorboard").exists()  # which was not asked for


def test_a_run_without_tensorboard_has_not_failed(profile_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if it were not installed
    run = Run.plan(profile_file(**SMALL), "baseline", 0, tmp_path)
    with pytest.raises(ModuleNotFoundError):
        run.train(load_data(**run.profile.data.given()), "cpu", tensorboard=True)
    assert run.state() == "missing"


def test_a_cell_that_is_stopped_says_how_to_go_on_and_event_files_have_every_epoch_once(profile_file, tmp_path, handle):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = Run.plan(profile_file(**SMALL), "baseline", 0, tmp_path)
    data = load_data(**run.profile.data.given())

    def stop(images):
        signal.raise_signal(signal.SIGINT)
        return images

    with pytest.raises(Interrupted) as raised, live(run):
        run.train(Disturbed(data, stop, epoch=1, step=0), "cpu", tensorboard=True)
    assert handle.states()[-1] == "stopped"
    assert re.search(r"interrupted +1\.\d+/3", handle.shown[-1]["text/plain"])  # where it goes on, by its checkpoint
    (line,) = raised.value._render_traceback_()
    assert "stopped by SIGINT in epoch 2" in line and line.endswith("Run the cell again to go on.")
    short = [RuntimeError("can't allocate memory")]

    def fail(images):
        if short:
            raise short.pop()
        return images

    run.train(Disturbed(data, fail, epoch=2, step=0), "cpu", tensorboard=True)  # goes back to a checkpoint once
    assert not short
    events = EventAccumulator(str(run.run_dir / "tensorboard"))
    events.Reload()
    history = load_history(run.run_dir)
    assert {"loss/train", "loss/minival", "top1/minival", "lr", "images_per_second"} <= set(events.Tags()["scalars"])
    points = events.Scalars("top1/minival")
    assert [(p.step, pytest.approx(p.value)) for p in points] == list(
        zip(history["epoch"], history["minival_top1"], strict=True)
    )


def test_a_cell_shows_how_far_its_run_is(profile_file, tmp_path, handle):
    run = Run.plan(profile_file(train=TRAIN | {"epochs": 4}), "baseline", 0, tmp_path)

    def said():
        show("running")
        text = " ".join(handle.shown[-1]["text/plain"].split())
        assert text == " ".join(re.sub("<.*?>", "", handle.shown[-1]["text/html"]).split())
        return text.partition(" baseline ")[2]

    with live(run, seconds=1000) as show:
        assert said() == "0 missing 0/4"
        begin(run)
        with hold(run.run_dir):
            assert said() == "0 running 1.25/4 1.250 12.50 8 0:01:10 0:02:34"
            assert '<progress max="4" value="1.250"' in handle.shown[-1]["text/html"]
        write_record(run, top1=61.25, seconds=3661.0, images_per_second=1234.0)
        assert said().startswith("0 finished 4/4 2.000 12.50 61.25 90.00 1,234 1:01:01")


def test_the_score_of_a_candidate_is_not_taken_for_one_on_test(profile_file, tmp_path):
    search = {"step": 0.5, "max_flops": 2.5, "seeds": [0], "train": {"epochs": 1}}
    profile = load_profile(profile_file(methods=["baseline", "compound_searched"], search=search))
    candidate = all_candidates(profile, tmp_path)[0]
    begin(candidate)
    write_record(candidate, top1=31.0)
    row = progress([candidate]).iloc[0]
    assert row["state"] == "finished" and row["minival_top1"] == 12.5 and row["top1"] is None


def test_several_runs_have_one_bar_and_a_study_shows_nothing(profile_file, tmp_path, handle, monkeypatch):
    runs = plan_runs(load_profile(profile_file(methods=["baseline", "width"])), tmp_path)
    with live(*runs):
        write_record(runs[1])
    assert handle.shown[-1]["text/html"].count('<progress max="2" value="1.000">') == 1
    assert {"baseline", "width"} <= set(handle.shown[-1]["text/html"].split())
    before = len(handle.shown)
    with monkeypatch.context() as patch:
        patch.setenv("EFFNET_STOP", str(tmp_path / "stop"))
        with live(*runs):
            pass
    monkeypatch.setattr(IPython, "get_ipython", lambda: None)  # a script
    with live(*runs):
        pass
    assert len(handle.shown) == before
