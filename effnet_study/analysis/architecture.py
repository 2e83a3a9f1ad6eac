"""What 00_architecture reads off the running network, and how it draws networks, blocks and their cost."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib import colormaps
from matplotlib.patches import Circle, Rectangle
from torch import Tensor

from effnet_lib import STAGES, EfficientNet, MBConv, Scaling, compound_scaling, round_resolution
from effnet_study.files import drawn
from effnet_study.methods import COLORS, PAPER_TABLE7, color, scaled_cost

OPERATIONS = {  # part of an MBConv block: what it does, and its colour
    "expand": ("1x1 convolution\nbatch norm, SiLU", "#cfe3f2"),
    "depthwise": ("{0}x{0} depthwise convolution\nbatch norm, SiLU", "#fbe3c0"),
    "se": ("squeeze-and-excitation", "#d6ecdf"),
    "project": ("1x1 convolution\nbatch norm", "#cfe3f2"),
    "drop_path": ("stochastic depth", "#eeeeee"),
}


def read_parts(scaling: Scaling) -> pd.DataFrame:
    """Return stem, stages and head of a scaled network, a row each, with the shapes of a forward pass at base
    resolution 224: operator, layers, pixels, channels, stride."""
    pixels = round_resolution(scaling.resolution)
    with torch.device("meta"):  # shapes only
        model, x = EfficientNet(scaling).eval(), torch.empty(1, 3, pixels, pixels)
    parts = [("stem", "Conv 3x3", 1, model.stem)]
    for i, (stage, blocks) in enumerate(zip(STAGES, model.stages, strict=True), 1):
        parts.append((f"stage {i}", f"MBConv{stage.expand}, {stage.kernel}x{stage.kernel}", len(blocks), blocks))
    parts.append(("head", "Conv 1x1 (then pool, FC)", 1, model.head))
    rows = []
    for name, operator, layers, module in parts:
        before, x = x.shape[2], module(x)
        rows.append([name, operator, layers, before, x.shape[2], x.shape[1], before // x.shape[2]])
    return pd.DataFrame(rows, columns=["part", "operator", "layers", "input px", "output px", "channels out", "stride"])


def read_block(block: MBConv, shape: tuple[int, int, int]) -> pd.DataFrame:
    """Return the parts of an MBConv block in their order, a row each: operation, output (C, H, W) and parameters for an
    input of this shape (C, H, W)."""
    x, kernel, rows = torch.zeros(1, *shape), block.depthwise.conv.kernel_size[0], []
    for name, (text, _) in OPERATIONS.items():
        part = getattr(block, name)
        x = part(x)
        rows.append((name, text.format(kernel), tuple(x.shape[1:]), sum(p.numel() for p in part.parameters())))
    return pd.DataFrame(rows, columns=["part", "operation", "output (C, H, W)", "parameters"])


def draw_network(ax, scaling: Scaling, labels: bool = True) -> None:
    """Draw each layer as a box: half as tall as its output, as wide as the root of its channels."""
    x, shades = 0.0, colormaps["cividis"](np.linspace(0.15, 0.85, 9))
    for shade, row in zip(shades, read_parts(scaling).itertuples(index=False), strict=True):
        name, operator, layers, _, side, channels, _ = row
        width, height = np.sqrt(channels), side / 2
        slot = max(36, layers * (width + 1) + 6) if labels else layers * (width + 1) + 3
        for i in range(layers):
            left = x + (slot - layers * (width + 1)) / 2 + i * (width + 1)
            ax.add_patch(Rectangle((left, -height / 2), width, height, fc=shade, ec="white", lw=0.4))
        if labels:
            ax.text(x + slot / 2, -32, f"{side} px\n{channels} channels", ha="center", va="top", fontsize=6.5)
            text = f"{name}\n{operator}\n{layers} {'layer' if layers == 1 else 'layers'}".replace(", pool", ",\npool")
            ax.text(x + slot / 2, 32, text, ha="center", va="bottom", fontsize=6.5)
        x += slot
    most = round_resolution(scaling.resolution) / 8 + 2
    ax.set(xlim=(-2, x + 2), ylim=(-most - 26, most + 32) if labels else (-most, most), aspect="equal")
    ax.set_axis_off()


def draw_block(block: MBConv, steps: pd.DataFrame, shape: tuple[int, int, int]):
    """Draw an MBConv block from top to bottom, and its squeeze-and-excitation beside it. steps: of `read_block`."""
    fig, ax = plt.subplots(figsize=(6.4, 6.2))
    heights = {name: 5.2 - 1.15 * i for i, name in enumerate(OPERATIONS)}
    end = heights["drop_path"] - 1.0
    form, grey = "{} x {} x {}", {"fontsize": 7, "va": "center", "color": "#555555"}
    _arrow(ax, (0, 6.25), (0, heights["expand"] + 0.31))
    ax.text(0.08, 5.9, form.format(*shape), **grey)
    below = [*list(heights.values())[1:], end]
    for (name, text, after, params), lower in zip(steps.itertuples(index=False), below, strict=True):
        y = heights[name]
        _box(ax, 0, y, text, OPERATIONS[name][1])
        ax.text(-1.4, y, f"{params:,}\nparameters" if params else "", ha="right", va="center", fontsize=7)
        _arrow(ax, (0, y - 0.31), (0, lower + (0.31 if name != "drop_path" else 0.16)))
        ax.text(0.08, (y + lower) / 2 - 0.02, form.format(*after), **grey)
    ax.add_patch(Circle((0, end), 0.16, fc="white", ec="black", lw=0.9))
    ax.text(0, end, "+", ha="center", va="center", fontsize=10)
    ax.plot([0, -3.1, -3.1, -0.16], [6.1, 6.1, end, end], color="black", lw=0.9)
    ax.text(-3.0, 3.2, "the input itself, where shapes agree", rotation=90, **grey)
    channels, hidden = block.se.expand.out_channels, block.se.reduce.out_channels
    squeeze = [f"mean of each channel\n{channels}", f"1x1, SiLU\n{hidden}, a quarter of the input's {shape[0]}"]
    squeeze += [f"1x1, sigmoid\n{channels} gates", "channels times gates"]
    for i, text in enumerate(squeeze):
        y = heights["depthwise"] + 0.1 - 0.8 * i
        _box(ax, 4.2, y, text, OPERATIONS["se"][1], width=2.9, height=0.56)
        if i:
            _arrow(ax, (4.2, y + 0.52), (4.2, y + 0.28))
    ax.plot([1.3, 2.7], [heights["se"] + 0.3, heights["depthwise"] + 0.4], color="#999999", lw=0.7, ls=":")
    ax.plot([1.3, 2.7], [heights["se"] - 0.3, heights["depthwise"] - 2.6], color="#999999", lw=0.7, ls=":")
    ax.set(xlim=(-3.4, 5.8), ylim=(end - 0.3, 6.3), aspect="equal")
    ax.set_axis_off()
    return fig


def _box(ax, x: float, y: float, text: str, color: str, width: float = 2.6, height: float = 0.62) -> None:
    ax.add_patch(Rectangle((x - width / 2, y - height / 2), width, height, fc=color, ec="black", lw=0.9))
    ax.text(x, y, text, ha="center", va="center", fontsize=7.5)


def _arrow(ax, start: tuple[float, float], end: tuple[float, float]) -> None:
    style = {"arrowstyle": "-|>", "lw": 0.9, "color": "black", "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", end, start, arrowprops=style)


def draw_gates(images: Sequence[Tensor], maps: Tensor, gates: Tensor, source: str):
    """Draw images (H, W, 3), the four channels whose gates differ most from image to image, and all gates (N, C)."""
    fig = plt.figure(figsize=(9.5, 1.5 * len(images)))
    varied, grid = gates.std(0).topk(4).indices.tolist(), fig.add_gridspec(len(images), 8)
    for i, image in enumerate(images):
        ax = fig.add_subplot(grid[i, 0])
        ax.imshow(image)
        ax.set(xticks=[], yticks=[], title=f"image {i + 1}")
        for j, channel in enumerate(varied):
            ax = fig.add_subplot(grid[i, j + 1])
            ax.imshow(maps[i, channel], cmap="gray")
            ax.set(xticks=[], yticks=[])
            ax.set_title(f"channel {channel}\nx {gates[i, channel]:.2f}", fontsize=7)
    ax, order = fig.add_subplot(grid[:, 5:]), gates[0].argsort()
    for i, row in enumerate(gates):
        ax.plot(row[order], label=f"image {i + 1}", lw=1, color=list(COLORS.values())[i + 1 if i else 0], alpha=0.8)
    ax.set(xlabel="channels, in the order of image 1", ylabel="gate", ylim=(0, 1))
    ax.set_title(f"Gates of stage 2\n{drawn(source)}")
    ax.legend()
    return fig


def worth_of_surplus(costs: pd.DataFrame) -> pd.DataFrame:
    """Return for each single axis of the paper's Table 7: points of top-1 for each doubling of FLOPs; what compound's
    surplus of FLOPs is worth at this slope, and at compound's own; compound's lead. costs: columns method, flops."""
    doublings = np.log2(costs.set_index("method")["flops"])
    top1 = pd.Series({method: score for method, (_, score) in PAPER_TABLE7.items()})
    slopes = (top1 - top1["baseline"]) / (doublings - doublings["baseline"])
    surplus, lead = doublings["compound"] - doublings, top1["compound"] - top1
    columns = {"points per doubling": slopes, "surplus is worth": slopes * surplus}
    columns |= {"at compound's slope": slopes["compound"] * surplus, "compound's lead": lead}
    return pd.DataFrame(columns).loc[["depth", "width", "resolution"]]


def draw_flops_mismatch(table: pd.DataFrame):
    """Draw the exact FLOPs of Table 7's scaled networks, as published and matched. table: of `table7_costs`."""
    fig, ax = plt.subplots(figsize=(6.4, 2.6))
    scaled = table[table["method"] != "baseline"]
    for y, row in enumerate(scaled.itertuples()):
        shade = color(row.method)
        ax.plot(row.flops / 1e9, y, "o", color=shade, ms=8)
        ax.plot(row.paper_flops / 1e9, y, "|", color="#555555", ms=16)
        if row.matched_flops > 0:
            ax.plot(row.matched_flops / 1e9, y, "o", color=shade, mfc="white", ms=8)
            change = f"compound spends {row.compound_extra_percent:.0f} % more"
            ax.annotate(change, (row.flops / 1e9, y), (0, 9), textcoords="offset points", ha="center", fontsize=8)
    target = table.set_index("method")["flops"]["compound"]
    ax.axvline(target / 1e9, color=COLORS["compound"], lw=0.8, ls=":")
    ax.set(yticks=range(len(scaled)), yticklabels=scaled["method"], xlim=(1.2, 2.0), ylim=(3.4, -0.7))
    ax.set(xlabel="FLOPs (billion multiply-adds). Filled: exact, as published. Bar: as printed. Open: matched")
    ax.set_title("The published coefficients of Table 7 are not equal in FLOPs")
    return fig


def explore(depth: float, width: float, resolution: float) -> None:
    """Show the network at these coefficients, its cost, and the cost that the rule predicts."""
    scaling = Scaling(depth, width, resolution)
    cost, rule = scaled_cost(scaling), depth * width**2 * resolution**2
    growth = cost.flops / scaled_cost(Scaling()).flops
    _, ax = plt.subplots(figsize=(9.5, 3.4))
    draw_network(ax, scaling, labels=False)
    ax.set_title(
        f"d {depth:.2f}, w {width:.2f}, r {resolution:.2f} ({round_resolution(resolution)} px): "
        f"{cost.params / 1e6:.2f} M parameters, {cost.flops / 1e9:.3f} B FLOPs, {cost.activations / 1e6:.1f} M "
        f"activations\nFLOPs {growth:.2f} times B0's; the rule d w² r² says {rule:.2f}"
    )
    plt.show()


def show_sliders() -> None:
    """Show sliders for phi and the three coefficients, which redraw `explore`. ImportError without ipywidgets."""
    import ipywidgets as widgets
    from IPython.display import display

    limits = {"depth": 4.0, "width": 3.0, "resolution": 3.0}
    options = {"min": 1.0, "step": 0.05, "continuous_update": False}
    sliders = {axis: widgets.FloatSlider(1.0, max=most, description=axis, **options) for axis, most in limits.items()}
    phi = widgets.FloatSlider(0.0, min=0.0, max=6.0, step=0.1, description="phi", continuous_update=False)

    def follow(change) -> None:
        for axis, value in vars(compound_scaling(change.new)).items():
            sliders[axis].value = value

    phi.observe(follow, "value")
    display(widgets.VBox([phi, *sliders.values(), widgets.interactive_output(explore, sliders)]))
