"""The coefficient search, and the networks that follow from it."""

import contextlib
import dataclasses
import json
import math
from unittest import mock

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from by_hand import flops_by_hand
from conftest import write_record

import effnet_study as study
from effnet_lib import TABLE7, EfficientNet, Scaling, count_cost
from effnet_study import cli
from effnet_study import study as steps
from effnet_study.analysis import figures
from effnet_study.coefficients import describe_search, made_by, searched_coefficients
from effnet_study.execution.notebook import TRY_AGAIN, run_notebook
from effnet_study.files import hold
from effnet_study.methods import coefficient_grid, figure8_lines
from effnet_study.model_run import plan_model
from effnet_study.record import read_record
from effnet_study.run import plan_runs
from effnet_study.search import all_candidates
from effnet_study.stop import ProcessKilled


@pytest.fixture
def searching(profile_file):
    """A function that loads a small profile with a search."""

    def load(**search):
        return study.load_profile(
            profile_file(methods=["baseline", "compound_searched"], search={"step": 0.4, **search})
        )

    return load


def found(profile, tmp_path, **changes):
    """coefficients.json as the profile's search would leave it."""
    values = {
        "alpha": 1.0,
        "beta": 1.4,
        "gamma": 1.0,
        "made_by": made_by(profile),
        "seeds": 1,
        **changes,
    }
    (tmp_path / profile.name).mkdir(exist_ok=True)
    (tmp_path / profile.name / "coefficients.json").write_text(json.dumps(values))


def test_the_candidates_of_a_coarse_grid_by_hand(searching, tmp_path):
    """Of 1, 1.4 and 1.8 for each coefficient, two products lie between 1.9 and 2.1: 1.4^2 for width or resolution."""
    table, candidates = study.plan_search(searching(seeds=[3, 1]), tmp_path)
    names = ["a1.20_b1.10_g1.15", "a1.00_b1.00_g1.40", "a1.00_b1.40_g1.00"]
    assert table["candidate"].tolist() == names and table["published"].tolist() == [True, False, False]
    assert table[["alpha", "beta", "gamma"]].values.tolist() == [[1.2, 1.1, 1.15], [1, 1, 1.4], [1, 1.4, 1]]
    assert table["product"].tolist() == pytest.approx([1.92027, 1.96, 1.96]) and table["px"].tolist() == [18, 22, 16]
    flops = [flops_by_hand(1.2, 1.1, 18, 10), flops_by_hand(1, 1, 22, 10), flops_by_hand(1, 1.4, 16, 10)]
    assert table["flops"].tolist() == flops
    assert table["flops_ratio"].tolist() == pytest.approx([n / flops_by_hand(1, 1, 16, 10) for n in flops])
    with torch.device("meta"):
        cost = count_cost(EfficientNet(Scaling(1.0, 1.4), 10), 16)
    assert (table["params"][2], table["activations"][2]) == (cost.params, cost.activations)
    assert table["affordable"].all() and table["same_as"].isna().all()
    places = [tmp_path / "tiny" / "search" / f"{name}_seed3" for name in names]
    assert [c.run_dir for c in candidates] == places and [c.name for c in candidates] == names


def test_all_of_the_grid_and_the_published_coefficients_are_listed_with_their_exact_cost(searching):
    table, candidates = study.plan_search(searching(step=0.1))
    assert table["published"].sum() == 1 and table["candidate"].is_unique
    assert table.query("not published")["product"].between(1.9, 2.1).all()
    base = flops_by_hand(1, 1, 16, 10)
    for row in table.itertuples():
        assert row.px == math.floor(16 * row.gamma + 0.5)
        assert row.flops == flops_by_hand(row.alpha, row.beta, row.px, 10)
        assert row.flops_ratio == pytest.approx(row.flops / base)
        assert row.product == pytest.approx(row.alpha * row.beta**2 * row.gamma**2)
    assert {c.name for c in candidates} == set(table[table["same_as"].isna()]["candidate"])


def test_coefficients_that_round_to_one_network_are_trained_once(searching):
    table, candidates = study.plan_search(searching(step=0.1))
    same = table.dropna(subset="same_as").set_index("candidate")["same_as"]
    assert same["a2.00_b1.00_g1.00"] == "a1.90_b1.00_g1.00"
    with torch.device("meta"):
        models = {c.name: c.model(10) for c in candidates}
    shapes = [str({key: w.shape for key, w in m.state_dict().items()}) for m in models.values()]
    networks = list(zip(shapes, (c.config.resolution for c in candidates), strict=True))
    assert len(set(networks)) == len(networks)


def test_what_exceeds_max_flops_is_not_trained(searching):
    table, candidates = study.plan_search(searching(step=0.1, max_flops=2.2))
    assert 0 < (~table["affordable"]).sum() < len(table)
    assert (table[~table["affordable"]]["flops_ratio"] > 2.2).all()
    assert all(c.cost.flops <= 2.2 * flops_by_hand(1, 1, 16, 10) for c in candidates)
    cheap = table["candidate"][table["affordable"] & table["same_as"].isna()]
    assert [c.name for c in candidates] == cheap.tolist()
    with pytest.raises(
        ValueError, match=r"max_flops: 1.01 leaves none of .* the cheapest of which costs \d\.\d\d times"
    ):
        study.plan_search(searching(step=0.1, max_flops=1.01))


def test_candidates_are_not_pretrained_but_other_networks_of_the_profile_can_be(searching):
    profile = searching(train={"pretrained": True})
    with pytest.raises(ValueError, match="search: train: most candidates have no pretrained weights"):
        study.plan_search(profile)
    assert plan_model("b0", "quick", changes={"pretrained": True}).config.pretrained  # which has a search


@pytest.mark.parametrize(
    "search, message",
    [
        ({"step": 0.6}, "search: step: on a grid of 0.6 no alpha"),
        ({"step": "x"}, "search: step: expected a valid number, got 'x'"),
        ({"max_flops": 0.5}, "search: max_flops: expected a value greater than or equal to 1, got 0.5"),
        ({"seeds": [[0]]}, r"search: seeds: 0: expected a valid integer, got \[0\]"),
        ({"high": float("inf")}, "search: high: expected a finite number, got inf"),
        ({"seeds": []}, "search: seeds: expected a list without repetitions"),
        ({"sed": [1]}, "search: unknown setting 'sed'.*Did you mean 'seeds'"),
        ({"train": {"epoch": 1}}, "search: train: unknown setting 'epoch'.*Did you mean 'epochs'"),
        ({"train": {"seed": 1}}, "search: train: seed follows from seeds"),
    ],
)
def test_bad_searches_are_refused_by_name(searching, search, message):
    with pytest.raises(ValueError, match=rf"profile tiny\.yaml: {message}"):
        searching(**search)


def test_a_method_that_needs_a_search_needs_one_in_its_profile(profile_file):
    with pytest.raises(ValueError, match="methods: compound_searched needs a search for its coefficients"):
        study.load_profile(profile_file(methods=["compound_searched"]))
    with pytest.raises(ValueError, match="profile tiny has no search"):
        study.plan_search(study.load_profile(profile_file()))


def test_a_candidate_is_the_baseline_at_phi_1_scored_on_minival(searching, tmp_path, digits):
    _, candidates = study.plan_search(searching(train={"lr": 0.02}), tmp_path)
    candidate = next(c for c in candidates if c.coefficients == (1.0, 1.4, 1.0))
    assert candidate.scaling == Scaling(1.0, 1.4, 1.0)
    assert candidate.config.lr == 0.02 and candidate.config.momentum == 0.85  # the search's own, and the profile's
    record = candidate.train(digits)
    assert record["scored"] == "minival" and record["test"]["top1"] == record["minival"]["top1"]
    assert len(np.load(candidate.run_dir / "test_correct.npy")) == digits.counts["minival"]
    assert candidate.state() == "finished"


def test_the_figure_of_a_search_names_the_published_and_the_best_candidate():
    rows = {"alpha": [1.2, 1.0], "beta": [1.1, 1.0], "gamma": [1.15, 1.4], "top1": [50.0, 60.0], "n": [1, 1]}
    outcome = pd.DataFrame(rows, index=["a1.20_b1.10_g1.15", "a1.00_b1.00_g1.40"]).assign(
        status="finished", same_as=None
    )
    outcome["published"] = pd.Series(
        [np.True_, np.False_], outcome.index, dtype=object
    )  # as a table with gaps has them
    (ax, _), texts = figures.draw_search(outcome, "Tiny").axes, ("published", "best", "50.0", "60.0")
    assert set(texts) < {text.get_text() for text in ax.texts} and not ax.get_title(loc="left")


def test_searched_coefficients_are_scaled_to_the_cost_of_compound(profile_file, tmp_path):
    path = profile_file(methods=["compound", "compound_searched"], search={"step": 0.4}, base_resolution=224)
    profile = study.load_profile(path)
    compound, searched = plan_runs(profile, tmp_path)
    assert searched.state() == "waiting" and compound.state() == "missing"
    with pytest.raises(
        FileNotFoundError,
        match="search for compound_searched's coefficients first: effnet search .*tiny.yaml --results",
    ):
        searched.scaling  # noqa: B018
    found(profile, tmp_path)
    compound, searched = plan_runs(profile, tmp_path)
    assert searched.state() == "missing"
    assert searched.scaling.depth == searched.scaling.resolution == 1 and searched.scaling.width > 1.8
    target = flops_by_hand(1.4, 1.2, 291, 10)
    assert compound.cost.flops == target and searched.cost.flops == pytest.approx(target, rel=0.03)
    assert searched.cost.flops == flops_by_hand(1, searched.scaling.width, 224, 10)


@pytest.mark.parametrize(
    "change",
    [
        {"search": {"step": 0.4, "low": 1.8}},
        {"train": {"epochs": 1, "lr": 0.3}},
        {"base_resolution": 24},
        {"stem_stride": 1},
        {"baseline": {"depth": 0.5}},
        {"data": {"name": "digits", "size": 16, "train_per_class": 5}},
    ],
)
def test_coefficients_of_another_search_are_not_taken(profile_file, searching, tmp_path, change):
    profile = searching()
    found(profile, tmp_path)
    assert plan_runs(profile, tmp_path)[1].state() == "missing"
    other = study.load_profile(profile_file(**{"methods": list(profile.methods), "search": {"step": 0.4}} | change))
    assert searched_coefficients(profile, tmp_path / "tiny") == (1.0, 1.4, 1.0)
    assert plan_runs(other, tmp_path)[1].state() == "waiting"


def test_coefficients_stand_though_words_and_methods_change(profile_file, searching, tmp_path):
    found(searching(), tmp_path)
    data = {"name": "digits", "size": 16, "train_per_class": 4, "title": "Other words"}
    other = profile_file(title="Other", methods=["compound_searched"], search={"step": 0.4}, data=data, seeds=[7])
    assert searched_coefficients(study.load_profile(other), tmp_path / "tiny") == (1.0, 1.4, 1.0)


def test_coefficients_stand_though_settings_change_that_decide_no_result(profile_file, searching, tmp_path):
    profile = searching()
    found(profile, tmp_path)
    train = {**profile.train, "save_seconds": 60.0, "compile": "never", "rotate": 0.0}  # the last is the default
    other = study.load_profile(
        profile_file(methods=list(profile.methods), search={"step": 0.4, "train": {"save_steps": 5}}, train=train)
    )
    assert searched_coefficients(other, tmp_path / "tiny") == (1.0, 1.4, 1.0)


def test_coefficients_stand_though_the_library_has_more_settings(profile_file, searching, tmp_path):
    profile = searching()
    settings = json.loads(json.dumps(made_by(profile)))
    for part in ("recipe", "candidates"):
        assert settings[part].pop("hue") == 0.0  # as if the setting had not existed then
        settings[part]["warmup"] = settings[part].pop("warmup_fraction")  # its earlier name
    found(profile, tmp_path, made_by=settings)
    assert searched_coefficients(profile, tmp_path / "tiny") == (1.0, 1.4, 1.0)


@pytest.mark.parametrize(("error", "state"), [(RuntimeError, "failed"), (ProcessKilled, "missing")])
def test_only_a_candidates_own_failure_is_a_hole_in_the_table(error, state, tmp_path):
    cells = nbformat.read(study.NOTEBOOKS / "03_coefficient_search.ipynb", 4).cells
    (cell,) = (cell.source for cell in cells if "candidate.train(" in cell.source)
    candidate = mock.Mock(train=mock.Mock(side_effect=error("CUDA error")), state=lambda: state)
    names = {"study": mock.MagicMock(), "chosen": mock.Mock(data=mock.Mock(given=dict)), "folder": tmp_path}
    names |= {"candidates": [candidate], "hold": contextlib.nullcontext, "device": None}
    with pytest.raises(ProcessKilled) if error is ProcessKilled else contextlib.nullcontext():
        exec(cell, names)
    assert candidate.train.call_count == 1


def test_what_waits_for_a_search_is_told(profile_file, tmp_path, capsys):
    path = str(profile_file(methods=["compound_searched"], search={"step": 0.4}))
    profile = study.load_profile(path)
    table = study.load_runs(profile, tmp_path)
    assert table["status"].tolist() == ["waiting"] and pd.isna(table["resolution"][0])
    assert cli.main(["status", path, "--results", str(tmp_path)]) == 0
    assert (
        f"compound_searched seed 0 waits for its coefficients: effnet search {path} --results {tmp_path}"
        in capsys.readouterr().out
    )
    assert cli.main(["plan", path, "--results", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert (
        "Skipped until the search has run: 1; effnet search " in said and "all runs that can start have ended" in said
    )
    found(profile, tmp_path, alpha="x")
    with pytest.raises(
        ValueError, match=r"coefficients.json is damaged .*; delete it, then: effnet search .*tiny.yaml --results"
    ):
        plan_runs(profile, tmp_path)[0].state()


def test_candidates_with_fine_steps_have_names_of_their_own(searching):
    first = study.plan_search(searching())[1][0]
    grid = coefficient_grid(0.005, 1.99999, 2.00001)
    names = [dataclasses.replace(first, coefficients=coefficients).name for coefficients in grid]
    assert len(set(names)) == len(grid) > 10 and "a2.00_b1.00_g1.00" in names and "a1.28_b1.25_g1.00" in names


def test_a_candidate_is_trained_in_one_process_with_each_seed(profile_file):
    profile = study.load_profile(profile_file(search={"step": 0.4, "seeds": [0, 3]}, devices=2))
    _, candidates = study.plan_search(profile)
    assert all(c.profile.devices == 1 and c.seed == 0 for c in candidates)
    names = [c.name for c in candidates]
    assert [(c.name, c.seed) for c in all_candidates(profile)] == [(n, seed) for seed in (0, 3) for n in names]


def test_a_failed_candidate_is_trained_again_when_asked(searching, tmp_path, monkeypatch):
    profile = searching(train={"epochs": 1})
    _, candidates = study.plan_search(profile, tmp_path)
    write_record(candidates[0], status="failed", error="of the machine")
    write_record(candidates[1])
    monkeypatch.setattr(steps, "execute", lambda executions, *arguments, **options: True)
    assert "run again with: effnet search " in candidates[0].again and f"{tmp_path} --retry" in candidates[0].again
    steps.Launcher(profile, tmp_path).search()
    assert candidates[0].state() == "failed"
    steps.Launcher(profile, tmp_path, retry=True).search()
    assert candidates[0].state() == "missing" and (candidates[0].run_dir / "run.earlier.json").exists()
    assert candidates[1].state() != "missing"


@pytest.mark.parametrize("held", [False, True])
def test_a_study_whose_search_does_not_succeed_says_so(searching, tmp_path, monkeypatch, capsys, held):
    """One that fails, and one that another process makes."""
    profile = searching()
    (tmp_path / "tiny" / "search").mkdir(parents=True)
    monkeypatch.setattr(cli, "load_profile", lambda name: profile)
    monkeypatch.setattr(steps, "execute", lambda executions, *arguments, **options: False)
    with hold(tmp_path / "tiny" / "search") if held else contextlib.nullcontext():
        assert cli.main(["study", "tiny", "--results", str(tmp_path)]) == (TRY_AGAIN if held else 1)
        assert cli.main(["search", "tiny", "--results", str(tmp_path)]) == (TRY_AGAIN if held else 1)
    said = capsys.readouterr().out
    assert "waits for its coefficients" in said and ("Another process is at work on" in said) == held


def test_compound_scaling_is_trained_at_any_phi(profile_file, tmp_path):
    path = profile_file(
        methods=["compound_phi1", "compound_searched_phi3.0"], search={"step": 0.4}, base_resolution=224
    )
    profile = study.load_profile(path)
    found(profile, tmp_path)
    one, three = plan_runs(profile, tmp_path)
    assert one.scaling == Scaling(1.2, 1.1, 1.15)
    target = flops_by_hand(1.728, 1.331, round(224 * 1.520875), 10)
    assert flops_by_hand(1, three.scaling.width, 224, 10) == pytest.approx(target, rel=0.03)
    assert one.executed.name == "04_compound_scaling_compound_phi1_seed0.ipynb"
    assert study.color("compound_phi1") == study.color("compound") != study.color("compound_searched_phi3.0")
    wrong_times = ("depth_x", "depth_x0.5", "depth_x2.0", "baseline_x2", "depth_matched_x2")
    for wrong in ("compound_phi", "depth_phi2", "compound_phi-1", *wrong_times):
        with pytest.raises(ValueError, match=f"unknown method '{wrong}'"):
            study.Run.plan(path, wrong, 0, tmp_path)


@pytest.mark.slow
def test_figure_8_has_networks_at_any_multiple_of_the_baselines_flops(profile_file, tmp_path):
    axes = ("depth", "width", "resolution", "compound", "compound_searched")
    methods = ["baseline", *(f"{axis}_x{times}" for times in (2, 4.7) for axis in axes)]
    path = profile_file(methods=methods, search={"step": 0.4}, base_resolution=224)
    profile = study.load_profile(path)
    found(profile, tmp_path)
    baseline, *runs = plan_runs(profile, tmp_path)
    for run in runs:
        axis, _, times = run.method.rpartition("_x")
        assert run.cost.flops == pytest.approx(float(times) * baseline.cost.flops, rel=0.06), run.method
        scaled = {name for name, value in dataclasses.asdict(run.scaling).items() if value > 1}
        if axis != "compound_searched":  # whose coefficients may well scale one axis alone
            assert scaled == ({axis} if axis != "compound" else {"depth", "width", "resolution"})
        assert study.color(run.method) == study.color(axis)
    assert runs[0].executed.name == "02_single_axis_scaling_depth_x2_seed0.ipynb"
    lines = figure8_lines({run.method: run.cost.flops for run in (baseline, *runs)})
    assert sorted(lines) == sorted(["baseline", f"{axis}_x2", f"{axis}_x4.7"] for axis in axes)


def test_a_line_joins_published_and_matched_networks():
    flops = {"depth": 9, "baseline": 1, "depth_matched": 8, "compound": 8, "compound_phi3": 16}
    expected = [["baseline", "depth_matched", "depth"], ["baseline", "compound", "compound_phi3"]]
    assert sorted(figure8_lines(flops)) == sorted(expected)
    assert figure8_lines({"depth": 9}) == [["depth"]] and figure8_lines({"baseline": 1}) == []


def test_figure_8_of_tiny_imagenet_has_the_recipe_of_its_table_7():
    lines, table = study.load_profile("tiny-imagenet-figure8"), study.load_profile("tiny-imagenet")
    for name in ("data", "base_resolution", "stem_stride", "train"):
        assert getattr(lines, name) == getattr(table, name), name


def interrupted_search(profile_file, tmp_path):
    """The path of a profile, its candidates, and the record of the first one, which an interrupted search trained."""
    data = {"name": "digits", "size": 16, "train_per_class": 12}
    search = {"step": 0.4, "seeds": [0, 1], "max_flops": 2.5}
    train = {"epochs": 1, "batch_size": 20, "optimizer": "sgd", "lr": 0.05, "norm_momentum": 0.1}
    changes = {"data": data, "train": train, "search": search, "baseline": {"depth": 0.5, "width": 0.25}}
    path = profile_file(methods=["baseline", "compound_searched"], **changes)
    profile = study.load_profile(path)
    candidates = all_candidates(profile, tmp_path)
    return path, candidates, candidates[0].train(study.load_data(**profile.data.given()))


def test_a_search_continues_and_says_how_sure_it_is(profile_file, tmp_path):
    """03 from end to end."""
    path, candidates, first = interrupted_search(profile_file, tmp_path)
    run_notebook("03_coefficient_search", tmp_path / "03.ipynb", {"profile": str(path), "results": str(tmp_path)})
    table = pd.read_csv(tmp_path / "tiny" / "tables" / "search.csv").set_index("candidate")
    states = table["status"].dropna()
    assert set(states) == {"finished"} and 2 * len(states) == len(candidates)
    assert read_record(candidates[0].run_dir) == first
    assert (table.loc[states.index, ["n", "epochs"]] == [2, 1]).all(axis=None)
    top1 = [read_record(run.run_dir)["minival"]["top1"] for run in candidates if run.name == candidates[0].name]
    assert table["top1"][candidates[0].name] == pytest.approx(np.mean(top1))
    outcome = json.loads((tmp_path / "tiny" / "coefficients.json").read_text())
    best = table.loc[table["top1"] == table["top1"].max(), ["alpha", "beta", "gamma"]].values.tolist()
    assert [outcome[name] for name in ("alpha", "beta", "gamma")] in best
    assert list(searched_coefficients(study.load_profile(path), tmp_path / "tiny")) in best
    assert len(outcome["interval_over_seeds"]) == 2 and outcome["finished"] == outcome["candidates"] == len(states)
    sureness = pd.read_csv(tmp_path / "tiny" / "tables" / "search_sureness.csv")
    assert sureness["best_in_percent"].sum() == pytest.approx(100)


@pytest.mark.slow
def test_a_finished_search_trains_nothing(profile_file, tmp_path, capsys):
    path, _, _ = interrupted_search(profile_file, tmp_path)
    assert cli.main(["search", str(path), "--results", str(tmp_path)]) == 0
    outcome = json.loads((tmp_path / "tiny" / "coefficients.json").read_text())
    assert f"alpha {outcome['alpha']:g}, beta {outcome['beta']:g}" in capsys.readouterr().out
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "tiny" / "search").rglob("run.json")}
    assert cli.main(["search", str(path), "--results", str(tmp_path)]) == 0
    assert before == {file: file.stat().st_mtime_ns for file in before}
    assert json.loads((tmp_path / "tiny" / "coefficients.json").read_text()) == outcome


def test_a_searchs_outcome_in_words():
    found = {"alpha": 1.2, "beta": 1.1, "gamma": 1.15, "minival_top1": 50.123, "candidates": 4, "finished": 3}
    found |= {"best_in_percent_of_draws": 71.4, "not_told_apart": ["a"], "seeds": 1}
    words = describe_search(found)
    assert "alpha 1.2, beta 1.1, gamma 1.15 has the highest minival score, 50.12 %, of 3 candidates" in words
    assert "ranks first in 71 % of resampled validation sets; 1 of the other candidates cannot be" in words
    assert words.endswith("Differences between seeds are not included.")
    alone = describe_search(found | {"finished": 1, "best_in_percent_of_draws": None})
    assert alone.endswith("so nothing can be said of its certainty.")
    assert "between seeds" not in describe_search(found | {"seeds": 2})


@pytest.mark.slow
def test_the_analysis_compares_searched_coefficients_at_equal_cost(profile_file, tmp_path):
    """On made-up scores: searched ahead of the single axes, equal to the published coefficients."""
    top1 = {"baseline": 70, "depth": 74, "width": 74.5, "resolution": 73.5, "compound": 77, "compound_searched": 77.02}
    path = profile_file(methods=list(top1), seeds=[0, 1, 2], purpose="exploratory", search={"step": 0.4})
    profile, rng = study.load_profile(path), np.random.default_rng(0)
    found(
        profile,
        tmp_path,
        minival_top1=50.0,
        candidates=3,
        finished=2,
        best_in_percent_of_draws=60.0,
        not_told_apart=["x"],
    )
    for run in plan_runs(profile, tmp_path):
        score = top1[run.method] + 0.05 * (run.seed - 1)
        write_record(run, score, cost={"params": 1000, "flops": 2000 + int(score), "activations": 3000})
        np.save(run.run_dir / "test_correct.npy", rng.random(1000) < score / 100)
        row = {"epoch": 1, "train_loss": 2.0, "minival_top1": score, "lr": run.config.lr}
        (run.run_dir / "history.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"epoch": 2}) + "\n")
    run_notebook("05_analysis", tmp_path / "05.ipynb", {"profile": str(path), "results": str(tmp_path)})
    folder = tmp_path / "tiny"
    contrasts = pd.read_csv(folder / "tables" / "contrasts.csv").set_index(["claim", "other"])["outcome"]
    assert contrasts["searched"].to_dict() == dict.fromkeys(("depth", "width", "resolution"), "above")
    assert contrasts["searched_vs_published", "compound"] == "equal"
    claims = {c["key"]: c for c in json.loads((folder / "tables" / "verdict.json").read_text())["claims"]}
    assert "The search gave everything to width" in claims["searched"]["sentences"][-1]
    page = (folder / "README.md").read_text()
    assert "## Coefficient search" in page and "60 % of resampled validation sets" in page


def test_the_published_row_is_a_phi_just_below_two():
    assert TABLE7["compound"].depth == pytest.approx(1.2**1.85, abs=0.01)
