"""Nothing is ever lost: kills, time budgets, signals, full disks, torn and foreign files, records that are true."""

import errno
import json
import math
import os
import random
import resource
import signal
import stat
import time
from pathlib import Path
from unittest import mock

import kill
import pytest
import torch
import yaml
from conftest import SMALL_PROFILE, Disturbed, write_record
from hypothesis import HealthCheck, example, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from small import small_config, small_net
from test_reference import REFERENCE, as_recorded
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import effnet_lib
from effnet_lib import TrainConfig
from effnet_study import parallel, training
from effnet_study import stop as stopping
from effnet_study.analysis.recipes import load_pilots
from effnet_study.cli import duration, main
from effnet_study.coefficients import made_by
from effnet_study.data.load import load_data
from effnet_study.data.sources import DataSettings
from effnet_study.execution import local
from effnet_study.execution.notebook import run_notebook
from effnet_study.files import (
    CHECKPOINTS,
    RunLocked,
    RunMismatch,
    holder_of,
    load_history,
    read_checkpoint,
    replace_file,
    write_checkpoint,
    write_json,
)
from effnet_study.profile import Profile, load_profile
from effnet_study.progress import print_status
from effnet_study.record import read_record
from effnet_study.record import write_record as save_record
from effnet_study.run import Run, load_runs, plan_runs, rerun
from effnet_study.search import plan_search
from effnet_study.stop import Interrupted, Stop
from effnet_study.training import train


@pytest.fixture
def profile_file(profile_file):
    """As in conftest.py, with a small baseline."""
    return lambda name="tiny", **changes: profile_file(name, **{"baseline": {"depth": 0.3, "width": 0.25}} | changes)


def same_end(one, other):
    return kill.end_of(one) == kill.end_of(other)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, digits):
    """The folder of a run that was never interrupted."""
    run_dir = tmp_path_factory.mktemp("whole")
    train(small_net(), digits, small_config(), run_dir, device="cpu")
    return run_dir


# ---- going on


def test_a_kill_while_a_checkpoint_is_written_changes_nothing(tmp_path):
    """In processes of their own, with one thread each: with more, sums are taken in another order."""
    for name, place, nth, code in (
        ("killed", "half a file", 6, -signal.SIGKILL),
        ("killed", None, 0, 0),
        ("peace", None, 0, 0),
    ):
        process = kill.start(tmp_path / name, place, nth)
        process.join()
        assert process.exitcode == code
    assert same_end(tmp_path / "killed", tmp_path / "peace")


@pytest.mark.slow
def test_a_kill_at_each_of_the_worst_places_changes_nothing(tmp_path):
    done = kill.kill([*kill.PLACES, None, None, None], tmp_path)
    assert done["kills"] == 10 and done["places"] == {**dict.fromkeys(kill.PLACES, 1), "any time": 3}


def test_stops_at_any_step_and_while_scoring_change_nothing(tmp_path, digits, whole, monkeypatch):
    rng, said = random.Random(1), []

    def due(stop, to_save):
        stop.reason = "a whim"
        return rng.random() < 0.2

    monkeypatch.setattr(Stop, "due", due)
    while read_record(tmp_path) is None:
        try:
            train(small_net(seed=len(said)), digits, small_config(), tmp_path)
        except Interrupted as error:
            said.append(str(error))
            assert "stopped by a whim in " in said[-1] and (tmp_path / "checkpoint.pt").exists()
    assert len(said) >= 4 and any("in the scoring of test, which will start again" in words for words in said)
    assert same_end(tmp_path, whole)


class Noted(Disturbed):
    """A data set that notes the labels of each batch that is read, and creates `file` as a given one is."""

    def __init__(self, data, file, epoch, step):
        super().__init__(data, None, epoch, step)
        self.file, self.read = file, {}

    def train_batches(self, config, epoch, start=0):
        for step, (images, labels) in enumerate(self.data.train_batches(config, epoch, start), start):
            if (epoch, step) == self.where:
                self.file.touch()
            self.read.setdefault((epoch, step), []).append(labels)
            yield images, labels


def test_a_stopped_run_reads_the_recorded_batches_and_comes_to_the_recorded_losses(tmp_path, monkeypatch):
    """Against tests/reference.json, which another version of this code wrote, and not against this code."""
    then, file = REFERENCE["runs"]["plain"], tmp_path / "stop"
    settings = {"name": "plain", "title": "plain", "purpose": "check", "base_resolution": 24, "train": then["train"]}
    settings |= {"stem_stride": then["stem_stride"], "baseline": effnet_lib.Scaling(0.5, 0.5), "seeds": (then["seed"],)}
    settings |= {"groups": ((then["method"],),), "data": DataSettings(name="digits", size=32, train_per_class=40)}
    run = Run(Profile(**settings), then["method"], then["seed"], tmp_path)
    monkeypatch.setenv("EFFNET_STOP", str(file))
    data = Noted(load_data("digits", size=32, train_per_class=40), file, 1, 0)
    with pytest.raises(Interrupted, match="stopped by its study in epoch 2 after step 1 of 6"):
        run.train(data, "cpu")
    file.unlink()
    record = run.train(data, "cpu")
    assert sorted(data.read) == [(epoch, step) for epoch in range(3) for step in range(400 // 64)]
    assert all(len(read) == 1 for read in data.read.values())  # each once
    for batch in then["batches"]:
        assert data.read[batch["epoch"], batch["step"]][0].tolist()[: len(batch["labels"])] == batch["labels"]
    now = [[row.train_loss, row.minival_loss] for row in load_history(run.run_dir).itertuples()]
    assert now == as_recorded(then)
    assert record["test"]["loss"] == pytest.approx(then["test_loss"], rel=0.15)


def test_the_deadline_leaves_time_for_a_step_and_a_checkpoint(monkeypatch):
    monkeypatch.setattr(stopping.time, "time", lambda: now)
    now, stop = 100.0, Stop(deadline=110.0)
    assert not stop.due(to_save=1.0)
    now = 103.0  # a step takes 3 seconds, saving 1
    assert not stop.due(to_save=0.4)
    now = 104.0  # a step takes 1 second, saving 2: the time would do for it, but not twice over
    assert stop.due(to_save=2.1) and stop.reason == "the end of its time"
    monkeypatch.setenv("EFFNET_DEADLINE", "105")
    assert Stop(None).due(to_save=1.0)


def signalling(data, number=signal.SIGTERM):
    """A data set that sends this process a signal in the middle of its second epoch."""

    def send(images):
        os.kill(os.getpid(), number)
        return images

    return Disturbed(data, send)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_training_at_the_next_step(tmp_path, digits, whole, number):
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=f"stopped by {number.name} in epoch 2 after step 3 of 10"):
        train(small_net(), signalling(digits, number), small_config(), tmp_path)
    assert signal.getsignal(number) == before
    train(small_net(), digits, small_config(), tmp_path)
    assert same_end(tmp_path, whole)


def test_a_second_interrupt_some_seconds_later_does_not_wait_for_the_step(monkeypatch):
    now = 10.0
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now)
    with Stop() as stop:
        signal.raise_signal(signal.SIGINT)
        now = 11.5
        signal.raise_signal(signal.SIGINT)  # a launcher repeats it
        assert stop.reason == "SIGINT" and stop.due()
        now = 12.5
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_an_interrupt_after_a_sigterm_is_the_first_one(monkeypatch):
    now = 10.0
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now)
    with Stop() as stop:
        signal.raise_signal(signal.SIGTERM)
        now = 20.0
        signal.raise_signal(signal.SIGINT)
    assert stop.reason == "SIGINT"


def test_checkpoints_come_by_steps_and_the_last_two_are_kept(tmp_path, digits):
    with pytest.raises(Interrupted):
        train(small_net(), signalling(digits), small_config(save_steps=2), tmp_path)
    states = [torch.load(tmp_path / name, weights_only=True)["progress"] for name in CHECKPOINTS]
    assert [state["step"] for state in states] == [3, 2] and len(states[0]["history"]) == 1


def test_checkpoints_come_by_time(tmp_path, digits, monkeypatch):
    """The clock is moved by 100 seconds with every batch that is read."""
    clock, saved = [0.0], []
    monkeypatch.setattr("effnet_study.training.time.monotonic", lambda: clock[0])
    write = training.write_checkpoint
    monkeypatch.setattr(
        training,
        "write_checkpoint",
        lambda where, state: (saved.append(state["progress"]["step"]), write(where, state)),
    )

    class Slow(Disturbed):
        def train_batches(self, config, epoch, start=0):
            for batch in self.data.train_batches(config, epoch, start):
                clock[0] += 100
                yield batch

    train(small_net(), Slow(digits, None), small_config(epochs=1, save_seconds=350.0), tmp_path)
    assert saved == [4, 8, 0]


class Clock:
    """The time of the operating system and what a test has added to it."""

    def __init__(self):
        self.added, self.monotonic = 0.0, time.monotonic

    def time(self):
        return time.time() + self.added

    def move(self, images):
        self.added += 3600
        return images


def test_the_train_command_stops_in_time_and_says_so(profile_file, tmp_path, capsys, monkeypatch):
    """An hour passes in the middle of the second epoch."""
    path = profile_file(train={"epochs": 3, "batch_size": 10, "optimizer": "sgd", "lr": 0.05})
    words = ["train", str(path), "baseline", "--results", str(tmp_path), "--device", "cpu", "--time-budget", "30m"]
    clock = Clock()
    monkeypatch.setattr(stopping, "time", clock)
    monkeypatch.setattr("effnet_study.cli.load_data", lambda **given: Disturbed(load_data(**given), clock.move))
    assert main(words) == 75
    said = capsys.readouterr().err
    assert "stopped by the end of its time in epoch 2 after step 3 of 4" in said
    assert "EFFNET_DEADLINE" not in os.environ and "the same command continues" in said
    assert Run.plan(path, "baseline", 0, tmp_path).state() == "interrupted"


@pytest.mark.slow
def test_a_notebook_stops_in_time_and_leaves_no_half_one(profile_file, tmp_path):
    path = profile_file(methods=["baseline"], train={"epochs": 2, "batch_size": 20, "optimizer": "sgd", "lr": 0.05})
    run = Run.plan(path, "baseline", 0, tmp_path)
    parameters = {"profile": str(path), "results": str(tmp_path)}
    deadline = 1.0  # long past: it stops after its first step
    with pytest.raises(Interrupted):
        run_notebook("01_baseline_b0", run.executed, parameters, threads=1, deadline=deadline)
    assert run.state() == "interrupted" and list(run.executed.parent.iterdir()) == []


@pytest.mark.slow
def test_several_processes_stop_together_and_go_on(profile_file, tmp_path, capfd):
    train = {"epochs": 2, "batch_size": 20, "optimizer": "sgd", "lr": 0.05}
    run = Run.plan(profile_file(devices=2, train=train), "baseline", 0, tmp_path)
    data = load_data(**run.profile.data.given())
    with pytest.raises(Interrupted, match="stopped by the end of its time in epoch 1 after step 2 of 2"):
        run.train(data, "cpu", deadline=1.0)  # long past: they stop where they first meet
    assert run.state() == "interrupted" and read_record(run.run_dir) is None
    assert run.train(data, "cpu")["devices"] == 2 and len(load_history(run.run_dir)) == 2
    assert "continues in epoch 1 after step 2" in capfd.readouterr().out


def test_a_study_without_time_starts_nothing(profile_file, tmp_path, capsys):
    assert main(["study", str(profile_file()), "--results", str(tmp_path), "--time-budget", "15s"]) == 75
    assert "too little time is left" in capsys.readouterr().err
    assert not (tmp_path / "tiny" / "notebooks").exists()


@pytest.mark.parametrize(
    "text, seconds", [("90", 90), ("90s", 90), ("9m", 540), ("1h", 3600), ("1h30m", 5400), ("2h5s", 7205)]
)
def test_times_are_read(text, seconds):
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["", "9 m", "-3", "1d", "m", "1h30", "1m30"])
def test_what_is_no_time_is_refused(text, capsys):
    assert main(["train", "quick", "baseline", f"--time-budget={text}"]) == 2
    assert "expected a time such as 90s, 9m or 1h30m" in capsys.readouterr().err


def test_the_order_of_runs_changes_nothing(profile_file, tmp_path):
    path = profile_file()
    data, runs = load_data(**load_profile(path).data.given()), []
    for place, method in (("one", "baseline"), ("one", "width"), ("other", "baseline"), ("another", "width")):
        runs.append(Run.plan(path, method, 0, tmp_path / place))
        runs[-1].train(data, "cpu")
    assert same_end(runs[0].run_dir, runs[2].run_dir) and same_end(runs[1].run_dir, runs[3].run_dir)


# ---- who holds a run


def test_the_holder_of_a_run_is_named_and_a_dead_one_holds_nothing(tmp_path, digits):
    held = kill.CONTEXT.Event()
    holder = kill.CONTEXT.Process(target=kill.hold_for_ever, args=(str(tmp_path), held))
    holder.start()
    try:
        assert held.wait(600)
        assert holder_of(tmp_path).startswith(f"process {holder.pid} on ")
        with pytest.raises(RunLocked, match=f"held by another process.*: process {holder.pid} on "):
            train(small_net(), digits, small_config(), tmp_path)
    finally:
        holder.kill()
        holder.join()
    assert holder_of(tmp_path) is None
    (tmp_path / ".run.json.1.partial").write_text("half")
    assert train(small_net(), digits, small_config(epochs=1), tmp_path)["status"] == "finished"
    assert not list(tmp_path.glob(".*partial*")) and not list(tmp_path.glob("checkpoint*"))


# ---- divergence


def poisoned(data):
    """A data set with a batch that holds infinite pixels."""
    return Disturbed(data, lambda images: images.index_fill(0, torch.tensor([0]), math.inf))


def test_divergence_is_told_with_its_very_step(tmp_path, digits, capsys):
    record = train(small_net(), poisoned(digits), small_config(schedule="linear", warmup_fraction=0.0), tmp_path)
    assert record == read_record(tmp_path) and record["status"] == "diverged" and "test" not in record
    # The 13th of 30 steps, at whose middle 17.5 / 30 of the rate are left
    assert record["diverged"] == {"epoch": 2, "step": 3, "lr": pytest.approx(0.05 * 17.5 / 30)}
    assert "diverged in epoch 2, step 3, at LR 0.0292" in capsys.readouterr().out
    assert len(load_history(tmp_path)) == 1 and record["minival"]["top1"] > 10
    assert not (tmp_path / ".progress.json").exists() and (tmp_path / "checkpoint.pt").exists()


def test_a_gradient_that_is_not_finite_is_divergence(tmp_path, digits):
    model = small_net()
    model.classifier.bias.register_hook(lambda gradient: gradient * math.inf)
    record = train(model, digits, small_config(), tmp_path)
    assert record["status"] == "diverged" and record["diverged"]["step"] == 1
    assert record["images_per_second"] is None and record["minival"] == {"top1": None, "top5": None, "loss": None}


def test_fp16_skips_a_step_that_overflows_and_goes_on(tmp_path, digits, monkeypatch):
    """The gradient scaler starts at 65,536: the first steps of a network whose loss is large overflow."""
    model = small_net()
    with torch.no_grad():
        model.classifier.weight.mul_(3000)
    trainer = effnet_lib.Trainer(model, small_config(precision="fp16"), torch.device("cpu"))
    before, scale = [p.clone() for p in model.parameters()], trainer.scaler.get_scale()
    images, labels = next(digits.train_batches(small_config(), 0))
    trainer.step(images, labels, 0, 0, 5)
    assert trainer.scaler.get_scale() < scale
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    config, model = small_config(precision="fp16", epochs=1), small_net()
    with torch.no_grad():
        model.classifier.weight.mul_(30)
    assert train(model, digits, config, tmp_path / "some")["status"] == "finished"
    monkeypatch.setattr(torch.amp.GradScaler, "get_scale", lambda scaler: 1e-6)  # no step is taken any more
    record = train(small_net(), digits, config, tmp_path / "all")
    assert record["status"] == "diverged" and record["diverged"]["step"] == 10


def test_a_diverged_run_is_not_trained_again_unless_asked_for(profile_file, tmp_path):
    settings = {"epochs": 2, "batch_size": 10, "optimizer": "sgd", "lr": 0.05, "norm_momentum": 0.1}
    run = Run.plan(profile_file(train=settings), "baseline", 0, tmp_path)
    data = load_data(**run.profile.data.given())
    for _ in range(2):  # trained, then found
        with pytest.raises(RuntimeError, match="diverged in epoch 2, step 3, at LR"):
            run.train(poisoned(data), "cpu")
    assert (run.run_dir / "checkpoint.pt").exists() and not run.is_to_do() and run.is_to_do(retry=True)
    run.set_aside()  # a run that diverged starts again
    assert run.state() == "missing" and run.train(data, "cpu")["status"] == "finished"
    assert read_record(run.run_dir, "run.earlier.json")["status"] == "diverged"


# ---- disks and folders


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """A power cut may come at any time: content is flushed before the rename, and the folder after it."""
    done, rename = [], Path.replace

    def flush(descriptor):
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")

    def replace(path, target):
        done.append(f"{target.name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(Path, "replace", replace)
    for content in (1, 2):
        write_json(tmp_path / "one.json", content)
        write_checkpoint(tmp_path, {"model": content})
    new = ["file", "one.json", "folder", "file", "checkpoint.pt", "folder"]
    assert done == [*new, *new[:4], "checkpoint.previous.pt", *new[4:]]
    assert json.loads((tmp_path / "one.json").read_text()) == 2
    assert [torch.load(tmp_path / name)["model"] for name in CHECKPOINTS] == [2, 1]


def test_what_a_failed_write_leaves_is_the_old_file(tmp_path):
    path = tmp_path / "kept.txt"
    replace_file(path, "old")
    for content in (lambda file: file.write_text("half") and 1 / 0, None):
        with pytest.raises((ZeroDivisionError, TypeError)):
            replace_file(path, content)
        assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match=r"No such file or directory: '.*missing"):
        replace_file(tmp_path / "missing" / "kept.txt", b"new")


def test_a_full_disk_is_told_and_the_next_start_goes_on(tmp_path, digits, whole):
    with pytest.raises(Interrupted):
        train(small_net(), signalling(digits), small_config(), tmp_path / "full")
    kept = {path.name: path.read_bytes() for path in (tmp_path / "full").glob("checkpoint*")}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # as a quota would
        with pytest.raises(OSError, match=r"File too large: '.*checkpoint\.pt'"):
            train(small_net(), digits, small_config(), tmp_path / "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert kept == {path.name: path.read_bytes() for path in (tmp_path / "full").glob("checkpoint*")}
    assert not list((tmp_path / "full").glob("*partial*")) and read_record(tmp_path / "full") is None
    train(small_net(), digits, small_config(), tmp_path / "full")
    assert same_end(tmp_path / "full", whole)


def test_a_disk_that_is_full_at_any_write_loses_nothing(tmp_path, digits, whole, monkeypatch):
    """The first write of the first start gets half of its content onto the disk, the second of the second start ..."""
    write, starts, named = Path.write_bytes, 0, set()

    def fails_once(path, content):
        nonlocal left
        if path.name.startswith(".progress"):  # may fail, and how often it is written is a matter of time
            return write(path, content)
        left -= 1
        write(path, content if left else content[: len(content) // 2])
        if left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", fails_once)
    monkeypatch.setattr(Path, "write_text", lambda path, content, encoding: fails_once(path, content.encode(encoding)))
    while read_record(tmp_path / "full") is None:
        starts += 1
        left = starts + 1  # one more: that of .holder, which is allowed to fail
        try:
            train(small_net(), digits, small_config(), tmp_path / "full")
        except OSError as error:
            assert error.errno == errno.ENOSPC and not list((tmp_path / "full").glob(".*partial"))
            named.add(Path(error.filename).name)
    at_the_end = {"test_correct.npy", "test_predictions.npz", "weights.safetensors", "run.json"}
    assert {"history.jsonl", "checkpoint.pt"} < named and named & at_the_end
    assert same_end(tmp_path / "full", whole)


@pytest.mark.skipif(not os.path.isdir("/sys/kernel"), reason="needs a folder that nobody can write to")
@pytest.mark.parametrize("words", [["study"], ["train"]])
def test_a_results_folder_that_cannot_be_written_is_named(words, profile_file, capsys):
    words = [*words, str(profile_file()), *(["baseline"] if words == ["train"] else [])]
    assert main([*words, "--results", "/sys/kernel"]) == 2
    assert "/sys/kernel" in capsys.readouterr().err


def test_data_deleted_between_two_starts_is_told_and_nothing_is_lost(
    image_folder, profile_file, tmp_path, capsys, monkeypatch
):
    pictures, stop = image_folder(count=20), tmp_path / "stop"
    data = {"name": f"folder:{pictures}", "size": 12, "classes": 2, "minival": 0.2}
    path = profile_file(data=data, train={"epochs": 2, "batch_size": 10, "optimizer": "sgd", "lr": 0.05})
    words = ["train", str(path), "baseline", "--results", str(tmp_path), "--device", "cpu"]
    monkeypatch.setenv("EFFNET_STOP", str(stop))
    stop.touch()  # training stops after its first step
    assert main(words) == 75
    pictures.rename(tmp_path / "elsewhere")
    assert main(words) == 2 and str(pictures) in capsys.readouterr().err
    assert Run.plan(path, "baseline", 0, tmp_path).state() == "interrupted"
    (tmp_path / "elsewhere").rename(pictures)
    stop.unlink()
    assert main(words) == 0 and "  continues in epoch 1 after step 1" in capsys.readouterr().out


# ---- checkpoints and records


def test_a_torn_checkpoint_gives_way_to_the_one_before(tmp_path, digits, whole, capsys):
    with pytest.raises(Interrupted):
        train(small_net(), signalling(digits), small_config(), tmp_path / "torn")
    path = tmp_path / "torn" / "checkpoint.pt"
    content, average = bytearray(path.read_bytes()), torch.load(path, weights_only=True)["ema"]["classifier.weight"]
    content[content.index(average.numpy().tobytes())] ^= 1  # a single bit of a weight
    path.write_bytes(content)
    train(small_net(), digits, small_config(), tmp_path / "torn")
    said = capsys.readouterr().out
    assert (
        f"{path} is not used: unreadable (ValueError: the checksum of " in said and "continues after epoch 1\n" in said
    )
    assert same_end(tmp_path / "torn", whole)


def test_a_checkpoint_of_another_run_gives_way_to_the_one_before(tmp_path, digits, capsys):
    for name, changes in (("own", {}), ("other", {"lr": 0.02})):
        with pytest.raises(Interrupted):
            train(small_net(), signalling(digits), small_config(**changes), tmp_path / name)
    (tmp_path / "other" / "checkpoint.pt").replace(tmp_path / "own" / "checkpoint.pt")
    with pytest.raises(Interrupted):
        train(small_net(), signalling(digits), small_config(), tmp_path / "own")
    said = capsys.readouterr().out
    assert "is not used" in said and "made with config lr = 0.02" in said and "continues after epoch 1\n" in said
    assert (tmp_path / "own" / "checkpoint.refused.pt").exists()  # else it would have become the checkpoint before
    assert train(small_net(), digits, small_config(), tmp_path / "own")["status"] == "finished"
    assert not [*(tmp_path / "own").glob("*.pt")]


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_a_malicious_pickle_is_never_executed(tmp_path, digits, capsys):
    evil = {"model": Malicious(tmp_path / "broken_in"), "identity": {}, "progress": {}}
    write_checkpoint(tmp_path, evil)
    assert read_checkpoint(tmp_path, lambda *_: None) is None
    assert train(small_net(), digits, small_config(epochs=1), tmp_path)["status"] == "finished"
    assert "is not used: unreadable" in capsys.readouterr().out and not (tmp_path / "broken_in").exists()


def test_a_record_that_was_edited_is_named_and_left_out(profile_file, tmp_path, capsys, monkeypatch):
    path = profile_file(methods=["baseline"])
    run = Run.plan(path, "baseline", 0, tmp_path)
    data = load_data(**run.profile.data.given())
    run.train(data, "cpu")
    monkeypatch.setattr(Run, "_processes", None)  # an ended run can be read where there are fewer GPUs
    assert run.train(data, "cpu")["status"] == "finished"
    file = run.run_dir / "run.json"
    record = json.loads(file.read_text())
    record["test"]["top1"] += 1
    file.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"run\.json is damaged \(its digest does not match"):
        read_record(run.run_dir)
    assert run.state() == "damaged" and "top1" not in load_runs(load_profile(path), tmp_path)
    print_status(plan_runs(load_profile(path), tmp_path))
    assert "its digest does not match" in capsys.readouterr().out
    del record["sha256"]
    for schema in (1, 2, 3):  # calling it old does not help
        file.write_text(json.dumps(record | {"schema": schema}))
        assert run.state() == "damaged"
    run.run_dir.rename(tmp_path / "tiny" / "pilots")
    (tmp_path / "tiny" / "pilots" / "one").mkdir()
    file = tmp_path / "tiny" / "pilots" / "run.json"
    file.rename(tmp_path / "tiny" / "pilots" / "one" / "run.json")
    assert load_pilots(load_profile(path), tmp_path).empty and "is damaged" in capsys.readouterr().out


def test_a_record_that_cannot_be_read_now_is_not_called_damaged(tmp_path, monkeypatch):
    (tmp_path / "run.json").touch()
    monkeypatch.setattr(Path, "read_text", mock.Mock(side_effect=PermissionError("refused")))
    with pytest.raises(PermissionError, match="refused"):
        read_record(tmp_path)


def test_a_study_whose_recipe_has_changed_is_refused_before_anything_is_touched(profile_file, tmp_path, capsys):
    """Else its search would overwrite coefficients that finished runs are made by."""
    changes = {"methods": ["baseline", "compound_searched"], "search": {"step": 0.4}}
    profile = load_profile(profile_file(**changes))
    (tmp_path / "tiny").mkdir()
    found = {"alpha": 1.4, "beta": 1.0, "gamma": 1.2, "made_by": made_by(profile)}
    write_json(tmp_path / "tiny" / "coefficients.json", found)
    runs, candidate = plan_runs(profile, tmp_path), plan_search(profile, tmp_path)[1][0]
    for run in (*runs, candidate):
        write_record(run)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    changed = profile_file(**changes, train={"epochs": 1, "batch_size": 20, "optimizer": "sgd", "lr": 0.03})
    for words in (["study"], ["study", "--methods", "compound_searched"], ["search"]):
        assert main([words[0], str(changed), "--results", str(tmp_path), *words[1:]]) == 2
        said = capsys.readouterr().err
        assert ", now 0.03" in said and "Nothing was touched" in said and "--results DIR" in said
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before | {
            changed: changed.read_bytes()
        }


def test_coefficients_that_networks_were_scaled_by_are_not_overwritten(profile_file, tmp_path, capsys):
    """The candidates, whose recipe is the search's own, do not tell that the study's has changed."""
    changes = {"methods": ["baseline", "compound_searched"], "search": {"step": 0.4, "train": {"epochs": 1}}}
    profile = load_profile(profile_file(**changes))
    (tmp_path / "tiny").mkdir()
    found = {"alpha": 1.4, "beta": 1.0, "gamma": 1.2, "made_by": made_by(profile)}
    write_json(tmp_path / "tiny" / "coefficients.json", found)
    write_record(plan_runs(profile, tmp_path, ["compound_searched"])[0])
    changed = profile_file(**changes, train=SMALL_PROFILE["train"] | {"epochs": 2})
    for words in (["study"], ["study", "--methods", "compound_searched"], ["search"]):
        assert main([words[0], str(changed), "--results", str(tmp_path), *words[1:]]) == 2
        assert "coefficients.json: of another search or recipe" in capsys.readouterr().err
    assert json.loads((tmp_path / "tiny" / "coefficients.json").read_text()) == found


def test_a_study_of_a_stale_run_is_refused_also_if_others_are_asked_for(profile_file, tmp_path, capsys):
    path = profile_file(methods=["baseline", "width"])
    stale, _ = plan_runs(load_profile(path), tmp_path)
    write_record(stale, config={**dict(stale.config), "lr": 3.0})
    assert main(["study", str(path), "--results", str(tmp_path), "--methods", "width"]) == 2
    assert "lr = 3.0, now 0.05" in capsys.readouterr().err


def test_an_analysis_with_a_damaged_record_in_it_is_made_anew(profile_file, tmp_path, monkeypatch, capsys):
    path = profile_file(methods=["baseline", "width"], baseline=None)
    runs = plan_runs(load_profile(path), tmp_path)
    for run in runs:
        write_record(run)
        run.executed.parent.mkdir(exist_ok=True)
        run.executed.touch()
    (runs[1].run_dir / "run.json").write_text("torn")
    analysed, executed = runs[0].executed.with_stem("05_analysis"), []
    analysed.touch()
    monkeypatch.setattr(local, "run_notebook", lambda notebook, *arguments, **options: executed.append(notebook))
    assert main(["study", str(path), "--results", str(tmp_path)]) == 1
    assert sorted(executed) == ["00_architecture", "05_analysis"] and not analysed.exists()
    assert "is damaged" in capsys.readouterr().out


def test_a_stale_run_says_what_has_changed(profile_file, tmp_path, capsys):
    run = Run.plan(profile_file(), "baseline", 0, tmp_path)
    run.train(load_data(**run.profile.data.given()), "cpu")
    data = {**run.profile.data.given(), "title": "Another title"}
    assert Run.plan(profile_file(data=data), "baseline", 0, tmp_path).state() == "finished"
    path = profile_file(stem_stride=1)
    print_status(plan_runs(load_profile(path), tmp_path))
    assert "was made with stem_stride = 2, now 1; delete its folder to run it again" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"run\.json was made with stem_stride = 2, now 1; delete"):
        Run.plan(path, "baseline", 0, tmp_path).train(load_data(**run.profile.data.given()), "cpu")


def test_a_checkpoint_of_an_older_version_is_gone_on_with(tmp_path, digits, whole):
    """It lacks the entries that tell of a place within an epoch."""
    with pytest.raises(Interrupted):
        train(small_net(), signalling(digits), small_config(), tmp_path / "old")
    (tmp_path / "old" / "checkpoint.previous.pt").replace(tmp_path / "old" / "checkpoint.pt")
    state = torch.load(tmp_path / "old" / "checkpoint.pt", weights_only=True)
    for entry in ("step", "loss", "seconds"):
        del state["progress"][entry]
    write_checkpoint(tmp_path / "old", state)
    assert train(small_net(), digits, small_config(), tmp_path / "old")["status"] == "finished"
    assert same_end(tmp_path / "old", whole)


def test_a_full_disk_in_one_of_several_processes_is_no_failure_of_the_run(profile_file, tmp_path, monkeypatch):
    run = Run.plan(profile_file(devices=2), "baseline", 0, tmp_path)

    def launch(config, work):
        def start(*arguments):
            raise ChildFailedError("work", {0: ProcessFailure(0, 1, codes[-1], str(tmp_path / "error.json"))})

        return start

    codes = []
    monkeypatch.setattr(parallel, "elastic_launch", launch)
    for said, code, kind in (
        ("OSError: [Errno 28] No space left on device", 1, OSError),
        ("RunLocked: by another", 1, RunLocked),
        ("RunMismatch: made with", 1, RunMismatch),
        ("Signal 9 (SIGKILL) received", -9, RuntimeError),
    ):
        codes.append(code)
        message = {"message": said, "extraInfo": {"timestamp": "1"}}
        (tmp_path / "error.json").write_text(json.dumps({"message": message}))
        with pytest.raises(kind, match="process 0 of 2"):
            run.train(None, "cpu")
        assert run.state() == "missing"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"status": "done"}, r"tag 'done' .* expected tags: 'finished'"),
        ({"test": {"top1": "good"}}, r"finished\.test\."),
        ({"seconds": -1.0}, r"finished\.seconds: Input should be greater than 0"),
        ({"seed": None}, r"finished\.seed: Input should be a valid integer"),
        ({"status": "diverged"}, r"diverged\.diverged: Field required"),
        ({"minival": {}}, r"finished\.minival\.top1: Field required"),
    ],
)
def test_a_record_of_another_shape_is_named(change, message, profile_file, tmp_path):
    run = Run.plan(profile_file(), "baseline", 0, tmp_path)
    write_record(run)
    assert read_record(run.run_dir)["schema"] == 3
    write_record(run, schema=2)
    assert read_record(run.run_dir)["schema"] == 2  # the older version is read
    write_record(run, **change)
    with pytest.raises(ValueError, match=message):
        read_record(run.run_dir)


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "quick/../quick", "..", ""])
def test_a_profile_is_a_name_or_a_yaml_file(name):
    with pytest.raises(ValueError, match="unknown profile"):
        load_profile(name)


def test_a_profiles_file_name_cannot_lead_elsewhere(profile_file, tmp_path):
    path = profile_file()
    for name in ("..yaml", "a b.yaml", ".hidden.yaml"):
        (tmp_path / name).write_text(path.read_text())
        with pytest.raises(ValueError, match="names a results folder"):
            load_profile(tmp_path / name)


def test_a_record_says_enough_to_run_it_again(profile_file, tmp_path, capsys):
    run = Run.plan(profile_file(), "width", 0, tmp_path)
    run.train(load_data(**run.profile.data.given()), "cpu")
    record = run.run_dir / "run.json"
    assert main(["rerun", str(record), "--results", str(tmp_path / "again"), "--device", "cpu"]) == 0
    assert "then" in capsys.readouterr().out
    assert same_end(tmp_path / "again" / run.run_dir.name, run.run_dir)
    assert main(["rerun", str(record), "--results", str(tmp_path / "again")]) == 2
    assert "holds a run already" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="expected a run.json"):
        rerun(tmp_path / "nothing")


def test_a_record_that_does_not_say_enough_cannot_be_run_again(profile_file, tmp_path):
    run = Run.plan(profile_file(), "width", 0, tmp_path)
    write_record(run)
    with pytest.raises(ValueError, match="does not say its data"):
        rerun(run.run_dir)


# ---- nothing but ValueError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
SETTINGS = st.sampled_from(sorted(TrainConfig.model_fields)) | st.text(max_size=6)
KEYS = st.sampled_from(["title", "purpose", "data", "base_resolution", "stem_stride", "methods", "seeds", "train"])
GENTLE = {"deadline": None, "derandomize": True, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@examples(**GENTLE, max_examples=25)
@given(st.dictionaries(SETTINGS, VALUES, max_size=4))
@example({"lr": math.nan})
@example({"epochs": 10**400})
@example({"optimizer": []})
def test_any_settings_are_valid_or_refused_by_name(values):
    try:
        config = TrainConfig(**values)
    except ValueError as error:
        assert not values or any(str(name) in str(error) or repr(name) in str(error) for name in values)
    else:
        assert TrainConfig(**json.loads(json.dumps(dict(config)))) == config


@examples(**GENTLE, max_examples=25)
@given(values=st.dictionaries(KEYS | st.text(max_size=6) | st.integers(), VALUES, max_size=3))
@example(values={"seeds": [[1], {}]})
@example(values={"methods": [["depth"]]})
@example(values={"train": {"lr": "high"}})
@example(values={"train": {0: 1}})
@example(values={"data": {"name": "digits", "classes": "ten"}})
@example(values={"data": {"name": "digits", "size": -1}})
def test_any_profile_is_valid_or_refused_by_name(tmp_path, values):
    good = {"title": "T", "purpose": "check", "data": {"name": "digits"}, "base_resolution": 16, "stem_stride": 1}
    good |= {"methods": ["baseline"], "seeds": [0], "train": {"epochs": 1}}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(good | values))
    try:
        profile = load_profile(path)
    except ValueError as error:
        assert str(error)
    else:
        assert isinstance(profile.num_classes, int)
        for seed in profile.seeds:
            assert isinstance(Run(profile, profile.methods[0], seed).config, TrainConfig)


@examples(**GENTLE, max_examples=25)
@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
@example(b"[]")
@example(b"a: !!timestamp foo")
@example(b"a: !!bool foo")
@example(b"[" * 2000)
@example(b"a: 2001-13-45")
@example(b"a: 0b_")
def test_any_profile_file_is_valid_or_refused(tmp_path, content):
    path = tmp_path / "fuzzed.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="fuzzed.yaml"):
        load_profile(path)


SCORES = {"top1": 50.0, "top5": 90.0, "loss": 1.0}
COUNTS = {"train": 9, "minival": 9, "test": 1000}
FINISHED = {
    **{"schema": 3, "status": "finished", "seed": 0, "config": {}, "git": {"commit": None}, "device": {"name": "box"}},
    **{"cost": {"params": 1, "flops": 2, "activations": 3}, "dataset": {"title": "T", "classes": 10, "counts": COUNTS}},
    **{"test": SCORES, "test_raw": {"top1": 45.0}, "minival": {"top1": 40.0}, "peak_memory_bytes": 5, "micro_batch": 9},
    **{"versions": {"python": "3", "torch": "2"}, "seconds": 9.0, "images_per_second": 7.0, "started": "", "ended": ""},
}
WHOLE = ("schema", "seed", "peak_memory_bytes", "micro_batch")
RECORDS = [
    FINISHED,
    {"schema": 2, "status": "failed", "error": "x", "seed": 0, "config": {}},
    {"schema": 3, "status": "diverged", "diverged": {"epoch": 1, "step": 2, "lr": 0.1}, "seed": 0, "config": {}},
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record["status"])
def test_no_entry_of_a_record_may_be_missing_or_of_another_kind(tmp_path, record):
    """Every entry in turn, and every entry of an entry. What is written as a whole number is one."""

    def written(value):
        save_record(tmp_path, value)
        return {key: entry for key, entry in read_record(tmp_path).items() if key != "sha256"}

    expected = record | {"baseline": {"depth": 1.0, "width": 1.0}}  # which older records did not have
    assert written(record) == expected and written(record | {"further": 1}) == expected | {"further": 1}
    (tmp_path / "run.json").write_text(json.dumps({key: value for key, value in record.items() if key != "schema"}))
    with pytest.raises(ValueError, match="is damaged .schema None"):
        read_record(tmp_path)
    damaged = []
    for name, value in record.items():
        damaged += [record | {name: [value]}]
        damaged += [{key: other for key, other in record.items() if key != name}] * (name != "schema")  # see above
        damaged += [record | {name: -1}, record | {name: 1.5}] if name in WHOLE else []
        for inner in value if isinstance(value, dict) else ():
            damaged += [record | {name: {key: other for key, other in value.items() if key != inner}}]
            damaged += [record | {name: value | {inner: [value[inner]]}}]
    for wrong in damaged:
        with pytest.raises(ValueError, match="is damaged"):
            written(wrong)


def test_settings_of_older_records_have_their_present_names(tmp_path):
    older = FINISHED | {"config": {"lr": 0.1, "warmup": 0.2, "final_lr": 0.3, "checkpointing": True}}
    save_record(tmp_path, older)
    expected = {"lr": 0.1, "warmup_fraction": 0.2, "final_lr_fraction": 0.3}
    assert read_record(tmp_path)["config"] == expected


@examples(**GENTLE, max_examples=25)
@given(VALUES, st.sampled_from([{}, *RECORDS]), st.dictionaries(st.sampled_from(sorted(FINISHED)), VALUES, max_size=2))
def test_any_record_is_valid_or_refused(tmp_path, content, record, changes):
    if record:
        save_record(tmp_path, record | changes)
    else:
        (tmp_path / "run.json").write_text(json.dumps(content))
    try:
        record = read_record(tmp_path)
    except ValueError as error:
        assert "is damaged" in str(error)
    else:
        assert record["status"] in ("finished", "failed", "diverged")
