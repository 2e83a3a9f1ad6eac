"""A study's baseline may be a scaled B0. Methods multiply it; costs, training and records are of that network."""

import dataclasses
import math
import subprocess

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from by_hand import flops_by_hand
from conftest import SMALL_PROFILE, write_record

import effnet_study as study
from effnet_lib import EfficientNet, MBConv, Scaling, TrainConfig, count_cost, round_repeats
from effnet_study import profile as profiles
from effnet_study.analysis.recipes import load_pilots
from effnet_study.cli import main
from effnet_study.files import hold
from effnet_study.methods import TRAINED_BY, base_method, match_flops
from effnet_study.model_run import plan_model
from effnet_study.profile import profile_names
from effnet_study.record import read_record
from effnet_study.run import pilot, plan_runs, rerun
from effnet_study.use import load_run

HALF = {"depth": 0.5, "width": 0.5}
POCKET = {"data": {"name": "digits", "size": 64, "classes": 10}, "base_resolution": 48, "baseline": HALF}


@pytest.fixture
def half(profile_file):
    """The small profile at half of B0's depth and width."""
    return study.load_profile(profile_file(**POCKET))


# ---- What a method is


def test_layers_are_rounded_from_the_product(half):
    run = plan_runs(half, methods=["depth"])[0]
    # 0.5 x 4 x (1, 2, 2, 3, 3, 4, 1) layers, not 4 x (1, 1, 1, 2, 2, 2, 1)
    assert [len(stage) for stage in run.model(10).stages] == [2, 4, 4, 6, 6, 8, 2]
    baseline = plan_runs(half, methods=["baseline"])[0]
    assert [len(stage) for stage in baseline.model(10).stages] == [1, 1, 1, 2, 2, 2, 1]


def test_a_product_that_floating_point_lifts_above_a_whole_number_is_no_layer():
    assert 0.7 * 1.1 / 1.1 * 10 != 7 or 3 * 1.1 > 3.3  # such products are what this is about
    assert round_repeats(3, 1.1 * 10 / 3 / 1.1) == 10
    assert round_repeats(3, 1.1) == 4


def test_coefficients_are_the_papers_and_multiply_the_baseline(half):
    assert half.scaling("compound") == Scaling(1.4, 1.2, 1.3)
    assert half.scaling("compound") * half.baseline == Scaling(0.7, 0.6, 1.3)
    assert [run.config.resolution for run in plan_runs(half)] == [48, 48, 48, 96, 62]


@pytest.mark.parametrize("method", SMALL_PROFILE["methods"])
def test_a_runs_cost_is_that_of_the_network_it_trains(half, method):
    run = plan_runs(half, methods=[method])[0]
    assert run.cost == count_cost(run.model(half.num_classes), run.config.resolution)


def test_the_pocket_networks_have_the_cost_that_the_protocol_names():
    with torch.device("meta"):
        cost = count_cost(EfficientNet(Scaling(0.5, 0.5), 100), 48)
    assert cost.params == 721_220 and cost.flops == flops_by_hand(0.5, 0.5, 48, 100) == 4_248_448
    runs = plan_runs(study.load_profile("pocket"), methods=["baseline", "depth", "compound"], seeds=[0])
    assert [run.cost.flops for run in runs] == [4_248_448, 14_158_752, 13_122_816]


def by_hand(scaling):
    """FLOPs of the pocket study's baseline with these coefficients."""
    pixels = math.floor(48 * scaling.resolution + 0.5)
    return flops_by_hand(0.5 * scaling.depth, 0.5 * scaling.width, pixels, 100)


@pytest.mark.parametrize("method", ["depth", "width", "resolution"])
def test_matched_networks_are_the_nearest_to_compounds_flops(method):
    """Against every other network, counted by hand."""
    target = by_hand(Scaling(1.4, 1.2, 1.3))
    found = study.load_profile("pocket").scaling(f"{method}_matched")
    step = 1 / 48 if method == "resolution" else 0.01
    others = [by_hand(Scaling(**{method: 1 + i * step})) for i in range(400)]
    assert others[0] < target < others[-1]
    assert abs(by_hand(found) - target) == min(abs(other - target) for other in others)
    assert {getattr(found, axis) for axis in ("depth", "width", "resolution") if axis != method} == {1}
    match = match_flops(method, target, 48, num_classes=100, baseline=Scaling(0.5, 0.5))
    assert match.scaling == found and match.flops == by_hand(found)
    assert match.residual == pytest.approx((by_hand(found) - target) / target, abs=1e-12)


def test_twice_the_flops_means_the_studys_baseline(profile_file):
    profile = study.load_profile(profile_file(**POCKET, methods=["width_x2", "depth_x3.5"]))
    for method, times in (("width_x2", 2), ("depth_x3.5", 3.5)):
        scaling = profile.scaling(method)
        flops = flops_by_hand(0.5 * scaling.depth, 0.5 * scaling.width, 48, 10)
        assert flops / flops_by_hand(0.5, 0.5, 48, 10) == pytest.approx(times, rel=0.05), method


# ---- Fast compound scaling


def test_fast_compound_has_compounds_flops_and_fewer_activations():
    runs = plan_runs(study.load_profile("pocket"), methods=["compound", "fast_compound"], seeds=[0])
    compound, fast = {run.method: run for run in sorted(runs, key=lambda run: run.method)}.values()
    assert by_hand(fast.scaling) / by_hand(compound.scaling) == pytest.approx(1, abs=0.02)
    assert fast.cost.activations < 0.8 * compound.cost.activations
    d, w, r = dataclasses.astuple(fast.scaling)
    assert d * w**2 * r**2 == pytest.approx(d**10)  # of a growth s: s^0.1, s^0.4 and s^0.05
    assert w == pytest.approx(d**4) and r == pytest.approx(d**0.5, rel=1e-6)


def test_fast_compound_is_trained_by_notebook_04_and_has_a_colour_of_its_own():
    assert TRAINED_BY[base_method("fast_compound")] == "04_compound_scaling"
    assert len({study.color(m) for m in ("compound", "fast_compound", "compound_searched")}) == 3


# ---- Residual branches that start at zero


def gradient_norm(depth, zero_init_residual, images, labels):
    torch.manual_seed(0)
    options = {"zero_init_residual": zero_init_residual, "dropout": 0.0, "drop_path": 0.0, "norm_momentum": 0.1}
    model = EfficientNet(Scaling(0.5 * depth, 0.5), 10, **options).train()
    F.cross_entropy(model(images), labels).backward()
    return torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()


def test_the_gradient_at_the_initial_weights_does_not_grow_with_depth():
    data = study.load_data("digits", size=32, train_per_class=4)
    images, labels = next(iter(data.train_batches(TrainConfig(resolution=32, batch_size=32), 0)))
    with_it, without = ([gradient_norm(depth, zero, images, labels) for depth in (1, 4)] for zero in (True, False))
    assert with_it[1] < 1.3 * with_it[0]
    assert without[1] > 2 * without[0]


def test_every_residual_block_starts_as_the_identity_and_no_other():
    torch.manual_seed(0)
    model = EfficientNet(Scaling(0.7, 0.25), 10, zero_init_residual=True)
    blocks = [module for module in model.modules() if isinstance(module, MBConv)]
    assert {block.residual for block in blocks} == {True, False}
    for block in blocks:
        x = torch.randn(2, block.project.conv.out_channels, 8, 8)
        if block.residual:
            assert torch.equal(block.train()(x), x)
        assert (block.project.norm.weight == (0 if block.residual else 1)).all()
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert sum((norm.weight == 0).all().item() for norm in norms) == sum(block.residual for block in blocks)


def test_the_start_at_zero_changes_no_other_initial_weight():
    states = []
    for zero in (False, True):
        torch.manual_seed(0)
        states.append(EfficientNet(Scaling(0.7, 0.25), 10, zero_init_residual=zero).state_dict())
    differing = {key for key in states[0] if not torch.equal(states[0][key], states[1][key])}
    assert differing and all(key.endswith("project.norm.weight") for key in differing)


def test_the_recipe_hands_the_start_at_zero_to_the_network(profile_file):
    profile = study.load_profile(profile_file(train=SMALL_PROFILE["train"] | {"zero_init_residual": True}))
    model = plan_runs(profile, methods=["compound"])[0].model(10)
    blocks = [module for module in model.modules() if isinstance(module, MBConv) and module.residual]
    assert blocks and all((block.project.norm.weight == 0).all() for block in blocks)


# ---- Records


def test_a_record_keeps_both_coefficients_and_its_network_can_be_loaded_and_run_again(profile_file, tmp_path):
    data = {"name": "digits", "size": 16, "train_per_class": 4}
    profile = study.load_profile(profile_file(baseline=HALF, data=data))
    run = plan_runs(profile, tmp_path, methods=["compound"])[0]
    run.train(study.load_data(**profile.data.given()), "cpu")
    record = read_record(run.run_dir)
    assert record["baseline"] == HALF and record["coefficients"] == {"depth": 1.4, "width": 1.2, "resolution": 1.3}
    assert record["cost"] == dataclasses.asdict(run.cost) and run.state() == "finished"
    model, _ = load_run(run.run_dir)
    assert model.scaling == Scaling(0.7, 0.6, 1.3)
    scores = rerun(run.run_dir / "run.json", tmp_path / "again", "cpu")
    assert (
        scores.loc["then", "top1"] == scores.loc["now", "top1"]
        and scores.loc["then", "loss"] == scores.loc["now", "loss"]
    )
    # Another baseline is another study
    other = study.load_profile(profile_file(baseline={"depth": 0.5, "width": 0.4}, data=data))
    assert plan_runs(other, tmp_path, methods=["compound"])[0].state() == "stale"


def test_a_record_of_before_baselines_is_one_of_b0(profile_file, tmp_path):
    whole = study.load_profile(profile_file())
    run = plan_runs(whole, tmp_path, methods=["baseline"])[0]
    write_record(run)
    assert run.state() == "finished"
    half = study.load_profile(profile_file(baseline={"depth": 1, "width": 0.9}))
    assert plan_runs(half, tmp_path, methods=["baseline"])[0].state() == "stale"


def test_each_state_is_told_from_the_files(profile_file, tmp_path):
    """Every state but waiting, which test_search.py has. Each is made by hand."""
    run = plan_runs(study.load_profile(profile_file()), tmp_path, methods=["depth"])[0]
    assert run.run_dir == tmp_path / "tiny" / "runs" / "depth_d4.00_w1.00_r1.00_seed0"
    left = [(run.state(), run.is_to_do(), run.is_to_do(retry=True))]
    run.run_dir.mkdir(parents=True)
    (run.run_dir / "checkpoint.previous.pt").touch()  # torn while the newest was written
    left.append((run.state(), run.is_to_do(), run.is_to_do(retry=True)))
    with hold(run.run_dir):
        left.append((run.state(), run.is_to_do(), run.is_to_do(retry=True)))
    changed = dict(run.config) | {"weight_decay": 1.0}
    where = {"epoch": 1, "step": 2, "lr": 0.1}
    for changes in (
        {},
        {"config": changed},
        {"status": "failed", "error": "no"},
        {"status": "diverged", "diverged": where},
        {"seconds": -1.0},
    ):
        write_record(run, **changes)
        left.append((run.state(), run.is_to_do(), run.is_to_do(retry=True)))
    assert left == [
        ("missing", True, True),
        ("interrupted", True, True),
        ("running", True, True),
        ("finished", False, False),
        ("stale", True, True),
        ("failed", False, True),
        ("diverged", False, True),
        ("damaged", False, False),
    ]


@pytest.mark.parametrize("status", ["failed", "diverged"])
def test_a_run_set_aside_keeps_its_record_and_goes_on_unless_it_diverged(profile_file, tmp_path, status):
    run = plan_runs(study.load_profile(profile_file()), tmp_path, methods=["baseline"])[0]
    write_record(run, status=status, error="no", diverged={"epoch": 1, "step": 2, "lr": 0.1})
    (run.run_dir / "checkpoint.pt").touch()
    run.set_aside()
    assert read_record(run.run_dir, "run.earlier.json")["status"] == status
    assert run.state() == ("interrupted" if status == "failed" else "missing")


def test_a_record_that_differs_is_refused_with_each_setting(profile_file, tmp_path):
    run = plan_runs(study.load_profile(profile_file()), tmp_path, methods=["depth"])[0]
    data = {"name": "digits", "size": 16, "train_per_class": 4, "title": "other words"}
    record = run.about | {"config": dict(run.config), "data": data}
    assert run.differences(record) == []
    execution = {"save_steps": 7, "compile": "never"}
    assert run.differences(record | {"config": record["config"] | execution}) == []
    changes = {"coefficients": {"depth": 2.0, "width": 1.0, "resolution": 1.0}, "stem_stride": 1}
    changes |= {"config": record["config"] | {"lr": 0.1, "seed": 5}, "data": data | {"size": 17}}
    found = [words.partition(" = ")[0] for words in run.differences(record | changes)]
    assert sorted(found) == ["coefficients", "data", "lr", "seed", "stem_stride"]
    assert run.differences(record | {"config": record["config"] | {"lr": 0.1}}) == ["lr = 0.1, now 0.05"]
    write_record(run, config=record["config"] | {"lr": 0.1})
    with pytest.raises(ValueError, match=r"run.json was made with lr = 0.1, now 0.05; delete .* to start again, or"):
        run.train(None, "cpu")


def test_a_table_of_runs_has_every_number_in_its_column(profile_file, tmp_path):
    profile = study.load_profile(profile_file(methods=["compound", "depth"]))
    first, _ = plan_runs(profile, tmp_path)
    write_record(first)
    table = study.load_runs(profile, tmp_path)
    row = table.loc[0].to_dict()
    expected = {"method": "compound", "seed": 0, "status": "finished", "run_dir": first.run_dir, "resolution": 21}
    expected |= {"d": 1.4, "w": 1.2, "r": 1.3, "params": 1, "flops": 2, "activations": 3}
    expected |= {"top1": 50.0, "top5": 90.0, "loss": 1.0, "raw_top1": 45.0, "minival_top1": 40.0, "device": "box"}
    expected |= {"commit": "abc", "data": "T", "seconds": 9.0, "images_per_second": 7.0, "peak_memory_bytes": 5}
    expected |= {"micro_batch": 20, "started": "2026-01-02T03:04:05+00:00", "ended": "2026-01-02T04:04:05+00:00"}
    expected |= {"devices": 1}
    assert row == expected and list(row) == list(expected)
    assert table.loc[1, ["method", "status", "d", "w"]].tolist() == ["depth", "missing", 4.0, 1.0]


def test_a_rerun_compares_then_with_now_on_the_same_images(profile_file, tmp_path, monkeypatch):
    run = plan_runs(study.load_profile(profile_file(baseline=HALF)), tmp_path, methods=["width"])[0]
    data, asked = study.load_data(**run.profile.data.given()), []

    def train(model, data, config, run_dir, about, device):
        asked.append((model.scaling, config, run_dir.name, about["method"], about["rerun_of"]))
        return {"status": "finished", "test": {"top1": 51.0, "top5": 91.0, "loss": 1.5}}

    monkeypatch.setattr("effnet_study.run.train", train)
    write_record(run, top1=50.0, **run.about, dataset=data.describe())
    scores = rerun(run.run_dir, tmp_path / "again", "cpu")
    assert scores["top1"].to_dict() == {"then": 50.0, "now": 51.0}
    assert asked == [(Scaling(0.5, 1.0), run.config, run.run_dir.name, "width", "abc")]
    write_record(run, **run.about, dataset=data.describe() | {"fingerprint": "other"})
    with pytest.raises(ValueError, match="was trained on other images"):
        rerun(run.run_dir, tmp_path / "again", "cpu")


# ---- Networks by name


def test_a_network_by_name_has_its_own_pixels_unless_others_are_asked_for(profile_file, tmp_path):
    path = str(profile_file(baseline=HALF, base_resolution=56))
    run = plan_model("b3", path, tmp_path, seed=2, changes={"lr": 0.02})
    assert run.config.resolution == 75 and run.config.lr == 0.02 and run.config.momentum == 0.85  # 56 x 300 / 224
    assert run.run_dir == tmp_path / "tiny" / "models" / "b3_75px_seed2"
    assert run.cost.flops == flops_by_hand(1.4, 1.2, 75, 10) and run.about["model"] == "b3"
    assert plan_model("b3", path, tmp_path, pixels=40).config.resolution == 40


def test_a_folder_of_images_needs_no_profile(image_folder, tmp_path):
    name = f"folder:{image_folder()}"
    run = plan_model("b1", name, tmp_path, changes={"epochs": 3})
    assert run.profile.title == "pictures" and run.profile.num_classes == 2 and run.profile.seeds == (0,)
    assert run.profile.base_resolution == 64 and run.profile.stem_stride == 1 and run.profile.data.size == 69
    assert run.config.resolution == 69 and run.config.epochs == 3 and run.config.lr == 0.05  # 64 x 240 / 224
    larger = plan_model("b0", name, tmp_path, changes={"pretrained": True})
    assert larger.config.resolution == 224 and larger.profile.stem_stride == 2


# ---- The order of runs


def test_all_seeds_of_a_group_of_methods_come_before_the_next_group(profile_file):
    groups = [["baseline", "compound"], ["depth"]]
    profile = study.load_profile(profile_file(methods=groups, seeds=[0, 1]))
    assert profile.methods == ("baseline", "compound", "depth")
    order = [(run.method, run.seed) for run in plan_runs(profile)]
    assert order == [("baseline", 0), ("compound", 0), ("baseline", 1), ("compound", 1), ("depth", 0), ("depth", 1)]


# ---- Pilots


def test_a_pilot_may_change_the_baseline_its_pixels_and_the_seed(profile_file, tmp_path, capsys):
    path = profile_file(data={"name": "digits", "size": 16, "train_per_class": 4})
    words = ["pilot", str(path), "--results", str(tmp_path), "--seed", "3", "lr=0.02", "--device", "cpu"]
    assert main([*words, "baseline={depth: 0.5, width: 0.25}", "base_resolution=12"]) == 0
    run_dir = tmp_path / "tiny" / "pilots" / "base_resolution=12_baseline=d0.50_w0.25_lr=0.02_seed3"
    record, changes = read_record(run_dir), {"baseline": {"depth": 0.5, "width": 0.25}, "base_resolution": 12}
    assert record["seed"] == 3 and record["pilot"] == changes | {"lr": 0.02} and record["scored"] == "minival"
    assert record["purpose"] == "exploratory"
    assert record["baseline"] == changes["baseline"] and record["config"]["resolution"] == 12
    assert record["config"]["lr"] == 0.02 and record["config"]["momentum"] == 0.85  # of the profile's recipe
    assert record["cost"]["flops"] == flops_by_hand(0.5, 0.25, 12, 10)
    minival = record["dataset"]["counts"]["minival"]
    assert len(np.load(run_dir / "test_correct.npy")) == minival and run_dir.name in capsys.readouterr().out
    assert load_pilots(study.load_profile(path), tmp_path)["pilot"].tolist() == [run_dir.name]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"baseline": 0.5}, "baseline: expected a valid dictionary .*, got 0.5"),
        ({"baseline": {"deep": 1}}, "baseline: unknown setting 'deep'. Did you mean 'depth'"),
        ({"baseline": {"1": 1}}, "baseline: unknown setting '1'"),
        ({"baseline": {"depth": 1, "resolution": 2}}, "baseline: unknown setting 'resolution'"),
        ({"baseline": {"depth": 0}}, "baseline: depth: expected a value greater than 0, got 0"),
        ({"base_resolution": 4}, "base_resolution: expected .*greater than or equal to 8, got 4"),
        ({"seed": 1}, "seed is not part of a recipe"),
    ],
)
def test_a_pilot_that_cannot_be_is_refused(profile_file, tmp_path, changes, message):
    profile = study.load_profile(profile_file())
    with pytest.raises(ValueError, match=message):
        pilot(profile, changes, tmp_path, "cpu")


# ---- Bad input


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"baseline": {"depth": 0}}, "baseline: depth: expected a value greater than 0, got 0"),
        ({"baseline": {"width": "half"}}, "baseline: width: expected a valid number, got 'half'"),
        ({"baseline": {"depth": True}}, "baseline: depth: expected a valid number, got True"),
        ({"baseline": {"dept": 0.5}}, "baseline: unknown setting 'dept'. Did you mean 'depth'"),
        ({"baseline": 0.5}, "baseline: expected a valid dictionary .*, got 0.5"),
        ({"data": {1: 2, "name": "digits"}}, "data: unknown setting '1'"),
        ({"train": {"resolution": 64}}, "train: resolution follows from base_resolution and the method"),
        ({"seeds": [-1]}, "seeds: 0: expected a value greater than or equal to 0, got -1"),
        ({"methods": []}, "methods: expected a list without repetitions"),
        ({"methods": "depth"}, "methods: expected .*, got 'depth'"),
        ({"methods": [["baseline"], "depth"]}, "unknown method"),
        ({"methods": [["baseline"], ["baseline"]]}, "methods: expected a list without repetitions"),
        ({"purpose": "evidence"}, "purpose: evidence needs protocol: {section: NAME, commit: HASH}"),
        ({"purpose": "evidence", "protocol": {"section": "pocket"}}, "protocol: commit is missing"),
        (
            {"protocol": {"section": "pocket", "commit": "HEAD"}},
            "purpose: evidence needs protocol: .*no other purpose has one",
        ),
        (
            {"purpose": "evidence", "protocol": {"section": "mine", "commit": "HEAD"}},
            "has no section '## Study `mine`'",
        ),
    ],
)
def test_bad_profiles_are_refused_by_name(profile_file, changes, message):
    message = message.replace("{", r"\{").replace("(", r"\(")
    with pytest.raises(ValueError, match=f"profile tiny.yaml: .*{message}"):
        study.load_profile(profile_file(**changes))


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "expected keys and values, got None"),
        (b"- a\n- b\n", r"expected keys and values, got \['a', 'b'\]"),
        (b"title: T\nseeds: [0, 1\nmethods: 3\n", r"cannot be read: .*expected ',' or '\]'.* line 3"),
        (b"title: T\nseeds: [0]\ntitle: U\n", "cannot be read: title is given twice .*line 3"),
        (b"train: {lr: 0.1,\n  lr: 0.2}\n", "cannot be read: lr is given twice .*line 2"),
        (b"title: T\nnote: caf\xe9\n", "cannot be read: 'utf-8' codec can't decode byte 0xe9"),
        (b"title: T\n\nnote: \x00\n", "cannot be read: .*special characters are not allowed"),
        ("title: T\n".encode("utf-16"), "cannot be read: 'utf-8' codec can't decode"),
        (b"a: &a [*a]\nb: &b {b: *b}", "unknown key 'a'"),
        (b"title: !!python/name:os.system\n", "cannot be read: could not determine a constructor .*line 1"),
        (b"on: 3\n", "unknown key 'on'"),
    ],
)
def test_a_profiles_file_that_cannot_be_read_is_named_with_the_line(content, message, tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"mine.yaml: {message}"):
        study.load_profile(path)
    assert main(["status", str(path)]) == 2 and "mine.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line, message",
    [
        ("train: {lr: 1:30.5}", "lr: expected a valid number, got '1:30.5'"),
        ("train: {epochs: 010}", "epochs: expected a valid integer, got '010'"),  # 8 in YAML 1.1
        ("train: {lr: 1:30}", "lr: expected a valid number, got '1:30'"),  # 90
        ("train: {flip: off}", "flip: expected a valid boolean, got 'off'; in YAML write true or false"),
        ("purpose: no", "unknown purpose 'no'"),
        ("seeds: [-1]", "seeds: 0: expected a value greater than or equal to 0, got -1"),
        (f"seeds: [{2**63}]", "seeds: 0: expected a value less than 9223372036854775808"),
    ],
)
def test_traps_of_yaml_are_said(line, message, profile_file):
    path = profile_file(**{line.partition(":")[0]: None})
    path.write_text(f"{path.read_text()}{line}\n")
    with pytest.raises(ValueError, match=f"tiny.yaml: .*{message}"):
        study.load_profile(path)


def test_words_that_yaml_takes_for_others_are_words(profile_file):
    path = profile_file(title=None)
    for title in ("no", "on", "2024-01-01", "1:30"):
        path.write_text(f"{path.read_text()}title: {title}\n")
        assert study.load_profile(path).title == title
        path.write_text(path.read_text().rpartition("title")[0])


@pytest.mark.parametrize("word, lr", [("5e-4", 5e-4), ("2.5e-1", 0.25), ("1E+0", 1.0), (".5", 0.5), ("2", 2.0)])
def test_numbers_are_read_as_they_are_usually_written(word, lr, profile_file):
    path = profile_file(train=None)
    path.write_text(f"{path.read_text()}train: {{lr: {word}}}\n")
    assert study.load_profile(path).config().lr == lr


def test_a_profiles_file_ends_in_yaml(profile_file):
    path = profile_file().rename(profile_file().with_suffix(".yml"))
    with pytest.raises(ValueError, match=r"tiny\.yml: expected a profile's name, or a file that ends in \.yaml"):
        study.load_profile(path)


def test_each_device_gets_two_images(profile_file, tmp_path):
    for devices in (3, 20):
        run = study.Run.plan(study.load_profile(profile_file(devices=devices)), "baseline", 0, tmp_path)
        with pytest.raises(ValueError, match=f"a multiple of the {devices} devices, two images for each .*got 20"):
            run.train(None, "cpu")
        assert run.state() == "missing"


def test_a_profile_says_what_its_file_says(profile_file):
    methods = [["baseline", "depth_x2"], ["compound_phi2.5"]]
    path = profile_file(name="mine", methods=methods, seeds=[4, 0], baseline={"width": 0.35}, devices="auto")
    profile = study.load_profile(path)
    assert profile.name == "mine" and profile.title == "Tiny" and profile.source == str(path)
    assert profile.groups == (("baseline", "depth_x2"), ("compound_phi2.5",)) and profile.seeds == (4, 0)
    assert (
        profile.baseline == Scaling(1, 0.35) and profile.devices == "auto" and profile.train == SMALL_PROFILE["train"]
    )
    assert profile.base_resolution == 16 and profile.stem_stride == 2 and profile.num_classes == 10
    assert profile.stamp == "pipeline check, not evidence" and profile.parent is profile.search is None
    assert profile.command("study") == f"effnet study {path}"
    assert profile.command("study", path.parent) == f"effnet study {path} --results {path.parent}"
    assert profile.replace(title="Other").groups == profile.groups


def test_more_seeds_are_of_the_matched_methods_and_come_last(profile_file, tmp_path):
    matched = [f"{axis}_matched" for axis in ("depth", "width", "resolution")]
    whole = profile_file(methods=["baseline", "compound", *matched], seeds=[0, 1], more_seeds=[2])
    planned = [(run.method, run.seed) for run in plan_runs(study.load_profile(whole), tmp_path)]
    first = [(method, seed) for seed in (0, 1) for method in ("baseline", "compound", *matched)]
    assert planned == [*first, *((method, 2) for method in ("compound", *matched))]
    profile = study.load_profile(whole)
    assert [(run.method, run.seed) for run in plan_runs(profile, tmp_path, seeds=[2])] == planned[-4:]
    with pytest.raises(ValueError, match="plans no run of method baseline with seed 2"):
        plan_runs(profile, tmp_path, ["baseline"], [2])
    short = whole.with_name("short.yaml")
    short.write_text("title: Short\nextends: tiny.yaml\nmethods: [compound]\ntrain: {epochs: 1}\n")
    assert len(plan_runs(study.load_profile(short), tmp_path)) == 2  # an extension does not inherit them
    with pytest.raises(ValueError, match=r"more_seeds: expected other seeds than those of seeds:, got \[1\]"):
        study.load_profile(profile_file(seeds=[0, 1], more_seeds=[1, 2]))
    with pytest.raises(ValueError, match="more_seeds: .*; add depth_matched, resolution_matched, width_matched"):
        study.load_profile(profile_file(methods=["compound"], seeds=[0, 1], more_seeds=[2]))


def test_a_profile_overrides_the_recipe_that_it_extends(profile_file):
    path = profile_file().with_name("high.yaml")
    path.write_text("title: High\nextends: tiny.yaml\nmethods: [baseline]\ntrain: {lr: 0.3}\n")
    profile = study.load_profile(path)
    assert profile.train == SMALL_PROFILE["train"] | {"lr": 0.3} and profile.parent.train == SMALL_PROFILE["train"]


def test_classes_are_the_data_sets_or_those_asked_for(profile_file):
    def classes(**data):
        return study.load_profile(profile_file(data=data)).num_classes

    assert classes(name="tiny-imagenet") == 200 and classes(name="tiny-imagenet", classes=7) == 7
    with pytest.raises(ValueError, match=r"data: say how many classes folder:/x has \(classes: N\)"):
        classes(name="folder:/x")


def test_se_expanded_costs_more_but_changes_no_coefficient(profile_file):
    """The mistake is measured at the coefficients of the study that it is compared with."""
    changes = POCKET | {"methods": ["baseline", "depth_x2"]}
    plain = study.load_profile(profile_file(**changes))
    wrong = study.load_profile(profile_file(**changes, train=SMALL_PROFILE["train"] | {"se_expanded": True}))
    assert wrong.scaling("depth_x2") == plain.scaling("depth_x2")
    with torch.device("meta"):
        network = EfficientNet(Scaling(0.5, 0.5), 10, se_expanded=True)
    assert wrong.cost(Scaling()) == count_cost(network, 48) != plain.cost(Scaling())


def test_a_length_profile_without_its_parent_is_refused(tmp_path):
    path = tmp_path / "short.yaml"
    path.write_text("title: Short\nextends: pokcet\nmethods: [baseline]\ntrain: {epochs: 1}\n")
    with pytest.raises(
        ValueError, match="profile short.yaml: extends: unknown profile 'pokcet'. Did you mean 'pocket'"
    ):
        study.load_profile(path)


# ---- The protocol


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A function that commits text as report/PROTOCOL.md of a repository of its own, and returns the commit."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "report").mkdir()
    monkeypatch.setattr(profiles, "ROOT", tmp_path)

    def commit(text):
        profiles.protocol_text.cache_clear()
        (tmp_path / "report" / "PROTOCOL.md").write_text(text)
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "-qm", "x"], check=True)
        return subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()

    yield commit
    profiles.protocol_text.cache_clear()


OTHER = "# P\n\n## Study `other`\n\n*Fixed long ago.*\n\n"  # another study's section, which says nothing of ours
OPEN, FIXED = f"{OTHER}## Study `mine`\n\n*Not fixed yet.*\n", f"{OTHER}## Study `mine`\n\n*Fixed today.*\n"


def test_evidence_needs_a_protocol_that_was_fixed_by_the_commit_it_names(repository, profile_file):
    before, after = repository(OPEN), repository(FIXED)

    def load(commit):
        return study.load_profile(profile_file(purpose="evidence", protocol={"section": "mine", "commit": commit}))

    assert load(after).purpose == "evidence"
    with pytest.raises(ValueError, match=f"PROTOCOL.md of commit {before} does not say that 'mine' is fixed"):
        load(before)
    with pytest.raises(ValueError, match="PROTOCOL.md of commit 0123456 is not in this repository"):
        load("0123456")
    repository(OPEN)
    with pytest.raises(ValueError, match="report/PROTOCOL.md does not say that 'mine' is fixed"):
        load(after)


def test_the_protocol_of_every_study_of_evidence_is_fixed():
    for name in profile_names():
        profile = study.load_profile(name)  # which refuses it otherwise
        assert (profile.purpose == "evidence") == (profile.protocol is not None)
