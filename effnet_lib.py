"""EfficientNet in one file: scaling, network, cost, recipe, training. It needs torch, numpy and pydantic alone.

Reference: M. Tan and Q. V. Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks",
ICML 2019, arXiv 1905.11946 ("the paper" below). FLOPs are multiply-adds, as in the paper; resolutions are pixels of a
side of a square image; accuracies are percentages; shapes are (N, C, H, W).
"""

import copy
import dataclasses
import difflib
import math
import re
from collections import namedtuple
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

# ---- 1. Scaling ----------------------------------------------------------------------------------------------------


def unknown_name(kind: str, name: object, valid: Iterable[str]) -> ValueError:
    """Return the error for a name that is not one of `valid`. It names the nearest valid name and all of them."""
    valid = [str(v) for v in valid]
    near = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ValueError(f"unknown {kind} {name!r}.{hint} Valid: {', '.join(valid)}.")


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

    def __mul__(self, other: "Scaling") -> "Scaling":
        """Multiply the coefficients: apply this scaling on top of `other`, for example of a study's baseline."""
        return Scaling(self.depth * other.depth, self.width * other.width, self.resolution * other.resolution)

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
    """Return d = alpha^phi, w = beta^phi, r = gamma^phi (Equation 3 of the paper). FLOPs grow by about 2^phi."""
    for name, value in {"alpha": alpha, "beta": beta, "gamma": gamma}.items():
        if not value >= 1:
            raise ValueError(f"{name}: expected a coefficient of at least 1 (Equation 3), got {value!r}")
    if not phi >= 0:
        raise ValueError(f"phi: expected a compound coefficient of at least 0, got {phi!r}")
    return Scaling(alpha**phi, beta**phi, gamma**phi)


def round_filters(channels: int, width: float, divisor: int = 8) -> int:
    """Return the scaled channels as a multiple of `divisor`, never below 90 % of the exact value."""
    scaled = channels * width
    rounded = max(divisor, int(scaled + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * scaled else rounded


def round_repeats(layers: int, depth: float) -> int:
    """Return the scaled layers of a stage, rounded up, at least one."""
    return max(1, math.ceil(round(layers * depth, 9)))  # 3 * 1.1 / 1.1 is slightly above 3, and must not become 4


def round_resolution(resolution: float, base: int = 224) -> int:
    """Return a resolution coefficient in pixels per side, rounded to the nearest whole number."""
    return int(base * resolution + 0.5)


# ---- 2. Network ----------------------------------------------------------------------------------------------------

# A row of the paper's Table 1: `layers` MBConv blocks. Only the first block has the stride
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
    """Convolution, batch norm (EfficientNet sets its eps and momentum), and SiLU unless `activation` is False."""

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
    """Drop a sample's whole residual branch in training with probability `p`, and scale the others by 1 / (1 - p).
    The survival probability is a tensor, because torch.compile compiles again for every Python number."""

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


class EfficientNet(nn.Module):
    """B0 scaled in depth and width by `scaling`. Its input has `round_resolution(scaling.resolution, base)` pixels.

    stem_stride: 1 halves the total stride to 16, for images of 64 px and less with their small last feature maps.
    drop_path: stochastic depth's drop probability (1 - the paper's 0.8), to which block n of N comes by (n - 1) / N.
    norm_momentum: momentum of batch norm. PyTorch's 0.01 is the paper's 0.99, because TensorFlow counts 1 - momentum.
    se_expanded: size squeeze-and-excitation from the expanded channels, a common mistake that the study measures.
    zero_init_residual: start the last batch norm of every residual branch at zero, so that each block begins as the
        identity (Goyal et al. 2017, arXiv 1706.02677). Without it the gradient at initialisation grows with depth.
    """

    def __init__(
        self,
        scaling: Scaling = TABLE7["baseline"],
        num_classes: int = 1000,
        *,
        stem_stride: int = 2,
        dropout: float = 0.2,
        drop_path: float = 0.2,
        norm_momentum: float = 0.01,
        se_expanded: bool = False,
        zero_init_residual: bool = False,
    ):
        super().__init__()
        if not isinstance(num_classes, int) or num_classes < 1:
            raise ValueError(f"num_classes: expected a whole number of at least 1, got {num_classes!r}")
        if stem_stride not in (1, 2):
            raise ValueError(f"stem_stride: expected 1 or 2, got {stem_stride!r}")
        for name, p in {"dropout": dropout, "drop_path": drop_path}.items():
            if not 0 <= p < 1:
                raise ValueError(f"{name}: expected a probability in [0, 1), got {p!r}")
        self.scaling, self.zero_init_residual = scaling, zero_init_residual

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
                blocks.append(MBConv(c_in, c_out, stage.expand, stage.kernel, stride, p, se_expanded))
                c_in, block = c_out, block + 1
            self.stages.append(blocks)
        self.head = ConvNorm(c_in, round_filters(HEAD_CHANNELS, scaling.width))
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(self.head.conv.out_channels, num_classes)

        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps, module.momentum = 1e-3, norm_momentum  # the eps is the paper's
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial weights. Convolutions follow the authors: normal, variance 2 / fan-out, counted per group.
        The classifier is uniform within 1 / sqrt(fan-in): at 10 classes 1 / sqrt(classes) gives too large logits."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, MBConv) and module.residual and self.zero_init_residual:
                nn.init.zeros_(module.project.norm.weight)
        bound = 1 / math.sqrt(self.classifier.in_features)
        nn.init.uniform_(self.classifier.weight, -bound, bound)
        nn.init.zeros_(self.classifier.bias)

    def features(self, x: Tensor) -> Tensor:
        """Return the last feature map: (N, 3, H, W) to (N, C_head, ceil(H / 32), ceil(W / 32)) at stem stride 2."""
        return self.head(self.stages(self.stem(x)))

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, H, W)
        x = self.features(x)  # (N, C_head, h, w)
        x = x.mean((2, 3))  # (N, C_head)
        x = self.dropout(x)
        device = "cpu" if x.device.type == "cpu" else "cuda"
        with torch.autocast(device, enabled=False):  # in bf16 the best two logits of some images would be equal
            return self.classifier(x.to(self.classifier.weight.dtype))  # (N, num_classes)


def efficientnet(name: str, num_classes: int = 1000, **options) -> EfficientNet:
    """Build "b0" to "b7" with the variant's own dropout, unless `dropout` is given. `options` go to `EfficientNet`."""
    if name not in VARIANTS:
        raise unknown_name("model", name, VARIANTS)
    return EfficientNet(VARIANTS[name], num_classes, **{"dropout": VARIANT_DROPOUT[name], **options})


# ---- 3. Cost -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """Parameters; multiply-adds of one image's forward pass; output elements of its convolutions and classifier."""

    params: int
    flops: int
    activations: int


def count_cost(model: nn.Module, resolution: int, channels: int = 3) -> Cost:
    """Count the exact cost of `model` for one input (1, channels, resolution, resolution). Only shapes are computed.
    FLOPs cover convolutions and matrix products, forward only: torch miscounts depthwise convolutions backward."""
    if not isinstance(resolution, int) or resolution < 1:
        raise ValueError(f"resolution: expected a whole number of pixels, at least 1, got {resolution!r}")
    model, activations = copy.deepcopy(model).to("meta").eval(), []
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda module, inputs, output: activations.append(output.numel()))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, channels, resolution, resolution, device="meta"))
    params = sum(p.numel() for p in model.parameters())
    return Cost(params, counter.get_total_flops() // 2, sum(activations))


# ---- 4. Recipe -----------------------------------------------------------------------------------------------------


class Settings(BaseModel):
    """Settings by name, strictly typed. An invalid one raises a ValueError with name, value and expectation."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **values: object):
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise self._readable(error.errors()[0]) from None

    def replace(self, **changes: object) -> "Settings":
        """Return a copy of these settings with some values changed. The copy is checked again."""
        return type(self)(**{**dict(self), **changes})

    @classmethod
    def _readable(cls, error: Mapping) -> ValueError:
        kind, value, name = error["type"], error["input"], ": ".join(map(str, error["loc"]))
        if kind == "extra_forbidden":
            return unknown_name("setting", name, cls.model_fields)
        if kind == "literal_error":
            return unknown_name(name, value, re.findall(r"\w+", error["ctx"]["expected"].replace(" or ", " ")))
        if kind == "missing":
            return ValueError(f"{name} is missing")
        if kind == "value_error":  # raised by one of our validators
            return ValueError(f"{name}: {error['ctx']['error']}" if name else str(error["ctx"]["error"]))
        expected = re.sub("^(greater|less)", r"a value \1", error["msg"].removeprefix("Input should be "))
        hint = "; in YAML write true or false" if kind == "bool_type" and isinstance(value, str) else ""
        return ValueError(f"{name}: expected {expected}, got {value!r}{hint}")


Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
AtLeastZero = Annotated[float, Field(ge=0)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # what torch and a table's column of whole numbers hold


class TrainConfig(Settings):
    """One run's recipe. `EfficientNet` takes some of its settings: see `model_options`."""

    resolution: Count = 224  # pixels, for training and for every evaluation
    seed: Seed = 0
    epochs: Count = 10
    batch_size: Annotated[int, Field(ge=2)] = 128  # images per optimizer step, with any accumulation
    accumulation: Count = 1  # micro-batches of a step, at most; batch norm sees one micro-batch at a time
    optimizer: Literal["rmsprop", "sgd"] = "rmsprop"  # RMSProp as TensorFlow defines it, or SGD with Nesterov momentum
    lr: Positive = 0.016  # the peak, at this batch size; the usual value for rmsprop is 0.016 for 256 images
    momentum: BelowOne = 0.9
    weight_decay: AtLeastZero = 1e-5  # L2, not on norms and biases
    schedule: Literal["cosine", "linear"] = "cosine"  # from the peak to its final fraction over all steps
    final_lr_fraction: Share = 0.0  # last rate / peak rate; a value above 0 is a mistake that the study measures
    warmup_fraction: BelowOne = 0.05  # fraction of all steps in which the learning rate rises linearly
    label_smoothing: BelowOne = 0.1
    dropout: BelowOne = 0.2
    drop_path: BelowOne = 0.2  # stochastic depth, rising from block to block: see `EfficientNet`
    se_expanded: bool = False  # squeeze-and-excitation sized from the expanded channels, a mistake to be measured
    zero_init_residual: bool = False  # the last norm of each residual branch begins at zero
    norm_momentum: PositiveShare = 0.01  # momentum of batch norm as PyTorch defines it; short runs need a larger value
    clip_norm: AtLeastZero = 0.0  # limit of the whole gradient's norm, which grows with depth; 0 is off
    ema_decay: BelowOne = 0.9999  # of the moving average, reached after a warm-up: see `update_ema`
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # auto: bf16 or else fp16 on a GPU, fp32 on a CPU
    crop_area: PositiveShare = 0.25  # random resized crop: least area drawn; 1 is off
    flip: bool = True  # random horizontal flip; not for digits
    translate: Annotated[float, Field(ge=0, le=0.5)] = 0.0  # by up to this fraction of a side; CIFAR's 4 of 32 is 0.125
    rotate: Annotated[float, Field(ge=0, le=180)] = 0.0  # by up to so many degrees
    color_jitter: Share = 0.0  # brightness, contrast and saturation, by up to this fraction
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0  # by up to this fraction of the colour circle
    randaugment: Annotated[int, Field(ge=0, le=30)] = 0  # magnitude of two of torchvision's 14 operations; 0 is off
    erasing: Share = 0.0  # random erasing: fraction of the images
    mixup: AtLeastZero = 0.0  # alpha of its Beta distribution; 0 is off
    cutmix: AtLeastZero = 0.0  # alpha of CutMix; if both are on, each image gets one of them
    sync_norm: bool = False  # on several GPUs: batch norm over the micro-batches of all of them, not of each alone
    pretrained: bool = False  # begin with torchvision's ImageNet weights and a new classifier
    freeze: bool = False  # train the classifier alone
    compile: Literal["auto", "blocks", "graph", "never"] = "auto"  # how effnet_study runs steps on a GPU
    deterministic: bool = False  # on a GPU: only kernels that repeat exactly, which are slower
    save_seconds: Positive = 300.0  # seconds between checkpoints; there is one after every epoch too
    save_steps: Annotated[int, Field(ge=0)] = 0  # steps between checkpoints; 0 is off

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        if self.freeze and not self.pretrained:
            raise ValueError("freeze: a backbone without pretrained weights cannot be frozen; use pretrained: true")
        if self.pretrained and self.se_expanded:
            raise ValueError("se_expanded: there are no ImageNet weights of such a network; use it without pretrained")
        if self.accumulation > (most := self.batch_size // 2):  # batch norm cannot train on a single image
            raise ValueError(f"accumulation: expected at most half of batch_size, {most}, got {self.accumulation}")
        return self

    def model_options(self) -> dict[str, float | bool]:
        """Return the settings that `EfficientNet` takes."""
        names = ("dropout", "drop_path", "se_expanded", "zero_init_residual", "norm_momentum")
        return {name: getattr(self, name) for name in names}


def learning_rate(config: TrainConfig, fraction: float) -> float:
    """Return the learning rate at `fraction` (0 to 1) of all steps: a linear warm-up, then a decay until the end."""
    if fraction < config.warmup_fraction:
        return config.lr * fraction / config.warmup_fraction
    rest = (fraction - config.warmup_fraction) / (1 - config.warmup_fraction)
    left = 1 - rest if config.schedule == "linear" else (1 + math.cos(math.pi * rest)) / 2
    return config.lr * (config.final_lr_fraction + (1 - config.final_lr_fraction) * left)


class RMSpropTF(torch.optim.Optimizer):
    """RMSProp as TensorFlow 1 defines it and the paper used it. It differs from torch.optim.RMSprop in three ways:
    epsilon is inside the root, the mean square starts at one, and the momentum buffer holds LR-scaled steps."""

    def __init__(self, params, lr: float, decay: float = 0.9, momentum: float = 0.9, eps: float = 1e-3):
        super().__init__(params, {"lr": lr, "decay": decay, "momentum": momentum, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self) -> None:
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
            root = torch._foreach_sqrt(torch._foreach_add(squares, group["eps"]))
            torch._foreach_div_(grads, root)
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, grads, alpha=group["lr"])
            torch._foreach_sub_(params, buffers)


def make_optimizer(model: nn.Module, config: TrainConfig, fused: bool = True) -> torch.optim.Optimizer:
    """Build the config's optimizer, with weight decay on kernels and matrices only. With a gradient scaler `fused` must
    be False: if the very first step overflows, torch's fused SGD skips it but keeps an uninitialised momentum. `None`
    lets torch choose a fast way."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    options = {"lr": config.lr, "momentum": config.momentum}
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, nesterov=config.momentum > 0, fused=fused or None, **options)
    return RMSpropTF(groups, **options)


@torch.no_grad()
def update_ema(ema: list[Tensor], now: list[Tensor], ema_decay: float, n: int) -> None:
    """Move the moving average `ema` towards the tensors `now`, after `n` earlier updates. Early updates use a smaller
    decay, min(decay, (1 + n) / (10 + n)), so that the random initial weights are soon forgotten."""
    torch._foreach_lerp_(ema, now, 1 - min(ema_decay, (1 + n) / (10 + n)))


def step_seed(seed: int, epoch: int, step: int, first: int = 0) -> int:
    """Return the seed of dropout and stochastic depth for the micro-batch that starts at image `first` of a step.
    So a resumed run draws the same numbers, and so do several processes with the micro-batches of one process."""
    return int(np.random.SeedSequence([seed, epoch, step, first]).generate_state(1, np.uint64)[0] >> 1)


# ---- 5. Training ---------------------------------------------------------------------------------------------------


def amp_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype in which `precision` computes on a device. By torch's default a GPU convolves fp32 as TF32."""
    if precision == "auto" and device.type == "cuda":
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Return the context in which a forward pass runs in `precision`."""
    dtype = amp_dtype(precision, device)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


class Trainer:
    """Trains `model`, which it moves to the device. `ema` is the moving average of its weights, which is scored."""

    def __init__(self, model: nn.Module, config: TrainConfig, device: torch.device):
        self.config, self.device, self.rank = config, device, 0
        self.micro_batch = math.ceil(config.batch_size / config.accumulation)
        self.model = model.to(device, memory_format=torch.channels_last).train()
        self.forward = self.model  # the module that a step calls; several processes wrap it
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        # Weights and batch norm's statistics are averaged, batch norm's counts of batches are copied
        tensors = [[*module.state_dict(keep_vars=True).values()] for module in (self.ema, self.model)]
        self.averaged = [[x for x in group if x.is_floating_point()] for group in tensors]
        self.counts = [[x for x in group if not x.is_floating_point()] for group in tensors]
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype(config.precision, device) == torch.float16)
        self.optimizer = make_optimizer(self.model, config, fused=not self.scaler.is_enabled())

    def step(self, images: Tensor, labels: Tensor, epoch: int, step: int, steps: int) -> Tensor:
        """Take optimizer step `step` (from 0) of `steps` in `epoch` (from 0). Return the mean loss, detached.

        images: (N, 3, R, R); labels: (N,), or (N, classes) of mixed images. Only fp16's scaler waits for the device."""
        config, taken = self.config, epoch * steps + step
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, (taken + 0.5) / (config.epochs * steps))
        # Forward and backward, in micro-batches that fit into memory
        loss = self.backward(images, labels, epoch, step)
        # Clip the whole gradient; its norm also shows whether training diverges
        if config.clip_norm > 0:
            self.scaler.unscale_(self.optimizer)
            self.norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        else:
            self.norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        # Take the step, then move the average towards the new weights
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        update_ema(*self.averaged, config.ema_decay, taken)
        if self.counts[0]:  # a network may have no batch norm
            torch._foreach_copy_(*self.counts)
        return loss

    def backward(self, images: Tensor, labels: Tensor, epoch: int = 0, step: int = 0) -> Tensor:
        """Add the gradient of the mean loss over these images, in micro-batches of about one size. Return the loss."""
        total, first = torch.zeros((), device=self.device), 0
        parts = max(1, min(math.ceil(len(labels) / self.micro_batch), len(labels) // 2))  # of two images or more
        for x, y in zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True):
            torch.manual_seed(step_seed(self.config.seed, epoch, step, self.rank * len(labels) + first))
            first += len(y)
            total += self.add_gradient(x, y, len(y) / len(labels), last=first == len(labels))
        return total

    def add_gradient(self, images: Tensor, labels: Tensor, weight: float, last: bool) -> Tensor:
        """Add the gradient of `weight` times a micro-batch's mean loss, and return it. last: no other follows."""
        with autocast(self.config.precision, self.device):
            loss = F.cross_entropy(self.forward(images), labels, label_smoothing=self.config.label_smoothing)
        loss = loss * weight
        self.scaler.scale(loss).backward()
        return loss.detach()

    def state_dict(self) -> dict:
        """Return all that a step changes."""
        return {name: getattr(self, name).state_dict() for name in ("model", "ema", "optimizer", "scaler")}

    def load_state_dict(self, state: Mapping) -> None:
        """Go back to what `state_dict` returned, even out of a step that failed half-way: hence a new scaler."""
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.scaler.is_enabled())
        for name in ("model", "ema", "optimizer", "scaler"):
            getattr(self, name).load_state_dict(state[name])


@torch.no_grad()
def evaluate(
    model: nn.Module, data, split: str, resolution: int, *, batch_size: int = 256, precision: str = "auto"
) -> dict:
    """Score `model` on a split of `data` ("minival" or "test") at `resolution`, on the device that the model is on.

    Returns top1 and top5 in percent (top5 is 100 with five classes or fewer), the mean cross-entropy as loss, and numpy
    arrays (images,) in the split's order: correct, label, predicted, confidence (the predicted class's probability)."""
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    loss, top5, answers = torch.zeros((), device=device), torch.zeros((), device=device), []
    try:
        for images, labels in data.eval_batches(split, resolution, batch_size):
            images, labels = images.to(device), labels.to(device)
            with autocast(precision, device):
                logits = model(images).float()  # (N, classes)
            loss += F.cross_entropy(logits, labels, reduction="sum")
            ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices  # (N, 5)
            top5 += (ranked == labels[:, None]).sum()
            answers.append((labels, ranked[:, 0], logits.softmax(1).amax(1)))
    finally:
        model.train(was_training)
    label, predicted, confidence = (torch.cat(part).cpu().numpy() for part in zip(*answers, strict=True))
    correct, n = predicted == label, len(label)
    scores = {"top1": 100 * float(correct.mean()), "top5": 100 * top5.item() / n, "loss": loss.item() / n}
    return scores | {"correct": correct, "label": label, "predicted": predicted, "confidence": confidence}


# An event of training: `step` (from 1) of `steps` in `epoch` (from 0) was taken. If loss is None, `epoch` has ended
Event = namedtuple("Event", "epoch step steps loss")


def fit(trainer: Trainer, data, epoch: int = 0, step: int = 0) -> Iterator[Event]:
    """Train, and yield after every step and every epoch, so that the caller can score, save, log or stop.

    Start after `step` steps of `epoch` (from 0), as in a resumed run. data.counts["train"] is the number of images;
    data.train_batches(config, epoch, start) yields an epoch's whole batches (images, labels) from step `start` on."""
    config, steps = trainer.config, data.counts["train"] // trainer.config.batch_size
    for now in range(epoch, config.epochs):
        start = step if now == epoch else 0
        for done, (images, labels) in enumerate(data.train_batches(config, now, start), start + 1):
            yield Event(now, done, steps, trainer.step(images, labels, now, done - 1, steps))
        yield Event(now, steps, steps, None)
