"""EfficientNet from its building block up: scaling rules, network, cost, trainer, activation maps.

Reference: M. Tan and Q. V. Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks",
ICML 2019, arXiv 1905.11946 ("the paper" below). The file reads top to bottom in five sections:

1. Scaling    how depth, width and resolution coefficients become layers, channels and pixels
2. Model      stem, MBConv blocks, head
3. Cost       parameters, FLOPs, activations
4. Training   recipe, optimizer, resumable loop, run record
5. Reading    class activation maps

Units, everywhere: FLOPs are multiply-adds (one multiply-add = 1 FLOP, the paper's convention), top-1 and
top-5 are percentages, resolutions are pixels of a square image, shapes are (N, C, H, W).
"""

import copy
import dataclasses
import difflib
import importlib.metadata
import json
import math
import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache, partial
from pathlib import Path

import filelock
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import get_model_weights
from tqdm import tqdm


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
    return [(a, b, g) for a in axis for b in axis for g in axis if low <= a * b**2 * g**2 <= high]


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
    method: str, target: int, base_resolution: int = 224, *, num_classes: int = 1000, stem_stride: int = 2
) -> FlopsMatch:
    """Solve one method's coefficient so that its FLOPs come as near `target` as the rounding permits.

    `method` is depth, width, resolution or compound (which solves phi at the paper's alpha, beta, gamma).
    Depth, width and phi are searched in steps of 0.01, resolution in pixels. Layers, channels and feature
    maps are whole numbers, so FLOPs move in jumps: look at the residual before calling two methods equal.
    """
    candidates = {  # a whole number to a scaling, increasing in FLOPs
        "depth": lambda i: Scaling(depth=1 + i / 100),
        "width": lambda i: Scaling(width=1 + i / 100),
        "resolution": lambda i: Scaling(resolution=(base_resolution + i) / base_resolution),
        "compound": lambda i: compound_scaling(i / 100),
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


class ConvNorm(nn.Sequential):
    """Convolution, batch norm (eps and momentum are EfficientNet's to set), SiLU unless `activation` is False."""

    def __init__(self, c_in: int, c_out: int, kernel=1, stride=1, groups: int = 1, activation: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(c_out)
        if activation:
            self.act = nn.SiLU()


class SqueezeExcitation(nn.Module):
    """Channel gate. `hidden` comes from the block's input channels, not from the expanded ones (a common mistake)."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.reduce = nn.Conv2d(channels, hidden, 1)
        self.expand = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W)
        gate = x.mean((2, 3), keepdim=True)  # (N, C, 1, 1)
        gate = F.silu(self.reduce(gate))  # (N, hidden, 1, 1)
        gate = torch.sigmoid(self.expand(gate))  # (N, C, 1, 1)
        return x * gate


class StochasticDepth(nn.Module):
    """In training, drops a sample's whole residual branch with probability `p` and scales the kept by 1 / (1 - p)."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W)
        if not self.training or self.p == 0:
            return x
        keep = torch.empty(x.shape[0], 1, 1, 1, dtype=x.dtype, device=x.device).bernoulli_(1 - self.p)
        return x * keep / (1 - self.p)


class MBConv(nn.Module):
    """Mobile inverted bottleneck: expand, depthwise, squeeze-and-excitation, project; residual where shapes allow."""

    def __init__(self, c_in: int, c_out: int, expand: int, kernel: int, stride: int, drop_path: float):
        super().__init__()
        hidden = c_in * expand
        self.residual = stride == 1 and c_in == c_out
        self.expand = ConvNorm(c_in, hidden) if expand > 1 else nn.Identity()
        self.depthwise = ConvNorm(hidden, hidden, kernel, stride, groups=hidden)
        self.se = SqueezeExcitation(hidden, max(1, int(c_in * SE_RATIO)))
        self.project = ConvNorm(hidden, c_out, activation=False)
        self.drop_path = StochasticDepth(drop_path)

    def forward(self, x: Tensor) -> Tensor:  # (N, C_in, H, W)
        y = self.expand(x)  # (N, e * C_in, H, W)
        y = self.depthwise(y)  # (N, e * C_in, ceil(H / s), ceil(W / s))
        y = self.se(y)
        y = self.project(y)  # (N, C_out, ceil(H / s), ceil(W / s))
        return x + self.drop_path(y) if self.residual else y


class EfficientNet(nn.Module):
    """B0 scaled in depth and width by `scaling`; feed it images of `round_resolution(scaling.resolution, base)`.

    `drop_path`: stochastic depth's drop probability (1 - survival 0.8 in the paper), ramping linearly over the blocks.
    `stem_stride=1` halves the total stride to 16, for images of 64 px and less, whose last feature map would otherwise
    be 1 x 1 or 2 x 2. Batch norm: the paper's eps, and TensorFlow's momentum 0.99, which PyTorch writes as 0.01.
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
            c_out, blocks = round_filters(stage.channels, scaling.width), nn.Sequential()
            for layer in range(layers):
                p = drop_path * block / sum(repeats)
                stride = stage.stride if layer == 0 else 1
                blocks.append(MBConv(c_in, c_out, stage.expand, stage.kernel, stride, p))
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


def efficientnet(
    name: str, num_classes: int = 1000, *, weights: str | Path | Mapping[str, Tensor] | None = None, **options
) -> EfficientNet:
    """B0 to B7 by name ("b0" to "b7"), with the variant's own dropout unless `dropout` is given.

    `weights`: None; "DEFAULT" for torchvision's ImageNet weights (downloaded and checksummed by torchvision);
    or a state dict, or a file of one, in torchvision's names. `options` go to `EfficientNet`.
    """
    if name not in VARIANTS:
        raise unknown_name("model", name, VARIANTS)
    model = EfficientNet(VARIANTS[name], num_classes, **{"dropout": VARIANT_DROPOUT[name], **options})
    if isinstance(weights, str) and weights == "DEFAULT":
        weights = get_model_weights(f"efficientnet_{name}").DEFAULT.get_state_dict(progress=True, check_hash=True)
    return model if weights is None else load_torchvision_weights(model, weights)


def load_torchvision_weights(
    model: EfficientNet, state_dict: Mapping[str, Tensor] | str | Path, norm_eps: float | None = None
) -> EfficientNet:
    """Copy the weights of a torchvision EfficientNet (its state dict, or a file of one) into ours; a rename.

    Sets batch norm's eps as well, which a state dict does not carry: `norm_eps`, else torchvision's own, 1e-3 for b5
    to b7 and 1e-5 for all others. ValueError where names or shapes differ. No pickled code in a file is ever executed.
    """
    if not isinstance(state_dict, Mapping):
        state_dict = torch.load(state_dict, map_location="cpu", weights_only=True)
    theirs = {_from_torchvision(key): value for key, value in state_dict.items()}
    ours = model.state_dict()
    for key in [*ours, *theirs]:
        if key not in theirs or key not in ours:
            side = "missing from the weights" if key not in theirs else "not in this model"
            raise ValueError(f"weights do not fit: {key} is {side}; is it the same variant?")
        if theirs[key].shape != ours[key].shape:
            expected, got = tuple(ours[key].shape), tuple(theirs[key].shape)
            raise ValueError(f"weights do not fit: {key} has shape {got}, the model needs {expected}")
    if norm_eps is None:
        large = [(VARIANTS[name].depth, VARIANTS[name].width) for name in ("b5", "b6", "b7")]
        norm_eps = 1e-3 if (model.scaling.depth, model.scaling.width) in large else 1e-5
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = norm_eps
    model.load_state_dict(theirs)
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
    if not isinstance(resolution, int) or resolution < 1:
        raise ValueError(f"resolution: expected a whole number of pixels, at least 1, got {resolution!r}")
    model = copy.deepcopy(model).to("meta").eval()
    activations = 0

    def add_output(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        nonlocal activations
        activations += output.numel() if isinstance(module, nn.Conv2d | nn.Linear) else 0

    for module in model.modules():
        module.register_forward_hook(add_output)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, resolution, resolution, device="meta"))
    return Cost(sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2, activations)


@cache
def scaled_cost(scaling: Scaling, base_resolution: int = 224, num_classes: int = 1000, stem_stride: int = 2) -> Cost:
    """Cost of the network that `scaling` makes of B0, at its own resolution."""
    with torch.device("meta"):
        model = EfficientNet(scaling, num_classes, stem_stride=stem_stride)
    return count_cost(model, round_resolution(scaling.resolution, base_resolution))


# ---- 4. Training ---------------------------------------------------------------------------------------------------

SCHEMA_VERSION = 1  # of run.json


@dataclass(frozen=True)
class TrainConfig:
    """One run's recipe. Validated on construction; `from_dict` also refuses unknown keys.

    dropout, drop_path and norm_momentum belong to the network: pass `config.model_options()` to EfficientNet.
    """

    resolution: int = 224  # pixels, for training and for every evaluation
    seed: int = 0
    epochs: int = 10
    batch_size: int = 128  # per optimizer step, whatever the accumulation
    accumulation: int = 1  # micro-batches per step; batch norm sees one micro-batch at a time
    optimizer: str = "rmsprop"  # rmsprop (as TensorFlow defines it) or sgd (Nesterov)
    lr: float = 0.016  # peak, at this batch size; the field uses 0.016 per 256 images for rmsprop
    momentum: float = 0.9
    weight_decay: float = 1e-5  # L2, not on norms and biases
    schedule: str = "cosine"  # cosine or linear, from the peak to zero over all steps
    warmup: float = 0.05  # fraction of all steps with linearly rising LR
    label_smoothing: float = 0.1
    dropout: float = 0.2
    drop_path: float = 0.2  # stochastic depth: 1 - survival probability of the last block
    norm_momentum: float = 0.01  # batch norm's, PyTorch's way round; short runs need more, or scores lag behind
    clip_norm: float = (
        0.0  # of the whole gradient; 0 is off. Norms grow with depth, so a limit slows deep networks most
    )
    ema_decay: float = 0.9999  # reached after a warm-up, min(decay, (1 + n) / (10 + n)) at step n
    precision: str = "auto"  # auto: bf16 on a GPU that has it, else fp16, fp32 on a CPU
    crop_area: float = 0.25  # random resized crop: least share of the image's area; 1 switches cropping off
    flip: bool = True  # random horizontal flip; not for digits

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, allowed = getattr(self, field.name), (int, float) if field.type is float else field.type
            if not isinstance(value, allowed) or (isinstance(value, bool) and field.type is not bool):
                hint = "; in YAML write 1.0e-3, not 1e-3" if field.type is float and isinstance(value, str) else ""
                raise ValueError(f"{field.name}: expected {field.type.__name__}, got {value!r}{hint}")
        choices = {
            "optimizer": ("rmsprop", "sgd"),
            "schedule": ("cosine", "linear"),
            "precision": ("auto", "bf16", "fp16", "fp32"),
        }
        for name, valid in choices.items():
            if getattr(self, name) not in valid:
                raise unknown_name(name, getattr(self, name), valid)
        rules = (
            ("resolution epochs accumulation", "at least 1", lambda v: v >= 1),
            ("batch_size", "at least 2", lambda v: v >= 2),
            ("seed weight_decay clip_norm", "finite and at least 0", lambda v: 0 <= v < math.inf),
            ("lr", "finite and above 0", lambda v: 0 < v < math.inf),
            ("crop_area norm_momentum", "above 0 and at most 1", lambda v: 0 < v <= 1),
            ("momentum warmup label_smoothing dropout drop_path ema_decay", "in [0, 1)", lambda v: 0 <= v < 1),
        )
        for names, meaning, holds in rules:
            for name in names.split():
                if not holds(getattr(self, name)):
                    raise ValueError(f"{name}: expected a value {meaning}, got {getattr(self, name)!r}")
        if self.accumulation > self.batch_size:
            raise ValueError(
                f"accumulation: expected at most the batch size {self.batch_size}, got {self.accumulation}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> "TrainConfig":
        """A config from names and values, as a profile or a run record holds them."""
        names = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                raise unknown_name("training setting", name, names)
        return cls(**values)

    def model_options(self) -> dict[str, float]:
        """The settings of this recipe that the network is built with."""
        return {"dropout": self.dropout, "drop_path": self.drop_path, "norm_momentum": self.norm_momentum}


def learning_rate(config: TrainConfig, fraction: float) -> float:
    """LR at `fraction` (0 to 1) of all steps: linear warm-up, then down to zero at 1, however long the run."""
    if fraction < config.warmup:
        return config.lr * fraction / config.warmup
    rest = (fraction - config.warmup) / (1 - config.warmup)
    return config.lr * (1 - rest if config.schedule == "linear" else (1 + math.cos(math.pi * rest)) / 2)


class RMSpropTF(torch.optim.Optimizer):
    """RMSProp as TensorFlow 1 defines it and the paper used it. Differs from torch.optim.RMSprop threefold:
    epsilon is inside the root, the mean square starts at one, and the momentum buffer holds LR-scaled steps."""

    def __init__(self, params, lr: float, decay: float = 0.9, momentum: float = 0.9, eps: float = 1e-3):
        super().__init__(params, {"lr": lr, "decay": decay, "momentum": momentum, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if p not in self.state:
                    self.state[p] = {"square": torch.ones_like(p), "buffer": torch.zeros_like(p)}
            squares = [self.state[p]["square"] for p in params]
            buffers = [self.state[p]["buffer"] for p in params]
            grads = torch._foreach_add([p.grad for p in params], params, alpha=group["weight_decay"])
            torch._foreach_mul_(squares, group["decay"])
            torch._foreach_addcmul_(squares, grads, grads, 1 - group["decay"])
            root = torch._foreach_add(squares, group["eps"])
            torch._foreach_sqrt_(root)
            torch._foreach_div_(grads, root)
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, grads, alpha=group["lr"])
            torch._foreach_sub_(params, buffers)


def make_optimizer(model: nn.Module, config: TrainConfig, fused: bool = True) -> torch.optim.Optimizer:
    """The config's optimizer, with weight decay on kernels and matrices only. With a gradient scaler `fused` must be
    False: if the very first step overflows, torch's fused SGD skips it but keeps an uninitialised momentum."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    options = {"lr": config.lr, "momentum": config.momentum}
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, nesterov=config.momentum > 0, fused=fused, **options)
    return RMSpropTF(groups, **options)


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, config: TrainConfig, n: int) -> None:
    """Move the moving average of weights and batch-norm statistics towards `model`, after `n` earlier updates.

    Early on it forgets faster, min(decay, (1 + n) / (10 + n)), so as not to drag the random initial weights along.
    """
    decay = min(config.ema_decay, (1 + n) / (10 + n))
    averages, currents = ([*m.parameters(), *m.buffers()] for m in (ema, model))
    floats = [i for i, tensor in enumerate(averages) if tensor.is_floating_point()]
    torch._foreach_lerp_([averages[i] for i in floats], [currents[i] for i in floats], 1 - decay)
    for average, current in zip(averages, currents, strict=True):
        if not average.is_floating_point():  # batch norm's count of batches
            average.copy_(current)


def step_seed(seed: int, epoch: int, step: int) -> int:
    """The seed of all random draws of one step, so that a resumed run draws what an uninterrupted one would."""
    return int(np.random.SeedSequence([seed, epoch, step]).generate_state(1, np.uint64)[0] >> 1)


def amp_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of a config's `precision` on a device."""
    if precision == "auto" and device.type == "cuda":
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)


def _autocast(precision: str, device: torch.device) -> torch.autocast:
    dtype = amp_dtype(precision, device)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


@torch.no_grad()
def evaluate(
    model: nn.Module, data, split: str, resolution: int, *, batch_size: int = 256, precision: str = "auto"
) -> dict:
    """Score `model` on a split ("minival" or "test") at `resolution`, on the device the model is on.

    Returns top1 and top5 in percent (top5 is top-k for k = the number of classes if there are fewer), the mean
    cross-entropy as loss, and correct: a bool array of shape (images,), in the split's order.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    loss, top5, correct = torch.zeros((), device=device), torch.zeros((), device=device), []
    for images, labels in data.to(device).eval_batches(split, resolution, batch_size):
        with _autocast(precision, device):
            logits = model(images)
        logits = logits.float()  # (N, classes)
        loss += F.cross_entropy(logits, labels, reduction="sum")
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        top5 += ranked.sum()
        correct.append(ranked[:, 0])
    model.train(was_training)
    correct = torch.cat(correct).cpu().numpy()
    scores = {"top1": 100 * float(correct.mean()), "top5": 100 * top5.item() / len(correct)}
    return scores | {"loss": loss.item() / len(correct), "correct": correct}


def train(
    model: nn.Module, data, config: TrainConfig, run_dir: str | Path, *, about: Mapping | None = None, device=None
) -> dict:
    """Train, score once on test, and return the run record, which is also written to `run_dir/run.json`.

    `data` is any object with `to(device)`, `counts` ({"train": n, "minival": n, "test": n}), `describe()` (a dict
    with a "fingerprint"), `train_batches(config, epoch, start)` and `eval_batches(split, resolution, batch_size)`; both
    yield (images (N, 3, R, R) float, labels (N,)). `about` is added to the record (profile, method ...).

    `run_dir` also gets history.jsonl (a line per epoch, minival with the EMA weights), test_correct.npy (per image,
    EMA weights) and checkpoint.pt (everything after each epoch; in the end the EMA weights alone). Calling again
    continues an interrupted run, and returns the record of a finished, failed or diverged one.

    Raises ValueError if run_dir holds a run of another config, model or data, or a batch exceeds the training
    set; RuntimeError if another process holds run_dir. Any other error ends the run with status "failed".
    """
    run_dir, about = Path(run_dir), dict(about or {})
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {str(device)!r} was asked for, but torch finds no CUDA GPU; use 'cpu'")
    if data.counts["train"] < config.batch_size:
        raise ValueError(f"batch_size: {config.batch_size} exceeds the training set's {data.counts['train']} images")
    dataset, cost = data.describe(), dataclasses.asdict(count_cost(model, config.resolution))
    identity = {"config": dataclasses.asdict(config), "cost": cost, "dataset": {"fingerprint": dataset["fingerprint"]}}
    run_dir.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(run_dir / ".lock", blocking=False):
            record = read_record(run_dir)
            if record is not None:
                _check_identity(run_dir / "run.json", record, identity)
                return record
            checkpoint = _load_checkpoint(run_dir / "checkpoint.pt", identity)
            label = f"{about.get('method', 'run'):<10} seed {config.seed}"
            head = {"schema": SCHEMA_VERSION, "status": "failed", **about, "seed": config.seed}
            head |= identity | {"dataset": dataset} | environment(device)  # the code that runs, not what it becomes
            try:
                record = head | _train(model, data, config, run_dir, device, label, checkpoint, identity)
            except Exception as error:
                write_json(run_dir / "run.json", head | {"error": f"{type(error).__name__}: {error}"})
                raise
            write_json(run_dir / "run.json", record)
            if record["status"] == "finished":  # keep the EMA weights; optimizer and raw weights triple the size
                last = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True)
                kept = {name: last[name] for name in ("ema", "identity")}
                replace_file(run_dir / "checkpoint.pt", partial(torch.save, kept))
            return record
    except filelock.Timeout:
        raise RuntimeError(f"{run_dir} is held by another process, which is training this run now") from None


def _train(model, data, config, run_dir, device, label, checkpoint, identity) -> dict:
    """The loop of `train`: what the record says of how it went."""
    model = model.to(device, memory_format=torch.channels_last)
    data = data.to(device)
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype(config.precision, device) == torch.float16)
    optimizer = make_optimizer(model, config, fused=not scaler.is_enabled())
    ema = copy.deepcopy(model).requires_grad_(False)
    parts = {"model": model, "ema": ema, "optimizer": optimizer, "scaler": scaler}
    progress = {"history": [], "started": datetime.now(UTC).isoformat(timespec="seconds")}
    progress["micro_batch"] = math.ceil(config.batch_size / config.accumulation)
    if checkpoint is not None:
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        progress = checkpoint["progress"]
        print(f"{label}  continues after epoch {len(progress['history'])}", flush=True)
    history = progress["history"]
    steps = data.counts["train"] // config.batch_size
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    for epoch in range(len(history), config.epochs):
        begin, train_loss = time.perf_counter(), torch.zeros((), device=device)
        model.train()
        batches = data.train_batches(config, epoch)
        bar = tqdm(batches, f"{label}  epoch {epoch + 1}", steps, leave=False, disable=not sys.stdout.isatty())
        for step, (images, labels) in enumerate(bar):
            lr = learning_rate(config, (epoch * steps + step + 0.5) / (config.epochs * steps))
            for group in optimizer.param_groups:
                group["lr"] = lr
            # Forward and backward, in micro-batches that fit into memory
            loss = _backward(model, images, labels, config, scaler, progress, step_seed(config.seed, epoch, step))
            # Clip the whole gradient, take the step, follow it with the moving average
            if config.clip_norm > 0:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            update_ema(ema, model, config, epoch * steps + step)
            # Reading the loss waits for the device, so only now and then
            train_loss += loss
            if (step % 50 == 0 or step == steps - 1) and not math.isfinite(train_loss.item()):
                print(f"{label}  diverged in epoch {epoch + 1}, step {step + 1}, at LR {lr:.3g}", flush=True)
                diverged = {"epoch": epoch + 1, "step": step + 1, "lr": lr}
                return {"status": "diverged", "diverged": diverged} | _closing(progress, device)
        train_seconds = time.perf_counter() - begin
        minival = evaluate(ema, data, "minival", config.resolution, precision=config.precision)
        row = {"epoch": epoch + 1, "lr": lr, "train_loss": train_loss.item() / steps}
        row |= {f"minival_{name}": minival[name] for name in ("top1", "top5", "loss")}
        row |= {"images_per_second": steps * config.batch_size / train_seconds, "seconds": time.perf_counter() - begin}
        history.append(row)
        state = {name: part.state_dict() for name, part in parts.items()}
        state |= {"progress": progress, "identity": identity}
        replace_file(run_dir / "checkpoint.pt", partial(torch.save, state))
        lines = "".join(json.dumps(row) + "\n" for row in history)
        replace_file(run_dir / "history.jsonl", lambda path, lines=lines: path.write_text(lines))
        print(_epoch_line(label, history, config.epochs), flush=True)

    begin = time.perf_counter()
    test = evaluate(ema, data, "test", config.resolution, precision=config.precision)
    raw = evaluate(model, data, "test", config.resolution, precision=config.precision)
    np.save(run_dir / "test_correct.npy", test.pop("correct"))
    del raw["correct"]
    progress["test_seconds"] = time.perf_counter() - begin
    print(f"{label}  test top-1 {test['top1']:.2f} % (raw weights {raw['top1']:.2f} %)", flush=True)
    return {"status": "finished", "test": test, "test_raw": raw} | _closing(progress, device)


def _backward(model, images, labels, config, scaler, progress, seed) -> Tensor:
    """Gradient of one whole batch. Out of memory: again with half the micro-batch; the effective batch stays."""
    while True:
        try:
            torch.manual_seed(seed)  # dropout and stochastic depth
            total = torch.zeros((), device=images.device)
            for x, y in zip(*(t.split(progress["micro_batch"]) for t in (images, labels)), strict=True):
                with _autocast(config.precision, images.device):
                    loss = F.cross_entropy(model(x), y, label_smoothing=config.label_smoothing) * len(y) / len(labels)
                scaler.scale(loss).backward()
                total += loss.detach()
            return total
        except torch.OutOfMemoryError:
            if progress["micro_batch"] == 1:
                raise
            model.zero_grad(set_to_none=True)
        # Outside the handler, whose traceback would keep the failed attempt's tensors alive
        progress["micro_batch"] = math.ceil(progress["micro_batch"] / 2)
        torch.cuda.empty_cache()
        print(f"out of memory: going on with micro-batches of {progress['micro_batch']}", flush=True)


def load_trained(run_dir: str | Path, model: nn.Module) -> nn.Module:
    """`model` with the final EMA weights of a finished run, in evaluation mode."""
    path = Path(run_dir) / "checkpoint.pt"
    if not path.exists() or read_record(run_dir) is None:
        raise FileNotFoundError(f"{path} of a finished run is not there (checkpoints are not committed): run it first")
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["ema"])
    return model.eval()


def read_record(run_dir: str | Path) -> dict | None:
    """A run's record, or None if the run has not ended. Raises ValueError for a damaged file."""
    path = Path(run_dir) / "run.json"
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text())
        if record["schema"] == SCHEMA_VERSION:
            return record
        raise ValueError(f"schema {record['schema']!r}, expected {SCHEMA_VERSION}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); restore it, or delete it to run again") from None


def write_json(path: Path, value: object) -> None:
    """Write JSON, whole or not at all."""
    replace_file(path, lambda file: file.write_text(json.dumps(value, indent=2) + "\n"))


def replace_file(path: Path, write) -> None:
    """Call write(file) on a file beside `path`, flush it to the disk, rename it over `path`: old or new, never half."""
    unfinished = path.with_name(f".{path.name}.partial")
    try:
        write(unfinished)
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _load_checkpoint(path: Path, identity: dict) -> dict | None:
    if not path.exists():
        return None
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a torn or foreign file
        print(f"{path} is unreadable ({type(error).__name__}: {error}); starting this run anew", flush=True)
        return None
    _check_identity(path, checkpoint["identity"], identity)
    # One without the raw weights is of a finished run whose record was deleted: that asks for a new run.
    return checkpoint if "model" in checkpoint else None


def full_config(record: Mapping) -> dict:
    """A record's config, with the defaults of settings that are younger than the record."""
    return dataclasses.asdict(TrainConfig()) | record.get("config", {})


def _check_identity(path: Path, found: dict, expected: dict) -> None:
    """Refuse a record or checkpoint that was made with another config, network or data set."""
    for part, wanted in expected.items():
        made = full_config(found) if part == "config" else found.get(part, {})
        for key, new in wanted.items():
            if (old := made.get(key)) != new:
                raise ValueError(
                    f"{path} was made with {part} {key} = {old!r}, now {new!r} is asked for; delete "
                    f"{path.parent} to run anew, or keep it and give another results folder"
                )


def _epoch_line(label: str, history: list[dict], epochs: int) -> str:
    last = history[-1]
    left = timedelta(seconds=int((epochs - len(history)) * np.median([row["seconds"] for row in history])))
    return (
        f"{label}  epoch {last['epoch']:>3}/{epochs}  loss {last['train_loss']:.3f}  "
        f"minival top-1 {last['minival_top1']:5.2f} %  {last['images_per_second']:,.0f} images/s  left {left}"
    )


def _closing(progress: dict, device: torch.device) -> dict:
    """The closing part of a record: time, speed, memory."""
    history = progress["history"]
    row = history[-1] if history else {}  # empty if it diverged in the first epoch
    speeds, seconds = [row["images_per_second"] for row in history], [row["seconds"] for row in history]
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device)
    else:  # of the whole process; Linux counts in KiB
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "minival": {name: row.get(f"minival_{name}") for name in ("top1", "top5", "loss")},
        "seconds": sum(seconds) + progress.get("test_seconds", 0.0),
        "images_per_second": float(np.median(speeds)) if speeds else None,
        "peak_memory_bytes": memory,
        "micro_batch": progress["micro_batch"],
        "started": progress["started"],
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def environment(device: torch.device) -> dict:
    """What a run ran on: device, versions, commit."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif os.path.exists("/proc/cpuinfo"):
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        name = f"{found[1] if found else name}, {torch.get_num_threads()} threads"
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions["torchvision"] = importlib.metadata.version("torchvision")
    versions["cuda"] = torch.version.cuda if device.type == "cuda" else None
    return {"device": {"type": device.type, "name": name}, "versions": versions, "git": git_state()}


def git_state() -> dict:
    """Commit of this library's checkout, and whether its code differs; $EFFNET_COMMIT where there is no checkout."""
    git, ran = ["git", "-C", str(Path(__file__).parent)], {"capture_output": True, "text": True, "check": True}
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], **ran).stdout.strip()
        changes = [*git, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!results"]
        return {"commit": commit, "dirty": bool(subprocess.run(changes, **ran).stdout)}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": os.environ.get("EFFNET_COMMIT"), "dirty": None}


# ---- 5. Reading a network ------------------------------------------------------------------------------------------


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
    return (maps - low) / (high - low).clamp_min(1e-12)
