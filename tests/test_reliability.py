"""Nothing is ever lost: kills, time budgets, signals, full disks, torn and foreign files, records that are true."""

import errno
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import kill
import numpy as np
import pytest
import torch
from conftest import SMALL_PROFILE, Disturbed, write_record
from hypothesis import HealthCheck, example, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import effnet_execute
import effnet_lib
import effnet_runs
import effnet_study as study
from effnet_lib import Interrupted, TrainConfig, train
from effnet_records import read_checkpoint, read_record, write_checkpoint, write_json


def same_end(one, other):
    return kill.end_of(one) == kill.end_of(other)


# ---- going on


def test_twenty_kills_change_nothing(tmp_path):
    done = kill.kill(20, tmp_path)
    assert done["kills"] == 20 and done["runs"] >= 2 and len(done["places"]) >= 4


def test_stops_at_any_step_and_while_scoring_change_nothing(tmp_path, digits, tiny_model, recipe, monkeypatch):
    train(tiny_model(), digits, recipe(), tmp_path / "whole")
    rng, said = random.Random(1), []

    def due(stop, to_save):
        stop.reason = "a whim"
        return rng.random() < 0.3

    monkeypatch.setattr(effnet_lib._Stop, "due", due)
    while read_record(tmp_path / "stopped") is None:
        try:
            train(tiny_model(seed=len(said)), digits, recipe(), tmp_path / "stopped")
        except Interrupted as error:
            said.append(str(error))
            assert "stopped by a whim in epoch" in said[-1] and (tmp_path / "stopped" / "checkpoint.pt").exists()
    assert len(said) >= 4 and any("in epoch 4 after step 0" in words for words in said)  # while test was scored
    assert same_end(tmp_path / "stopped", tmp_path / "whole")


def test_the_deadline_leaves_time_for_a_step_and_a_checkpoint(monkeypatch):
    monkeypatch.setattr(effnet_lib.time, "time", lambda: now)
    now, stop = 100.0, effnet_lib._Stop(deadline=110.0)
    assert not stop.due(to_save=1.0)
    now = 103.0  # a step takes 3 seconds, saving 1
    assert not stop.due(to_save=0.4)
    now = 104.0  # a step takes 1 second, saving 2: the time would do for it, but not twice over
    assert stop.due(to_save=2.1) and stop.reason == "the end of its time"
    monkeypatch.setenv("EFFNET_DEADLINE", "105")
    assert effnet_lib._Stop(None).due(to_save=1.0)


def signalling(data, number=signal.SIGTERM):
    """A data set that sends this process a signal in the middle of its second epoch."""

    def send(images):
        os.kill(os.getpid(), number)
        return images

    return Disturbed(data, send)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_training_at_the_next_step(tmp_path, digits, tiny_model, recipe, number):
    before = signal.getsignal(number)
    train(tiny_model(), digits, recipe(), tmp_path / "whole")
    with pytest.raises(Interrupted, match=f"stopped by {number.name} in epoch 2 after step 3 of 5"):
        train(tiny_model(), signalling(digits, number), recipe(), tmp_path / "stopped")
    assert signal.getsignal(number) == before
    train(tiny_model(), digits, recipe(), tmp_path / "stopped")
    assert same_end(tmp_path / "stopped", tmp_path / "whole")


def test_checkpoints_come_by_steps_and_the_last_two_are_kept(tmp_path, digits, tiny_model, recipe):
    with pytest.raises(Interrupted):
        train(tiny_model(), signalling(digits), recipe(save_steps=2), tmp_path)
    at = [
        torch.load(tmp_path / name, weights_only=True)["progress"]["step"]
        for name in ("checkpoint.pt", "checkpoint.previous.pt")
    ]
    assert at == [3, 2]


def test_the_train_command_stops_in_time_and_says_so(profile_file, tmp_path, capsys):
    path = profile_file(train={"epochs": 400, "batch_size": 20, "optimizer": "sgd", "lr": 0.05})
    words = ["train", str(path), "baseline", "--results", str(tmp_path), "--device", "cpu", "--time-budget", "4s"]
    try:
        begin = time.time()
        assert study.main(words) == 75 and time.time() - begin < 6
    finally:
        os.environ.pop("EFFNET_DEADLINE", None)
    assert "the same command continues" in capsys.readouterr().err
    assert study.Run.plan(path, "baseline", 0, tmp_path).state() == "interrupted"


def test_a_notebook_stops_in_time_and_leaves_no_half_one(profile_file, tmp_path, monkeypatch):
    path = profile_file(methods=["baseline"], train={"epochs": 2000, "batch_size": 20, "optimizer": "sgd", "lr": 0.05})
    run = study.Run.plan(path, "baseline", 0, tmp_path)
    monkeypatch.setenv("EFFNET_DEADLINE", str(time.time() + 25))
    with pytest.raises(Interrupted):
        study.run_notebook("01_baseline_b0", run.executed, {"profile": str(path), "results": str(tmp_path)}, threads=1)
    assert run.state() == "interrupted" and list(run.executed.parent.iterdir()) == []


def test_several_processes_stop_together_and_go_on(profile_file, tmp_path, monkeypatch, capfd):
    train = {"epochs": 2, "batch_size": 20, "optimizer": "sgd", "lr": 0.05}
    run = study.Run.plan(profile_file(devices=2, train=train), "baseline", 0, tmp_path)
    data = study.load_data(**run.profile.data)
    monkeypatch.setenv("EFFNET_DEADLINE", "1")  # long past: they stop where they first meet
    with pytest.raises(Interrupted, match="stopped by the end of its time in epoch 1 after step 2 of 2"):
        run.train(data, "cpu")
    assert run.state() == "interrupted" and read_record(run.directory) is None
    monkeypatch.delenv("EFFNET_DEADLINE")
    assert run.train(data, "cpu")["devices"] == 2 and len(study.load_history(run.directory)) == 2
    assert "continues in epoch 1 after step 2" in capfd.readouterr().out


def test_a_study_without_time_starts_nothing(profile_file, tmp_path, capsys):
    try:
        assert study.main(["study", str(profile_file()), "--results", str(tmp_path), "--time-budget", "15s"]) == 75
    finally:
        os.environ.pop("EFFNET_DEADLINE", None)
    assert "too little time is left" in capsys.readouterr().err
    assert not (tmp_path / "tiny" / "notebooks").exists()


@pytest.mark.parametrize("text, seconds", [("90", 90), ("90s", 90), ("9m", 540), ("1h30m", 5400), ("2h5s", 7205)])
def test_times_are_read(text, seconds):
    assert study._duration(text) == seconds


@pytest.mark.parametrize("text", ["", "9 m", "-3", "1d", "m"])
def test_what_is_no_time_is_refused(text, capsys):
    with pytest.raises(SystemExit):
        study.main(["train", "quick", "baseline", f"--time-budget={text}"])
    assert "expected a time such as 90s, 9m or 1h30m" in capsys.readouterr().err


def test_the_order_of_runs_changes_nothing(profile_file, tmp_path):
    path = profile_file()
    for place, order in (("one", ("baseline", "width")), ("other", ("width", "baseline"))):
        for method in order:
            run = study.Run.plan(path, method, 0, tmp_path / place)
            run.train(study.load_data(**run.profile.data), "cpu")
    for method in ("baseline", "width"):
        one, other = (study.Run.plan(path, method, 0, tmp_path / place).directory for place in ("one", "other"))
        assert same_end(one, other)


# ---- who holds a run


def test_the_holder_of_a_run_is_named_and_a_dead_one_holds_nothing(tmp_path, digits, tiny_model, recipe):
    program = """
import sys, time
from pathlib import Path
from effnet_records import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, cwd=study.ROOT)
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(RuntimeError, match=f"held by another process.*: process {holder.pid} on "):
            train(tiny_model(), digits, recipe(), tmp_path)
    finally:
        holder.kill()
        holder.wait()
    (tmp_path / ".run.json.1.partial").write_text("half")
    assert train(tiny_model(), digits, recipe(epochs=1), tmp_path)["status"] == "finished"
    assert not list(tmp_path.glob("*partial*")) and not list(tmp_path.glob("checkpoint*"))


# ---- divergence


def poisoned(data):
    """A data set with a batch that holds infinite pixels."""
    return Disturbed(data, lambda images: images.index_fill(0, torch.tensor([0]), math.inf))


def test_divergence_is_told_with_its_very_step(tmp_path, digits, tiny_model, recipe):
    record = train(tiny_model(), poisoned(digits), recipe(), tmp_path)
    assert record["status"] == "diverged" and record["diverged"]["epoch"] == 2 and record["diverged"]["step"] == 3
    assert record["diverged"]["lr"] == pytest.approx(effnet_lib.learning_rate(recipe(), (5 + 2 + 0.5) / 15))


def test_a_gradient_that_is_not_finite_is_divergence(tmp_path, digits, tiny_model, recipe):
    model = tiny_model()
    model.classifier.bias.register_hook(lambda gradient: gradient * math.inf)
    record = train(model, digits, recipe(), tmp_path)
    assert record["status"] == "diverged" and record["diverged"]["step"] == 1


def test_fp16_skips_a_step_that_overflows_and_goes_on(tmp_path, digits, tiny_model, recipe):
    """The gradient scaler starts at 65,536: the first steps of a network whose loss is large overflow."""
    model = tiny_model()
    with torch.no_grad():
        model.classifier.weight.mul_(3000)
    trainer = effnet_lib.Trainer(model, recipe(precision="fp16"), torch.device("cpu"))
    before, scale = [p.clone() for p in model.parameters()], trainer.scaler.get_scale()
    images, labels = next(digits.train_batches(recipe(), 0))
    trainer.step(images, labels, 0, 0, 5)
    assert trainer.scaler.get_scale() < scale and trainer.diverged() == -1
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    trainer.scaler._scale.fill_(1e-6)  # it has come down to nothing: no step is taken any more
    assert trainer.diverged() == 0


def test_a_diverged_run_is_tried_with_a_lower_rate_only_if_the_profile_says_so(profile_file, tmp_path, monkeypatch):
    once = effnet_runs.train

    def diverges_at_full_rate(model, data, config, run_dir, **options):
        return once(model, poisoned(data) if config.lr == 0.05 else data, config, run_dir, **options)

    monkeypatch.setattr(effnet_runs, "train", diverges_at_full_rate)
    settings = {"epochs": 2, "batch_size": 10, "optimizer": "sgd", "lr": 0.05, "norm_momentum": 0.1}
    run = study.Run.plan(profile_file(train=settings), "baseline", 0, tmp_path / "plain")
    with pytest.raises(RuntimeError, match="diverged in epoch 2, step 3, at LR"):
        run.train(study.load_data(**run.profile.data), "cpu")
    assert (run.directory / "checkpoint.pt").exists() and not study._is_to_do(run)
    path = profile_file(train=settings, retry_lr=0.5)
    assert study._is_to_do(study.Run.plan(path, "baseline", 0, tmp_path / "plain"))
    run = study.Run.plan(path, "baseline", 0, tmp_path / "retried")
    record = run.train(study.load_data(**run.profile.data), "cpu")
    assert record["config"]["lr"] == 0.025 and record["retried"]["epoch"] == 2 and run.state() == "finished"
    assert study.load_runs(path, tmp_path / "retried")["retried"][0]
    again = study.Run.plan(path, "baseline", 0, tmp_path / "retried")
    assert again.train(study.load_data(**run.profile.data), "cpu") == record
    with pytest.raises(ValueError, match="retry_lr: expected a factor above 0 and below 1, got 2.0"):
        study.load_profile(profile_file(retry_lr=2.0))


# ---- disks and folders


def test_a_full_disk_is_told_and_the_next_start_goes_on(tmp_path, digits, tiny_model, recipe):
    train(tiny_model(), digits, recipe(), tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(tiny_model(), signalling(digits), recipe(), tmp_path / "full")
    kept = {path.name: path.read_bytes() for path in (tmp_path / "full").glob("checkpoint*")}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # as a quota would
        with pytest.raises(OSError, match=r"File too large: '.*checkpoint\.pt'"):
            train(tiny_model(), digits, recipe(), tmp_path / "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert kept == {path.name: path.read_bytes() for path in (tmp_path / "full").glob("checkpoint*")}
    assert not list((tmp_path / "full").glob("*partial*")) and read_record(tmp_path / "full") is None
    train(tiny_model(), digits, recipe(), tmp_path / "full")
    assert same_end(tmp_path / "full", tmp_path / "whole")


def test_a_disk_that_is_full_at_any_write_loses_nothing(tmp_path, digits, tiny_model, recipe, monkeypatch):
    """The first write of the first start gets half of its content onto the disk, the second of the second start ..."""
    train(tiny_model(), digits, recipe(), tmp_path / "whole")
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
    monkeypatch.setattr(Path, "write_text", lambda path, content: fails_once(path, content.encode()))
    while read_record(tmp_path / "full") is None:
        starts += 1
        left = starts + 1  # one more: that of .holder, which is allowed to fail
        try:
            train(tiny_model(), digits, recipe(), tmp_path / "full")
        except OSError as error:
            assert error.errno == errno.ENOSPC and not list((tmp_path / "full").glob(".*partial"))
            named.add(Path(error.filename).name)
    at_the_end = {"test_correct.npy", "test_predictions.npz", "weights.safetensors", "run.json"}
    assert {"history.jsonl", "checkpoint.pt"} < named and named & at_the_end
    assert same_end(tmp_path / "full", tmp_path / "whole")


@pytest.mark.skipif(not os.path.isdir("/sys/kernel"), reason="needs a folder that nobody can write to")
@pytest.mark.parametrize("words", [["study"], ["train"]])
def test_a_results_folder_that_cannot_be_written_is_named(words, profile_file, capsys):
    words = [*words, str(profile_file()), *(["baseline"] if words == ["train"] else [])]
    assert study.main([*words, "--results", "/sys/kernel"]) == 2
    assert "/sys/kernel" in capsys.readouterr().err


def test_data_deleted_between_two_starts_is_told_and_nothing_is_lost(image_folder, profile_file, tmp_path, capsys):
    pictures = image_folder(count=20)
    data = {"name": f"folder:{pictures}", "size": 12, "classes": 2, "minival": 0.2}
    path = profile_file(data=data, train={"epochs": 300, "batch_size": 10, "optimizer": "sgd", "lr": 0.05})
    words = ["train", str(path), "baseline", "--results", str(tmp_path), "--device", "cpu", "--time-budget", "3s"]
    try:
        assert study.main(words) == 75
        pictures.rename(tmp_path / "elsewhere")
        assert study.main(words) == 2 and str(pictures) in capsys.readouterr().err
        assert study.Run.plan(path, "baseline", 0, tmp_path).state() == "interrupted"
        (tmp_path / "elsewhere").rename(pictures)
        assert study.main(words) == 75 and "  continues " in capsys.readouterr().out
    finally:
        os.environ.pop("EFFNET_DEADLINE", None)


# ---- checkpoints and records


def test_a_torn_checkpoint_gives_way_to_the_one_before(tmp_path, digits, tiny_model, recipe, capsys):
    train(tiny_model(), digits, recipe(), tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(tiny_model(), signalling(digits), recipe(), tmp_path / "torn")
    path = tmp_path / "torn" / "checkpoint.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # a single bit
    path.write_bytes(content)
    train(tiny_model(), digits, recipe(), tmp_path / "torn")
    said = capsys.readouterr().out
    assert (
        f"{path} is not used: unreadable (ValueError: the checksum of " in said and "continues after epoch 1\n" in said
    )
    assert same_end(tmp_path / "torn", tmp_path / "whole")


def test_a_checkpoint_of_another_run_gives_way_to_the_one_before(tmp_path, digits, tiny_model, recipe, capsys):
    for name, changes in (("own", {}), ("other", {"lr": 0.02})):
        with pytest.raises(Interrupted):
            train(tiny_model(), signalling(digits), recipe(**changes), tmp_path / name)
    (tmp_path / "other" / "checkpoint.pt").replace(tmp_path / "own" / "checkpoint.pt")
    assert train(tiny_model(), digits, recipe(), tmp_path / "own")["status"] == "finished"
    said = capsys.readouterr().out
    assert "is not used" in said and "made with config lr = 0.02" in said and "continues after epoch 1\n" in said


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_a_malicious_pickle_is_never_executed(tmp_path, digits, tiny_model, recipe, capsys):
    evil = {"model": Malicious(tmp_path / "broken_in"), "identity": {}, "progress": {}}
    write_checkpoint(tmp_path, evil)
    assert read_checkpoint(tmp_path, lambda *_: None) is None
    assert train(tiny_model(), digits, recipe(epochs=1), tmp_path)["status"] == "finished"
    assert "is not used: unreadable" in capsys.readouterr().out and not (tmp_path / "broken_in").exists()


def test_a_record_that_was_edited_is_named_and_left_out(profile_file, tmp_path, capsys):
    path = profile_file(methods=["baseline"])
    run = study.Run.plan(path, "baseline", 0, tmp_path)
    run.train(study.load_data(**run.profile.data), "cpu")
    file = run.directory / "run.json"
    record = json.loads(file.read_text())
    record["test"]["top1"] += 1
    file.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"run\.json is damaged \(its digest does not match"):
        read_record(run.directory)
    assert run.state() == "damaged" and "top1" not in study.load_runs(path, tmp_path)
    study.print_status(study.load_profile(path), tmp_path)
    assert "its digest does not match" in capsys.readouterr().out
    file.write_text(json.dumps(record | {"schema": 1}))  # calling it old does not help
    assert run.state() == "damaged"
    run.directory.rename(tmp_path / "tiny" / "pilots")
    (tmp_path / "tiny" / "pilots" / "one").mkdir()
    file = tmp_path / "tiny" / "pilots" / "run.json"
    file.rename(tmp_path / "tiny" / "pilots" / "one" / "run.json")
    assert study.load_pilots(path, tmp_path).empty and "is damaged" in capsys.readouterr().out


def test_a_study_whose_recipe_has_changed_is_refused_before_anything_is_touched(profile_file, tmp_path, capsys):
    """Else its search would overwrite coefficients that finished runs are made by."""
    changes = {"methods": ["baseline", "compound_searched"], "search": {"step": 0.4}}
    profile = study.load_profile(profile_file(**changes))
    (tmp_path / "tiny").mkdir()
    found = {"alpha": 1.4, "beta": 1.0, "gamma": 1.2, "made_by": study.made_by(profile)}
    write_json(tmp_path / "tiny" / "coefficients.json", found)
    runs, candidate = study.plan_runs(profile, tmp_path), study.plan_search(profile, tmp_path)[1][0]
    for run in (*runs, candidate):
        write_record(run)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    changed = profile_file(**changes, train={"epochs": 1, "batch_size": 20, "optimizer": "sgd", "lr": 0.03})
    for words in (["study"], ["study", "--methods", "compound_searched"], ["search"]):
        assert study.main([words[0], str(changed), "--results", str(tmp_path), *words[1:]]) == 2
        said = capsys.readouterr().err
        assert ", now 0.03" in said and "Nothing was touched" in said and "--results DIR" in said
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before | {
            changed: changed.read_bytes()
        }


def test_coefficients_that_networks_were_scaled_by_are_not_overwritten(profile_file, tmp_path, capsys):
    """The candidates, whose recipe is the search's own, do not tell that the study's has changed."""
    changes = {"methods": ["baseline", "compound_searched"], "search": {"step": 0.4, "train": {"epochs": 1}}}
    profile = study.load_profile(profile_file(**changes))
    (tmp_path / "tiny").mkdir()
    found = {"alpha": 1.4, "beta": 1.0, "gamma": 1.2, "made_by": study.made_by(profile)}
    write_json(tmp_path / "tiny" / "coefficients.json", found)
    write_record(study.plan_runs(profile, tmp_path, ["compound_searched"])[0])
    changed = profile_file(**changes, train=SMALL_PROFILE["train"] | {"epochs": 2})
    for words in (["study"], ["study", "--methods", "compound_searched"], ["search"]):
        assert study.main([words[0], str(changed), "--results", str(tmp_path), *words[1:]]) == 2
        assert "coefficients.json: of another search or recipe" in capsys.readouterr().err
    assert json.loads((tmp_path / "tiny" / "coefficients.json").read_text()) == found


def test_a_study_of_a_stale_run_is_refused_also_if_others_are_asked_for(profile_file, tmp_path, capsys):
    path = profile_file(methods=["baseline", "width"])
    stale, _ = study.plan_runs(study.load_profile(path), tmp_path)
    write_record(stale, config={**stale.config.__dict__, "lr": 3.0})
    assert study.main(["study", str(path), "--results", str(tmp_path), "--methods", "width"]) == 2
    assert "lr = 3.0, now 0.05" in capsys.readouterr().err


def test_an_analysis_with_a_damaged_record_in_it_is_made_anew(profile_file, tmp_path, monkeypatch, capsys):
    path = profile_file(methods=["baseline", "width"])
    runs = study.plan_runs(study.load_profile(path), tmp_path)
    for run in runs:
        write_record(run)
        run.executed.parent.mkdir(exist_ok=True)
        run.executed.touch()
    (runs[1].directory / "run.json").write_text("torn")
    analysed, executed = runs[0].executed.with_stem("05_analysis"), []
    analysed.touch()
    monkeypatch.setattr(effnet_execute, "run_notebook", lambda notebook, *arguments: executed.append(notebook))
    assert study.main(["study", str(path), "--results", str(tmp_path)]) == 1
    assert sorted(executed) == ["00_architecture", "05_analysis"] and not analysed.exists()
    assert "is damaged" in capsys.readouterr().out


def test_a_stale_run_says_what_has_changed(profile_file, tmp_path, capsys):
    run = study.Run.plan(profile_file(), "baseline", 0, tmp_path)
    run.train(study.load_data(**run.profile.data), "cpu")
    data = {**run.profile.data, "title": "Another title"}
    assert study.Run.plan(profile_file(data=data), "baseline", 0, tmp_path).state() == "finished"
    path = profile_file(stem_stride=1)
    study.print_status(study.load_profile(path), tmp_path)
    assert "was made with stem_stride = 2, now 1; delete its folder" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"run\.json was made with stem_stride = 2, now 1; delete"):
        study.Run.plan(path, "baseline", 0, tmp_path).train(study.load_data(**run.profile.data), "cpu")


def test_a_checkpoint_of_an_older_version_is_gone_on_with(tmp_path, digits, tiny_model, recipe):
    """It lacks the entries that tell of a place within an epoch."""
    train(tiny_model(), digits, recipe(), tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(tiny_model(), signalling(digits), recipe(), tmp_path / "old")
    (tmp_path / "old" / "checkpoint.previous.pt").replace(tmp_path / "old" / "checkpoint.pt")
    state = torch.load(tmp_path / "old" / "checkpoint.pt", weights_only=True)
    for entry in ("step", "loss", "seconds"):
        del state["progress"][entry]
    write_checkpoint(tmp_path / "old", state)
    assert train(tiny_model(), digits, recipe(), tmp_path / "old")["status"] == "finished"
    assert same_end(tmp_path / "old", tmp_path / "whole")


def test_a_full_disk_in_one_of_several_processes_is_no_failure_of_the_run(profile_file, tmp_path, monkeypatch):
    run = study.Run.plan(profile_file(devices=2), "baseline", 0, tmp_path)

    def launch(config, work):
        def start(*arguments):
            raise ChildFailedError("work", {0: ProcessFailure(0, 1, codes[-1], str(tmp_path / "error.json"))})

        return start

    codes = []
    monkeypatch.setattr(effnet_lib, "elastic_launch", launch)
    for said, code, kind in (
        ("OSError: [Errno 28] No space left on device", 1, OSError),
        ("Held: by another", 1, effnet_lib.Held),
        ("Mismatch: made with", 1, effnet_lib.Mismatch),
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
        ({"status": "done"}, r"run\.status must be one of \['finished', .*, got 'done'"),
        ({"test": {"top1": "good"}}, r"run\.test "),
        ({"seconds": -1.0}, r"run\.seconds must be bigger than 0, got -1\.0"),
        ({"seed": None}, r"run\.seed must be integer, got None"),
        ({"status": "diverged"}, r"run must contain \['diverged'\] properties\)"),
        ({"minival": {}}, r"run\.minival must contain \['top1'\] properties\)"),
    ],
)
def test_a_record_of_another_shape_is_named(change, message, profile_file, tmp_path):
    run = study.Run.plan(profile_file(), "baseline", 0, tmp_path)
    write_record(run)
    assert read_record(run.directory)["schema"] == 1  # older versions are read
    write_record(run, **change)
    with pytest.raises(ValueError, match=message):
        read_record(run.directory)


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "quick/../quick", "..", ""])
def test_a_profile_is_a_name_or_a_yaml_file(name):
    with pytest.raises(ValueError, match="unknown profile"):
        study.load_profile(name)


def test_a_profiles_file_name_cannot_lead_elsewhere(profile_file, tmp_path):
    path = profile_file()
    for name in ("..yaml", "a b.yaml", ".hidden.yaml"):
        (tmp_path / name).write_text(path.read_text())
        with pytest.raises(ValueError, match="names a results folder"):
            study.load_profile(tmp_path / name)


def test_a_record_says_enough_to_run_it_again(profile_file, tmp_path, capsys):
    run = study.Run.plan(profile_file(), "width", 0, tmp_path)
    run.train(study.load_data(**run.profile.data), "cpu")
    record = run.directory / "run.json"
    assert study.main(["rerun", str(record), "--results", str(tmp_path / "again"), "--device", "cpu"]) == 0
    assert "then" in capsys.readouterr().out
    assert same_end(tmp_path / "again" / run.directory.name, run.directory)
    assert study.main(["rerun", str(record), "--results", str(tmp_path / "again")]) == 2
    assert "holds a run already" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="expected a run.json"):
        study.rerun(tmp_path / "nothing")


def test_a_record_that_does_not_say_enough_cannot_be_run_again(profile_file, tmp_path):
    run = study.Run.plan(profile_file(), "width", 0, tmp_path)
    write_record(run)
    with pytest.raises(ValueError, match="does not say its data"):
        study.rerun(run.directory)


# ---- nothing but ValueError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
SETTINGS = st.sampled_from(sorted(TrainConfig.__dataclass_fields__)) | st.text(max_size=6)
KEYS = st.sampled_from(["title", "purpose", "data", "base_resolution", "stem_stride", "methods", "seeds", "train"])
GENTLE = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@examples(**GENTLE, max_examples=300)
@given(st.dictionaries(SETTINGS | st.integers(), VALUES, max_size=4))
@example({"lr": math.nan})
@example({"epochs": 10**400})
@example({"optimizer": []})
def test_any_settings_are_valid_or_refused_by_name(values):
    try:
        config = TrainConfig.from_dict(values)
    except ValueError as error:
        assert not values or any(str(name) in str(error) or repr(name) in str(error) for name in values)
    else:
        assert TrainConfig.from_dict(json.loads(json.dumps(config.__dict__))) == config


@examples(**GENTLE, max_examples=300)
@given(values=st.dictionaries(KEYS | st.text(max_size=6) | st.integers(), VALUES, max_size=3))
@example(values={"seeds": [[1], {}]})
@example(values={"methods": [["depth"]]})
@example(values={"train": {"lr": "high"}})
@example(values={"data": {"name": "digits", "classes": "ten"}})
@example(values={"data": {"name": "digits", "size": -1}})
def test_any_profile_is_valid_or_refused_by_name(values):
    good = {"title": "T", "purpose": "check", "data": {"name": "digits"}, "base_resolution": 16, "stem_stride": 1}
    good |= {"methods": ["baseline"], "seeds": [0], "train": {"epochs": 1}}
    try:
        profile = effnet_runs._checked_profile(Path("tiny.yaml"), good | values)
    except ValueError as error:
        assert str(error)
    else:
        assert isinstance(profile.num_classes, int)
        for seed in profile.seeds:
            assert isinstance(effnet_runs.Run(profile, profile.methods[0], seed).config, TrainConfig)


@examples(**GENTLE, max_examples=200)
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
        study.load_profile(path)


@examples(**GENTLE, max_examples=200)
@given(VALUES | st.dictionaries(st.sampled_from(["schema", "status", "seed", "config", "test"]), VALUES))
@example({"schema": 1, "status": "failed", "error": "x", "seed": 0, "config": {}})
def test_any_record_is_valid_or_refused(tmp_path, content):
    (tmp_path / "run.json").write_text(json.dumps(content))
    try:
        record = read_record(tmp_path)
    except ValueError as error:
        assert "is damaged" in str(error)
    else:
        assert record["status"] in ("finished", "failed", "diverged")


def test_answers_are_whole(tmp_path, digits, tiny_model, recipe):
    record = train(tiny_model(), digits, recipe(epochs=1), tmp_path)
    correct = np.load(tmp_path / "test_correct.npy", allow_pickle=False)
    assert correct.dtype == bool and record["test"]["top1"] == pytest.approx(100 * correct.mean())
