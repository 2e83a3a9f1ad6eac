"""A study with one thing of its recipe changed, beside the one that it changes."""

import math

import numpy as np
import pytest
from conftest import write_record
from scipy import stats

import effnet_study as study
from effnet_lib import TrainConfig, learning_rate


@pytest.fixture
def changed(profile_file):
    """The profile `tiny` with two seeds, and an ablation of it; their paths."""
    whole = profile_file(seeds=[0, 1], data={"name": "digits", "size": 16, "train_per_class": 4})
    path = whole.with_name("high.yaml")
    path.write_text("title: High\nablation_of: tiny.yaml\nmethods: [baseline, compound]\ntrain: {final_lr: 0.5}\n")
    return whole, path


def test_an_ablation_is_the_profile_it_changes_but_for_what_it_says(changed):
    whole, profile = map(study.load_profile, changed)
    assert profile.train == whole.train | {"final_lr": 0.5} and profile.title == "High"
    assert profile.methods == ("baseline", "compound") and profile.name == "high"
    for name in ("purpose", "data", "base_resolution", "stem_stride", "seeds", "devices"):
        assert getattr(profile, name) == getattr(whole, name)
    assert study.load_profile(profile.ablation_of) == whole


@pytest.mark.parametrize(
    "text, message",
    [
        ("ablation_of: tinny\nmethods: [baseline]", "unknown profile 'tinny'"),
        ("ablation_of: high.yaml\nmethods: [baseline]", "is itself an ablation"),
        ("ablation_of: tiny.yaml", "methods is missing"),
        ("ablation_of: tiny.yaml\nmethods: [baseline]\ntrain: {lrr: 1.0}", "unknown .*'lrr'"),
        ("ablation_of: tiny.yaml\nmethods: [baseline]\ntrain: 3", "train: expected dict, got 3"),
        ("ablation_of: 3\nmethods: [baseline]", "ablation_of: expected .*, got 3"),
        ("ablation_of: wrong.yaml\nmethods: [baseline]", "ablation_of: wrong.yaml is itself an ablation"),
        (
            "ablation_of: tiny.yaml\nmethods: [baseline]\nstem_stride: 1",
            "stem_stride: an ablation has that of tiny.yaml",
        ),
        ("ablation_of: tiny.yaml\nmethods: [baseline]\npurpose: evidence", "purpose: an ablation decides no claim"),
    ],
)
def test_an_ablation_that_cannot_be_is_refused(changed, text, message):
    path = changed[1].with_name("wrong.yaml")
    path.write_text(f"title: Wrong\n{text}\n")
    with pytest.raises(ValueError, match=f"profile wrong.yaml: .*({message})"):
        study.load_profile(path)


def test_an_ablation_says_what_its_change_does_to_each_method_and_to_its_lead(changed, tmp_path):
    whole, profile = map(study.load_profile, changed)
    as_it_is = {"baseline": (50.0, 52.0), "compound": (60.0, 63.0)}
    by_change = {"baseline": (40.0, 41.0), "compound": (55.0, 52.0)}
    for one, scores, less in ((whole, as_it_is, 0), (profile, by_change, 10)):
        for run in study.plan_runs(one, tmp_path, scores):
            top1 = scores[run.method][run.seed]
            write_record(run, top1=top1, test_raw={"top1": top1 - less})
    change, table = study.ablation(profile, tmp_path)
    assert change == "final_lr 0 to 0.5"
    assert table["what"].tolist() == 2 * ["baseline", "compound", "compound - baseline"]
    assert table["weights"].tolist() == 3 * ["moving average"] + 3 * ["last step"] and (table["n"] == 2).all()
    assert table["as_it_is"].tolist() == 2 * [51.0, 61.5, 10.5]
    assert table["changed"].tolist() == [40.5, 53.5, 13.0, 30.5, 43.5, 13.0]
    assert table["difference"].tolist() == [-10.5, -8.0, 2.5, -20.5, -18.0, 2.5]
    low, high = stats.ttest_ind((40, 41), (50, 52), equal_var=False).confidence_interval(0.95)
    assert (table["low"][0], table["high"][0]) == (pytest.approx(low), pytest.approx(high))


def test_a_baseline_that_is_not_treated_otherwise_stays_as_it_is(changed, tmp_path):
    whole, path = study.load_profile(changed[0]), changed[0].with_name("unequal.yaml")
    path.write_text("title: Unequal\nablation_of: tiny.yaml\nmethods: [compound]\ntrain: {dropout: 0.4}\n")
    profile = study.load_profile(path)
    scores = {"baseline": (50.0, 52.0), "compound": (60.0, 63.0)}
    for one, less in ((whole, 0), (profile, 5)):
        for run in study.plan_runs(one, tmp_path, set(scores) & set(one.methods)):
            write_record(run, top1=scores[run.method][run.seed] - less)
    change, table = study.ablation(profile, tmp_path)
    assert change == "dropout 0.2 to 0.4 of compound alone"
    table = table.query("weights == 'moving average'").set_index("what")
    assert table["as_it_is"].to_dict() == {"compound": 61.5, "compound - baseline": 10.5}
    assert table["changed"].to_dict() == {"compound": 56.5, "compound - baseline": 5.5}
    alone, lead = (table.loc[what, ["difference", "low", "high"]].tolist() for what in table.index)
    assert alone == lead and lead[0] == -5  # the baseline's seeds add nothing to its interval


def test_an_ablation_of_evidence_is_exploratory(profile_file):
    whole = profile_file(purpose="evidence", seeds=[0, 1, 2, 3, 4])
    path = whole.with_name("high.yaml")
    path.write_text("title: High\nablation_of: tiny.yaml\nmethods: [baseline]\n")
    assert study.load_profile(path).purpose == "exploratory"


def test_only_seeds_that_have_finished_in_both_are_compared(changed, tmp_path):
    """And not those that were trained again with a lower learning rate."""
    whole, profile = map(study.load_profile, changed)
    for run in study.plan_runs(whole, tmp_path, ["baseline", "compound"]):
        write_record(run, top1=50.0 + 20 * run.seed)
    first, other, second, _ = study.plan_runs(profile, tmp_path)
    write_record(first, top1=50.0)  # no change at all, whatever the parent's other seed
    write_record(other, top1=50.0)
    _, table = study.ablation(profile, tmp_path)
    assert table["all_seeds_as_it_is"].tolist()[:3] == [60.0, 60.0, 0.0]  # the parent's other seed counts here
    assert (table["difference"] == 0)[:3].all() and (table["n"] == 1).all() and table["low"].isna().all()
    write_record(second, top1=90.0, retried={"epoch": 1, "step": 1, "lr": 0.1})
    assert (study.ablation(profile, tmp_path)[1]["n"] == 1).all()


def test_an_ablation_without_its_counterpart_compares_nothing(changed, tmp_path):
    profile = study.load_profile(changed[1])
    assert study.ablation(profile, tmp_path)[1].empty
    write_record(study.plan_runs(profile, tmp_path)[0])
    assert study.ablation(profile, tmp_path)[1].empty


def test_an_interval_of_several_groups_is_satterthwaites():
    a, b = [1.0, 2.0, 4.0], [0.0, 5.0]
    value, low, high = study.contrast_interval([(1, a), (-1, b)])
    expected = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert value == pytest.approx(np.mean(a) - np.mean(b)) and (low, high) == pytest.approx(tuple(expected))
    value, low, high = study.contrast_interval([(1, a)])
    assert (value, low, high) == pytest.approx(study.t_interval(a))
    # Two differences, the same and independent: twice the variance, twice the degrees of freedom
    half = stats.t.ppf(0.975, 2 * 2 * 2) * math.sqrt(4 * np.var(a, ddof=1) / 3)
    value, low, high = study.contrast_interval([(1, a), (-1, a), (-1, a), (1, a)])
    assert (value, low, high) == pytest.approx((0, -half, half))
    assert all(map(math.isnan, study.contrast_interval([(1, a), (-1, [3.0])])[1:]))
    assert study.contrast_interval([(1, [2.0, 2.0]), (-1, [1.0, 1.0])]) == (1, 1, 1)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_learning_rate_that_is_not_annealed_ends_at_its_share_of_the_peak(schedule):
    config = TrainConfig(lr=0.2, warmup=0.25, schedule=schedule, final_lr=0.74)
    lr = [learning_rate(config, fraction) for fraction in (0, 0.25, 0.625, 1)]
    assert lr == pytest.approx([0, 0.2, 0.2 * (0.74 + 0.26 / 2), 0.2 * 0.74])
    with pytest.raises(ValueError, match=r"final_lr: expected a value in \[0, 1\], got 1.5"):
        TrainConfig(final_lr=1.5)
