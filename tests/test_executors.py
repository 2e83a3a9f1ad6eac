"""Notebooks side by side, over Ray and by Slurm: what is killed, what fails, what is lacking."""

import contextlib
import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from functools import partial
from unittest.mock import Mock
from urllib.error import URLError

import kill
import psutil
import pytest
import torch
import yaml
from conftest import SMALL_PROFILE, write_record

from effnet_study.cli import main
from effnet_study.execution import local, notebook
from effnet_study.execution.clusters import SlurmTask, check_resources
from effnet_study.execution.local import RETRIES, Execution, execute, side_by_side
from effnet_study.execution.notebook import KILLED, PAPERMILL, TRY_AGAIN, run_notebook
from effnet_study.files import ROOT, RunLocked, hold
from effnet_study.profile import load_profile
from effnet_study.run import Run, plan_runs
from effnet_study.search import plan_search
from effnet_study.stop import Interrupted, ProcessKilled

TRAIN = {"epochs": 2, "batch_size": 4, "optimizer": "sgd", "lr": 0.02, "norm_momentum": 0.1, "save_steps": 5}
LONG = {"methods": ["baseline"], "data": {"name": "digits", "size": 16, "train_per_class": 20}, "train": TRAIN}
LONG |= {"base_resolution": 8}
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(path, results, *words) -> list[str]:
    return [sys.executable, "-m", "effnet_study", "study", str(path), "--results", str(results), *map(str, words)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict:
    """The end of a run of LONG's baseline that nobody disturbed."""
    place = tmp_path_factory.mktemp("undisturbed")
    path = place / "tiny.yaml"
    path.write_text(yaml.safe_dump(SMALL_PROFILE | LONG))
    train = [sys.executable, "-m", "effnet_study", "train", str(path), "baseline", "--results", str(place)]
    subprocess.run(train, cwd=ROOT, env=ONE_THREAD, check=True, capture_output=True, timeout=1500)
    return kill.end_of(Run.plan(path, "baseline", 0, place).run_dir)


def wait_for_checkpoint(run, process=None) -> int:
    """Wait until a run has a checkpoint, after five steps; the process that trains it."""
    until = time.monotonic() + 600
    while not (run.run_dir / "checkpoint.pt").exists():
        assert time.monotonic() < until and (process is None or process.poll() is None)
        time.sleep(0.02)
    return int((run.run_dir / ".holder").read_text().split()[1])


@pytest.mark.slow
def test_a_worker_of_ray_is_killed_and_the_study_completes_with_the_same_results(
    profile_file, tmp_path, request, undisturbed
):
    """Two workers; one is killed in the middle of its run, the other's notebook fails, which is no reason to retry."""
    pytest.importorskip("ray")
    path = profile_file(**LONG | {"methods": ["baseline", "resolution"]})
    run, other = plan_runs(load_profile(path), tmp_path / "ray")
    (other.run_dir / "weights.safetensors").mkdir(parents=True)  # in the way of a file
    words = ["--executor", "ray", "--device", "cpu", "--no-analysis"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command(path, tmp_path / "ray", *words), cwd=ROOT, **pipes)
    request.addfinalizer(process.kill)
    kernel = psutil.Process(wait_for_checkpoint(run, process))
    worker = kernel.parent().parent()
    assert "ray" in " ".join(worker.cmdline()) and "papermill" in " ".join(kernel.parent().cmdline())
    worker.send_signal(signal.SIGKILL)
    said, errors = process.communicate(timeout=1500)
    assert process.returncode == 1, errors  # for the notebook that failed
    assert "  continues " in said + errors
    assert (said + errors).count("02_single_axis_scaling failed") == 1
    assert kill.end_of(run.run_dir) == undisturbed
    assert run.executed.exists() and not list(run.study_dir.glob(".stop*"))


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_ray_is_not_asked_for_what_no_machine_has(profile_file, tmp_path, capsys):
    pytest.importorskip("ray")
    words = ["study", str(profile_file()), "--results", str(tmp_path), "--executor", "ray", "--device", "cuda"]
    assert main(words) == 2
    assert "a run needs 1 CPU and 1 GPU on one machine, the cluster's have: " in capsys.readouterr().err


def test_one_machine_has_all_that_a_run_needs():
    machines = [{"CPU": 32.0, "GPU": 4.0}, {"CPU": 16.0, "GPU": 8.0}, {"CPU": 64.0}]
    check_resources(machines, {"CPU": 32, "GPU": 4})
    with pytest.raises(RuntimeError, match="needs 33 CPU and 1 GPU on one machine"):  # together they would have them
        check_resources(machines, {"CPU": 33, "GPU": 1})


@pytest.mark.slow
def test_a_killed_kernel_is_replaced_and_goes_on(profile_file, tmp_path, request, undisturbed):
    path = profile_file(**LONG)
    run = Run.plan(path, "baseline", 0, tmp_path / "here")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    words = ["--threads", 1, "--no-analysis"]
    process = subprocess.Popen(command(path, tmp_path / "here", *words), cwd=ROOT, **pipes)
    request.addfinalizer(process.kill)
    os.kill(wait_for_checkpoint(run, process), signal.SIGKILL)
    said, errors = process.communicate(timeout=1500)
    assert process.returncode == 0, errors
    assert "its process was killed" in errors and "attempted again" in errors and "  continues " in said
    assert kill.end_of(run.run_dir) == undisturbed
    assert not (run.study_dir / "notebooks" / "05_analysis.ipynb").exists()


@pytest.mark.slow
def test_a_search_that_is_stopped_says_so_without_a_traceback(profile_file, tmp_path, request):
    path = profile_file(**LONG | {"methods": ["compound_searched"], "search": {"step": 0.4}})
    candidate = plan_search(load_profile(path), tmp_path)[1][0]
    words = [sys.executable, "-m", "effnet_study", "search", str(path), "--results", str(tmp_path), "--threads", "1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(words, cwd=ROOT, **pipes)
    request.addfinalizer(process.kill)
    wait_for_checkpoint(candidate, process)
    process.send_signal(signal.SIGTERM)
    said, errors = process.communicate(timeout=600)
    assert process.returncode == TRY_AGAIN and errors.splitlines()[-1].endswith("the same command continues")
    assert "Traceback" not in said + errors and len(errors.splitlines()) <= 2
    assert candidate.state() == "interrupted" and not list((tmp_path / "tiny" / "notebooks").iterdir())


def test_a_process_whose_starter_has_died_meanwhile_ends_at_once():
    command = [sys.executable, "-P", str(PAPERMILL), "{}", "1"]  # it was started by this process, not by 1
    assert subprocess.run(command, timeout=60).returncode == KILLED


# ---- one notebook, by a process that stands in for papermill's

STAND_IN = """
import json, os, signal, sys, time
arguments = json.loads(sys.argv[1])
print("said", os.environ.get("OMP_NUM_THREADS"), os.environ.get("EFFNET_TENSORBOARD"), flush=True)
print("wrong", os.environ.get("EFFNET_DEADLINE"), os.environ.get("OF_THIS_ONE"), file=sys.stderr, flush=True)
with open(arguments["output_path"], "w") as file:
    json.dump({"metadata": {"papermill": dict(arguments)}}, file)
DO
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A function that lets `run_notebook` start a small program, which ends as told; returns the path of the output."""

    def use(ending: str):
        (tmp_path / "stand_in.py").write_text(STAND_IN.replace("DO", ending))
        monkeypatch.setattr(notebook, "PAPERMILL", tmp_path / "stand_in.py")
        return tmp_path / "notebooks" / "out.ipynb"

    return use


def test_an_executed_notebook_appears_at_once_and_names_no_path_of_this_machine(stand_in, capsys):
    output = stand_in("assert os.getppid() == int(sys.argv[2])")
    parameters = {"seed": 7, "method": "baseline"}
    given = {"threads": 3, "deadline": 1e10, "tensorboard": True, "environment": {"OF_THIS_ONE": "5"}}
    run_notebook("01_baseline_b0", output, parameters, **given)
    assert [path.name for path in output.parent.iterdir()] == ["out.ipynb"]
    about = json.loads(output.read_text())["metadata"]["papermill"]
    assert (about["input_path"], about["output_path"]) == ("01_baseline_b0.ipynb", "out.ipynb")
    assert about["parameters"] == parameters and about["cwd"] == str(ROOT) and about["kernel_name"] == "python3"
    assert capsys.readouterr() == ("said 3 1\n", "wrong 10000000000.0 5\n")


def test_a_notebook_has_all_cores_and_time_unless_told_otherwise(stand_in, capsys, monkeypatch):
    for name in ("OMP_NUM_THREADS", "EFFNET_DEADLINE", "EFFNET_TENSORBOARD"):
        monkeypatch.delenv(name, raising=False)
    run_notebook("01_baseline_b0", stand_in(""), {})
    assert capsys.readouterr() == ("said None None\n", "wrong None None\n")


@pytest.mark.parametrize(
    "ending, error, kept",
    [
        ("sys.exit(1)", RuntimeError, True),
        ("sys.exit('an error')", RuntimeError, True),
        ("sys.exit(75)", Interrupted, False),
        ("sys.exit(69)", RunLocked, False),
        ("sys.exit(70)", ProcessKilled, True),
        ("os.kill(os.getpid(), signal.SIGKILL)", ProcessKilled, True),
        ("os.kill(os.getpid(), signal.SIGABRT)", RuntimeError, True),
    ],
)
def test_how_a_notebook_ended_is_told_from_its_process(stand_in, ending, error, kept):
    output = stand_in(ending)
    with pytest.raises((RuntimeError, Interrupted)) as raised:
        run_notebook("01_baseline_b0", output, {})
    assert type(raised.value) is error
    assert [path.name for path in output.parent.iterdir()] == ["out.partial.ipynb"] * kept
    assert ("out.partial.ipynb" in str(raised.value)) == kept


def test_a_notebook_that_does_not_stop_is_killed_after_its_grace(stand_in, tmp_path, monkeypatch):
    monkeypatch.setattr(notebook, "GRACE", 0.3)
    output, stop, begin = (
        stand_in("open(os.environ['EFFNET_STOP'], 'w'); time.sleep(60)"),
        tmp_path / "stop",
        time.time(),
    )
    with pytest.raises(RuntimeError, match="failed; see") as raised:  # it was asked to stop: no reason to try again
        run_notebook("01_baseline_b0", output, {}, stop=stop)
    assert not isinstance(raised.value, ProcessKilled) and stop.exists() and time.time() - begin < 30


def test_an_interrupt_stops_a_notebook_and_waits_for_its_end(stand_in, tmp_path):
    ending = """
os.kill(os.getppid(), signal.SIGINT)
while not os.path.exists(os.environ["EFFNET_STOP"]):
    time.sleep(0.01)
time.sleep(0.3)
open(arguments["output_path"] + ".ended", "w")
"""
    output = stand_in(ending)
    with pytest.raises(KeyboardInterrupt):
        run_notebook("01_baseline_b0", output, {})
    assert (output.parent / "out.partial.ipynb.ended").exists()


# ---- many notebooks


def test_an_interrupted_notebook_stops_the_others_and_those_that_have_not_begun(tmp_path):
    stop, begun, ended = tmp_path / "stop", [], []

    def call(execution: Execution) -> bool:
        begun.append(execution.notebook)
        if execution.notebook == "second":
            raise Interrupted("in time")
        until = time.monotonic() + 20
        while not stop.exists() and time.monotonic() < until:
            time.sleep(0.01)
        ended.append(execution.notebook)
        if execution.notebook == "first":
            raise Interrupted("asked to stop")

    executions = [Execution(about, tmp_path, {}) for about in ("second", "first", "third", "fourth", "fifth")]
    with pytest.raises(Interrupted, match="in time"):
        side_by_side(call, executions, 2, stop)
    assert stop.exists() and "fifth" not in begun and set(ended) == set(begun) - {"second"}


def test_all_notebooks_are_executed_though_one_fails(tmp_path):
    executions, seen = [Execution(about, tmp_path, {}) for about in "abc"], []
    assert (
        side_by_side(lambda one: seen.append(one.notebook) or one.notebook != "a", executions, 1, tmp_path / "s")
        is False
    )
    assert seen == ["a", "b", "c"] and not (tmp_path / "s").exists()
    assert side_by_side(lambda one: True, executions, 3, tmp_path / "s") is True


def test_an_interrupt_after_a_failure_is_not_lost(tmp_path):
    def call(execution: Execution) -> bool:
        if execution.notebook == "a":
            return False
        raise Interrupted("in time")

    with pytest.raises(Interrupted):
        side_by_side(call, [Execution(about, tmp_path, {}) for about in "ab"], 1, tmp_path / "stop")


@pytest.mark.parametrize("seconds, begins", [(19, False), (30, True), (None, True)])
def test_a_notebook_is_not_begun_with_too_little_time(monkeypatch, tmp_path, seconds, begins):
    seen = []
    monkeypatch.setattr(local, "run_notebook", lambda *arguments, **options: seen.append((arguments, options)))
    execution = Execution("01_baseline_b0", tmp_path / "out.ipynb", {"seed": 1})
    deadline = None if seconds is None else time.time() + seconds
    with contextlib.nullcontext() if begins else pytest.raises(Interrupted, match="too little time"):
        assert execute([execution], 1, 2, deadline=deadline, tensorboard=True)
    assert len(seen) == begins
    for arguments, options in seen:
        assert arguments == ("01_baseline_b0", tmp_path / "out.ipynb", {"seed": 1})
        assert (options["deadline"], options["threads"], options["tensorboard"]) == (deadline, 2, True)


def test_a_notebook_that_is_killed_again_and_again_is_given_up(monkeypatch, capsys, tmp_path):
    attempts = []

    def killed(*arguments, **options):
        attempts.append(arguments)
        raise ProcessKilled("01_baseline_b0: its process was killed")

    monkeypatch.setattr(local, "run_notebook", killed)
    monkeypatch.setattr(local, "PAUSE", 0)
    execution = Execution("01_baseline_b0", tmp_path / "out.ipynb", {})
    assert execute([execution], 1, None) is False
    assert len(attempts) == 1 + RETRIES and capsys.readouterr().err.count("attempted again") == RETRIES


@pytest.mark.parametrize("error", [RuntimeError("a cell failed"), RunLocked("held")])
def test_a_notebook_that_fails_by_itself_is_not_tried_again(monkeypatch, capsys, tmp_path, error):
    run_it = Mock(side_effect=error)
    monkeypatch.setattr(local, "run_notebook", run_it)
    assert execute([Execution("01_baseline_b0", tmp_path / "out.ipynb", {})], 1) is False
    assert run_it.call_count == 1 and capsys.readouterr().err == f"effnet: {error}\n"


@pytest.mark.parametrize(
    "jobs, gpus, visible, expected",
    [
        (1, 1, None, [None]),
        (2, 0, None, [None, None]),
        (2, 1, None, ["0", "1"]),
        (4, 1, None, ["0", "1", "2", "3"]),
        (2, 2, "4,5,6,7", ["4,5", "6,7"]),
        (3, 2, "4,5,6,7", ["4,5", "6,7", "4,5"]),
        (2, 4, "4,5", ["4,5", "4,5"]),  # too few: torch takes a list with repetitions for none
    ],
)
def test_notebooks_side_by_side_have_gpus_of_their_own(monkeypatch, tmp_path, jobs, gpus, visible, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible) if visible else monkeypatch.delenv(
        "CUDA_VISIBLE_DEVICES", raising=False
    )
    seen, together = [], threading.Barrier(jobs)

    def look(*arguments, environment, **options):
        seen.append(environment.get("CUDA_VISIBLE_DEVICES"))
        together.wait(20)

    monkeypatch.setattr(local, "run_notebook", look)
    executions = [Execution("01_baseline_b0", tmp_path, {}) for _ in range(jobs)]
    assert execute(executions, jobs, None, gpus)
    assert sorted(seen, key=str) == sorted(expected, key=str)


@pytest.fixture
def fake_slurm(tmp_path, monkeypatch):
    """An sbatch that keeps every script it is given and says that it was submitted; the scripts so far."""
    folder = tmp_path / "bin"
    folder.mkdir()
    sbatch = folder / "sbatch"
    sbatch.write_text(
        f'#!/bin/sh\nn=$(ls {folder} | grep -c script)\ncp "$1" {folder}/script$n\necho "Submitted batch job 10$n"\n'
    )
    sbatch.chmod(sbatch.stat().st_mode | stat.S_IXUSR)
    (folder / "srun").symlink_to(sbatch)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return lambda: [path.read_text().splitlines() for path in sorted(folder.glob("script*"))]


def test_slurm_is_given_one_array_job_and_one_that_follows(profile_file, tmp_path, fake_slurm, capsys):
    pytest.importorskip("submitit")
    methods = ["baseline", "depth", "compound_searched"]
    path = profile_file(methods=methods, seeds=[0, 1], search={"step": 0.4}, devices=2)
    write_record(Run.plan(path, "depth", 1, tmp_path))
    words = ["--executor", "slurm", "--time-budget", "90m", "--jobs", "3", "--threads", "4"]
    assert main(["study", str(path), "--results", str(tmp_path), *words]) == 0
    assert "EFFNET_DEADLINE" not in os.environ  # the time of a job is not that of the submission
    array, closing = fake_slurm()
    both = ["--requeue", "--time=90", "--cpus-per-task=4", "--gpus-per-node=2", "--nodes=1", "--signal=USR2@90"]
    for line in both:
        assert f"#SBATCH {line}" in array and f"#SBATCH {line}" in closing, line
    assert "#SBATCH --array=0-4%3" in array  # three runs that are to do, one without its notebook, the search
    assert "#SBATCH --dependency=afterany:100" in closing and not [w for w in closing if "--array" in w]
    assert "#SBATCH --open-mode=append" in array
    assert "effnet status" in capsys.readouterr().out


def test_slurm_is_asked_for_no_gpu_by_a_study_on_the_cpu_that_is_only_to_be_closed(profile_file, tmp_path, fake_slurm):
    pytest.importorskip("submitit")
    path = profile_file(methods=["baseline"])
    run = Run.plan(path, "baseline", 0, tmp_path)
    write_record(run)
    run.executed.parent.mkdir()
    run.executed.touch()
    words = ["--executor", "slurm", "--device", "cpu"]
    assert main(["study", str(path), "--results", str(tmp_path), *words]) == 0
    (closing,) = fake_slurm()
    assert not [line for line in closing if "gpus" in line or "dependency" in line]
    assert "#SBATCH --time=60" in closing and "#SBATCH --cpus-per-task=1" in closing


def test_slurm_is_not_given_too_little_time_nor_nothing_to_do(profile_file, tmp_path, fake_slurm, capsys):
    pytest.importorskip("submitit")
    words = ["study", str(profile_file(methods=["baseline"])), "--results", str(tmp_path), "--executor", "slurm"]
    assert main([*words, "--time-budget", "1m"]) == 2 and "at least 5m" in capsys.readouterr().err
    run = Run.plan(words[1], "baseline", 0, tmp_path)
    write_record(run)
    run.executed.parent.mkdir(exist_ok=True)
    run.executed.touch()
    assert main([*words, "--no-analysis"]) == 0 and "Nothing left to run" in capsys.readouterr().out
    assert fake_slurm() == []


def test_without_slurm_that_is_said(profile_file, tmp_path, capsys, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    path = profile_file(methods=["baseline"])
    analysed = tmp_path / "tiny" / "notebooks" / "05_analysis.ipynb"
    analysed.parent.mkdir(parents=True)
    analysed.touch()
    assert main(["study", str(path), "--results", str(tmp_path), "--executor", "slurm"]) == 2
    assert "are you indeed on a slurm cluster" in capsys.readouterr().err and analysed.exists()


@pytest.mark.slow
def test_a_job_of_slurm_that_is_warned_stops_and_goes_on_when_it_is_started_again(profile_file, tmp_path, undisturbed):
    """As submitit does it, but on this machine: its local jobs get the same signal and are queued again."""
    submitit = pytest.importorskip("submitit")
    path = profile_file(**LONG)
    run = Run.plan(path, "baseline", 0, tmp_path)
    parameters = {"profile": str(path), "results": str(tmp_path), "device": "cpu"}
    execution = Execution("01_baseline_b0", run.executed, parameters)
    executor = submitit.AutoExecutor(tmp_path / "logs", cluster="local")
    executor.update_parameters(timeout_min=10)
    job = executor.submit(SlurmTask(partial(execute, [execution], 1, 1), tmp_path / "stop"))
    kernel = psutil.Process(wait_for_checkpoint(run))
    papermill = kernel.parent()
    for process in (kernel, papermill, papermill.parent()):  # Slurm warns every process of a job
        process.send_signal(signal.SIGUSR2)
    assert job.result() is True and "  continues " in job.stdout()
    assert kill.end_of(run.run_dir) == undisturbed


@pytest.mark.parametrize(
    "changes, words, message",
    [
        ({"data": {"name": "cifar10"}}, [], "cifar10 is not at .*put cifar-10-python.tar.gz there by hand"),
        ({}, ["--device", "cuda"], "device: 'cuda' was asked for, but torch finds no CUDA GPU; use 'cpu'"),
    ],
)
def test_what_a_study_lacks_is_told_once(profile_file, tmp_path, monkeypatch, capsys, changes, words, message):
    monkeypatch.setenv("EFFNET_DATA", str(tmp_path / "nothing"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("urllib.request.OpenerDirector.open", Mock(side_effect=URLError("no network")))
    assert main(["study", str(profile_file(**changes)), "--results", str(tmp_path), *words]) == 2
    said = capsys.readouterr().err
    assert len(re.findall(message, said)) == 1 and "failed; see" not in said
    assert not (tmp_path / "tiny").exists()


def test_a_run_that_another_trains_is_left_to_it(profile_file, tmp_path, monkeypatch, capsys):
    path = profile_file(methods=["baseline", "width"])
    held, free = plan_runs(load_profile(path), tmp_path)

    def pretend(notebook, output, parameters, **options):
        if parameters["method"] == "baseline":
            raise RunLocked("01_baseline_b0 is left to the process that trains its run")
        write_record(free)

    monkeypatch.setattr(local, "run_notebook", pretend)
    held.run_dir.mkdir(parents=True)
    with hold(held.run_dir):
        assert main(["study", str(path), "--results", str(tmp_path), "--device", "cpu"]) == TRY_AGAIN
    said, errors = capsys.readouterr()
    assert "is left to the process that trains its run" in errors and f"is trained by process {os.getpid()} on" in said
    assert f"Another process is at work on {held.run_dir}" in said and free.state() == "finished"
    assert not (held.study_dir / "notebooks" / "05_analysis.ipynb").exists()


@pytest.mark.slow
def test_a_notebook_whose_run_is_held_after_all_leaves_nothing_behind(profile_file, tmp_path):
    run = Run.plan(profile_file(), "baseline", 0, tmp_path)
    run.run_dir.mkdir(parents=True)
    parameters = {"profile": run.profile.source, "results": str(tmp_path), "device": "cpu"}
    with hold(run.run_dir), pytest.raises(RunLocked):
        run_notebook("01_baseline_b0", run.executed, parameters)
    assert not list(run.executed.parent.iterdir())
