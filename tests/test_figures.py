"""The figures: what is drawn where, read off the axes. And what 00 reads off the network."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from effnet_lib import TABLE7, Scaling, efficientnet
from effnet_study.analysis import architecture, figures
from effnet_study.methods import color, figure8_lines, scaled_cost
from effnet_study.profile import load_profile

POINTS = {
    "baseline": (1_000_000, [70, 71]),
    "depth": (3_200_000, [74, 76]),
    "depth_matched": (4_100_000, [75]),
    "depth_x2": (1_900_000, [72]),
    "fast_compound": (4_000_000, [77, 78, 79]),
}


@pytest.fixture(autouse=True)
def closing():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def profile():
    return load_profile("quick")


def dots(ax, marker="o"):
    """The (x, y) of all points with this marker, in the order in which they were drawn."""
    lines = [line for line in ax.lines if line.get_marker() == marker]
    return [(float(x), float(y)) for line in lines for x, y in zip(*line.get_data(), strict=True)]


def words(ax):
    return {text.get_text() for text in ax.texts}


def done_runs(tmp_path, **scores):
    """Finished runs, as load_runs returns them, with histories of two epochs."""
    rows = []
    for method, values in scores.items():
        for seed, top1 in enumerate(values):
            run_dir = tmp_path / f"{method}_{seed}"
            run_dir.mkdir()
            lines = [{"epoch": e, "train_loss": 5.0 - e - seed, "minival_top1": top1 - 5 + e} for e in (1, 2)]
            (run_dir / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            rows.append({"method": method, "seed": seed, "top1": top1, "raw_top1": top1 - 1, "run_dir": run_dir})
    return pd.DataFrame(rows).assign(data="Digits", device="box", status="finished")


# ---- accuracy and cost


def test_figure_8_joins_each_way_of_scaling_from_the_baseline_in_the_order_of_cost():
    lines = figure8_lines({method: flops for method, (flops, _) in POINTS.items()})
    assert lines == [["baseline", "depth_x2", "depth", "depth_matched"], ["baseline", "fast_compound"]]
    ax = plt.figure().add_subplot()
    figures.draw_against_cost(ax, POINTS, "million")
    joined = [line.get_xydata().tolist() for line in ax.lines if line.get_marker() == "None"]
    apart = 1.025**0.5  # the two ways of scaling, the cheaper one to the left
    assert joined[0] == [[1, 70.5], pytest.approx([4 / apart, 78])]
    assert np.array(joined[1]) == pytest.approx(
        np.array([[1, 70.5], [1.9 * apart, 72], [3.2 * apart, 75], [4.1 * apart, 75]])
    )
    half = 4.302653 / 3**0.5  # of the three seeds 77, 78, 79
    assert [top1 for _, top1 in joined[-1]] == pytest.approx([78 - half, 78 + half], abs=1e-5)
    assert [top1 for _, top1 in dots(ax)[-3:]] == [77, 78, 79] and [top1 for _, top1 in dots(ax, "_")] == [70.5, 75, 78]
    assert words(ax) == {"baseline", "depth", "depth matched", "fast compound"}  # of depth's budgets the last one only


def test_a_single_seed_is_a_cross_without_a_mean_and_the_axis_says_so():
    several, ax = plt.figure().subplots(1, 2)
    figures.draw_against_cost(ax, POINTS, "million")
    assert [top1 for _, top1 in dots(ax, "x")] == [75, 72] and len(dots(ax, "_")) == 3
    assert ax.get_xlabel() == "FLOPs (million multiply-adds); cross: one seed"
    figures.draw_against_cost(several, {method: POINTS[method] for method in ("baseline", "depth")}, "million")
    assert several.get_xlabel() == "FLOPs (million multiply-adds)" and not dots(several, "x")


def test_matched_networks_are_hollow():
    ax = plt.figure().subplots()
    figures.draw_against_cost(ax, {"depth": (3e6, [74, 76]), "depth_matched": (4e6, [75, 77])}, "million")
    faces = [line.get_markerfacecolor() for line in ax.lines if line.get_marker() == "o"]
    assert [face == "white" for face in faces] == [False, True]


def test_figure_8_is_drawn_without_a_baseline():
    ax = plt.figure().add_subplot()
    figures.draw_against_cost(ax, {"depth_x2": (2e6, [70.0]), "compound_x2": (2e6, [71.0])}, "million")
    assert words(ax) == {"depth x2", "compound x2"}


def test_labels_at_the_ends_of_lines_stay_apart():
    ax = plt.figure().add_subplot()
    ax.set_ylim(0, 100)
    figures.label_ends(ax, [(2, 50, "depth"), (4, 51, "width"), (1, 10, "baseline")])
    depth, width, baseline = (
        next(t for t in ax.texts if t.get_text() == name) for name in ("depth", "width", "baseline")
    )
    assert depth.xyann == pytest.approx((4.32, 50)) and width.xyann == pytest.approx((4.32, 56))
    assert width.xy == (4, 51) and baseline.xyann == (0, -12)


def test_figure_8_stands_beside_the_papers_and_matched_networks_in_a_figure_of_their_own(profile, tmp_path):
    done, points = done_runs(tmp_path, baseline=[70.0]), {"baseline": (2e6, [70]), "depth_matched": (4e6, [71])}
    left, right = figures.draw_figure8(profile, points, done).axes
    assert dots(left, "x") == [(2, 70)] and [top1 for _, top1 in dots(right, "x")[:2]] == [77.3, 79.0]
    (ax,) = figures.draw_matched(profile, points | {"depth": (9e6, [72]), "compound": (4e6, [73])}, done).axes
    assert [top1 for _, top1 in dots(ax, "x")] == [70, 71, 73]
    alone = figures.draw_figure8(profile, {"depth_matched": (4e6, [71])}, done).axes[0]  # nothing else has finished
    assert dots(alone, "x") == [(4, 71)]


def test_methods_of_one_colour_have_dashes_of_their_own():
    styles = figures.line_styles(["depth", "depth_matched", "depth_x2", "compound_x2", "compound_phi3.0"])
    assert styles == {"depth": "-", "depth_matched": "--", "depth_x2": ":", "compound_x2": "-", "compound_phi3.0": "--"}
    assert figures.line_styles(["depth_matched"]) == {"depth_matched": "--"}


def test_curves_are_means_over_seeds_with_a_panel_for_each_way_of_scaling(profile, tmp_path):
    done = done_runs(tmp_path, baseline=[60.0], depth=[70.0, 71.0], depth_matched=[74.0], compound=[80.0])
    table = pd.DataFrame({"method": done["method"].unique()}).assign(flops=range(4))
    depth, compound = figures.draw_all_curves(profile, table, done).axes
    assert [list(line.get_ydata()) for line in depth.lines] == [[56, 57], [66.5, 67.5], [70, 71]]
    assert [line.get_linestyle() for line in depth.lines] == ["-", "-", "--"]
    assert [list(line.get_ydata()) for line in compound.lines] == [[56, 57], [76, 77]]
    band = depth.collections[1].get_paths()[0].vertices
    assert list(depth.lines[1].get_xdata()) == [1, 2] and (band[:, 1].min(), band[:, 1].max()) == (66, 68)
    assert [text.get_text() for text in depth.get_legend().get_texts()] == ["baseline", "depth", "depth matched"]
    (alone,) = figures.draw_all_curves(profile, table[:1], done[:1]).axes
    assert [list(line.get_ydata()) for line in alone.lines] == [[56, 57]]


# ---- contrasts, lengths, ablations, the search


def test_contrasts_stand_in_groups_with_the_margin_in_grey(profile, tmp_path):
    table = pd.DataFrame({"claim": ["a", "a", "b"], "target": "compound", "other": ["depth", "width", "baseline"]})
    table = table.assign(difference=[1.0, -0.2, 3.0], low=[0.5, -1.0, 2.0], high=[1.5, 0.6, 4.0], n=[5, 4, 5])
    table = table.assign(outcome=["above", "unclear", "above"], paper_difference=[2.1, 2.2, np.nan])
    (ax,) = figures.draw_contrasts(profile, table, done_runs(tmp_path, depth=[1])).axes
    assert dots(ax) == [(1, 0), (-0.2, 1), (3, 2.6)] and dots(ax, "D")[:2] == [(2.1, 0), (2.2, 1)]
    assert [list(line.get_xdata()) for line in ax.lines][1::3] == [[0.5, 1.5], [-1.0, 0.6], [2.0, 4.0]]
    band = ax.patches[0].get_extents().transformed(ax.transData.inverted())
    assert (band.x0, band.x1) == pytest.approx((-0.5, 0.5))
    assert next(label.get_text() for label in ax.get_yticklabels()) == "compound - depth"
    assert "n = 4 to 5" in ax.get_title("left") + ax.get_title()


def test_lengths_are_drawn_with_their_contrasts(profile, tmp_path):
    lengths = pd.DataFrame({"epochs": [4, 8, 4, 8], "method": ["depth", "depth", "compound", "compound"]})
    lengths = lengths.assign(top1=[60.0, 70, 65, 77], low=[58.0, 69, 64, 76], high=[62.0, 71, 66, 78])
    contrasts = pd.DataFrame(
        {"epochs": [4, 8], "other": "depth_matched", "difference": [5.0, 7], "low": [4.0, 6.5], "high": [7.0, 8]}
    )
    left, right = figures.draw_lengths(profile, lengths, contrasts, done_runs(tmp_path, depth=[1])).axes
    assert [list(c.lines[0].get_ydata()) for c in left.containers] == [[60, 70], [65, 77]]
    side_by_side = [4 / 1.03**0.5, 8 / 1.03**0.5]
    assert list(left.containers[0].lines[0].get_xdata()) == pytest.approx(side_by_side)
    bars = [segment[:, 1].tolist() for segment in right.containers[0].lines[2][0].get_segments()]
    assert bars == [[4, 7], [6.5, 8]] and list(right.containers[0].lines[0].get_xdata()) == [4, 8]
    assert right.containers[0].lines[0].get_color() == color("depth") and left.get_xscale() == "log"


def test_an_ablation_is_drawn_by_both_kinds_of_weights_for_the_seeds_of_both(profile, tmp_path):
    (tmp_path / "whole").mkdir()
    whole = done_runs(tmp_path / "whole", baseline=[70.0, 71, 90], depth=[75.0, 76, 90])
    done = done_runs(tmp_path, baseline=[60.0, 61], depth=[64.0, 65])
    left, right = figures.draw_ablation(profile, "lr 1 to 2", ["depth", "depth - baseline"], whole, done).axes
    assert dots(left) == [(75, -0.13), (76, -0.13), (64, 0.13), (65, 0.13)]  # depth alone, and not its third seed
    assert dots(left, "|") == [(75.5, -0.13), (64.5, 0.13)] and dots(right, "|") == [(74.5, -0.13), (63.5, 0.13)]


def test_a_candidate_lies_nearer_the_axis_on_which_it_spends_more():
    outcome = pd.DataFrame(
        {"alpha": [2.0, 1.0, 1.0, 2**0.5], "beta": [1.0, 2**0.5, 1.0, 2**0.25], "gamma": [1.0, 1.0, 2**0.5, 1.0]}
    )
    outcome = outcome.assign(top1=[50.0, 60.0, np.nan, 55.0], n=1, same_as=None, published=[True, False, False, False])
    outcome["status"] = ["finished", "finished", "failed", "finished"]
    (ax, _) = figures.draw_search(outcome, "title").axes
    assert ax.collections[0].get_offsets().tolist() == [
        pytest.approx([0, 0]),
        pytest.approx([1, 0]),
        pytest.approx([0.5, 0]),
    ]
    assert dots(ax) == [pytest.approx((0.5, 3**0.5 / 2))]  # without a score
    at = {text.get_text(): text.xy for text in ax.texts}
    assert list(at["published"]) == pytest.approx([0, 0]) and list(at["best"]) == pytest.approx([1, 0])
    assert list(at["55.0"]) == pytest.approx([0.5, 0])


# ---- single images


def test_the_classes_that_gain_and_lose_most_are_named(profile):
    table = pd.DataFrame({"class": ["ant", "bee", "cow"], "baseline": [50.0, 60, 70], "depth": [55.0, 40, 71]})
    (ax,) = figures.draw_per_class(profile, table).axes
    assert [x for x, _ in dots(ax)] == [5, -20, 1]
    assert {(text.get_text(), text.xy) for text in ax.texts} == {("ant", (5, 0)), ("bee", (-20, 0))}


def test_calibration_is_drawn_as_accuracy_by_confidence(profile):
    curve = pd.DataFrame({"confidence": [20.0, 80], "accuracy": [10.0, 60]})
    (ax,) = figures.draw_calibration(profile, {"depth": curve, "depth_matched": curve}).axes
    assert ax.lines[2].get_xydata().tolist() == [[20, 10], [80, 60]] and ax.lines[2].get_linestyle() == "--"
    assert ax.lines[0].get_xydata().tolist() == [[0, 0], [100, 100]]


def test_maps_stand_beside_their_image_and_wrong_predictions_are_marked():
    images, maps = np.zeros((2, 4, 4, 3), np.uint8), np.zeros((2, 4, 4))
    fig = figures.draw_activation_maps(images, ["ant", "bee"], {"depth": (maps, ["ant", "ant"])}, "title")
    assert [ax.get_title() for ax in fig.axes] == ["ant", "ant", "bee", "not ant"]
    assert [len(ax.images) for ax in fig.axes] == [1, 2, 1, 2] and fig.axes[3].get_xlabel() == "depth"


# ---- 00


def test_b0s_parts_are_those_of_the_papers_table_1():
    table = architecture.read_parts(Scaling())
    assert table["part"].tolist() == ["stem", *(f"stage {i}" for i in range(1, 8)), "head"]
    assert table["layers"].tolist() == [1, 1, 2, 2, 3, 3, 4, 1, 1]
    assert table["channels out"].tolist() == [32, 16, 24, 40, 80, 112, 192, 320, 1280]
    assert table["input px"].tolist() == [224, 112, 112, 56, 28, 14, 14, 7, 7]
    assert table["output px"].tolist() == [112, 112, 56, 28, 14, 14, 7, 7, 7]
    assert table["stride"].tolist() == [2, 1, 2, 2, 2, 1, 2, 1, 1]
    assert table["operator"].tolist()[1:4] == ["MBConv1, 3x3", "MBConv6, 3x3", "MBConv6, 5x5"]


def test_a_blocks_parts_have_the_parameters_counted_by_hand():
    """40 channels, six times as many within, 5x5, a gate of 40 / 4 = 10 hidden channels."""
    block = efficientnet("b0").eval().stages[2][1]
    table = architecture.read_block(block, (40, 28, 28))
    expand, depthwise, gate = 40 * 240 + 480, 25 * 240 + 480, 240 * 10 + 10 + 10 * 240 + 240
    assert table["parameters"].tolist() == [expand, depthwise, gate, 240 * 40 + 80, 0]
    assert table["output (C, H, W)"].tolist() == [(240, 28, 28)] * 3 + [(40, 28, 28)] * 2
    assert table["operation"][1].startswith("5x5 depthwise")
    (ax,) = architecture.draw_block(block, table, (40, 28, 28)).axes
    assert {f"{expand:,}\nparameters", "240 x 28 x 28", "mean of each channel\n240"} <= words(ax)
    assert "1x1, SiLU\n10, a quarter of the input's 40" in words(ax)


def test_a_network_is_drawn_with_a_box_for_each_layer():
    ax, wide = plt.figure().subplots(2)
    architecture.draw_network(ax, Scaling())
    assert (
        len(ax.patches) == 18 and "112 px\n32 channels" in words(ax) and "stage 7\nMBConv6, 3x3\n1 layer" in words(ax)
    )
    first, last = ax.patches[0], ax.patches[-1]
    assert (first.get_width(), first.get_height()) == pytest.approx((32**0.5, 56))
    assert (last.get_width(), last.get_height()) == pytest.approx((1280**0.5, 3.5))
    architecture.draw_network(wide, Scaling(depth=2, resolution=2), labels=False)
    assert len(wide.patches) == 34 and wide.patches[0].get_height() == 112 and not wide.texts


def test_gates_are_drawn_for_the_channels_that_vary_most():
    gates = torch.full((2, 6), 0.5)
    gates[1, :5] += torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4])
    fig = architecture.draw_gates(torch.zeros(2, 4, 4, 3), torch.zeros(2, 6, 4, 4), gates, "two images")
    titles = [ax.get_title() for ax in fig.axes]
    assert titles[:3] == ["image 1", "channel 4\nx 0.50", "channel 3\nx 0.50"] and titles[6] == "channel 4\nx 0.90"
    assert len(fig.axes[-1].lines) == 2 and "two images" in fig.axes[-1].get_title()


def test_the_mismatch_of_table_7_is_drawn_in_billions():
    methods = ["baseline", "depth", "compound"]
    table = pd.DataFrame({"method": methods, "flops": [0.4e9, 1.5e9, 1.8e9], "paper_flops": [0.4e9, 1.8e9, 1.8e9]})
    table = table.assign(matched_flops=[np.nan, 1.79e9, np.nan], compound_extra_percent=[350.0, 20.4, 0.0])
    (ax,) = architecture.draw_flops_mismatch(table).axes
    assert dots(ax) == [(1.5, 0), (1.79, 0), (1.8, 1)] and dots(ax, "|") == [(1.8, 0), (1.8, 1)]
    assert words(ax) == {"compound spends 20 % more"}


def test_compounds_surplus_is_worth_a_tenth_of_its_lead():
    flops = {name: scaled_cost(scaling).flops for name, scaling in TABLE7.items()}
    table = pd.DataFrame({"method": flops.keys(), "flops": flops.values()})
    table["compound_extra_percent"] = 100 * (flops["compound"] / table["flops"] - 1)
    worth = architecture.worth_of_surplus(table).round(2)
    assert worth["surplus is worth"].to_dict() == {"depth": 0.16, "width": 0.26, "resolution": 0.21}
    assert worth["points per doubling"].tolist() == [0.84, 0.84, 0.90]
    assert worth["at compound's slope"].tolist() == [0.33, 0.53, 0.39]
    assert worth["compound's lead"].tolist() == pytest.approx([2.1, 2.2, 2.0])


def test_the_explorer_says_what_a_network_costs(monkeypatch):
    monkeypatch.setattr(plt, "show", lambda: None)
    architecture.explore(**vars(TABLE7["compound"]))
    title = plt.gca().get_title()
    assert title.startswith("d 1.40, w 1.20, r 1.30 (291 px): 12.23 M parameters, 1.800 B FLOPs, 23.0 M activations")
    assert title.endswith("FLOPs 4.67 times B0's; the rule d w² r² says 3.41")


def test_phi_moves_the_three_other_sliders(monkeypatch):
    widgets, shown, drawn = pytest.importorskip("ipywidgets"), [], []
    monkeypatch.setattr("IPython.display.display", shown.append)
    monkeypatch.setattr(architecture, "explore", lambda **coefficients: drawn.append(coefficients))
    architecture.show_sliders()
    phi, depth, width, resolution, _ = shown[0].children
    assert drawn == [{"depth": 1, "width": 1, "resolution": 1}] and isinstance(phi, widgets.FloatSlider)
    phi.value = 1.0
    assert (depth.value, width.value, resolution.value) == pytest.approx((1.2, 1.1, 1.15))
    assert drawn[-1] == pytest.approx({"depth": 1.2, "width": 1.1, "resolution": 1.15})
    depth.value = 3.0
    assert drawn[-1]["depth"] == 3 and phi.value == 1
