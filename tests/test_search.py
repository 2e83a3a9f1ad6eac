"""The coefficient search, and the networks that follow from it."""

import contextlib
import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
from conftest import write_record

import effnet_study as study
from effnet_lib import TABLE7, Scaling, compound_scaling, hold, read_record, scaled_cost, train


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
        "made_by": study.made_by(profile),
        "seeds": 1,
        "pruned": 0,
        **changes,
    }
    (tmp_path / profile.name).mkdir(exist_ok=True)
    (tmp_path / profile.name / "coefficients.json").write_text(json.dumps(values))


def test_all_of_the_grid_and_the_published_coefficients_are_listed_with_their_exact_cost(searching):
    table, candidates = study.plan_search(searching(step=0.1))
    assert table["published"].sum() == 1 and table["candidate"].is_unique
    assert table.query("not published")["product"].between(1.9, 2.1).all()
    for row in table.sample(5, random_state=0).itertuples():
        cost = scaled_cost(Scaling(row.alpha, row.beta, row.gamma), 16, 10, 2)
        assert (row.params, row.flops, row.activations) == dataclasses.astuple(cost)
        assert row.flops_ratio == pytest.approx(row.flops / scaled_cost(Scaling(), 16, 10, 2).flops)
        assert row.product == pytest.approx(row.alpha * row.beta**2 * row.gamma**2)
    assert {c.name for c in candidates} == set(table[table["same_as"].isna()]["candidate"])


def test_coefficients_that_round_to_one_network_are_trained_once(searching):
    table, candidates = study.plan_search(searching(step=0.1))
    same = table.dropna(subset="same_as").set_index("candidate")["same_as"]
    assert same["a2.00_b1.00_g1.00"] == "a1.90_b1.00_g1.00"
    models = {c.name: c.model(10) for c in candidates}
    shapes = [str({key: w.shape for key, w in m.state_dict().items()}) for m in models.values()]
    networks = list(zip(shapes, (c.config.resolution for c in candidates), strict=True))
    assert len(set(networks)) == len(networks)


def test_what_exceeds_max_flops_is_not_trained(searching):
    table, candidates = study.plan_search(searching(step=0.1, max_flops=2.2))
    assert 0 < (~table["affordable"]).sum() < len(table)
    assert (table[~table["affordable"]]["flops_ratio"] > 2.2).all()
    assert all(c.cost.flops <= 2.2 * scaled_cost(Scaling(), 16, 10, 2).flops for c in candidates)
    with pytest.raises(
        ValueError, match=r"max_flops: 1.01 leaves none of .* the cheapest of which costs \d\.\d\d times"
    ):
        study.plan_search(searching(step=0.1, max_flops=1.01))


@pytest.mark.parametrize(
    "search, message",
    [
        ({"step": 0.6}, "search: step: on a grid of 0.6 no alpha"),
        ({"step": "x"}, "search: step: expected a number, got 'x'"),
        ({"max_flops": 0.5}, "search: max_flops: expected a multiple of the baseline's of at least 1, got 0.5"),
        ({"halving": -10}, "search: halving: expected 0, or a factor of at least 2, got -10"),
        ({"seeds": [[0]]}, "search: seed: expected int"),
        ({"high": float("inf")}, "search: high: expected a finite number, got inf"),
        ({"train": {"pretrained": True}}, "search: train: most candidates have no pretrained weights"),
        ({"halving": 1}, "search: halving: expected 0, or a factor of at least 2, got 1"),
        ({"seeds": []}, "search: seeds: expected a list without repetitions"),
        ({"sed": [1]}, "search: unknown key 'sed'"),
        ({"train": {"epoch": 1}}, "search: unknown training setting 'epoch'.*Did you mean 'epochs'"),
        ({"train": {"seed": 1}}, "search: train: seed follows from candidate and seeds"),
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
    _, candidates = study.plan_search(searching(train={"epochs": 1}), tmp_path)
    candidate = next(c for c in candidates if c.coefficients == (1.0, 1.4, 1.0))
    assert candidate.scaling == compound_scaling(1, 1.0, 1.4, 1.0) and candidate.config.epochs == 1
    record = candidate.train(digits)
    assert record["scored"] == "minival" and record["test"]["top1"] == record["minival"]["top1"]
    assert len(np.load(candidate.directory / "test_correct.npy")) == digits.counts["minival"]
    assert candidate.state() == "finished"


def test_searched_coefficients_are_scaled_to_the_cost_of_compound(profile_file, tmp_path):
    path = profile_file(methods=["compound", "compound_searched"], search={"step": 0.4}, base_resolution=224)
    profile = study.load_profile(path)
    compound, searched = study.plan_runs(profile, tmp_path)
    assert searched.state() == "waiting" and compound.state() == "missing"
    with pytest.raises(
        FileNotFoundError,
        match="search for compound_searched's coefficients first: effnet search .*tiny.yaml --results",
    ):
        searched.scaling  # noqa: B018
    found(profile, tmp_path)
    compound, searched = study.plan_runs(profile, tmp_path)
    assert searched.state() == "missing"
    assert searched.scaling.depth == searched.scaling.resolution == 1 and searched.scaling.width > 1.8
    assert searched.cost.flops == pytest.approx(compound.cost.flops, rel=0.03)


@pytest.mark.parametrize(
    "change",
    [
        {"search": {"step": 0.4, "low": 1.8}},
        {"train": {"epochs": 1, "lr": 0.3}},
        {"base_resolution": 24},
        {"data": {"name": "digits", "size": 16, "train_per_class": 5}},
    ],
)
def test_coefficients_of_another_search_are_not_taken(profile_file, searching, tmp_path, change):
    profile = searching()
    found(profile, tmp_path)
    assert study.plan_runs(profile, tmp_path)[1].state() == "missing"
    other = study.load_profile(profile_file(**{"methods": list(profile.methods), "search": {"step": 0.4}} | change))
    assert study.plan_runs(other, tmp_path)[1].state() == "waiting"


def test_what_waits_for_a_search_is_told(profile_file, tmp_path, capsys):
    path = str(profile_file(methods=["compound_searched"], search={"step": 0.4}))
    profile = study.load_profile(path)
    table = study.load_runs(profile, tmp_path)
    assert table["status"].tolist() == ["waiting"] and pd.isna(table["resolution"][0])
    assert study.main(["status", path, "--results", str(tmp_path)]) == 0
    assert (
        f"compound_searched seed 0 waits for its coefficients: effnet search {path} --results {tmp_path}"
        in capsys.readouterr().out
    )
    assert study.main(["plan", path, "--results", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert (
        "not counted, for want of coefficients: 1 run; effnet search " in said
        and "all runs that can start have ended" in said
    )
    found(profile, tmp_path, alpha="x")
    with pytest.raises(
        ValueError, match=r"coefficients.json is damaged .*; delete it, then: effnet search .*tiny.yaml --results"
    ):
        study.plan_runs(profile, tmp_path)[0].state()


def test_candidates_with_fine_steps_have_names_of_their_own(searching):
    table, _ = study.plan_search(searching(step=0.005, low=1.99999, high=2.00001))
    assert table["candidate"].is_unique and len(table) > 10


def test_a_candidate_is_judged_by_one_attempt_in_one_process(profile_file):
    profile = study.load_profile(profile_file(search={"step": 0.4}, devices=2, retry_lr=0.5))
    assert all((c.profile.devices, c.profile.retry_lr) == (1, None) for c in study.plan_search(profile)[1])


def test_a_failed_candidate_is_trained_again_when_asked(searching, tmp_path, monkeypatch):
    profile = searching(train={"epochs": 1})
    _, candidates = study.plan_search(profile, tmp_path)
    write_record(candidates[0], status="failed", error="of the machine")
    write_record(candidates[1])
    monkeypatch.setattr(study, "_execute", lambda *a: True)
    monkeypatch.setattr(study, "load_profile", lambda name: profile)
    assert "run again with: effnet search " in candidates[0].again and f"{tmp_path} --retry" in candidates[0].again
    study.search("tiny", tmp_path)
    assert candidates[0].state() == "failed"
    study.search("tiny", tmp_path, retry=True)
    assert candidates[0].state() == "missing" and (candidates[0].directory / "run.earlier.json").exists()
    assert candidates[1].state() != "missing"


@pytest.mark.parametrize("held", [False, True])
def test_a_study_whose_search_does_not_succeed_says_so(searching, tmp_path, monkeypatch, capsys, held):
    """One that fails, and one that another process makes."""
    profile = searching()
    (tmp_path / "tiny" / "search").mkdir(parents=True)
    monkeypatch.setattr(study, "load_profile", lambda name: profile)
    monkeypatch.setattr(study, "execute", lambda executions, *arguments: False)
    with hold(tmp_path / "tiny" / "search") if held else contextlib.nullcontext():
        assert study.main(["study", "tiny", "--results", str(tmp_path)]) == (study.TRY_AGAIN if held else 1)
        assert study.main(["search", "tiny", "--results", str(tmp_path)]) == (study.TRY_AGAIN if held else 1)
    said = capsys.readouterr().out
    assert "waits for its coefficients" in said and ("Another process is at work on" in said) == held


def test_compound_scaling_is_trained_at_any_phi(profile_file, tmp_path):
    path = profile_file(
        methods=["compound_phi1", "compound_searched_phi3.0"], search={"step": 0.4}, base_resolution=224
    )
    profile = study.load_profile(path)
    found(profile, tmp_path)
    one, three = study.plan_runs(profile, tmp_path)
    assert one.scaling == compound_scaling(1)
    assert three.cost.flops == pytest.approx(profile.cost(compound_scaling(3)).flops, rel=0.03)
    assert one.executed.name == "04_compound_scaling_compound_phi1_seed0.ipynb"
    assert study.color("compound_phi1") == study.color("compound") != study.color("compound_searched_phi3.0")
    wrong_times = ("depth_x", "depth_x0.5", "depth_x2.0", "baseline_x2", "depth_matched_x2")
    for wrong in ("compound_phi", "depth_phi2", "compound_phi-1", *wrong_times):
        with pytest.raises(ValueError, match=f"unknown method '{wrong}'"):
            study.Run.plan(path, wrong, 0, tmp_path)


def test_figure_8_has_networks_at_any_multiple_of_the_baselines_flops(profile_file, tmp_path):
    axes = ("depth", "width", "resolution", "compound", "compound_searched")
    methods = ["baseline", *(f"{axis}_x{times}" for times in (2, 4.7) for axis in axes)]
    path = profile_file(methods=methods, search={"step": 0.4}, base_resolution=224)
    profile = study.load_profile(path)
    found(profile, tmp_path)
    baseline, *runs = study.plan_runs(profile, tmp_path)
    for run in runs:
        axis, _, times = run.method.rpartition("_x")
        assert run.cost.flops == pytest.approx(float(times) * baseline.cost.flops, rel=0.06), run.method
        scaled = {name for name, value in dataclasses.asdict(run.scaling).items() if value > 1}
        if axis != "compound_searched":  # whose coefficients may well scale one axis alone
            assert scaled == ({axis} if axis != "compound" else {"depth", "width", "resolution"})
        assert study.color(run.method) == study.color(axis)
    assert runs[0].executed.name == "02_single_axis_scaling_depth_x2_seed0.ipynb"
    lines = study.figure8_lines({run.method: run.cost.flops for run in (baseline, *runs)})
    assert sorted(lines) == sorted(["baseline", f"{axis}_x2", f"{axis}_x4.7"] for axis in axes)


def test_a_line_joins_published_and_matched_networks():
    flops = {"depth": 9, "baseline": 1, "depth_matched": 8, "compound": 8, "compound_phi3": 16}
    expected = [["baseline", "depth_matched", "depth"], ["baseline", "compound", "compound_phi3"]]
    assert sorted(study.figure8_lines(flops)) == sorted(expected)
    assert study.figure8_lines({"depth": 9}) == [["depth"]] and study.figure8_lines({"baseline": 1}) == []


def test_figure_8_of_tiny_imagenet_has_the_recipe_of_its_table_7():
    lines, table = study.load_profile("tiny-imagenet-figure8"), study.load_profile("tiny-imagenet")
    for name in ("data", "base_resolution", "stem_stride", "train"):
        assert getattr(lines, name) == getattr(table, name), name


def test_pruning_ends_a_run_before_its_last_epoch_and_stays(tmp_path, digits, tiny_model, recipe):
    told = []

    def each_epoch(row):
        told.append(row["epoch"])
        return row["epoch"] >= 2

    record = train(tiny_model(), digits, recipe(), tmp_path, each_epoch=each_epoch)
    assert told == [1, 2] and record["status"] == "pruned" and record["minival"]["top1"] >= 0
    assert not (tmp_path / "weights.safetensors").exists() and not list(tmp_path.glob("checkpoint*"))
    assert read_record(tmp_path) == train(tiny_model(), digits, recipe(), tmp_path, each_epoch=each_epoch)
    assert told == [1, 2, 1, 2]  # an ended run tells its epochs again
    other = train(tiny_model(), digits, recipe(), tmp_path / "other", each_epoch=lambda row: row["epoch"] == 3)
    assert other["status"] == "finished"  # after its last epoch there is nothing to save


def test_a_search_by_halving_prunes_continues_and_says_how_sure_it_is(profile_file, tmp_path, capsys):
    """03 from end to end: interrupted after its first candidate, then to its end, then again without any training."""
    data = {"name": "digits", "size": 16, "train_per_class": 12}
    search = {"step": 0.2, "halving": 2, "seeds": [0, 1], "max_flops": 2.5}
    train = {"epochs": 3, "batch_size": 20, "optimizer": "sgd", "lr": 0.05, "norm_momentum": 0.1}
    path = profile_file(methods=["baseline", "compound_searched"], data=data, train=train, search=search)
    parameters = {"profile": str(path), "results": str(tmp_path)}
    profile = study.load_profile(path)
    _, candidates = study.plan_search(profile, tmp_path)
    order = [candidates[i] for i in np.random.default_rng(0).permutation(len(candidates))]
    first = order[0].train(study.load_data(**profile.data))  # as if by an interrupted search
    study.run_notebook("03_coefficient_search", tmp_path / "03.ipynb", parameters)
    table = pd.read_csv(tmp_path / "tiny" / "tables" / "search.csv").set_index("candidate")
    states = table["status"].dropna()
    assert set(states) == {"finished", "pruned"} and len(states) == len(candidates)
    assert read_record(order[0].directory) == first
    assert (table[table["status"] == "finished"]["n"] == 2).all() and (
        table[table["status"] == "pruned"]["epochs"] < 3
    ).all()
    outcome = json.loads((tmp_path / "tiny" / "coefficients.json").read_text())
    best = table[table["status"] == "finished"]["top1"].idxmax()
    assert [outcome[name] for name in ("alpha", "beta", "gamma")] == table.loc[
        best, ["alpha", "beta", "gamma"]
    ].tolist()
    assert study.searched_coefficients(profile, tmp_path / "tiny") == tuple(table.loc[best, ["alpha", "beta", "gamma"]])
    assert len(outcome["interval_over_seeds"]) == 2 and outcome["finished"] == (states == "finished").sum()
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "tiny" / "search").rglob("run.json")}
    assert study.main(["search", str(path), "--results", str(tmp_path)]) == 0
    assert f"alpha {outcome['alpha']:g}, beta {outcome['beta']:g}" in capsys.readouterr().out
    assert before == {file: file.stat().st_mtime_ns for file in before}
    assert json.loads((tmp_path / "tiny" / "coefficients.json").read_text()) == outcome


def test_a_searchs_outcome_in_words():
    found = {"alpha": 1.2, "beta": 1.1, "gamma": 1.15, "minival_top1": 50.123, "candidates": 14, "finished": 3}
    found |= {"best_in_percent_of_draws": 71.4, "not_told_apart": ["a"], "seeds": 1, "pruned": 11}
    words = study.describe_search(found)
    assert "alpha 1.2, beta 1.1, gamma 1.15, with 50.12 % of minival" in words
    assert "best in 71 % of the draws" in words and "of the 2 others that were trained to the end 1 cannot" in words
    assert "draws of images, with one seed" in words and words.endswith("11 were pruned by their early scores.")
    alone = study.describe_search(found | {"finished": 1, "best_in_percent_of_draws": None, "pruned": 0})
    assert alone.endswith("so how sure that is cannot be said.")
    assert "draws of images and seeds" in study.describe_search(found | {"seeds": 2})


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
    for run in study.plan_runs(profile, tmp_path):
        score = top1[run.method] + 0.05 * (run.seed - 1)
        write_record(run, score, cost={"params": 1000, "flops": 2000 + int(score), "activations": 3000})
        correct = rng.random(1000) < score / 100
        np.save(run.directory / "test_correct.npy", correct)
        label = rng.integers(0, 10, 1000)
        answers = {"label": label, "predicted": np.where(correct, label, (label + 1) % 10)}
        np.savez(run.directory / "test_predictions.npz", **answers, confidence=np.full(1000, 0.5))
        row = {"epoch": 1, "train_loss": 2.0, "minival_top1": score, "lr": run.config.lr}
        (run.directory / "history.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"epoch": 2}) + "\n")
    study.run_notebook("05_analysis", tmp_path / "05.ipynb", {"profile": str(path), "results": str(tmp_path)})
    folder = tmp_path / "tiny"
    claims = json.loads((folder / "tables" / "verdict.json").read_text())["claims"]
    assert claims["compound scaling with searched coefficients beats each single axis"] == "reproduced"
    assert claims["the searched coefficients beat the published ones"] == "not reproduced"  # equal
    calibration = pd.read_csv(folder / "tables" / "calibration.csv").set_index("method")
    assert calibration["ece"]["baseline"] == pytest.approx(20, abs=3) and (calibration["n"] == 3).all()
    classes = pd.read_csv(folder / "tables" / "per_class.csv")
    assert len(classes) == 10 and classes["compound"].mean() > classes["baseline"].mean()
    for figure in ("per_class", "calibration"):
        assert (folder / "figures" / f"{figure}.png").exists()
    page = (folder / "README.md").read_text()
    assert "## Coefficient search" in page and "60 % of the draws" in page and "figure7" not in page  # no weights here


def test_calibration_is_the_gap_of_confidence_and_accuracy():
    confidence, correct = (
        np.array([0.9] * 10 + [0.55] * 10),
        np.array([True] * 6 + [False] * 4 + [True] * 5 + [False] * 5),
    )
    error, bins = study.calibration(confidence, correct)
    assert error == pytest.approx((30 + 5) / 2)
    assert bins["images"].tolist() == [10, 10] and bins["accuracy"].tolist() == [50, 60]
    sure, _ = study.calibration(np.ones(5), np.ones(5, bool))
    assert sure == 0
    assert study.calibration(np.array([0.0, 1.0]), np.array([False, True]))[0] == 0


def test_the_bootstrap_of_several_methods_is_that_of_two():
    rng = np.random.default_rng(0)
    a, b = rng.random((3, 200)) < 0.6, rng.random((2, 200)) < 0.5
    drawn = study.bootstrap([a, b], draws=300)
    assert drawn.shape == (300, 2) and drawn.mean(0) == pytest.approx([100 * a.mean(), 100 * b.mean()], abs=1.5)
    assert study.paired_bootstrap(a, b, draws=300) == pytest.approx(
        tuple(np.quantile(drawn[:, 0] - drawn[:, 1], [0.025, 0.975]))
    )
    with pytest.raises(ValueError, match="same test images, got 100 and 200"):
        study.bootstrap([a, b[:, :100]])


def test_the_published_row_is_a_phi_just_below_two():
    assert TABLE7["compound"].depth == pytest.approx(1.2**1.85, abs=0.01)
