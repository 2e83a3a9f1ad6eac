"""What is under way is seen: progress from files, a table in the terminal, a bar and curve in notebooks, events."""

import re

import IPython
import IPython.display
import pytest
from conftest import Disturbed, write_record

import effnet_study as study
from effnet_lib import Interrupted
from effnet_live import Live, progress, status_table
from effnet_records import read_progress, tell

TRAIN = {"epochs": 3, "batch_size": 20, "optimizer": "sgd", "lr": 0.05, "norm_momentum": 0.1}


class Handle:
    """What IPython's display returns; it keeps all that was shown."""

    def __init__(self):
        self.shown = []

    def update(self, bundle, raw):
        assert raw
        self.shown.append(bundle)

    def states(self):
        return [re.search('data-state="(.*?)"', bundle["text/html"])[1] for bundle in self.shown]


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


def test_progress_that_cannot_be_written_does_not_end_a_run(tmp_path, monkeypatch):
    tell(tmp_path / "not there", step=1)
    assert read_progress(tmp_path / "not there") is None
    (tmp_path / ".progress.json").write_text('{"epo')
    assert read_progress(tmp_path) is None


def test_the_status_table_fits_a_narrow_terminal(profile_file, tmp_path, capsys):
    path = profile_file(methods=["baseline", "width"])
    profile = study.load_profile(path)
    runs = study.plan_runs(profile, tmp_path)
    write_record(runs[0], top1=61.25)
    wide, narrow = ([c.header for c in status_table(profile, runs, width).columns] for width in (140, 80))
    assert set(narrow) < set(wide) and {"method", "seed", "state", "top-1 %", "images/s", "left"} <= set(narrow)
    assert study.main(["status", str(path), "--watch", "--results", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"baseline +0 +finished .* 61\.25", said) and "1 finished, 1 missing" in said


def test_a_notebooks_cell_shows_a_bar_and_a_curve_in_place(profile_file, tmp_path, handle):
    run = study.Run.plan(profile_file(train=TRAIN), "baseline", 0, tmp_path)
    live = Live(run, seconds=0.01)

    def wait(images):  # for the curve of the first epoch
        while "<img" not in handle.shown[-1]["text/html"]:
            live.ended.wait(0.01)
        return images

    with live:
        run.train(Disturbed(study.load_data(**run.profile.data), wait, epoch=1, step=1), "cpu")
    states = handle.states()
    assert states[0] == "waiting" and set(states[1:-1]) == {"running"} and states[-1] == "finished"
    running, last = (bundle["text/html"] for bundle in (handle.shown[-2], handle.shown[-1]))
    assert '<progress max="3"' in running and 'alt="Training loss and minival top-1 after' in running
    assert 'value="3.000"' in last and "<img" not in last and "finished after 3 epochs" in last
    assert "baseline, seed 0: finished after 3 epochs" in handle.shown[-1]["text/plain"]


def test_a_cell_that_is_stopped_keeps_its_curve_and_says_how_to_go_on(profile_file, tmp_path, handle):
    run = study.Run.plan(profile_file(train=TRAIN), "baseline", 0, tmp_path)

    def stop(images):
        import signal

        signal.raise_signal(signal.SIGINT)
        return images

    with pytest.raises(Interrupted) as raised, Live(run):
        run.train(Disturbed(study.load_data(**run.profile.data), stop, epoch=1, step=1), "cpu")
    assert handle.states()[-1] == "stopped" and "<img" in handle.shown[-1]["text/html"]
    (line,) = raised.value._render_traceback_()
    assert "stopped by SIGINT in epoch 2" in line and line.endswith("Run the cell again to go on.")


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
