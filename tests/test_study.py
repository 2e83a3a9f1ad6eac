"""Profiles, planned runs, records as tables, statistics, the command."""

import math
import re

import filelock
import numpy as np
import pandas as pd
import pytest
from conftest import write_record
from scipy import stats
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import effnet_lib
import effnet_runs
import effnet_study as study
from effnet_lib import TABLE7

# ---- profiles


@pytest.mark.parametrize("name", study.profile_names())
def test_the_profiles_that_ship_are_valid(name):
    profile = study.load_profile(name)
    runs = study.plan_runs(profile, methods=profile.methods[:5], seeds=profile.seeds[:1])
    assert all(run.config.resolution >= profile.base_resolution for run in runs)
    recipes = {tuple(sorted(run.config.model_options().items())) for run in runs}
    assert len(recipes) == 1  # the same regularisation for every method


def test_evidence_has_the_seeds_that_the_rules_ask_for():
    for profile in map(study.load_profile, study.profile_names()):
        claims = profile.ablation_of is None  # else there is no verdict
        assert len(profile.seeds) >= ({"check": 1, "exploratory": 3, "evidence": 5}[profile.purpose] if claims else 1)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"metods": ["depth"]}, "unknown key 'metods'.*Did you mean 'methods'"),
        ({"title": None}, "title is missing"),
        ({"seeds": 3}, "seeds: expected list, got 3"),
        ({"seeds": [0, 0]}, "seeds: expected a list without repetitions"),
        ({"seeds": ["0"]}, "seed: expected int, got '0'"),
        ({"seeds": []}, "seeds: expected a list"),
        ({"methods": ["baseline", "dept"]}, "unknown method 'dept'.*Did you mean 'depth'"),
        ({"purpose": "proof"}, "unknown purpose 'proof'"),
        ({"data": {"nme": "digits"}}, "unknown data setting 'nme'"),
        ({"data": {"size": 8}}, "data: name is missing"),
        ({"base_resolution": 4}, "base_resolution: expected at least 8 px, got 4"),
        ({"base_resolution": "32"}, "base_resolution: expected int, got '32'"),
        ({"stem_stride": 4}, "stem_stride: expected 1 or 2, got 4"),
        ({"train": {"lr": "1e-3"}}, "lr: expected float, got '1e-3'; in YAML write 1.0e-3"),
        ({"train": {"epoch": 3}}, "unknown training setting 'epoch'.*Did you mean 'epochs'"),
        ({"train": {"seed": 3}}, "train: seed follows from"),
    ],
)
def test_bad_profiles_are_refused_by_file_and_name(profile_file, changes, message):
    with pytest.raises(ValueError, match=rf"profile tiny\.yaml: {message}"):
        study.load_profile(profile_file(**changes))


def test_unknown_and_unreadable_profiles_are_named(tmp_path):
    with pytest.raises(ValueError, match="unknown profile 'quik'.*Did you mean 'quick'"):
        study.load_profile("quik")
    with pytest.raises(ValueError, match=r"nowhere\.yaml: cannot be read"):
        study.load_profile(tmp_path / "nowhere.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1")
    with pytest.raises(ValueError, match=r"broken\.yaml: cannot be read"):
        study.load_profile(tmp_path / "broken.yaml")
    with pytest.raises(ValueError, match="unknown profile '../quick'"):
        study.load_profile("../quick")


def test_methods_are_the_papers_rows_or_matched_to_compound(profile_file):
    profile = study.load_profile(profile_file(methods=["compound", "width_matched"]))
    assert profile.scaling("compound") == TABLE7["compound"]
    matched = profile.scaling("width_matched")
    assert matched.width > TABLE7["width"].width and matched.depth == matched.resolution == 1


# ---- runs


def test_runs_are_planned_seed_by_seed_into_folders_that_say_what_they_are(profile_file, tmp_path):
    profile = study.load_profile(profile_file(seeds=[3, 1]))
    runs = study.plan_runs(profile, tmp_path)
    assert [(run.seed, run.method) for run in runs] == [(s, m) for s in (3, 1) for m in profile.methods]
    assert runs[4].directory == tmp_path / "tiny" / "runs" / "compound_d1.40_w1.20_r1.30_seed3"
    assert runs[4].config.resolution == 21
    only = study.plan_runs(profile, tmp_path, methods=["depth"], seeds=[1])
    assert [(run.seed, run.method) for run in only] == [(1, "depth")]
    with pytest.raises(ValueError, match="unknown seed of profile tiny 2"):
        study.plan_runs(profile, seeds=[2])
    with pytest.raises(ValueError, match="unknown method of profile tiny 'width_matched'"):
        study.plan_runs(profile, methods=["width_matched"])


def test_the_initial_weights_follow_the_seed(profile_file):
    path = profile_file(seeds=[0, 1])
    weights = [study.Run.plan(path, "baseline", seed).model(10).classifier.weight for seed in (0, 0, 1)]
    assert (weights[0] == weights[1]).all() and not (weights[0] == weights[2]).all()


def test_a_runs_state_is_told_from_what_it_left(profile_file, tmp_path):
    runs = study.plan_runs(study.load_profile(profile_file()), tmp_path)
    write_record(runs[0])
    write_record(runs[1], status="failed", error="OSError: no")
    write_record(runs[2], config={**runs[2].config.__dict__, "lr": 9.0})
    runs[3].directory.mkdir()
    (runs[3].directory / ".lock").touch()
    (runs[3].directory / "checkpoint.pt").touch()
    assert [run.state() for run in runs] == ["finished", "failed", "stale", "interrupted", "missing"]
    with filelock.FileLock(runs[3].directory / ".lock"):
        assert study.plan_runs(runs[3].profile, tmp_path)[3].state() == "running"


def test_a_run_is_stale_once_its_network_or_data_change(profile_file, tmp_path):
    run = study.Run.plan(profile_file(), "baseline", 0, tmp_path)
    write_record(run, **run.about)
    assert run.state() == "finished"
    other_data = {"name": "digits", "size": 16, "train_per_class": 5}
    for changes in ({"stem_stride": 1}, {"data": other_data}, {"base_resolution": 17}):
        assert study.Run.plan(profile_file(**changes), "baseline", 0, tmp_path).state() == "stale"
    assert study.Run.plan(profile_file(title="Other words"), "baseline", 0, tmp_path).state() == "finished"


def test_only_finished_runs_of_this_profile_have_scores(profile_file, tmp_path):
    path = profile_file()
    runs = study.plan_runs(study.load_profile(path), tmp_path)
    write_record(runs[0], top1=61.5)
    write_record(runs[1], config={**runs[1].config.__dict__, "lr": 9.0})
    table = study.load_runs(path, tmp_path)
    assert table["method"].tolist() == [run.method for run in runs]
    assert table["status"].tolist() == ["finished", "stale", "missing", "missing", "missing"]
    assert table["top1"].tolist()[0] == 61.5 and table["top1"][1:].isna().all()


# ---- devices, and notebooks side by side


@pytest.mark.parametrize("devices", [0, "all", 1.5, True])
def test_impossible_devices_are_refused(profile_file, devices):
    with pytest.raises(ValueError, match="tiny.yaml: devices: expected"):
        study.load_profile(profile_file(devices=devices))


def test_devices_are_counted_or_asked_for(profile_file, monkeypatch):
    monkeypatch.setattr(study.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(study.torch.cuda, "is_available", lambda: True)
    run = study.Run.plan(profile_file(devices="auto"), "baseline", 0)
    assert run._processes(None) == 2 and run._processes("cpu") == 1
    with pytest.raises(ValueError, match="devices: profile tiny asks for 3, torch finds 2; use auto"):
        study.Run.plan(profile_file(devices=3), "baseline", 0)._processes("cuda")


def test_an_error_in_one_of_several_processes_is_the_runs(profile_file, tmp_path):
    train = {"epochs": 1, "batch_size": 21, "optimizer": "sgd", "lr": 0.05}
    run = study.Run.plan(profile_file(devices=2, train=train), "baseline", 0, tmp_path)
    with pytest.raises(
        RuntimeError, match=r"failed \(process \d of 2: ValueError: batch_size: expected a multiple of the 2"
    ):
        run.train(study.load_data(**run.profile.data), "cpu")
    assert run.state() == "failed"
    with pytest.raises(RuntimeError, match="failed .process . of 2"):  # found, not run again
        run.train(study.load_data(**run.profile.data), "cpu")


def test_divergence_in_several_processes_is_no_other_failure(profile_file, tmp_path, monkeypatch):
    run = study.Run.plan(profile_file(devices=2), "baseline", 0, tmp_path)

    def diverge(*arguments):
        write_record(run, status="diverged", diverged={"epoch": 1, "step": 2, "lr": 0.1})
        return "process 0 of 2: RuntimeError: diverged"

    monkeypatch.setattr(effnet_runs, "launch", diverge)
    with pytest.raises(RuntimeError, match="diverged in epoch 1, step 2"):
        run.train(None, "cpu")
    assert run.state() == "diverged"


def test_processes_out_of_memory_are_started_again(profile_file, tmp_path, monkeypatch):
    run, starts = study.Run.plan(profile_file(devices=2), "baseline", 0, tmp_path), []

    def launch(config, share):
        def start(*arguments):
            starts.append(config.nproc_per_node)
            if len(starts) == 3:
                return write_record(run)
            run.directory.mkdir(parents=True, exist_ok=True)
            (run.directory / "micro_batch").write_text(str(10 // len(starts)))
            failure = ProcessFailure(0, 1, 1, "none")
            raise ChildFailedError("share", {0: failure})

        return start

    monkeypatch.setattr(effnet_lib, "elastic_launch", launch)
    assert run.train(None, "cpu")["status"] == "finished" and starts == [2, 2, 2]


@pytest.mark.parametrize(
    "cores, count, devices, words, expected",
    [
        (8, 5, 1, {}, (5, 1)),
        (8, 2, 1, {}, (2, 4)),
        (2, 40, 1, {}, (2, 1)),
        (8, 40, 1, {"jobs": 2}, (2, 4)),
        (8, 40, 1, {"jobs": 2, "threads": 3}, (2, 3)),
        (8, 5, 4, {}, (2, 1)),
        (1, 5, 2, {}, (1, 1)),
    ],
)
def test_notebooks_side_by_side_share_the_cores(profile_file, monkeypatch, cores, count, devices, words, expected):
    monkeypatch.setattr(study.torch, "get_num_threads", lambda: cores)
    monkeypatch.setattr(study.os, "sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**26}[name])
    profile = study.load_profile(profile_file(devices=devices))
    assert study.shares(count, profile, "cpu", **words) == expected
    monkeypatch.setattr(study.os, "sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**20}[name])
    assert study.shares(count, profile, "cpu")[0] == 1  # 4 GiB in all
    monkeypatch.setattr(study.torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(study.torch.cuda, "is_available", lambda: True)
    assert study.shares(count, profile, None)[0] == min(count, 4 // devices)  # as many as there are GPUs for


def test_each_seeds_longest_run_starts_first_after_the_baseline(profile_file):
    runs = study.plan_runs(study.load_profile(profile_file(seeds=[1, 0])))
    ordered = study._longest_first(runs)
    assert [run.seed for run in ordered] == [1] * 5 + [0] * 5
    activations = [run.cost.activations for run in ordered[1:5]]
    assert activations == sorted(activations, reverse=True) and ordered[0].method == ordered[5].method == "baseline"


def test_a_pilot_changes_the_recipe_and_reads_no_test_image(profile_file, tmp_path, capsys):
    path = profile_file(data={"name": "digits", "size": 16, "train_per_class": 4, "minival": 0.05})
    words = ["pilot", str(path), "lr=0.02", "optimizer=sgd", "--results", str(tmp_path), "--device", "cpu"]
    assert study.main(words) == 0
    assert "lr=0.02_optimizer=sgd" in capsys.readouterr().out
    folder = tmp_path / "tiny" / "pilots" / "lr=0.02_optimizer=sgd"
    record, correct = study.read_record(folder), np.load(folder / "test_correct.npy")
    assert record["config"]["lr"] == 0.02 and record["config"]["epochs"] == 1 and record["scored"] == "minival"
    assert len(correct) == record["dataset"]["counts"]["minival"] != study.load_data("digits").counts["test"]
    assert record["test"]["top1"] == record["minival"]["top1"] == pytest.approx(100 * correct.mean())
    table = study.load_pilots(path, tmp_path)
    assert table[["pilot", "minival_top1"]].values.tolist() == [[folder.name, record["minival"]["top1"]]]
    assert not (tmp_path / "tiny" / "runs").exists()


@pytest.mark.parametrize(
    "word, message",
    [
        ("lr", "expected NAME=VALUE, such as lr=0.05, got 'lr'"),
        ("rl=0.1", "unknown training setting 'rl'.*Did you mean 'lr'"),
        ("seed=1", "seed is not part of a recipe"),
        ("lr=fast", "lr: expected float, got 'fast'"),
    ],
)
def test_a_pilots_bad_setting_is_named(word, message, profile_file, tmp_path, capsys):
    assert study.main(["pilot", str(profile_file()), word, "--results", str(tmp_path)]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_the_plan_prices_what_is_to_do(profile_file, tmp_path, capsys):
    path = profile_file(methods=["baseline", "width"], seeds=[0, 1])
    write_record(study.Run.plan(path, "baseline", 0, tmp_path))
    table = study.plan(path, tmp_path, device="cpu", seconds=2)
    assert table[["method", "seed"]].values.tolist() == [["width", 0], ["baseline", 1], ["width", 1]]
    assert (table["flops"] > 1e6).all() and table["seconds"][0] == table["seconds"][2] > 0 and table["seconds"][1] > 0
    words = ["plan", str(path), "--results", str(tmp_path), "--device", "cpu", "--seconds", "2", "--jobs", "2"]
    assert study.main(words) == 0
    out = capsys.readouterr().out
    assert "activations (M)" in out and "3 runs" in out and "at 2 at a time" in out
    for run in study.plan_runs(study.load_profile(path), tmp_path)[1:]:
        write_record(run)
    assert study.main(words) == 0 and "Nothing is to do" in capsys.readouterr().out


# ---- statistics


def test_t_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = [low < 3 < high for _, low, high in (study.t_interval(rng.normal(3, 2, 3)) for _ in range(4000))]
    assert np.mean(hits) == pytest.approx(0.95, abs=0.012)


def test_t_interval_of_known_numbers():
    mean, low, high = study.t_interval([1, 2, 3])
    assert (mean, low, high) == pytest.approx((2, 2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)))
    mean, low, high = study.t_interval([5.0])
    assert mean == 5 and math.isnan(low) and math.isnan(high)


def test_holm_steps_down():
    assert study.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert study.holm([0.9, 0.8, 0.001]) == pytest.approx([1, 1, 0.003])


def test_contrasts_are_welchs_with_holms_correction():
    scores = {"a": [80.0, 81.0, 82.5], "b": [78.0, 78.2, 78.1], "c": [80.5, 81.5, 81.0]}
    table = study.welch_holm(scores, [("a", "b"), ("a", "c")])
    expected = stats.ttest_ind(scores["a"], scores["b"], equal_var=False)
    assert table["p"][0] == pytest.approx(expected.pvalue)
    assert (table["low"][0], table["high"][0]) == pytest.approx(tuple(expected.confidence_interval()))
    assert table["difference"].tolist() == pytest.approx([np.mean(scores["a"]) - np.mean(scores[x]) for x in "bc"])
    assert table["p_holm"].tolist() == pytest.approx(study.holm(table["p"]))
    assert table["contrast"].tolist() == ["a - b", "a - c"]


def test_one_seed_has_a_difference_and_no_verdict():
    row = study.welch_holm({"a": [80.0], "b": [70.0]}, [("a", "b")]).iloc[0]
    assert row["difference"] == 10 and math.isnan(row["low"]) and row["verdict"] == "inconclusive"


@pytest.mark.parametrize(
    "difference, low, high, p, n, expected",
    [
        (1.2, 0.4, 2.0, 0.01, 5, "reproduced"),
        (-1.2, -2.0, -0.4, 0.01, 5, "not reproduced"),
        (0.1, -0.2, 0.4, 0.60, 5, "not reproduced"),  # equivalent within the margin
        (0.1, -0.6, 0.8, 0.60, 5, "inconclusive"),
        (1.2, 0.4, 2.0, 0.06, 5, "inconclusive"),  # Holm took the significance
        (9.0, 8.0, 10.0, 0.001, 2, "inconclusive"),  # too few seeds
        (9.0, math.nan, math.nan, math.nan, 1, "inconclusive"),
    ],
)
def test_the_verdict_follows_the_rule(difference, low, high, p, n, expected):
    assert study.verdict(difference, low, high, p, n) == expected


def test_a_claim_is_as_strong_as_its_weakest_contrast():
    assert study.overall(["reproduced"] * 3) == "reproduced"
    assert study.overall(["reproduced", "inconclusive"]) == "inconclusive"
    assert study.overall(["not reproduced", "inconclusive", "reproduced"]) == "not reproduced"
    assert study.overall([]) == "inconclusive"


def test_the_bootstrap_sees_images_and_seeds():
    rng = np.random.default_rng(0)
    easy, hard = rng.random((5, 2000)) < 0.8, rng.random((5, 2000)) < 0.7
    low, high = study.paired_bootstrap(easy, hard, draws=400)
    assert 7 < low < 10 < high < 13
    few_low, few_high = study.paired_bootstrap(easy[:, :100], hard[:, :100], draws=400)
    assert few_high - few_low > 2 * (high - low)
    assert study.paired_bootstrap(easy, easy.copy(), draws=50) != (0, 0)  # seeds are drawn apart
    assert study.paired_bootstrap(easy[:1], easy[:1].copy(), draws=50) == (0, 0)
    with pytest.raises(ValueError, match="same test images"):
        study.paired_bootstrap(easy, hard[:, :10])


# ---- the command


def test_cost_prints_the_exact_integers(capsys):
    assert study.main(["cost", "b0", "compound"]) == 0
    out = capsys.readouterr().out
    assert "5,288,548" in out and "385,814,752" in out and "1,800,091,280" in out


def test_cost_by_stage_adds_up_to_the_whole(capsys):
    assert study.main(["cost", "b0", "densenet201", "--by-stage"]) == 0
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
        (["data", "cifar-10"], "unknown data set 'cifar-10'"),
        (["data", "folder:nowhere"], "no such folder; tried"),
    ],
)
def test_bad_words_end_in_a_clear_error_and_status_2(arguments, message, capsys):
    assert study.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_status_lists_every_run(profile_file, tmp_path, capsys):
    path = profile_file()
    runs = study.plan_runs(study.load_profile(path), tmp_path)
    write_record(runs[0], top1=61.5)
    write_record(runs[1], status="diverged", diverged={"epoch": 2, "step": 7, "lr": 0.05})
    assert study.main(["status", str(path), "--results", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "61.50" in out and "1 finished, 1 diverged, 3 missing" in out
    again = f"run again with: effnet study {path} --results {tmp_path} --retry"
    assert f"diverged in epoch 2, step 7, at LR 0.05; {again}" in out


def test_train_works_without_a_notebook(profile_file, tmp_path, capsys):
    path = profile_file()
    assert study.main(["train", str(path), "baseline", "--results", str(tmp_path)]) == 0
    assert "test top-1" in capsys.readouterr().out
    table = study.load_runs(path, tmp_path)
    assert table["status"].tolist()[0] == "finished"
    assert isinstance(table, pd.DataFrame) and len(study.load_history(table["directory"][0])) == 1


@pytest.mark.parametrize(
    "value, text", [(4_020_358.0, "4,020,358"), (0.666, "0.67"), (24, "24"), (1234.5, "1,234.50"), ("depth", "depth")]
)
def test_numbers_are_written_as_people_do(value, text):
    assert study.number(value) == text
