"""The estimate of what ImageNet takes: schedule, GPU-hours, price, and the facts it starts from."""

import re

import pytest
import yaml

from effnet_lib import VARIANTS
from effnet_study.documents.scale import FACTS, describe_scale, load_facts, wall_time
from effnet_study.profile import load_profile


@pytest.fixture(scope="module")
def imagenet():
    return load_profile("imagenet")


def rows_of(text: str) -> list[list[str]]:
    """The cells of the table's rows."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "runs |" in line]


def test_committed_document_is_the_one_that_is_made(imagenet):
    committed = (FACTS.parent / "scale.md").read_text(encoding="utf-8")
    assert describe_scale(load_facts(), imagenet) == committed, "run make report and commit what it writes"


# ---- time and money ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpu_hours", "gpus", "per_run", "last"),
    [
        ([5], 3, 1, 5),
        ([1, 2, 3], 1, 1, 6),
        ([1, 1, 1, 1, 4], 2, 1, 4),  # the long one last would end at 6
        ([3, 3, 2, 2, 2], 2, 1, 7),  # a simple rule, not the best schedule: 3 3 beside 2 2 2 would end at 6
        ([8, 16], 8, 8, 3),  # one after the other, eight GPUs each
        ([8, 16], 16, 8, 2),  # at the same time
        ([8, 16], 64, 8, 2),  # GPUs that no run needs shorten nothing
        ([8, 16], 4, 8, 6),  # fewer GPUs than a run could have
        ([8, 16], 12, 8, 3),  # four of twelve are left over
    ],
)
def test_the_longest_run_starts_first(gpu_hours, gpus, per_run, last):
    assert wall_time(gpu_hours, gpus, per_run) == wall_time(gpu_hours[::-1], gpus, per_run) == last


def test_no_schedule_ends_before_the_longest_run_or_the_mean_load():
    hours = [4.67, 1.0, 4.08, 3.76, 3.99] * 5
    for gpus in (1, 3, 8, 25, 64):
        least = max(max(hours), sum(hours) / gpus)
        assert least - 1e-9 <= wall_time(hours, gpus, 1) <= sum(hours) / gpus + max(hours)


def test_the_table_by_hand(imagenet):
    """B0 takes 8 GPUs x 2 hours x 350 / 100 epochs = 56 GPU-hours. The exact FLOPs of the five networks are in
    table7_cost.csv: 6.7488 GFLOPs over 0.3858 are 17.49 baselines; the activations, 92.98 M over 6.748 M, are 13.78."""
    facts = load_facts().replace(gpus=[1, 8, 16], b0_gpus=8, b0_hours=2, b0_epochs=100, usd_per_gpu_hour=3)
    flops, activations = 6748632960 / 385814752 * 56, 92981578 / 6748036 * 56
    one, five = rows_of(describe_scale(facts, imagenet))
    assert one[0] == "1 seed, 5 runs" and five[0] == "5 seeds, 25 runs"
    assert one[4:] == [f"{activations:.0f} to {flops:.0f}", f"{3 * activations:,.0f} to {3 * flops:,.0f}"]
    assert five[4] == f"{5 * activations:,.0f} to {5 * flops:,.0f}"
    assert one[1] == f"{activations / 24:.1f} to {flops / 24:.1f} days"
    assert one[2] == f"{activations / 192:.1f} to {flops / 192:.1f} days"
    # Two nodes of eight. By FLOPs depth, resolution and baseline share one: 9.07 baselines, 63 hours; by activations
    # resolution, width and baseline: 7.00 baselines, 49 hours.
    assert one[3] == "2.0 to 2.6 days"


def test_the_check_by_b4_is_that_of_the_paper(imagenet):
    """variants.csv of 00_architecture: 4.394 GFLOPs and 49.49 M activations, B0's 0.3858 and 6.748."""
    assert VARIANTS["b4"].resolution == pytest.approx(380 / 224)
    text = describe_scale(load_facts().replace(b0_speed=300, b4_speed=100), imagenet)
    assert "B4 takes 3.0 times" in text
    assert "Activations predict 7.3 times, FLOPs 11.4 times" in text


def test_sources_are_named(imagenet):
    facts, text = load_facts(), describe_scale(load_facts(), imagenet)
    assert f"[{facts.source}]({facts.address})" in text and "{{" not in text
    assert "25 runs: 5 networks with 5 seeds each, 350 epochs a run" in text
    assert "11 hours (rounded) for 400 epochs of B0 on 8 A100 80GB" in text and "350 epochs take 77 GPU-hours" in text


def test_the_price_changes_the_cost_alone(imagenet):
    one, two = (rows_of(describe_scale(load_facts().replace(usd_per_gpu_hour=usd), imagenet)) for usd in (2.0, 4.0))
    for cheap, dear in zip(one, two, strict=True):
        assert cheap[:-1] == dear[:-1]
        low, high = ([int(n) for n in re.findall(r"\d+", row[-1].replace(",", ""))] for row in (cheap, dear))
        assert [2 * n for n in low] == pytest.approx(high, abs=1)


# ---- the facts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"usd_per_gpu_hour": "two"}, "usd_per_gpu_hour: expected a valid number, got 'two'"),
        ({"b0_speed": None}, "b0_speed: expected a valid number, got None"),
        ({"b0_speed": -1}, "b0_speed: expected a value greater than 0, got -1"),
        ({"b0_hours": float("nan")}, "b0_hours: expected a "),
        ({"b0_hours": float("inf")}, "b0_hours: expected a finite number, got inf"),
        ({"gpus": []}, "gpus: .*at least 1 item"),
        ({"gpus": [1, 2.5]}, "gpus: 1: expected a valid integer, got 2.5"),
        ({"gpus": [True]}, "gpus: 0: expected a valid integer, got True"),
        ({"source": 7}, "source: expected a valid string, got 7"),
        ({"b0_sped": 1}, "'b0_sped'. Did you mean 'b0_speed'"),
    ],
)
def test_wrong_facts_are_refused_by_name(tmp_path, changes, said):
    path = tmp_path / "scale.yaml"
    path.write_text(yaml.safe_dump(dict(load_facts()) | changes))
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
    for key in dict(load_facts()):
        path = tmp_path / "scale.yaml"
        path.write_text(yaml.safe_dump({name: value for name, value in dict(load_facts()).items() if name != key}))
        with pytest.raises(ValueError, match=f"{key} is missing"):
            load_facts(path)
