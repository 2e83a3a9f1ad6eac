"""The analysis of made-up runs: Table 7, claims, training lengths, Figure 8's further runs, the page."""

import json
import math
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import scipy
import yaml
from conftest import SMALL_PROFILE, write_record

from effnet_lib import Scaling
from effnet_study.analysis import recipes, summary, tables
from effnet_study.analysis.claims import planned_claims, verdict, verdict_lines
from effnet_study.analysis.statistics import SAME
from effnet_study.coefficients import made_by
from effnet_study.methods import FlopsMatch
from effnet_study.profile import Protocol, load_profile
from effnet_study.record import read_record
from effnet_study.run import plan_runs
from effnet_study.search import all_candidates, plan_search

TOP1 = {"baseline": 70, "depth": 74, "width": 74.5, "resolution": 73.5, "compound": 77, "fast_compound": 77.1}
TOP1 |= {"depth_matched": 74.5, "width_matched": 76.95, "resolution_matched": 74}
MATCHED = ["compound", "depth_matched", "width_matched", "resolution_matched"]
FLOPS = {"baseline": 1000, "depth": 3200, "width": 3500, "resolution": 3000, "compound": 4000, "fast_compound": 4000}
FLOPS |= {"depth_matched": 4100, "width_matched": 4010, "resolution_matched": 3900, "depth_x2": 1900}


@pytest.fixture(autouse=True, scope="module")
def quick_matching():
    """Coefficients that need no counting of FLOPs. test_scaling has the real matching."""
    found = {"depth": Scaling(depth=3.5), "width": Scaling(width=2.1), "resolution": Scaling(resolution=2.06)}
    found |= {"compound": Scaling(1.4, 1.2, 1.3), "fast_compound": Scaling(1.1, 1.3, 1.1)}
    with pytest.MonkeyPatch.context() as patch:
        name = "effnet_study.profile.match_flops"
        patch.setattr(name, lambda way, target, *here, **options: FlopsMatch(found[way], target, 0.0))
        yield


def write_runs(path, results, top1=TOP1, noise=0.05, methods=None, seeds=None):
    """Finished runs of a profile's methods with made-up scores; seed s scores noise * (s - 2) above the mean."""
    profile = load_profile(path)
    for run in plan_runs(profile, results, methods, seeds):
        score = top1[run.method] + noise * (run.seed - 2)
        test = {"top1": score, "top5": 90 + run.seed, "loss": 1.0}
        cost = {"params": 5, "flops": FLOPS.get(run.method, 2000), "activations": 3}
        write_record(run, score, test=test, cost=cost, **run.about)
        row = {"epoch": 1, "train_loss": 2.0, "minival_top1": 50.0, "lr": 0.01}
        (run.run_dir / "history.jsonl").write_text(json.dumps(row) + "\n")
    return profile


def decide(profile, results, purpose="evidence"):
    """The contrasts and the claims by key, as if the profile had this purpose."""
    protocol = Protocol(section="pocket", commit="a3d55ca8be") if purpose == "evidence" else None
    profile = profile.replace(purpose=purpose, protocol=protocol)
    runs, _ = tables.study_runs(profile, results)
    table = tables.contrasts(profile, runs)
    return table, {claim["key"]: claim for claim in verdict(profile, runs, table)["claims"]}


# ---- runs and Table 7


def test_a_study_without_a_finished_run_is_refused(profile_file, tmp_path):
    profile = load_profile(profile_file())
    with pytest.raises(ValueError, match=r"no run of 'tiny' is finished under .*; run effnet study .*tiny.yaml"):
        tables.study_runs(profile, tmp_path)
    write_record(plan_runs(profile, tmp_path)[0], status="failed", error="no")
    with pytest.raises(ValueError, match="no run of 'tiny' is finished"):
        tables.study_runs(profile, tmp_path)


def test_table_7_has_means_intervals_and_the_papers_values(profile_file, tmp_path):
    profile = write_runs(profile_file(methods=[*TOP1], seeds=[0, 1, 2, 3]), tmp_path, seeds=[1, 2, 3])
    _, done = tables.study_runs(profile, tmp_path)
    table = tables.table7(profile, done).set_index("method")
    assert list(table.index) == [*TOP1] and (table["n"] == 3).all()
    assert table["top1"].to_dict() == pytest.approx(TOP1) and table["top1_sd"].tolist() == pytest.approx([0.05] * 9)
    half = 4.302653 * 0.05 / 3**0.5
    assert table.loc["compound", ["top1_low", "top1_high"]].tolist() == pytest.approx([77 - half, 77 + half], abs=1e-5)
    assert table.loc["compound", ["d", "w", "r", "paper_top1"]].tolist() == [1.4, 1.2, 1.3, 81.1]
    half = 4.302653 / 3**0.5  # top-5 of the seeds is 91, 92, 93
    assert table.loc["depth", ["top5", "top5_low", "top5_high"]].tolist() == pytest.approx([92, 92 - half, 92 + half])
    assert table["flops"].to_dict() == {m: FLOPS[m] for m in TOP1} and (table["seconds"] == 9).all()
    assert table["resolution"].to_dict() | {"compound": 21, "resolution": 32} == table["resolution"].to_dict()
    assert table["paper_flops"][["baseline", "depth", "resolution"]].tolist() == [0.4e9, 1.8e9, 1.9e9]
    assert pd.isna(table["paper_top1"]["fast_compound"]) and table["same_as"].isna().all()
    short = [re.sub(" +", " ", line) for line in summary.short_table7(table.reset_index()).splitlines()]
    assert len(short) == 2 + 9 and short[2].endswith("| | 77.3 | |")
    gain = TOP1["depth"] - TOP1["baseline"]
    assert short[3] == f"| depth | 3,200 | 3 | 74.00 | 73.88 to 74.12 | 0.05 | {gain:+.2f} | 79.0 | +1.70 |"
    assert "| +" not in summary.short_table7(table.drop("baseline").reset_index())  # nothing to gain over


def test_a_method_whose_network_is_anothers_by_rounding_is_marked(profile_file, tmp_path):
    path = profile_file(methods=["baseline", "resolution", "resolution_matched"], base_resolution=8, stem_stride=2)
    path.write_text(path.read_text() + "baseline: {depth: 0.1, width: 0.25}\n")
    _, done = tables.study_runs(write_runs(path, tmp_path), tmp_path)
    table = tables.table7(load_profile(path), done).set_index("method")["same_as"]
    assert table["resolution_matched"] == "resolution" and table[["baseline", "resolution"]].isna().all()


# ---- claims


def test_claims_are_keyed_and_the_headline_comes_first():
    methods = [*TOP1, "compound_searched", *(f"{m}_x{n}" for n in ("10", "2") for m in ("compound", "depth"))]
    claims = planned_claims(methods)
    assert [claim.key for claim in claims] == [
        *("compound_matched", "compound_published", "compound_x2", "compound_x10", "fast_compound", "axes_help"),
        *("searched", "searched_vs_published"),
    ]
    assert planned_claims(["baseline"]) == planned_claims([]) == []
    assert [claim.key for claim in planned_claims(["baseline", "depth"])] == ["axes_help"]
    assert planned_claims(["depth", "width", "compound_phi2.5"]) == []  # no partner


def test_claims_of_evidence_have_outcomes(profile_file, tmp_path):
    profile = write_runs(profile_file(methods=[*TOP1], seeds=[0, 1, 2, 3, 4]), tmp_path)
    table, claims = decide(profile, tmp_path)
    outcomes = {key: claim["outcome"] for key, claim in claims.items()}
    assert outcomes["compound_published"] == outcomes["axes_help"] == "reproduced"
    assert outcomes["compound_matched"] == "contradicted" and outcomes["fast_compound"] is None  # it only compares
    assert all(claim["open"] == "" and claim["seeds"] == 5 for claim in claims.values())
    rows = table.set_index(["target", "other"])
    assert rows["outcome"]["compound", "width_matched"] == rows["outcome"]["fast_compound", "compound"] == "equal"
    assert rows["difference"]["compound", "depth"] == pytest.approx(3)
    assert rows["paper_difference"]["compound", "depth"] == pytest.approx(2.1)
    assert rows["paper_difference"]["width", "baseline"] == pytest.approx(1.6)
    assert rows["confidence"]["compound", "depth"] == pytest.approx(1 - 0.05 / 3)
    assert rows["confidence"]["fast_compound", "compound"] == pytest.approx(0.95)
    assert rows["flops_ratio"]["compound", "depth"] == 1.25 and rows["flops_ratio"]["depth", "baseline"] == 3.2
    # Welch: two variances of 0.00625 over 5 seeds each, 8 degrees of freedom, whose factor at 98.33 % is 3.0158
    assert rows["half_width"]["compound", "depth"] == pytest.approx(3.0158 * 0.05, rel=1e-4)
    assert rows.loc[("compound", "depth"), ["low", "high"]].tolist() == pytest.approx([2.84921, 3.15079], abs=1e-4)
    assert rows["sd_target"].tolist() == pytest.approx([0.05 * 2.5**0.5] * len(rows))
    (words,) = claims["fast_compound"]["sentences"]
    interval = "n = 5, 95 % interval -0.02 to +0.22"
    assert words == f"fast compound is 0.10 points higher than compound, with as many FLOPs: equal ({interval})"
    words = claims["compound_matched"]["sentences"]
    assert "compound is 2.50 points higher than depth matched, with 2 % fewer FLOPs: above (n = 5, 98.3 %" in words[0]
    assert "with 0.25 % fewer FLOPs: equal" in words[1] and "with 3 % more FLOPs: above" in words[2]


@pytest.mark.parametrize("purpose", ["check", "exploratory"])
def test_without_the_purpose_of_evidence_there_are_words_and_no_outcomes(profile_file, tmp_path, purpose):
    profile = write_runs(profile_file(methods=[*TOP1], seeds=[0, 1, 2, 3, 4]), tmp_path)
    table, claims = decide(profile, tmp_path, purpose)
    assert {claim["outcome"] for claim in claims.values()} == {None}
    assert set(table["outcome"]) == {"above", "equal"}


def test_below_five_seeds_nothing_is_decided(profile_file, tmp_path):
    profile = write_runs(profile_file(methods=[*TOP1], seeds=[0, 1, 2, 3]), tmp_path)
    _, claims = decide(profile, tmp_path)
    assert {claim["outcome"] for claim in claims.values() if claim["key"] != "fast_compound"} == {"inconclusive"}
    assert all(claim["open"] == "" and claim["seeds"] == 4 for claim in claims.values())


def test_a_claim_waits_for_all_its_planned_runs_and_a_failed_one_has_ended(profile_file, tmp_path):
    profile = write_runs(profile_file(methods=[*TOP1], seeds=[0, 1, 2, 3, 4, 5]), tmp_path)
    last = next(run for run in plan_runs(profile, tmp_path) if (run.method, run.seed) == ("depth", 5))
    (last.run_dir / "run.json").unlink()
    _, claims = decide(profile, tmp_path)
    published = claims["compound_published"]
    assert (published["open"], published["outcome"]) == ("23 of its 24 planned runs have ended", "inconclusive")
    assert claims["compound_matched"]["outcome"] == "contradicted"  # all of its runs are there
    write_record(last, status="failed", error="of the machine", **last.about)
    _, claims = decide(profile, tmp_path)
    assert claims["compound_published"]["open"] == "" and claims["compound_published"]["outcome"] == "reproduced"
    assert claims["compound_published"]["seeds"] == 5
    for run in plan_runs(profile, tmp_path, ["depth"]):
        write_record(run, status="diverged", diverged={"epoch": 1, "step": 1, "lr": 0.1}, **run.about)
    table, claims = decide(profile, tmp_path)
    assert claims["compound_published"] | {"sentences": []} == {
        **{"key": "compound_published", "open": "", "seeds": 0, "outcome": "inconclusive"},
        **{"title": "compound scaling beats each single axis at the published coefficients", "sentences": []},
    }
    assert ("compound", "depth") not in set(zip(table["target"], table["other"], strict=True))


def test_wide_intervals_of_the_headline_ask_for_more_seeds(profile_file, tmp_path):
    """The protocol's rule: above one point of half width at five seeds, five more of the headline's methods."""
    profile = write_runs(profile_file(methods=[*TOP1], seeds=[0, 1, 2, 3, 4]), tmp_path, noise=0.5)
    table, claims = decide(profile, tmp_path)
    wide = table[table["claim"] == "compound_matched"]["half_width"].max()
    said = f"half the width of an interval is {wide:.2f} points, so the protocol asks for more seeds"
    assert wide > 1 and claims["compound_matched"]["open"] == said
    assert claims["compound_matched"]["outcome"] == "inconclusive"
    others = {claims[key]["open"] for key in ("compound_published", "axes_help", "fast_compound")}
    assert others == {""} and claims["axes_help"]["outcome"] == "reproduced"
    more = profile_file(methods=[*TOP1], seeds=[0, 1, 2, 3, 4], more_seeds=[5, 6, 7, 8, 9])
    _, claims = decide(load_profile(more), tmp_path)
    assert claims["compound_matched"]["open"] == "20 of its 40 planned runs have ended"
    assert {claims[key]["open"] for key in ("compound_published", "axes_help", "fast_compound")} == {""}
    again, claims = decide(write_runs(more, tmp_path, noise=0.5), tmp_path)
    assert claims["compound_matched"]["open"] == "" and claims["compound_matched"]["seeds"] == 10
    seeds = again.set_index(["claim", "other"])["n"]
    assert seeds["compound_matched"].eq(10).all() and seeds["compound_published"].eq(5).all()  # n is the smaller number


def test_a_claim_with_methods_that_are_not_planned_is_incomplete(profile_file, tmp_path):
    profile = write_runs(profile_file(methods=["compound", "depth", "width"], seeds=[0, 1, 2, 3, 4]), tmp_path)
    table, claims = decide(profile, tmp_path)
    assert (table["outcome"] == "above").all() and table["confidence"].tolist() == pytest.approx([1 - 0.05 / 3] * 2)
    assert claims["compound_published"]["outcome"] == "inconclusive"
    lines = "\n".join(verdict_lines({"claims": [*claims.values()]}))
    assert "coefficients: inconclusive** (methods that it needs are not planned)" in lines


def test_a_study_without_partners_compares_nothing(profile_file, tmp_path):
    profile = write_runs(profile_file(methods=["depth", "width"], seeds=[0, 1]), tmp_path)
    table, claims = decide(profile, tmp_path)
    assert table.empty and claims == {} and "outcome" in table
    assert "nothing to decide" in verdict_lines({"claims": []})[0]


def test_a_network_is_never_judged_against_itself(profile_file, tmp_path):
    """The search finds the published coefficients: compound_searched is compound."""
    path = profile_file(methods=["compound", "compound_searched"], seeds=[0, 1, 2, 3, 4], search={"step": 0.4})
    profile = load_profile(path)
    found = {"alpha": 1.2, "beta": 1.1, "gamma": 1.15, "made_by": made_by(profile)}
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "coefficients.json").write_text(json.dumps(found))
    write_runs(path, tmp_path, TOP1 | {"compound_searched": 90})
    table, claims = decide(profile, tmp_path)
    assert table["outcome"].tolist() == [SAME] and table[["low", "high"]].isna().all(axis=None)
    assert claims["searched_vs_published"]["outcome"] == "inconclusive"
    (words,) = claims["searched_vs_published"]["sentences"]
    assert words == "compound searched and compound are by rounding the same network: nothing is compared"


def test_one_seed_has_a_difference_and_no_interval(profile_file, tmp_path):
    profile = write_runs(profile_file(methods=["compound", "depth"]), tmp_path)
    table, claims = decide(profile, tmp_path, "check")
    assert table["outcome"].tolist() == ["unclear"] and table["low"].isna().all()
    (words,) = claims["compound_published"]["sentences"]
    assert "is 3.00 points higher than depth" in words
    assert words.endswith(": unclear (one seed). The paper's networks: +2.1")


def test_equal_scores_are_called_the_same(profile_file, tmp_path):
    profile = write_runs(profile_file(methods=["compound", "fast_compound"]), tmp_path, TOP1 | {"fast_compound": 77})
    (words,) = decide(profile, tmp_path, "check")[1]["fast_compound"]["sentences"]
    assert words.startswith("fast compound scores the same as compound to 0.01 points, with as many FLOPs: unclear")


# ---- extensions


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A study of five seeds with two further lengths, twice the FLOPs, and another LR; the results folder. Tests do not
    change it."""
    folder = tmp_path_factory.mktemp("extended")
    methods = ["baseline", *MATCHED, "depth", "fast_compound"]
    values = SMALL_PROFILE | {"methods": methods, "seeds": [0, 1, 2, 3, 4]}
    values["train"] = values["train"] | {"epochs": 4}
    whole = folder / "tiny.yaml"
    whole.write_text(yaml.safe_dump(values))
    more = {"short": ("epochs: 2", ["baseline", *MATCHED]), "long": ("epochs: 8", MATCHED)}
    more |= {"twice": ("", ["depth_x2", "compound_x2"]), "hot": ("lr: 0.1", ["baseline", "width_x2"])}
    for name, (train, methods) in more.items():
        text = f"title: {name}\nextends: tiny.yaml\nmethods: [{', '.join(methods)}]\nseeds: [0, 1, 2]\n"
        whole.with_name(f"{name}.yaml").write_text(f"{text}train: {{{train}}}\n")
    (folder / "unrelated.yaml").write_text("- not a profile")
    results = folder / "results"
    scores = {"tiny": 0, "short": -10, "long": 5, "twice": -2, "hot": -1}
    for name, shift in scores.items():
        top1 = {m: v + shift for m, v in TOP1.items()}
        write_runs(whole.with_name(f"{name}.yaml"), results, top1 | {"depth_x2": 72, "width_x2": 71, "compound_x2": 73})
    return whole, results


@pytest.fixture
def changeable(extended, tmp_path):
    """A copy of `extended`."""
    whole, results = extended
    return whole, shutil.copytree(results, tmp_path / "results")


def test_extensions_are_found_beside_the_profile_with_what_they_change(extended):
    whole, _ = extended
    found = {other.name: set(tables.recipe_changes(other)) for other in tables.extensions(load_profile(whole))}
    assert found == {"hot": {"lr"}, "long": {"epochs"}, "short": {"epochs"}, "twice": set()}
    assert tables.extensions(load_profile(whole.with_name("short.yaml"))) == []
    assert tables.recipe_changes(load_profile(whole)) == {}


def test_extensions_of_a_profile_by_name_are_found_by_name():
    names = {other.name for other in tables.extensions(load_profile("pocket"))}
    assert {"pocket-quarter", "pocket-half", "pocket-x2", "pocket-no-zero-init"} <= names
    lengths = tables.length_profiles(load_profile("pocket"))
    assert [one.config().epochs for one in lengths] == sorted(one.config().epochs for one in lengths)
    assert {"pocket", "pocket-quarter", "pocket-half", "pocket-double"} == {one.name for one in lengths}


def test_training_lengths_stand_side_by_side(extended):
    whole, results = extended
    profile = load_profile(whole)
    table = tables.lengths(profile, results).set_index(["epochs", "method"])
    assert table["top1"][2, "compound"] == pytest.approx(67 - 0.05) and table["n"][2, "compound"] == 3
    assert table["top1"][4, "compound"] == pytest.approx(77) and table["n"][4, "compound"] == 5
    assert table["profile"][8, "compound"] == "long" and (8, "baseline") not in table.index
    assert set(table.loc[4].index) == {"baseline", *MATCHED}  # methods of no other length are left out
    rows = tables.length_contrasts(profile, results)
    assert rows["epochs"].tolist() == [2] * 3 + [4] * 3 + [8] * 3 and rows["target"].eq("compound").all()
    assert rows["difference"].tolist() == pytest.approx([2.5, 0.05, 3] * 3)
    assert rows["outcome"].tolist()[3:6] == ["above", "equal", "above"]
    # Against the profile's own length: variances of 0.0025 over 3 seeds and of 0.00625 over 5, two means of each
    parts = np.array([0.0025 / 3, 0.00625 / 5])
    freedom = (2 * parts.sum()) ** 2 / (2 * parts**2 / (2, 4)).sum()
    half = scipy.stats.t.ppf(1 - 0.05 / 6, freedom) * (2 * parts.sum()) ** 0.5
    assert rows["change"].isna().tolist() == [False] * 3 + [True] * 3 + [False] * 3
    assert rows["change"].tolist()[:3] == pytest.approx([0] * 3, abs=1e-9)
    assert rows["change_high"].tolist()[:3] == pytest.approx([half] * 3)
    assert rows["change_low"].tolist()[:3] == pytest.approx([-half] * 3) and rows["change_word"][0] == "equal"
    bello = tables.length_contrasts(profile, results, [("width_matched", "depth_matched")])
    assert bello["difference"].tolist() == pytest.approx([2.45] * 3)


def test_one_length_alone_is_no_table_of_lengths(extended, profile_file, tmp_path):
    whole, results = extended
    short = load_profile(whole.with_name("short.yaml"))
    assert tables.lengths(short, results).empty and tables.length_contrasts(short, results).empty
    assert tables.lengths(load_profile(whole), tmp_path / "elsewhere").empty
    profile = write_runs(whole, tmp_path / "alone")
    assert tables.lengths(profile, tmp_path / "alone").empty  # the other lengths have not begun


def test_figure_8_has_the_runs_of_extensions_with_the_same_recipe(extended):
    whole, results = extended
    profile = load_profile(whole)
    _, done = tables.study_runs(profile, results)
    points = tables.figure8_points(profile, done, results)
    assert set(points) == {"baseline", *MATCHED, "depth", "fast_compound", "compound_x2", "depth_x2"}
    assert len(points["depth_x2"][1]) == 3 and len(points["depth"][1]) == 5
    assert points["baseline"][1].mean() == pytest.approx(70)  # not those of another recipe
    assert points["depth"][0] == 3200 and points["depth_x2"][0] == 1900


def test_an_extension_decides_no_claim_whatever_its_purpose(extended):
    whole, results = extended
    _, claims = decide(load_profile(whole.with_name("short.yaml")), results)
    assert claims["compound_matched"]["outcome"] is None and claims["compound_matched"]["open"] == ""
    assert len(claims["compound_matched"]["sentences"]) == 3


# ---- single images, costs, the search


def write_answers(run, correct, confidence):
    """The answers of a run to images of classes 0, 0, 1, 1 and so on: right ones and those of a class that is not."""
    label = np.repeat(np.arange(len(correct) // 2), 2)
    predicted = np.where(correct, label, 99)
    np.savez(run.run_dir / "test_predictions.npz", label=label, predicted=predicted, confidence=np.array(confidence))


def test_classes_and_calibration_are_means_over_seeds(profile_file, tmp_path):
    profile = write_runs(profile_file(methods=["baseline", "depth"], seeds=[0, 1]), tmp_path)
    _, done = tables.study_runs(profile, tmp_path)
    assert tables.load_answers(done) == {}
    correct = ([1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0])  # baseline, depth; the same of seed 1
    for run, right in zip(plan_runs(profile, tmp_path), correct, strict=True):
        write_answers(run, right, [0.7] * 4)
    answers = tables.load_answers(done)
    classes = tables.per_class(answers, done)
    assert classes.to_dict("list") == {"class": [0, 1], "baseline": [75, 25], "depth": [50, 50]}
    table, curves = tables.calibration_table(profile, answers, tables.table7(profile, done))
    assert table["method"].tolist() == ["baseline", "depth"] and table["top1"].tolist() == pytest.approx(
        [69.925, 73.925]
    )
    # Baseline: 25 and 75 % right at 70 % confidence, so errors of 45 and 5 points; depth: 100 and 0 %, so 30 and 70
    assert table["ece"].tolist() == pytest.approx([25, 50]) and table["mean_confidence"].tolist() == pytest.approx(
        [70, 70]
    )
    assert table["ece_high"].tolist() == pytest.approx([25 + 12.7062 * 20, 50 + 12.7062 * 20], rel=1e-5)
    assert curves["baseline"].empty  # no bin has ten images
    (plan_runs(profile, tmp_path)[-1].run_dir / "test_predictions.npz").unlink()
    assert list(tables.load_answers(done)) == ["baseline"]
    assert tables.per_class({"depth": answers["depth"]}, done).empty


def test_curves_have_bins_of_ten_images_and_are_means_over_seeds(profile_file, tmp_path):
    profile = write_runs(profile_file(methods=["baseline"], seeds=[0, 1]), tmp_path)
    _, done = tables.study_runs(profile, tmp_path)
    for run, right in zip(plan_runs(profile, tmp_path), (10, 5), strict=True):
        write_answers(run, [True] * right + [False] * (10 - right) + [True] * 10, [0.7] * 10 + [0.9] * 9 + [0.3])
    _, curves = tables.calibration_table(profile, tables.load_answers(done), tables.table7(profile, done))
    assert curves["baseline"]["accuracy"].tolist() == [75] and curves["baseline"].index.tolist() == [10]


def test_costs_stand_beside_the_baselines(profile_file, tmp_path):
    baseline, depth = plan_runs(load_profile(profile_file()), tmp_path, ["baseline", "depth"])
    table = tables.compare_costs(baseline, depth)
    assert table.columns.tolist() == ["baseline", "depth", "ratio"]
    assert table.loc["depth"].tolist() == [1, 4, 4] and table.loc["px"].tolist() == [16, 16, 1]
    assert table["ratio"]["flops"] == depth.cost.flops / baseline.cost.flops > 2


def test_a_search_has_the_scores_of_its_candidates(profile_file, tmp_path):
    search = {"step": 0.4, "seeds": [3, 4], "train": {"epochs": 1}}
    profile = load_profile(profile_file(methods=["baseline", "compound_searched"], search=search))
    table, _ = plan_search(profile, tmp_path)
    first, second, third, *others = all_candidates(profile, tmp_path)
    again = next(run for run in others if run.name == first.name)
    for run, top1, seconds in ((first, 40.0, 5.0), (again, 44.0, 7.0), (second, 50.0, 9.0)):
        write_record(run, 0.0, minival={"top1": top1}, seconds=seconds, **run.about)
        (run.run_dir / "history.jsonl").write_text('{"epoch": 1}\n{"epoch": 2}\n')
    write_record(third, status="failed", error="no", **third.about)
    outcome = tables.search_outcome(profile, table, all_candidates(profile, tmp_path)).set_index("candidate")
    assert outcome.index.tolist() == table["candidate"].tolist() and first.seed == 3 and again.seed == 4
    found = outcome.loc[[first.name, second.name, third.name], ["status", "n", "top1", "epochs", "seconds"]]
    assert found.iloc[0].tolist() == ["finished", 2, 42.0, 2, 12.0]  # minival's, not test's
    assert found.iloc[1].tolist() == ["finished", 1, 50.0, 2, 9.0]
    assert found.iloc[2, [0, 1, 3]].tolist() == ["failed", 0, 0] and pd.isna(found["top1"].iloc[2])
    assert outcome["high"][first.name] == pytest.approx(42 + 12.7062 * 2, rel=1e-5)


# ---- mistakes and the page


def test_mistakes_are_measured_on_these_runs(changeable):
    whole, results = changeable
    profile = load_profile(whole)
    runs, done = tables.study_runs(profile, results)
    one = done["run_dir"].iloc[0]
    rows = [{"epoch": 1, "train_loss": 3.0, "minival_top1": 60.0, "lr": 0.05}]
    rows.append({"epoch": 2, "train_loss": 2.0, "minival_top1": 58.5, "lr": 0.001})
    (one / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = recipes.mistakes(profile, done, tables.contrasts(profile, runs)).set_index("mistake")
    assert table.loc["best epoch by the scored images"].tolist()[1:] == ["58.50 %", "60.00 %"]
    assert table["here"]["learning rate not annealed"] == "20.00 %"  # the worst of all runs
    assert table["with the mistake"]["one seed"].startswith("-0.15 to +0.25")
    assert table["measure"]["one seed"] == "compound minus width matched"  # the nearest to zero
    params = [int(text.replace(",", "")) for text in table.loc["squeeze-and-excitation of expanded channels"][1:]]
    assert params[0] < params[1]


def test_other_images_would_change_a_difference_by_so_much(tmp_path):
    """Two seeds of a, one of b: of 4 images a is right in 2, 2, 1 and 0 of 2 tries, b in 1, 0, 0 and 0 of 1."""
    answers = {"a0": [1, 1, 1, 0], "a1": [1, 1, 0, 0], "b0": [1, 0, 0, 0]}
    for name, right in answers.items():
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "test_correct.npy", np.array(right, bool))
    a, b = [tmp_path / "a0", tmp_path / "a1"], [tmp_path / "b0"]
    gaps = [0, 100, 50, 0]  # in points
    assert tables.image_error(a, b) == pytest.approx(np.std(gaps, ddof=1) / 2)
    assert math.isnan(tables.image_error(a, [tmp_path / "lost"]))


def page_of(profile, results):
    """README.md of a profile's results."""
    runs, _ = tables.study_runs(profile, results)
    summary.write_page(profile, verdict(profile, runs, tables.contrasts(profile, runs)), results)
    return (results / profile.name / "README.md").read_text()


def test_the_page_says_what_ran_and_what_came_out(changeable):
    whole, results = changeable
    profile = load_profile(whole)
    (results / "tiny" / "figures").mkdir()
    (results / "tiny" / "figures" / "lengths.png").touch()
    page = re.sub(" +", " ", page_of(profile, results))  # tables are padded
    assert {path.name for path in (results / "tiny" / "tables").iterdir()} == {"mistakes.csv"}  # no pilot, no ablation
    assert page.startswith("# Tiny\n") and "pipeline check, not evidence" in page and "35 of 35 planned" in page
    assert "## Contrasts" in page and "Verdict" not in page and "![lengths](figures/lengths.png)" in page
    assert "![figure8]" not in page and "not as planned" not in page
    assert "| compound | 1.40 | 1.20 | 1.30 |" in page and "| 77.00 | 76.90 to 77.10 | 0.08 | 81.1 |" in page
    short = load_profile(whole.with_name("short.yaml"))
    first, *_, last = plan_runs(short, results, ["baseline"])
    write_record(first, status="failed", error="no", **first.about)
    (last.run_dir / "run.json").unlink()
    split = plan_runs(short, results, ["depth_matched"], [1])[0]
    write_record(split, 64.5, micro_batch=10, seconds=7200.0, ended="2026-01-04T04:04:05+00:00", **split.about)
    page = page_of(short, results)
    assert "It extends [Tiny](../tiny/README.md) (epochs 4 to 2) and decides no claim by itself" in page
    assert (
        "## Not finished, or not as planned\n\n- baseline: seed 0 (failed)\n- baseline: seed 2 (missing)\n"
        "- depth matched, seed 1: " in page
    )
    assert "2.0 hours of computing within 49.0 hours,\n  2026-01-02 03:04 to 2026-01-04 04:04 UTC" in page
    assert page.count("so batch norm saw 10 images at a time instead of 20\n") == 1 and "13 of 15 planned" in page
    assert "all 15 runs take about 2.04 core-hours: 0.509 hours on 4 cores and 0.254 hours on 8 cores" in page
    done = next(run for run in plan_runs(short, results) if run.state() == "finished")
    write_record(done, device={"type": "cpu", "name": "box, 2 threads"}, **done.about)  # two cores of several
    page = page_of(short, results)
    assert "All 15 runs take about 2.04 hours of one device like this one" in page
    assert "- Machine: box and box (2 threads); " in page


def test_the_page_of_an_ablation_has_its_table_and_figure(changeable):
    whole, results = changeable
    hot = load_profile(whole.with_name("hot.yaml"))
    page, folder = page_of(hot, results), results / "hot"
    assert "## What the change does" in page and "![ablation](figures/ablation.png)" in page
    assert "- baseline, moving average: 69.95 as it is, 68.95 changed: -1.00 points (95 % interval" in page
    table = pd.read_csv(folder / "tables" / "ablation.csv")
    assert table["what"].tolist() == ["baseline"] * 2 and (table["change"] == "lr 0.05 to 0.1").all()
    for run in plan_runs(load_profile(whole), results, ["baseline"]):
        (run.run_dir / "run.json").unlink()
    page = page_of(hot, results)  # what is no longer so does not stay
    assert "There is nothing to compare" in page and "![ablation]" not in page
    assert not (folder / "tables" / "ablation.csv").exists()


def test_a_run_is_described_by_its_record(profile_file, tmp_path):
    profile = load_profile(profile_file())
    run = plan_runs(profile, tmp_path, ["depth"])[0]
    write_record(run, 71.25, test={"top1": 71.25, "top5": 91.5, "loss": 1.0}, **run.about)
    words = summary.describe_run(profile, read_record(run.run_dir))
    assert words.startswith("**Tiny, depth, seed 0:** test top-1 **71.25 %**, top-5 91.50 % with the EMA weights")
    assert "(45.00 % with the raw weights), 9 s at 7 images/s on box. *Pipeline check, not evidence. One run " in words
