"""A study with one thing of its recipe changed, beside the one that it changes."""

import pytest
from conftest import write_record
from scipy import stats

import effnet_study as study
from effnet_lib import TrainConfig, learning_rate
from effnet_study import profile as profiles
from effnet_study.analysis.recipes import ablation
from effnet_study.analysis.summary import ablation_lines
from effnet_study.run import plan_runs


@pytest.fixture
def changed(profile_file):
    """The profile `tiny` with two seeds, and an ablation of it; their paths."""
    train = {"epochs": 1, "batch_size": 20, "optimizer": "sgd", "lr": 0.05, "dropout": 0.2}
    whole = profile_file(seeds=[0, 1], data={"name": "digits", "size": 16, "train_per_class": 4}, train=train)
    path = whole.with_name("high.yaml")
    path.write_text("title: High\nextends: tiny.yaml\nmethods: [baseline, compound]\ntrain: {final_lr_fraction: 0.5}\n")
    return whole, path


def test_an_ablation_is_the_profile_it_changes_but_for_what_it_says(changed):
    whole, profile = map(study.load_profile, changed)
    assert profile.train == whole.train | {"final_lr_fraction": 0.5} and profile.title == "High"
    assert profile.methods == ("baseline", "compound") and profile.name == "high"
    for name in ("purpose", "data", "base_resolution", "stem_stride", "seeds", "devices"):
        assert getattr(profile, name) == getattr(whole, name)
    assert profile.parent == whole


@pytest.mark.parametrize(
    "text, message",
    [
        ("extends: tinny\nmethods: [baseline]", "unknown profile 'tinny'"),
        ("extends: high.yaml\nmethods: [baseline]", "high.yaml itself extends tiny.yaml"),
        ("extends: tiny.yaml", "methods is missing"),
        ("extends: tiny.yaml\nmethods: [baseline]\ntrain: {lrr: 1.0}", "unknown .*'lrr'"),
        ("extends: tiny.yaml\nmethods: [baseline]\ntrain: 3", "train: expected a valid dictionary, got 3"),
        ("extends: 3\nmethods: [baseline]", "extends: expected .*, got 3"),
        ("extends: wrong.yaml\nmethods: [baseline]", "extends: wrong.yaml itself extends wrong.yaml"),
        (
            "extends: tiny.yaml\nmethods: [baseline]\nstem_stride: 1",
            "stem_stride: a profile that extends tiny.yaml inherits this key; it can set extends",
        ),
        ("extends: tiny.yaml\nmethods: [baseline]\npurpose: evidence", "purpose: wrong by itself decides no claim"),
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
        for run in plan_runs(one, tmp_path, scores):
            top1 = scores[run.method][run.seed]
            write_record(run, top1=top1, test_raw={"top1": top1 - less})
    table = ablation(profile, tmp_path)
    assert (table["change"] == "final_lr_fraction 0 to 0.5").all() and (table["purpose"] == "check").all()
    lines = ablation_lines(profile, table)
    assert lines[0] == "Changed in comparison with [Tiny](../tiny/README.md): final_lr_fraction 0 to 0.5."
    assert lines[2].startswith(
        "- baseline, moving average: 51.00 as it is, 40.50 changed: -10.50 points (95 % interval"
    )
    assert table["what"].tolist() == 2 * ["baseline", "compound", "compound - baseline"]
    assert table["weights"].tolist() == 3 * ["moving average"] + 3 * ["last step"] and (table["n"] == 2).all()
    assert table["as_it_is"].tolist() == 2 * [51.0, 61.5, 10.5]
    assert table["changed"].tolist() == [40.5, 53.5, 13.0, 30.5, 43.5, 13.0]
    assert table["difference"].tolist() == [-10.5, -8.0, 2.5, -20.5, -18.0, 2.5]
    low, high = stats.ttest_ind((40, 41), (50, 52), equal_var=False).confidence_interval(0.95)
    assert (table["low"][0], table["high"][0]) == (pytest.approx(low), pytest.approx(high))


def test_an_ablation_without_the_baseline_has_no_leads(changed, tmp_path):
    whole, path = study.load_profile(changed[0]), changed[0].with_name("unequal.yaml")
    path.write_text("title: Unequal\nextends: tiny.yaml\nmethods: [compound]\ntrain: {dropout: 0.4}\n")
    profile = study.load_profile(path)
    scores = {"baseline": (50.0, 52.0), "compound": (60.0, 63.0)}
    for one, less in ((whole, 0), (profile, 5)):
        for run in plan_runs(one, tmp_path, set(scores) & set(one.methods)):
            write_record(run, top1=scores[run.method][run.seed] - less)
    table = ablation(profile, tmp_path).query("weights == 'moving average'")
    assert table["what"].tolist() == ["compound"] and table["change"].tolist() == ["dropout 0.2 to 0.4"]
    assert table[["as_it_is", "changed", "difference"]].iloc[0].tolist() == [61.5, 56.5, -5]


def test_what_extends_evidence_is_exploratory(profile_file, monkeypatch):
    monkeypatch.setattr(profiles, "protocol_text", lambda commit: "## Study `tiny`\n\n*Fixed today.*\n")
    protocol = {"section": "tiny", "commit": "abc"}
    whole = profile_file(purpose="evidence", seeds=[0, 1, 2, 3, 4], protocol=protocol)
    path = whole.with_name("high.yaml")
    path.write_text("title: High\nextends: tiny.yaml\nmethods: [baseline]\n")
    assert study.load_profile(whole).purpose == "evidence"
    assert study.load_profile(path).purpose == "exploratory" and study.load_profile(path).protocol is None


def test_only_seeds_that_have_finished_in_both_are_compared(changed, tmp_path):
    whole, profile = map(study.load_profile, changed)
    for run in plan_runs(whole, tmp_path, ["baseline", "compound"]):
        write_record(run, top1=50.0 + 20 * run.seed)
    first, other, *_ = plan_runs(profile, tmp_path)
    write_record(first, top1=50.0)  # no change at all, whatever the parent's other seed
    write_record(other, top1=50.0)
    table = ablation(profile, tmp_path)
    assert table["all_seeds_as_it_is"].tolist()[:3] == [60.0, 60.0, 0.0]  # the parent's other seed counts here
    assert (table["difference"] == 0)[:3].all() and (table["n"] == 1).all() and table["low"].isna().all()


def test_an_ablation_without_its_counterpart_compares_nothing(changed, tmp_path):
    profile = study.load_profile(changed[1])
    table = ablation(profile, tmp_path)
    assert table.empty and "no seed is finished both here and in tiny" in ablation_lines(profile, table)[0]
    write_record(plan_runs(profile, tmp_path)[0])
    assert ablation(profile, tmp_path).empty


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_learning_rate_that_is_not_annealed_ends_at_its_share_of_the_peak(schedule):
    config = TrainConfig(lr=0.2, warmup_fraction=0.25, schedule=schedule, final_lr_fraction=0.74)
    lr = [learning_rate(config, fraction) for fraction in (0, 0.25, 0.625, 1)]
    assert lr == pytest.approx([0, 0.2, 0.2 * (0.74 + 0.26 / 2), 0.2 * 0.74])
    with pytest.raises(ValueError, match=r"final_lr_fraction: expected a value less than or equal to 1, got 1.5"):
        TrainConfig(final_lr_fraction=1.5)
