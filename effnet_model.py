"""EfficientNet from its building block up: scaling rules, network, cost, activation maps. Import it from `effnet_lib`.

Reference: M. Tan and Q. V. Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks",
ICML 2019, arXiv 1905.11946 ("the paper" below). The file reads top to bottom in four sections:

1. Scaling    how depth, width and resolution coefficients become layers, channels and pixels
2. Model      convolutions, stem, MBConv blocks, head
3. Cost       parameters, FLOPs, activations
4. Reading    class activation maps

Units, everywhere: FLOPs are multiply-adds (one multiply-add = 1 FLOP, the paper's convention), resolutions are pixels
of a square image, shapes are (N, C, H, W).
"""

import contextlib
import copy
import dataclasses
import difflib
import hashlib
import math
import re
import sys
from collections import namedtuple
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:  # torchvision is imported where it is used, for that takes as long as importing torch
    from torchvision.models import WeightsEnum


def unknown_name(kind: str, name: object, valid: Iterable[str]) -> ValueError:
    """The error for a name that is not one of `valid`: says which, the nearest, and all of them."""
    valid = [str(v) for v in valid]
    near = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ValueError(f"unknown {kind} {name!r}.{hint} Valid: {', '.join(valid)}.")


# ---- 1. Scaling ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scaling:
    """Coefficients (d, w, r) that multiply B0's layers, channels and input resolution. All must be positive."""

    depth: float = 1.0
    width: float = 1.0
    resolution: float = 1.0

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{name} coefficient: expected a finite number above 0, got {value!r}")

    def __str__(self) -> str:
        return f"d{self.depth:.2f}_w{self.width:.2f}_r{self.resolution:.2f}"


# Table 7 of the paper, the published coefficients. They are not equal in FLOPs: compound spends 14 to 24 %
# more than the single axes (00_architecture shows it; `match_flops` removes it).
TABLE7: dict[str, Scaling] = {
    "baseline": Scaling(),
    "depth": Scaling(depth=4.0),
    "width": Scaling(width=2.0),
    "resolution": Scaling(resolution=2.0),
    "compound": Scaling(depth=1.4, width=1.2, resolution=1.3),
}

# B0 to B7: coefficients as the authors released them; resolution is relative to B0's 224 px.
VARIANTS: dict[str, Scaling] = {
    "b0": Scaling(1.0, 1.0, 224 / 224),
    "b1": Scaling(1.1, 1.0, 240 / 224),
    "b2": Scaling(1.2, 1.1, 260 / 224),
    "b3": Scaling(1.4, 1.2, 300 / 224),
    "b4": Scaling(1.8, 1.4, 380 / 224),
    "b5": Scaling(2.2, 1.6, 456 / 224),
    "b6": Scaling(2.6, 1.8, 528 / 224),
    "b7": Scaling(3.1, 2.0, 600 / 224),
}
VARIANT_DROPOUT = {"b0": 0.2, "b1": 0.2, "b2": 0.3, "b3": 0.3, "b4": 0.4, "b5": 0.4, "b6": 0.5, "b7": 0.5}


def compound_scaling(phi: float, alpha: float = 1.2, beta: float = 1.1, gamma: float = 1.15) -> Scaling:
    """Equation 3 of the paper: d = alpha^phi, w = beta^phi, r = gamma^phi; FLOPs grow by about 2^phi."""
    for name, value in {"alpha": alpha, "beta": beta, "gamma": gamma}.items():
        if not value >= 1:
            raise ValueError(f"{name}: expected a coefficient of at least 1 (Equation 3), got {value!r}")
    if not phi >= 0:
        raise ValueError(f"phi: expected a compound coefficient of at least 0, got {phi!r}")
    return Scaling(alpha**phi, beta**phi, gamma**phi)


def coefficient_grid(step: float = 0.05, low: float = 1.9, high: float = 2.1) -> list[tuple[float, float, float]]:
    """All (alpha, beta, gamma) on a grid of `step`, each at least 1, with low <= alpha * beta^2 * gamma^2 <= high."""
    if not 0 < step <= 1 <= low <= high:
        raise ValueError(f"expected 0 < step <= 1 <= low <= high, got step {step!r}, low {low!r}, high {high!r}")
    axis = [round(1 + i * step, 6) for i in range(int((high - 1) / step + 1e-9) + 1)]
    grid = [(a, b, g) for a in axis for b in axis for g in axis if low <= a * b**2 * g**2 <= high]
    if not grid:
        raise ValueError(
            f"step: on a grid of {step!r} no alpha * beta^2 * gamma^2 lies in [{low!r}, {high!r}]; take a "
            "smaller step, or wider bounds"
        )
    return grid


def round_filters(channels: int, width: float, divisor: int = 8) -> int:
    """Scaled channels, as a multiple of `divisor` and never below 90 % of the exact value."""
    scaled = channels * width
    rounded = max(divisor, int(scaled + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * scaled else rounded


def round_repeats(layers: int, depth: float) -> int:
    """Scaled layers of a stage, rounded up."""
    return math.ceil(layers * depth)


def round_resolution(resolution: float, base: int = 224) -> int:
    """Pixels of a side for a resolution coefficient: the nearest whole number."""
    return int(base * resolution + 0.5)


# The scaling found, its FLOPs, and the residual flops / target - 1 that rounding leaves
FlopsMatch = namedtuple("FlopsMatch", "scaling flops residual")


def match_flops(
    method: str,
    target: int,
    base_resolution: int = 224,
    *,
    num_classes: int = 1000,
    stem_stride: int = 2,
    coefficients: tuple[float, float, float] = (1.2, 1.1, 1.15),
) -> FlopsMatch:
    """Solve one method's coefficient so that its FLOPs come as near `target` as the rounding permits.

    `method` is depth, width, resolution or compound (which solves phi at `coefficients`: alpha, beta, gamma).
    Depth, width and phi are searched in steps of 0.01, resolution in pixels. Layers, channels and feature
    maps are whole numbers, so FLOPs move in jumps: look at the residual before calling two methods equal.
    """
    if method == "compound" and max(coefficients) == 1:
        raise ValueError(f"coefficients: expected one above 1, or FLOPs never grow; got {coefficients!r}")
    candidates = {  # a whole number to a scaling, increasing in FLOPs
        "depth": lambda i: Scaling(depth=1 + i / 100),
        "width": lambda i: Scaling(width=1 + i / 100),
        "resolution": lambda i: Scaling(resolution=(base_resolution + i) / base_resolution),
        "compound": lambda i: compound_scaling(i / 100, *coefficients),
    }
    if method not in candidates:
        raise unknown_name("method to match", method, candidates)

    def flops(i: int) -> int:
        return scaled_cost(candidates[method](i), base_resolution, num_classes, stem_stride).flops

    if target < flops(0):
        raise ValueError(f"target: expected at least the baseline's {flops(0):,} FLOPs, got {target:,}")
    low, high = 0, 64
    while flops(high) < target:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if flops(middle) < target else (low, middle)
    best = min((low, high), key=lambda i: abs(flops(i) - target))
    return FlopsMatch(candidates[method](best), flops(best), flops(best) / target - 1)


# ---- 2. Model ------------------------------------------------------------------------------------------------------


# A row of the paper's Table 1: `layers` MBConv blocks, of which the first has the stride
Stage = namedtuple("Stage", "expand kernel stride channels layers")
STEM_CHANNELS, HEAD_CHANNELS, SE_RATIO = 32, 1280, 0.25
STAGES = (
    Stage(expand=1, kernel=3, stride=1, channels=16, layers=1),
    Stage(expand=6, kernel=3, stride=2, channels=24, layers=2),
    Stage(expand=6, kernel=5, stride=2, channels=40, layers=2),
    Stage(expand=6, kernel=3, stride=2, channels=80, layers=3),
    Stage(expand=6, kernel=5, stride=1, channels=112, layers=3),
    Stage(expand=6, kernel=5, stride=2, channels=192, layers=4),
    Stage(expand=6, kernel=3, stride=1, channels=320, layers=1),
)


def _by_hand(x: Tensor) -> bool:
    """Whether the short cuts below serve: in fp32 on a CPU. A compiler, autocast and a GPU have better ones."""
    return x.device.type == "cpu" and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()


class Conv2d(nn.Conv2d):
    """nn.Conv2d whose same sums take less time on a CPU where maps are small, as they are at 32 and 64 px.

    A 1x1 convolution of maps of at most 2x2 is one matrix product over their channels-last memory. Depthwise taps that
    only ever meet padding are left out. A depthwise weight gradient is summed tap by tap where oneDNN has no kernel
    for it and pads each channel to 16: 5x5, and on maps of at most 2x2. 06_throughput measures what this brings.
    """

    def forward(self, x: Tensor) -> Tensor:  # (N, C_in, H, W)
        plain = self.bias is None and self.dilation == (1, 1) and self.padding_mode == "zeros"
        depthwise = (
            plain and self.groups == self.in_channels == self.out_channels > 1 and self.padding not in ("same", "valid")
        )
        pointwise = (self.kernel_size, self.stride, self.padding, self.groups) == ((1, 1), (1, 1), (0, 0), 1)
        if not _by_hand(x) or not (depthwise or (pointwise and x.shape[2] * x.shape[3] <= 4)):
            return super().forward(x)
        if pointwise:
            y = F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias)  # (N, H, W, C_out)
            return y.permute(0, 3, 1, 2)
        weight, padding, out = self.weight, [], []
        for axis, size in ((2, x.shape[2]), (3, x.shape[3])):
            k, s, p = self.kernel_size[axis - 2], self.stride[axis - 2], self.padding[axis - 2]
            out.append((size + 2 * p - k) // s + 1)
            first, last = max(0, p - (out[-1] - 1) * s), min(k, size + p)  # the taps that meet the map
            weight = weight.narrow(axis, first, last - first)
            padding.append(p - first)
        if weight[0].numel() == x[0, 0].numel() == 1:
            return x * weight.view(1, -1, 1, 1)
        slow = self.kernel_size == (5, 5) or x.shape[2] * x.shape[3] <= 4
        if slow and out[0] * out[1] <= 16 and torch.is_grad_enabled():
            return _SmallDepthwise.apply(x, weight, self.stride, padding)
        return F.conv2d(x, weight, None, self.stride, padding, groups=self.groups)


class _SmallDepthwise(torch.autograd.Function):
    """Depthwise convolution whose weight gradient is summed tap by tap."""

    @staticmethod
    def forward(ctx, x, weight, stride, padding):
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, None, stride, padding, groups=x.shape[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        (x, weight), dw = ctx.saved_tensors, []
        options = (None, ctx.stride, ctx.padding, (1, 1), False, (0, 0), x.shape[1], (True, False, False))
        dx = torch.ops.aten.convolution_backward(dy, x, weight, *options)[0]

        def meeting(tap: int, axis: int) -> tuple[slice, slice]:
            """The outputs that this tap adds to, and the inputs that it reads for them."""
            s, offset = ctx.stride[axis - 2], tap - ctx.padding[axis - 2]
            first, last = max(0, -(offset // s)), min(dy.shape[axis], (x.shape[axis] - 1 - offset) // s + 1)
            return slice(first, last), slice(first * s + offset, (last - 1) * s + offset + 1, s)

        for i in range(weight.shape[2]):
            for j in range(weight.shape[3]):
                (outs, ins), (out_columns, in_columns) = meeting(i, 2), meeting(j, 3)
                dw.append((dy[:, :, outs, out_columns] * x[:, :, ins, in_columns]).sum((0, 2, 3)))
        return dx, torch.stack(dw, 1).view_as(weight), None, None


class ConvNorm(nn.Sequential):
    """Convolution, batch norm (eps and momentum are EfficientNet's to set), SiLU unless `activation` is False."""

    def __init__(self, c_in: int, c_out: int, kernel=1, stride=1, groups: int = 1, activation: bool = True):
        super().__init__()
        self.conv = Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(c_out)
        if activation:
            self.act = nn.SiLU()


class SqueezeExcitation(nn.Module):
    """Channel gate. `hidden` comes from the block's input channels, not from the expanded ones (a common mistake)."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.reduce = Conv2d(channels, hidden, 1)
        self.expand = Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W)
        if _by_hand(x) and torch.is_grad_enabled():
            layers = (self.reduce, self.expand)
            return _Gate.apply(x, *(p for conv in layers for p in (conv.weight.flatten(1), conv.bias)))
        gate = x.mean((2, 3), keepdim=True)  # (N, C, 1, 1)
        gate = F.silu(self.reduce(gate))  # (N, hidden, 1, 1)
        gate = torch.sigmoid(self.expand(gate))  # (N, C, 1, 1)
        return x * gate


class _Gate(torch.autograd.Function):
    """The same gate with its backward pass written out, which goes over the whole map three times instead of five."""

    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2):
        mean = x.mean((2, 3))  # (N, C)
        before = F.linear(mean, w1, b1)  # (N, hidden)
        hidden = F.silu(before)
        gate = torch.sigmoid(F.linear(hidden, w2, b2))  # (N, C)
        ctx.save_for_backward(x, mean, before, hidden, gate, w1, w2)
        return x * gate[:, :, None, None]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, mean, before, hidden, gate, w1, w2 = ctx.saved_tensors
        product = dy * x
        d_gate = torch.ops.aten.sigmoid_backward(product.sum((2, 3)), gate)  # by what the sigmoid is taken of
        d_before = torch.ops.aten.silu_backward(d_gate @ w2, before)
        d_mean = (d_before @ w1).div_(x[0, 0].numel())
        dx = torch.addcmul(d_mean[:, :, None, None], dy, gate[:, :, None, None], out=product)
        return dx, d_before.T @ mean, d_before.sum(0), d_gate.T @ hidden, d_gate.sum(0)


class StochasticDepth(nn.Module):
    """In training, drops a sample's whole residual branch with probability `p` and scales the kept by 1 / (1 - p).

    The survival probability is a tensor, not a number: a compiler makes new code for every number.
    """

    def __init__(self, p: float):
        super().__init__()
        self.p, self.active = p, p > 0
        self.register_buffer("survival", torch.tensor(1 - p), persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W)
        if not self.training or not self.active:
            return x
        kept = torch.rand(x.shape[0], 1, 1, 1, device=x.device) < self.survival
        return x * (kept / self.survival).to(x.dtype)


class MBConv(nn.Module):
    """Mobile inverted bottleneck: expand, depthwise, squeeze-and-excitation, project; residual where shapes allow."""

    def __init__(
        self, c_in: int, c_out: int, expand: int, kernel: int, stride: int, drop_path: float, se_expanded: bool = False
    ):
        super().__init__()
        hidden = c_in * expand
        self.residual = stride == 1 and c_in == c_out
        self.expand = ConvNorm(c_in, hidden) if expand > 1 else nn.Identity()
        self.depthwise = ConvNorm(hidden, hidden, kernel, stride, groups=hidden)
        self.se = SqueezeExcitation(hidden, max(1, int((hidden if se_expanded else c_in) * SE_RATIO)))
        self.project = ConvNorm(hidden, c_out, activation=False)
        self.drop_path = StochasticDepth(drop_path)

    def forward(self, x: Tensor) -> Tensor:  # (N, C_in, H, W)
        y = self.expand(x)  # (N, e * C_in, H, W)
        y = self.depthwise(y)  # (N, e * C_in, ceil(H / s), ceil(W / s))
        y = self.se(y)
        y = self.project(y)  # (N, C_out, ceil(H / s), ceil(W / s))
        return x + self.drop_path(y) if self.residual else y


class Blocks(nn.Sequential):
    """The MBConv blocks of a stage; `checkpointing` as in EfficientNet."""

    def __init__(self, checkpointing: bool = False):
        super().__init__()
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> Tensor:  # (N, C_in, H, W)
        for block in self:
            x = _recomputed(block, x) if self.checkpointing and self.training else block(x)
        return x


def _recomputed(block: nn.Module, x: Tensor) -> Tensor:
    """block(x), computed again in the backward pass; batch norm's running statistics see it once."""
    norms = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    @contextlib.contextmanager
    def statistics_kept():
        before = [(norm, norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
        for norm in norms:
            norm.momentum = 0.0
        try:
            yield
        finally:
            for norm, momentum, batches in before:
                norm.momentum = momentum
                norm.num_batches_tracked.copy_(batches)

    contexts = lambda: (contextlib.nullcontext(), statistics_kept())  # noqa: E731
    return checkpoint(block, x, use_reentrant=False, context_fn=contexts)


class EfficientNet(nn.Module):
    """B0 scaled in depth and width by `scaling`; feed it images of `round_resolution(scaling.resolution, base)`.

    `drop_path`: stochastic depth's drop probability (1 - survival 0.8 in the paper), ramping linearly over the blocks.
    `stem_stride=1` halves the total stride to 16, for images of 64 px and less, whose last feature map would otherwise
    be 1 x 1 or 2 x 2. Batch norm: the paper's eps, and TensorFlow's momentum 0.99, which PyTorch writes as 0.01.
    `checkpointing` keeps only the blocks' inputs for the backward pass, which computes the rest again: less memory, one
    more forward pass, the same result. `se_expanded` sizes squeeze-and-excitation from the expanded channels, which is
    not the paper's network but a mistake to be measured.
    """

    def __init__(
        self,
        scaling: Scaling = TABLE7["baseline"],
        num_classes: int = 1000,
        *,
        stem_stride: int = 2,
        dropout: float = 0.2,
        drop_path: float = 0.2,
        norm_eps: float = 1e-3,
        norm_momentum: float = 0.01,
        checkpointing: bool = False,
        se_expanded: bool = False,
    ):
        super().__init__()
        if not isinstance(num_classes, int) or num_classes < 1:
            raise ValueError(f"num_classes: expected a whole number of at least 1, got {num_classes!r}")
        if stem_stride not in (1, 2):
            raise ValueError(f"stem_stride: expected 1 or 2, got {stem_stride!r}")
        for name, p in {"dropout": dropout, "drop_path": drop_path}.items():
            if not 0 <= p < 1:
                raise ValueError(f"{name}: expected a probability in [0, 1), got {p!r}")
        self.scaling, self.num_classes, self.stem_stride = scaling, num_classes, stem_stride

        repeats = [round_repeats(stage.layers, scaling.depth) for stage in STAGES]
        c_in = round_filters(STEM_CHANNELS, scaling.width)
        self.stem = ConvNorm(3, c_in, 3, stem_stride)
        self.stages = nn.Sequential()
        block = 0
        for stage, layers in zip(STAGES, repeats, strict=True):
            c_out, blocks = round_filters(stage.channels, scaling.width), Blocks(checkpointing)
            for layer in range(layers):
                p = drop_path * block / sum(repeats)
                stride = stage.stride if layer == 0 else 1
                blocks.append(MBConv(c_in, c_out, stage.expand, stage.kernel, stride, p, se_expanded))
                c_in, block = c_out, block + 1
            self.stages.append(blocks)
        self.head = ConvNorm(c_in, round_filters(HEAD_CHANNELS, scaling.width))
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(self.head.conv.out_channels, num_classes)

        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps, module.momentum = norm_eps, norm_momentum
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The authors' for convolutions: normal, variance 2 / fan-out, counted per group (PyTorch's helper does not).
        The classifier is uniform within 1 / sqrt(fan-in); theirs, 1 / sqrt(classes), is much the same at 1000 classes,
        but at 10 starts from logits so large that short runs suffer.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        bound = 1 / math.sqrt(self.classifier.in_features)
        nn.init.uniform_(self.classifier.weight, -bound, bound)
        nn.init.zeros_(self.classifier.bias)

    def features(self, x: Tensor) -> Tensor:
        """The last feature map: (N, 3, H, W) to (N, C_head, ceil(H / 32), ceil(W / 32)) at stem stride 2."""
        x = self.stem(x)
        x = self.stages(x)
        return self.head(x)

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, H, W)
        x = self.features(x)  # (N, C_head, h, w)
        x = x.mean((2, 3))  # (N, C_head)
        x = self.dropout(x)
        return self.classifier(x)  # (N, num_classes)


def compile_blocks(model: nn.Module, **options) -> None:
    """Have torch.compile make code for stem, blocks and head, one by one: equal blocks share it, so a deeper network
    has no more to compile. Happens at the first batch; torch keeps the code on disk for other processes."""
    torch._dynamo.reset()  # what other networks in this process have compiled counts against the limit
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)  # kinds of blocks, not 8
    blocks = [module for module in model.modules() if isinstance(module, MBConv)]
    within = {module for block in blocks for module in block.modules()}
    ends = [module for module in model.modules() if isinstance(module, ConvNorm) and module not in within]
    for part in (*ends, *blocks) or (model,):  # another network in one piece
        part.compile(dynamic=False, **options)


def efficientnet(
    name: str,
    num_classes: int = 1000,
    *,
    pretrained: bool | str | Path | Mapping[str, Tensor] = False,
    new_head: bool = False,
    **options,
) -> EfficientNet:
    """B0 to B7 by name ("b0" to "b7"), with the variant's own dropout unless `dropout` is given.

    `pretrained`: True for torchvision's ImageNet weights (`imagenet_weights`); or a state dict, or a file of one, in
    torchvision's names. To fine-tune on other classes, `new_head` leaves the classifier untrained. `options` go to
    `EfficientNet`.
    """
    if name not in VARIANTS:
        raise unknown_name("model", name, VARIANTS)
    model = EfficientNet(VARIANTS[name], num_classes, **{"dropout": VARIANT_DROPOUT[name], **options})
    if pretrained is False:
        return model
    return load_torchvision_weights(
        model, imagenet_weights(name) if pretrained is True else pretrained, new_head=new_head
    )


# RGB in [0, 1], as pretrained weights expect it
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Other networks, from torchvision: where the first convolution is, whose stride is the stem's
NEIGHBOURS = {"resnet50": "conv1", "resnet152": "conv1", "densenet201": "features.conv0"}


def create_model(
    name: str,
    num_classes: int = 1000,
    *,
    pretrained: bool | str | Path | Mapping[str, Tensor] = False,
    new_head: bool = False,
    stem_stride: int = 2,
    dropout: float | None = None,
    norm_momentum: float | None = None,
    **options,
) -> nn.Module:
    """b0 to b7 or one of NEIGHBOURS by name; arguments as for `efficientnet`.

    Neighbours are torchvision's, with dropout before their classifier (default: none) and the batch norm momentum asked
    for; they know no stochastic depth, no checkpointing and no squeeze-and-excitation.
    """
    given = {"dropout": dropout, "norm_momentum": norm_momentum}
    given = {setting: value for setting, value in given.items() if value is not None}
    if name in VARIANTS:
        options |= {"stem_stride": stem_stride, **given}
        return efficientnet(name, num_classes, pretrained=pretrained, new_head=new_head, **options)
    if name not in NEIGHBOURS:
        raise unknown_name("model", name, [*VARIANTS, *NEIGHBOURS])
    if options.get("se_expanded"):
        raise ValueError(f"se_expanded: {name} has no squeeze-and-excitation; leave it out")
    from torchvision.models import get_model

    model = get_model(name, weights=None)
    if pretrained is not False:
        weights = _read_weights(imagenet_weights(name) if pretrained is True else pretrained)
        # As torchvision itself reads DenseNet's file, which is older than its names
        weights = {re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", key): w for key, w in weights.items()}
        if num_classes != 1000 and not new_head:
            raise ValueError(
                f"weights do not fit: they are for 1000 classes, the model has {num_classes}; {_FINE_TUNE}"
            )
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"weights do not fit {name}: {str(error).splitlines()[1].strip()}") from None
    model.get_submodule(NEIGHBOURS[name]).stride = (stem_stride, stem_stride)
    head, linear = list(model.named_children())[-1]
    if num_classes != 1000 or new_head:
        linear = nn.Linear(linear.in_features, num_classes)
    setattr(model, head, nn.Sequential(nn.Dropout(dropout), linear) if dropout else linear)
    for module in model.modules() if norm_momentum is not None else ():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = norm_momentum
    return model


def freeze_backbone(model: nn.Module) -> nn.Module:
    """Leave only the classifier, a network's last part, to be trained. All before it keeps its weights and, in training
    too, its batch norm statistics; nothing in it is dropped."""
    *backbone, _ = (child for child in model.children() if not isinstance(child, nn.Dropout))
    for part in backbone:
        part.requires_grad_(False).register_forward_pre_hook(_rest)
    return model


def _rest(part: nn.Module, inputs: tuple) -> None:
    if part.training:
        part.eval()


def published_weights(name: str) -> "WeightsEnum":
    """torchvision's ImageNet weights of b0 to b7 or a neighbour: address, preparation of images, published accuracy."""
    if name not in VARIANTS and name not in NEIGHBOURS:
        raise unknown_name("model", name, [*VARIANTS, *NEIGHBOURS])
    from torchvision.models import get_model_weights

    return get_model_weights(f"efficientnet_{name}" if name in VARIANTS else name).DEFAULT


def imagenet_weights(name: str) -> Path:
    """torchvision's ImageNet weights of a network as a file in torch's cache ($TORCH_HOME/hub/checkpoints), fetched if
    they are not there. Their checksum is verified every time. FileNotFoundError says what to do without a network."""
    weights = published_weights(name)
    path = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rpartition("/")[2]
    expected = path.stem.rpartition("-")[2]  # the name ends in the first digits of its sha256
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(weights.url, str(path), expected, progress=sys.stderr.isatty())
        except Exception as error:  # URL, socket and checksum errors alike
            raise FileNotFoundError(
                f"the ImageNet weights of {name} are not at {path}, and fetching them failed ({type(error).__name__}: "
                f"{error}). Put {weights.url} there by hand, or do without pretrained weights"
            ) from None
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(expected):
        raise ValueError(f"{path} is damaged: its sha256 begins with {digest[:8]}, expected {expected}; delete it")
    return path


_FINE_TUNE = "to fine-tune on other classes: new_head=True"


def _read_weights(weights: Mapping[str, Tensor] | str | Path) -> Mapping[str, Tensor]:
    """A state dict, or a file of one, of which no pickled code is ever executed."""
    if isinstance(weights, Mapping):
        return weights
    return torch.load(weights, map_location="cpu", weights_only=True)


def load_torchvision_weights(
    model: EfficientNet,
    state_dict: Mapping[str, Tensor] | str | Path,
    norm_eps: float | None = None,
    new_head: bool = False,
) -> EfficientNet:
    """Copy the weights of a torchvision EfficientNet (its state dict, or a file of one) into ours; a rename.

    Sets batch norm's eps as well, which a state dict does not carry: `norm_eps`, else torchvision's own, 1e-3 for b5
    to b7 and 1e-5 for all others. `new_head` leaves our classifier as it is, for other classes than the weights'.
    ValueError where names or shapes differ. No pickled code in a file is ever executed.
    """
    theirs = {_from_torchvision(key): value for key, value in _read_weights(state_dict).items()}
    ours = model.state_dict()
    if new_head:
        theirs |= {key: value for key, value in ours.items() if key.startswith("classifier.")}
    for key in [*ours, *theirs]:
        if key not in theirs or key not in ours:
            side = "missing from the weights" if key not in theirs else "not in this model"
            raise ValueError(f"weights do not fit: {key} is {side}; is it the same variant?")
        if theirs[key].shape != ours[key].shape:
            expected, got = tuple(ours[key].shape), tuple(theirs[key].shape)
            hint = f"; {_FINE_TUNE}" if key.startswith("classifier.") else ""
            raise ValueError(f"weights do not fit: {key} has shape {got}, the model needs {expected}{hint}")
    model.load_state_dict(theirs)
    return set_torchvision_eps(model, norm_eps)


def set_torchvision_eps(model: EfficientNet, norm_eps: float | None = None) -> EfficientNet:
    """Give batch norm the eps that torchvision's weights were trained with, which no state dict carries."""
    if norm_eps is None:
        large = [(VARIANTS[name].depth, VARIANTS[name].width) for name in ("b5", "b6", "b7")]
        norm_eps = 1e-3 if (model.scaling.depth, model.scaling.width) in large else 1e-5
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = norm_eps
    return model


def _from_torchvision(key: str) -> str:
    """features.0.1.bias to stem.norm.bias, features.4.2.block.3.0.weight to stages.3.2.project.conv.weight, ..."""
    if key.startswith("classifier.1."):
        return key.replace("classifier.1.", "classifier.")
    match = re.fullmatch(r"features\.(\d+)\.(?:(\d+)\.block\.(\d+)\.)?(\w+)\.(\w+)", key)
    if match is None:
        return key
    stage, block, part, layer, leaf = match.groups()
    if block is None:
        return f"{'stem' if stage == '0' else 'head'}.{('conv', 'norm')[int(layer)]}.{leaf}"
    # Blocks of the first stage do not expand, so torchvision numbers their parts from the depthwise one.
    name = ("expand", "depthwise", "se", "project")[int(part) + (stage == "1")]
    layer = {"fc1": "reduce", "fc2": "expand", "0": "conv", "1": "norm"}[layer]
    return f"stages.{int(stage) - 1}.{block}.{name}.{layer}.{leaf}"


# ---- 3. Cost -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """Parameters; multiply-adds of one image's forward pass; elements that its convolutions and classifier put out."""

    params: int
    flops: int
    activations: int


def count_cost(model: nn.Module, resolution: int) -> Cost:
    """Exact cost of `model` for one image of `resolution` px a side. Nothing is computed: shapes only, in a copy.

    FLOPs cover convolutions and matrix products, forward only (torch's counter is wrong by up to 98 x for the
    backward pass of depthwise convolutions).
    """
    model = _for_counting(model, resolution)
    return _count(model, (1, 3, resolution, resolution), {"": model})[""]


def cost_by_stage(model: nn.Module, resolution: int) -> dict[str, Cost]:
    """Cost of each part of `model` by name, in their order; the sums are count_cost's. An EfficientNet has stem, stage
    1 to stage 7, head and classifier, others their own parts."""
    model = _for_counting(model, resolution)
    parts = {}
    for name, child in model.named_children():
        if name in ("stages", "features"):
            of = "stage {}" if name == "stages" else "{}"
            parts |= {of.format(i if name == "features" else int(i) + 1): part for i, part in child.named_children()}
        else:
            parts[name] = child
    costs = _count(model, (1, 3, resolution, resolution), parts)
    return {name: cost for name, cost in costs.items() if cost != Cost(0, 0, 0)}


def _for_counting(model: nn.Module, resolution: int) -> nn.Module:
    if not isinstance(resolution, int) or resolution < 1:
        raise ValueError(f"resolution: expected a whole number of pixels, at least 1, got {resolution!r}")
    return copy.deepcopy(model).to("meta")


def _count(model: nn.Module, shape: tuple[int, ...], parts: Mapping[str, nn.Module]) -> dict[str, Cost]:
    """Cost of parts of a module on the meta device, whose hooks stay, for an input (1, C, H, W)."""
    activations, costs = 0, {name: Cost(0, 0, 0) for name in parts}  # of a part that is not called

    def add_output(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        nonlocal activations
        activations += output.numel() if isinstance(module, nn.Conv2d | nn.Linear) else 0

    def enter(module: nn.Module, inputs: tuple) -> None:
        module.before = counter.get_total_flops(), activations

    def leave(module: nn.Module, inputs: tuple, output: Tensor, name: str) -> None:
        flops, before = module.before
        params = sum(p.numel() for p in module.parameters())
        costs[name] = Cost(params, (counter.get_total_flops() - flops) // 2, activations - before)

    for module in model.eval().modules():
        module.register_forward_hook(add_output)
    for name, part in parts.items():
        part.register_forward_pre_hook(enter)
        part.register_forward_hook(partial(leave, name=name))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(shape, device="meta"))
    return costs


def scaled_cost(
    scaling: Scaling,
    base_resolution: int = 224,
    num_classes: int = 1000,
    stem_stride: int = 2,
    se_expanded: bool = False,
) -> Cost:
    """Cost of the network that `scaling` makes of B0, at its own resolution.

    As count_cost's, but for any depth at once: a stage's layers after its first all cost the same.
    """
    pixels = round_resolution(scaling.resolution, base_resolution)
    shallow, further = _layer_costs(scaling.width, pixels, num_classes, stem_stride, se_expanded)
    repeats = [round_repeats(stage.layers, scaling.depth) - 1 for stage in STAGES]
    parts = [(1, shallow), *zip(repeats, further, strict=True)]
    return Cost(*(sum(n * getattr(cost, f.name) for n, cost in parts) for f in dataclasses.fields(Cost)))


@cache
def _layer_costs(
    width: float, pixels: int, num_classes: int, stem_stride: int, se_expanded: bool
) -> tuple[Cost, list[Cost]]:
    """Cost of the network with one layer in each stage, and of one further layer of each stage."""
    side, further = math.ceil(pixels / stem_stride), []
    with torch.device("meta"):
        shallow = EfficientNet(Scaling(1e-6, width), num_classes, stem_stride=stem_stride, se_expanded=se_expanded)
        shallow = _count(shallow, (1, 3, pixels, pixels), {"": shallow})[""]
        for stage in STAGES:
            side, channels = math.ceil(side / stage.stride), round_filters(stage.channels, width)
            layer = MBConv(channels, channels, stage.expand, stage.kernel, 1, 0.0, se_expanded)
            further.append(_count(layer, (1, channels, side, side), {"": layer})[""])
    return shallow, further


# ---- 4. Reading a network ------------------------------------------------------------------------------------------


@torch.no_grad()
def class_activation_map(model: EfficientNet, images: Tensor, classes: Tensor | None = None) -> Tensor:
    """Where the network looks (Zhou et al. 2016; Figure 7 of the paper): (N, 3, H, W) to maps (N, H, W) in [0, 1].

    `classes` (N,) says for which class; the predicted one if not given. The last feature map is weighted by
    the class's row of the classifier, enlarged bilinearly, and scaled image by image.
    """
    features = model.eval().features(images)  # (N, C, h, w)
    if classes is None:
        classes = model.classifier(features.mean((2, 3))).argmax(1)
    maps = torch.einsum("nc,nchw->nhw", model.classifier.weight[classes], features)
    maps = F.interpolate(maps[:, None], size=images.shape[-2:], mode="bilinear")[:, 0]
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    rounding = 1e-5 * torch.maximum(low.abs(), high.abs())  # a map of one pixel looks nowhere, and is not its noise
    return (maps - low) / torch.maximum(high - low, rounding).clamp_min(1e-12)
