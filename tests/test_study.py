"""Profiles, planned runs, records as tables, the command."""

import json
import re
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import write_record
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from effnet_lib import TABLE7, Scaling
from effnet_study import parallel
from effnet_study import run as runs_module
from effnet_study.analysis.recipes import load_pilots
from effnet_study.cli import main
from effnet_study.coefficients import made_by
from effnet_study.data.load import load_data
from effnet_study.execution import local
from effnet_study.execution.local import plan_workers
from effnet_study.execution.notebook import TRY_AGAIN
from effnet_study.files import RunLocked, hold, load_history, write_json
from effnet_study.methods import parse_method
from effnet_study.profile import load_profile, profile_names
from effnet_study.record import read_record
from effnet_study.run import Run, load_runs, pilot, plan_runs
from effnet_study.stop import ProcessKilled
from effnet_study.study import plan

# ---- profiles


@pytest.mark.parametrize("matching", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_profiles_that_ship_are_valid(matching):
    """matching: with the methods whose coefficients are found by counting the FLOPs of many networks."""
    for profile in map(load_profile, profile_names()):
        matched = [m for m in profile.methods if parse_method(m).matched or parse_method(m).times]
        methods = [m for m in profile.methods if matching or m not in matched]
        runs = plan_runs(profile, methods=methods, seeds=profile.seeds[:1]) if methods else []
        runs = [run for run in runs if not run.waiting]
        assert all(run.config.resolution >= profile.base_resolution for run in runs), profile.name
        recipes = {tuple(sorted(run.config.model_options().items())) for run in runs}
        assert len(recipes) == bool(runs), profile.name  # the same regularisation for every method


def test_evidence_has_the_seeds_that_the_rules_ask_for():
    for profile in map(load_profile, profile_names()):
        claims = profile.parent is None  # else there is no outcome
        assert len(profile.seeds) >= ({"check": 1, "exploratory": 3, "evidence": 5}[profile.purpose] if claims else 1)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"metods": ["depth"]}, "unknown key 'metods'.*Did you mean 'methods'"),
        ({"title": None}, "title is missing"),
        ({"seeds": 3}, "seeds: expected a valid tuple, got 3"),
        ({"seeds": [0, 0]}, "seeds: expected a list without repetitions"),
        ({"seeds": ["0"]}, "seeds: 0: expected a valid integer, got '0'"),
        ({"seeds": []}, "seeds: expected a list"),
        ({"methods": ["baseline", "dept"]}, "unknown method 'dept'.*Did you mean 'depth'"),
        ({"purpose": "proof"}, "unknown purpose 'proof'"),
        ({"data": {"name": "digits", "siez": 8}}, "data: unknown setting 'siez'.*Did you mean 'size'"),
        ({"data": {"size": 8}}, "data: name is missing"),
        ({"base_resolution": 4}, "base_resolution: expected a value greater than or equal to 8, got 4"),
        ({"base_resolution": "32"}, "base_resolution: expected a valid integer, got '32'"),
        ({"stem_stride": 4}, r"unknown stem_stride 4\. Valid: 1, 2"),
        ({"train": {"lr": "fast"}}, "train: lr: expected a valid number, got 'fast'"),
        ({"train": {"epoch": 3}}, "train: unknown setting 'epoch'.*Did you mean 'epochs'"),
        ({"train": {"seed": 3}}, "train: seed follows from"),
    ],
)
def test_bad_profiles_are_refused_by_file_and_name(profile_file, changes, message):
    with pytest.raises(ValueError, match=rf"profile tiny\.yaml: {message}"):
        load_profile(profile_file(**changes))


def test_unknown_and_unreadable_profiles_are_named(tmp_path):
    with pytest.raises(ValueError, match="unknown profile 'quik'.*Did you mean 'quick'"):
        load_profile("quik")
    with pytest.raises(ValueError, match=r"nowhere\.yaml: cannot be read"):
        load_profile(tmp_path / "nowhere.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1")
    with pytest.raises(ValueError, match=r"broken\.yaml: cannot be read"):
        load_profile(tmp_path / "broken.yaml")
    with pytest.raises(ValueError, match="unknown profile '../quick'"):
        load_profile("../quick")


def test_methods_are_the_papers_rows_or_matched_to_compound(profile_file):
    profile = load_profile(profile_file(methods=["compound", "width_matched"]))
    assert profile.scaling("compound") == TABLE7["compound"]
    matched = profile.scaling("width_matched")
    assert matched.width > TABLE7["width"].width and matched.depth == matched.resolution == 1


# ---- runs


def test_runs_are_planned_seed_by_seed_into_folders_that_say_what_they_are(profile_file, tmp_path):
    profile = load_profile(profile_file(seeds=[3, 1]))
    runs = plan_runs(profile, tmp_path)
    assert [(run.seed, run.method) for run in runs] == [(s, m) for s in (3, 1) for m in profile.methods]
    assert runs[4].run_dir == tmp_path / "tiny" / "runs" / "compound_d1.40_w1.20_r1.30_seed3"
    assert runs[4].config.resolution == 21
    only = plan_runs(profile, tmp_path, methods=["depth"], seeds=[1])
    assert [(run.seed, run.method) for run in only] == [(1, "depth")]
    with pytest.raises(ValueError, match="unknown seed of profile tiny 2"):
        plan_runs(profile, seeds=[2])
    with pytest.raises(ValueError, match="unknown method of profile tiny 'width_matched'"):
        plan_runs(profile, methods=["width_matched"])


def test_the_initial_weights_follow_the_seed(profile_file):
    path = profile_file(seeds=[0, 1])
    weights = [Run.plan(path, "baseline", seed).model(10).classifier.weight for seed in (0, 0, 1)]
    assert (weights[0] == weights[1]).all() and not (weights[0] == weights[2]).all()


def test_a_run_is_stale_once_its_network_or_data_change(profile_file, tmp_path):
    run = Run.plan(profile_file(), "baseline", 0, tmp_path)
    write_record(run, **run.about)
    assert run.state() == "finished"
    other_data = {"name": "digits", "size": 16, "train_per_class": 5}
    for changes in ({"stem_stride": 1}, {"data": other_data}, {"base_resolution": 17}):
        assert Run.plan(profile_file(**changes), "baseline", 0, tmp_path).state() == "stale"
    assert Run.plan(profile_file(title="Other words"), "baseline", 0, tmp_path).state() == "finished"


def test_only_finished_runs_of_this_profile_have_scores(profile_file, tmp_path):
    path = profile_file()
    runs = plan_runs(load_profile(path), tmp_path)
    write_record(runs[0], top1=61.5)
    write_record(runs[1], config={**dict(runs[1].config), "lr": 9.0})
    table = load_runs(load_profile(path), tmp_path)
    assert table["method"].tolist() == [run.method for run in runs]
    assert table["status"].tolist() == ["finished", "stale", "missing", "missing", "missing"]
    assert table["top1"].tolist()[0] == 61.5 and table["top1"][1:].isna().all()


# ---- devices, and notebooks side by side


@pytest.mark.parametrize("devices", [0, "all", 1.5, True])
def test_impossible_devices_are_refused(profile_file, devices):
    with pytest.raises(ValueError, match="tiny.yaml: devices: .*expected"):
        load_profile(profile_file(devices=devices))


def test_devices_are_counted_or_asked_for(profile_file, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    run = Run.plan(profile_file(devices="auto"), "baseline", 0)
    assert run._processes(None) == 2 and run._processes("cpu") == 1
    with pytest.raises(ValueError, match="devices: profile tiny asks for 3, torch finds 2; use auto"):
        Run.plan(profile_file(devices=3), "baseline", 0)._processes("cuda")


@pytest.mark.slow
def test_an_error_in_one_of_several_processes_is_the_runs(profile_file, tmp_path):
    train = {"epochs": 1, "batch_size": 20, "optimizer": "sgd", "lr": 0.05, "sync_norm": True}
    run = Run.plan(profile_file(devices=2, train=train), "baseline", 0, tmp_path)
    with pytest.raises(RuntimeError, match=r"failed \(process \d of 2: ValueError: sync_norm: torch synchronises"):
        run.train(load_data(**run.profile.data.given()), "cpu")
    assert run.state() == "failed"
    with pytest.raises(RuntimeError, match="failed .process . of 2"):  # found, not run again
        run.train(load_data(**run.profile.data.given()), "cpu")


def test_divergence_in_several_processes_is_no_other_failure(profile_file, tmp_path, monkeypatch):
    run = Run.plan(profile_file(devices=2), "baseline", 0, tmp_path)

    def diverge(*arguments):
        write_record(run, status="diverged", diverged={"epoch": 1, "step": 2, "lr": 0.1})
        return "process 0 of 2: RuntimeError: diverged"

    monkeypatch.setattr(runs_module, "launch", diverge)
    with pytest.raises(RuntimeError, match="diverged in epoch 1, step 2"):
        run.train(None, "cpu")
    assert run.state() == "diverged"


def test_processes_out_of_memory_are_started_again(profile_file, tmp_path, monkeypatch):
    run, starts = Run.plan(profile_file(devices=2), "baseline", 0, tmp_path), []

    def launch(config, share):
        def start(*arguments):
            starts.append(config.nproc_per_node)
            if len(starts) == 3:
                return write_record(run)
            run.run_dir.mkdir(parents=True, exist_ok=True)
            (run.run_dir / "micro_batch").write_text(str(10 // len(starts)))
            failure = ProcessFailure(0, 1, 1, "none")
            raise ChildFailedError("share", {0: failure})

        return start

    monkeypatch.setattr(parallel, "elastic_launch", launch)
    assert run.train(None, "cpu")["status"] == "finished" and starts == [2, 2, 2]


@pytest.mark.parametrize(
    "cores, count, devices, words, expected",
    [
        (8, 5, 1, {}, (5, 1, 0)),
        (8, 2, 1, {}, (2, 4, 0)),
        (2, 40, 1, {}, (2, 1, 0)),
        (8, 40, 1, {"jobs": 2}, (2, 4, 0)),
        (8, 40, 1, {"jobs": 2, "threads": 3}, (2, 3, 0)),
        (8, 5, 4, {}, (2, 1, 0)),
        (8, 1, 1, {}, (1, 8, 0)),
        (1, 5, 2, {}, (1, 1, 0)),
        (8, 5, 1, {"device": None}, (4, 2, 1)),
        (8, 2, 1, {"device": "cuda"}, (2, 4, 1)),
        (8, 1, 1, {"device": None}, (1, None, 1)),  # alone: torch's own number of threads
        (8, 5, 2, {"device": None}, (2, 2, 2)),
        (8, 5, "auto", {"device": None}, (1, None, 4)),
    ],
)
def test_notebooks_side_by_side_share_the_cores(profile_file, monkeypatch, cores, count, devices, words, expected):
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    monkeypatch.setattr(local, "memory", lambda: 2**38)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    profile = load_profile(profile_file(devices=devices))
    assert plan_workers(count, profile, **{"device": "cpu", **words}) == expected


def test_each_notebook_on_a_cpu_has_four_gib_of_memory(profile_file, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    profile = load_profile(profile_file())
    for gib, jobs in ((1, 1), (7, 1), (12, 3), (100, 5)):
        monkeypatch.setattr(local, "memory", lambda gib=gib: gib * 2**30)
        assert plan_workers(5, profile, "cpu")[0] == jobs


# ---- a study, whose notebooks are not executed


@pytest.fixture
def pretended(monkeypatch):
    """Notebooks that only leave their results: (name, parameters) of each in turn. `fail` names methods that fail."""
    done, fail = [], []

    def pretend(notebook, output, parameters, **options):
        done.append((notebook, parameters))
        method, place = parameters.get("method"), parameters["results"]
        if method in fail:
            raise RuntimeError(f"{notebook} failed")
        if method is not None:
            write_record(Run.plan(parameters["profile"], method, parameters["seed"], place))
        if notebook == "03_coefficient_search":
            profile = load_profile(parameters["profile"])
            found = {"alpha": 1.4, "beta": 1.0, "gamma": 1.2, "made_by": made_by(profile)}
            (tmp := output.parents[1] / "search").mkdir(exist_ok=True)
            write_json(tmp.parent / "coefficients.json", found)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.touch()

    monkeypatch.setattr(local, "run_notebook", pretend)
    return done, fail


def test_a_study_executes_runs_search_and_analysis_in_turn(profile_file, tmp_path, pretended, monkeypatch, capsys):
    done, _ = pretended
    matched = SimpleNamespace(scaling=Scaling(1.4, 1.1, 1.2))  # to count the FLOPs of many networks takes seconds
    monkeypatch.setattr("effnet_study.profile.match_flops", lambda *arguments, **options: matched)
    path = profile_file(methods=["baseline", "depth", "compound_searched"], search={"step": 0.4}, seeds=[3])
    words = ["study", str(path), "--results", str(tmp_path), "--device", "cpu", "--jobs", "1"]
    assert main(words) == 0
    common = {"profile": str(path), "results": str(tmp_path)}
    assert done[0] == ("01_baseline_b0", {**common, "method": "baseline", "seed": 3, "device": "cpu"})
    assert done[1] == ("02_single_axis_scaling", {**common, "method": "depth", "seed": 3, "device": "cpu"})
    assert done[2] == ("03_coefficient_search", {**common, "device": "cpu"})
    assert done[3] == ("04_compound_scaling", {**common, "method": "compound_searched", "seed": 3, "device": "cpu"})
    assert sorted(done[4:], key=str) == [("00_architecture", {**common, "explorer": False}), ("05_analysis", common)]
    said = capsys.readouterr().out
    assert "Tiny: 3 of 3 runs to do" in said and "01_baseline_b0_baseline_seed3\n" in said and "3 finished" in said
    notebooks = tmp_path / "tiny" / "notebooks"
    assert (notebooks / "04_compound_scaling_compound_searched_seed3.ipynb").exists()

    done.clear()  # nothing is left
    assert main(words) == 0 and done == []
    assert "Tiny: 0 of 3 runs to do" in capsys.readouterr().out

    for lost, again in (  # a study that was killed between a run's end and its notebook's
        ("05_analysis", {"00_architecture", "05_analysis"}),
        ("01_baseline_b0_baseline_seed3", {"01_baseline_b0", "00_architecture", "05_analysis"}),
        ("03_coefficient_search", {"03_coefficient_search"}),
    ):
        done.clear()
        (notebooks / f"{lost}.ipynb").unlink()
        assert main(words) == 0 and {name for name, _ in done} == again, lost

    done.clear()
    assert main([*words, "--analysis"]) == 0 and {name for name, _ in done} == {"00_architecture", "05_analysis"}
    (notebooks / "05_analysis.ipynb").unlink()
    done.clear()
    assert main([*words, "--no-analysis"]) == 0 and done == []


def test_a_run_that_fails_is_told_and_tried_again_only_when_asked(profile_file, tmp_path, pretended, capsys):
    done, fail = pretended
    path = profile_file(methods=["baseline", "depth", "width"])
    words = ["study", str(path), "--results", str(tmp_path), "--device", "cpu", "--jobs", "1"]
    baseline, depth, width = plan_runs(load_profile(path), tmp_path)
    fail.append("depth")
    assert main(words) == 1
    names = ["00_architecture", "01_baseline_b0", "02_single_axis_scaling", "02_single_axis_scaling", "05_analysis"]
    assert sorted(name for name, _ in done) == names  # several at the same time
    assert "effnet: 02_single_axis_scaling failed" in capsys.readouterr().err
    assert [run.state() for run in (baseline, depth, width)] == ["finished", "missing", "finished"]
    write_record(depth, status="failed", error="of the machine")
    write_record(width, status="diverged", diverged={"epoch": 1, "step": 2, "lr": 0.1})
    (width.run_dir / "checkpoint.pt").touch()
    done.clear()
    assert main(words) == 1 and done == []
    fail.clear()
    assert main([*words, "--retry"]) == 0
    assert [parameters.get("method") for _, parameters in done[:2]] in (["depth", "width"], ["width", "depth"])
    assert sorted(name for name, _ in done[2:]) == ["00_architecture", "05_analysis"]  # at the same time
    assert json.loads((depth.run_dir / "run.earlier.json").read_text())["status"] == "failed"
    assert not (width.run_dir / "checkpoint.pt").exists()  # a run that diverged starts again


def test_an_analysis_of_fewer_runs_made_meanwhile_is_made_again(profile_file, tmp_path, pretended, monkeypatch):
    (done, _), pretend = pretended, local.run_notebook

    def as_make_report_does(notebook, output, parameters, **options):
        pretend(notebook, output, parameters, **options)
        output.with_name("05_analysis.ipynb").touch()

    monkeypatch.setattr(local, "run_notebook", as_make_report_does)
    path = profile_file(methods=["baseline"])
    assert main(["study", str(path), "--results", str(tmp_path), "--device", "cpu"]) == 0
    assert sorted(name for name, _ in done) == ["00_architecture", "01_baseline_b0", "05_analysis"]


def test_a_part_of_a_study(profile_file, tmp_path, pretended):
    done, _ = pretended
    path = profile_file(methods=["baseline", "depth", "width"], seeds=[0, 1, 2])
    words = ["study", str(path), "--results", str(tmp_path), "--methods", "baseline", "width", "--seeds", "2", "1"]
    assert main([*words, "--no-analysis", "--jobs", "1", "--device", "cpu"]) == 0
    asked = sorted((parameters["seed"], parameters["method"]) for _, parameters in done)
    assert asked == [(seed, method) for seed in (1, 2) for method in ("baseline", "width")]


def test_a_second_study_leaves_the_analysis_to_the_first(profile_file, tmp_path, pretended, capsys):
    done, _ = pretended
    path = profile_file(methods=["baseline"])
    (tmp_path / "tiny").mkdir()
    with hold(tmp_path / "tiny"):
        assert main(["study", str(path), "--results", str(tmp_path), "--device", "cpu"]) == TRY_AGAIN
    assert [name for name, _ in done] == ["01_baseline_b0"]
    assert "Another process is at work on" in capsys.readouterr().out


CLAIM = {"title": "Axes help", "outcome": None, "open": "", "sentences": ["depth is higher", "width is lower"]}


@pytest.mark.parametrize(
    "claims, ablation, expected",
    [
        ([CLAIM], None, ["- Axes help: compared, without a verdict", "  - depth is higher.", "  - width is lower."]),
        ([CLAIM | {"outcome": "reproduced", "sentences": []}], None, ["- Axes help: reproduced"]),
        ([], "width,ema,-1.2345,lr 0.05 to 0.02", ["width (ema): -1.23 points by lr 0.05 to 0.02"]),
    ],
)
def test_a_study_ends_with_what_its_analysis_found(profile_file, tmp_path, capsys, claims, ablation, expected):
    path = profile_file(methods=["baseline"])
    run = Run.plan(path, "baseline", 0, tmp_path)
    write_record(run)
    tables = tmp_path / "tiny" / "tables"
    tables.mkdir(parents=True)
    run.executed.parent.mkdir()
    for path_of in (run.executed, run.executed.with_stem("05_analysis")):
        path_of.touch()
    write_json(tables / "verdict.json", {"claims": claims})
    if ablation:
        (tables / "ablation.csv").write_text(f"what,weights,difference,change\n{ablation}\n")
    assert main(["study", str(path), "--results", str(tmp_path)]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines[-len(expected) :] == expected
    assert last == f"(pipeline check, not evidence) All of it: {tmp_path / 'tiny' / 'README.md'}"


def test_a_pilot_changes_the_recipe_and_reads_no_test_image(profile_file, tmp_path, capsys):
    path = profile_file(data={"name": "digits", "size": 16, "train_per_class": 4, "minival": 0.05})
    words = ["pilot", str(path), "lr=0.02", "optimizer=sgd", "--results", str(tmp_path), "--device", "cpu"]
    assert main(words) == 0
    assert "lr=0.02_optimizer=sgd" in capsys.readouterr().out
    folder = tmp_path / "tiny" / "pilots" / "lr=0.02_optimizer=sgd_seed0"
    record, correct = read_record(folder), np.load(folder / "test_correct.npy")
    assert record["config"]["lr"] == 0.02 and record["config"]["epochs"] == 1 and record["scored"] == "minival"
    assert len(correct) == record["dataset"]["counts"]["minival"] != load_data("digits").counts["test"]
    assert record["test"]["top1"] == record["minival"]["top1"] == pytest.approx(100 * correct.mean())
    table = load_pilots(load_profile(path), tmp_path)
    assert table[["pilot", "minival_top1"]].values.tolist() == [[folder.name, record["minival"]["top1"]]]
    assert not (tmp_path / "tiny" / "runs").exists()


@pytest.mark.parametrize(
    "word, message",
    [
        ("lr", "expected NAME=VALUE, such as lr=0.05, got 'lr'"),
        ("rl=0.1", "train: unknown setting 'rl'.*Did you mean 'lr'"),
        ("seed=1", "seed is not part of a recipe"),
        ("lr=fast", "lr: expected a valid number, got 'fast'"),
    ],
)
def test_a_pilots_bad_setting_is_named(word, message, profile_file, tmp_path, capsys):
    assert main(["pilot", str(profile_file()), word, "--results", str(tmp_path)]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_pilot_with_pretrained_weights_sees_images_as_these_expect(profile_file, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("effnet_study.run.train", lambda model, data, *arguments, **options: seen.append(data.mean))
    monkeypatch.setattr(Run, "model", lambda self, num_classes: None)
    profile = load_profile(profile_file())
    for changes in ({}, {"pretrained": True}):
        pilot(profile, changes, tmp_path)
    imagenet = 255 * torch.tensor([0.485, 0.456, 0.406])
    torch.testing.assert_close(seen[1], imagenet)
    assert not torch.allclose(seen[0], imagenet, atol=1)


def test_the_plan_prices_what_is_to_do(profile_file, tmp_path, capsys):
    path = profile_file(methods=["baseline", "width"], seeds=[0, 1])
    write_record(Run.plan(path, "baseline", 0, tmp_path))
    table, jobs = plan(load_profile(path), tmp_path, device="cpu", jobs=2, seconds=2)
    assert jobs == 2
    assert table[["method", "seed"]].values.tolist() == [["width", 0], ["baseline", 1], ["width", 1]]
    assert (table["flops"] > 1e6).all() and table["seconds"][0] == table["seconds"][2] > 0 and table["seconds"][1] > 0
    words = ["plan", str(path), "--results", str(tmp_path), "--device", "cpu", "--seconds", "2", "--jobs", "2"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "activations (M)" in out and "3 runs" in out and "at 2 at a time" in out
    for run in plan_runs(load_profile(path), tmp_path)[1:]:
        write_record(run)
    assert main(words) == 0 and "Nothing left to run" in capsys.readouterr().out


# ---- the command


def test_cost_prints_the_exact_integers(capsys):
    assert main(["cost", "b0", "compound"]) == 0
    out = capsys.readouterr().out
    assert "5,288,548" in out and "385,814,752" in out and "1,800,091,280" in out


def test_cost_by_stage_adds_up_to_the_whole(capsys):
    assert main(["cost", "b0", "densenet201", "--by-stage"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    for network, total in (("b0", "5,288,548"), ("densenet201", "20,013,928")):
        params = [row[-3] for row in rows if row[0] == network]
        assert params[-1] == total and rows[0][-4:-3] == ["stem"]
        assert sum(int(p.replace(",", "")) for p in params[:-1]) == int(total.replace(",", ""))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["study", "quik"], "unknown profile 'quik'. Did you mean 'quick'?"),
        (["status", "quik"], "Did you mean 'quick'?"),
        (["study", "quick", "--methods", "dept"], "Did you mean 'depth'?"),
        (["cost", "b9"], "unknown network 'b9'"),
        (["cost"], "Missing argument 'NETWORK"),
        (["data", "cifar-10"], "unknown data set 'cifar-10'"),
        (["data", "folder:nowhere"], "no such folder; tried"),
    ],
)
def test_bad_words_end_in_a_clear_error_and_status_2(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("error", [RunLocked, ProcessKilled])
def test_a_run_that_is_held_or_lost_its_gpu_is_to_be_tried_again(error, monkeypatch, capsys):
    monkeypatch.setattr("effnet_study.cli.plan_model", mock.Mock(side_effect=error("held by another process")))
    assert main(["train", "quick", "b0"]) == 75 and "held by another process" in capsys.readouterr().err


def test_status_lists_every_run(profile_file, tmp_path, capsys):
    path = profile_file()
    runs = plan_runs(load_profile(path), tmp_path)
    write_record(runs[0], top1=61.5)
    write_record(runs[1], status="diverged", diverged={"epoch": 2, "step": 7, "lr": 0.05})
    assert main(["status", str(path), "--results", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "61.50" in out and "1 finished, 1 diverged, 3 missing" in out
    again = f"run again with: effnet study {path} --results {tmp_path} --retry"
    assert f"diverged in epoch 2, step 7, at LR 0.05; {again}" in out


def test_train_works_without_a_notebook(profile_file, tmp_path, capsys):
    path = profile_file()
    assert main(["train", str(path), "baseline", "--results", str(tmp_path)]) == 0
    assert "test top-1" in capsys.readouterr().out
    table = load_runs(load_profile(path), tmp_path)
    assert table["status"].tolist()[0] == "finished"
    assert isinstance(table, pd.DataFrame) and len(load_history(table["run_dir"][0])) == 1
