"""Scaling rules: rounding, compound coefficients, FLOPs matching."""

import math

import pytest
from by_hand import flops_by_hand

from effnet_lib import TABLE7, Scaling, compound_scaling, round_filters, round_repeats, round_resolution
from effnet_study.methods import coefficient_grid, match_flops

COMPOUND = 1_800_091_280  # FLOPs of Table 7's compound row, as in golden/costs.json


@pytest.mark.parametrize("channels, width, expected", [(32, 1.0, 32), (32, 1.2, 40), (320, 1.4, 448), (16, 1.1, 16)])
def test_channels_are_rounded_as_the_released_networks_are(channels, width, expected):
    assert round_filters(channels, width) == expected


def test_channels_are_multiples_of_eight_and_never_lose_a_tenth():
    for width in (i / 37 for i in range(10, 150)):
        for channels in (16, 24, 40, 80, 112, 192, 320, 1280):
            rounded = round_filters(channels, width)
            assert rounded % 8 == 0
            assert rounded >= 0.9 * channels * width


def test_layers_are_rounded_up_and_pixels_to_the_nearest():
    assert [round_repeats(n, 1.4) for n in (1, 2, 3, 4)] == [2, 3, 5, 6] and round_repeats(4, 1e-10) == 1
    assert [round_resolution(r) for r in (1, 1.3, 2, 300 / 224)] == [224, 291, 448, 300]
    assert round_resolution(1.3, base=64) == 83


def test_compound_scaling_is_equation_3():
    scaling = compound_scaling(2, alpha=1.2, beta=1.1, gamma=1.15)
    assert (scaling.depth, scaling.width, scaling.resolution) == pytest.approx((1.44, 1.21, 1.3225))
    assert compound_scaling(0) == TABLE7["baseline"]


def test_coefficient_grid_keeps_the_constraint_and_holds_the_papers_choice():
    grid = coefficient_grid(0.05)
    assert all(min(abg) >= 1 and 1.9 <= abg[0] * abg[1] ** 2 * abg[2] ** 2 <= 2.1 for abg in grid)
    assert (1.2, 1.1, 1.15) in grid
    assert len(set(grid)) == len(grid)


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, True, "2"])
def test_impossible_coefficients_are_refused_by_name(value):
    with pytest.raises(ValueError, match=r"depth coefficient.*above 0.*got"):
        Scaling(depth=value)


def test_compound_coefficients_below_one_are_refused():
    with pytest.raises(ValueError, match="beta: expected .*at least 1"):
        compound_scaling(1, beta=0.9)
    with pytest.raises(ValueError, match="phi"):
        compound_scaling(-1)


@pytest.mark.parametrize("axis", ["depth", "width", "resolution"])
def test_single_axes_match_compounds_flops_within_three_percent(axis):
    match = match_flops(axis, COMPOUND)
    pixels = math.floor(224 * match.scaling.resolution + 0.5)
    assert match.flops == flops_by_hand(match.scaling.depth, match.scaling.width, pixels)
    assert match.residual == pytest.approx((match.flops - COMPOUND) / COMPOUND)
    assert abs(match.residual) < 0.03
    others = {"depth", "width", "resolution"} - {axis}
    assert all(getattr(match.scaling, other) == 1 for other in others)


def test_an_empty_grid_is_refused():
    with pytest.raises(
        ValueError, match=r"step: on a grid of 0.6 no alpha \* beta\^2 \* gamma\^2 lies in \[1.9, 2.1\]"
    ):
        coefficient_grid(0.6)


@pytest.mark.parametrize("coefficients", [(1.0, 1.0, 1.4), (1.4, 1.1, 1.1)])
def test_other_coefficients_are_matched_at_a_phi_of_their_own(coefficients):
    match = match_flops("compound", COMPOUND, coefficients=coefficients)
    pixels = math.floor(224 * match.scaling.resolution + 0.5)
    flops = flops_by_hand(match.scaling.depth, match.scaling.width, pixels)
    assert match.flops == flops and abs(flops / COMPOUND - 1) < 0.03
    found = (match.scaling.depth, match.scaling.width, match.scaling.resolution)
    phi = {round(math.log(got) / math.log(base), 6) for got, base in zip(found, coefficients, strict=True) if base > 1}
    assert len(phi) == 1 and all(got == 1 for got, base in zip(found, coefficients, strict=True) if base == 1)


def test_match_flops_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="coefficients: expected one above 1"):
        match_flops("compound", 10**9, coefficients=(1, 1, 1))
    with pytest.raises(ValueError, match="at least the baseline's"):
        match_flops("depth", 1000)
