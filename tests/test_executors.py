"""Notebooks side by side, over Ray and by Slurm: what is killed, what fails, what is lacking."""

import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from unittest.mock import Mock
from urllib.error import URLError

import kill
import psutil
import pytest
import torch
from conftest import write_record

import effnet_execute
import effnet_study as study
from effnet_execute import SlurmTask
from effnet_lib import Held, Killed, hold, holder_of

TRAIN = {"epochs": 2, "batch_size": 4, "optimizer": "sgd", "lr": 0.02, "norm_momentum": 0.1, "save_steps": 5}
LONG = {"methods": ["baseline"], "data": {"name": "digits", "size": 16, "train_per_class": 20}, "train": TRAIN}
LONG |= {"base_resolution": 8}
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(path, results, *words) -> list[str]:
    return [sys.executable, "-m", "effnet_study", "study", str(path), "--results", str(results), *map(str, words)]


def alone(path, results) -> dict:
    """The end of a run of the baseline that nobody disturbed."""
    words = ["train", str(path), "baseline", "--results", str(results)]
    train = [sys.executable, "-m", "effnet_study", *words]
    subprocess.run(train, cwd=study.ROOT, env=ONE_THREAD, check=True, capture_output=True, timeout=1500)
    return kill.end_of(study.Run.plan(path, "baseline", 0, results).directory)


def wait_for_checkpoint(run, process=None) -> int:
    """Wait until a run has a checkpoint, after five steps; the process that trains it."""
    until = time.monotonic() + 600
    while not (run.directory / "checkpoint.pt").exists():
        assert time.monotonic() < until and (process is None or process.poll() is None)
        time.sleep(0.02)
    return int((run.directory / ".holder").read_text().split()[1])


def test_a_worker_of_ray_is_killed_and_the_study_completes_with_the_same_results(profile_file, tmp_path, request):
    """Two workers; one is killed in the middle of its run, the other's notebook fails, which is no reason to retry."""
    pytest.importorskip("ray")
    path = profile_file(**LONG | {"methods": ["baseline", "resolution"]})
    run, other = study.plan_runs(study.load_profile(path), tmp_path / "ray")
    (other.directory / "weights.safetensors").mkdir(parents=True)  # in the way of a file
    words = ["--executor", "ray", "--device", "cpu", "--no-analysis"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command(path, tmp_path / "ray", *words), cwd=study.ROOT, **pipes)
    request.addfinalizer(process.kill)
    kernel = psutil.Process(wait_for_checkpoint(run, process))
    worker = kernel.parent().parent()
    assert "ray" in " ".join(worker.cmdline()) and "papermill" in " ".join(kernel.parent().cmdline())
    worker.send_signal(signal.SIGKILL)
    said, errors = process.communicate(timeout=1500)
    assert process.returncode == 1, errors  # for the notebook that failed
    assert "  continues " in said + errors
    assert (said + errors).count("02_single_axis_scaling failed") == 1
    assert kill.end_of(run.directory) == alone(path, tmp_path / "alone")
    assert run.executed.exists() and not list(run.folder.glob(".stop*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_ray_is_not_asked_for_what_no_machine_has(profile_file, tmp_path, capsys):
    pytest.importorskip("ray")
    words = ["study", str(profile_file()), "--results", str(tmp_path), "--executor", "ray", "--device", "cuda"]
    assert study.main(words) == 2
    assert "a run needs 1 CPU and 1 GPU on one machine, the cluster's have: " in capsys.readouterr().err


def test_a_gpu_brings_its_share_of_the_cores():
    machines = [{"CPU": 32.0, "GPU": 4.0}, {"CPU": 16.0, "GPU": 8.0}, {"CPU": 64.0}]
    assert [effnet_execute._ray_threads(machines, gpus) for gpus in (0, 1, 4, 8)] == [1, 2, 8, 16]
    effnet_execute._check_ray(machines, {"CPU": 32, "GPU": 4})
    with pytest.raises(RuntimeError, match="needs 33 CPU and 1 GPU on one machine"):  # together they would have them
        effnet_execute._check_ray(machines, {"CPU": 33, "GPU": 1})


def test_a_killed_kernel_is_replaced_and_goes_on(profile_file, tmp_path, request):
    path = profile_file(**LONG)
    run = study.Run.plan(path, "baseline", 0, tmp_path / "here")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    words = ["--threads", 1, "--no-analysis"]
    process = subprocess.Popen(command(path, tmp_path / "here", *words), cwd=study.ROOT, **pipes)
    request.addfinalizer(process.kill)
    os.kill(wait_for_checkpoint(run, process), signal.SIGKILL)
    said, errors = process.communicate(timeout=1500)
    assert process.returncode == 0, errors
    assert "its process was killed" in errors and "attempted again" in errors and "  continues " in said
    assert kill.end_of(run.directory) == alone(path, tmp_path / "alone")
    assert not (run.folder / "notebooks" / "05_analysis.ipynb").exists()


def test_a_process_whose_starter_has_died_meanwhile_ends_at_once():
    command = [sys.executable, "-c", effnet_execute._EXECUTE, "{}", "1"]  # it was started by this process, not by 1
    assert subprocess.run(command, timeout=60).returncode == effnet_execute.KILLED


def test_a_notebook_that_is_killed_again_and_again_is_given_up(monkeypatch, capsys, tmp_path):
    attempts = []

    def killed(*arguments):
        attempts.append(arguments)
        raise Killed("01_baseline_b0: its process was killed")

    monkeypatch.setattr(effnet_execute, "run_notebook", killed)
    execution = study.Execution("about", "01_baseline_b0", tmp_path / "out.ipynb", {})
    assert study.execute([execution], 1, None) is False
    assert len(attempts) == 1 + study.RETRIES and capsys.readouterr().err.count("attempted again") == study.RETRIES


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

    def look(*arguments):
        seen.append(arguments[-1].get("CUDA_VISIBLE_DEVICES"))
        together.wait(20)

    monkeypatch.setattr(effnet_execute, "run_notebook", look)
    executions = [study.Execution("", "01_baseline_b0", tmp_path, {}) for _ in range(jobs)]
    assert study.execute(executions, jobs, None, gpus)
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
    write_record(study.Run.plan(path, "depth", 1, tmp_path))
    words = ["--executor", "slurm", "--time-budget", "90m", "--jobs", "3", "--threads", "4"]
    assert study.main(["study", str(path), "--results", str(tmp_path), *words]) == 0
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
    run = study.Run.plan(path, "baseline", 0, tmp_path)
    write_record(run)
    run.executed.parent.mkdir()
    run.executed.touch()
    words = ["--executor", "slurm", "--device", "cpu"]
    assert study.main(["study", str(path), "--results", str(tmp_path), *words]) == 0
    (closing,) = fake_slurm()
    assert not [line for line in closing if "gpus" in line or "dependency" in line]
    assert "#SBATCH --time=60" in closing and "#SBATCH --cpus-per-task=1" in closing


def test_slurm_is_not_given_too_little_time_nor_nothing_to_do(profile_file, tmp_path, fake_slurm, capsys):
    pytest.importorskip("submitit")
    words = ["study", str(profile_file(methods=["baseline"])), "--results", str(tmp_path), "--executor", "slurm"]
    assert study.main([*words, "--time-budget", "1m"]) == 2 and "at least 5m" in capsys.readouterr().err
    run = study.Run.plan(words[1], "baseline", 0, tmp_path)
    write_record(run)
    run.executed.parent.mkdir(exist_ok=True)
    run.executed.touch()
    assert study.main([*words, "--no-analysis"]) == 0 and "submitted 0 jobs" in capsys.readouterr().out
    assert fake_slurm() == []


def test_without_slurm_that_is_said(profile_file, tmp_path, capsys, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    path = profile_file(methods=["baseline"])
    analysed = tmp_path / "tiny" / "notebooks" / "05_analysis.ipynb"
    analysed.parent.mkdir(parents=True)
    analysed.touch()
    assert study.main(["study", str(path), "--results", str(tmp_path), "--executor", "slurm"]) == 2
    assert "executor slurm: " in capsys.readouterr().err and analysed.exists()


def test_a_job_of_slurm_that_is_warned_stops_and_goes_on_when_it_is_started_again(profile_file, tmp_path):
    """As submitit does it, but on this machine: its local jobs get the same signal and are queued again."""
    submitit = pytest.importorskip("submitit")
    path = profile_file(**LONG)
    run = study.Run.plan(path, "baseline", 0, tmp_path)
    parameters = {"profile": str(path), "results": str(tmp_path), "device": "cpu"}
    execution = study.Execution("about", "01_baseline_b0", run.executed, parameters, run.directory)
    executor = submitit.AutoExecutor(tmp_path / "logs", cluster="local")
    executor.update_parameters(timeout_min=10)
    job = executor.submit(SlurmTask(study.execute, ([execution], 1, 1), tmp_path / "stop", run.directory))
    kernel = psutil.Process(wait_for_checkpoint(run))
    papermill = kernel.parent()
    for process in (kernel, papermill, papermill.parent()):  # Slurm warns every process of a job
        process.send_signal(signal.SIGUSR2)
    assert job.result() is True and "  continues " in job.stdout()
    assert kill.end_of(run.directory) == alone(path, tmp_path / "alone")


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
    assert study.main(["study", str(profile_file(**changes)), "--results", str(tmp_path), *words]) == 2
    said = capsys.readouterr().err
    assert len(re.findall(message, said)) == 1 and "failed; see" not in said
    assert not (tmp_path / "tiny").exists()


def test_a_run_that_another_trains_is_left_to_it(profile_file, tmp_path, monkeypatch, capsys):
    path = profile_file(methods=["baseline", "width"])
    held, free = study.plan_runs(study.load_profile(path), tmp_path)
    monkeypatch.setattr(effnet_execute, "run_notebook", lambda *arguments: write_record(free))
    monkeypatch.setattr(effnet_execute, "_wait_until_free", lambda folder, seconds: holder_of(folder))
    held.directory.mkdir(parents=True)
    with hold(held.directory):
        assert study.main(["study", str(path), "--results", str(tmp_path), "--device", "cpu"]) == study.TRY_AGAIN
    said = capsys.readouterr().out
    assert re.search(rf"baseline, seed 0, 16 px: left to process {os.getpid()} on", said)
    assert f"Another process is at work on {held.directory}" in said and free.state() == "finished"
    assert not (held.folder / "notebooks" / "05_analysis.ipynb").exists()


def test_a_notebook_whose_run_is_held_after_all_leaves_nothing_behind(profile_file, tmp_path):
    run = study.Run.plan(profile_file(), "baseline", 0, tmp_path)
    run.directory.mkdir(parents=True)
    parameters = {"profile": run.profile.source, "results": str(tmp_path), "device": "cpu"}
    with hold(run.directory), pytest.raises(Held):
        study.run_notebook("01_baseline_b0", run.executed, parameters)
    assert not list(run.executed.parent.iterdir())
