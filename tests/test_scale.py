"""The count of what ImageNet takes: schedule, GPU-hours, the GPU whose speed is taken, and the facts it starts from."""

import json
import shutil

import pandas as pd
import pytest
import yaml

import effnet_study as study
from scale import (
    FACTS,
    build_scale,
    describe_scale,
    efficiency,
    estimate,
    gpus_each,
    images_trained,
    load_facts,
    makespan,
    measured_devices,
    spend,
)

METHODS = ["baseline", "depth", "width", "resolution", "compound"]


@pytest.fixture
def measured(tmp_path):
    """A function that writes a device's folder under tmp_path: `first` images/s of the baseline, `seconds` over it."""

    def write(name: str, type: str, px: int, first: float, seconds=(1, 3, 2, 5, 4)):
        folder = tmp_path / "throughput" / name
        folder.mkdir(parents=True)
        (folder / "device.json").write_text(json.dumps({"device": {"type": type, "name": name}}))
        rows = {"network": METHODS, "px": px, "flops": 10, "activations": 10}
        pd.DataFrame(rows | {"images_per_second": [first / s for s in seconds]}).to_csv(folder / "methods.csv")
        return tmp_path

    return write


def test_committed_document_is_the_one_that_is_made(tmp_path):
    build_scale(tmp_path)
    made = (tmp_path / "scale.md").read_bytes()
    assert made == (FACTS.parent / "scale.md").read_bytes(), "run make report and commit what it writes"


# ---- time and money ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hours", "places", "last"),
    [
        ([5], 3, 5),
        ([1, 2, 3], 1, 6),
        ([1, 1, 1, 1, 4], 2, 4),  # the long one last would end at 6
        ([3, 3, 2, 2, 2], 2, 7),  # a simple rule, not the best schedule: 3 3 beside 2 2 2 would end at 6
    ],
)
def test_the_longest_run_starts_first(hours, places, last):
    assert makespan(hours, places) == makespan(hours[::-1], places) == last


def test_no_schedule_ends_before_the_longest_run_or_the_mean_load():
    hours = [4.67, 1.0, 4.08, 3.76, 3.99] * 5
    for places in (1, 3, 8, 25, 64):
        least = max(max(hours), sum(hours) / places)
        assert least - 1e-9 <= makespan(hours, places) <= sum(hours) / places + max(hours)


@pytest.mark.parametrize(
    ("gpus", "runs", "each"),
    [(1, 25, 1), (8, 25, 1), (8, 5, 1), (64, 25, 2), (64, 5, 8), (64, 1, 64)],  # 12 does not divide 4,096
)
def test_gpus_of_independent_runs_divide_the_batch(gpus, runs, each):
    assert gpus_each(gpus, runs, 4096) == each


def test_spending_by_hand():
    assert spend([10, 20], 1, 1, 0.5) == (30, 30)  # nothing is shared, so nothing is lost
    assert spend([10, 20], 2, 1, 0.5) == (20, 30)
    assert spend([10, 20], 2, 2, 0.5) == (30, 60)  # two GPUs at half their speed are as fast as one, and cost twice
    assert spend([10, 20], 8, 4, 0.5) == (10, 60)
    assert efficiency(16652, 8, 2489) == pytest.approx(0.8363, abs=1e-4)


def test_hours_of_imagenet_by_hand():
    """1,281,167 images, of which 2 %, rounded up, are held out: 306 whole batches of 4,096, 350 times."""
    assert images_trained(study.load_profile("imagenet")) == 350 * 306 * 4096
    facts = load_facts() | {"gpus": [8], "b0_on_1": 100, "b0_on_8": 400}
    first, second, all_runs, last = estimate({"x": [1.0, 2.0, 4.0]}, 2, 4096, facts)["x"]
    assert first == (4, 14)  # three runs, two GPUs each, at half their speed
    assert second == (7 / 4, 14)  # one after the other, eight GPUs each
    assert all_runs == (4, 14) and last == (14 / 4, 28)  # six runs, one GPU each, of which nothing is lost


# ---- the GPU whose speed is taken ----------------------------------------------------------------------------------


def text_of(results):
    return describe_scale(load_facts(), study.load_profile("imagenet"), results)


def test_without_a_measured_gpu_the_published_speed_is_taken(tmp_path, measured):
    text = text_of(tmp_path)
    assert "One A100 80GB trains B0 at 224 px with 2,489 images/s" in text and "by activations: time" in text
    assert "No GPU has been measured" in text and "(FLOPs there)" not in text
    measured("some CPU", "cpu", 224, 70)
    measured("some GPU", "cuda", 64, 9999)
    text = text_of(tmp_path)
    assert "2,489 images/s" in text and "9,999" not in text and "No GPU has been measured at 224 px" in text
    assert "time on some CPU, B0 at 224 px" in text and "time on some GPU, B0 at 64 px" in text


def test_a_measured_gpu_replaces_the_published_one(tmp_path, measured):
    measured("slow GPU", "cuda", 224, 1000)
    measured("fast GPU", "cuda", 224, 5000)
    text = text_of(tmp_path)
    assert "One fast GPU trains B0 at 224 px with 5,000 images/s" in text and "by measured time: time" in text
    assert "2,489" not in text and "No GPU has been measured" not in text and "by activations:" not in text
    held = 350 * 306 * 4096 / 5000 / 3600 * (1 + 3 + 2 + 5 + 4)
    row = next(line for line in text.splitlines() if line.startswith("| 1 | 5 |"))
    assert row.endswith(f"| {held / 24:.1f} days | {held:,.0f} | {2 * held:,.0f} |")


def test_a_damaged_measurement_is_named(tmp_path, measured):
    folder = measured("GPU", "cuda", 224, 1000) / "throughput" / "GPU"
    table = pd.read_csv(folder / "methods.csv")
    table[table["network"] != "width"].to_csv(folder / "methods.csv")
    with pytest.raises(ValueError, match="GPU/methods.csv: expected what effnet bench writes.*width"):
        measured_devices(tmp_path, METHODS)
    shutil.rmtree(folder)
    assert measured_devices(tmp_path, METHODS) == []


# ---- the facts -----------------------------------------------------------------------------------------------------


def test_the_price_changes_the_cost_alone():
    profile, facts = study.load_profile("imagenet"), load_facts()
    one, two = (describe_scale(facts | {"usd_per_gpu_hour": usd}, profile, study.RESULTS) for usd in (2.0, 4.0))
    one, two = ([line.split("|") for line in text.splitlines() if line.startswith("| 64 |")] for text in (one, two))
    assert one and all(a[:6] == b[:6] and a[6] != b[6] for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"usd_per_gpu_hour": "two"}, "usd_per_gpu_hour: expected a positive number, got 'two'"),
        ({"b0_on_8": None}, "b0_on_8: expected a positive number, got None"),
        ({"b0_on_1": -1}, "b0_on_1: expected a positive number, got -1"),
        ({"b0_hours": float("nan")}, "b0_hours: expected a positive number"),
        ({"gpus": []}, "gpus: expected whole numbers"),
        ({"gpus": [1, 2.5]}, "gpus: expected whole numbers"),
        ({"gpus": [True]}, "gpus: expected whole numbers"),
        ({"source": 7}, "source: expected a text, got 7"),
        ({"b0_on_9": 1}, "b0_on_9"),
    ],
)
def test_wrong_facts_are_refused_by_name(tmp_path, changes, said):
    path = tmp_path / "scale.yaml"
    path.write_text(yaml.safe_dump(load_facts() | changes))
    with pytest.raises(ValueError, match=said) as error:
        load_facts(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("text", ["", "- 1", "gpus: [1\nsource"])
def test_a_file_without_facts_is_named(tmp_path, text):
    path = tmp_path / "scale.yaml"
    path.write_text(text)
    with pytest.raises((ValueError, yaml.YAMLError), match="scale.yaml"):
        load_facts(path)


def test_missing_facts_are_named(tmp_path):
    for key in load_facts():
        path = tmp_path / "scale.yaml"
        path.write_text(yaml.safe_dump({name: value for name, value in load_facts().items() if name != key}))
        with pytest.raises(ValueError, match=f"{key}: expected"):
            load_facts(path)
