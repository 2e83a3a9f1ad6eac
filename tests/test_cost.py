"""Parameters, FLOPs and activations, pinned to exact integers for all published networks."""

import json
from pathlib import Path

import pytest
import torch
from by_hand import flops_by_hand
from torch import nn

from effnet_lib import TABLE7, VARIANTS, Cost, EfficientNet, Scaling, count_cost, efficientnet, round_resolution
from effnet_study.methods import cost_by_stage, scaled_cost
from effnet_study.pretrained import TORCHVISION_MODELS, create_model

PUBLISHED = {  # parameters and billions of multiply-adds, by torchvision's documentation
    "resnet50": (25557032, 4.089),
    "resnet152": (60192808, 11.514),
    "densenet201": (20013928, 4.291),
}
GOLDEN = json.loads((Path(__file__).parent / "golden" / "costs.json").read_text())


@pytest.mark.parametrize("name", [*VARIANTS, *TABLE7])
def test_costs_are_the_golden_ones(name):
    scaling = {**VARIANTS, **TABLE7}[name]
    with torch.device("meta"):
        cost = count_cost(EfficientNet(scaling), round_resolution(scaling.resolution))
    assert {"params": cost.params, "flops": cost.flops, "activations": cost.activations} == GOLDEN[name]
    assert scaled_cost(scaling) == cost
    assert flops_by_hand(scaling.depth, scaling.width, round_resolution(scaling.resolution)) == cost.flops


def test_any_scaling_is_counted_as_its_network_is():
    for scaling, base, stride, wrong in (
        (Scaling(0.3, 0.25, 1.0), 16, 1, False),
        (Scaling(2.6, 1.1, 1.37), 23, 1, True),
        (Scaling(width=0.9), 45, 2, False),
    ):
        with torch.device("meta"):
            model = EfficientNet(scaling, 7, stem_stride=stride, se_expanded=wrong)
        pixels = round_resolution(scaling.resolution, base)
        assert scaled_cost(scaling, base, 7, stride, wrong) == count_cost(model, pixels)
        if not wrong:
            assert scaled_cost(scaling, base, 7, stride).flops == flops_by_hand(
                scaling.depth, scaling.width, pixels, 7, stride
            )


@pytest.mark.parametrize("name", ["b0", "b4", *TORCHVISION_MODELS])
def test_the_parts_cost_what_the_whole_does(name):
    with torch.device("meta"):
        model = create_model(name, 10)
    parts, whole = cost_by_stage(model, 96).values(), count_cost(model, 96)
    for field in ("params", "flops", "activations"):
        assert sum(getattr(part, field) for part in parts) == getattr(whole, field)


def test_torchvisions_networks_cost_what_is_published():
    assert set(PUBLISHED) == set(TORCHVISION_MODELS)
    for name, published in PUBLISHED.items():
        with torch.device("meta"):
            cost = count_cost(create_model(name), 224)
        assert (cost.params, round(cost.flops / 1e9, 3)) == published


def test_an_efficientnet_has_its_stages():
    with torch.device("meta"):
        parts = cost_by_stage(efficientnet("b0"), 224)
    assert list(parts) == ["stem", *(f"stage {i}" for i in range(1, 8)), "head", "classifier"]
    assert parts["classifier"] == Cost(1280 * 1000 + 1000, 1280 * 1000, 1000)
    side = 112 * 112  # of the stem's output, and of stage 1: a depthwise 3 x 3, the gate, a projection to 16 channels
    assert parts["stem"] == Cost(32 * 3 * 9 + 2 * 32, side * 32 * 3 * 9, side * 32)
    params = 32 * 9 + 2 * 32 + (32 * 8 + 8) + (8 * 32 + 32) + 32 * 16 + 2 * 16
    assert parts["stage 1"] == Cost(params, side * (32 * 9 + 32 * 16) + 2 * 32 * 8, side * (32 + 16) + 8 + 32)
    assert parts["head"].flops == 7 * 7 * 320 * 1280


def test_a_multiply_add_is_one_flop():
    layer = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    cost = count_cost(layer, 10)
    assert (cost.params, cost.flops, cost.activations) == (3 * 8 * 9, 10 * 10 * 3 * 8 * 9, 10 * 10 * 8)


def test_counting_leaves_the_model_as_it_was():
    model = efficientnet("b0").train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    count_cost(model, 64)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert model.training and not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("resolution", [0, -1, 22.5, "224"])
def test_impossible_resolutions_are_refused(resolution):
    with pytest.raises(ValueError, match="resolution"):
        count_cost(efficientnet("b0"), resolution)
